"""Training of a network with a criterion, the same for every loss, interruptible at every epoch."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .measure import DivergedError, embed

PROBE_IMAGES = 2000
HISTOGRAM_BINS = 40  # of cosines, from -1 to 1


@dataclass(frozen=True)
class Recipe:
    """How every loss of a study is trained: Adam over the network and the class weights.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in a step; the last batch of an epoch may be smaller.
        lr: learning rate.
        train_class_weights: False leaves the class weights at their random start.
        flip: mirror each training image with probability 1/2.
        precision: "bf16" trains the network under autocast; loss and measuring are fp32 either way.
        record_cosines: keep histograms of the cosines before training and after every epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    train_class_weights: bool = True
    flip: bool = False
    precision: str = "fp32"
    record_cosines: bool = False


class Network(nn.Module):
    """A network that trains in `precision`, is measured in fp32, and has outputs in fp32.

    Images and convolutions are channels-last, which is faster in either precision.
    """

    def __init__(self, body: nn.Module, precision: str) -> None:
        super().__init__()
        # torch's stubs lack this overload
        self.body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        half = self.precision == "bf16" and self.training
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            return self.body(images).float()


@dataclass
class Progress:
    """What is known of a run after some epochs: plain numbers, for JSON.

    Attributes:
        losses: mean training loss of each epoch, regulariser included.
        seconds: time of each epoch's training, measuring excluded.
        cosines: before the first epoch and after each: histograms "target" and "hardest_negative".
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    cosines: list[dict[str, list[int]]] = dataclasses.field(default_factory=list)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Progress:
        """Make it of what `dataclasses.asdict` made of one.

        Raises:
            TypeError: it isn't that.
        """
        progress = cls(**saved)
        if not all(isinstance(values, list) for values in vars(progress).values()):
            raise TypeError("progress is not made of lists")
        return progress


def fit(
    network: nn.Module,
    criterion: nn.Module,
    regularizer: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    *,
    resume_from: Any | None = None,
    restoring: Callable[[], AbstractContextManager[None]] = nullcontext,
    checkpoint: Callable[[Any], None] = lambda state: None,
) -> Iterator[Progress]:
    """Train; yield the progress after every epoch, when `checkpoint` has been given the state.

    `resume_from` is such a state; it is read inside of `restoring`.

    The seed decides the order of the images, dropout and mirroring. A run that goes on from a
    checkpoint gives the same bits as one that was never interrupted.

    Raises:
        DivergedError: the loss of an epoch is not finite.
    """
    # The class weights of a margin loss are in the criterion, not in the network.
    criterion.requires_grad_(recipe.train_class_weights)
    parameters = [p for p in chain(network.parameters(), criterion.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    progress = Progress()
    if resume_from is not None:
        with restoring():
            network.load_state_dict(resume_from["network"])
            criterion.load_state_dict(resume_from["criterion"])
            optimizer.load_state_dict(resume_from["optimizer"])
            order.set_state(resume_from["order"])
            restore_random_state(resume_from["random"])
            progress = Progress.restored(resume_from["progress"])
    elif recipe.record_cosines:
        progress.cosines.append(cosine_histograms(network, criterion, images, labels))
    while len(progress.losses) < recipe.epochs:
        start = time.perf_counter()
        loss = train_epoch(
            network, criterion, regularizer, optimizer, images, labels, recipe, order
        )
        progress.seconds.append(round(time.perf_counter() - start, 3))
        progress.losses.append(loss)
        if not math.isfinite(loss):
            raise DivergedError(f"epoch {len(progress.losses)}: loss {loss}; lower --lr")
        if recipe.record_cosines:
            progress.cosines.append(cosine_histograms(network, criterion, images, labels))
        checkpoint(
            {
                "network": network.state_dict(),
                "criterion": criterion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "order": order.get_state(),
                "random": random_state(images.device),
                "progress": dataclasses.asdict(progress),
            }
        )
        yield progress


def train_epoch(
    network: nn.Module,
    criterion: nn.Module,
    regularizer: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    order: torch.Generator,
) -> float:
    """Train on every image once; return the mean loss."""
    network.train()
    device = images.device
    total = torch.zeros((), device=device)
    for batch in torch.randperm(len(images), generator=order).to(device).split(recipe.batch_size):
        batch_images = images[batch]
        if recipe.flip:
            mirrored = (torch.rand(len(batch), generator=order) < 0.5).to(device)
            batch_images = torch.where(
                mirrored[:, None, None, None], batch_images.flip(-1), batch_images
            )
        loss = criterion(network(batch_images), labels[batch])
        if regularizer is not None:
            loss = loss + regularizer(criterion.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)  # on the device: no wait after every batch
    return total.item() / len(images)


@torch.no_grad()
def cosine_histograms(
    network: nn.Module, criterion: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, list[int]]:
    """Count the cosines of the first training images with their class and with the nearest other.

    Measured without dropout. A criterion without class weights has no cosines: empty counts.
    """
    weight = getattr(criterion, "weight", None)
    if weight is None:
        return {"target": [], "hardest_negative": []}
    embeddings = embed(network, images[:PROBE_IMAGES])
    rows = labels[:PROBE_IMAGES, None]
    cosines = F.normalize(embeddings) @ F.normalize(weight.float()).T
    rows_per_class = getattr(criterion, "sub_centers", 1)
    cosines = cosines.unflatten(1, (-1, rows_per_class)).amax(dim=2)
    target = cosines.gather(1, rows)
    hardest = cosines.scatter(1, rows, -math.inf).amax(dim=1)

    def counts(values: Tensor) -> list[int]:
        inside = values.clamp(-1, 1)  # rounding can pass 1
        return inside.cpu().histc(HISTOGRAM_BINS, -1, 1).long().tolist()

    return {"target": counts(target), "hardest_negative": counts(hardest)}


def random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def restore_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0].cpu())
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1].cpu())
