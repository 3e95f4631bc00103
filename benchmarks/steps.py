"""Training steps over many classes: the optimiser after the backward, in it, or over a sample.

    python -m benchmarks.steps                          # N=256, C=1,000,000, D=128
    python -m benchmarks.steps --d 512 --json FILE

A step is forward, backward and the update of the class weights, by SGD with momentum, of ArcFace in
fp32. Steps are interleaved in one process, and medians compared. Peak memory is taken afterwards,
of one contender per process: the growth of the resident size (VmHWM) from before the weights are
made, after a warm-up at few classes. Linux only, unless with ``--no-memory``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fused_margin as fm
from benchmarks import harness
from benchmarks.harness import MIB
from benchmarks.memory import _give_back_freed_memory, _status_bytes, reset_peak
from fused_margin.optim import RowSparseSGD, SGDInBackward
from fused_margin.sampling import sample_negatives

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
WARM_UP_CLASSES, MEMORY_STEPS = 5_000, 3


class Training:
    """A criterion with its optimiser, and a batch."""

    def __init__(
        self, name: str, criterion: Any, optimizer: torch.optim.Optimizer, num_rows: int
    ) -> None:
        self.name, self.criterion, self.optimizer = name, criterion, optimizer
        num_classes, dim = criterion.weight.shape
        self.x = torch.randn(num_rows, dim, dtype=criterion.weight.dtype, requires_grad=True)
        self.labels = torch.randint(num_classes, (num_rows,))

    def clear(self) -> None:
        """Forget the gradients; not timed."""
        self.x.grad = None
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Forward, backward, update."""
        self.criterion(self.x, self.labels).backward()
        self.optimizer.step()


def _after(criterion: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(criterion.parameters(), **SETTINGS)


def _within(criterion: Any, rate: float) -> torch.optim.Optimizer:
    return SGDInBackward(criterion.parameters(), **SETTINGS)


def _sampled(criterion: Any, rate: float) -> torch.optim.Optimizer:
    sample_negatives(criterion, rate)
    return RowSparseSGD(criterion.parameters(), **SETTINGS)


class Contender(NamedTuple):
    """A way to train, by what it is called, how its optimiser is made, and its weights' dtype."""

    name: str
    optimizer_of: Callable[[Any, float], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


CONTENDERS = {
    "after": Contender("all classes, torch.optim.SGD", _after),
    "within": Contender("all classes, SGDInBackward", _within),
    "within_bf16": Contender("all classes in bf16, SGDInBackward", _within, torch.bfloat16),
    "sampled": Contender("sampled, RowSparseSGD", _sampled),
}


def build(key: str, num_rows: int, num_classes: int, dim: int, rate: float) -> Training:
    """A contender, with weights of its own."""
    contender = CONTENDERS[key]
    criterion = fm.ArcFaceLoss(num_classes, dim, dtype=contender.dtype)
    return Training(contender.name, criterion, contender.optimizer_of(criterion, rate), num_rows)


def peak(key: str, num_rows: int, num_classes: int, dim: int, rate: float) -> int:
    """Bytes by which the peak grows in this process, from before the weights to after a few steps.

    Raises:
        RuntimeError: the system has no peak that can be reset.
    """
    warm_up = build(key, num_rows, WARM_UP_CLASSES, dim, rate)
    warm_up.step()
    del warm_up
    fm.empty_cache()
    _give_back_freed_memory()
    before = reset_peak()
    training = build(key, num_rows, num_classes, dim, rate)
    for _ in range(MEMORY_STEPS):
        training.clear()
        training.step()
    return _status_bytes("VmHWM") - before


def _peak_apart(key: str, given: argparse.Namespace) -> int:
    options = {
        "n": given.n, "c": given.c, "d": given.d, "rate": given.rate,
        "threads": torch.get_num_threads(), "peak-of": key,
    }  # fmt: skip
    return harness.apart("steps", options)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times and peaks of all contenders."""
    shape = given.n, given.c, given.d
    found: dict[str, Any] = {}
    trainings = [build(key, *shape, given.rate) for key in CONTENDERS]
    samples = harness.interleave(trainings, given.rounds)
    for key, training, seconds in zip(CONTENDERS, trainings, samples, strict=True):
        found[key] = {"name": training.name} | harness.summary(seconds)
    del trainings
    if not given.no_memory:
        for key, entry in found.items():
            entry["peak_bytes"] = _peak_apart(key, given)
    return {
        "benchmark": "training steps, ArcFace, SGD with momentum, fp32",
        "shape": {"n": given.n, "c": given.c, "d": given.d},
        "rate": given.rate,
        "weight_bytes": 4 * given.c * given.d,
        "environment": harness.environment(),
        "contenders": found,
    }


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    shape, contenders = result["shape"], result["contenders"]
    baseline = contenders["after"]
    title = (
        f"training steps: N={shape['n']}, C={shape['c']:,}, D={shape['d']}, rate"
        f" {result['rate']:g}; C x D in fp32 is {result['weight_bytes'] / MIB:.0f} MiB"
    )
    head = f"{'':36}{'median ms':>11}{'min ms':>9}{'times':>8}{'peak MiB':>10}{'less':>8}"
    lines = [title, head]
    for entry in contenders.values():
        line = (
            f"{entry['name']:36}{1e3 * entry['median_s']:11.0f}{1e3 * entry['min_s']:9.0f}"
            f"{baseline['median_s'] / entry['median_s']:8.2f}"
        )
        if "peak_bytes" in entry:
            less = baseline["peak_bytes"] - entry["peak_bytes"]
            line += f"{entry['peak_bytes'] / MIB:10.0f}{less / MIB:8.0f}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = harness.whole_number(1)
    parser.add_argument("--n", type=count, default=256, help="batch rows (%(default)s)")
    parser.add_argument("--c", type=count, default=1_000_000, help="classes (%(default)s)")
    parser.add_argument("--d", type=count, default=128, help="embedding size (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="of sampled classes (%(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=count, help="torch's threads (torch's own choice)")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", choices=CONTENDERS, help="nothing but the peak of this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.peak_of is not None:
        result: Any = peak(given.peak_of, given.n, given.c, given.d, given.rate)
        print(f"{given.peak_of}: {result / MIB:.0f} MiB")
    else:
        result = measure(given)
        print(report(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
