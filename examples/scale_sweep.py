"""Sweep scale and margin: where √2·ln(C − 1) lies against the best of a grid.

    python examples/scale_sweep.py --data mnist --root DIR --limit 6000 --json sweep-10.json
    python examples/scale_sweep.py --data folder --root att_faces --json sweep-40.json
    python examples/scale_sweep.py --data synthetic --classes 1000 --json sweep-1000.json
    python examples/scale_sweep.py ... --json sweep-40.json --resume --confirm-seeds 100 101 102

Trains with ArcFace at every margin above 0 and the normalised softmax at margin 0, at every scale
of the grid and at Fixed AdaCos's, for every seed, all else equal. Some images (or samples) of every
class are held out, drawn by the seed: 1-NN is the nearest neighbour of a held-out image among the
training images by cosine, arg max the class of the largest logit, EER the equal error rate over the
pairs of held-out images (at most 2,000 of them, of 1,000 classes). `--resume` goes on after an
interruption.

The best of many points owes some of its lead to luck. `--confirm-seeds` trains Fixed AdaCos, the
best scale without a margin, the best point of the grid (both by 1-NN, over all seeds of the grid)
and ArcFace's usual s = 64, m = 0.5 again, with seeds that had no part in the choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from study.command import real_number, whole_number
from study.digits import DataError, load_data
from study.images import ImageError, load_folder, split_images
from study.measure import (
    arg_max_accuracy,
    embed,
    nearest_neighbour_accuracy,
    pair_scores,
    verification,
)
from study.networks import ArticleCNN, SmallResidualNetwork
from study.runner import (
    FAILED,
    INTERRUPTED,
    Job,
    Training,
    add_run_arguments,
    check_run_arguments,
    open_runs,
    run_jobs,
)
from study.store import digest
from study.synthetic import Perceptron, synthetic_identities
from study.tables import missing_runs, spread, text_table
from study.training import Network, Progress, Recipe
from torch import Tensor, nn

import fused_margin as fm

SCALES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
MARGINS = [0.0, 0.25, 0.5]  # radians
PAIRED_CLASSES, PAIRED_IMAGES = 1000, 2000  # so that pairs stay below two million
SYNTHETIC_NOISE = 0.7
Point = tuple[float, float]  # scale and margin
USUAL: Point = (64.0, 0.5)  # of the ArcFace paper


@dataclass(frozen=True)
class Task:
    """Training and held-out images of the same classes, and the network for them."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    network: Callable[[int], nn.Module]

    def to(self, device: torch.device) -> Task:
        moved = {
            name: getattr(self, name).to(device)
            for name in ("train", "train_labels", "test", "test_labels")
        }
        return dataclasses.replace(self, **moved)


def load_tasks(arguments: argparse.Namespace) -> Callable[[int], Task]:
    """Load the data the arguments ask for; return the task of a seed, on the CPU.

    The seed decides which images of a folder are held out, and which identities are drawn. MNIST
    comes with its test images.

    Raises:
        DataError: MNIST's files can't be used.
        ImageError: the folder of images can't be used.
    """
    if arguments.data == "mnist":
        digits = load_data(arguments.root, arguments.limit, torch.device("cpu"))
        task = Task(
            digits.train_images, digits.train_labels, digits.test_images, digits.test_labels,
            10, ArticleCNN,
        )  # fmt: skip
        return lambda seed: task
    if arguments.data == "folder":
        data = load_folder(arguments.root, arguments.image_size, show_progress=not arguments.quiet)
        images, labels = data.images, data.labels

        def split(seed: int) -> Task:
            train, test = split_images(labels, arguments.test_share, seed)
            return Task(
                images[train], labels[train], images[test], labels[test], len(data.classes),
                lambda size: SmallResidualNetwork(images.shape[1], size),
            )  # fmt: skip

        return split

    def draw(seed: int) -> Task:
        data = synthetic_identities(
            arguments.classes, per_class=arguments.per_class, test_per_class=2,
            noise=SYNTHETIC_NOISE, seed=seed,
        )  # fmt: skip
        return Task(
            data.train, data.train_labels, data.test, data.test_labels, arguments.classes,
            Perceptron,
        )  # fmt: skip

    return draw


def criterion_of(scale: float, margin: float, num_classes: int, embedding_size: int) -> nn.Module:
    if margin == 0:
        return fm.NormalizedSoftmaxLoss(num_classes, embedding_size, scale=scale)
    return fm.ArcFaceLoss(num_classes, embedding_size, margin=margin, scale=scale)


def make_job(
    scale: float,
    margin: float,
    seed: int,
    task_of: Callable[[int], Task],
    arguments: argparse.Namespace,
    *,
    confirms: bool = False,
) -> Job:
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        precision=arguments.precision,
    )

    def prepare() -> Training:
        task = task_of(seed)
        torch.manual_seed(seed)
        network = Network(task.network(arguments.embedding_size), recipe.precision)
        criterion = criterion_of(scale, margin, task.num_classes, arguments.embedding_size)
        device = task.train.device
        return Training(
            network.to(device), criterion.to(device), None,
            task.train, task.train_labels, recipe, seed,
        )  # fmt: skip

    def measure(training: Training, progress: Progress) -> dict[str, Any]:
        task = task_of(seed)
        train, test = embed(training.network, task.train), embed(training.network, task.test)
        some = paired_images(task.test_labels)
        pairs = verification(*pair_scores(test[some], task.test_labels[some]))
        return {
            "nearest": nearest_neighbour_accuracy(test, task.test_labels, train, task.train_labels),
            "arg_max": arg_max_accuracy(training.criterion, test, task.test_labels),
            "eer": pairs["eer"],
            "losses": [round(loss, 6) for loss in progress.losses],
        }

    key = {"scale": scale, "margin": margin, "seed": seed}
    return Job({**key, "confirms": True} if confirms else key, prepare, measure)


def paired_images(labels: Tensor) -> Tensor:
    """Choose the images whose pairs are verified: as many of each class, of 1000 classes at most.

    Args:
        labels: (count,) of the held-out images.

    Returns:
        Indices of at most 2000 images, or of two images of each of the 1000 classes.
    """
    order = labels.argsort(stable=True)
    ordered, counts = labels[order], labels.bincount()
    within = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[ordered]
    classes = min(len(counts), PAIRED_CLASSES)
    return order[(within < max(2, PAIRED_IMAGES // classes)) & (ordered < classes)]


def of_grid(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that points are chosen by."""
    return [run for run in runs if not run.get("confirms")]


def confirming(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with seeds that had no part in the choice."""
    return [run for run in runs if run.get("confirms")]


@dataclass(frozen=True)
class Chosen:
    """The points that are compared by seeds of their own, two of them the best of a grid."""

    fixed: Point
    best_scale: Point
    best: Point
    usual: Point = USUAL

    @classmethod
    def by(cls, runs: Sequence[dict[str, Any]], fixed_scale: float) -> Chosen:
        """Choose by the mean 1-NN accuracy over the seeds of the grid.

        Raises:
            ValueError: no point without a margin was trained with every seed of the grid.
        """
        values: dict[Point, list[float]] = {}
        for run in of_grid(runs):
            values.setdefault((run["scale"], run["margin"]), []).append(run["nearest"])
        every = max(map(len, values.values()), default=0)
        means = {point: fmean(mine) for point, mine in values.items() if len(mine) == every}
        plain = [point for point in means if point[1] == 0]
        if not plain:
            raise ValueError("no point without a margin was trained with every seed of the grid")
        return cls(
            fixed=(fixed_scale, 0.0),
            best_scale=max(plain, key=means.__getitem__),
            best=max(means, key=means.__getitem__),
        )

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys([self.fixed, self.best_scale, self.best, self.usual]))


def rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table: a line for each scale and margin, over its seeds."""
    lines = []
    for scale, margin in sorted({(run["scale"], run["margin"]) for run in runs}):
        mine = [run for run in runs if (run["scale"], run["margin"]) == (scale, margin)]
        metrics = (spread([run[name] for run in mine]) for name in ("nearest", "arg_max", "eer"))
        lines.append([f"{scale:.4g}", f"{margin:g}", *metrics, str(len(mine))])
    return lines


HEADER = ("scale", "margin", "test 1-NN", "arg max", "EER", "runs")


def angle(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= math.pi:
        raise argparse.ArgumentTypeError(f"expected radians from 0 to pi, got {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data {mnist,folder,synthetic} [options] (--help lists them)",
        description="Sweep the scale and the margin of ArcFace.",
    )
    add = parser.add_argument
    add(
        "--data", choices=("mnist", "folder", "synthetic"), required=True,
        help="digits, a folder for each class, or identities on a sphere",
    )  # fmt: skip
    add(
        "--root",
        "--images",
        type=Path,
        metavar="DIR",
        help="MNIST's IDX files, or a folder for each class",
    )
    add("--limit", type=whole_number(2), metavar="N", help="mnist: the first N training images")
    add("--image-size", type=whole_number(32, 1024), metavar="PIXELS", help="folder; default: 64")
    add("--test-share", type=real_number(0, 0.9), metavar="SHARE", help="folder; default: 0.2")
    classes, per_class = whole_number(4, 10**7), whole_number(1, 10**6)
    add("--classes", type=classes, metavar="C", help="synthetic; default: 1000")
    add("--per-class", type=per_class, metavar="N", help="synthetic; default: 8")
    scale = real_number(0, 1000)
    scales, margins = (" ".join(f"{value:g}" for value in grid) for grid in (SCALES, MARGINS))
    add("--scales", type=scale, nargs="+", metavar="S", default=SCALES, help=f"default: {scales}")
    add(
        "--margins", type=angle, nargs="+", metavar="M", default=MARGINS,
        help=f"radians; default: {margins}",
    )  # fmt: skip
    add_run_arguments(parser, seeds=(0, 1, 2), batch_size=64, embedding_size=128)
    add(
        "--confirm-seeds", type=whole_number(0), nargs="+", metavar="S", default=[],
        help="train the best points, Fixed AdaCos and ArcFace's usual point again with each",
    )  # fmt: skip
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in what depends on other options."""
    arguments = parser.parse_args(argv)
    defaults = {
        "mnist": {"root": None, "limit": None},
        "folder": {"root": None, "image_size": 64, "test_share": 0.2},
        "synthetic": {"classes": 1000, "per_class": 8},
    }
    mine = defaults[arguments.data]
    for name in {name for options in defaults.values() for name in options}:
        given = getattr(arguments, name)
        if given is not None and name not in mine:
            parser.error(f"--{name.replace('_', '-')} is not for --data {arguments.data}")
        if given is None:
            setattr(arguments, name, mine.get(name))
    if "root" in mine and arguments.root is None:
        parser.error(f"--data {arguments.data} needs --root DIR")
    if arguments.lr is None:
        arguments.lr = 0.001
    check_run_arguments(parser, arguments)
    if arguments.confirm_seeds and 0 not in arguments.margins:
        parser.error("--confirm-seeds compares with the best scale without a margin: add 0 to "
                     "--margins")  # fmt: skip
    return arguments


def check_seeds(
    parser: argparse.ArgumentParser,
    runs: Sequence[dict[str, Any]],
    arguments: argparse.Namespace,
) -> None:
    """Refuse seeds that would both choose and confirm, in this call or with runs of the file."""
    choosing = {*arguments.seeds, *(run["seed"] for run in of_grid(runs))}
    confirm = {*arguments.confirm_seeds, *(run["seed"] for run in confirming(runs))}
    if both := sorted(choosing & confirm):
        parser.error(
            f"--confirm-seeds: {' '.join(map(str, both))} can't both choose points (--seeds) and "
            "confirm them"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Train at every point of the grid with every seed, print the table; return the exit code."""
    parser = make_parser()
    arguments = parse_arguments(parser, argv)
    try:
        tasks = load_tasks(arguments)
    except (DataError, ImageError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted while reading", file=sys.stderr)
        return INTERRUPTED

    @functools.lru_cache(maxsize=1)  # runs come seed by seed
    def task_of(seed: int) -> Task:
        return tasks(seed).to(arguments.device)

    task = task_of(arguments.seeds[0])
    if task.num_classes < 3:
        parser.error(f"√2·ln(C − 1) needs 3 classes or more, got {task.num_classes}")
    if task.test_labels.bincount().max() < 2:
        parser.error(
            f"--test-share {arguments.test_share:g} holds out one image of each class, and EER "
            "needs pairs of a class: raise it"
        )
    fixed = round(fm.FixedAdaCosLoss(task.num_classes, 1).scale, 4)
    names = ("data", "epochs", "batch_size", "embedding_size", "lr", "precision", "image_size",
             "test_share", "per_class")  # fmt: skip
    settings = {
        "experiment": "sweep",
        **{name: getattr(arguments, name) for name in names},
        "classes": task.num_classes,
        "fixed_adacos_scale": fixed,
        "device": str(arguments.device),
        "train_images": len(task.train),
        "test_images": len(task.test),
        "images_sha256": digest(tasks(0).train, tasks(0).test),
    }
    runs = open_runs(
        parser, arguments.json, settings, resume=arguments.resume,
        tabulate=lambda found: (rows(found), [run["seed"] for run in found]),
    )  # fmt: skip
    check_seeds(parser, runs.runs, arguments)
    grid = product(arguments.seeds, sorted({*arguments.scales, fixed}), arguments.margins)
    jobs = [make_job(scale, margin, seed, task_of, arguments) for seed, scale, margin in grid]
    code = run_jobs(runs, jobs, arguments.epochs, quiet=arguments.quiet)
    report(of_grid(runs.runs))
    if code == 0 and arguments.confirm_seeds:
        try:
            points = Chosen.by(runs.runs, fixed).points
        except ValueError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return FAILED
        jobs = [
            make_job(scale, margin, seed, task_of, arguments, confirms=True)
            for seed, (scale, margin) in product(arguments.confirm_seeds, points)
        ]
        code = run_jobs(runs, jobs, arguments.epochs, quiet=arguments.quiet)
        print("\nwith seeds that had no part in choosing the points:")
        report(confirming(runs.runs))
    return code


def report(runs: Sequence[dict[str, Any]]) -> None:
    """Print the table of these runs, and whether some are missing."""
    print(text_table(HEADER, rows(runs)))
    for line in missing_runs(
        [{**run, "point": (run["scale"], run["margin"])} for run in runs], "point"
    ):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
