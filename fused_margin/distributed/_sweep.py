"""The sweep over classes that are split over ranks: lse and target cosines of this rank's rows.

Each rank sweeps its classes with the rows of all of them. Around that are three autograd functions:
rows are gathered, and their gradients reduced and scattered; partial sums (eq. 3) are merged, and
the slopes of all rows gathered; the shard is taken out of the DTensor.

The gradients are those of the mean over R ranks of their losses. Slopes are divided by R, so that
those of the class weights need no pass of their own; those of the embeddings, which are this rank's
alone, are multiplied by it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_margin import _loans, _updates, _validate, _validate_shards, _validate_updates
from fused_margin._arguments import Found
from fused_margin.distributed import _collectives
from fused_margin.distributed._shards import ClassShard

Tensor = torch.Tensor
# of embeddings, weight, labels, scale, `Rows` and the classes that take part: lse and u, (N,), and
# what else was found
LocalSweep = Callable[
    [Tensor, Tensor, Tensor, Any, Any, Tensor | None], tuple[Tensor, Tensor, Found]
]
# of labels, C and the first class: the classes that take part, and labels among them
Sampler = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]

NO_TARGET = -1  # label of rows that only fill up
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rows(NamedTuple):
    """How many rows the ranks have: each sends ``most``, of which ``mine`` are this rank's own."""

    mine: int
    most: int
    shard: ClassShard

    @property
    def here(self) -> slice:
        """This rank's among those of all."""
        start = self.shard.rank * self.most
        return slice(start, start + self.mine)

    def added(self, values: Tensor) -> Tensor:
        """The sum over ranks of numbers of all rows (R n,), of this rank's rows."""
        return _collectives.total(values.clone(), self.shard.group)[self.here]

    def gathered(self, values: Tensor | None) -> Tensor | None:
        """Numbers of the ranks' own rows as those of all, (R n,)."""
        if values is None:
            return None
        return _collectives.gather(_filled(values, self), self.shard.group)

    def exchanged(self, found: Tensor, columns: list[int]) -> Tensor:
        """Of what each rank q found of all rows, (R n, columns[q]), that of this rank's, (n, sum).

        Every rank is sent its rows' numbers by each other rank.
        """
        ranks = self.shard.ranks
        shapes = [torch.Size((self.most, width)) for width in columns]
        parts = list(found.chunk(ranks)) if self.most else [found] * ranks
        whole = torch.cat(_collectives.exchange(parts, shapes, self.shard.group), dim=1)
        return whole[: self.mine]


def sweep(
    local_sweep: LocalSweep,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    sub_centers: int = 1,
    sampler: Sampler | None = None,
) -> tuple[Tensor, Tensor, Found]:
    """lse and u (eq. 1, 2), (N,), of this rank's rows over the classes of all ranks.

    And what else the local sweeps find out about classes of ``sub_centers`` rows of the weight.
    """
    shard = ClassShard.of(weight)
    _validate_shards.whole_classes(weight.shape[0], shard.ranks, sub_centers)
    rows, x_all, labels_all = gather_rows(x, labels, shard)
    scale, w = scaled(scale, shard), local_classes(weight, shard)
    first_class = shard.start // sub_centers
    labels_here = labels_all - first_class
    if shard.start == shard.stop:
        # one class that counts for nothing finds what the others find, and asks what they ask
        nobody, no_targets = stand_in(w.detach(), labels_here, sub_centers)
        _, _, found = local_sweep(x_all.detach(), nobody, no_targets, 1.0, rows, None)
        lse, u = _NoClasses.apply(x_all, w)
        found = Found(
            torch.zeros_like(found.total), found.class_sum, found.hardest,
            found.hardest_cosine.fill_(-float("inf")), found.rank.zero_(),
        )  # fmt: skip
        return _merged(lse, u, found, rows, first_class)
    classes = None
    if sampler is not None:
        _validate_shards.no_copies(shard.replicas)
        classes, labels_here = sampler(labels_here, w.shape[0], shard.start)
    # d_w may not be made ahead while there is one of the step before
    keeps_gradient = weight.grad is not None and sampler is None
    with _loans.refused() if keeps_gradient else contextlib.nullcontext():
        lse, u, found = local_sweep(x_all, w, labels_here, scale, rows, classes)
    return _merged(lse, u, found, rows, first_class)


def _merged(
    lse: Tensor, u: Tensor, found: Found, rows: Rows, first_class: int
) -> tuple[Tensor, Tensor, Found]:
    """What all ranks find of this rank's rows."""
    has_total = found.total.numel() > 0
    total = found.total if has_total else torch.zeros_like(u)
    lse, u, total = _Merged.apply(lse, u, total, has_total, rows)
    hardest, cosine, rank = found.hardest, found.hardest_cosine, found.rank
    if hardest.numel():
        hardest, cosine = hardest_of_all(hardest + first_class, cosine, rows)
        rank = rows.added(rank)
    return lse, u, Found(total if has_total else u[:0], found.class_sum, hardest, cosine, rank)


def stand_in(w: Tensor, labels: Tensor, sub_centers: int) -> tuple[Tensor, Tensor]:
    """For a rank without classes: weights of one that counts for nothing, and no targets."""
    return w.new_zeros(sub_centers, w.shape[1]), torch.full_like(labels, NO_TARGET)


def hardest_of_all(classes: Tensor, cosines: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The nearest class of this rank's rows and its cosine, (n,), of each rank's nearest, (R n,).

    Of several that are as near, the first.
    """
    largest = _collectives.largest(cosines.clone(), rows.shard.group)
    first = torch.where(cosines == largest, classes, torch.iinfo(torch.int64).max)
    nearest = -_collectives.largest(-first, rows.shard.group)
    return nearest[rows.here], largest[rows.here]


def target_cosines(
    of_shard: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
) -> Tensor:
    """Cosines of this rank's rows with their targets, (n,), without gradients.

    ``of_shard``: the same of embeddings, weights and labels, 0 where a label is outside.
    """
    shard = ClassShard.of(weight)
    _validate_shards.whole_classes(weight.shape[0], shard.ranks, sub_centers)
    rows, x_all, labels_all = gather_rows(x.detach(), labels, shard)
    w = local_classes(weight, shard).detach()
    if shard.start == shard.stop:
        w, labels_all = stand_in(w, labels_all, sub_centers)
    return rows.added(of_shard(x_all, w, labels_all - shard.start // sub_centers))


def gather_rows(x: Tensor, labels: Tensor, shard: ClassShard) -> tuple[Rows, Tensor, Tensor]:
    """Embeddings (R n, D) and labels (R n,) of all ranks, n of the rank with most rows.

    Those of the others are filled up by rows of zeros without a target.
    """
    asks = torch.is_grad_enabled() and x.requires_grad
    told = _collectives.numbers(
        [x.shape[0], int(asks), DTYPES.index(x.dtype)], x.device, shard.group
    )
    counts, asking, dtypes = zip(*told, strict=True)
    _validate_shards.same_dtypes([DTYPES[index] for index in dtypes])
    rows = Rows(x.shape[0], max(counts), shard)
    if any(asking) and not asks:  # the others' backward waits for this rank's
        x = x.detach().requires_grad_()
    filled = torch.nn.functional.pad(labels.long(), (0, rows.most - rows.mine), value=NO_TARGET)
    return rows, _GatheredRows.apply(x, rows), _collectives.gather(filled, shard.group)


def _filled(x: Tensor, rows: Rows) -> Tensor:
    """Rows of zeros after those of x (n, ...), for as many as the others have."""
    if rows.mine == rows.most:
        return x
    return torch.cat([x, x.new_zeros(rows.most - rows.mine, *x.shape[1:])])


class _GatheredRows(torch.autograd.Function):
    """x (n, D) of each rank, (R n, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _collectives.gather(_filled(x, rows), rows.shard.group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows = ctx.rows
        mine = _collectives.reduce_scatter(grad_outputs[0], rows.shard.group)[: rows.mine]
        return mine.mul_(rows.shard.ranks), None


class _Scaled(torch.autograd.Function):
    """A tensor scale, whose gradient takes the factor 1 / R of the slopes back."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] * ctx.factor, None


class _NoClasses(torch.autograd.Function):
    """The sweep over no class: it adds nothing to the others, and takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        lse = x.new_full(x.shape[:1], -float("inf"), dtype=torch.float64)
        return lse, torch.zeros_like(lse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return tuple(torch.zeros_like(one) for one in ctx.saved_tensors)


class _Merged(torch.autograd.Function):
    """lse, u and the total of this rank's rows, (n,), of every rank's sweep over all (R n,)."""

    @staticmethod
    def forward(
        ctx: Any, lse: Tensor, u: Tensor, total: Tensor, has_total: bool, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        shard = rows.shard
        top = _collectives.largest(lse.to(torch.float64, copy=True), shard.group)
        top = top.masked_fill(top == -float("inf"), 0.0)  # a row that has no other class at all
        part = (lse - top).exp()
        added = [part, u.double(), *([total.double()] if has_total else [])]
        sums, cosines, *totals = _collectives.total(torch.stack(added), shard.group)
        ctx.rows, ctx.has_total, ctx.dtypes = rows, has_total, (lse.dtype, u.dtype, total.dtype)
        ctx.save_for_backward(part / sums.masked_fill(sums == 0.0, 1.0))
        merged = (top + sums.log())[rows.here].to(lse.dtype)
        of_others = totals[0][rows.here].to(total.dtype) if has_total else total.new_empty(0)
        return merged, cosines[rows.here].to(u.dtype), of_others

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows, (share,) = ctx.rows, ctx.saved_tensors
        shard = rows.shard
        wanted = grad_outputs if ctx.has_total else grad_outputs[:2]
        mine = torch.stack([grad.double() for grad in wanted], dim=1)  # (n, 2 or 3)
        slopes = _collectives.gather(_filled(mine, rows), shard.group) / shard.ranks
        of_lse, of_u, *of_total = slopes.unbind(dim=1)
        lse_dtype, u_dtype, total_dtype = ctx.dtypes
        d_total = of_total[0].to(total_dtype) if of_total else None
        return (of_lse * share).to(lse_dtype), of_u.to(u_dtype), d_total, None, None


class _Local(torch.autograd.Function):
    """This rank's part of a DTensor, whose gradient may be sparse, as to_local()'s may not.

    A sparse one is added to ``weight.grad`` here, as FSDP2 does with its own: what autograd calls
    for that knows no sparse DTensors.
    """

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.weight, ctx.shape = weight, weight.shape
        ctx.set_materialize_grads(False)  # an optimiser may have used up the gradient
        local = weight.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        from torch.distributed.tensor import DTensor

        weight, (grad,) = ctx.weight, grad_outputs
        _validate_shards.same_size(ctx.shape, weight.shape)
        if grad is None:
            return None
        if grad.layout is torch.strided:
            return DTensor.from_local(
                grad, weight.device_mesh, weight.placements, run_check=False,
                shape=weight.shape, stride=weight.stride(),
            )  # fmt: skip
        if weight.grad is not None:
            grad = weight.grad._local_tensor + grad
        weight.grad = like_grad(grad, weight)
        return None


def like_grad(grad: Tensor, weight: Any) -> Tensor:
    """A sparse gradient of this rank's part as one of the weight, a DTensor if that is."""
    if not _validate.is_dtensor(weight):
        return grad
    from torch.distributed.tensor import DTensor

    make: Any = DTensor  # from_local() takes views, which sparse tensors don't have
    return make(grad, weight._spec, requires_grad=False)


class _AveragedOver(torch.autograd.Function):
    """A tensor of which ranks hold copies: its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: tuple[Any, ...]) -> Tensor:
        ctx.groups = groups
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad = grad_outputs[0].clone()
        for group in ctx.groups:
            _collectives.total(grad, group)
            grad /= torch.distributed.get_world_size(group)
        return grad, None


def scaled(scale: float | Tensor, shard: ClassShard) -> float | Tensor:
    """The scale of a local sweep."""
    return _Scaled.apply(scale, shard.ranks) if isinstance(scale, Tensor) else scale


def local_classes(weight: Any, shard: ClassShard) -> Tensor:
    """This rank's rows of the weight, (C_local, D)."""
    local = _Local.apply(weight)
    if _updates.of(local) is not None:
        _validate_updates.no_copies(shard.replicas)
    return _AveragedOver.apply(local, shard.replicas) if shard.replicas else local


def shared_scale(scale: float | Tensor, weight: Tensor) -> float | Tensor:
    """A scale that is learnt, of which each rank has a copy: gradients are averaged."""
    if not isinstance(scale, Tensor) or not scale.requires_grad:
        return scale
    shard = ClassShard.of(weight)
    return _AveragedOver.apply(scale, (shard.group, *shard.replicas))
