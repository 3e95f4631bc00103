"""Write the tables of docs/study.md and README.ja.md, and the study's pictures, from its results.

    python examples/study_report.py

Reads examples/results, where the runs of the study are kept, and replaces what stands between
`<!-- table NAME -->` and `<!-- end -->` in the documents. The same results give the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import article_faces
import article_mnist
import scale_sweep
from study import figures, published
from study.measure import mean_and_interval
from study.store import MISFITS, StoreError, read_study, reason
from study.tables import markdown_table, number, spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = ("docs/study.md", "README.ja.md")
BLOCK = re.compile(r"(<!-- table (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SWEEPS = {
    10: "MNIST",
    40: "AT&T faces",
    242: "Omniglot",
    1000: "synthetic",
    10_000: "synthetic",
}
LONGER = (242, 1000)  # sweeps some of whose points were trained for longer too


class ReportError(RuntimeError):
    """A document or a result isn't what the report needs."""


@dataclass(frozen=True)
class Study:
    """The results of one file; of a sweep, also the runs that confirm its best points."""

    settings: dict[str, Any]
    runs: list[dict[str, Any]]
    confirming: Sequence[dict[str, Any]] = ()

    def of(self, loss: str, metric: str) -> list[float]:
        """The metric of this loss, by seed."""
        return [run[metric] for run in self.runs if run["loss"] == loss]

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(run["loss"] for run in self.runs))

    @property
    def seeds(self) -> int:
        return len({run["seed"] for run in self.runs})


def load(name: str) -> Study:
    """Read a study; of its runs, those of the seeds that are complete: they are compared."""
    content = read_study(RESULTS / f"{name}.json")
    names = (
        ("scale", "margin") if content["settings"]["experiment"] == "sweep" else ("loss", "fold")
    )
    all_runs = sorted(content["runs"], key=lambda run: run["seed"])  # differences are within a seed
    done: dict[int, set[tuple[Any, ...]]] = {}
    candidates = scale_sweep.of_grid(all_runs)  # all of them, if it isn't a sweep
    for run in candidates:
        done.setdefault(run["seed"], set()).add(tuple(run.get(name) for name in names))
    every = set().union(*done.values())
    runs = [run for run in candidates if done[run["seed"]] == every]
    if not runs:
        raise ReportError(f"{name}: no seed is complete; resume its script")
    return Study(content["settings"], runs, scale_sweep.confirming(all_runs))


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Mean of the paired differences, with its 95 % confidence interval."""
    mean, _, half = mean_and_interval([a - b for a, b in zip(first, second, strict=True)])
    return f"{mean:+.2f}" + ("" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]")


def published_metric(loss: str) -> str:
    """What the article judges the loss by: cross-entropy by arg max, the others by 1-NN."""
    return "test_arg_max" if loss == "cross_entropy" else "test_nearest_euclidean"


def mnist_published() -> str:
    """Published accuracies of the first experiment beside ours with the published settings."""
    study = load("mnist-published")
    titles = article_mnist.variants(True)
    lines, baseline = [], study.of("arcface+center_invariant", "test_nearest_euclidean")
    for name in study.losses:
        train, test = published.MNIST[name.split("+")[0]]
        train_metric = "train_arg_max" if name == "cross_entropy" else "train_nearest_itself"
        accuracies = study.of(name, published_metric(name))
        lines.append(
            [
                titles[name].title,
                number(train),
                spread(study.of(name, train_metric)),
                number(test),
                spread(accuracies),
                "" if name.startswith("arcface") else difference(accuracies, baseline),
                spread(study.of(name, "test_nearest")),
            ]
        )
    header = ("loss", "train, published", "train, here", "test, published", "test, here",
              "minus ArcFace", "cosine 1-NN")  # fmt: skip
    return markdown_table(header, lines)


def mnist() -> str:
    """The first experiment mended."""
    study = load("mnist")
    titles = article_mnist.variants(False)
    baseline = study.of("arcface", "test_nearest")
    lines = [
        [
            titles[name].title,
            number(study.runs[study.losses.index(name)]["scale"]),
            spread(study.of(name, "test_nearest")),
            "" if name == "arcface" else difference(study.of(name, "test_nearest"), baseline),
            spread(study.of(name, "test_arg_max")),
            spread(study.of(name, "train_nearest")),
        ]
        for name in study.losses
    ]
    header = ("loss", "s", "test 1-NN", "minus ArcFace", "test arg max", "train 1-NN")
    return markdown_table(header, lines)


def mnist_center_invariant() -> str:
    """Each loss of the first experiment, mended, with CenterInvariant beside the same without."""
    plain, regularized = load("mnist"), load("mnist-center-invariant")
    if plain.settings != regularized.settings:
        raise ReportError("mnist and mnist-center-invariant have different settings")
    titles = article_mnist.variants(False)
    lines = []
    for name in regularized.losses:
        without, with_it = (
            {run["seed"]: run["test_nearest"] for run in study.runs if run["loss"] == loss}
            for study, loss in (
                (plain, name.removesuffix("+center_invariant")),
                (regularized, name),
            )
        )
        pairs = [(with_it[seed], without[seed]) for seed in sorted(with_it.keys() & without)]
        if not pairs:
            raise ReportError(f"{name}: no seed has a run without the regulariser too")
        ours, theirs = map(list, zip(*pairs, strict=True))
        lines.append([titles[name].title, spread(theirs), spread(ours), difference(ours, theirs)])
    return markdown_table(("loss", "without: 1-NN", "with: 1-NN", "difference"), lines)


def faces_study(name: str) -> tuple[Study, list[dict[str, Any]], dict[str, Any]]:
    """A study of article_faces: its runs, and their summary by loss."""
    study = load(name)
    rows = article_faces.summarise(study.runs)
    return study, rows, article_faces.variants(study.settings["as_published"])


def over_folds(study: Study, loss: str, metric: str) -> list[float]:
    """The metric of this loss by seed, averaged over the folds."""
    mine = [run for run in study.runs if run["loss"] == loss]
    return article_faces.by_seed(mine, article_faces.METRICS[metric])


def faces() -> str:
    """The second experiment: published accuracies beside those on other people."""
    as_published, mended = load("faces-published"), load("faces")
    titles = article_faces.variants(True)
    first = "arcface+regular_face"

    def cells(study: Study, loss: str, metric_of: Callable[[str], str]) -> list[str]:
        """The accuracy, and how far it is ahead of the first line's."""
        ours, theirs = (over_folds(study, name, metric_of(name)) for name in (loss, first))
        return [spread(ours), "" if loss == first else difference(ours, theirs)]

    lines = [
        [
            titles[name].title,
            number(published.FACES[name.split("+")[0]][1]),
            *cells(as_published, name, published_metric),
            *cells(mended, name, lambda _: "test_nearest"),
        ]
        for name in as_published.losses
    ]
    header = ("loss", "published", "as published, here", "minus line 1", "mended, here: 1-NN",
              "minus line 1")  # fmt: skip
    return markdown_table(header, lines)


def open_set(name: str) -> str:
    """Closed-set accuracy and open-set verification of one set of images."""
    study, rows, titles = faces_study(name)
    quoted = article_faces.quoted_rates(study.runs)
    rates = [rate for rate in quoted if rate in ("0.01", quoted[-1])]  # 1 %, and the lowest
    baseline = over_folds(study, "arcface", "eer")
    lines = []
    for row in rows:
        eer = over_folds(study, row["loss"], "eer")
        lines.append(
            [
                titles[row["loss"]].title,
                article_faces.metric_text(row["test_nearest"]),
                article_faces.metric_text(row["eer"]),
                "" if row["loss"] == "arcface" else difference(eer, baseline),
                article_faces.metric_text(row["auc"], 4),
                *(article_faces.metric_text(row["tar"][rate]) for rate in rates),
            ]
        )
    header = ("loss", "test 1-NN", "EER", "EER minus ArcFace's", "AUC",
              *(f"TAR at FAR {100 * float(rate):g} %" for rate in rates))  # fmt: skip
    return markdown_table(header, lines)


def sweep_values(
    runs: Sequence[dict[str, Any]], metric: str
) -> dict[scale_sweep.Point, list[float]]:
    """The metric by scale and margin, in the order of the runs."""
    points: dict[scale_sweep.Point, list[float]] = {}
    for run in runs:
        points.setdefault((run["scale"], run["margin"]), []).append(run[metric])
    return points


def sweep_row(classes: int, data: str, metric: str) -> list[str]:
    name = f"sweep-{classes}"
    study = load(name)
    chosen = scale_sweep.Chosen.by(study.runs, study.settings["fixed_adacos_scale"])
    values, seeds = (sweep_values(study.confirming, what) for what in (metric, "seed"))
    used = seeds.get(chosen.fixed, [])
    if not used or any(seeds.get(point) != used for point in chosen.points):
        raise ReportError(
            f"{name}: the best points aren't confirmed by the same seeds; resume its script with "
            "--confirm-seeds"
        )

    def cells(point: scale_sweep.Point, title: str) -> list[str]:
        """What the point gives, and how far Fixed AdaCos is ahead of it."""
        lead = "" if point == chosen.fixed else difference(values[chosen.fixed], values[point])
        return [title + spread(values[point]), lead]

    return [
        f"{classes:,}",
        data,
        f"{len(used)}",
        cells(chosen.fixed, f"{chosen.fixed[0]:.3g}: ")[0],
        *cells(chosen.best_scale, f"{chosen.best_scale[0]:.3g}: "),
        *cells(chosen.best, "{:.3g}, {:g}: ".format(*chosen.best)),
        *cells(chosen.usual, ""),
    ]


def sweep(metric: str) -> str:
    """Fixed AdaCos beside the best of the grid, and ArcFace's usual point, for every C."""
    header = ("C", "data", "seeds", "√2·ln(C−1)", "best s, m = 0", "fixed minus it", "best s, m",
              "fixed minus it", "s = 64, m = 0.5", "fixed minus it")  # fmt: skip
    return markdown_table(header, [sweep_row(*item, metric) for item in SWEEPS.items()])


def sweep_longer() -> str:
    """What more epochs give at some points of the sweeps, with the same seeds."""
    lines: list[list[str]] = []
    for classes in LONGER:
        name = f"sweep-{classes}"
        short, long = load(name), load(f"{name}-longer")
        seeds = [{run["seed"] for run in study.runs} for study in (short, long)]
        if seeds[0] != seeds[1]:
            raise ReportError(f"{name} and {name}-longer have different seeds: {seeds}")
        before, after = (sweep_values(study.runs, "nearest") for study in (short, long))
        lines += (
            [
                f"{classes:,}",
                f"{point[0]:.3g}, {point[1]:g}",
                f"{short.settings['epochs']}: {spread(before[point])}",
                f"{long.settings['epochs']}: {spread(values)}",
                difference(values, before[point]),
            ]
            for point, values in after.items()
        )
    return markdown_table(("C", "s, m", "epochs: 1-NN", "epochs: 1-NN", "gain"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "mnist_published": mnist_published,
    "mnist": mnist,
    "mnist_center_invariant": mnist_center_invariant,
    "faces": faces,
    "open_faces": lambda: open_set("faces"),
    "open_characters": lambda: open_set("characters"),
    "sweep": lambda: sweep("nearest"),
    "sweep_eer": lambda: sweep("eer"),
    "sweep_longer": sweep_longer,
}


def draw_accuracy(path: Path) -> None:
    study = load("mnist-published")
    titles = article_mnist.variants(True)
    bars = []
    for name in study.losses:
        plain = name.split("+")[0]
        _, test = published.MNIST[plain]
        mean, _, half = mean_and_interval(study.of(name, published_metric(name)))
        bars.append(
            (
                f"{titles[name].title}, as published",
                mean,
                half or 0.0,
                test,
                figures.LOSS_COLORS[plain],
            )
        )
    mended, titles = load("mnist"), article_mnist.variants(False)
    for name in mended.losses:
        mean, _, half = mean_and_interval(mended.of(name, "test_nearest"))
        color = figures.LOSS_COLORS[name.split("+")[0]]
        bars.append((f"{titles[name].title}, mended", mean, half or 0.0, None, color))
    figures.accuracy_bars(
        path,
        "MNIST: test accuracy as published, and mended",
        f"mean and 95 % confidence interval; seeds: {study.seeds} as published, "
        f"{mended.seeds} mended; {mended.settings['epochs']} epochs",
        bars,
        "test accuracy, %",
    )


def draw_cosines(path: Path) -> None:
    study, titles = load("mnist"), article_mnist.variants(False)
    seed = study.runs[0]["seed"]
    rows = [
        (titles[run["loss"]].title, run["cosines"])
        for run in study.runs
        if run["seed"] == seed and "+" not in run["loss"]
    ]
    figures.cosines(
        path,
        f"MNIST, embedding of {study.settings['embedding_size']}, the first "
        f"{sum(rows[0][1][0]['target']):,} training images, seed {seed}; the height of each panel "
        "is its own",
        rows,
    )


def draw_spheres(path: Path) -> None:
    study, titles = load("mnist-3d"), article_mnist.variants(False)
    figures.spheres(
        path,
        f"MNIST, {study.settings['epochs']} epochs; the same network, start and order of images",
        [
            (f"{titles[run['loss']].title}: {run['test_nearest']:.1f} % by 1-NN", run["sphere"])
            for run in study.runs
        ],
    )


def draw_roc(path: Path) -> None:
    panels = []
    for name, title in (("faces", "AT&T faces"), ("characters", "Omniglot characters")):
        study, rows, titles = faces_study(name)
        curves = []
        for row in rows:
            if "+" in row["loss"]:
                continue  # lies on the curve of the loss without the regulariser
            curves.append(
                (
                    titles[row["loss"]].title,
                    mean_curve([run for run in study.runs if run["loss"] == row["loss"]]),
                    figures.LOSS_COLORS[row["loss"]],
                )
            )
        folds = study.settings["folds"]
        panels.append((f"{title}: {len(folds)} folds, {sum(map(len, folds))} classes", curves))
    figures.roc_curves(path, "mean of the curves of all folds and seeds", panels)


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Average true accept rates at the false accept rates that every run has the pairs for."""
    lowest = max(run["verification"]["roc"][0][0] for run in runs)
    axis = [rate for rate, _ in runs[0]["verification"]["roc"] if rate >= lowest]

    def at(run: dict[str, Any], rate: float) -> float:
        return max(tar for far, tar in run["verification"]["roc"] if far <= rate * (1 + 1e-9))

    return [(rate, fmean(at(run, rate) for run in runs)) for rate in axis]


def draw_sweeps(path: Path) -> None:
    panels = []
    for classes, data in SWEEPS.items():
        study = load(f"sweep-{classes}")
        by_margin: dict[float, dict[float, list[float]]] = {}
        for (scale, margin), values in sweep_values(study.runs, "nearest").items():
            by_margin.setdefault(margin, {})[scale] = values
        title = f"C = {classes:,}, {data}; seeds: {study.seeds}"
        panels.append((title, study.settings["fixed_adacos_scale"], by_margin))
    figures.sweeps(
        path,
        "Accuracy against scale and margin, and where the fixed scale lies",
        "1-NN accuracy on held-out images, %; mean over seeds, bars from the lowest to the highest",
        panels,
        "1-NN, %",
    )


PICTURES: dict[str, Callable[[Path], None]] = {
    "study-mnist-accuracy.png": draw_accuracy,
    "study-mnist-cosines.png": draw_cosines,
    "study-mnist-sphere.png": draw_spheres,
    "study-roc.png": draw_roc,
    "study-sweep.png": draw_sweeps,
}


@contextlib.contextmanager
def making(what: str) -> Iterator[None]:
    """Say what couldn't be made where results hold values of another kind.

    Raises:
        ReportError: the block raised one of MISFITS.
    """
    try:
        yield
    except StoreError:
        raise
    except MISFITS as error:
        raise ReportError(
            f"{what}: {reason(error)}: a file in {RESULTS} is not what its script writes; run that "
            "script again"
        ) from error


def fill(text: str) -> str:
    """Replace what stands between the marks of each table.

    Raises:
        ReportError: a mark names no table, or results are of another kind.
        StoreError: the results of a table can't be read.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ReportError(f"no table {name!r}; there are {', '.join(TABLES)}")
        with making(f"table {name}"):
            return f"{match[1]}{TABLES[name]()}\n{match[3]}"

    return BLOCK.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and pictures that the documents have; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the study's tables and pictures.")
    parser.add_argument("--check", action="store_true", help="only see whether tables are right")
    arguments = parser.parse_args(argv)
    stale, pictures = [], set()
    try:
        for name in DOCUMENTS:
            path = ROOT / name
            before = path.read_text(encoding="utf-8")
            after = fill(before)
            pictures |= {picture for picture in PICTURES if picture in after}
            if after != before:
                stale.append(name)
                if not arguments.check:
                    path.write_text(after, encoding="utf-8")
        if not arguments.check:
            for picture in sorted(pictures):
                with making(picture):
                    PICTURES[picture](ROOT / "docs" / "images" / picture)
    except (ReportError, StoreError) as error:
        parser.error(str(error))
    if arguments.check and stale:
        print(f"not what the results give: {', '.join(stale)}", file=sys.stderr)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
