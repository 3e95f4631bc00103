"""How time and memory of forward + backward grow with the classes C and the batch rows N, on a CPU.

    python -m benchmarks.scaling --save                        # to benchmarks/results
    python -m benchmarks.scaling --json FILE --resume          # go on where a run was interrupted

Time of this package, of careful eager code and of the three bare products: gated, interleaved,
medians. Peak memory of each by a process of its own. Where the eager code would need more than 60 %
of the machine's memory, it isn't run, and its memory is given by formula and marked so. The slope
is that of the fitted line of log time over log size, over the larger half of the sizes. The file is
written after every point.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks import baselines, harness, memory
from benchmarks.harness import MIB

CLASSES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
ROWS = (16, 32, 64, 128, 256, 512, 1024)
TIMED = ("ours", "careful")
MEMORY_SHARE = 0.6  # of the machine's memory that the eager code may take
ROUNDS = (5, 25)  # at least and at most
SECONDS = 6.0  # of timing a point, where that many rounds fit
# What must agree between the parts of a resumed run.
SAME = ("device", "threads", "torch", "fused_margin", "git_revision")


@dataclasses.dataclass(frozen=True)
class Point:
    """One problem, on the way along "classes" or "rows"."""

    sweep: str
    n: int
    c: int
    d: int


_size = harness.whole_number(2)  # of one row, class or column there is nothing to compare


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_size(word) for word in text.split(",")}))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=_size, default=256, help="rows while C grows (%(default)s)")
    parser.add_argument(
        "--c", type=_size, default=100_000, help="classes while N grows (%(default)s)"
    )
    parser.add_argument("--d", type=_size, default=128, help="embedding size (%(default)s)")
    parser.add_argument(
        "--classes",
        type=_sizes,
        default=CLASSES,
        help="C, separated by commas (1,000 to 1 million)",
    )
    parser.add_argument(
        "--rows", type=_sizes, default=ROWS, help="N, separated by commas (16 to 1024)"
    )
    parser.add_argument(
        "--seconds",
        type=harness.real_number(0, 86_400),
        default=SECONDS,
        help="of timing a point (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=harness.thread_count, help="torch's threads (torch's own choice)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--resume", action="store_true", help="skip the points in the file")
    harness.add_output_options(parser)
    settings = parser.parse_args(arguments)
    if settings.resume and settings.json is None and not settings.save:
        parser.error("--resume needs --json FILE or --save, which say where the points are")
    return settings


def points(settings: argparse.Namespace) -> list[Point]:
    """All problems of the study, the cheap ones first."""
    along_classes = [Point("classes", settings.n, c, settings.d) for c in settings.classes]
    along_rows = [Point("rows", n, settings.c, settings.d) for n in settings.rows]
    return along_rows + along_classes


def fits(point: Point) -> bool:
    """Whether the eager code takes at most `MEMORY_SHARE` of the memory."""
    inputs = 4 * 2 * point.c * point.d  # W and its gradient
    needed = inputs + memory.eager_bytes(point.n, point.c, point.d)
    return needed <= MEMORY_SHARE * harness.machine_memory()


def measure(point: Point, seconds: float, *, with_memory: bool) -> dict[str, Any]:
    """Gate, time and take the memory of one point; returns its entry in the JSON file."""
    problem = baselines.make_problem("arcface", point.n, point.c, point.d)
    keys = [key for key in TIMED if key != "careful" or fits(point)]
    contenders, missing = baselines.bind(problem, keys)
    if "careful" not in keys:
        missing["careful"] = f"needs more than {MEMORY_SHARE:.0%} of the memory"
    errors, refused = harness.admit(harness.Gate(problem), contenders)
    steps: dict[str, harness.Steps] = {key: contenders[key] for key in errors}
    steps["products"] = baselines.BareProducts(problem)
    once = harness.interleave(list(steps.values()), rounds=1, warmups=1)
    one_round = sum(samples[0] for samples in once)
    rounds = min(max(int(seconds / one_round), ROUNDS[0]), ROUNDS[1])
    samples = harness.interleave(list(steps.values()), rounds, warmups=0)
    results = {
        key: {
            "name": step.name,
            **harness.summary(taken),
            "relative_errors": errors.get(key),
        }
        for (key, step), taken in zip(steps.items(), samples, strict=True)
    }
    del problem, contenders, steps
    peaks: dict[str, dict[str, Any]] = {}
    if with_memory:
        for key in errors:
            peaks[key] = memory.measure_apart(point.n, point.c, point.d, key)
        by_formula = memory.eager_bytes(point.n, point.c, point.d) / MIB
        peaks.setdefault("careful", {})["by_formula_mib"] = by_formula
    return {
        **dataclasses.asdict(point),
        "rounds": rounds,
        "results": results,
        "memory": peaks,
        "without_time": missing | refused,
    }


def larger_half(sizes: Sequence[int]) -> list[int]:
    """The sizes above the geometric middle of their range."""
    middle = math.sqrt(min(sizes, default=1) * max(sizes, default=1))
    return [size for size in sizes if size >= middle]


def slope(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Exponent of growth over the larger half of the sizes; None if there are fewer than three.

    By a least-squares line in logarithms.
    """
    half = larger_half(sizes)
    upper = [(size, value) for size, value in zip(sizes, values, strict=True) if size in half]
    if len(upper) < 3:
        return None
    logs = [(math.log(size), math.log(value)) for size, value in upper]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def slopes(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """`slope` of the median time, for each sweep and each contender."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for entry in entries:
        size = entry["c"] if entry["sweep"] == "classes" else entry["n"]
        for key, row in entry["results"].items():
            series.setdefault((entry["sweep"], key), []).append((size, row["median_s"]))
    result: dict[str, dict[str, float | None]] = {}
    for (sweep, key), pairs in series.items():
        sizes, values = zip(*sorted(pairs), strict=True)
        result.setdefault(sweep, {})[key] = slope(sizes, values)
    return result


class ResumeError(RuntimeError):
    """The file has no points, or they are from another machine or another version."""


def _point(entry: dict[str, Any]) -> Point:
    """What an entry of the file is of."""
    return Point(*(entry[field.name] for field in dataclasses.fields(Point)))


def _load(settings: argparse.Namespace, environment: dict[str, Any]) -> list[dict[str, Any]]:
    path = harness.output_path(settings, "scaling")
    if not settings.resume or path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, entries = dict(content["environment"]), list(content["points"])
        for entry in entries:
            _point(entry)
        slopes(entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(
            f"{path} holds no points of this benchmark ({error!r}): start anew without --resume, or"
            " name another file"
        ) from error
    different = [key for key in SAME if before.get(key) != environment[key]]
    if different:
        raise ResumeError(
            f"{path} was measured with another "
            + ", ".join(f"{key} ({before.get(key)}, now {environment[key]})" for key in different)
            + ": start anew without --resume"
        )
    return entries


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Measure what isn't in the file yet; returns the whole result.

    Raises:
        ResumeError: the file can't be read, or its points don't go with this machine and version.
        harness.WrongResultError: this package's own result is wrong.
    """
    environment = harness.environment()
    entries = _load(settings, environment)
    plan = points(settings)
    done = set(map(_point, entries))
    result: dict[str, Any] = {
        "benchmark": "scaling, ArcFace, forward + backward, fp32",
        "environment": environment,
        "points": entries,
        "slopes": slopes(entries),
    }
    for index, point in enumerate(plan, start=1):
        label = f"[{index}/{len(plan)}] N={point.n}, C={point.c:,}, D={point.d}"
        if point in done:
            harness.progress(f"{label}: in the file already")
            continue
        harness.progress(label)
        start = time.perf_counter()
        entries.append(measure(point, settings.seconds, with_memory=not settings.no_memory))
        result["slopes"] = slopes(entries)
        harness.save(settings, result, "scaling")
        harness.progress(f"    took {time.perf_counter() - start:.0f} s")
    return result


def table(result: dict[str, Any]) -> str:
    """Format the result for people."""
    titles = ("N", "C", "ours ms", "eager ms", "products", "ours MiB", "eager MiB")
    widths = (6, 10, 10, 10, 10, 10, 10)
    header = " ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    lines = [result["benchmark"], header]
    for entry in sorted(
        result["points"], key=lambda entry: (entry["sweep"], entry["c"], entry["n"])
    ):
        times = [
            f"{1e3 * entry['results'][key]['median_s']:10.1f}"
            if key in entry["results"]
            else " " * 10
            for key in ("ours", "careful", "products")
        ]
        peaks = [
            f"{entry['memory'][key]['above_x_w_and_d_w_mib']:10.0f}"
            if "above_x_w_and_d_w_mib" in entry["memory"].get(key, {})
            else " " * 10
            for key in TIMED
        ]
        lines.append(f"{entry['n']:6} {entry['c']:10,} {' '.join(times + peaks)}")
    for sweep, by_key in result["slopes"].items():
        stated = ", ".join(
            f"{key} {value:.2f}" for key, value in by_key.items() if value is not None
        )
        lines.append(
            f"time grows with the {sweep}, larger half, as their power of: {stated or '-'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    settings = _parse(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        result = run(settings)
    except (ResumeError, harness.WrongResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last point written", file=sys.stderr)
        return 130
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
