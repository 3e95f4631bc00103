r"""Which class is nearest, and how a batch stands, without the (N, C) cosines.

One product with the class weights, block by block: of a million classes as of a thousand, memory
for a block and for what is asked for. Plain PyTorch on any device, without gradients, in fp32
(fp64). Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_margin import _names, _validate, _validate_others
from fused_margin._centers import nearest_centers
from fused_margin._numerics import accumulation_dtype, normalized, sum_dtype
from fused_margin._weight_sweeps import _blocks

__all__ = [
    "Evaluation",
    "Prediction",
    "center_counts",
    "dominant_centers",
    "evaluate",
    "outlier_angles",
    "predict",
]

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
    """How the target of each row stands among the classes.

    From `evaluate` ignored rows are left out, N' of N. From a loss that was asked with
    ``return_stats=True`` they are there: -1, NaN for cosines.

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
        is_counted = self.rank >= 0
        is_right = is_counted & (self.rank < k)
        return is_right.sum().to(self.target_cosine.dtype) / is_counted.sum()


def _limit(like: Tensor) -> int:
    return CPU_BYTES if like.device.type == "cpu" else OTHER_BYTES


def _cosines(embeddings: Tensor, weight: Tensor, sub_centers: int) -> Iterator[tuple[int, Tensor]]:
    """First class and cosines, (N, B), of each block of classes."""
    num_classes = weight.shape[0] // sub_centers
    dtype = accumulation_dtype(embeddings, weight)
    row_bytes = dtype.itemsize * max(*embeddings.shape, 1) * sub_centers
    x_hat, _ = normalized(embeddings.to(dtype))
    for start, stop in _blocks(num_classes, max(64 // sub_centers, _limit(weight) // row_bytes)):
        w_hat, _ = normalized(weight[start * sub_centers : stop * sub_centers].to(dtype))
        cosines = x_hat @ w_hat.t()
        if sub_centers > 1:
            cosines = cosines.unflatten(1, (-1, sub_centers)).amax(dim=2)
        yield start, cosines


@torch.no_grad()
@_names.hinting
def predict(embeddings: Tensor, weight: Tensor, k: int = 1, *, sub_centers: int = 1) -> Prediction:
    """The k nearest classes of each row by cosine.

    Args:
        embeddings: (N, D), not normalised.
        weight: (C, D), C >= 2, as ``criterion.weight``; (C K, D) with sub-centres.
        k: how many classes, from 1 to C.
        sub_centers: K rows of weights for each class, of which the nearest counts.

    Returns:
        Classes and cosines, (N, k), nearest first. Which of several equally near ones comes first
        isn't defined.

    Raises:
        ValueError: k is more than C, or less than 1.
    """
    _validate.matrices(embeddings, weight)
    _validate.plain("weight", weight)
    sub_centers = _validate.size("sub_centers", sub_centers, 1)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    k = _validate.at_most("k", _validate.size("k", k, 1), num_classes, "the number of classes")
    with torch.autocast(embeddings.device.type, enabled=False):
        classes = torch.empty(embeddings.shape[0], 0, dtype=torch.int64, device=embeddings.device)
        cosines = embeddings.new_empty(classes.shape, dtype=accumulation_dtype(embeddings, weight))
        for start, block in _cosines(embeddings, weight, sub_centers):
            of_block = block.topk(min(k, block.shape[1]), dim=1)
            cosines = torch.cat([cosines, of_block.values], dim=1)
            classes = torch.cat([classes, of_block.indices + start], dim=1)
            cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
            classes = classes.gather(1, order)
    return Prediction(classes, cosines)


@torch.no_grad()
@_names.hinting
def evaluate(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    sub_centers: int = 1,
) -> Evaluation:
    """Ranks and cosines of the targets, and the hardest other class of each row.

    Args:
        embeddings: (N, D), not normalised.
        weight: (C, D), C >= 2, as ``criterion.weight``; (C K, D) with sub-centres.
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        ignore_index: label of rows to leave out.
        sub_centers: K rows of weights for each class, of which the nearest counts.

    Returns:
        An `Evaluation`: ``.accuracy()``, ``.accuracy(5)``, ``.target_cosine.mean()``. A class as
        near as the target, up to rounding, doesn't count as nearer.

    Raises:
        ValueError: a label is out of range; that is read from the device.
    """
    labels = _checked(embeddings, weight, labels, ignore_index, sub_centers)
    rows = (labels != ignore_index).nonzero()[:, 0]
    x, labels = embeddings[rows], labels[rows]
    dtype = accumulation_dtype(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        target = nearest_centers(x, weight, labels, sub_centers)[1].to(dtype)
        nearer = target + ROUNDINGS * torch.finfo(dtype).eps
        rank = torch.zeros_like(labels)
        hardest, cosine = torch.zeros_like(labels), torch.full_like(target, -float("inf"))
        for start, block in _cosines(x, weight, sub_centers):
            inside = ((labels >= start) & (labels < start + block.shape[1])).nonzero()[:, 0]
            block[inside, labels[inside] - start] = -float("inf")
            rank += (block > nearer[:, None]).sum(dim=1)
            of_block = block.max(dim=1)
            is_harder = of_block.values > cosine
            cosine = torch.where(is_harder, of_block.values, cosine)
            hardest = torch.where(is_harder, of_block.indices + start, hardest)
    # nothing is nearer than NaN by comparison, and such a row isn't right
    rank = torch.where(target.isnan(), weight.shape[0] // sub_centers - 1, rank)
    return Evaluation(target, rank, hardest, cosine)


def _checked(
    embeddings: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, sub_centers: int
) -> Tensor:
    """Labels (N,) int64, of checked arguments."""
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    num_classes = _validate.centers(weight.shape[0], _validate.size("sub_centers", sub_centers, 1))
    labels = labels.long()
    _validate.label_range(labels, num_classes, _validate.ignore_index(ignore_index))
    return labels


# --- sub-centres and what lies far from them ------------------------------------------------------


@torch.no_grad()
@_names.hinting
def center_counts(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """How many rows of each class are nearest to each of its centres.

    Counts of parts of a data set, or of ranks, add up to those of the whole. O(N K D).

    Args:
        embeddings: (N, D), not normalised.
        weight: (C K, D), as ``criterion.weight`` of a loss with ``sub_centers=K``.
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        sub_centers: K.
        ignore_index: label of rows to leave out.

    Returns:
        (C, K) int64.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces,
        ECCV 2020, section 3.4.
    """
    labels = _checked(embeddings, weight, labels, ignore_index, sub_centers)
    with torch.autocast(embeddings.device.type, enabled=False):
        found = [
            nearest_centers(embeddings[rows], weight, labels[rows], sub_centers)[0]
            for rows in _row_blocks(embeddings)
        ]
    nearest = torch.cat([labels[:0], *found])[labels != ignore_index]
    return torch.bincount(nearest, minlength=weight.shape[0]).unflatten(0, (-1, sub_centers))


def dominant_centers(counts: Tensor) -> Tensor:
    """The centre to which most rows of each class are nearest, as a row of the weight.

    ``weight[dominant_centers(counts)]`` is the weight, (C, D), of a loss without sub-centres.

    Args:
        counts: (C, K), from `center_counts`.

    Returns:
        (C,) int64: K k + j for centre j of class k; the first of several, so the first of a class
        without rows.
    """
    num_classes, sub_centers = _validate_others.center_counts(counts).shape
    first = sub_centers * torch.arange(num_classes, device=counts.device)
    return first + counts.argmax(dim=1)


@torch.no_grad()
@_names.hinting
def outlier_angles(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """Angles of rows to one centre of their class, by which wrong labels are found.

    Sub-center ArcFace drops what is farther than 75 degrees from the dominant centre, and trains
    anew without sub-centres.

    Args:
        embeddings: (N, D), not normalised.
        weight: (C K, D).
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        centers: (C,) int64, rows of the weight, from `dominant_centers`.
        ignore_index: label of rows to leave out.

    Returns:
        (N,) radians, in [0, pi], fp32 or fp64; NaN where a row is ignored.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces,
        ECCV 2020, section 3.4.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    num_classes = _validate_others.rows_of("centers", centers, weight)
    labels, wide = labels.long(), sum_dtype(embeddings, weight)
    _validate.label_range(labels, num_classes, _validate.ignore_index(ignore_index))
    angles = embeddings.new_empty(labels.shape, dtype=accumulation_dtype(embeddings, weight))
    with torch.autocast(embeddings.device.type, enabled=False):
        for rows in _row_blocks(embeddings):
            own = weight[centers[labels[rows].clamp(0, num_classes - 1)]]
            x_hat, w_hat = (normalized(part.to(wide))[0] for part in (embeddings[rows], own))
            cosines = (x_hat * w_hat).sum(dim=1)
            angles[rows] = cosines.clamp_(-1.0, 1.0).acos_().to(angles.dtype)
    return angles.masked_fill_(labels == ignore_index, float("nan"))


def _row_blocks(embeddings: Tensor) -> Iterator[slice]:
    size = max(1, _limit(embeddings) // (8 * embeddings.shape[1]))
    for start, stop in _blocks(embeddings.shape[0], size):
        yield slice(start, stop)
