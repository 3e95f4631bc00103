"""Peak memory of forward + backward on a CPU above x, W and their gradients' buffers.

    python -m benchmarks.memory                                # N=256, C=1,000,000, D=128
    python -m benchmarks.memory --limit-mib 64                 # exit status 1 if it takes more

The peak resident size is the kernel's own (VmHWM), reset after the inputs are touched and a warm-up
at 1,000 classes has loaded the libraries and started the threads. Linux only.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, harness

MIB = 1 << 20
WARM_UP_CLASSES = 1_000
STEPS = 2


def _status_bytes(field: str) -> int:
    match = re.search(
        rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def reset_peak() -> int:
    """Set the peak resident size to the present one, and return it in bytes.

    Raises:
        RuntimeError: the system has no such reset.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(
            "the peak resident size is reset through Linux's /proc/self/clear_refs, which could"
            f" not be written: {error}"
        ) from error
    return _status_bytes("VmHWM")


def eager_bytes(num_rows: int, num_classes: int, dim: int) -> int:
    """What the careful eager code needs in fp32 above x, W and d_w, by a count of its tensors.

    Its peak less d_w, C x D, at the worse of two moments of the backward: the softmax's, four N x C
    and the normalised W while d_w doesn't exist yet; the normalisation's, five C x D with d_w.
    """
    return 4 * 4 * num_classes * max(num_rows, dim)


def measure(num_rows: int, num_classes: int, dim: int) -> dict[str, Any]:
    """Grow the peak by two steps; returns what goes into the JSON file."""
    environment = harness.environment()
    warm_up = baselines.ours(baselines.make_problem("arcface", num_rows, WARM_UP_CLASSES, dim))
    problem = baselines.make_problem("arcface", num_rows, num_classes, dim)  # writes every page
    contender = baselines.ours(problem)
    warm_up.step()
    warm_up.clear()
    before = reset_peak()
    for _ in range(STEPS):
        contender.clear()
        contender.step()
    growth = _status_bytes("VmHWM") - before
    d_w = problem.w.numel() * problem.w.element_size()
    return {
        "benchmark": "memory, ArcFace, forward + backward, fp32",
        "shape": {"n": num_rows, "c": num_classes, "d": dim},
        "steps": STEPS,
        "environment": environment,
        "resident_before_mib": before / MIB,
        "peak_growth_mib": growth / MIB,
        "d_w_mib": d_w / MIB,
        "above_x_w_and_d_w_mib": (growth - d_w) / MIB,
        "eager_by_formula_mib": eager_bytes(num_rows, num_classes, dim) / MIB,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=256, help="batch rows (%(default)s)")
    parser.add_argument("--c", type=int, default=1_000_000, help="classes (%(default)s)")
    parser.add_argument("--d", type=int, default=128, help="embedding size (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--limit-mib", type=float, help="exit with status 1 above this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    settings = parser.parse_args(arguments)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    result = measure(settings.n, settings.c, settings.d)
    if settings.json is not None:
        harness.write_json(settings.json, result)
    above = result["above_x_w_and_d_w_mib"]
    print(
        f"{result['benchmark']}: N={settings.n}, C={settings.c:,}, D={settings.d}\n"
        f"above x, W and dW: {above:.1f} MiB (growth of the peak {result['peak_growth_mib']:.1f},"
        f" of which dW {result['d_w_mib']:.1f})\n"
        f"eager code, by formula, not measured: {result['eager_by_formula_mib']:,.0f} MiB"
    )
    if settings.limit_mib is not None and above > settings.limit_mib:
        print(f"above the limit of {settings.limit_mib:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
