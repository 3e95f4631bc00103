"""Train on synthetic identities with the classes split over ranks; stop and resume at any number.

    torchrun --nproc-per-node 2 examples/train_sharded.py --checkpoints DIR
    python examples/train_sharded.py --checkpoints DIR          # one process, the same training

Each rank holds a part of the class weights and takes a part of each batch. Gloo on a CPU, NCCL
where there is a GPU for each rank. The same command resumes from the newest complete checkpoint, on
as many ranks as it is started with: batches are drawn by the step's number, whoever takes which
rows, and losses are summed over the batch, so that only the order of sums depends on the ranks.

A checkpoint is written under another name and renamed when every rank is done: one that a kill cut
short is never loaded. It says what it was trained with, and another loss, number of identities,
embedding size or seed of the data is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from study.command import learning_rate, whole_number
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm

FEATURES, NOISE = 64, 0.7
KEPT = 2  # complete checkpoints
SETTINGS = "settings.json"  # in each
TEST_ROWS = 2048


class Identities:
    """Samples of identities: each a point, and noise around it. All follow from the seed."""

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.points = torch.randn(count, FEATURES, generator=self._generator(0))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 40) + number)

    def batch(self, number: int, rows: int) -> tuple[Tensor, Tensor]:
        """Features and labels of a batch, of which every rank takes its part."""
        generator = self._generator(1 + number)
        labels = torch.randint(len(self.points), (rows,), generator=generator)
        features = self.points[labels] + NOISE * torch.randn(rows, FEATURES, generator=generator)
        part = slice(*_part(rows))
        return features[part].to(self.device), labels[part].to(self.device)


def _part(rows: int) -> tuple[int, int]:
    """This rank's rows; ranks may have one more or less."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return rank * rows // ranks, (rank + 1) * rows // ranks


class Training:
    """A backbone in DDP, class weights in shards, one optimiser, and the number of steps done."""

    def __init__(self, settings: argparse.Namespace, device: torch.device) -> None:
        self.settings = settings
        self.data = Identities(settings.identities, settings.seed, device)
        torch.manual_seed(settings.seed)
        backbone = nn.Sequential(
            nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, settings.dim)
        ).to(device)
        with torch.device("meta"):  # no rank ever has all class weights
            criterion = fm.CosFaceLoss(settings.identities, settings.dim, scale=16.0)
        criterion.reduction = "sum"  # divided by the rows of all ranks below
        fm.distributed.shard_classes(criterion)
        criterion.to_empty(device=device)
        criterion.reset_parameters()
        self.criterion = criterion
        self.backbone = DistributedDataParallel(backbone)
        self.modules = nn.ModuleDict({"backbone": self.backbone, "criterion": criterion})
        groups = [{"params": self.backbone.parameters()}, {"params": criterion.parameters()}]
        self.optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
        self.step = 0

    @property
    def trained_with(self) -> dict[str, Any]:
        """What a checkpoint fits: of other settings it has other weights, or other people."""
        return {
            "loss": f"{type(self.criterion).__name__}, scale {self.criterion.scale:g}",
            "identities": self.settings.identities,
            "dim": self.settings.dim,
            "seed": self.settings.seed,
        }

    def train_step(self) -> Tensor:
        """The mean loss over the batch of all ranks."""
        features, labels = self.data.batch(self.step, self.settings.batch)
        loss = self.criterion(self.backbone(features), labels) / self.settings.batch
        # DDP averages over ranks, and so do the shards: the sum is what is wanted
        (loss * dist.get_world_size()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        total = loss.detach()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of new samples whose identity is the nearest class."""
        features, labels = self.data.batch((1 << 39) + 1, TEST_ROWS)
        found = self.criterion.logits(self.backbone.module(features)).argmax(dim=1)
        right = (found == labels).sum()
        dist.all_reduce(right)
        return right.item() / TEST_ROWS

    def state(self) -> dict[str, Any]:
        modules, optimizer = get_state_dict(self.modules, self.optimizer)
        return {"modules": modules, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def load(self, folder: Path) -> None:
        state = self.state()
        try:
            load(state, checkpoint_id=folder)
        except CheckpointException as error:  # of all ranks, whichever couldn't read
            first = next(iter(error.failures.values()))[0]
            what = f"{type(first).__name__} {first}".strip()
            stop(f"{folder} is damaged ({what}); delete it to resume from the one before")
        set_state_dict(
            self.modules,
            self.optimizer,
            model_state_dict=state["modules"],
            optim_state_dict=state["optimizer"],
        )
        self.step = int(state["step"])


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    names = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
    return sorted(path for path in names if path.is_dir())


def save(training: Training, folder: Path) -> None:
    """Write a checkpoint that other processes see when it is complete, or not at all."""
    final = folder / f"step-{training.step:08d}"
    part = folder / f"{final.name}.part"

    def begin() -> None:
        for path in (final, part):
            shutil.rmtree(path, ignore_errors=True)
        part.mkdir()

    def end() -> None:
        with (part / SETTINGS).open("w", encoding="utf-8") as file:
            json.dump(training.trained_with, file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(final)
        _synchronise(folder)
        for path in complete(folder)[:-KEPT]:
            shutil.rmtree(path)
        for path in folder.glob("step-*.part"):
            shutil.rmtree(path)

    on_first_rank(begin)
    write(training.state(), checkpoint_id=part)  # its files are synchronised to the disk
    dist.barrier()
    on_first_rank(end)


def _synchronise(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def newest(folder: Path, trained_with: dict[str, Any]) -> Path | None:
    """The checkpoint that all ranks load: what rank 0 finds, if it is of such a training."""

    def find() -> Path | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--checkpoints must name a folder: {error}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--checkpoints {folder} can't be written to; name another folder")
        paths = complete(folder)[-1:]
        what = difference(paths[0], trained_with) if paths else None
        if what is not None:
            raise ValueError(f"{what} give another --checkpoints folder")
        return paths[0] if paths else None

    return on_first_rank(find)


def on_first_rank(action: Callable[[], Any]) -> Any:
    """What rank 0 returns, on all ranks; if it fails, all of them end."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except (OSError, ValueError) as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        stop(told[1])
    return told[0]


def leave(status: int) -> NoReturn:
    """End this rank, once no other waits for its part of anything any more.

    At once: a thread of gloo that lets go of a tensor while the interpreter ends aborts the process
    (before Python 3.14).
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)


def stop(message: str) -> NoReturn:
    """End this rank with an error; the others do the same."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    leave(1)


def same_settings(settings: argparse.Namespace) -> None:
    """End if ranks were started with different ones."""
    mine = {name: str(value) for name, value in vars(settings).items()}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    for name in mine:
        values = [one[name] for one in told]
        if len(set(values)) > 1:
            option = f"--{name.replace('_', '-')}"
            stop(f"ranks have different {option}, {', '.join(values)} by rank; give all the same")


def difference(checkpoint: Path, trained_with: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint, or differs from what it was trained with; else None.

    What else can be done follows.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        return f"{checkpoint} has no {SETTINGS}, so it isn't of this example;"
    if not (checkpoint / ".metadata").is_file():
        return f"{checkpoint} has no .metadata, so it is damaged: delete it, or"
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return f"{path} is damaged: delete {checkpoint.name}, or"
    names = [name for name in trained_with if saved.get(name) != trained_with[name]]
    if not names:
        return None
    pairs = (f"{name} {saved.get(name)}, not {trained_with[name]}" for name in names)
    return f"{checkpoint} was trained with {'; '.join(pairs)}; give the same settings, or"


def parse_arguments() -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = whole_number(1)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder; all ranks see it")
    parser.add_argument("--identities", type=whole_number(3), default=2000, help="C (%(default)s)")
    parser.add_argument("--dim", type=number, default=32, help="D (%(default)s)")
    parser.add_argument("--batch", type=number, default=256, help="of all ranks (%(default)s)")
    parser.add_argument("--steps", type=number, default=400, help="in all (%(default)s)")
    parser.add_argument("--every", type=number, default=100, help="steps between checkpoints")
    parser.add_argument("--report", type=number, default=20, help="steps between lines")
    parser.add_argument("--learning-rate", type=learning_rate, default=1.0)
    parser.add_argument("--seed", type=whole_number(0, 1 << 20), default=0)
    parser.add_argument(
        "--timeout", type=number, default=60, help="seconds until a lost rank is an error"
    )
    return parser.parse_args()


def start(timeout: int) -> torch.device:
    """Join the other ranks that torchrun has started, or be the only one."""
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - it is documented
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not has_gpus:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def lines(training: Training, settings: argparse.Namespace) -> Iterator[str]:
    """Train, and say how it goes."""
    began = time.perf_counter()
    while training.step < settings.steps:
        loss = training.train_step()
        if training.step % settings.report == 0 or training.step == settings.steps:
            seconds = time.perf_counter() - began
            yield f"step {training.step:5}  loss {loss.item():8.4f}  {seconds:6.1f} s"
        if training.step % settings.every == 0 or training.step == settings.steps:
            save(training, settings.checkpoints)
    yield f"accuracy on new samples: {100 * training.accuracy():.2f} %"


def main() -> NoReturn:
    settings = parse_arguments()
    device = start(settings.timeout)
    same_settings(settings)
    is_first = dist.get_rank() == 0
    training = Training(settings, device)
    folder = newest(settings.checkpoints, training.trained_with)
    if folder is not None:
        training.load(folder)
    if is_first:
        what = "from the beginning" if folder is None else f"from {folder.name}"
        print(f"{dist.get_world_size()} ranks, {device.type}, {what}", flush=True)
        if training.step >= settings.steps:
            print(f"{training.step} steps are done already; raise --steps to go on", flush=True)
    for line in lines(training, settings):
        if is_first:
            print(line, flush=True)
    leave(0)


if __name__ == "__main__":
    main()
