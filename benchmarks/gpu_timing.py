"""Meters of a GPU and of a CPU: times, peak memory and kernels of one call; interleaved rounds."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

WARM_UPS, MAX_ROUNDS = 2, 25
# After this many seconds of rounds, warm-ups included, five are enough.
PATIENCE, ENOUGH_ROUNDS = 8.0, 5
# Written before each sample, so that no sample finds its inputs in the L2 cache. Larger than any.
FLUSH_BYTES = 512 << 20

Call = Callable[[], object]


class Meter(Protocol):
    """Measures calls on one device."""

    device: torch.device

    def seconds(self, call: Call) -> float:
        """Seconds of one call, on a GPU by its own clock and from a cold L2 cache."""
        ...

    def peak(self, call: Call) -> int | None:
        """Bytes by which one call raises the allocated memory at its peak; None if unknown."""
        ...

    def kernels(self, call: Call) -> dict[str, dict[str, float]] | None:
        """How often one call runs each kernel, memset and copy (count), and for how long (ms).

        The profiler that finds out slows down every later launch of the process.
        """
        ...

    def free(self) -> int | None:
        """Bytes of device memory that can be allocated; None if that is not known."""
        ...

    def is_usable(self) -> bool:
        """Whether the device still works: after some errors a process can't use it any more."""
        ...

    def is_undisturbed(self) -> bool:
        """Whether times are still to be trusted: no profiler has run in this process."""
        ...


class CpuMeter:
    """Wall clock only, for dry runs."""

    device = torch.device("cpu")

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, call: Call) -> int | None:
        return None

    def kernels(self, call: Call) -> dict[str, dict[str, float]] | None:
        return None

    def free(self) -> int | None:
        return None

    def is_usable(self) -> bool:
        return True

    def is_undisturbed(self) -> bool:
        return True


class CudaMeter:
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
    calls: Mapping[str, Call],
    clear: Callable[[str], None],
    is_time_left: Callable[[], bool],
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, list[float]]:
    """Time every call once a round, in an order drawn anew each round, after warm-up rounds.

    Args:
        meter: of the device that the calls run on.
        calls: by name.
        clear: called with the name before and after each sample, outside of the timing.
        is_time_left: asked before each round; if it says no, the rounds so far are what there is.
        max_rounds: how many there are if they are quick.

    Returns:
        Seconds by name, none of the warm-ups.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    order = list(calls)
    is_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for index in range(-WARM_UPS, max_rounds):
            is_enough = index >= ENOUGH_ROUNDS and time.perf_counter() - start > PATIENCE
            if is_enough or not is_time_left():
                break
            generator.shuffle(order)
            for name in order:
                clear(name)
                seconds = meter.seconds(calls[name])
                clear(name)
                if index >= 0:
                    samples[name].append(seconds)
    finally:
        if is_collecting:
            gc.enable()
    return samples


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
