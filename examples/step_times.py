"""Time whole training steps of the study with each loss, in turns on the same machine.

    python examples/step_times.py --threads 1 --json times.json

For each network and batch of the study: forward, loss, backward and Adam's step over network and
class weights, as `study.training.train_epoch` does them. Every round takes one step with each loss,
in an order of its own, so that what else the machine does meets all alike; a ratio to ArcFace is
within a round, and its median over the rounds is what counts. Images and labels are random: the
time of a step doesn't depend on them. Nothing else should run meanwhile; the JSON keeps the load
average before and after.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from study.command import (
    default_device,
    thread_count,
    usable_device,
    whole_number,
    writable_file,
)
from study.criteria import losses
from study.networks import ArticleCNN, SmallResidualNetwork
from study.store import Runs, StoreError, reading
from study.tables import number, text_table
from study.training import Network, Recipe, train_epoch
from torch import nn

BASELINE = "arcface"
LOSSES = (BASELINE, "cosface", "fixed_adacos", "adacos", "cross_entropy")
WARM_UP = 5  # steps of each loss


@dataclass(frozen=True)
class Shape:
    """A network and its batch: what `study.md` trains with."""

    network: Callable[[int], nn.Module]
    image: tuple[int, int, int]
    rows: int
    classes: int
    embedding_size: int
    precision: str


SHAPES = {
    "MNIST": Shape(ArticleCNN, (1, 28, 28), 128, 10, 128, "bf16"),
    "faces": Shape(lambda size: SmallResidualNetwork(1, size), (1, 64, 64), 16, 30, 512, "fp32"),
    "characters": Shape(
        lambda size: SmallResidualNetwork(1, size), (1, 32, 32), 64, 178, 512, "fp32"
    ),
}


def make_step(name: str, shape: Shape, device: torch.device) -> Callable[[], float]:
    """Build what this loss trains with; return a function that takes a step and gives its seconds.

    The batch is the same for every loss.
    """
    torch.manual_seed(0)
    images = torch.randn(shape.rows, *shape.image).to(device)
    labels = torch.randint(shape.classes, (shape.rows,)).to(device)
    network = Network(shape.network(shape.embedding_size), shape.precision).to(device)
    criterion = losses()[name].build(shape.classes, shape.embedding_size).to(device)
    optimizer = torch.optim.Adam([*chain(network.parameters(), criterion.parameters())], lr=1e-4)
    recipe = Recipe(epochs=1, batch_size=shape.rows, lr=1e-4, precision=shape.precision)
    order = torch.Generator().manual_seed(0)

    def step() -> float:
        start = time.perf_counter()
        # An epoch of one batch; it ends with the loss on the CPU, so that the device has finished.
        train_epoch(network, criterion, None, optimizer, images, labels, recipe, order)
        return time.perf_counter() - start

    return step


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each loss, round by round."""
    before = os.getloadavg()[0]
    steps = {name: make_step(name, shape, device) for name in LOSSES}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    turns = random.Random(0)
    for _ in range(rounds):
        for name in turns.sample(LOSSES, len(LOSSES)):
            seconds[name].append(round(steps[name](), 6))
    return {
        "rows": shape.rows, "classes": shape.classes, "embedding_size": shape.embedding_size,
        "precision": shape.precision, "threads": torch.get_num_threads(),
        "load": [before, os.getloadavg()[0]], "seconds": seconds,
    }  # fmt: skip


def ratios(run: dict[str, Any], name: str) -> list[float]:
    """The median of this loss's time over ArcFace's in the same round, between its quartiles."""
    seconds = run["seconds"]
    return statistics.quantiles(
        [mine / base for mine, base in zip(seconds[name], seconds[BASELINE], strict=True)], n=4
    )


HEADER = ("shape", "threads", "ArcFace, ms", *(losses()[name].title for name in LOSSES[1:]))


def rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table: a line for each shape and number of threads."""
    lines = []
    for run in runs:
        low_median_high = (ratios(run, name) for name in LOSSES[1:])
        lines.append(
            [
                run["shape"],
                str(run["threads"]),
                number(1000 * statistics.median(run["seconds"][BASELINE])),
                *(f"{median:.3f} ({low:.3f}–{high:.3f})" for low, median, high in low_median_high),
            ]
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Time every shape, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Time training steps with each loss, in turns.")
    add = parser.add_argument
    add(
        "--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", default=list(SHAPES),
        help=f"of {', '.join(SHAPES)}; default: all",
    )  # fmt: skip
    add("--rounds", type=whole_number(4), metavar="N", default=200, help="default: %(default)s")
    add("--threads", type=thread_count, metavar="N", help="on a CPU; default: as PyTorch chooses")
    add("--device", type=usable_device, help="cpu, cuda or cuda:INDEX; default: a GPU if any")
    add("--json", type=writable_file, metavar="FILE", help="keep every finished shape here")
    add("--resume", action="store_true", help="go on with the shapes in the --json FILE")
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.json is None:
        parser.error("--resume needs --json FILE, the file to go on with")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or default_device()
    settings = {"experiment": "times", "rounds": arguments.rounds, "device": str(device)}
    try:
        runs = Runs(arguments.json, settings, resume=arguments.resume)
        with reading(arguments.json):
            rows(runs.runs)
        for name in arguments.shapes:
            key = {"shape": name, "threads": torch.get_num_threads()}
            if runs.find(key) is None:
                runs.add(key, measure(SHAPES[name], arguments.rounds, device))
    except StoreError as error:
        parser.error(str(error))
    print(text_table(HEADER, rows(runs.runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
