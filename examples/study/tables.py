"""Tables of results, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import mean_and_interval


def number(value: float | None, decimals: int = 2) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def lowest_to_highest(values: Sequence[float | None], decimals: int = 2) -> str:
    """One number if all look alike, a dash if none is known."""
    known = [value for value in values if value is not None]
    low, high = (number(found(known, default=None), decimals) for found in (min, max))
    return low if low == high else f"{low} to {high}"


def spread(values: Sequence[float], decimals: int = 2) -> str:
    """Mean ± sample standard deviation, or the value if it is the only one."""
    mean, deviation, _ = mean_and_interval(values)
    return plus_minus(mean, deviation, decimals)


def plus_minus(mean: float | None, deviation: float | None, decimals: int = 2) -> str:
    text = number(mean, decimals)
    return text if deviation is None else f"{text} ± {number(deviation, decimals)}"


def missing_runs(runs: Sequence[dict[str, Any]], name: str) -> list[str]:
    """A line that says so, if not every line of a table, by `name`, is over the same seeds."""
    seeds: dict[Any, set[int]] = {}
    for run in runs:
        seeds.setdefault(run[name], set()).add(run["seed"])
    every = set().union(*seeds.values())
    if all(found == every for found in seeds.values()):
        return []
    return ["some runs are missing: the lines are not of the same seeds"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out as text: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out as Markdown: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])
