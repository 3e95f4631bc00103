r"""Which class is nearest, and how a batch stands, without the (N, C) cosines.

One product with the class weights, block by block: of a million classes as of a thousand, memory
for a block and for what is asked for. Plain PyTorch on any device, without gradients, in fp32
(fp64). Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_margin import _validate
from fused_margin._numerics import accumulation_dtype
from fused_margin._weight_sweeps import _blocks, _normalized

__all__ = ["Evaluation", "Prediction", "evaluate", "predict"]

Tensor = torch.Tensor

# Bytes of a block's cosines, (N, B), or of its normalised weights, (B, D), whichever is larger
CPU_BYTES, OTHER_BYTES = 8 << 20, 128 << 20
# A class is nearer than the target if its cosine is larger by more than both may be rounded.
ROUNDINGS = 4


class Prediction(NamedTuple):
    """The nearest classes of each row, nearest first.

    Attributes:
        classes: (N, k) int64. cosines: (N, k), fp32 or fp64.
    """

    classes: Tensor
    cosines: Tensor


class Evaluation(NamedTuple):
    """How the target of each row stands among the classes; ignored rows are left out: N' of N.

    Attributes:
        target_cosine: u (eq. 1), (N',).
        rank: how many other classes are nearer than the target, (N',) int64.
        hardest_class: the nearest class but the target, (N',) int64. hardest_cosine: its cosine.
    """

    target_cosine: Tensor
    rank: Tensor
    hardest_class: Tensor
    hardest_cosine: Tensor

    def accuracy(self, k: int = 1) -> Tensor:
        """Share of the rows whose target is among their k nearest classes, 0-d; NaN of no rows."""
        k = _validate.size("k", k, 1)
        return (self.rank < k).to(self.target_cosine.dtype).mean()


def _cosines(embeddings: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First class and cosines, (N, B), of each block."""
    num_classes = weight.shape[0]
    dtype = accumulation_dtype(embeddings, weight)
    limit = CPU_BYTES if embeddings.device.type == "cpu" else OTHER_BYTES
    size = max(64, limit // (dtype.itemsize * max(*embeddings.shape, 1)))
    x_hat, _ = _normalized(embeddings.to(dtype))
    for start, stop in _blocks(num_classes, size):
        w_hat, _ = _normalized(weight[start:stop].to(dtype))
        yield start, x_hat @ w_hat.t()


@torch.no_grad()
def predict(embeddings: Tensor, weight: Tensor, k: int = 1) -> Prediction:
    """The k nearest classes of each row by cosine.

    Args:
        embeddings: (N, D), not normalised.
        weight: (C, D), C >= 2, as ``criterion.weight``.
        k: how many classes, from 1 to C.

    Returns:
        Classes and cosines, (N, k), nearest first. Which of several equally near ones comes first
        isn't defined.

    Raises:
        ValueError: k is more than C, or less than 1.
    """
    _validate.matrices(embeddings, weight)
    _validate.plain("weight", weight)
    k = _validate.at_most("k", _validate.size("k", k, 1), weight.shape[0], "the number of classes")
    with torch.autocast(embeddings.device.type, enabled=False):
        classes = torch.empty(embeddings.shape[0], 0, dtype=torch.int64, device=embeddings.device)
        cosines = embeddings.new_empty(classes.shape, dtype=accumulation_dtype(embeddings, weight))
        for start, block in _cosines(embeddings, weight):
            of_block = block.topk(min(k, block.shape[1]), dim=1)
            cosines = torch.cat([cosines, of_block.values], dim=1)
            classes = torch.cat([classes, of_block.indices + start], dim=1)
            cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
            classes = classes.gather(1, order)
    return Prediction(classes, cosines)


@torch.no_grad()
def evaluate(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> Evaluation:
    """Ranks and cosines of the targets, and the hardest other class of each row.

    Args:
        embeddings: (N, D), not normalised.
        weight: (C, D), C >= 2, as ``criterion.weight``.
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        ignore_index: label of rows to leave out.

    Returns:
        An `Evaluation`: ``.accuracy()``, ``.accuracy(5)``, ``.target_cosine.mean()``. A class as
        near as the target, up to rounding, doesn't count as nearer.

    Raises:
        ValueError: a label is out of range; that is read from the device.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    ignore_index, labels = _validate.ignore_index(ignore_index), labels.long()
    _validate.label_range(labels, weight.shape[0], ignore_index)
    rows = (labels != ignore_index).nonzero()[:, 0]
    x, labels = embeddings[rows], labels[rows]
    dtype = accumulation_dtype(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        x_hat, w_hat = (_normalized(part.to(dtype))[0] for part in (x, weight[labels]))
        target = (x_hat * w_hat).sum(dim=1)
        nearer = target + ROUNDINGS * torch.finfo(dtype).eps
        rank = torch.zeros_like(labels)
        hardest, cosine = torch.zeros_like(labels), torch.full_like(target, -float("inf"))
        for start, block in _cosines(x, weight):
            inside = ((labels >= start) & (labels < start + block.shape[1])).nonzero()[:, 0]
            block[inside, labels[inside] - start] = -float("inf")
            rank += (block > nearer[:, None]).sum(dim=1)
            of_block = block.max(dim=1)
            is_harder = of_block.values > cosine
            cosine = torch.where(is_harder, of_block.values, cosine)
            hardest = torch.where(is_harder, of_block.indices + start, hardest)
    return Evaluation(target.clamp(-1.0, 1.0), rank, hardest, cosine)
