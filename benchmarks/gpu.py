"""Everything the owner of a GPU should run, in one command of bounded time and without network.

    python -m benchmarks.gpu --out results                       # six minutes at most
    python -m benchmarks.gpu --out results --minutes 30          # more of the steps
    python -m benchmarks.gpu --out results --skip check tiles    # without some of the parts
    python -m benchmarks.gpu --out rehearsal --device cpu        # a dry run of tiny shapes

For CUDA and ROCm devices. In this order: correctness (a third of the time at most), the kernels of
a step, the strategies of the backward against each other, descriptors against pointers, tile
candidates, steps that are bound by launches, with and without a CUDA graph, chunks of several
sizes, and the rivals that are installed; then other shapes and dtypes. A short table comes last on
stdout; DIR/gpu.json has everything, and is written whole after every step, so that an interrupted
run keeps what it has. `python -m benchmarks.report --results DIR --docs DIR` makes a page and
charts of it.

A floor (`benchmarks.roofline`) is that of the strategy on this device, with rates measured in the
same run; for a rival, that of the strategy which this package takes. Times are by the device's own
clock, from a cold L2 cache, but for the small shapes, where it is that of steps in a loop.

The steps run in a process of their own. One that hangs or crashes is entered as such, and another
process goes on with the next step. Exit status: 0, 1 if a correctness check failed, 2 if there is
no GPU or the arguments are wrong, 130 if the run was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_run, gpu_worker, harness

Result = dict[str, Any]

CLOSING = 10.0  # seconds kept for the table, at most a tenth of the time
STDERR = 2  # the file descriptor: stdout is for the table
COMPARISONS = ("strategies/", "descriptors/", "chunks/", "baselines/")  # of whole steps
POLL = 0.1  # seconds between looks at the worker
WORKER = [sys.executable, "-m", "benchmarks.gpu_worker"]


def new_result(device: str, minutes: float, skip: Sequence[str] = ()) -> Result:
    """What the file holds before the first step."""
    started = time.time()
    seconds = 60.0 * minutes
    return {
        "benchmark": "gpu",
        "device": device,
        "dry_run": device == "cpu",
        "minutes": minutes,
        "skip": list(skip),
        "started": started,
        "deadline": started + seconds - min(CLOSING, 0.1 * seconds),
        "status": "running",
        "running": None,
        "steps": {},
    }


def _read(path: Path) -> Result:
    return json.loads(path.read_text())


@contextlib.contextmanager
def _worker(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker; it and its children don't outlive the block."""
    process = subprocess.Popen(
        [*WORKER, str(path.resolve())], cwd=harness.ROOT, stdout=STDERR, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _watch(path: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for the worker to end, for its step's limit, or for the end of the time.

    Returns:
        "done", "restart", "out of time", or what happened to the step in progress: "killed" or
        "crashed".
    """
    while True:
        status = process.poll()
        if status is not None:
            return {0: "done", gpu_worker.RESTART: "restart"}.get(status, "crashed")
        result = _read(path)
        if time.time() >= result["deadline"]:
            return "out of time"
        running = result["running"]
        if running is not None and time.time() > running["until"]:
            return "killed"
        time.sleep(POLL)


def _close_step(result: Result, end: str, exit_status: int | None) -> bool:
    """Enter the fate of the step in progress; returns whether there was one."""
    running, result["running"] = result["running"], None
    if running is None:
        return False
    message = {
        "killed": "did not end within its limit",
        "crashed": f"the process ended with status {exit_status}",
        "out of time": "out of time",
        "interrupted": "interrupted",
    }[end]
    status = end if end in ("killed", "crashed") else "skipped"
    result["steps"][running["key"]] |= {"status": status, "message": message}
    return True


def supervise(path: Path) -> Result:
    """Run workers until all steps are done or the time is over; returns the result."""
    end = "interrupted"
    while True:
        exit_status = None
        try:
            with _worker(path) as process:
                end = _watch(path, process)
                exit_status = process.returncode
        except KeyboardInterrupt:
            end = "interrupted"
        result = _read(path)
        had_step = end not in ("done", "restart") and _close_step(result, end, exit_status)
        # a crash outside of any step would repeat itself
        goes_on = end in ("restart", "killed") or (end == "crashed" and had_step)
        if not goes_on:
            result["status"] = "complete" if end == "done" else end
        harness.write_json(path, result)
        if not goes_on:
            return result


def failures(result: Result) -> list[str]:
    """Failed checks, and results of this package that the gate refused."""
    failed = []
    for key, details in result["steps"].items():
        if details.get("is_check") and details.get("status") in gpu_run.FAILED:
            failed.append(f"{key}: {details.get('message', details['status'])}")
        elif key.startswith("small/") and details.get("status") == "wrong":
            failed.append(f"{key}: {details['message']}")
        for name, row in details.get("rows", {}).items():
            is_ours = not key.startswith("baselines/") or name == "ours"
            if is_ours and row.get("status") == "wrong":
                failed.append(f"{key}, {name}: {row['message']}")
    return failed


def _median(row: Result, work: str) -> float | None:
    return None if row.get(work) is None else row[work]["median_ms"]


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _rows(key: str, details: Result) -> list[str]:
    """Lines of the table for one comparison."""
    kind, shape, mode = key.split("/")
    lines = []
    for row in details["rows"].values():
        step = _median(row, "step")
        if step is None:
            continue
        floor, extra = row.get("floor", {}), row.get("extra_bytes")
        ideal = floor.get("8NCD_ms")
        label = f"{kind.removesuffix('s') if kind != 'strategies' else 'strategy'}: {row['name']}"
        lines.append(
            f"{shape:12} {mode:13} {label:48}"
            f"{_number(_median(row, 'forward'), 10, '.3f')} {_number(step, 10, '.3f')}"
            f" {_number(row.get('fraction_of_floor'), 7, '.0%')}"
            f" {_number(step / ideal if ideal else None, 7, '.2f')}"
            f" {_number(None if extra is None else extra / 2**20, 10, ',.0f')}"
        )
    return lines


def table(result: Result) -> str:
    """What matters, for people."""
    steps = result["steps"]
    about = steps.get("environment", {})
    name, version = about.get("device", result["device"]), about.get("torch")
    lines = [f"{name}, torch {version}, revision {about.get('git_revision')}"]
    if result["dry_run"]:
        lines.append("DRY RUN of tiny shapes: no figure below means anything")
    measured = steps.get("rates", {})
    if measured.get("status") == "done":
        products = ", ".join(f"{k} {v / 1e12:.4g}" for k, v in measured["rates"].items())
        lines.append(
            f"measured: copy {measured['bandwidth'] / 1e12:.3g} TB/s; products {products} TFLOP/s"
        )
    body = []
    for key, details in steps.items():
        if key.startswith(COMPARISONS) and "rows" in details:
            body += _rows(key, details)
    if body:
        heads = f"{'':75}{'forward':>10} {'step':>10} {'floor':>7} {'over':>7} {'extra':>10}"
        units = f"{'':75}{'ms':>10} {'ms':>10} {'/step':>7} {'8NCD':>7} {'MiB':>10}"
        lines += [heads, units, *body]
    for key, details in steps.items():
        if key.startswith("small/") and "rows" in details:
            times = {
                f"{name} {what}": f"{1e3 * value:.0f}"
                for name, row in details["rows"].items()
                for what, value in row.items()
            }
            each = ", ".join(f"{what.removesuffix('_ms')} {us}" for what, us in times.items())
            lines.append(f"{key}: microseconds: {each}")
        if key.startswith("kernels/") and details.get("step"):
            found = sorted(details["step"].items(), key=lambda item: -item[1]["ms"])
            each = ", ".join(f"{name[:30]} {row['ms']:.3f} ({row['count']})" for name, row in found)
            lines.append(f"{key}: ms (launches): {each}")
    checks = [details for details in steps.values() if details.get("is_check")]
    done = sum(details.get("status") == "done" for details in checks)
    failed = failures(result)
    lines.append(f"checks: {done} passed, {len(failed)} failed, of {len(checks)}")
    lines += [f"FAILED {line}" for line in failed]
    late = sum(details.get("message") == "out of time" for details in steps.values())
    lines.append(f"{result['status']}; {late} steps had no time")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--minutes",
        type=harness.real_number(0.1, 1440),
        default=6.0,
        help="the run takes no longer (%(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cuda (ROCm's devices too), or cpu for a dry run (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--skip", nargs="+", choices=gpu_worker.PARTS, default=[], metavar="PART",
        help="leave out some of %(choices)s; without checks, results are judged before they are"
        " timed, no more",
    )  # fmt: skip
    settings = parser.parse_args(arguments)
    if (settings.out / "gpu.json").exists():
        parser.error(f"{settings.out} holds the results of another run: choose another directory")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    settings = _parse(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no GPU. This needs a CUDA or ROCm device, its driver, and a build of PyTorch"
            f" for it (this one is {torch.__version__}); --device cpu makes a dry run.",
            file=sys.stderr,
        )
        return 2
    path = settings.out / "gpu.json"
    harness.write_json(path, new_result(settings.device, settings.minutes, settings.skip))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker as Ctrl-C does
    result = supervise(path)
    print(table(result), flush=True)
    if failures(result) or result["status"] == "crashed":
        return 1
    return 130 if result["status"] == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
