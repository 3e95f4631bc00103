"""The pictures of the study. The same results give the same files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colours, told apart by colour-blind readers
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
BLACK, GREY, INK, PALE = "#000000", "#8C8C8C", "#333333", "#E4E4E4"
LOSS_COLORS = {
    "arcface": VERMILION,
    "cosface": GREEN,
    "fixed_adacos": BLUE,
    "cross_entropy": GREY,
    "simple_arcface": ORANGE,
    "adacos": SKY,
    "adaface": PURPLE,
    "subcenter_arcface": BLACK,
}
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
}


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, title: str, subtitle: str) -> Iterator[Figure]:
    """Give an empty figure with title and subtitle; save it as PNG at the end."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        figure.suptitle(
            title, x=0.01, y=1 - 0.08 / height, ha="left", va="top", fontsize=11, fontweight="bold"
        )
        figure.text(
            0.01, 1 - 0.34 / height, subtitle, ha="left", va="top", fontsize=8.5, color=GREY
        )
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def spheres(path: Path, subtitle: str, panels: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draw embeddings on the unit sphere, coloured by class, with the directions of the classes.

    Args:
        path: the PNG file.
        subtitle: what was trained.
        panels: title and `sphere` of a result ("points", "labels", "weights") for each loss.
    """
    colors = [matplotlib.colormaps["tab10"](label) for label in range(10)]
    title = "Test digits in a three-dimensional embedding; a line points to the weight of a class"
    with picture(path, 7.6, 8.2, title, subtitle) as figure:
        for index, (name, sphere) in enumerate(panels):
            axes: Any = figure.add_subplot(2, 2, index + 1, projection="3d")
            points, labels = np.array(sphere["points"]), np.array(sphere["labels"])
            _wireframe(axes)
            axes.scatter(
                *points.T, c=[colors[label] for label in labels], s=9, depthshade=True, lw=0
            )
            if sphere["weights"] is not None:
                rows_per_class = len(sphere["weights"]) // len(colors)
                for row, weight in enumerate(np.array(sphere["weights"])):
                    color = colors[row // rows_per_class]
                    axes.plot(*np.stack([0.0 * weight, 1.25 * weight]).T, c=color, lw=1.4)
            axes.set_title(name, fontsize=10, loc="left", y=1.03)
            axes.set_box_aspect((1, 1, 1), zoom=1.2)
            axes.set_axis_off()
            axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
        # Beside the lines the digits would hide one another.
        keys = [
            Line2D([], [], color=color, marker="o", ms=5, lw=1.4, label=str(digit))
            for digit, color in enumerate(colors)
        ]
        figure.legend(
            handles=keys, loc="lower center", ncols=10, frameon=False, fontsize=9.5,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
        figure.subplots_adjust(left=0.0, right=1.0, bottom=0.05, top=0.89, wspace=0.0, hspace=0.12)


def _wireframe(axes: Any) -> None:
    turn, rise = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(0, np.pi, 13))
    x, y, z = np.cos(turn) * np.sin(rise), np.sin(turn) * np.sin(rise), np.cos(rise)
    axes.plot_wireframe(x, y, z, color=PALE, lw=0.35)


def cosines(
    path: Path, subtitle: str, rows: Sequence[tuple[str, Sequence[Mapping[str, Sequence[int]]]]]
) -> None:
    """Draw histograms of target cosine and hardest negative cosine, epoch by epoch.

    Args:
        path: the PNG file.
        subtitle: what was trained.
        rows: title and `cosines` of a result, for each loss: before training and after each epoch.
    """
    epochs = sorted({0, 1, len(rows[0][1]) - 1})
    bins = len(rows[0][1][0]["target"])
    edges = np.linspace(-1, 1, bins + 1)
    title = "Cosine of training images with their class, and with the nearest other class"
    height = 1.0 + 1.35 * len(rows)
    with picture(path, 7.6, height, title, subtitle) as figure:
        grid = figure.subplots(len(rows), len(epochs), sharex=True, sharey=False, squeeze=False)
        for line, (name, histograms) in zip(grid, rows, strict=True):
            for axes, epoch in zip(line, epochs, strict=True):
                for kind, color in (("hardest_negative", VERMILION), ("target", BLUE)):
                    counts = np.array(histograms[epoch][kind])
                    axes.stairs(counts / counts.sum(), edges, fill=True, color=color, alpha=0.55)
                axes.set_yticks([])
                axes.spines["left"].set_visible(False)
                axes.set_xlim(-1, 1)
                axes.set_xticks([-0.5, 0, 0.5])
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        for axes, epoch in zip(grid[0], epochs, strict=True):
            when = "before training" if epoch == 0 else f"after {epoch} epoch{'s' * (epoch > 1)}"
            axes.set_title(when, fontsize=9.5)
        for axes in grid[-1]:
            axes.set_xlabel("cosine")
        first = grid[0][0]
        for text, color, y in (("own class", BLUE, 0.86), ("nearest other", VERMILION, 0.66)):
            first.text(0.02, y, text, color=color, fontsize=8.5, transform=first.transAxes)
        figure.subplots_adjust(
            left=0.185, right=0.985, top=1 - 0.85 / height, bottom=0.5 / height, hspace=0.25,
            wspace=0.12,
        )  # fmt: skip


def accuracy_dots(
    path: Path,
    title: str,
    subtitle: str,
    dots: Sequence[tuple[str, float, float, float | None, str]],
    x_label: str,
) -> None:
    """Draw dots with error bars, a line for each, and the published value as a diamond.

    Args:
        path: the PNG file.
        title: what is shown.
        subtitle: the settings, and what the error bars are.
        dots: name, value, half width of the error bar, published value or None, colour.
        x_label: the quantity.
    """
    height = 1.25 + 0.36 * len(dots)
    with picture(path, 7.6, height, title, subtitle) as figure:
        axes = figure.subplots()
        known = [published for *_, published, _ in dots if published is not None]
        for position, (_, value, half, published, color) in enumerate(dots):
            axes.errorbar(
                value, position, xerr=half, fmt="o", color=color, ms=7, capsize=3.5, lw=1.6
            )
            axes.annotate(
                f"{value:.2f}", (value, position), xytext=(0, 6), textcoords="offset points",
                ha="center", color=INK, fontsize=8.5,
            )  # fmt: skip
            if published is not None:
                axes.plot(published, position, "D", mfc="white", mec=INK, ms=6)
        if known:
            axes.plot([], [], "D", mfc="white", mec=INK, ms=6, ls="", label="published (one run)")
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5,
                borderaxespad=0.1,
            )  # fmt: skip
        axes.set_yticks(range(len(dots)), [name for name, *_ in dots])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(dots) - 0.5, -0.7)
        axes.grid(True, axis="x", color=PALE, lw=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        longest = max(len(name) for name, *_ in dots)
        left = 0.02 + 6.0 * longest / (72 * figure.get_figwidth())  # about 6 points a letter
        figure.subplots_adjust(left=left, right=0.97, top=1 - 0.78 / height, bottom=0.5 / height)


def roc_curves(
    path: Path,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[float, float]], str, bool]]]],
) -> None:
    """Draw true accept rate against false accept rate, the latter logarithmic.

    Args:
        path: the PNG file.
        subtitle: settings, and what was averaged.
        panels: title, and for each loss its name, points as fractions, colour, and whether it is
            dotted.
    """
    title = "Verification of classes never seen in training: true against false accept rate"
    with picture(path, 7.6, 4.8, title, subtitle) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, curves) in zip(grid, panels, strict=True):
            for label, points, color, dotted in curves:
                far, tar = np.array(points).T
                style = ":" if dotted else "--" if color == GREY else "-"
                axes.plot(100 * far, 100 * tar, style, color=color, lw=1.7, label=label)
            axes.set_xscale("log")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("false accept rate, %")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(True, which="major", color=PALE, lw=0.7)
            axes.set_ylim(None, 100)
        names = {  # of all panels
            line.get_label(): line for axes in grid for line in axes.get_lines()
        }
        figure.legend(
            handles=[*names.values()], loc="lower center", ncols=4, frameon=False, fontsize=8.5
        )
        grid[0].set_ylabel("true accept rate, %")
        figure.subplots_adjust(left=0.085, right=0.985, top=0.83, bottom=0.22, wspace=0.18)


def sweeps(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, float, Mapping[float, Mapping[float, Sequence[float]]]]],
    y_label: str,
    *,
    label_at_top: bool = False,
) -> None:
    """Draw a metric against the scale, a line for each margin, and Fixed AdaCos's scale.

    Args:
        path: the PNG file.
        title: what is shown.
        subtitle: the settings, and what the error bars are.
        panels: title, Fixed AdaCos's scale, and the values of all seeds by margin and scale.
        y_label: the metric.
        label_at_top: where the lines leave room for what Fixed AdaCos's scale is.
    """
    palette = (BLUE, ORANGE, VERMILION, PURPLE, GREEN, SKY)
    margins = sorted({margin for *_, by_margin in panels for margin in by_margin})
    if len(margins) > len(palette):
        raise ValueError(f"a picture has colours for {len(palette)} margins only")
    colors = dict(zip(margins, palette, strict=False))
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    height = 0.75 + 2.65 * lines
    with picture(path, 7.6, height, title, subtitle) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        every = list(grid.flat)
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, fixed, by_margin) in zip(every, panels, strict=False):
            for margin, by_scale in sorted(by_margin.items()):
                scales = sorted(by_scale)
                values = np.array([by_scale[scale] for scale in scales])
                means, low, high = values.mean(axis=1), values.min(axis=1), values.max(axis=1)
                axes.errorbar(
                    scales, means, yerr=(means - low, high - means), color=colors[margin], lw=1.5,
                    marker="o", ms=3.5, capsize=2, label=f"m = {margin:g}",
                )  # fmt: skip
            _mark_scale(axes, fixed, at_top=label_at_top)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title(name, fontsize=10, loc="left")
            axes.grid(True, which="major", color=PALE, lw=0.7)
            axes.set_xlabel("scale s")
            axes.set_ylabel(y_label)
        every[0].legend(frameon=False, fontsize=8.5, loc="best")
        figure.subplots_adjust(
            left=0.085, right=0.985, top=1 - 0.85 / height, bottom=0.5 / height, hspace=0.42,
            wspace=0.22,
        )  # fmt: skip


def _mark_scale(axes: Axes, fixed: float, *, at_top: bool) -> None:
    axes.axvline(fixed, color=INK, lw=1, ls=":")
    axes.annotate(
        f"√2·ln(C−1) = {fixed:.3g}", (fixed, float(at_top)), xycoords=("data", "axes fraction"),
        xytext=(-2, -4 if at_top else 4), textcoords="offset points", fontsize=8, ha="right",
        va="top" if at_top else "bottom", rotation=90,
    )  # fmt: skip
