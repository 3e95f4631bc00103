"""Train a small CNN on images of digits with three margin losses and with plain cross-entropy.

    python examples/train_digits.py                            # scikit-learn's digits, no download
    python examples/train_digits.py --data mnist --root DIR    # MNIST from its four IDX files

Every loss gets the same network, initial weights, order of batches and settings. The class
weights of a margin loss (`criterion.weight`) are trained together with the network, by the same
optimiser: they live in the criterion, so an optimiser over `model.parameters()` alone would leave
them at the random directions they started from.

Every loss is judged in two ways. "1-NN" is by the embeddings: the class of the nearest training
image, by cosine. On the training images it leaves the queried image itself out; with it in, it
would be 100 % whatever was learned. "arg max" is by the class weights: the class of the largest
logit, without a margin. The one tells how an embedding serves to compare images, also of classes
never seen; the other how network and class weights serve as a classifier.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from study.command import default_device, learning_rate, usable_device, versions, whole_number
from study.criteria import LinearCrossEntropy
from study.digits import NUM_CLASSES, DataError, Digits, load_mnist, load_scikit_learn_digits
from study.measure import DivergedError, arg_max_accuracy, embed, nearest_neighbour_accuracy
from study.store import write_text
from study.tables import number, plus_minus, text_table
from torch import Tensor, nn
from tqdm import tqdm

import fused_margin as fm

DEFAULT_EPOCHS = {"digits": 20, "mnist": 5}


class SmallCNN(nn.Module):
    """Two convolutions and a linear layer: square images (N, 1, size, size) -> (N, D).

    Batch normalisation stays where images still have pixels to average over, so that a last batch
    of a single image is no special case.
    """

    def __init__(self, image_size: int, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, embedding_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


LOSSES: dict[str, Callable[[int, int], nn.Module]] = {
    "arcface": fm.ArcFaceLoss,
    "cosface": fm.CosFaceLoss,
    "fixed_adacos": fm.FixedAdaCosLoss,
    "cross_entropy": LinearCrossEntropy,
}
MARGIN_UNITS = {"arcface": "rad", "cosface": "cos"}  # an angle, an offset of the cosine
ACCURACIES = {  # of `Result`, and how the table calls them
    "test_nearest": "test 1-NN %",
    "test_arg_max": "test arg max %",
    "train_nearest": "train 1-NN %",
    "train_arg_max": "train arg max %",
}
LEGEND = (
    "1-NN: class of the nearest training image, by the cosine of embeddings (train: other images)",
    "arg max: class of the largest logit, by the class weights and without a margin",
)


@dataclass(frozen=True)
class Result:
    """What one loss reached with one seed; accuracies in %, training time only."""

    loss: str
    seed: int
    scale: float | None
    margin: float | None
    test_nearest: float
    test_arg_max: float
    train_nearest: float
    train_arg_max: float
    seconds_per_epoch: float
    epoch_losses: list[float]


def run(name: str, data: Digits, seed: int, settings: argparse.Namespace) -> Result:
    """Train one loss from scratch, behind a progress bar, and measure it."""
    torch.manual_seed(seed)
    # The network is built before the criterion, so that all losses start from the same one.
    model = SmallCNN(data.train_images.shape[-1], settings.embedding_size).to(settings.device)
    criterion = LOSSES[name](NUM_CLASSES, settings.embedding_size).to(settings.device)
    epoch_losses, seconds = [], []
    title = f"{name:13} seed {seed}"
    with tqdm(total=settings.epochs, desc=title, unit="epoch", disable=settings.quiet) as bar:
        start = time.perf_counter()
        for loss in train(model, criterion, data, seed, settings):
            seconds.append(time.perf_counter() - start)
            epoch_losses.append(loss)
            if not math.isfinite(loss):
                raise DivergedError(f"{name}, epoch {len(seconds)}: loss {loss}; lower --lr")
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            start = time.perf_counter()
    return Result(
        loss=name,
        seed=seed,
        scale=getattr(criterion, "scale", None),
        margin=getattr(criterion, "margin", None),
        **evaluate(model, criterion, data),
        seconds_per_epoch=statistics.median(seconds),
        epoch_losses=epoch_losses,
    )


def train(
    model: nn.Module, criterion: nn.Module, data: Digits, seed: int, settings: argparse.Namespace
) -> Iterator[float]:
    """Train network and criterion together; yield the mean loss of every epoch."""
    # The class weights of a margin loss are in the criterion: both sets of parameters are needed.
    optimiser = torch.optim.Adam(chain(model.parameters(), criterion.parameters()), lr=settings.lr)
    shuffle = torch.Generator().manual_seed(seed)
    count, device = len(data.train_images), data.train_images.device
    for _ in range(settings.epochs):
        model.train()
        total = torch.zeros((), device=device)
        # The last batch may be smaller; it is trained on like the others.
        for batch in torch.randperm(count, generator=shuffle).to(device).split(settings.batch_size):
            loss = criterion(model(data.train_images[batch]), data.train_labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(batch)  # on the device: no wait after every batch
        yield total.item() / count


def evaluate(model: nn.Module, criterion: nn.Module, data: Digits) -> dict[str, float]:
    """Measure the accuracies of a result, in %, by both measures whatever the loss."""
    train = embed(model, data.train_images), data.train_labels
    test = embed(model, data.test_images), data.test_labels
    return {
        "test_nearest": nearest_neighbour_accuracy(*test, *train),
        "test_arg_max": arg_max_accuracy(criterion, *test),
        "train_nearest": nearest_neighbour_accuracy(*train, *train, leave_one_out=True),
        "train_arg_max": arg_max_accuracy(criterion, *train),
    }


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Collect the results of each loss over its seeds: mean, sample standard deviation, median."""
    rows = []
    for name in dict.fromkeys(result.loss for result in results):
        runs = [result for result in results if result.loss == name]
        row = {"loss": name, "scale": runs[0].scale, "margin": runs[0].margin, "runs": len(runs)}
        for key in ACCURACIES:
            values = [getattr(result, key) for result in runs]
            row[key] = statistics.fmean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        row["seconds_per_epoch"] = statistics.median(result.seconds_per_epoch for result in runs)
        rows.append(row)
    return rows


def format_table(results: Sequence[Result]) -> str:
    """Lay the results out as text, one line for each loss, and say what the columns are."""
    header = ("loss", "scale", "margin", *ACCURACIES.values(), "s/epoch", "runs")
    rows = [
        (
            row["loss"],
            number(row["scale"]),
            f"{number(row['margin'])} {MARGIN_UNITS.get(row['loss'], '')}".rstrip(),
            *(plus_minus(row[key], row[f"{key}_std"]) for key in ACCURACIES),
            number(row["seconds_per_epoch"], 3),
            str(row["runs"]),
        )
        for row in summarise(results)
    ]
    return "\n".join([text_table(header, rows), *LEGEND])


def describe_run(
    settings: argparse.Namespace, data: Digits, status: str, results: Sequence[Result]
) -> dict[str, Any]:
    """Gather everything that says what was run and what came out, as JSON types."""
    return {
        "status": status,
        "settings": {
            **vars(settings),
            "root": settings.root and str(settings.root),
            "device": str(settings.device),
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "summary": summarise(results),
        "results": [dataclasses.asdict(result) for result in results],
    }


def write_json(target: str, content: dict[str, Any]) -> None:
    """Write to standard output for "-", else to a file that is replaced whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    write_text(Path(target), text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] (--help lists them)",
        description="Train a small CNN on digits with margin losses and with cross-entropy.",
    )
    count, seed = whole_number(1), whole_number(0)
    epochs = ", ".join(f"{epochs} for {data}" for data, epochs in DEFAULT_EPOCHS.items())
    losses = list(LOSSES)
    add = parser.add_argument
    add("--data", choices=list(DEFAULT_EPOCHS), default="digits", help="default: %(default)s")
    add("--root", type=Path, metavar="DIR", help="folder of MNIST's four IDX files, raw or gzip")
    add("--limit", type=whole_number(2), metavar="N", help="train on the first N images only")
    add("--losses", nargs="+", choices=losses, default=losses, help="default: all, in this order")
    add("--epochs", type=count, metavar="N", help=f"default: {epochs}")
    add("--batch-size", type=count, metavar="N", default=128, help="default: %(default)s")
    size = whole_number(1, 65_536)
    add("--embedding-size", type=size, metavar="D", default=128, help="default: %(default)s")
    add("--lr", type=learning_rate, default=1e-3, help="of Adam; default: %(default)s")
    add_seeds = parser.add_mutually_exclusive_group().add_argument
    add_seeds(
        "--seed", dest="seeds", type=seed, nargs=1, metavar="S", default=[0], help="default: 0"
    )
    add_seeds(
        "--seeds", type=seed, nargs="+", metavar="S", help="a run for each: mean ± sample std"
    )
    add("--device", type=usable_device, help="cpu, cuda or cuda:INDEX; default: a GPU if any")
    add("--json", metavar="FILE", help="write settings and results; - is standard output")
    add("--quiet", action="store_true", help="only the table: no progress bars")
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse and check the command line; fill in the defaults that depend on other options."""
    settings = parser.parse_args(argv)
    for option in ("losses", "seeds"):
        values = getattr(settings, option)
        if len(set(values)) < len(values):
            parser.error(f"--{option}: each only once, got {' '.join(map(str, values))}")
    if settings.data == "mnist" and settings.root is None:
        parser.error("--data mnist needs --root DIR, the folder that holds its four IDX files")
    if settings.data != "mnist" and settings.root is not None:
        parser.error("--root is for --data mnist; add that, or leave --root out")
    if settings.json not in (None, "-"):
        target = Path(settings.json)
        if target.is_dir() or not os.access(target.parent, os.W_OK):
            parser.error(f"--json: can't write {settings.json!r}; name a file in a writable folder")
    if settings.epochs is None:
        settings.epochs = DEFAULT_EPOCHS[settings.data]
    if settings.device is None:
        settings.device = default_device()
    return settings


def load_data(settings: argparse.Namespace) -> Digits:
    """Load the images the settings ask for and put them on the device."""
    data = load_mnist(settings.root) if settings.data == "mnist" else load_scikit_learn_digits()
    if settings.limit is not None:
        if settings.limit > len(data.train_images):
            raise DataError(
                f"--limit {settings.limit}: there are only {len(data.train_images)} training images"
            )
        data = data.limited(settings.limit)
    return data.to(settings.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every loss with every seed, print the table, write the JSON; return the exit code."""
    parser = make_parser()
    settings = parse_settings(parser, argv)
    try:
        data = load_data(settings)
    except DataError as error:
        parser.error(str(error))
    torch.backends.cudnn.deterministic = True  # a seed gives the same result again
    if not settings.quiet:
        images = f"{len(data.train_images)} training images, {len(data.test_images)} test images"
        print(f"{settings.data}: {images}, on {settings.device}", file=sys.stderr)

    results: list[Result] = []
    status, exit_code = "complete", 0
    try:
        for seed, name in product(settings.seeds, settings.losses):
            result = run(name, data, seed, settings)
            results.append(result)  # counts even if the next one is interrupted
    except KeyboardInterrupt:
        print(f"interrupted with {len(results)} runs finished", file=sys.stderr)
        status, exit_code = "interrupted", 130
    except DivergedError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        status, exit_code = "diverged", 1

    print(format_table(results), file=sys.stderr if settings.json == "-" else sys.stdout)
    if settings.json is not None:
        write_json(settings.json, describe_run(settings, data, status, results))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
