"""Speed of forward + backward on a CPU, against every rival, in one process.

    python -m benchmarks.cpu                                   # N=256, C=100,000, D=512, fp32
    python -m benchmarks.cpu --threads 2 --json result.json

ArcFace, the same data for everyone; each contender passes the gate before anything is timed, and
one that fails it ends the run. Rounds are interleaved and medians compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, harness


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=256, help="batch rows (%(default)s)")
    parser.add_argument("--c", type=int, default=100_000, help="classes (%(default)s)")
    parser.add_argument("--d", type=int, default=512, help="embedding size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    settings = parser.parse_args(arguments)
    if settings.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {settings.rounds}")
    return settings


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Gate, then time; returns what goes into the JSON file."""
    environment = harness.environment()
    problem = baselines.make_problem("arcface", settings.n, settings.c, settings.d)
    problem_bf16 = problem.to(torch.bfloat16)

    contenders = {
        key: make(problem)
        for key, make in baselines.CONTENDERS.items()
        if not (key == "compiled" and settings.no_compile)
    }
    ours_bf16 = baselines.ours(problem_bf16)
    ours_bf16.name += ", bf16 embeddings"
    errors: dict[str, dict[str, float]] = {}
    gate = harness.Gate(problem)
    for key, contender in contenders.items():
        harness.progress(f"gate: {contender.name}")
        errors[key] = gate.check(contender)
    harness.progress(f"gate: {ours_bf16.name}")
    errors["ours_bf16"] = harness.Gate(problem_bf16).check(ours_bf16)
    del gate

    steps: dict[str, harness.Steps] = {
        **contenders,
        "ours_bf16": ours_bf16,
        "products": baselines.BareProducts(problem),
    }
    harness.progress(f"timing: {settings.rounds} rounds of {len(steps)} contenders")
    samples = harness.interleave(list(steps.values()), settings.rounds)
    results = {
        key: {"name": step.name, **harness.summary(seconds), "relative_errors": errors.get(key)}
        for (key, step), seconds in zip(steps.items(), samples, strict=True)
    }
    median = {key: result["median_s"] for key, result in results.items()}
    ratios = {
        f"{key}_over_ours": median[key] / median["ours"] for key in contenders if key != "ours"
    }
    ratios["ours_over_products"] = median["ours"] / median["products"]
    ratios["ours_over_ours_bf16"] = median["ours"] / median["ours_bf16"]
    return {
        "benchmark": "cpu, ArcFace, forward + backward",
        "shape": {"n": settings.n, "c": settings.c, "d": settings.d},
        "rounds": settings.rounds,
        "environment": environment,
        "results": results,
        "ratios_of_medians": ratios,
    }


def table(result: dict[str, Any]) -> str:
    """Format the result for people."""
    shape, environment = result["shape"], result["environment"]
    ours = result["results"]["ours"]["median_s"]
    lines = [
        f"{result['benchmark']}: N={shape['n']}, C={shape['c']:,}, D={shape['d']}",
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        f"{'':32} {'median ms':>10} {'min ms':>10} {'over ours':>10}",
    ]
    lines.extend(
        f"{row['name']:32} {1e3 * row['median_s']:10.1f} {1e3 * row['min_s']:10.1f}"
        f" {row['median_s'] / ours:10.2f}"
        for row in sorted(result["results"].values(), key=lambda row: row["median_s"])
    )
    ratios = result["ratios_of_medians"]
    lines.append(
        f"ours over the three products: {ratios['ours_over_products']:.2f};"
        f" ours in fp32 over ours with bf16 embeddings: {ratios['ours_over_ours_bf16']:.2f}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    settings = _parse(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    result = measure(settings)
    if settings.json is not None:
        harness.write_json(settings.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
