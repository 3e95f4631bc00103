"""Turns the results in benchmarks/results into docs/benchmarks.md and charts in docs/images.

    python -m benchmarks.report                                # make bench-report
    python -m benchmarks.report --bench FILE                   # after make bench

``--bench`` takes pytest-benchmark's JSON and first condenses it into benchmarks/results. The same
results give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.document import IMAGES, Report, Result
from benchmarks.sections import SECTIONS

DOCS = harness.ROOT / "docs"
HEAD = """\
# Benchmarks

Written by `make bench-report` from the files in [benchmarks/results](../benchmarks/results); don't
edit. Contenders and rules are in [benchmarks/README.md](../benchmarks/README.md). In short:

- Each contender's loss and gradients are compared with fp64 before it is timed; a wrong result has
  no time. "Error" is the largest relative error of loss, dx and dW.
- Times are medians of rounds that are interleaved in one process.
- "Memory" is the peak above the inputs and the gradient of the weights, in MiB.
- "Floor" is, on a CPU, the time of the bare matrix products of these sizes, measured in the same
  rounds: three for forward + backward, one for forward. Against peers they go by the quickest of
  torch's routes: whole or in blocks, rows or classes first, oneDNN or MKL; elsewhere by torch.mm.
  On a GPU the floor is the cost model's.
- \\* is a softmax cross-entropy without a margin, on normalised inputs times the scale: a lower
  bound of what it would need for the loss.
"""


class ReportError(RuntimeError):
    """A result can't be read, or isn't of a known kind."""


def load(folder: Path) -> list[Result]:
    """Read every result in a folder; of files that measured the same, the newest alone.

    Raises:
        ReportError: a file isn't JSON, or not of a kind that is known here.
    """
    newest: dict[tuple[Any, ...], Result] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = Result(path.stem, json.loads(path.read_text(encoding="utf-8")))
            identity = result.identity
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{path} is not a result of these benchmarks: {error!r}") from error
        if result.kind not in SECTIONS:
            raise ReportError(f"{path}: {result.kind!r} is not one of {sorted(SECTIONS)}")
        if result.data.get("dry_run"):
            raise ReportError(f"{path} is from a dry run, whose figures mean nothing")
        other = newest.get(identity)
        if other is not None:
            older, result = sorted((other, result), key=lambda one: one.environment["date"])
            harness.progress(f"{older.stem}.json is left out for the newer {result.stem}.json")
        newest[identity] = result
    return sorted(newest.values(), key=lambda one: (one.device, one.stem))


def build(results: Sequence[Result]) -> Report:
    """Write the document, one part per device, and plan its charts.

    Raises:
        ReportError: a result lacks something.
    """
    report = Report()
    report.add(HEAD.rstrip("\n"))
    for device in dict.fromkeys(result.device for result in results):
        report.add(f"## {device}")
        for kind, section in SECTIONS.items():
            chosen = [one for one in results if one.device == device and one.kind == kind]
            if not chosen:
                continue
            try:
                section(report, chosen)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                names = ", ".join(f"{one.stem}.json" for one in chosen)
                raise ReportError(
                    f"{names} can't be reported ({error!r}): measure again, or remove the file"
                ) from error
    return report


def condense(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of pytest-benchmark's JSON what the report needs.

    Raises:
        ReportError: it holds no case of benchmarks/test_bench.py, or isn't pytest-benchmark's.
    """
    rows, environment = [], None
    try:
        for case in measured["benchmarks"]:
            about, stats = case["extra_info"], case["stats"]
            if "contender" not in about:
                continue
            if environment is None:
                environment = about["environment"]
                environment["device"]  # names the file of the results
            row = {key: value for key, value in about.items() if key != "environment"}
            row |= {f"{key}_s": stats[key] for key in ("median", "min", "max")}
            rows.append(row | {"rounds": stats["rounds"]})
    except (AttributeError, KeyError, TypeError) as error:
        raise ReportError(f"not what `make bench` writes ({error!r}): run it again") from error
    if environment is None:
        raise ReportError("no case of benchmarks/test_bench.py: run `make bench` without a filter")
    return {
        "benchmark": "shapes, forward and forward + backward",
        "environment": environment,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS, metavar="DIR")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="pytest-benchmark's JSON")
    settings = parser.parse_args(arguments)
    try:
        if settings.bench is not None:
            try:
                condensed = condense(json.loads(settings.bench.read_text(encoding="utf-8")))
            except (ReportError, ValueError) as error:
                raise ReportError(f"{settings.bench}: {error}") from error
            device = harness.slug(condensed["environment"]["device"])
            harness.write_json(settings.results / f"{device}-shapes.json", condensed)
        results = load(settings.results)
        if not results:
            raise ReportError(f"{settings.results} holds no results")
        report = build(results)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, draw in report.charts.items():
        draw(settings.docs / IMAGES / name)
    path = settings.docs / "benchmarks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.text(), encoding="utf-8")
    harness.progress(f"wrote {path} and {len(report.charts)} charts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
