"""Memory: what is available, what a process has taken, what eager code would take."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch


def eager_bytes(loss: str, num_rows: int, num_classes: int, dim: int) -> int:
    """What careful eager code needs in fp32 above embeddings, weights and their gradient.

    By a count of its tensors at the worse of two moments of the backward: the softmax's, with three
    N x C matrices, four if there is a margin, and the normalised weights; the normalisation's, with
    five C x D matrices. The weights' gradient, C x D, is taken off: it is needed in any case.
    """
    matrices = 3 if loss == "fixed_adacos" else 4
    return 4 * num_classes * max(matrices * num_rows, 4 * dim)


def number_in(path: Path, line: str) -> int | None:
    """The number in the line of this pattern; None if there is no such file or line."""
    try:
        match = re.search(f"^{line}$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else int(match[1])


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on the device, within the limits of a container.

    None where the system doesn't say (it is Linux that does).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kilobytes = number_in(Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB")
    groups = left_in_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return None if kilobytes is None else min([kilobytes * 1024, *groups])


def left_in_control_groups(membership: Path, root: Path) -> list[int]:
    """What the limits of a process's control groups (version 2) leave, the innermost first."""
    try:
        mine = re.search(r"^0::/(.*)$", membership.read_text(), re.MULTILINE)
    except OSError:
        return []
    left = []
    folder = root if mine is None else root / mine[1]
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        # A group without a limit has no number there; one outside a container has no file.
        with contextlib.suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            reclaimable = number_in(group / "memory.stat", r"inactive_file (\d+)") or 0
            left.append(limit - used + reclaimable)
    return left


def peak_resident() -> int | None:
    """Largest resident size of this process so far, in bytes; None on Windows."""
    kilobytes = number_in(Path("/proc/self/status"), r"VmHWM:\s*(\d+) kB")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed_memory() -> None:
    """Let glibc give back what it keeps of freed memory, so that using it again counts."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class PeakMemory:
    """How far the peak has grown since this was made: resident on a CPU, allocated on a GPU.

    Attributes:
        is_exact: False where the system can't set its peak back to the present size: the growth is
            then over an earlier peak, and may be more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_exact = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            return_freed_memory()
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self.is_exact = False
        self.before = self._peak()

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()

    def growth(self) -> int | None:
        now = self._peak()
        return None if now is None or self.before is None else now - self.before
