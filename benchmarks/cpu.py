"""Speed and peak memory of forward + backward on a CPU, against every rival, interleaved.

    python -m benchmarks.cpu                                   # N=256, C=100,000, D=512, fp32
    python -m benchmarks.cpu --n 64 --save                     # to benchmarks/results
    python -m benchmarks.cpu --c 1000 --d 128 --processes 12   # medians over 12 processes

ArcFace, the same data for everyone; each contender passes the gate before anything is timed. A
rival that fails it, isn't installed or needs another device is listed with the reason and gets no
time; if this package fails it, the run ends. Rounds are interleaved and medians compared. Peak
memory is taken afterwards, of one contender per process.

Where matrices have about a megabyte a process is one sample: whether the C library gives them back
to the system in every step, to be touched as new pages in the next, depends on what else lies in
its heap. --processes repeats all of it in processes one after the other, and takes medians of
theirs (of errors the largest); "least" and "most" are the extremes of their ratios. A contender
that one of them has no time for gets none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import baselines, harness, memory, products

CLASSES, DIM = 100_000, 512  # of the runs whose file is named after N alone
# Who runs in bf16 too, next to the fp32 contenders: contender, mode, words.
IN_BF16 = {
    "ours_bf16": ("ours", "bf16", "bf16 embeddings"),
    "ours_autocast": ("ours", "autocast", "autocast"),
    "careful_bf16": ("careful", "bf16", "bf16 embeddings"),
}
# One row a chunk where C is large: it is timed once, as part of the search.
ONCE = "lce_default"
# The products by torch's quickest route, fp32 and bf16: what the times are held against.
FLOOR, FLOOR_BF16 = "quickest", "quickest_bf16"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = harness.whole_number(2)  # of one row or column there is nothing to compare
    parser.add_argument("--n", type=size, default=256, help="batch rows (%(default)s)")
    parser.add_argument("--c", type=size, default=CLASSES, help="classes (%(default)s)")
    parser.add_argument("--d", type=size, default=DIM, help="embedding size (%(default)s)")
    rounds = harness.whole_number(1)
    parser.add_argument("--rounds", type=rounds, default=9, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--threads", type=harness.thread_count, help="torch's threads (torch's own choice)"
    )
    parser.add_argument(
        "--processes", type=rounds, default=1, metavar="K",
        help="repeat it in so many processes (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    harness.add_output_options(parser)
    return parser.parse_args(arguments)


def file_stem(shape: dict[str, int]) -> str:
    """What a result's file is named after: n64, or n64-c5000-d128 if C and D aren't the usual."""
    stem = f"n{shape['n']}"
    if (shape["c"], shape["d"]) != (CLASSES, DIM):
        stem += f"-c{shape['c']}-d{shape['d']}"
    return stem


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Gate, time, then take peak memory; returns what goes into the JSON file."""
    environment = harness.environment()
    problem = baselines.make_problem("arcface", settings.n, settings.c, settings.d)
    keys = [key for key in baselines.EVERYONE if key != ONCE]
    if settings.no_compile:
        keys.remove("compiled")
    harness.progress("binding, with a search for the best chunk of F.linear_cross_entropy")
    contenders, skipped = baselines.bind(problem, keys)
    gate = harness.Gate(problem)
    errors, refused = harness.admit(gate, contenders)
    for key, (who, mode, words) in IN_BF16.items():
        bind = baselines.ours if who == "ours" else baselines.careful
        contenders[key] = bind(problem.in_mode(mode))
        contenders[key].name += f", {words}"
        bf16_errors, bf16_refused = harness.admit(gate.in_mode(mode), {key: contenders[key]})
        errors |= bf16_errors
        refused |= bf16_refused
    del gate

    details = {key: contender.details for key, contender in contenders.items()}
    if "search_s" in details.get("lce_chunked", {}):
        harness.progress("one step of F.linear_cross_entropy with chunks of its own choice")
        own_choice = harness.interleave([baselines.lce_default(problem)], 1, warmups=0)
        details["lce_chunked"]["own_choice_s"] = own_choice[0][0]

    harness.progress("searching for the quickest route of the three products")
    floor, details[FLOOR] = products.quickest(problem)
    floor_bf16, details[FLOOR_BF16] = products.quickest(problem.in_mode("bf16"))
    steps: dict[str, harness.Steps] = {
        **{key: contender for key, contender in contenders.items() if key in errors},
        "products": baselines.BareProducts(problem),
        FLOOR: floor,
        FLOOR_BF16: floor_bf16,
    }
    harness.progress(f"timing: {settings.rounds} rounds of {len(steps)} contenders")
    samples = harness.interleave(list(steps.values()), settings.rounds)
    results: dict[str, dict[str, Any]] = {}
    for (key, step), seconds in zip(steps.items(), samples, strict=True):
        results[key] = {
            "name": step.name,
            **harness.summary(seconds),
            "relative_errors": errors.get(key),
        }
        if key in contenders:
            results[key] |= {"drops_margin": contenders[key].drops_margin, **details[key]}
        elif key in details:
            results[key]["search_s"] = details[key]
    if not settings.no_memory:
        for key in errors:
            harness.progress(f"peak memory: {contenders[key].name}")
            results[key] |= memory.measure_apart(
                settings.n,
                settings.c,
                settings.d,
                *(IN_BF16[key][:2] if key in IN_BF16 else (key, "fp32")),
                chunk=details[key].get("chunk_rows"),
            )
    median = {key: result["median_s"] for key, result in results.items()}
    ratios = {
        f"{key}_over_ours": median[key] / median["ours"]
        for key in errors
        if not (key.startswith("ours") or key in IN_BF16)
    }
    ratios["ours_over_products"] = median["ours"] / median["products"]
    ratios[f"ours_over_{FLOOR}"] = median["ours"] / median[FLOOR]
    ratios[f"ours_bf16_over_{FLOOR_BF16}"] = median["ours_bf16"] / median[FLOOR_BF16]
    ratios |= {
        f"ours_over_{key}": median["ours"] / median[key]
        for key in IN_BF16
        if key.startswith("ours")
    }
    if "careful_bf16" in median:
        ratios["careful_bf16_over_ours_bf16"] = median["careful_bf16"] / median["ours_bf16"]
    return {
        "benchmark": "cpu, ArcFace, forward + backward",
        "shape": {"n": settings.n, "c": settings.c, "d": settings.d},
        "rounds": settings.rounds,
        "environment": environment,
        "results": results,
        "without_time": skipped | refused,
        "ratios_of_medians": ratios,
    }


def measure_repeatedly(settings: argparse.Namespace) -> dict[str, Any]:
    """`measure` in processes one after the other, if there is to be more than one.

    Raises:
        WrongResultError: this package's own result was wrong in one of them.
    """
    if settings.processes == 1:
        return measure(settings)
    options = {name: getattr(settings, name) for name in ("n", "c", "d", "rounds", "threads")}
    options |= {"no-compile": settings.no_compile or None, "no-memory": settings.no_memory or None}
    found = []
    for index in range(settings.processes):
        harness.progress(f"process {index + 1} of {settings.processes}")
        try:
            found.append(harness.apart("cpu", options))
        except harness.FailedError as error:
            what = error.last_line.removeprefix("error: ") or error
            raise harness.WrongResultError(f"in process {index + 1}: {what}") from error
    return over_processes(found)


def over_processes(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several processes as one: medians of their medians and of their ratios."""
    first = found[0]
    everywhere = set.intersection(*(set(one["results"]) for one in found))
    results: dict[str, dict[str, Any]] = {}
    for key, row in first["results"].items():
        if key in everywhere:
            rows = [one["results"][key] for one in found]
            medians = [one["median_s"] for one in rows]
            results[key] = {name: row[name] for name in row if name != "seconds"} | {
                **{
                    name: statistics.median(one[name] for one in rows)
                    for name in row
                    if name.endswith("_mib")
                },
                "relative_errors": _largest([one["relative_errors"] for one in rows]),
                "median_s": statistics.median(medians),
                "min_s": min(one["min_s"] for one in rows),
                "max_s": max(one["max_s"] for one in rows),
                "medians_s": medians,
            }
    ratios = {
        name: [one["ratios_of_medians"][name] for one in found]
        for name in first["ratios_of_medians"]
        if all(name in one["ratios_of_medians"] for one in found)
    }
    without_time: dict[str, str] = {}
    for one in reversed(found):
        without_time |= one["without_time"]
    return first | {
        "processes": len(found),
        "without_time": without_time,
        "results": results,
        "ratios_of_medians": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios_by_process": ratios,
    }


def _largest(errors: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """The largest error of each part; None of what has no errors."""
    known = [one for one in errors if one is not None]
    return {part: max(one[part] for one in known) for part in known[0]} if known else None


def _range_over_ours(result: dict[str, Any], row: dict[str, Any]) -> tuple[float, float, float]:
    """How many times ours in fp32, median and extremes over processes."""
    ours = result["results"]["ours"]
    if "medians_s" not in ours:
        return (row["median_s"] / ours["median_s"],) * 3
    pairs = zip(row["medians_s"], ours["medians_s"], strict=True)
    each = [mine / of_ours for mine, of_ours in pairs]
    return statistics.median(each), min(each), max(each)


def table(result: dict[str, Any]) -> str:
    """Format the result for people."""
    shape, environment = result["shape"], result["environment"]
    processes = result.get("processes", 1)
    heads = "" if processes == 1 else f" {'least':>6} {'most':>6}"
    lines = [
        f"{result['benchmark']}: N={shape['n']}, C={shape['c']:,}, D={shape['d']}",
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        f"{'':40} {'median ms':>10} {'min ms':>10} {'over ours':>10}{heads} {'peak MiB':>10}",
    ]
    for row in sorted(result["results"].values(), key=lambda row: row["median_s"]):
        peak = row.get("above_x_w_and_d_w_mib")
        over, least, most = _range_over_ours(result, row)
        extremes = "" if processes == 1 else f" {least:6.2f} {most:6.2f}"
        lines.append(
            f"{row['name'] + (' *' if row.get('drops_margin') else ''):40}"
            f" {1e3 * row['median_s']:10.1f} {1e3 * row['min_s']:10.1f}"
            f" {over:10.2f}{extremes} {'' if peak is None else f'{peak:.0f}':>10}"
        )
    ratios = result["ratios_of_medians"]
    for name, each in result.get("ratios_by_process", {}).items():
        if name.startswith("careful"):
            inverse = sorted(1.0 / one for one in each)
            lines.append(
                f"ours over careful, {'bf16' if 'bf16' in name else 'fp32'}, over"
                f" {len(each)} processes: median {statistics.median(inverse):.2f}, from"
                f" {inverse[0]:.2f} to {inverse[-1]:.2f}"
            )
    lines.append("peak: memory above x, W and dW; *: computes no margin, a lower bound")
    lines.append(
        f"ours over the three products: {ratios['ours_over_products']:.2f}, by the quickest route"
        f" {ratios[f'ours_over_{FLOOR}']:.2f} (bf16 {ratios[f'ours_bf16_over_{FLOOR_BF16}']:.2f});"
        f" ours in fp32 over ours with bf16 embeddings: {ratios['ours_over_ours_bf16']:.2f}"
    )
    lines += [f"no time for {key}: {reason}" for key, reason in result["without_time"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    settings = _parse(arguments)
    return harness.carry_out(
        settings, measure_repeatedly, table, lambda result: file_stem(result["shape"])
    )


if __name__ == "__main__":
    sys.exit(main())
