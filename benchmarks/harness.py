"""What every benchmark shares: the correctness gate, interleaved timing, and the environment."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fused_margin as fm
from benchmarks.baselines import Contender, Problem, ours
from fused_margin import _cpu

ROOT = Path(__file__).resolve().parent.parent

# Largest relative error (Euclidean norm) against fp64, by dtype of the embeddings.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


class WrongResultError(RuntimeError):
    """A contender failed the gate, so that its time means nothing."""


class Steps(Protocol):
    """What can be timed."""

    @property
    def name(self) -> str:
        """How the table calls it."""
        ...

    def clear(self) -> None:
        """Prepare a step; not timed."""
        ...

    def step(self) -> object:
        """Do what is timed."""
        ...


class Gate:
    """Compares loss and gradients with the dense reference in fp64."""

    def __init__(self, problem: Problem) -> None:
        self.dtype = problem.x.dtype
        exact = ours(
            Problem(
                problem.x.double(),
                problem.w.double(),
                problem.labels,
                problem.loss,
                problem.margin,
                problem.scale,
            ),
            backend="reference",
        )
        self.is_target = torch.zeros(problem.w.shape[0], dtype=torch.bool)
        self.is_target[problem.labels] = True
        self.expected = self._parts(exact)

    def _parts(self, contender: Contender) -> dict[str, Tensor]:
        contender.clear()
        loss = contender.step().detach()
        d_x, d_w = contender.gradients()
        contender.clear()
        # Rows of d_w that are someone's target are so much larger that they would hide the others.
        parts = {"loss": loss, "d_x": d_x, "d_w of targets": d_w[self.is_target]}
        if not bool(self.is_target.all()):
            parts["d_w of other classes"] = d_w[~self.is_target]
        return parts

    def check(self, contender: Contender) -> dict[str, float]:
        """Run one step and compare.

        Returns:
            relative errors of loss, d_x and d_w.

        Raises:
            WrongResultError: an error is above the tolerance, or not a number.
        """
        errors = {}
        for part, value in self._parts(contender).items():
            expected = self.expected[part]
            difference = torch.linalg.vector_norm(value.double() - expected)
            errors[part] = float(difference / torch.linalg.vector_norm(expected))
        limit = TOLERANCES[self.dtype]
        wrong = {part: error for part, error in errors.items() if not error <= limit}
        if wrong:
            raise WrongResultError(
                f"{contender.name}, {self.dtype} embeddings: relative error above {limit}: {wrong}"
            )
        return errors


def interleave(contenders: Sequence[Steps], rounds: int, warmups: int = 2) -> list[list[float]]:
    """Time one step of each contender per round, in an order that rotates from round to round.

    Gradients are set to None before each step, outside of the timing, so that every contender
    allocates its gradients within it. The garbage collector is off meanwhile.

    Returns:
        Seconds, one list of ``rounds`` per contender.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    is_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(-warmups, rounds):
            for position in range(len(contenders)):
                index = (position + round_index) % len(contenders)
                contender = contenders[index]
                contender.clear()
                start = time.perf_counter()
                contender.step()
                elapsed = time.perf_counter() - start
                contender.clear()
                if round_index >= 0:
                    seconds[index].append(elapsed)
    finally:
        if is_collecting:
            gc.enable()
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all samples, in seconds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "seconds": list(seconds),
    }


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """Turn a name into lower-case words joined by hyphens, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive, or no git
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions, machine, date and revision, to go with a result."""
    changes = _git("status", "--porcelain", "--", "fused_margin", "benchmarks/*.py")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fused_margin": fm.__version__,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_has_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bf16_products": _cpu.has_bf16_products(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result, one key a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def progress(message: str) -> None:
    """Say on stderr what is going on; results go to stdout."""
    print(message, file=sys.stderr, flush=True)
