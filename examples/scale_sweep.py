"""Sweep scale and margin: where √2·ln(C − 1) lies against the best of a grid.

    python examples/scale_sweep.py --data mnist --root DIR --limit 6000 --json sweep-10.json
    python examples/scale_sweep.py --data folder --root att_faces --json sweep-40.json
    python examples/scale_sweep.py --data synthetic --classes 1000 --json sweep-1000.json
    python examples/scale_sweep.py ... --json sweep-40.json --resume --confirm-seeds 100 101 102
    python examples/scale_sweep.py --data folder --root att_faces --hold-out classes --json o.json

Trains with ArcFace at every margin above 0 and the normalised softmax at margin 0, at every scale
of the grid and at Fixed AdaCos's, for every seed, all else equal. Some images (or samples) of every
class are held out, drawn by the seed: 1-NN is the nearest neighbour of a held-out image among the
training images by cosine, arg max the class of the largest logit, EER the equal error rate over the
pairs of held-out images (at most 2,000 of them, of 1,000 classes). `--resume` goes on after an
interruption.

Those pairs are of classes trained on. `--hold-out` deals the classes, or the folders they lie in,
into folds; a run trains on all folds but one, and EER is over the pairs of images of that one,
whose classes the network has never seen. A line is then the mean over folds; Fixed AdaCos's scale,
which depends on the number of classes trained on, is each fold's own, shown by its mean.

The best of many points owes some of its lead to luck. `--confirm-seeds` trains Fixed AdaCos, the
best scale without a margin, the best point of the grid (both by 1-NN, over all seeds of the grid)
and ArcFace's usual s = 64, m = 0.5 again, with seeds that had no part in the choice; with
`--hold-out` the best point by EER too. `--confirm-points` names others to be trained with the same
seeds.
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
from study.folds import ProtocolError, deal_folds, split_run
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
    """Training and held-out images of the same classes, and the network for them.

    Attributes:
        unseen, unseen_labels: images of classes that are not trained on, if any are held out.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    network: Callable[[int], nn.Module]
    unseen: Tensor | None = None
    unseen_labels: Tensor | None = None

    def to(self, device: torch.device) -> Task:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: value.to(device) for name, value in tensors.items()}
        return dataclasses.replace(self, **moved)

    def verified(self, test: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings of the images whose pairs are verified, and their labels.

        Args:
            test: embeddings of the test images.
            embed: makes those of others.
        """
        if self.unseen is not None and self.unseen_labels is not None:
            return embed(self.unseen), self.unseen_labels
        some = paired_images(self.test_labels)
        return test[some], self.test_labels[some]


@dataclass(frozen=True)
class Tasks:
    """The data of a sweep.

    Attributes:
        of: the task of a seed, on the CPU; of a fold too, if classes are held out.
        folds: the names of the classes in each, or None if all classes are trained on.
    """

    of: Callable[[int, int | None], Task]
    folds: list[list[str]] | None = None

    @property
    def numbers(self) -> list[int | None]:
        """The folds to train for: None if all classes are trained on."""
        return [None] if self.folds is None else [*range(len(self.folds))]


def load_tasks(arguments: argparse.Namespace) -> Tasks:
    """Load the data the arguments ask for.

    The seed decides which images of a folder are held out, and which identities are drawn. MNIST
    comes with its test images.

    Raises:
        DataError: MNIST's files can't be used.
        ImageError: the folder of images can't be used.
        ProtocolError: its classes can't be dealt into folds as asked.
    """
    if arguments.data == "mnist":
        digits = load_data(arguments.root, arguments.limit, torch.device("cpu"))
        task = Task(
            digits.train_images, digits.train_labels, digits.test_images, digits.test_labels,
            10, ArticleCNN,
        )  # fmt: skip
        return Tasks(lambda seed, fold: task)
    if arguments.data == "folder":
        data = load_folder(arguments.root, arguments.image_size, show_progress=not arguments.quiet)
        images, labels = data.images, data.labels
        hold_out = arguments.hold_out
        folds = deal_folds(data, hold_out, arguments.folds) if hold_out else []

        def network(size: int) -> nn.Module:
            return SmallResidualNetwork(images.shape[1], size)

        def split(seed: int, fold: int | None) -> Task:
            if fold is None:
                train, test = split_images(labels, arguments.test_share, seed)
                return Task(
                    images[train], labels[train], images[test], labels[test], len(data.classes),
                    network,
                )  # fmt: skip
            parts = split_run(labels, folds, fold, arguments.test_share, seed)
            return Task(
                images[parts.train], parts.train_labels, images[parts.test], parts.test_labels,
                parts.num_classes, network, images[parts.held_out], parts.held_out_labels,
            )  # fmt: skip

        names = [[data.classes[c] for c in fold] for fold in folds]
        return Tasks(split, names or None)

    def draw(seed: int, fold: int | None) -> Task:
        data = synthetic_identities(
            arguments.classes, per_class=arguments.per_class, test_per_class=2,
            noise=SYNTHETIC_NOISE, seed=seed,
        )  # fmt: skip
        return Task(
            data.train, data.train_labels, data.test, data.test_labels, arguments.classes,
            Perceptron,
        )  # fmt: skip

    return Tasks(draw)


def criterion_of(scale: float, margin: float, num_classes: int, embedding_size: int) -> nn.Module:
    if margin == 0:
        return fm.NormalizedSoftmaxLoss(num_classes, embedding_size, scale=scale)
    return fm.ArcFaceLoss(num_classes, embedding_size, margin=margin, scale=scale)


def make_job(
    point: Point,
    seed: int,
    fold: int | None,
    task_of: Callable[[int, int | None], Task],
    arguments: argparse.Namespace,
    *,
    confirms: bool = False,
    is_fixed: bool = False,
) -> Job:
    """The run of a point; `is_fixed` says that its scale is the one of this fold's classes."""
    scale, margin = point
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        precision=arguments.precision,
    )

    def prepare() -> Training:
        task = task_of(seed, fold)
        torch.manual_seed(seed)
        network = Network(task.network(arguments.embedding_size), recipe.precision)
        criterion = criterion_of(scale, margin, task.num_classes, arguments.embedding_size)
        device = task.train.device
        return Training(
            network.to(device), criterion.to(device), None,
            task.train, task.train_labels, recipe, seed,
        )  # fmt: skip

    def measure(training: Training, progress: Progress) -> dict[str, Any]:
        task = task_of(seed, fold)
        train, test = embed(training.network, task.train), embed(training.network, task.test)
        paired = task.verified(test, functools.partial(embed, training.network))
        pairs = verification(*pair_scores(*paired))
        return {
            "nearest": nearest_neighbour_accuracy(test, task.test_labels, train, task.train_labels),
            "arg_max": arg_max_accuracy(training.criterion, test, task.test_labels),
            "eer": pairs["eer"],
            "losses": [round(loss, 6) for loss in progress.losses],
            "threads": torch.get_num_threads(),
        }

    key = {"scale": scale, "margin": margin, "seed": seed}
    if fold is not None:
        key |= {"fold": fold, "fixed": is_fixed}
    return Job({**key, "confirms": True} if confirms else key, prepare, measure)


METRICS = ("nearest", "arg_max", "eer")


def averaged(runs: Sequence[dict[str, Any]], over: str = "fold") -> list[dict[str, Any]]:
    """Average the runs of each point and seed over their folds, or of each fold over its seeds.

    The scale of Fixed AdaCos becomes the mean of its scales. What isn't there for every fold, or
    every seed, is left out. Runs without folds stay as they are.
    """
    folded = [run for run in runs if "fold" in run]
    scales = {run["fold"]: run["scale"] for run in folded if run["fixed"]}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in folded:
        scale = round(fmean(scales.values()), 4) if run["fixed"] else run["scale"]
        kept = {name: value for name, value in run.items() if name in ("seed", "fold", "confirms")}
        del kept[over]
        key = {"scale": scale, "margin": run["margin"], **kept}
        groups.setdefault(tuple(key.items()), []).append(run)
    every: dict[Any, set[int]] = {}  # the grid has its seeds, and what confirms it has others
    for run in folded:
        every.setdefault(run.get("confirms"), set()).add(run[over])
    averages = [
        {**dict(key), **{name: fmean(run[name] for run in mine) for name in METRICS}}
        for key, mine in groups.items()
        if len(mine) == len(every[mine[0].get("confirms")])
    ]
    return [*(run for run in runs if "fold" not in run), *averages]


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
    """The points that are compared by seeds of their own, three of them the best of a grid.

    Attributes:
        fixed: Fixed AdaCos.
        best_scale: without a margin, by 1-NN accuracy.
        best: by 1-NN accuracy.
        best_verified: by equal error rate, if it is of classes held out.
        usual: ArcFace's.
    """

    fixed: Point
    best_scale: Point
    best: Point
    best_verified: Point | None
    usual: Point = USUAL

    @classmethod
    def by(
        cls, runs: Sequence[dict[str, Any]], fixed_scale: float, *, hold_out: bool = False
    ) -> Chosen:
        """Choose by the means over the seeds of the grid.

        Raises:
            ValueError: no point without a margin was trained with every seed of the grid.
        """
        found: dict[Point, list[dict[str, Any]]] = {}
        for run in of_grid(runs):
            found.setdefault((run["scale"], run["margin"]), []).append(run)
        every = max(map(len, found.values()), default=0)
        nearest, eer = (
            {
                point: fmean(run[name] for run in mine)
                for point, mine in found.items()
                if len(mine) == every
            }
            for name in ("nearest", "eer")
        )
        plain = [point for point in nearest if point[1] == 0]
        if not plain:
            raise ValueError("no point without a margin was trained with every seed of the grid")
        return cls(
            fixed=(fixed_scale, 0.0),
            best_scale=max(plain, key=nearest.__getitem__),
            best=max(nearest, key=nearest.__getitem__),
            best_verified=min(eer, key=eer.__getitem__) if hold_out else None,
        )

    @property
    def points(self) -> list[Point]:
        every = (self.fixed, self.best_scale, self.best, self.best_verified, self.usual)
        return list(dict.fromkeys(point for point in every if point is not None))


def rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table: a line for each scale and margin, over its seeds."""
    lines = []
    for scale, margin in sorted({(run["scale"], run["margin"]) for run in runs}):
        mine = [run for run in runs if (run["scale"], run["margin"]) == (scale, margin)]
        metrics = (spread([run[name] for run in mine]) for name in METRICS)
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


def scale_and_margin(text: str) -> Point:
    scale, comma, margin = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"expected SCALE,MARGIN such as 16,0.5, got {text!r}")
    return a_scale(scale), angle(margin)


a_scale = real_number(0, 1000)


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
    add(
        "--hold-out", choices=("classes", "groups"),
        help="folder: what is dealt into folds, one of them left out of training and verified on; "
        "default: all classes are trained on",
    )  # fmt: skip
    add("--folds", type=whole_number(2), metavar="K", help="with --hold-out; default: 4")
    scales, margins = (" ".join(f"{value:g}" for value in grid) for grid in (SCALES, MARGINS))
    add("--scales", type=a_scale, nargs="+", metavar="S", default=SCALES, help=f"default: {scales}")
    add(
        "--margins", type=angle, nargs="+", metavar="M", default=MARGINS,
        help=f"radians; default: {margins}",
    )  # fmt: skip
    add_run_arguments(parser, seeds=(0, 1, 2), batch_size=64, embedding_size=128)
    add(
        "--confirm-seeds", type=whole_number(0), nargs="+", metavar="S", default=[],
        help="train the best points, Fixed AdaCos and ArcFace's usual point again with each",
    )  # fmt: skip
    add(
        "--confirm-points", type=scale_and_margin, nargs="+", metavar="S,M", default=[],
        help="more points to train with the --confirm-seeds",
    )  # fmt: skip
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in what depends on other options."""
    arguments = parser.parse_args(argv)
    defaults = {
        "mnist": {"root": None, "limit": None},
        "folder": {
            "root": None,
            "image_size": 64,
            "test_share": 0.2,
            "hold_out": None,
            "folds": None,
        },
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
    if arguments.folds and not arguments.hold_out:
        parser.error("--folds is for --hold-out")
    if arguments.hold_out and not arguments.folds:
        arguments.folds = 4
    if arguments.confirm_points and not arguments.confirm_seeds:
        parser.error("--confirm-points needs --confirm-seeds")
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
    except (DataError, ImageError, ProtocolError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted while reading", file=sys.stderr)
        return INTERRUPTED

    @functools.lru_cache(maxsize=1)  # runs come seed by seed, fold by fold
    def task_of(seed: int, fold: int | None) -> Task:
        return tasks.of(seed, fold).to(arguments.device)

    first = {fold: tasks.of(arguments.seeds[0], fold) for fold in tasks.numbers}
    for task in first.values():
        if task.num_classes < 3:
            parser.error(f"√2·ln(C − 1) needs 3 classes or more, got {task.num_classes}")
        if task.unseen is None and task.test_labels.bincount().max() < 2:
            parser.error(
                f"--test-share {arguments.test_share:g} holds out one image of each class, and EER "
                "needs pairs of a class: raise it"
            )
    scales = {
        fold: round(fm.FixedAdaCosLoss(task.num_classes, 1).scale, 4)
        for fold, task in first.items()
    }
    fixed = round(fmean(scales.values()), 4)
    every = tasks.of(arguments.seeds[0], None)
    names = ("data", "epochs", "batch_size", "embedding_size", "lr", "precision", "image_size",
             "test_share", "per_class", "hold_out")  # fmt: skip
    settings = {
        "experiment": "sweep",
        **{name: getattr(arguments, name) for name in names},
        "classes": every.num_classes,
        "fixed_adacos_scale": fixed,
        "device": str(arguments.device),
        "train_images": len(every.train),
        "test_images": len(every.test),
        "images_sha256": digest(tasks.of(0, None).train, tasks.of(0, None).test),
        "folds": tasks.folds,
    }
    runs = open_runs(
        parser, arguments.json, settings, resume=arguments.resume,
        tabulate=lambda found: (rows(averaged(found)), [run["seed"] for run in found]),
    )  # fmt: skip
    check_seeds(parser, runs.runs, arguments)

    def jobs(seeds: Sequence[int], points: Sequence[Point], *, confirm: bool) -> list[Job]:
        """Runs of these points, of which those at `fixed` get the scale of their fold."""
        return [
            make_job(
                (scales[fold] if point[0] == fixed else point[0], point[1]), seed, fold, task_of,
                arguments, confirms=confirm, is_fixed=point[0] == fixed,
            )
            for seed, fold, point in product(seeds, tasks.numbers, points)
        ]  # fmt: skip

    scale_list = sorted({*arguments.scales, fixed})
    grid = [(scale, margin) for scale, margin in product(scale_list, arguments.margins)]
    choosing = jobs(arguments.seeds, grid, confirm=False)
    code = run_jobs(runs, choosing, arguments.epochs, quiet=arguments.quiet)
    report(of_grid(runs.runs))
    if code == 0 and arguments.confirm_seeds:
        try:
            hold_out = arguments.hold_out is not None
            chosen = Chosen.by(averaged(runs.runs), fixed, hold_out=hold_out).points
        except ValueError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return FAILED
        points = [*dict.fromkeys([*chosen, *arguments.confirm_points])]
        again = jobs(arguments.confirm_seeds, points, confirm=True)
        code = run_jobs(runs, again, arguments.epochs, quiet=arguments.quiet)
        print("\nwith seeds that had no part in choosing the points:")
        report(confirming(runs.runs))
    return code


def report(runs: Sequence[dict[str, Any]]) -> None:
    """Print the table of these runs, and whether some are missing."""
    whole = averaged(runs)
    print(text_table(HEADER, rows(whole)))
    for line in missing_runs(
        [{**run, "point": (run["scale"], run["margin"])} for run in whole], "point"
    ):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
