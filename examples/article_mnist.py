"""The article's first experiment: a CNN on MNIST with each loss, as published and mended.

    python examples/article_mnist.py --root DIR --json mnist.json
    python examples/article_mnist.py --root DIR --json published.json --as-published

DIR holds MNIST's four IDX files, raw or gzip. Every loss gets the same network, initial weights,
order of batches and settings; a run for each loss and seed. `--resume` goes on after an
interruption, from the last epoch, with the same result bit for bit.

`--as-published` is what the article's code does: the class weights are in no optimiser and stay at
their random start; the learning rate is 0.01; "Simple ArcFace" takes 28.6 off the cosine; the
cross-entropy is over all 128 outputs of the network. By default the class weights are trained, the
learning rate is 0.001, the margin is 28.6 degrees, cross-entropy has a linear head, and every loss
runs with and without the CenterInvariant regulariser.

Accuracies, in %: 1-NN is the nearest neighbour of a test image among the training images, by the
cosine of embeddings, or by their Euclidean distance without normalisation, as the article measured;
arg max is the class of the largest logit. Accuracy on the training images themselves is by 1-NN
that leaves the image out; the article's left it in, which measures only whether embeddings of
different classes coincide.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from study.command import whole_number
from study.criteria import Variant, as_published, losses, regularized, setting
from study.digits import NUM_CLASSES, DataError, Digits, load_data
from study.measure import closed_set, embed
from study.networks import ArticleCNN
from study.runner import (
    Job,
    Training,
    add_run_arguments,
    check_run_arguments,
    choose_published,
    open_runs,
    run_jobs,
)
from study.store import digest
from study.tables import lowest_to_highest, missing_runs, number, spread, text_table
from study.training import Network, Progress, Recipe
from torch import Tensor

import fused_margin as fm

SCATTERED_IMAGES = 1000  # test images whose embeddings are kept if they are in three dimensions


def variants(published: bool) -> dict[str, Variant]:
    """The losses of the experiment by name."""

    def with_center_invariant(plain: dict[str, Variant]) -> dict[str, Variant]:
        center_invariant = fm.regularizers.CenterInvariant
        return regularized(plain, "center_invariant", "CenterInvariant", center_invariant)

    if published:
        known = as_published()
        return with_center_invariant({"arcface": known.pop("arcface")}) | known
    return losses() | with_center_invariant(losses())


def prepare(
    variant: Variant, data: Digits, recipe: Recipe, seed: int, embedding_size: int
) -> Training:
    """Build network and criterion from the seed; the network first, the same for all losses."""
    torch.manual_seed(seed)
    device = data.train_images.device
    network = Network(ArticleCNN(embedding_size), recipe.precision).to(device)
    criterion = variant.build(NUM_CLASSES, embedding_size).to(device)
    return Training(
        network,
        criterion,
        variant.regularizer and variant.regularizer(),
        data.train_images,
        data.train_labels,
        recipe,
        seed,
    )


def measure(training: Training, progress: Progress, data: Digits) -> dict[str, Any]:
    """Measure what was trained, on the test images and on the training images."""
    network, criterion = training.network, training.criterion
    train, test = embed(network, data.train_images), embed(network, data.test_images)
    result: dict[str, Any] = {
        "scale": setting(criterion, "scale"),
        "margin": setting(criterion, "margin"),
        **closed_set(criterion, train, data.train_labels, test, data.test_labels),
        "losses": progress.losses,
        "seconds": progress.seconds,
        "threads": torch.get_num_threads(),
    }
    if progress.cosines:
        result["cosines"] = progress.cosines
    if test.shape[1] == 3:
        result["sphere"] = sphere(test, data.test_labels, getattr(criterion, "weight", None))
    return result


def sphere(embeddings: Tensor, labels: Tensor, weight: Tensor | None) -> dict[str, Any]:
    """Directions of the first test embeddings and of the class weights, for a picture."""

    def rounded(points: Tensor) -> list[list[float]]:
        unit = F.normalize(points.detach()).tolist()
        return [[round(coordinate, 3) for coordinate in point] for point in unit]

    return {
        "points": rounded(embeddings[:SCATTERED_IMAGES]),
        "labels": labels[:SCATTERED_IMAGES].tolist(),
        "weights": None if weight is None else rounded(weight),
    }


def rows(runs: Sequence[dict[str, Any]], titles: dict[str, Variant]) -> list[list[str]]:
    """The cells of the table: a line for each loss, over its seeds."""
    lines = []
    for name in [name for name in titles if any(run["loss"] == name for run in runs)]:
        mine = [run for run in runs if run["loss"] == name]
        columns = ("test_nearest", "test_nearest_euclidean", "test_arg_max", "train_nearest")
        lines.append(
            [
                titles[name].title,
                lowest_to_highest([run["scale"] for run in mine]),
                *(spread([run[column] for run in mine]) for column in columns),
                number(statistics.median(second for run in mine for second in run["seconds"]), 1),
                str(len(mine)),
            ]
        )
    return lines


HEADER = (
    "loss", "scale", "test 1-NN", "Euclidean", "arg max", "train 1-NN", "s/epoch", "runs",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --root DIR [options] (--help lists them)",
        description="Train the article's CNN on MNIST with each loss.",
    )
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", required=True, help="folder of MNIST's IDX files")
    add(
        "--as-published", action="store_true",
        help="as the article's code: class weights frozen, lr 0.01, Simple ArcFace with its offset",
    )  # fmt: skip
    published, mended = (", ".join(variants(which)) for which in (True, False))
    add(
        "--losses", nargs="+", choices=[*variants(False), *variants(True)], metavar="LOSS",
        help=f"of {mended}; with --as-published of {published}; default: all of these",
    )  # fmt: skip
    add("--limit", type=whole_number(2), metavar="N", help="train on the first N images only")
    add_run_arguments(
        parser, seeds=(0, 1, 2), batch_size=128, embedding_size=128,
        learning_rates="0.001, with --as-published 0.01",
    )  # fmt: skip
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in what depends on other options."""
    arguments = parser.parse_args(argv)
    known = variants(arguments.as_published)
    choose_published(parser, arguments, known, [*known])
    if arguments.as_published and arguments.embedding_size < NUM_CLASSES:
        parser.error(
            f"--embedding-size {arguments.embedding_size}: --as-published takes the embedding "
            f"for the logits of cross-entropy and needs at least {NUM_CLASSES}"
        )
    check_run_arguments(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train every loss with every seed, print the table; return the exit code."""
    parser = make_parser()
    arguments = parse_arguments(parser, argv)
    try:
        data = load_data(arguments.root, arguments.limit, arguments.device)
    except DataError as error:
        parser.error(str(error))
    settings = {
        "experiment": "mnist",
        "as_published": arguments.as_published,
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "embedding_size": arguments.embedding_size,
        "lr": arguments.lr,
        "precision": arguments.precision,
        "device": str(arguments.device),
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "images_sha256": digest(data.train_images, data.test_images),
    }
    named = variants(arguments.as_published)
    runs = open_runs(
        parser, arguments.json, settings, resume=arguments.resume,
        tabulate=lambda found: (rows(found, named), missing_runs(found, "loss")),
    )  # fmt: skip
    jobs = [
        make_job(name, named[name], data, seed, arguments)
        for seed, name in product(arguments.seeds, arguments.losses)
    ]
    code = run_jobs(runs, jobs, arguments.epochs, quiet=arguments.quiet)
    print(text_table(HEADER, rows(runs.runs, named)))
    for line in missing_runs(runs.runs, "loss"):
        print(line)
    return code


def make_job(
    name: str, variant: Variant, data: Digits, seed: int, arguments: argparse.Namespace
) -> Job:
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        train_class_weights=not arguments.as_published,
        precision=arguments.precision,
        record_cosines=True,
    )
    return Job(
        key={"loss": name, "seed": seed},
        prepare=lambda: prepare(variant, data, recipe, seed, arguments.embedding_size),
        measure=lambda training, progress: measure(training, progress, data),
    )


if __name__ == "__main__":
    sys.exit(main())
