"""Run what is left of a study: progress bar, checkpoints, interruption."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .command import (
    default_device,
    learning_rate,
    thread_count,
    usable_device,
    whole_number,
    writable_file,
)
from .measure import DivergedError
from .store import Runs, StoreError, reading
from .training import Progress, Recipe, fit

INTERRUPTED, FAILED = 130, 1  # exit codes
PUBLISHED_LR, MENDED_LR = 0.01, 0.001


@dataclass
class Training:
    """All that one run trains with."""

    network: nn.Module
    criterion: nn.Module
    regularizer: nn.Module | None
    images: Tensor
    labels: Tensor
    recipe: Recipe
    seed: int


@dataclass(frozen=True)
class Job:
    """One run: its key among the runs, and what to do. Nothing is built before its turn.

    Attributes:
        key: what tells this run from the others.
        prepare: builds network, criterion and data.
        measure: returns the result, JSON types, of what was trained.
    """

    key: dict[str, Any]
    prepare: Callable[[], Training]
    measure: Callable[[Training, Progress], dict[str, Any]]

    @property
    def title(self) -> str:
        def part(name: str, value: Any) -> str:
            if value is True:
                return name
            return str(value) if name == "loss" else f"{name} {value}"

        return " ".join(part(*item) for item in self.key.items())


def run_jobs(runs: Runs, jobs: Sequence[Job], epochs: int, *, quiet: bool) -> int:
    """Run the jobs that aren't finished yet, one after the other; return the exit code.

    Every run is saved when it is finished and can be gone on with from its last epoch.
    """
    left = [job for job in jobs if runs.find(job.key) is None]
    total, done = epochs * len(jobs), epochs * (len(jobs) - len(left))
    code = 0
    with tqdm(total=total, initial=done, unit="epoch", disable=quiet, smoothing=0.05) as bar:
        try:
            for job in left:
                bar.set_description_str(job.title)
                try:
                    run_job(runs, job, bar)
                except DivergedError as error:  # the other losses are still worth having
                    print(f"\nerror: {job.title}, {error}: it has no result", file=sys.stderr)
                    code = FAILED
        except KeyboardInterrupt:
            kept = sum(runs.find(job.key) is not None for job in jobs)
            is_there = any(file and file.exists() for file in (runs.path, runs.checkpoint_path))
            hint = "; --resume goes on from the last epoch" if is_there else ""
            print(f"\ninterrupted with {kept} of {len(jobs)} runs finished{hint}", file=sys.stderr)
            return INTERRUPTED
        except StoreError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return FAILED
    return code


def run_job(runs: Runs, job: Job, bar: tqdm[Any]) -> None:
    """Train, from the checkpoint if it is this job's; measure; save.

    Raises:
        DivergedError: a loss or an embedding is not finite.
        StoreError: a checkpoint or the result can't be read or written.
    """
    training = job.prepare()
    saved = runs.load_checkpoint(job.key)
    progress = Progress()
    if saved is not None:
        with runs.restoring():
            progress = Progress.restored(saved["progress"])
    bar.update(len(progress.losses))
    for progress in fit(
        training.network,
        training.criterion,
        training.regularizer,
        training.images,
        training.labels,
        training.recipe,
        training.seed,
        resume_from=saved,
        restoring=runs.restoring,
        checkpoint=lambda state: runs.save_checkpoint(job.key, state),
    ):
        bar.set_postfix_str(f"loss {progress.losses[-1]:.4f}", refresh=False)
        bar.update()
    runs.add(job.key, job.measure(training, progress))


def add_run_arguments(
    parser: argparse.ArgumentParser,
    *,
    seeds: Sequence[int],
    batch_size: int,
    embedding_size: int,
    learning_rates: str = "0.001",
) -> None:
    """Add the options every study has; `parse_run_arguments` checks them."""
    count, seed = whole_number(1), whole_number(0)
    add = parser.add_argument
    add("--epochs", type=count, metavar="N", default=10, help="default: %(default)s")
    add("--batch-size", type=count, metavar="N", default=batch_size, help="default: %(default)s")
    size = whole_number(1, 65_536)
    add(
        "--embedding-size", type=size, metavar="D", default=embedding_size,
        help="default: %(default)s",
    )  # fmt: skip
    add("--lr", type=learning_rate, metavar="LR", help=f"of Adam; default: {learning_rates}")
    seed_list = " ".join(map(str, seeds))
    add(
        "--seeds", type=seed, nargs="+", metavar="S", default=list(seeds),
        help=f"everything runs once with each; default: {seed_list}",
    )  # fmt: skip
    add(
        "--precision", choices=("fp32", "bf16"), default="fp32",
        help="of the network in training (bf16: autocast); loss and measuring are fp32; "
        "default: %(default)s",
    )  # fmt: skip
    add("--threads", type=thread_count, metavar="N", help="on a CPU; default: as PyTorch chooses")
    add("--device", type=usable_device, help="cpu, cuda or cuda:INDEX; default: a GPU if any")
    add("--json", type=writable_file, metavar="FILE", help="keep every finished run here")
    add("--resume", action="store_true", help="go on with the runs in the --json FILE")
    add("--quiet", action="store_true", help="only the table: no progress bar")


def choose_published(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    known: Collection[str],
    default: Sequence[str],
) -> None:
    """Settle losses and learning rate, which depend on --as-published; refuse unknown losses."""
    if arguments.losses is None:
        arguments.losses = list(default)
    unknown = [name for name in arguments.losses if name not in known]
    if unknown:
        how = "--as-published" if arguments.as_published else "without --as-published"
        parser.error(f"--losses {' '.join(unknown)}: {how} there are {', '.join(known)}")
    if arguments.lr is None:
        arguments.lr = PUBLISHED_LR if arguments.as_published else MENDED_LR


def check_run_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what doesn't go together, and fill in what depends on the machine."""
    for name in ("losses", "seeds", "confirm_seeds", "scales", "margins"):
        values = getattr(arguments, name, [])
        if len(set(values)) < len(values):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option}: each only once, got {' '.join(map(str, values))}")
    if arguments.resume and arguments.json is None:
        parser.error("--resume needs --json FILE, the file to go on with")
    if arguments.device is None:
        arguments.device = default_device()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True  # a seed gives the same result again


def open_runs(
    parser: argparse.ArgumentParser,
    path: Path | None,
    settings: dict[str, Any],
    *,
    resume: bool,
    tabulate: Callable[[list[dict[str, Any]]], object],
) -> Runs:
    """Open the file of results, or end with an error that says why not.

    `tabulate` is what will be done with the runs at the end: better that it fails now.
    """
    try:
        runs = Runs(path, settings, resume=resume)
        with reading(path):
            tabulate(runs.runs)
    except StoreError as error:
        parser.error(str(error))
    return runs
