"""Peak memory of forward + backward on a CPU above x, W and W's gradient.

    python -m benchmarks.memory                                # N=256, C=1,000,000, D=128
    python -m benchmarks.memory --limit-mib 64                 # exit status 1 if it takes more
    python -m benchmarks.memory --contender careful --c 100000

The peak resident size is the system's own (VmHWM), reset after the inputs are touched and a warm-up
at 1,000 classes has loaded the libraries and started the threads (torch.compile warms up at the
full size, for which it compiles). Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, harness
from benchmarks.harness import MIB

CLEAR_REFS = Path("/proc/self/clear_refs")
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
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise RuntimeError(
            f"the peak resident size is reset through Linux's {CLEAR_REFS}, which could not be"
            f" written: {error}"
        ) from error
    return _status_bytes("VmHWM")


def eager_bytes(num_rows: int, num_classes: int, dim: int) -> int:
    """What the careful eager code needs in fp32 above x, W and d_w, by a count of its tensors.

    Its peak less d_w, C x D, at the worse of two moments of the backward: the softmax's, four N x C
    and the normalised W while d_w doesn't exist yet; the normalisation's, five C x D with d_w.
    """
    return 4 * 4 * num_classes * max(num_rows, dim)


def measure(
    num_rows: int,
    num_classes: int,
    dim: int,
    contender: str = "ours",
    mode: str = "fp32",
    loss: str = "arcface",
    chunk: int | None = None,
) -> dict[str, Any]:
    """Grow the peak by two steps; returns what goes into the JSON file.

    Args:
        num_rows: N.
        num_classes: C.
        dim: D.
        contender: a key of `baselines.EVERYONE`.
        mode: one of `baselines.MODES`.
        loss: one of `baselines.LOSSES`.
        chunk: rows in a chunk, for lce_chunked; found by a search if None.

    Raises:
        baselines.UnavailableError: the contender can't be had here.
        RuntimeError: the system has no peak that can be reset.
    """
    environment = harness.environment()

    def bind(num_classes: int) -> tuple[baselines.Contender, baselines.Problem]:
        problem = baselines.make_problem(loss, num_rows, num_classes, dim).in_mode(mode)
        if contender == "lce_chunked":
            return baselines.lce_chunked(problem, chunk), problem
        return baselines.EVERYONE[contender](problem), problem

    if contender == "compiled":
        bound, problem = bind(num_classes)
        warm_up = bound
    else:
        warm_up, _ = bind(WARM_UP_CLASSES)
        bound, problem = bind(num_classes)  # writes every page
    warm_up.forward()
    warm_up.step()
    warm_up.clear()
    _give_back_freed_memory()
    before = reset_peak()
    for _ in range(STEPS):
        bound.clear()
        bound.step()
    growth = _status_bytes("VmHWM") - before
    d_w = problem.w.numel() * problem.w.element_size()
    result = {
        "benchmark": f"memory, {baselines.LOSS_NAMES[loss]}, forward + backward, {mode}",
        "shape": {"n": num_rows, "c": num_classes, "d": dim},
        "contender": contender,
        "name": bound.name,
        "steps": STEPS,
        "environment": environment,
        "resident_before_mib": before / MIB,
        "peak_growth_mib": growth / MIB,
        "d_w_mib": d_w / MIB,
        "above_x_w_and_d_w_mib": (growth - d_w) / MIB,
    }
    if mode == "fp32":
        result["eager_by_formula_mib"] = eager_bytes(num_rows, num_classes, dim) / MIB
    return result


def _give_back_freed_memory() -> None:
    """Let the C library return what the warm-up freed, where it can, so that it isn't counted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure_apart(
    num_rows: int,
    num_classes: int,
    dim: int,
    contender: str,
    mode: str = "fp32",
    loss: str = "arcface",
    chunk: int | None = None,
) -> dict[str, Any]:
    """`measure` in a process of its own, with as many threads as this one has.

    Returns:
        ``peak_growth_mib`` and ``above_x_w_and_d_w_mib``; or, if the process failed, the reason as
        ``peak_not_measured``.
    """
    if not CLEAR_REFS.exists():
        return {"peak_not_measured": f"this system has no {CLEAR_REFS}"}
    options = {
        "n": num_rows,
        "c": num_classes,
        "d": dim,
        "contender": contender,
        "mode": mode,
        "loss": loss,
        "chunk": chunk,
        "threads": torch.get_num_threads(),
    }
    try:
        result = harness.apart("memory", options)
    except harness.FailedError as error:
        return {"peak_not_measured": str(error)}
    return {key: result[key] for key in ("peak_growth_mib", "above_x_w_and_d_w_mib")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count, classes = harness.whole_number(1), harness.whole_number(2)
    parser.add_argument("--n", type=count, default=256, help="batch rows (%(default)s)")
    parser.add_argument("--c", type=classes, default=1_000_000, help="classes (%(default)s)")
    parser.add_argument("--d", type=count, default=128, help="embedding size (%(default)s)")
    parser.add_argument(
        "--contender", choices=baselines.EVERYONE, default="ours", help="whose (%(default)s)"
    )
    parser.add_argument("--mode", choices=baselines.MODES, default="fp32", help="(%(default)s)")
    parser.add_argument("--loss", choices=baselines.LOSSES, default="arcface", help="(%(default)s)")
    parser.add_argument("--chunk", type=count, help="rows a chunk, for lce_chunked (by a search)")
    parser.add_argument(
        "--threads", type=harness.thread_count, help="torch's threads (torch's own choice)"
    )
    mib = harness.real_number(0, 1e9)
    parser.add_argument("--limit-mib", type=mib, help="exit with status 1 above this")
    harness.add_output_options(parser)
    settings = parser.parse_args(arguments)
    if settings.loss == "fixed_adacos" and settings.c < 3:
        parser.error("--loss fixed_adacos needs --c 3 or more: its scale is √2·ln(C − 1)")
    if settings.chunk is not None and settings.contender != "lce_chunked":
        parser.error("--chunk is for --contender lce_chunked: add that, or leave --chunk out")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        result = measure(
            settings.n,
            settings.c,
            settings.d,
            settings.contender,
            settings.mode,
            settings.loss,
            settings.chunk,
        )
    except baselines.UnavailableError as error:
        print(f"{settings.contender}: {error}", file=sys.stderr)
        return 1
    suffix = "" if settings.contender == "ours" else f"-{settings.contender}"
    harness.save(settings, result, f"memory{suffix}")
    above = result["above_x_w_and_d_w_mib"]
    print(
        f"{result['name']}: {result['benchmark']}: N={settings.n}, C={settings.c:,},"
        f" D={settings.d}\n"
        f"above x, W and dW: {above:.1f} MiB (growth of the peak {result['peak_growth_mib']:.1f},"
        f" of which dW {result['d_w_mib']:.1f})"
    )
    if "eager_by_formula_mib" in result:
        by_formula = result["eager_by_formula_mib"]
        print(f"eager code, by formula, not measured: {by_formula:,.0f} MiB")
    if settings.limit_mib is not None and above > settings.limit_mib:
        print(f"above the limit of {settings.limit_mib:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
