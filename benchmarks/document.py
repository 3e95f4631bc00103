"""What the report is made of: results as they were written, and a document of tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGES = "images"  # inside of the folder of the document
SHORT = {
    "ours": "fused_margin",
    "careful": "careful eager",
    "compiled": "torch.compile",
    "usual": "pytorch-metric-learning",
    "lce": "linear_cross_entropy \\*",
    "lce_default": "linear_cross_entropy, its own chunks \\*",
    "lce_chunked": "linear_cross_entropy, best chunk \\*",
    "cce": "Cut Cross-Entropy \\*",
    "cce_exact": "Cut Cross-Entropy, unfiltered \\*",
    "liger": "Liger \\*",
    "liger_fp32": "Liger, fp32 sums \\*",
    "products": "three bare products",
}


@dataclass(frozen=True)
class Result:
    """One file of results."""

    stem: str
    data: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Device, versions, date, revision."""
        if self.kind == "gpu":
            return self.data["steps"]["environment"]
        return self.data["environment"]

    @property
    def kind(self) -> str:
        """The first word of its title: cpu, memory, scaling, shapes or gpu."""
        return self.data["benchmark"].partition(",")[0]

    @property
    def device(self) -> str:
        """What it ran on, with the number of threads of a CPU."""
        environment = self.environment
        name = environment.get("device") or environment["cpu"]
        return name if "gpu" in environment else f"{name}, {environment['threads']} threads"

    @property
    def identity(self) -> tuple[Any, ...]:
        """Files that share it measured the same; the newest counts."""
        shape = tuple(self.data.get("shape", {}).values())
        return self.kind, self.device, self.data["benchmark"], shape, self.data.get("contender")


@dataclass
class Report:
    """The document's lines, and how to draw each chart, by file name."""

    lines: list[str] = field(default_factory=list)
    charts: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def add(self, *lines: str) -> None:
        """Append lines, with a blank one after them."""
        self.lines += [*lines, ""]

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
        """Append a table, all but the first ``words`` columns of which are numbers."""
        rule = ["---"] * words + ["--:"] * (len(header) - words)
        self.add(*(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)))

    def chart(self, name: str, alternative: str, draw: Callable[[Path], None]) -> None:
        """Append an image that is drawn into ``IMAGES/name``."""
        self.charts[name] = draw
        self.add(f"![{alternative}]({IMAGES}/{name})")

    def text(self) -> str:
        """The whole document."""
        return "\n".join(self.lines).rstrip("\n") + "\n"


def number(value: float | None) -> str:
    """Three digits, as few as are known to mean something; a dash for what there is not."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds, written in ms."""
    return number(None if seconds is None else 1e3 * seconds)


def ratio(value: float | None) -> str:
    """A ratio with two decimals."""
    return "–" if value is None else f"{value:.2f}"


def largest_error(row: Mapping[str, Any]) -> str:
    """The largest relative error of a row, with one digit."""
    errors = row.get("relative_errors")
    return "–" if not errors else f"{max(errors.values()):.0e}"


def title_of(shape: Mapping[str, int]) -> str:
    """N, C and D in words."""
    return f"N = {shape['n']}, C = {shape['c']:,}, D = {shape['d']}"


def versions(environment: Mapping[str, Any]) -> str:
    """The versions that matter."""
    return f"torch {environment['torch']}"


def provenance(result: Result, command: str) -> str:
    """The line that says where figures are from."""
    environment = result.environment
    revision = environment["git_revision"]
    at = f"revision {revision[:7]}" if revision else "no revision"
    if environment["git_has_changes"]:
        at += " with changes"
    return (
        f"`{command}` · {environment['date'][:10]} · {at} · fused_margin"
        f" {environment['fused_margin']} · {versions(environment)} · Python"
        f" {environment['python']} · [data](../benchmarks/results/{result.stem}.json)"
    )


def without_time(report: Report, reasons: Mapping[str, str]) -> None:
    """Name those that have no time, together where the reason is the same."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(SHORT[key].removesuffix(" \\*"))
    if by_reason:
        report.add(
            "Without a time: "
            + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
            + "."
        )
