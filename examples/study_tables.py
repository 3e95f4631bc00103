"""The tables of the study, from its results; `study_report.py` writes them into the documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import article_faces
import article_mnist
import scale_sweep
from study import published
from study.comparisons import Comparison
from study.store import read_study
from study.tables import lowest_to_highest, markdown_table, number, spread

RESULTS = Path(__file__).resolve().parent / "results"
OPEN_SWEEPS = {"sweep-open-242": "Omniglot"}
MARGIN_SWEEP = 242  # whose best margin is compared with other scales too
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
    """The results of one file.

    Attributes:
        confirming: of a sweep, the runs that confirm its best points, averaged over any folds.
        by_fold: the same, averaged over the seeds of each fold.
    """

    settings: dict[str, Any]
    runs: list[dict[str, Any]]
    confirming: Sequence[dict[str, Any]] = ()
    by_fold: Sequence[dict[str, Any]] = ()

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
    found = content["runs"]
    if content["settings"]["experiment"] == "sweep":
        found = scale_sweep.averaged(found)
    all_runs = sorted(found, key=lambda run: run["seed"])  # differences are within a seed
    done: dict[int, set[tuple[Any, ...]]] = {}
    candidates = scale_sweep.of_grid(all_runs)  # all of them, if it isn't a sweep
    for run in candidates:
        done.setdefault(run["seed"], set()).add(tuple(run.get(name) for name in names))
    every = set().union(*done.values())
    runs = [run for run in candidates if done[run["seed"]] == every]
    if not runs:
        raise ReportError(f"{name}: no seed is complete; resume its script")
    confirming = scale_sweep.confirming(all_runs)
    by_fold = scale_sweep.averaged(scale_sweep.confirming(content["runs"]), over="seed")
    return Study(content["settings"], runs, confirming, by_fold)


@dataclass(frozen=True)
class Table:
    """Cells of a table; its comparisons become text when all tables are known."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Comparison]]

    @property
    def comparisons(self) -> list[Comparison]:
        return [cell for row in self.rows for cell in row if isinstance(cell, Comparison)]

    def markdown(self, certain: Collection[Comparison]) -> str:
        """Lay it out, with the comparisons that are certain in bold."""
        rows = [[f"**{cell}**" if cell in certain else str(cell) for cell in row]
                for row in self.rows]  # fmt: skip
        return markdown_table(self.header, rows)


FIXED = "fixed_adacos"
LEAD = "Fixed AdaCos minus it"


def published_metric(loss: str) -> str:
    """What the article judges the loss by: cross-entropy by arg max, the others by 1-NN."""
    return "test_arg_max" if loss == "cross_entropy" else "test_nearest_euclidean"


def lead(values: Callable[[str], list[float]], loss: str) -> Comparison | str:
    """How far Fixed AdaCos's values are above this loss's."""
    return "" if loss == FIXED else Comparison.between(values(FIXED), values(loss))


def mnist_published() -> Table:
    """Published accuracies of the first experiment beside ours with the published settings."""
    study = load("mnist-published")
    titles = article_mnist.variants(True)

    def judged(loss: str) -> list[float]:
        return study.of(loss, published_metric(loss))

    def cosine(loss: str) -> list[float]:
        return study.of(loss, "test_nearest")

    lines = []
    for name in study.losses:
        train, test = published.MNIST[name.split("+")[0]]
        train_metric = "train_arg_max" if name == "cross_entropy" else "train_nearest_itself"
        lines.append(
            [
                titles[name].title,
                number(train),
                spread(study.of(name, train_metric)),
                number(test),
                spread(judged(name)),
                lead(judged, name),
                spread(cosine(name)),
                lead(cosine, name),
            ]
        )
    header = ("loss", "train, published", "train, here", "test, published", "test, here", LEAD,
              "cosine 1-NN", LEAD)  # fmt: skip
    return Table(header, lines)


def mnist() -> Table:
    """The first experiment mended."""
    study = load("mnist")
    titles = article_mnist.variants(False)

    def nearest(loss: str) -> list[float]:
        return study.of(loss, "test_nearest")

    lines = [
        [
            titles[name].title,
            lowest_to_highest(study.of(name, "scale")),
            spread(nearest(name)),
            lead(nearest, name),
            spread(study.of(name, "test_arg_max")),
            spread(study.of(name, "train_nearest")),
        ]
        for name in study.losses
    ]
    return Table(("loss", "s", "test 1-NN", LEAD, "test arg max", "train 1-NN"), lines)


def mnist_center_invariant() -> Table:
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
        change = Comparison.between(ours, theirs)
        lines.append([titles[name].title, spread(theirs), spread(ours), change])
    return Table(("loss", "without: 1-NN", "with: 1-NN", "difference"), lines)


def faces_study(name: str) -> tuple[Study, list[dict[str, Any]], dict[str, Any]]:
    """A study of article_faces: its runs, and their summary by loss."""
    study = load(name)
    rows = article_faces.summarise(study.runs)
    return study, rows, article_faces.variants(study.settings["as_published"])


def averaged(study: Study, loss: str, metric: str, by: str = "seed") -> list[float]:
    """The metric of this loss by seed, averaged over the folds; or by fold, over the seeds."""
    mine = [run for run in study.runs if run["loss"] == loss]
    return article_faces.averaged(mine, article_faces.METRICS[metric], by)


def faces() -> Table:
    """The second experiment: published accuracies beside those on other people."""
    as_published, mended = load("faces-published"), load("faces")
    titles = article_faces.variants(True)

    def judged(loss: str) -> list[float]:
        return averaged(as_published, loss, published_metric(loss))

    def nearest(loss: str) -> list[float]:
        return averaged(mended, loss, "test_nearest")

    lines = [
        [
            titles[name].title,
            number(published.FACES[name.split("+")[0]][1]),
            spread(judged(name)),
            lead(judged, name),
            spread(nearest(name)),
            lead(nearest, name),
        ]
        for name in as_published.losses
    ]
    header = ("loss", "published", "as published, here", LEAD, "mended, here: 1-NN", LEAD)
    return Table(header, lines)


def of_common_seeds(*studies: Study) -> list[Study]:
    """The studies with the seeds that all of them have.

    Raises:
        ReportError: there is none.
    """
    seeds = set.intersection(*({run["seed"] for run in study.runs} for study in studies))
    if not seeds:
        raise ReportError("results that are compared have no seed in common; add seeds to one")
    return [
        replace(study, runs=[run for run in study.runs if run["seed"] in seeds])
        for study in studies
    ]


def mending() -> Table:
    """What the mended code is worth to ArcFace and Fixed AdaCos, and their difference."""
    lines: list[list[str | Comparison]] = []
    titles = article_mnist.variants(False) | article_faces.variants(False)
    for data, name, frozen, losses in (
        ("MNIST", "mnist", "arcface+center_invariant", ["arcface"]),
        ("faces", "faces", "arcface+regular_face", ["arcface", "arcface+regular_face"]),
    ):
        studies = of_common_seeds(load(f"{name}-published"), load(name))

        def line(title: str, pair: Sequence[Sequence[float]], data: str = data) -> None:
            gain = Comparison.between(pair[1], pair[0])
            lines.append([f"{data}: {title}", *map(spread, pair), gain])

        # A run of article_mnist has no fold: its seed's average is the run itself.
        fixed = [averaged(study, FIXED, "test_nearest") for study in studies]
        line(titles[FIXED].title, fixed)
        for loss in losses:
            # Where weights are frozen a regulariser of them changes nothing.
            theirs = [
                averaged(study, name, "test_nearest")
                for study, name in zip(studies, (frozen, loss), strict=True)
            ]
            line(titles[loss].title, theirs)
            leads = [Comparison.between(*pair) for pair in zip(fixed, theirs, strict=True)]
            lost = Comparison.between(leads[1].differences, leads[0].differences)
            title = f"{data}: {titles[FIXED].title} minus {titles[loss].title}"
            lines.append([title, *leads, lost])
    return Table(("cosine 1-NN", "as published", "mended", "mended minus published"), lines)


def open_set(name: str) -> Table:
    """Closed-set accuracy and open-set verification of one set of images."""
    study, rows, titles = faces_study(name)
    quoted = article_faces.quoted_rates(study.runs)
    rates = [rate for rate in quoted if rate in ("0.01", quoted[-1])]  # 1 %, and the lowest

    def by(metric: str, unit: str, loss: str) -> Comparison | str:
        return lead(lambda name: averaged(study, name, metric, unit), loss)

    lines = [
        [
            titles[row["loss"]].title,
            article_faces.metric_text(row["test_nearest"]),
            by("test_nearest", "seed", row["loss"]),
            article_faces.metric_text(row["eer"]),
            by("eer", "seed", row["loss"]),
            by("eer", "fold", row["loss"]),
            article_faces.metric_text(row["auc"], 4),
            *(article_faces.metric_text(row["tar"][rate]) for rate in rates),
        ]
        for row in rows
    ]
    header = ("loss", "test 1-NN", LEAD, "EER", f"{LEAD}, seeds", "folds", "AUC",
              *(f"TAR at FAR {100 * float(rate):g} %" for rate in rates))  # fmt: skip
    return Table(header, lines)


def sweep_values(
    runs: Sequence[dict[str, Any]], metric: str
) -> dict[scale_sweep.Point, list[float]]:
    """The metric by scale and margin, in the order of the runs."""
    points: dict[scale_sweep.Point, list[float]] = {}
    for run in runs:
        points.setdefault((run["scale"], run["margin"]), []).append(run[metric])
    return points


def sweep_rows(name: str, label: Sequence[str], *, folds: bool) -> list[list[str | Comparison]]:
    """A line for each point that was trained with seeds that had no part in its choice.

    The chosen points have the same seeds; any other is compared by the seeds it has.
    """
    study = load(name)
    chosen = scale_sweep.Chosen.by(study.runs, study.settings["fixed_adacos_scale"], hold_out=folds)
    seeds = sweep_values(study.confirming, "seed")
    used = seeds.get(chosen.fixed, [])
    if not used or any(seeds.get(point) != used for point in chosen.points):
        raise ReportError(
            f"{name}: the best points aren't confirmed by the same seeds; resume its script with "
            "--confirm-seeds"
        )
    nearest, arg_max, eer = (sweep_values(study.confirming, m) for m in scale_sweep.METRICS)
    eer_by_fold = sweep_values(study.by_fold, "eer")
    roles = {
        "√2·ln(C−1)": chosen.fixed,
        "best, m = 0": chosen.best_scale,
        "best by 1-NN": chosen.best,
        "best by EER": chosen.best_verified,
        "usual": chosen.usual,
    }

    def lead_over(
        point: scale_sweep.Point, values: dict[scale_sweep.Point, list[float]]
    ) -> str | Comparison:
        if point == chosen.fixed:
            return ""
        ours = [values[chosen.fixed][used.index(seed)] for seed in seeds[point]]
        return Comparison.between(ours, values[point])

    def lead_by_fold(point: scale_sweep.Point) -> str | Comparison:
        if point == chosen.fixed:
            return ""
        return Comparison.between(eer_by_fold[chosen.fixed], eer_by_fold[point])

    return [
        [
            *label,
            f"{len(seeds[point])}",
            "{:.4g}, {:g}".format(*point),
            ", ".join(role for role, its in roles.items() if its == point),
            spread(nearest[point]),
            lead_over(point, nearest),
            spread(arg_max[point]),
            spread(eer[point]),
            lead_over(point, eer),
            *([lead_by_fold(point)] if folds else []),
        ]
        for point in seeds
        if {*seeds[point]} <= {*used}
    ]


SWEEP_HEADER = ("seeds", "s, m", "chosen as", "1-NN", "fixed minus it", "arg max", "EER",
                "fixed minus it")  # fmt: skip


def sweep() -> Table:
    """Fixed AdaCos beside the best of the grid, and ArcFace's usual point, for every C."""
    lines = [
        line
        for classes, data in SWEEPS.items()
        for line in sweep_rows(f"sweep-{classes}", [f"{classes:,}", data], folds=False)
    ]
    return Table(("C", "data", *SWEEP_HEADER), lines)


def sweep_margin() -> Table:
    """The best point with a margin, of one sweep, beside others than Fixed AdaCos."""
    study = load(f"sweep-{MARGIN_SWEEP}")
    chosen = scale_sweep.Chosen.by(study.runs, study.settings["fixed_adacos_scale"])
    nearest, eer = (sweep_values(study.confirming, metric) for metric in ("nearest", "eer"))
    rows = [
        [
            "{:.4g}, {:g}".format(*point),
            *(Comparison.between(values[chosen.best], values[point]) for values in (nearest, eer)),
        ]
        for point in nearest
        if point not in (chosen.best, chosen.fixed)
    ]
    best = "{:.4g}, {:g} minus it".format(*chosen.best)
    return Table(("s, m", f"1-NN: {best}", f"EER: {best}"), rows)


def sweep_open() -> Table:
    """The same with classes held out, whose pairs are verified."""
    lines = [
        line for name, data in OPEN_SWEEPS.items() for line in sweep_rows(name, [data], folds=True)
    ]
    return Table(("data", *SWEEP_HEADER, "folds"), lines)


def sweep_longer() -> Table:
    """What more epochs give at some points of the sweeps, with the same seeds."""
    lines: list[list[str | Comparison]] = []
    for classes in LONGER:
        name = f"sweep-{classes}"
        short, long = load(name), load(f"{name}-longer")
        fixed = (short.settings["fixed_adacos_scale"], 0.0)
        seeds = sorted({run["seed"] for run in long.runs})
        if not {*seeds} <= {run["seed"] for run in short.runs}:
            raise ReportError(f"{name} lacks seeds of {name}-longer, which are {seeds}")
        same = [run for run in short.runs if run["seed"] in seeds]
        nearest, arg_max, eer = (
            (sweep_values(same, metric), sweep_values(long.runs, metric))
            for metric in scale_sweep.METRICS
        )
        epochs = f"{short.settings['epochs']} → {long.settings['epochs']}"

        def change(values: Sequence[dict[scale_sweep.Point, list[float]]], at: Any) -> str:
            return " → ".join(spread(when[at]) for when in values)

        lines += (
            [
                f"{classes:,}",
                f"{len(seeds)}",
                epochs,
                "{:.4g}, {:g}".format(*point),
                change(nearest, point),
                Comparison.between(values, nearest[0][point]),
                "" if point == fixed else Comparison.between(nearest[1][fixed], values),
                change(arg_max, point),
                change(eer, point),
            ]
            for point, values in nearest[1].items()
        )
    header = ("C", "seeds", "epochs", "s, m", "1-NN", "gain", "fixed minus it, longer", "arg max",
              "EER")  # fmt: skip
    return Table(header, lines)


TABLES: dict[str, Callable[[], Table]] = {  # in the order of their numbers in docs/study.md
    "mnist_published": mnist_published,
    "mnist": mnist,
    "mnist_center_invariant": mnist_center_invariant,
    "faces": faces,
    "mending": mending,
    "open_faces_published": lambda: open_set("faces-published"),
    "open_faces": lambda: open_set("faces"),
    "open_characters": lambda: open_set("characters"),
    "sweep": sweep,
    "sweep_margin": sweep_margin,
    "sweep_longer": sweep_longer,
    "sweep_open": sweep_open,
}
COUNTS = "intervals"  # the table that counts the intervals of all others


def counts(tables: dict[str, Table], certain: Collection[Comparison]) -> Table:
    """How many intervals each table has, and how many of them hold 0."""
    lines, every = [], []
    for position, (name, table) in enumerate(tables.items(), 1):
        known = [found for found in table.comparisons if found.p_value is not None]
        every += known
        lines.append([f"{position}", name.replace("_", " "), *count(known, certain)])
    lines.append(["", "all", *count(list(dict.fromkeys(every)), certain)])
    return Table(("table", "", "intervals", "without 0", "by Holm's correction"), lines)


def count(found: Sequence[Comparison], certain: Collection[Comparison]) -> list[str]:
    outside = sum(comparison.excludes_zero for comparison in found)
    return [str(len(found)), str(outside), str(sum(c in certain for c in found))]
