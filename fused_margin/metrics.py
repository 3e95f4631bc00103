r"""Which class is nearest, and how a batch stands, without the (N, C) cosines.

One product with the class weights, block by block: of a million classes as of a thousand, memory
for a block and for what is asked for. Plain PyTorch on any device, without gradients, in fp32
(fp64). Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_margin import _centers, _compiled, _names, _validate, _validate_others
from fused_margin._centers import nearest_centers
from fused_margin._numerics import accumulation_dtype, normalized, sum_dtype
from fused_margin._weight_sweeps import _blocks
from fused_margin.distributed import _metrics as _sharded

__all__ = [
    "Evaluation",
    "Outliers",
    "Prediction",
    "center_counts",
    "dominant_centers",
    "evaluate",
    "outlier_angles",
    "outliers",
    "predict",
]

Tensor = torch.Tensor
Standings = tuple[Tensor, Tensor, Tensor]

# Bytes of a block's cosines, (N, B), or of its normalised weights, (B, D), whichever is larger
CPU_BYTES, OTHER_BYTES = 8 << 20, 128 << 20
# Rows of the batch that blocks are made for in a compiled graph
TRACED_ROWS = 1024
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

    An ignored row has NaN for cosines, and -1: ``.target_cosine.nanmean()`` leaves it out,
    ``.rank[found.is_counted]`` too.

    Attributes:
        target_cosine: u (eq. 1), (N,).
        rank: how many other classes are nearer than the target, (N,) int64.
        hardest_class: the nearest class but the target, (N,) int64. hardest_cosine: its cosine.
    """

    target_cosine: Tensor
    rank: Tensor
    hardest_class: Tensor
    hardest_cosine: Tensor

    @property
    def is_counted(self) -> Tensor:
        """Whether a row is not ignored, (N,)."""
        return self.rank >= 0

    def accuracy(self, k: int = 1) -> Tensor:
        """Share of the rows whose target is among their k nearest classes, 0-d.

        Ignored rows don't count; of no other row it is NaN, as any mean. A row that isn't finite
        is never right. k may be more than there are classes, and is then as many.
        """
        k = _validate.size("k", k, 1)
        is_right = self.is_counted & (self.rank < k) & ~self.target_cosine.isnan()
        return is_right.sum().to(self.target_cosine.dtype) / self.is_counted.sum()


def _limit(like: Tensor) -> int:
    return CPU_BYTES if like.device.type == "cpu" else OTHER_BYTES


def _cosines(embeddings: Tensor, weight: Tensor, sub_centers: int) -> Iterator[tuple[int, Tensor]]:
    """First class and cosines, (N, B), of each block of classes."""
    num_classes = weight.shape[0] // sub_centers
    dtype = accumulation_dtype(embeddings, weight)
    # a graph is for any N: how many blocks there are must not depend on it
    num_rows = TRACED_ROWS if torch.compiler.is_compiling() else embeddings.shape[0]
    row_bytes = dtype.itemsize * max(num_rows, embeddings.shape[1], 1) * sub_centers
    x_hat, _ = normalized(embeddings.to(dtype))
    for start, stop in _blocks(num_classes, max(64 // sub_centers, _limit(weight) // row_bytes)):
        w_hat, _ = normalized(weight[start * sub_centers : stop * sub_centers].to(dtype))
        cosines = x_hat @ w_hat.t()
        if sub_centers > 1:
            cosines = cosines.unflatten(1, (-1, sub_centers)).amax(dim=2)
        yield start, cosines


def class_rows(weight: Tensor | nn.Module, sub_centers: int | None) -> tuple[Tensor, int]:
    """Class weights (C K, D) and K, of a criterion or as they were given."""
    if isinstance(weight, nn.Module):
        weight, own = _validate_others.class_weights(weight)
        _validate_others.same_centers(sub_centers, own)
        return weight, own
    if sub_centers is None:
        own = _centers.declared(weight) if isinstance(weight, Tensor) else None
        if own is not None:
            _validate_others.undeclared_centers(own)
        return weight, 1
    return weight, _validate.size("sub_centers", sub_centers, 1)


@torch.no_grad()
@_compiled.raising(num_outputs=2, returned=Prediction)
def predict(
    embeddings: Tensor,
    weight: Tensor | nn.Module,
    k: int = 1,
    *,
    sub_centers: int | None = None,
) -> Prediction:
    """The k nearest classes of each row by cosine.

    Args:
        embeddings: (N, D), not normalised.
        weight: the criterion, which knows its weight and sub-centres; or (C, D), C >= 2, as
            ``criterion.weight``, (C K, D) with sub-centres. Where classes are sharded over ranks
            this is a collective: each gives its own rows, and finds their classes among all.
        k: how many classes, from 1 to C.
        sub_centers: K rows of weights for each class, of which the nearest counts; 1 of a tensor.

    Returns:
        Classes and cosines, (N, k), nearest first. Which of several equally near ones comes first
        isn't defined.

    Raises:
        ValueError: k is more than C, or less than 1; or the weight is that of a loss with
            sub-centres, of which nothing was said.
    """
    weight, sub_centers = class_rows(weight, sub_centers)
    _validate.matrices(embeddings, weight)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    k = _validate.at_most("k", _validate.size("k", k, 1), num_classes, "the number of classes")

    def nearest(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return _nearest(x, w, k, sub_centers)

    with torch.autocast(embeddings.device.type, enabled=False):
        if _validate.is_class_sharded(weight):
            return Prediction(*_sharded.nearest(nearest, embeddings, weight, k, sub_centers))
        return Prediction(*nearest(embeddings, weight, k))


def _nearest(x: Tensor, w: Tensor, k: int, sub_centers: int) -> tuple[Tensor, Tensor]:
    """The k nearest classes and their cosines, (N, k)."""
    classes = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    cosines = x.new_empty(classes.shape, dtype=accumulation_dtype(x, w))
    for start, block in _cosines(x, w, sub_centers):
        of_block = block.topk(min(k, block.shape[1]), dim=1)
        cosines = torch.cat([cosines, of_block.values], dim=1)
        classes = torch.cat([classes, of_block.indices + start], dim=1)
        cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
        classes = classes.gather(1, order)
    return classes, cosines


@torch.no_grad()
@_compiled.between_graphs
@_names.hinting
def evaluate(
    embeddings: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    *,
    ignore_index: int | None = None,
    sub_centers: int | None = None,
) -> Evaluation:
    """Ranks and cosines of the targets, and the hardest other class of each row.

    Args:
        embeddings: (N, D), not normalised.
        weight: the criterion, which knows its weight, sub-centres and ignored label; or (C, D),
            C >= 2, as ``criterion.weight``, (C K, D) with sub-centres. Of sharded classes see
            `predict`.
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        ignore_index: label of rows that don't count; -100 where neither it nor a criterion says so.
        sub_centers: K rows of weights for each class, of which the nearest counts; 1 of a tensor.

    Returns:
        An `Evaluation`, of all rows: ``.accuracy()``, ``.accuracy(5)``,
        ``.target_cosine.nanmean()``. A class as near as the target, up to rounding, doesn't count
        as nearer.

    Raises:
        ValueError: a label is out of range; that is read from the device.
    """
    ignore_index = _ignored_label(weight, ignore_index)
    weight, sub_centers = class_rows(weight, sub_centers)
    labels = _checked(embeddings, weight, labels, ignore_index, sub_centers)
    rows = (labels != ignore_index).nonzero()[:, 0]
    x, labels = embeddings[rows], labels[rows]
    dtype = accumulation_dtype(x, weight)

    def targets(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return nearest_centers(x, w, labels, sub_centers)[1].to(dtype)

    def standings(x: Tensor, w: Tensor, labels: Tensor, u: Tensor) -> Standings:
        return _standings(x, w, labels, u, sub_centers)

    with torch.autocast(x.device.type, enabled=False):
        if _validate.is_class_sharded(weight):
            target, rank, hardest, cosine = _sharded.standings(
                targets, standings, x, weight, labels, sub_centers
            )
        else:
            target = targets(x, weight, labels)
            rank, hardest, cosine = standings(x, weight, labels, target)
    # nothing is nearer than NaN by comparison, and such a row isn't right
    rank = torch.where(target.isnan(), weight.shape[0] // sub_centers - 1, rank)

    def of_all(values: Tensor, of_ignored: float) -> Tensor:
        shape = embeddings.shape[:1]
        return values.new_full(shape, of_ignored).index_copy_(0, rows, values)

    return Evaluation(
        of_all(target, math.nan), of_all(rank, -1), of_all(hardest, -1), of_all(cosine, math.nan)
    )


def _standings(x: Tensor, w: Tensor, labels: Tensor, target: Tensor, sub_centers: int) -> Standings:
    """Ranks, hardest other classes and their cosines; a label outside [0, C) is no class here."""
    nearer = target + ROUNDINGS * torch.finfo(target.dtype).eps
    rank = torch.zeros_like(labels)
    hardest, cosine = torch.zeros_like(labels), torch.full_like(target, -float("inf"))
    for start, block in _cosines(x, w, sub_centers):
        inside = ((labels >= start) & (labels < start + block.shape[1])).nonzero()[:, 0]
        block[inside, labels[inside] - start] = -float("inf")
        rank += (block > nearer[:, None]).sum(dim=1)
        of_block = block.max(dim=1)
        is_harder = of_block.values > cosine
        cosine = torch.where(is_harder, of_block.values, cosine)
        hardest = torch.where(is_harder, of_block.indices + start, hardest)
    return rank, hardest, cosine


def _ignored_label(weight: Any, ignore_index: int | None) -> int:
    """The label of rows that are left out: as given, else the criterion's, else -100."""
    if ignore_index is not None:
        return _validate.ignore_index(ignore_index)
    return getattr(weight, "ignore_index", -100) if isinstance(weight, nn.Module) else -100


def _checked(
    embeddings: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, sub_centers: int
) -> Tensor:
    """Labels (N,) int64, of checked arguments."""
    _validate.tensors(embeddings, weight, labels)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    labels = labels.long()
    _validate.label_range(labels, num_classes, ignore_index)
    return labels


# --- sub-centres and what lies far from them ------------------------------------------------------


@torch.no_grad()
@_names.hinting
def center_counts(
    embeddings: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    sub_centers: int | None = None,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    """How many rows of each class are nearest to each of its centres.

    Counts of parts of a data set, or of ranks, add up to those of the whole. O(N K D).

    Args:
        embeddings: (N, D), not normalised.
        weight: the criterion, or its (C K, D).
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        sub_centers: K, which a criterion knows.
        ignore_index: label of rows to leave out; -100 where neither it nor a criterion says so.

    Returns:
        (C, K) int64.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces,
        ECCV 2020, section 3.4.
    """
    ignore_index = _ignored_label(weight, ignore_index)
    weight, sub_centers = class_rows(weight, sub_centers)
    _validate.plain("weight", weight)
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
    weight: Tensor | nn.Module,
    labels: Tensor,
    centers: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    sub_centers: int | None = None,
) -> Tensor:
    """Angles of rows to one centre of their class, by which wrong labels are found.

    Sub-center ArcFace drops what is farther than 75 degrees from the dominant centre, and trains
    anew without sub-centres.

    Args:
        embeddings: (N, D), not normalised.
        weight: the criterion, or its (C K, D).
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        centers: (C,) int64, rows of the weight, from `dominant_centers`. By default those of these
            rows, which then have to be the whole data set; of a weight without sub-centres its own.
        ignore_index: label of rows to leave out; -100 where neither it nor a criterion says so.
        sub_centers: K, which a criterion knows; of a tensor 1, or what ``centers`` make it.

    Returns:
        (N,) radians, in [0, pi], fp32 or fp64, in the order of the rows; NaN where one is ignored.
        `outliers` sorts them, with rows and classes.

    References:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces,
        ECCV 2020, section 3.4.
    """
    ignore_index = _ignored_label(weight, ignore_index)
    if centers is None:
        counts = center_counts(embeddings, weight, labels, sub_centers, ignore_index=ignore_index)
        centers = dominant_centers(counts)
    if isinstance(weight, nn.Module) or sub_centers is not None:
        weight, sub_centers = class_rows(weight, sub_centers)
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    num_classes = _validate_others.rows_of("centers", centers, weight, sub_centers)
    labels, wide = labels.long(), sum_dtype(embeddings, weight)
    _validate.label_range(labels, num_classes, ignore_index)
    angles = embeddings.new_empty(labels.shape, dtype=accumulation_dtype(embeddings, weight))
    with torch.autocast(embeddings.device.type, enabled=False):
        for rows in _row_blocks(embeddings):
            own = weight[centers[labels[rows].clamp(0, num_classes - 1)]]
            x_hat, w_hat = (normalized(part.to(wide))[0] for part in (embeddings[rows], own))
            cosines = (x_hat * w_hat).sum(dim=1)
            angles[rows] = cosines.clamp_(-1.0, 1.0).acos_().to(angles.dtype)
    return angles.masked_fill_(labels == ignore_index, float("nan"))


class Outliers(NamedTuple):
    """Rows by how far they lie from a centre of their class, farthest first.

    Attributes:
        rows: which of the embeddings, (M,) int64. classes: their labels, (M,) int64.
        angles: radians, (M,).
    """

    rows: Tensor
    classes: Tensor
    angles: Tensor


@torch.no_grad()
@_names.hinting
def outliers(
    embeddings: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    centers: Tensor | None = None,
    *,
    angle: float = math.radians(75.0),
    ignore_index: int | None = None,
    sub_centers: int | None = None,
) -> Outliers:
    """What to look at, or to drop, when labels are cleaned: see `outlier_angles`.

    ```python
    found = fm.metrics.outliers(embeddings, criterion, labels)
    for row, label, angle in zip(*(part.tolist() for part in found)):
        print(paths[row], label, math.degrees(angle))
    ```

    Args:
        embeddings: (N, D), of the data set.
        weight: the criterion, or its (C K, D).
        labels: (N,).
        centers: (C,), see `outlier_angles`.
        angle: radians; only rows that are farther are returned. 0 for all.
        ignore_index: see `outlier_angles`.
        sub_centers: likewise.

    Returns:
        An `Outliers`, farthest first, of equal ones the first row first. A row that isn't finite
        comes first of all, with NaN; ignored ones are left out.
    """
    angle = _validate.between("angle", angle, 0.0, math.pi, "it is in radians")
    ignore_index = _ignored_label(weight, ignore_index)
    angles = outlier_angles(
        embeddings, weight, labels, centers, ignore_index=ignore_index, sub_centers=sub_centers
    )
    is_shown = (labels.long() != ignore_index) & ~(angles <= angle)
    rows = is_shown.nonzero()[:, 0]
    rows = rows[angles[rows].argsort(descending=True, stable=True)]
    return Outliers(rows, labels.long()[rows], angles[rows])


def _row_blocks(embeddings: Tensor) -> Iterator[slice]:
    size = max(1, _limit(embeddings) // (8 * embeddings.shape[1]))
    for start, stop in _blocks(embeddings.shape[0], size):
        yield slice(start, stop)
