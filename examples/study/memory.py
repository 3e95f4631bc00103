"""Memory: what is available, what is taken, what eager code and many classes would take."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import re
import shutil
import sys
from pathlib import Path

import torch

from .synthetic import HIDDEN_SIZE, OBSERVED_SIZE

MIB, GIB = 1 << 20, 1 << 30


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


def weight_bytes(arguments: argparse.Namespace) -> int:
    """fp32 class weights; their gradient takes the same again."""
    return 4 * arguments.classes * arguments.embedding


def eager_bytes_of(arguments: argparse.Namespace) -> int:
    return eager_bytes(arguments.loss, arguments.batch, arguments.classes, arguments.embedding)


def working_bytes(arguments: argparse.Namespace) -> int:
    """All that isn't class weights or their gradient, estimated from above."""
    kept_cosines = 40 * MIB + max(0, arguments.batch - 256) * 224 * 1024  # for the backward
    # parameters, gradients and Adam's moments, in fp32, of two hidden layers and the output
    sizes = OBSERVED_SIZE + HIDDEN_SIZE + arguments.embedding
    network = 4 * 4 * HIDDEN_SIZE * sizes
    rows = 8 * 4 * arguments.batch * (HIDDEN_SIZE + arguments.embedding)
    # The rest: libraries loaded by the first step (140 MiB with torch 2.13), blocks of classes.
    return kept_cosines + network + rows + 256 * MIB


def needed_bytes(arguments: argparse.Namespace) -> int:
    """Memory of the training; with --compare-eager, of the comparison, which needs more."""
    weights = weight_bytes(arguments)
    needed = 2 * weights + working_bytes(arguments)
    if arguments.compare_eager:
        # Both gradients: the fused backend puts the memory of its own aside for its next step.
        needed += weights + eager_bytes_of(arguments)
    return needed


def check_memory(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what doesn't fit: the system would otherwise kill the process half-way."""
    needed, available = needed_bytes(arguments), available_bytes(arguments.device)
    if available is None:
        print("this system doesn't say how much memory is available: not checked", file=sys.stderr)
    elif needed > available:
        eager = "leave out --compare-eager, or " if arguments.compare_eager else ""
        parser.error(
            f"{needed / GIB:,.2f} GiB of memory needed for {arguments.classes:,} classes x "
            f"{arguments.embedding} (weights and gradient "
            f"{2 * weight_bytes(arguments) / GIB:,.2f}), {available / GIB:,.2f} GiB available; "
            f"{eager}lower --classes, --embedding or --batch"
        )


def check_disk(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a folder that has no room for a checkpoint, written beside the one before."""
    if arguments.json is not None:
        needed = 2 * weight_bytes(arguments)
        free = shutil.disk_usage(arguments.json.parent).free
        if needed > free:
            parser.error(
                f"--json: two checkpoints take {needed / GIB:,.2f} GiB and {free / GIB:,.2f} GiB "
                f"is free in {arguments.json.parent}; name a file on another disk, or leave out "
                "--json"
            )
