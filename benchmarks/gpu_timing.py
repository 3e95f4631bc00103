"""Meters of a GPU and of a CPU: times, peak memory and kernels of one call; interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import harness

WARM_UPS, MAX_ROUNDS = 2, 25
# After this many seconds of rounds, warm-ups included, five are enough.
PATIENCE, ENOUGH_ROUNDS = 8.0, 5
# Written before each sample, so that no sample finds its inputs in the L2 cache. Larger than any.
FLUSH_BYTES = 512 << 20

Call = Callable[[], object]


class Meter:
    """Measures calls on one device: this one on a CPU, by the wall clock alone, for dry runs."""

    device = torch.device("cpu")

    def seconds(self, call: Call) -> float:
        """Seconds of one call, on a GPU by its own clock and from a cold L2 cache."""
        return harness.wall_seconds(call)

    def peak(self, call: Call) -> int | None:
        """Bytes by which one call raises the allocated memory at its peak; None if unknown."""
        return None

    def kernels(self, call: Call) -> dict[str, dict[str, float]] | None:
        """How often one call runs each kernel, memset and copy (count), and for how long (ms).

        The profiler that finds out slows down every later launch of the process.
        """
        return None

    def free(self) -> int | None:
        """Bytes of device memory that can be allocated; None if that is not known."""
        return None

    def is_usable(self) -> bool:
        """Whether the device still works: after some errors a process can't use it any more."""
        return True

    def is_undisturbed(self) -> bool:
        """Whether times are still to be trusted: no profiler has run in this process."""
        return True


class CudaMeter(Meter):
    """CUDA or ROCm events, the allocator's statistics, and the profiler."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._flush = torch.empty(
            min(FLUSH_BYTES, total // 16), dtype=torch.uint8, device=self.device
        )
        self._has_profiled = False
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def seconds(self, call: Call) -> float:
        # the launches of a short call are queued while this runs, so that gaps don't count
        self._flush.zero_()
        self._start.record()
        call()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3

    def peak(self, call: Call) -> int | None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def kernels(self, call: Call) -> dict[str, dict[str, float]] | None:
        if not self._has_profiled:  # what starts the profiler may miss the first kernels
            self._has_profiled = True
            self._profile(self._flush.zero_)
        return self._profile(call)

    def _profile(self, call: Call) -> dict[str, dict[str, float]]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(self.device)
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            call()
            torch.cuda.synchronize(self.device)
        found: dict[str, dict[str, float]] = {}
        for event in profile.events() or ():
            if event.device_type.name == "CUDA":  # ROCm's too
                row = found.setdefault(event.name, {"count": 0, "ms": 0.0})
                row["count"] += 1
                row["ms"] += event.device_time / 1e3
        return found

    def free(self) -> int | None:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def is_usable(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def is_undisturbed(self) -> bool:
        return not self._has_profiled


def back_to_back(call: Call, device: torch.device, repeats: int) -> float:
    """Seconds a call takes in a loop without waiting: what a launch-bound training step costs."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def interleave(
    meter: Meter,
    contenders: Sequence[harness.Steps],
    is_time_left: Callable[[], bool],
    max_rounds: int = MAX_ROUNDS,
) -> list[list[float]]:
    """`harness.interleave` by a meter, until enough is known or the time is over.

    Args:
        meter: of the device that the contenders run on.
        contenders: what is timed.
        is_time_left: asked before each round; if it says no, the rounds so far are what there is.
        max_rounds: how many there are if they are quick.

    Returns:
        Seconds, one list per contender.
    """
    start = time.perf_counter()

    def goes_on(index: int) -> bool:
        is_enough = index >= ENOUGH_ROUNDS and time.perf_counter() - start > PATIENCE
        return not is_enough and is_time_left()

    return harness.interleave(contenders, max_rounds, WARM_UPS, meter.seconds, goes_on)


def summary(seconds: list[float]) -> dict[str, Any] | None:
    """Median and extremes in milliseconds, and the number of samples; None if there are none."""
    if not seconds:
        return None
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
        "rounds": len(seconds),
    }
