"""Sweeps over the class weights alone, without C x C: the operators under `regularizers`.

The search for nearest classes compares two blocks of classes at a time; all else is one pass over
blocks of W, so that d_w is the only (C, D) made. Each differentiable operator has two gradients:
blocked code, and, while autograd records the backward (``create_graph=True``), plain PyTorch that
can be differentiated again. That one keeps several (C, D) tensors, and on several CPU threads its
scattered sums come in no fixed order, so it is not the only one. Forward mode and `torch.func` get
plain PyTorch for the operator itself too. Loops stay inside operators, where `torch.compile` does
not unroll them. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fused_margin import _transforms, _updates
from fused_margin._numerics import (
    CLAMPED_INVERSE_NORM,
    NORM_EPS,
    accumulation_dtype,
    normalized,
    shrinkage,
    sum_dtype,
)

Tensor = torch.Tensor

# Classes in each of the two blocks compared: 4 MiB of fp32 cosines on a CPU, where a product of
# that size is as fast as any larger one; 64 MiB elsewhere, for fewer launches and synchronisations.
CPU_SIDE, OTHER_SIDE = 1024, 4096
# Bytes of one (B, D) block, accumulation dtype, in what is linear in C.
BLOCK_BYTES = 1 << 20

_lib = torch.library.Library("fused_margin", "FRAGMENT")
for _schema in (
    "nearest_classes(Tensor w) -> Tensor",
    "class_cosines(Tensor w, Tensor index) -> Tensor",
    "class_cosines_backward(Tensor g, Tensor w, Tensor index) -> Tensor",
    "squared_norms(Tensor w) -> Tensor",
    "scaled_rows(Tensor w, Tensor factors) -> Tensor",
):
    _lib.define(_schema, tags=torch.Tag.pt2_compliant_tag)
_ops = torch.ops.fused_margin


def nearest_cosines(w: Tensor) -> Tensor:
    """Largest cosine of each class to another (eq. 13), (C,), fp32 or fp64; differentiable.

    Args:
        w: (C, D), any floating dtype and strides, C >= 2.
    """
    return _ops.class_cosines(w, _ops.nearest_classes(w.detach()))


def squared_norms(w: Tensor) -> Tensor:
    """||w_k||^2, (C,), in `sum_dtype`; differentiable."""
    return _ops.squared_norms(w)


def _blocks(num_classes: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_classes, size):
        yield start, min(start + size, num_classes)


def _linear_block(w: Tensor) -> int:
    return max(1, BLOCK_BYTES // (w.shape[1] * accumulation_dtype(w, w).itemsize))


# --- nearest_classes ------------------------------------------------------------------------------


def _nearest_classes(w: Tensor) -> Tensor:
    """The class nearest to each by cosine, (C,) int64; the lowest of several (eq. 13)."""
    num_classes = w.shape[0]
    dtype = accumulation_dtype(w, w)
    size = min(num_classes, CPU_SIDE if w.device.type == "cpu" else OTHER_SIDE)
    largest = w.new_full((num_classes,), -float("inf"), dtype=dtype)
    index = w.new_zeros(num_classes, dtype=torch.int64)
    memory = w.new_empty(size * size, dtype=dtype)
    # Each pair of blocks once, for its rows and for its columns. A class meets the blocks in
    # ascending order: as a column while `first` lies before it, then as a row.
    for first, first_stop in _blocks(num_classes, size):
        rows = normalized(w[first:first_stop])[0]
        for second, second_stop in _blocks(num_classes, size):
            if second < first:
                continue
            is_diagonal = second == first
            columns = rows if is_diagonal else normalized(w[second:second_stop])[0]
            shape = (rows.shape[0], columns.shape[0])
            cosine = memory[: shape[0] * shape[1]].view(shape)
            torch.mm(rows, columns.t(), out=cosine)  # autocast leaves out= alone
            if is_diagonal:
                cosine.fill_diagonal_(-float("inf"))
            among = slice(first, first_stop)
            _raise_maximum(largest[among], index[among], cosine, second)
            if not is_diagonal:
                among = slice(second, second_stop)
                _raise_maximum(largest[among], index[among], cosine.t(), first)
    return index


def _raise_maximum(largest: Tensor, index: Tensor, cosine: Tensor, offset: int) -> None:
    """Bring running maxima (R,) and their classes up to date with cosines (R, B), in place.

    On a CPU an arg max takes ten times as long as a maximum (0.9 and 0.1 ns an element), so it is
    taken of those rows only where the maximum rose: the j-th block raises about one row in j.
    """
    values = cosine.amax(dim=1)
    raised = (values > largest).nonzero()[:, 0]  # strictly: of equal cosines the first class stays
    largest[raised] = values[raised]
    index[raised] = cosine[raised].argmax(dim=1).add_(offset)


# --- class_cosines --------------------------------------------------------------------------------


def _class_cosines(w: Tensor, index: Tensor) -> Tensor:
    """Cosine of each class k to class index[k], (C,): a dot of its own in the accumulation dtype.

    Unlike an entry of the matrix product it is never TF32.
    """
    cosines = w.new_empty(w.shape[0], dtype=accumulation_dtype(w, w))
    for start, stop in _blocks(w.shape[0], _linear_block(w)):
        own, other = normalized(w[start:stop])[0], normalized(w[index[start:stop]])[0]
        cosines[start:stop] = own.mul_(other).sum(dim=1)
    return cosines


def _class_cosines_backward(g: Tensor, w: Tensor, index: Tensor) -> Tensor:
    """d_w of `_class_cosines` for incoming gradients g (C,), each row written once (eq. 14)."""
    num_classes, size = w.shape[0], _linear_block(w)
    d_w = w.new_empty(w.shape)
    # classes in the order of their nearest: a block's share of the second sum is a range
    order = index.argsort(stable=True)
    targets = index[order]
    starts = torch.arange(0, num_classes + size, size, device=w.device).clamp_(max=num_classes)
    bounds = torch.searchsorted(targets, starts).tolist()
    for number, (start, stop) in enumerate(_blocks(num_classes, size)):
        w_hat, inverse = normalized(w[start:stop])
        q = normalized(w[index[start:stop]])[0].mul_(g[start:stop, None])
        # by pieces, because all classes may have the same nearest one
        for piece in range(bounds[number], bounds[number + 1], size):
            among = slice(piece, min(piece + size, bounds[number + 1]))
            sources = order[among]
            rows = normalized(w[sources])[0].mul_(g[sources, None])
            _add_rows(q, targets[among] - start, rows)
        radial = (q * w_hat).sum(dim=1, keepdim=True)
        radial.masked_fill_(inverse >= CLAMPED_INVERSE_NORM, 0.0)
        d_w[start:stop] = q.addcmul_(radial, w_hat, value=-1.0).mul_(inverse)
    return d_w


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, with repeated indices, in a fixed order.

    On a GPU `index_add_` uses atomics and `index_put_` sorts; on a CPU `index_add_` is sequential,
    while `index_put_` uses atomics.
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)


def _plain_class_cosines(w: Tensor, index: Tensor) -> Tensor:
    w = w.to(accumulation_dtype(w, w))
    w = w * shrinkage(w)
    norm = torch.linalg.vector_norm(w.detach(), dim=1, keepdim=True)
    is_clamped = norm <= NORM_EPS
    # the second derivative of a norm is NaN at 0, so such rows are filled before, not after it
    norm = torch.linalg.vector_norm(w.masked_fill(is_clamped, 1.0), dim=1, keepdim=True)
    w_hat = w / norm.masked_fill(is_clamped, NORM_EPS)
    return (w_hat * w_hat[index]).sum(dim=1)


# --- squared_norms --------------------------------------------------------------------------------


def _squared_norms(w: Tensor) -> Tensor:
    dtype = sum_dtype(w)
    result = w.new_empty(w.shape[0], dtype=dtype)
    for start, stop in _blocks(w.shape[0], _linear_block(w)):
        block = w[start:stop].to(dtype)
        result[start:stop] = (block * block).sum(dim=1)
    return result


def _scaled_rows(w: Tensor, factors: Tensor) -> Tensor:
    """factors[k] w_k, (C, D), rounded once to w's dtype."""
    dtype = accumulation_dtype(w, w)
    factors = factors.to(dtype)[:, None]
    result = w.new_empty(w.shape)
    if w.dtype is dtype:
        return torch.mul(w, factors, out=result)
    for start, stop in _blocks(w.shape[0], _linear_block(w)):
        result[start:stop] = w[start:stop].to(dtype).mul_(factors[start:stop])
    return result


# --- registration ---------------------------------------------------------------------------------

for _name, _implementation in (
    ("nearest_classes", _nearest_classes),
    ("class_cosines", _class_cosines),
    ("class_cosines_backward", _class_cosines_backward),
    ("squared_norms", _squared_norms),
    ("scaled_rows", _scaled_rows),
):
    _lib.impl(_name, _implementation, "CompositeExplicitAutograd")  # plain PyTorch, any device


@torch.library.register_fake("fused_margin::nearest_classes", lib=_lib)
def _(w: Tensor) -> Tensor:
    return w.new_empty(w.shape[0], dtype=torch.int64)


@torch.library.register_fake("fused_margin::class_cosines", lib=_lib)
def _(w: Tensor, index: Tensor) -> Tensor:
    return w.new_empty(w.shape[0], dtype=accumulation_dtype(w, w))


@torch.library.register_fake("fused_margin::class_cosines_backward", lib=_lib)
def _(g: Tensor, w: Tensor, index: Tensor) -> Tensor:
    return w.new_empty(w.shape)


@torch.library.register_fake("fused_margin::squared_norms", lib=_lib)
def _(w: Tensor) -> Tensor:
    return w.new_empty(w.shape[0], dtype=sum_dtype(w))


@torch.library.register_fake("fused_margin::scaled_rows", lib=_lib)
def _(w: Tensor, factors: Tensor) -> Tensor:
    return w.new_empty(w.shape)


class _ClassCosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(w, index)
        _updates.noted_whole(ctx, w)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.class_cosines(w, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (g,), (w, index) = grad_outputs, ctx.saved_tensors
        if torch.is_grad_enabled() or _transforms.is_transformed(g):
            with torch.enable_grad():
                cosines = _plain_class_cosines(w, index)
                return torch.autograd.grad(cosines, w, g, create_graph=True)[0], None
        return _ops.class_cosines_backward(g, w, index), None


class _SquaredNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        _updates.noted_whole(ctx, w)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.squared_norms(w)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (g,), (w,) = grad_outputs, ctx.saved_tensors
        if torch.is_grad_enabled() or _transforms.is_transformed(g):
            dtype = accumulation_dtype(w, w)
            return ((2.0 * g).to(dtype)[:, None] * w.to(dtype)).to(w.dtype)
        return _ops.scaled_rows(w, 2.0 * g)


def _class_cosines_autograd(w: Tensor, index: Tensor) -> Tensor:
    if _transforms.is_transformed(w):
        return _plain_class_cosines(w, index)
    return _ClassCosines.apply(w, index)


def _squared_norms_autograd(w: Tensor) -> Tensor:
    if _transforms.is_transformed(w):
        return w.to(sum_dtype(w)).square().sum(dim=1)
    return _SquaredNorms.apply(w)


_lib.impl("class_cosines", _class_cosines_autograd, "Autograd")
_lib.impl("squared_norms", _squared_norms_autograd, "Autograd")
