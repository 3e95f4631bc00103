r"""The article's second experiment: recognise people seen in training, and people never seen.

    python examples/article_faces.py --images att_faces --json faces.json
    python examples/article_faces.py --images omniglot_small --hold-out groups --no-flip \
        --image-size 32 --batch-size 64 --lr 0.003 --json characters.json

The folder has a folder of images for each class, at any depth: `s1/1.pgm` in the AT&T faces, 40
people with ten images each; `Greek/character01/0394_01.png` in Omniglot, characters of alphabets
with 20 drawings each.

Classes are dealt into folds once, the same for every seed; with `--hold-out groups` whole parent
folders are, such as alphabets. A run trains on the classes of all folds but one, with a share of
their images left out, and is measured twice:

- closed set, as in the article: 1-NN is the nearest neighbour of a left-out image among the
  training images, by the cosine of embeddings; the JSON also has it by their Euclidean distance
  without normalisation, as the article measured; arg max is the class of the largest logit;
- open set: verification on all images of the fold held out, whose classes the network has never
  seen. A pair is accepted if the cosine of its embeddings is above a threshold. EER is where false
  accepts and false rejects are equally frequent, AUC the area under the ROC curve, TAR at FAR the
  share of genuine pairs accepted where the given share of impostor pairs is. No rate is quoted that
  fewer than ten false accepts stand behind.

Every loss gets the same network, initial weights, images, order of batches and settings. A table
line is the mean over the seeds ± their sample standard deviation, each seed averaged over its folds
first: the runs of one seed share images. `--resume` goes on after an interruption, from the last
epoch, with the same result bit for bit.

`--as-published` trains as the article's code does: the class weights are in no optimiser and stay
at their random start, RegularFace has nothing to move, the learning rate is 0.01, and the
cross-entropy is over all outputs of the network. Images, network, size and split are this script's
(the article: 16 people, EfficientNetV2 pretrained, 224 pixels, a split of all images at random).
By default the class weights are trained, the learning rate is 0.001 and cross-entropy has a linear
head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from study.command import real_number, whole_number
from study.criteria import Variant, as_published, losses, regularized, setting
from study.folds import ProtocolError, Split, deal_folds, split_run
from study.images import ImageError, LabelledImages, load_folder
from study.measure import (
    closed_set,
    embed,
    mean_and_interval,
    pair_scores,
    verification,
)
from study.networks import PretrainedInput, SmallResidualNetwork, timm_network
from study.runner import (
    INTERRUPTED,
    Job,
    Training,
    add_run_arguments,
    check_run_arguments,
    choose_published,
    open_runs,
    run_jobs,
)
from study.store import digest
from study.tables import lowest_to_highest, number, plus_minus, text_table
from study.training import Network, Progress, Recipe
from torch import Tensor, nn

import fused_margin as fm

DEFAULT_LOSSES = ["arcface", "arcface+regular_face", "cosface", "fixed_adacos", "cross_entropy"]
MARGIN_UNITS = {  # an angle, an offset of the cosine
    "arcface": "rad",
    "subcenter_arcface": "rad",
    "cosface": "cos",
}
METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "test_nearest": lambda run: run["test_nearest"],
    "test_nearest_euclidean": lambda run: run["test_nearest_euclidean"],
    "test_arg_max": lambda run: run["test_arg_max"],
    "train_nearest": lambda run: run["train_nearest"],
    "train_nearest_itself": lambda run: run["train_nearest_itself"],
    "train_arg_max": lambda run: run["train_arg_max"],
    "eer": lambda run: run["verification"]["eer"],
    "auc": lambda run: run["verification"]["auc"],
}


def variants(published: bool) -> dict[str, Variant]:
    """The losses of the experiment by name."""

    def with_regular_face(plain: dict[str, Variant]) -> dict[str, Variant]:
        return regularized(plain, "regular_face", "RegularFace", fm.regularizers.RegularFace)

    if published:
        known = as_published()
        others = {name: known[name] for name in ("fixed_adacos", "adacos", "cross_entropy")}
        return with_regular_face({"arcface": known["arcface"]}) | others
    plain = losses()
    return plain | with_regular_face(plain)


def build_network(arguments: argparse.Namespace, channels: int) -> nn.Module:
    """Build the network the arguments ask for.

    Raises:
        ImportError: it is timm's, and timm can't be imported.
        ValueError: timm can't make it.
    """
    if arguments.model is None:
        network = SmallResidualNetwork(channels, arguments.embedding_size)
    else:
        network: Any = timm_network(
            arguments.model, channels, arguments.embedding_size, pretrained=arguments.pretrained
        )
        if arguments.pretrained:
            made_for = network.pretrained_cfg
            network = PretrainedInput(network, made_for["mean"], made_for["std"], channels)
    return Network(network, arguments.precision)


def check_criteria(
    known: dict[str, Variant], arguments: argparse.Namespace, splits: Sequence[Split]
) -> None:
    """Refuse losses that can't tell as many classes as there are.

    Raises:
        ProtocolError: a loss refuses.
    """
    for name, count in product(arguments.losses, sorted({split.num_classes for split in splits})):
        try:
            known[name].build(count, arguments.embedding_size)
        except ValueError as error:
            raise ProtocolError(f"--losses {name}, training on {count} classes: {error}") from error


def check_network(arguments: argparse.Namespace, images: Tensor, splits: Sequence[Split]) -> int:
    """Put the smallest batch there will be through the network; return its number of parameters.

    Raises:
        ProtocolError: the network can't be made, or can't take these images.
    """
    size = arguments.batch_size
    smallest = min(min(size, len(split.train) % size or size) for split in splits)
    batch = images[splits[0].train[:smallest]].to(arguments.device)
    try:
        network = build_network(arguments, images.shape[1])
    except (ImportError, ValueError) as error:
        raise ProtocolError(str(error)) from error
    try:
        network.to(arguments.device).train()(batch)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ProtocolError(
            f"{arguments.model or 'the network'} can't train on a batch of {smallest} images of "
            f"{arguments.image_size} x {arguments.image_size} ({error}); try another --image-size "
            "or --batch-size"
        ) from error
    return sum(parameter.numel() for parameter in network.parameters())


def make_job(
    name: str,
    variant: Variant,
    images: Tensor,
    split: Split,
    seed: int,
    fold: int,
    arguments: argparse.Namespace,
) -> Job:
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        train_class_weights=not arguments.as_published,
        flip=arguments.flip,
        precision=arguments.precision,
    )
    device = images.device

    def prepare() -> Training:
        torch.manual_seed(seed)
        # The network is built before the criterion, so that all losses start from the same one.
        network = build_network(arguments, images.shape[1]).to(device)
        criterion = variant.build(split.num_classes, arguments.embedding_size).to(device)
        return Training(
            network,
            criterion,
            variant.regularizer and variant.regularizer(),
            images[split.train.to(device)],
            split.train_labels.to(device),
            recipe,
            seed,
        )

    return Job(
        key={"loss": name, "seed": seed, "fold": fold},
        prepare=prepare,
        measure=lambda training, progress: measure(training, progress, images, split),
    )


def measure(training: Training, progress: Progress, images: Tensor, split: Split) -> dict[str, Any]:
    """Measure what was trained: on its classes, and on those held out.

    Raises:
        DivergedError: embeddings are not finite.
    """
    network, criterion = training.network, training.criterion
    device = images.device
    train, test, held_out = (
        embed(network, images[rows.to(device)])
        for rows in (split.train, split.test, split.held_out)
    )
    return {
        "classes": split.num_classes,
        "train_images": len(split.train),
        "test_images": len(split.test),
        "held_out_classes": int(split.held_out_labels.max()) + 1,
        "held_out_images": len(split.held_out),
        "scale": setting(criterion, "scale"),
        "margin": setting(criterion, "margin"),
        **closed_set(
            criterion, train, split.train_labels.to(device), test, split.test_labels.to(device)
        ),
        "verification": verification(*pair_scores(held_out, split.held_out_labels.to(device))),
        "losses": progress.losses,
        "seconds": progress.seconds,
        "threads": torch.get_num_threads(),
    }


def quoted_rates(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The false accept rates that every run has enough impostor pairs for, the highest first."""
    common = set.intersection(*(set(run["verification"]["tar"]) for run in runs))
    return sorted(common, key=float, reverse=True)


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the runs of each loss.

    Each metric is averaged over the folds of a seed, then over the seeds: "mean", "std", the sample
    standard deviation, and "half_interval", half the 95 % confidence interval of the mean; the last
    two are None for a single seed. They say how much seeds differ, not how other classes would.

    Args:
        runs: of one study, as `study.store.Runs` keeps them.

    Returns:
        For each loss: "loss", "scale" (lowest and highest over the folds, or None), "margin",
        "runs", "seeds", "seconds" (of an epoch, the median), every one of METRICS, and "tar", by
        the false accept rates of `quoted_rates`.
    """
    rates = quoted_rates(runs) if runs else []
    rows = []
    for name in dict.fromkeys(run["loss"] for run in runs):
        mine = [run for run in runs if run["loss"] == name]
        scales = [run["scale"] for run in mine if run["scale"] is not None]
        rows.append(
            {
                "loss": name,
                "scale": (min(scales), max(scales)) if scales else None,
                "margin": mine[0]["margin"],
                "runs": len(mine),
                "seeds": len({run["seed"] for run in mine}),
                "seconds": statistics.median(second for run in mine for second in run["seconds"]),
                **{metric: over_seeds(mine, value) for metric, value in METRICS.items()},
                "tar": {
                    rate: over_seeds(mine, lambda run, rate=rate: run["verification"]["tar"][rate])
                    for rate in rates
                },
            }
        )
    return rows


def averaged(
    runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], by: str = "seed"
) -> list[float]:
    """The value for each seed, averaged over its folds; or for each fold, over its seeds."""
    values: dict[int, list[float]] = {}
    for run in runs:
        values.setdefault(run[by], []).append(value(run))
    return [statistics.fmean(values[key]) for key in sorted(values)]


def over_seeds(
    runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> dict[str, float | None]:
    """Average over the folds of each seed, then describe the seeds."""
    mean, deviation, half = mean_and_interval(averaged(runs, value))
    return {"mean": mean, "std": deviation, "half_interval": half}


def metric_text(metric: dict[str, float | None], decimals: int = 2) -> str:
    return plus_minus(metric["mean"], metric["std"], decimals)


def format_table(runs: Sequence[dict[str, Any]]) -> str:
    """Lay the results out as text, one line for each loss, and say below what they are."""
    rows = summarise(runs)
    rate = next(iter(reversed(quoted_rates(runs))), None) if runs else None
    header = (
        "loss", "scale", "margin", "test 1-NN %", "arg max %", "EER %", "AUC",
        "TAR %" if rate is None else f"TAR % at FAR {100 * float(rate):g} %", "s/epoch", "runs",
    )  # fmt: skip
    lines = [
        [
            row["loss"],
            lowest_to_highest(row["scale"] or ()),
            f"{number(row['margin'])} {MARGIN_UNITS.get(row['loss'].split('+')[0], '')}".rstrip(),
            metric_text(row["test_nearest"]),
            metric_text(row["test_arg_max"]),
            metric_text(row["eer"]),
            metric_text(row["auc"], 4),
            "–" if rate is None else metric_text(row["tar"][rate]),
            number(row["seconds"], 3),
            str(row["runs"]),
        ]
        for row in rows
    ]
    return "\n".join([text_table(header, lines), *describe(runs, rows)])


def describe(runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say in a few lines what was averaged, and over how many people and pairs."""
    if not runs:
        return []
    folds = {run["fold"]: run for run in sorted(runs, key=lambda run: run["fold"])}

    def total(values: Sequence[int]) -> str:
        listed = " + ".join(f"{value:,}" for value in values)
        return listed if len(values) == 1 else f"{listed} = {sum(values):,}"

    def pairs(kind: str) -> str:
        return total([run["verification"][f"{kind}_pairs"] for run in folds.values()])

    lines = [
        f"{len(folds)} folds; trained on "
        + " / ".join(f"{run['classes']}" for run in folds.values())
        + " classes, tested on "
        + " / ".join(f"{run['test_images']:,}" for run in folds.values())
        + " other images of theirs",
        "verified on classes never seen: "
        + total([run["held_out_classes"] for run in folds.values()]),
        f"genuine pairs: {pairs('genuine')}; impostor pairs: {pairs('impostor')}",
    ]
    if any(row["seeds"] > 1 for row in rows):
        lines.append("±: sample standard deviation over seeds, each averaged over its folds")
    every = {(run["seed"], run["fold"]) for run in runs}
    if any(row["runs"] < len(every) for row in rows):
        lines.append("some runs are missing: the lines are not of the same seeds and folds")
    return lines


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --images DIR [options] (--help lists them)",
        description="Train on images of some classes with each loss; verify classes never seen.",
    )
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", required=True, help="holds a folder for each class")
    pixels = whole_number(8, 1024)
    add(
        "--image-size", type=pixels, metavar="PIXELS", default=64,
        help="images become squares; default: %(default)s",
    )  # fmt: skip
    add("--model", metavar="NAME", help="a network of timm; default: a small residual network")
    add("--pretrained", action="store_true", help="start from timm's weights for --model")
    every = list(dict.fromkeys([*variants(False), *variants(True)]))
    add("--as-published", action="store_true", help="as the article: class weights frozen, lr 0.01")
    add(
        "--losses", nargs="+", choices=every, metavar="LOSS",
        help=f"of {', '.join(every)}; default: {' '.join(DEFAULT_LOSSES)}",
    )  # fmt: skip
    add("--folds", type=whole_number(2), metavar="K", default=4, help="default: %(default)s")
    add(
        "--hold-out", choices=("classes", "groups"), default="classes",
        help="what is dealt into folds: classes, or the folders they lie in; default: %(default)s",
    )  # fmt: skip
    add(
        "--test-share", type=real_number(0, 0.9), metavar="SHARE", default=0.2,
        help="of the images of a class, left out of training; default: %(default)s",
    )  # fmt: skip
    add(
        "--no-flip", dest="flip", action="store_false",
        help="don't mirror training images: for characters",
    )  # fmt: skip
    add_run_arguments(
        parser, seeds=(0, 1, 2), batch_size=16, embedding_size=512,
        learning_rates="0.001, with --as-published 0.01",
    )  # fmt: skip
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in what depends on other options."""
    arguments = parser.parse_args(argv)
    known = variants(arguments.as_published)
    choose_published(
        parser, arguments, known, [*known] if arguments.as_published else DEFAULT_LOSSES
    )
    if arguments.pretrained and arguments.model is None:
        parser.error("--pretrained is for --model NAME; the built-in network has no such weights")
    check_run_arguments(parser, arguments)
    return arguments


def study_settings(
    arguments: argparse.Namespace,
    data: LabelledImages,
    folds: Sequence[Sequence[int]],
    parameters: int,
) -> dict[str, Any]:
    """Everything that the runs to be compared have in common, as JSON types."""
    shared = (
        "as_published", "image_size", "pretrained", "epochs", "batch_size", "embedding_size", "lr",
        "hold_out", "test_share", "flip", "precision",
    )  # fmt: skip
    return {
        "experiment": "faces",
        "images": arguments.images.resolve().name,
        "images_sha256": digest(data.images),
        "count": len(data.images),
        "channels": data.images.shape[1],
        "classes": len(data.classes),
        "groups": len(set(data.groups)),
        "model": arguments.model or "SmallResidualNetwork",
        "parameters": parameters,
        **{name: getattr(arguments, name) for name in shared},
        "device": str(arguments.device),
        "folds": [[data.classes[c] for c in fold] for fold in folds],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train every loss with every seed and fold, print the table; return the exit code."""
    parser = make_parser()
    arguments = parse_arguments(parser, argv)
    known = variants(arguments.as_published)
    try:
        data = load_folder(
            arguments.images, arguments.image_size, show_progress=not arguments.quiet
        )
        folds = deal_folds(data, arguments.hold_out, arguments.folds)
        splits = {
            (seed, fold): split_run(data.labels, folds, fold, arguments.test_share, seed)
            for seed, fold in product(arguments.seeds, range(len(folds)))
        }
        check_criteria(known, arguments, [*splits.values()])
        parameters = check_network(arguments, data.images, [*splits.values()])
    except (ImageError, ProtocolError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted while reading", file=sys.stderr)
        return INTERRUPTED
    settings = study_settings(arguments, data, folds, parameters)
    runs = open_runs(
        parser, arguments.json, settings, resume=arguments.resume, tabulate=format_table
    )
    if not arguments.quiet:
        print(
            f"{settings['images']}: {len(data.images):,} images of {len(data.classes)} classes; "
            f"{parameters:,} parameters, on {arguments.device}",
            file=sys.stderr,
        )
    images = data.images.to(arguments.device)
    jobs = [
        make_job(name, known[name], images, split, seed, fold, arguments)
        for (seed, fold), split in splits.items()
        for name in arguments.losses
    ]
    code = run_jobs(runs, jobs, arguments.epochs, quiet=arguments.quiet)
    found = (runs.find(job.key) for job in jobs)
    print(format_table([run for run in found if run is not None]))
    return code


if __name__ == "__main__":
    sys.exit(main())
