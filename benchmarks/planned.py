"""The pictures of docs/scaling.md: memory of a GPU and time of a step, by the planner's formulas.

    python -m benchmarks.planned                        # to docs/images
    python -m benchmarks.planned --out DIR

Nothing is measured. D, rows and rates are those of the table there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import charts, harness
from fused_margin import plan

DIM = 512
GPUS = tuple(1 << power for power in range(11))
CLASSES = {
    10**5: ("100,000 classes", charts.GREY, "^"),
    10**7: ("10 million", charts.VERMILION, "s"),
    10**9: ("1 billion", charts.BLUE, "o"),
}
SUBTITLE = "by formula: bf16 embeddings, 128 rows a GPU, SGD with momentum, an H100's rates"


def lines(what: str) -> list[charts.Line]:
    """``"memory"`` of a GPU in GB, or ``"time"`` of a step in ms, by the number of GPUs."""
    found = []
    for count, (name, color, marker) in CLASSES.items():
        plans = [plan.plan(plan.Setting(count, DIM, gpus)) for gpus in GPUS]
        if what == "memory":
            values = [sum(one.memory.values()) / 1e9 for one in plans]
        else:
            values = [1e3 * sum(one.seconds.values()) for one in plans]
        found.append(charts.Line(name, GPUS, values, [False] * len(GPUS), color, marker))
    return found


def draw(folder: Path) -> list[Path]:
    """Write both pictures; returns their files."""
    paths = []
    for what, label in (("memory", "memory of a GPU, GB"), ("time", "time of a step, ms")):
        path = folder / f"scaling-{what}.png"
        title = f"{label[0].upper()}{label[1:]}, of classes × {DIM} that are split over GPUs"
        charts.growth(path, title, SUBTITLE, "GPUs", label, lines(what))
        paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=harness.ROOT / "docs" / "images")
    for path in draw(parser.parse_args(arguments).out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
