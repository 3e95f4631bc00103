"""Pictures show every line they are given, and nothing that hides another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from study import figures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_digits_of_classes_that_coincide_are_in_a_legend(
    drawn: list[Figure], tmp_path: Path
) -> None:
    sphere = {"points": [[1.0, 0.0, 0.0]], "labels": [3], "weights": [[0.0, 0.0, 1.0]] * 10}
    figures.spheres(tmp_path / "a.png", "", [("one", sphere), ("two", sphere)])
    (figure,) = drawn
    assert legend_texts(figure) == [str(digit) for digit in range(10)]
    assert all(not axes.texts for axes in figure.axes)


def test_every_row_of_a_class_points_in_the_colour_of_its_class(
    drawn: list[Figure], tmp_path: Path
) -> None:
    weights = np.eye(3)[np.arange(30) % 3].tolist()  # three rows for each of ten classes
    sphere = {"points": [[1.0, 0.0, 0.0]], "labels": [3], "weights": weights}
    figures.spheres(tmp_path / "a.png", "", [("sub-centres", sphere)])
    (figure,) = drawn
    (axes,) = figure.axes
    (legend,) = figure.legends
    keys = [line.get_color() for line in legend.get_lines()]
    lines = [line.get_color() for line in axes.get_lines()]
    assert lines == [key for key in keys for _ in range(3)]


def test_every_loss_has_a_curve_and_a_name_once(drawn: list[Figure], tmp_path: Path) -> None:
    points = [(0.01, 0.5), (1.0, 1.0)]
    plain = ("ArcFace", points, figures.VERMILION, False)
    dotted = ("ArcFace + RegularFace", points, figures.VERMILION, True)
    figures.roc_curves(tmp_path / "a.png", "", [("faces", [plain, dotted]), ("more", [plain])])
    (figure,) = drawn
    assert legend_texts(figure) == ["ArcFace", "ArcFace + RegularFace"]
    styles = [[line.get_linestyle() for line in axes.get_lines()] for axes in figure.axes]
    assert styles == [["-", ":"], ["-"]]


def test_accuracies_are_dots_with_their_intervals(drawn: list[Figure], tmp_path: Path) -> None:
    dots: Sequence[Any] = [("one", 97.0, 1.0, 97.5, figures.BLUE), ("two", 98.0, 0.0, None, "red")]
    figures.accuracy_dots(tmp_path / "a.png", "", "", dots, "accuracy, %")
    (figure,) = drawn
    (axes,) = figure.axes
    assert not axes.patches  # bars on a cut axis would show lengths that mean nothing
    low, high = axes.get_xlim()
    assert low < 96.0
    assert high > 98.0
    assert [text.get_text() for text in axes.texts] == ["97.00", "98.00"]
    diamonds = [line for line in axes.get_lines() if line.get_marker() == "D"]
    marked = np.concatenate([np.ravel(line.get_xdata()) for line in diamonds])  # one for the legend
    assert marked.tolist() == [97.5]
