"""Train with a million classes on an ordinary machine: about two minutes on two cores.

    python examples/million_classes.py
    python examples/million_classes.py --loss arcface --json million.json --compare-eager

A class is a synthetic identity: a direction on a sphere, computed from the number of the class
whenever it is needed. A sample is that direction plus noise, observed through a fixed nonlinear
map; a small network embeds it. All the classes are in every softmax, and all their weights get
their gradient: nothing is sampled.

What a hundred steps can show: they see 12,800 samples, so that most of a million classes would
never occur. Batches are therefore drawn from `--identities-seen` of them, which recur a dozen times
each. Loss and accuracy (the arg max among *all* classes) are measured before and after on new
samples of those identities, and on identities never trained on, whose class weights are still
random: they can't be recognised, and the table says so. By default the loss falls from 15.3 to 0.9
and 94 % are recognised among the million. Most of that is class weights that find their embeddings:
at 50,000 classes, with the network frozen (`--lr 1e-9`), it ends at 2.0 and 81 %, otherwise at 1.0
and 92 %.

Optimisers: Adam for the network; plain SGD for the class weights, which is one pass over them.
Momentum would cost as much memory as the weights again, Adam twice that.

With `--json`, a run that is interrupted (Ctrl-C finishes the step first) leaves a checkpoint, and
`--resume` goes on from it with the same result bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from study.command import (
    default_device,
    learning_rate,
    real_number,
    thread_count,
    usable_device,
    whole_number,
    writable_file,
)
from study.identities import NOISE, Identities
from study.measure import DivergedError, embed, percent
from study.memory import (
    PeakMemory,
    check_disk,
    check_memory,
    eager_bytes_of,
    weight_bytes,
)
from study.million_report import describe_run
from study.runner import FAILED, INTERRUPTED, open_runs
from study.store import Runs, StoreError
from study.synthetic import Perceptron
from torch import Tensor, nn
from tqdm import tqdm

import fused_margin as fm

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "fixed_adacos": fm.FixedAdaCosLoss,
    "arcface": fm.ArcFaceLoss,
    "cosface": fm.CosFaceLoss,
}
COMPARED_STEPS = 3
WARM_UP_CLASSES = 1000
# tqdm's own rate is in seconds per step where steps are slow
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"


@dataclass
class Progress:
    """What is known of a run after some steps: plain numbers, for JSON."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each step
    before: dict[str, Any] = dataclasses.field(default_factory=dict)  # measured before the first
    measuring_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    peak_growth: int = 0


@dataclass
class Training:
    """All that a run trains with."""

    identities: Identities
    network: nn.Module
    criterion: Any  # a loss with weight and scale
    network_optimizer: torch.optim.Optimizer
    weight_optimizer: torch.optim.Optimizer
    progress: Progress

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; SGD without momentum has no state."""
        return {
            "network": self.network.state_dict(),
            "criterion": self.criterion.state_dict(),
            "network_optimizer": self.network_optimizer.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.criterion.load_state_dict(state["criterion"])
        self.network_optimizer.load_state_dict(state["network_optimizer"])
        self.progress = Progress(**state["progress"])
        if not (isinstance(self.progress.losses, list) and isinstance(self.progress.seconds, list)):
            raise TypeError("losses and seconds are not lists")


def prepare(arguments: argparse.Namespace) -> Training:
    torch.manual_seed(arguments.seed)
    device = arguments.device
    network = Perceptron(arguments.embedding).to(device)
    criterion: Any = LOSSES[arguments.loss](arguments.classes, arguments.embedding, device=device)
    # A sample pulls the weight of its class by at most s / (N |w|). The default moves it by as much
    # as it is long at first: a class that occurs a dozen times has no time for small steps.
    weight_lr = arguments.weight_lr or arguments.batch / criterion.scale
    return Training(
        Identities(arguments.classes, arguments.identities_seen, arguments.seed, device),
        network,
        criterion,
        torch.optim.Adam(network.parameters(), lr=arguments.lr),
        torch.optim.SGD(criterion.parameters(), lr=weight_lr),
        Progress(),
    )


def train_step(training: Training, step: int, batch: int) -> float:
    """Train on one batch; return its loss.

    Raises:
        DivergedError: the loss is not finite.
    """
    training.network.train()
    training.network_optimizer.zero_grad()
    training.weight_optimizer.zero_grad()
    observations, labels = training.identities.batch(step, batch)
    loss = training.criterion(training.network(observations), labels)
    value = loss.item()
    if not math.isfinite(value):
        raise DivergedError(f"step {step + 1}: loss {value}; lower --lr or --weight-lr")
    loss.backward()
    training.network_optimizer.step()
    training.weight_optimizer.step()
    return value


@torch.no_grad()
def evaluate(training: Training, batch: int) -> dict[str, Any]:
    """Loss and accuracy in % on new samples of identities trained on, and of others."""
    identities, criterion = training.identities, training.criterion
    start, result = time.perf_counter(), {}
    for name, among in (("trained", identities.trained), ("untrained", identities.untrained)):
        if len(among) == 0:
            result[name] = None
            continue
        observations, labels = identities.fresh(among)
        embeddings = embed(training.network, observations)
        total, ranks = 0.0, []
        for rows, targets in zip(embeddings.split(batch), labels.split(batch), strict=True):
            loss, stats = criterion(rows, targets, return_stats=True)  # of the same sweep
            total += loss.item() * len(rows)
            ranks.append(stats.rank)
        result[name] = {"loss": total / len(labels), "accuracy": percent(torch.cat(ranks) == 0)}
    training.progress.measuring_seconds += time.perf_counter() - start
    return result


class StopRequest:
    """Ctrl-C asks to stop after the step that is under way; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)


def warm_up(arguments: argparse.Namespace) -> None:
    """Load what the first step loads, so that it isn't taken for memory of the training."""
    few = min(arguments.classes, WARM_UP_CLASSES)
    seen = min(arguments.identities_seen, few)
    small = argparse.Namespace(**{**vars(arguments), "classes": few, "identities_seen": seen})
    training = prepare(small)
    observations, labels = training.identities.batch(0, arguments.batch)
    training.criterion(training.network(observations), labels).backward()
    training.network_optimizer.step()
    training.weight_optimizer.step()


def train(
    training: Training,
    arguments: argparse.Namespace,
    stop: StopRequest,
    memory: PeakMemory,
    checkpoint: Callable[[dict[str, Any]], None],
) -> bool:
    """Train to the last step, or until it is asked to stop; return whether it was the last."""
    progress = training.progress
    grown_before = progress.peak_growth

    def save() -> None:
        start = time.perf_counter()
        progress.peak_growth = max(grown_before, memory.growth() or 0)
        checkpoint(training.state())
        progress.checkpoint_seconds += time.perf_counter() - start

    done, steps = len(progress.losses), arguments.steps
    with tqdm(total=steps, initial=done, disable=arguments.quiet, bar_format=BAR) as bar:
        for step in range(done, steps):
            if stop.asked:
                save()
                return False
            start = time.perf_counter()
            loss = train_step(training, step, arguments.batch)
            if arguments.device.type == "cuda":
                torch.cuda.synchronize(arguments.device)
            progress.seconds.append(round(time.perf_counter() - start, 4))
            progress.losses.append(loss)
            rate = 1 / statistics.fmean(progress.seconds[-10:])
            bar.set_postfix_str(f"loss {loss:.2f}, {rate:.2f} steps/s", refresh=False)
            bar.update()
            if (step + 1) % arguments.checkpoint_every == 0 and step + 1 < steps:
                save()
    progress.peak_growth = max(grown_before, memory.growth() or 0)
    return True


def run_training(
    arguments: argparse.Namespace, runs: Runs, key: dict[str, Any], stop: StopRequest
) -> Training:
    """Train, from the checkpoint if there is one; save the result if it reaches the last step.

    Raises:
        DivergedError: a loss is not finite.
        StoreError: the checkpoint is damaged or another run's.
    """
    warm_up(arguments)
    memory = PeakMemory(arguments.device)
    training = prepare(arguments)
    saved = runs.load_checkpoint(key)
    if saved is not None:
        with runs.restoring():
            training.restore(saved)
    elif runs.checkpoint_path is not None and runs.checkpoint_path.exists():
        raise StoreError(
            f"{runs.checkpoint_path} is of a run with another --loss or --seed: repeat the command "
            "it was begun with, or remove it"
        )
    del saved  # its weights take as much memory as the gradient will
    progress = training.progress
    if not progress.before:
        progress.before = evaluate(training, arguments.batch)
    if train(training, arguments, stop, memory, lambda state: runs.save_checkpoint(key, state)):
        after = evaluate(training, arguments.batch)
        runs.add(key, describe(training, arguments, after, memory.is_exact))
    return training


def describe(
    training: Training, arguments: argparse.Namespace, after: dict[str, Any], is_exact: bool
) -> dict[str, Any]:
    """The result of a run, as JSON types; memory in bytes."""
    criterion, progress = training.criterion, training.progress
    weights = weight_bytes(arguments)
    network = sum(parameter.numel() for parameter in training.network.parameters())
    growth = progress.peak_growth or None
    above = None if growth is None else growth - 2 * weights
    if not is_exact and above is not None and above < 0:
        above = None  # hidden by an earlier peak
    return {
        "threads": torch.get_num_threads(),
        "scale": criterion.scale,
        "margin": getattr(criterion, "margin", None),
        "weight_lr": training.weight_optimizer.param_groups[0]["lr"],
        "before": progress.before,
        "after": after,
        "losses": progress.losses,
        "seconds": progress.seconds,
        "steps_per_second": round(len(progress.seconds) / sum(progress.seconds), 4),
        "measuring_seconds": round(progress.measuring_seconds, 3),
        "checkpoint_seconds": round(progress.checkpoint_seconds, 3),
        "memory": {
            "class_weights": weights,
            "gradient": weights,
            "network_and_optimizer": 4 * 4 * network,  # parameters, gradient, Adam's two moments
            "peak_growth": growth,
            "peak_growth_is_exact": is_exact,
            "above_weights_and_gradient": above,
            "eager_by_formula": eager_bytes_of(arguments),
        },
    }


def eager_loss(criterion: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The loss of `criterion` in plain PyTorch, margins on the gathered target cosines only."""
    cosines = F.linear(F.normalize(embeddings), F.normalize(criterion.weight))  # (N, C)
    target = labels[:, None]
    if isinstance(criterion, fm.CosFaceLoss):
        psi = cosines.gather(1, target) - criterion.margin
        cosines = cosines.scatter(1, target, psi)
    elif isinstance(criterion, fm.ArcFaceLoss):
        margin = criterion.margin
        u = cosines.gather(1, target)
        sine = (1 - u * u).clamp_min(1e-5).sqrt()
        past_pi = u < -math.cos(margin)
        psi = torch.where(
            past_pi, u - margin * math.sin(margin), u * math.cos(margin) - sine * math.sin(margin)
        )
        cosines = cosines.scatter(1, target, psi)
    return F.cross_entropy(cosines * criterion.scale, labels)


def compare(training: Training, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time forward + backward of the fused loss and of eager code, from the same weights.

    The first step of each, with nothing put aside, is for memory; the times are medians of the
    steps after it, in turns.
    """
    device, criterion = arguments.device, training.criterion
    observations, labels = training.identities.batch(0, arguments.batch)
    embeddings = embed(training.network, observations)
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fused": criterion,
        "eager": lambda rows, targets: eager_loss(criterion, rows, targets),
    }

    def step(name: str) -> tuple[float, float]:
        criterion.weight.grad = None
        leaf = embeddings.clone().requires_grad_()
        start = time.perf_counter()
        loss = contenders[name](leaf, labels)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        bar.update()
        return seconds, loss.item()

    growths: dict[str, int | None] = {}
    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    total = len(contenders) * (1 + COMPARED_STEPS)
    with tqdm(total=total, unit="step", desc="against eager", disable=arguments.quiet) as bar:
        for name in contenders:
            criterion.weight.grad = None
            fm.empty_cache()
            memory = PeakMemory(device)
            _, losses[name] = step(name)
            growth = memory.growth()
            growths[name] = None if growth is None else growth - weight_bytes(arguments)
        for _ in range(COMPARED_STEPS):
            for name in contenders:
                seconds[name].append(round(step(name)[0], 4))
    return {
        name: {
            "loss": losses[name],
            "seconds": seconds[name],
            "above_weights_and_gradient": growths[name],
        }
        for name in contenders
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] (--help lists them)",
        description="Train with a million classes: memory, time, and a loss that falls.",
    )
    count, size = whole_number(1), whole_number(1, 65_536)
    add = parser.add_argument
    shown = "default: %(default)s"
    add("--classes", type=whole_number(3), metavar="C", default=1_000_000, help=shown)
    add("--embedding", "--embedding-size", type=size, metavar="D", default=128, help=shown)
    add("--batch", "--batch-size", type=count, metavar="N", default=128, help=shown)
    add("--steps", type=count, metavar="N", default=100, help=shown)
    add(
        "--identities-seen", type=count, metavar="N",
        help="classes that batches are drawn from; default: 1024, or all if there are fewer",
    )  # fmt: skip
    add("--loss", choices=list(LOSSES), default="fixed_adacos", help=shown)
    add("--seed", type=whole_number(0), metavar="S", default=0, help=shown)
    add("--lr", type=learning_rate, default=1e-3, help=f"of Adam, for the network; {shown}")
    add(
        "--weight-lr", type=real_number(0, 1e6), metavar="LR",
        help="of SGD, for the class weights; default: batch / scale",
    )  # fmt: skip
    add("--threads", type=thread_count, metavar="N", help="on a CPU; default: as PyTorch chooses")
    add("--device", type=usable_device, help="cpu, cuda or cuda:INDEX; default: a GPU if any")
    add("--json", type=writable_file, metavar="FILE", help="keep the result here")
    add(
        "--checkpoint-every", type=count, metavar="STEPS",
        help="with --json, keep what an interrupted run goes on from; default: 50, and at Ctrl-C",
    )  # fmt: skip
    add("--resume", action="store_true", help="go on with the --json FILE, from its checkpoint")
    add("--compare-eager", action="store_true", help="then time eager code too, at the same size")
    add("--quiet", action="store_true", help="only the result: no progress bar")
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in what depends on other options."""
    arguments = parser.parse_args(argv)
    if arguments.identities_seen is None:
        arguments.identities_seen = min(1024, arguments.classes)
    elif arguments.identities_seen > arguments.classes:
        parser.error(
            f"--identities-seen {arguments.identities_seen}: there are only "
            f"{arguments.classes} --classes"
        )
    for option in ("resume", "checkpoint_every"):
        if getattr(arguments, option) and arguments.json is None:
            parser.error(f"--{option.replace('_', '-')} needs --json FILE")
    if arguments.checkpoint_every is None:
        arguments.checkpoint_every = 50
    if arguments.device is None:
        arguments.device = default_device()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_memory(parser, arguments)
    check_disk(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare if asked, print the report; return the exit code."""
    parser = make_parser()
    arguments = parse_arguments(parser, argv)
    names = ("classes", "embedding", "batch", "steps", "identities_seen", "lr", "weight_lr")
    settings = {
        "experiment": "million_classes",
        **{name: getattr(arguments, name) for name in names},
        "noise": NOISE,
        "device": str(arguments.device),
    }
    runs = open_runs(
        parser, arguments.json, settings, resume=arguments.resume,
        tabulate=lambda found: [describe_run(run, settings) for run in found],
    )  # fmt: skip
    key, comparison_key = (
        {"what": what, "loss": arguments.loss, "seed": arguments.seed}
        for what in ("training", "comparison")
    )
    if not arguments.quiet:
        threads = torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)} of the CPU"
        if arguments.device.type == "cuda":
            where = torch.cuda.get_device_name(arguments.device)
        print(
            f"{arguments.classes:,} classes x {arguments.embedding}, batches of {arguments.batch} "
            f"from {arguments.identities_seen:,} of them, {arguments.loss}, on {where}",
            file=sys.stderr,
        )
    training, run = None, runs.find(key)
    try:
        if run is None:
            with StopRequest() as stop:
                training = run_training(arguments, runs, key, stop)
            run = runs.find(key)
            if run is None:
                done = f"{len(training.progress.losses)} of {arguments.steps} steps"
                kept = "nothing is kept without --json" if runs.path is None else "--resume goes on"
                print(f"interrupted after {done}; {kept}", file=sys.stderr)
                return INTERRUPTED
        print(describe_run(run, runs.settings))
        if arguments.compare_eager:
            comparison = runs.find(comparison_key)
            if comparison is None:
                training = training or prepare(arguments)
                comparison = runs.add(comparison_key, compare(training, arguments))
            print(describe_run(comparison, runs.settings))
    except StoreError as error:
        parser.error(str(error))
    except DivergedError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
