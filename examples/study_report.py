"""Write the tables of docs/study.md and README.ja.md, and the study's pictures, from its results.

    python examples/study_report.py

Reads examples/results, where the runs of the study are kept, and replaces what stands between
`<!-- table NAME -->` and `<!-- end -->` in the documents. The same results give the same files.
Intervals that hold after Holm's correction for all intervals of all tables are bold.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import article_mnist
import study_tables
from study import figures, published
from study.comparisons import holm
from study.measure import mean_and_interval
from study.store import MISFITS, StoreError, reason
from study_tables import ReportError, load, published_metric

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs/study.md", "README.ja.md")
BLOCK = re.compile(r"(<!-- table (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def draw_accuracy(path: Path) -> None:
    study = load("mnist-published")
    titles = article_mnist.variants(True)
    dots = []
    for name in study.losses:
        plain = name.split("+")[0]
        _, test = published.MNIST[plain]
        mean, _, half = mean_and_interval(study.of(name, published_metric(name)))
        dots.append(
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
        dots.append((f"{titles[name].title}, mended", mean, half or 0.0, None, color))
    figures.accuracy_dots(
        path,
        "MNIST: test accuracy as published, and mended",
        f"mean and 95 % confidence interval; seeds: {study.seeds} as published, "
        f"{mended.seeds} mended; {mended.settings['epochs']} epochs",
        dots,
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
        study, rows, titles = study_tables.faces_study(name)
        curves = [
            (
                titles[row["loss"]].title,
                mean_curve([run for run in study.runs if run["loss"] == row["loss"]]),
                figures.LOSS_COLORS[row["loss"].split("+")[0]],
                "+" in row["loss"],
            )
            for row in rows
        ]
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


def draw_sweeps(path: Path, metric: str, title: str, subtitle: str, y_label: str) -> None:
    panels = []
    for classes, data in study_tables.SWEEPS.items():
        study = load(f"sweep-{classes}")
        by_margin: dict[float, dict[float, list[float]]] = {}
        for (scale, margin), values in study_tables.sweep_values(study.runs, metric).items():
            by_margin.setdefault(margin, {})[scale] = values
        name = f"C = {classes:,}, {data}; seeds: {study.seeds}"
        panels.append((name, study.settings["fixed_adacos_scale"], by_margin))
    subtitle += "; mean over seeds, bars from the lowest to the highest"
    figures.sweeps(path, title, subtitle, panels, y_label, label_at_top=metric == "eer")


PICTURES: dict[str, Callable[[Path], None]] = {
    "study-mnist-accuracy.png": draw_accuracy,
    "study-mnist-cosines.png": draw_cosines,
    "study-mnist-sphere.png": draw_spheres,
    "study-roc.png": draw_roc,
    "study-sweep.png": lambda path: draw_sweeps(
        path,
        "nearest",
        "Accuracy against scale and margin, and where the fixed scale lies",
        "1-NN accuracy on held-out images, %",
        "1-NN, %",
    ),
    "study-sweep-eer.png": lambda path: draw_sweeps(
        path,
        "eer",
        "Equal error rate against scale and margin, and where the fixed scale lies",
        "of pairs of held-out images, of classes that are trained on, %",
        "EER, %",
    ),
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
            f"{what}: {reason(error)}: a file in {study_tables.RESULTS} is not what its script "
            "writes; run that script again"
        ) from error


def make_tables() -> dict[str, str]:
    """The tables as Markdown, by name.

    Raises:
        ReportError: results are of another kind.
        StoreError: results can't be read.
    """
    tables = {}
    for name, make in study_tables.TABLES.items():
        with making(f"table {name}"):
            tables[name] = make()
    certain = holm(found for table in tables.values() for found in table.comparisons)
    tables[study_tables.COUNTS] = study_tables.counts(tables, certain)
    return {name: table.markdown(certain) for name, table in tables.items()}


def check_names(text: str) -> None:
    """Refuse marks of tables that don't exist, before any result is read.

    Raises:
        ReportError: a mark names no table.
    """
    known = [*study_tables.TABLES, study_tables.COUNTS]
    for match in BLOCK.finditer(text):
        if match["name"] not in known:
            raise ReportError(f"no table {match['name']!r}; there are {', '.join(known)}")


def fill(text: str, tables: dict[str, str]) -> str:
    """Replace what stands between the marks of each table."""
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match['name']]}\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and pictures that the documents have; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the study's tables and pictures.")
    parser.add_argument("--check", action="store_true", help="only see whether tables are right")
    arguments = parser.parse_args(argv)
    stale, pictures = [], set()
    try:
        texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
        check_names("".join(texts.values()))
        tables = make_tables()
        for name, before in texts.items():
            after = fill(before, tables)
            pictures |= {picture for picture in PICTURES if picture in after}
            if after != before:
                stale.append(name)
                if not arguments.check:
                    (ROOT / name).write_text(after, encoding="utf-8")
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
