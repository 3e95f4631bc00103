"""The charts of the report: growth on logarithmic axes, and bars against peers.

Colours are told apart by colour-blind readers, every line is labelled where it ends, and the same
data give the same file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's colours
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY, INK = "#8C8C8C", "#333333"
DPI = 110
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    """One line of a growth chart; ``by_formula`` points are not measured and drawn hollow."""

    name: str
    sizes: Sequence[float]
    values: Sequence[float]
    by_formula: Sequence[bool]
    color: str
    marker: str


@dataclass(frozen=True)
class Bar:
    """One bar: a length, and whether it is this package, or a bound without the margin."""

    name: str
    value: float
    is_ours: bool = False
    is_lower_bound: bool = False


def _plain(value: float, _position: int = 0) -> str:
    """10 k and 1 M as people say them where they are round, else digits in groups of three."""
    for size, suffix in ((1e6, " M"), (1e3, " k")):
        if value >= size and value % size == 0:
            return f"{value / size:,.0f}{suffix}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _title(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.01, 0.905, subtitle, ha="left", va="top", fontsize=8.5, color=GREY)


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart, upwards, until neighbours are ``gap`` apart; the order stays."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each name to the right of its line's end, moved where two would overlap.

    A line that ends before the others has its name above its end.
    """
    to_axes = axes.transAxes.inverted()
    last = max(line.sizes[-1] for line in lines)
    to_the_right = []
    for line in lines:
        weight = "bold" if line.color == BLUE else "normal"
        end = (line.sizes[-1], line.values[-1])
        if line.sizes[-1] < last:
            axes.annotate(
                line.name, end, xytext=(0, 6), textcoords="offset points", color=line.color,
                ha="center", va="bottom", fontweight=weight,
            )  # fmt: skip
        else:
            x, y = map(float, to_axes.transform(axes.transData.transform(end)))
            to_the_right.append((line, weight, x, y))
    heights = _spread([y for *_, y in to_the_right], gap=0.068)
    for (line, weight, x, _), height in zip(to_the_right, heights, strict=True):
        axes.text(
            x + 0.02, height, line.name, color=line.color, transform=axes.transAxes, va="center",
            fontweight=weight,
        )  # fmt: skip


def growth(
    path: Path, title: str, subtitle: str, x_label: str, y_label: str, lines: Sequence[Line]
) -> None:
    """Draw values against sizes, both logarithmic.

    Args:
        path: the PNG file.
        title: what is shown, with the sizes that stay fixed.
        subtitle: device and versions.
        x_label: the size that grows.
        y_label: the quantity and its unit.
        lines: sizes ascending, all values positive.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(7.2, 4.2))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.105, right=0.76, top=0.82, bottom=0.125)
        _title(figure, title, subtitle)
        for line in lines:
            axes.plot(
                line.sizes, line.values, color=line.color, lw=2 if line.color == BLUE else 1.4
            )
            for size, value, by_formula in zip(
                line.sizes, line.values, line.by_formula, strict=True
            ):
                axes.plot(
                    size, value, marker=line.marker, color=line.color, ms=5.5,
                    mfc="white" if by_formula else line.color,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        sizes = sorted({size for line in lines for size in line.sizes})
        if sizes[-1] / sizes[0] < 200.0:
            axes.set_xticks(sizes)
        else:
            axes.xaxis.set_major_locator(LogLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="major", color="#E4E4E4", lw=0.7)
        axes.set_axisbelow(True)
        _label_ends(axes, lines)
        if any(flag for line in lines for flag in line.by_formula):
            axes.text(
                0.02, 0.95, "hollow: by formula, not measured", color=GREY, fontsize=8.5,
                transform=axes.transAxes,
            )  # fmt: skip
        _save(figure, path)


def bars(
    path: Path, title: str, subtitle: str, rows: Sequence[Bar], floor: float, floor_name: str
) -> None:
    """Draw horizontal bars of times in ms, the shortest on top, and a line at the floor.

    Args:
        path: the PNG file.
        title: what is shown, with its shape.
        subtitle: device and versions.
        rows: names and ms.
        floor: ms that dense code can't go below.
        floor_name: what takes as long.
    """
    rows = sorted(rows, key=lambda row: row.value)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        height = 1.5 + 0.34 * len(rows)
        figure = Figure(figsize=(7.2, height))
        axes = figure.subplots()
        longest = max(len(row.name) for row in rows)
        left = 0.02 + 5.6 * longest / (72 * figure.get_figwidth())  # about 5.6 points a letter
        figure.subplots_adjust(left=left, right=0.93, top=1 - 0.95 / height, bottom=0.5 / height)
        figure.suptitle(
            title, x=0.01, y=1 - 0.09 / height, ha="left", fontsize=11, fontweight="bold"
        )
        figure.text(
            0.01, 1 - 0.36 / height, subtitle, ha="left", va="top", fontsize=8.5, color=GREY
        )
        for position, row in enumerate(rows):
            color = BLUE if row.is_ours else GREY
            axes.barh(
                position, row.value, height=0.66, edgecolor=color,
                color="white" if row.is_lower_bound else color,
                hatch="////" if row.is_lower_bound else None, lw=0.8,
            )  # fmt: skip
            axes.annotate(
                f"{row.value:,.0f}" if row.value >= 100 else f"{row.value:.3g}",
                (row.value, position), xytext=(4, 0), textcoords="offset points", va="center",
                color=BLUE if row.is_ours else INK,
                fontweight="bold" if row.is_ours else "normal",
                zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
        axes.axvline(floor, color=VERMILION, lw=1.6, ls="--", zorder=3)
        axes.annotate(
            f"{floor_name}: {floor:,.3g}", (floor, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", color=VERMILION, ha="center", fontsize=8.5,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row.is_ours:
                label.set(color=BLUE, fontweight="bold")
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.08 * max(floor, *(row.value for row in rows)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
        hatched = (
            "   hatched: computes no margin" if any(row.is_lower_bound for row in rows) else ""
        )
        axes.set_xlabel(f"ms{hatched}")
        _save(figure, path)
