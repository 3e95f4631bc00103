"""Launches the kernels: allocation and grids. No mathematics, and no choices: see `planning`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton

from fused_margin._arguments import Swept
from fused_margin._triton import configs
from fused_margin._triton.backward import (
    embeddings_kernel,
    finish_kernel,
    fused_embeddings_kernel,
    fused_weight_kernel,
    gradient_kernel,
    weight_kernel,
)
from fused_margin._triton.forward import rows_kernel, sweep_kernel
from fused_margin._triton.planning import (
    LAUNCH_BOUND,
    TRITON_DTYPE,
    Plan,
    backward_strategy,
    keeps,
    kept_parts,
    kept_shape,
    plan,
    power_of_two,
)
from fused_margin.margins import NO_MARGIN, Margin

Tensor = torch.Tensor

# Bytes of the chunk of G that the backward keeps at a time, and of all partials of d_x.
CHUNK_BYTES = 64 << 20
PARTIAL_BYTES = 64 << 20
# Most rows of a tile in a sweep that keeps its exponentials: with more the tile spills.
KEPT_ROWS = 128
# Rows and columns that a program of `finish_kernel` works on at a time.
FINISH_ROWS, FINISH_COLUMNS = 16, 128
# Splits that `rows_kernel` merges at a time, and rows: few, and more where there are many.
MERGED_SPLITS = 16
MERGED_ROWS, MERGED_ROWS_OF_MANY, MANY_ROWS = 32, 256, 4096


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _options(tile: configs.Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def _label_dtype(labels: Tensor) -> Tensor:
    """Kernels load 8 to 64 bit integers; Triton has no wide unsigned tensors from PyTorch."""
    wide_unsigned = (torch.uint16, torch.uint32, torch.uint64)
    return labels.long() if labels.dtype in wide_unsigned else labels


def _forward(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    margin: Margin | None,
    reduction: str,
    ignore_index: int,
    budget: int,
) -> tuple[Any, ...]:
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    p = plan(x, w, compute)
    tile = p.config.forward
    kept = torch.empty(kept_shape(x, w, compute, budget), dtype=torch.uint8, device=x.device)
    entries, shifts, kept_block = kept_parts(kept, num_rows, p) if keeps(kept) else (None, None, 0)
    block_n = power_of_two(num_rows, sweep_rows(tile, keeps(kept)))
    block_c = kept_block or power_of_two(num_classes, tile.columns)
    block_k = power_of_two(dim, tile.inner)
    row_blocks, class_blocks = triton.cdiv(num_rows, block_n), triton.cdiv(num_classes, block_c)
    # one program of each row block is for its target cosines
    splits = min(class_blocks, max(1, p.programs // max(row_blocks, 1) - 1))
    blocks_per_split = triton.cdiv(class_blocks, splits)
    splits = triton.cdiv(class_blocks, blocks_per_split)

    def rows(*shape: int, dtype: torch.dtype = p.accumulate) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    lse, u = rows(num_rows, dtype=torch.float64), rows(num_rows, dtype=torch.float64)
    inv_x, inv_w = rows(num_rows), rows(num_classes)
    row_loss = loss = d_lse = d_u = count = targets = None
    if margin is not None:
        row_loss, d_lse, d_u, count = rows(num_rows), rows(num_rows), rows(num_rows), rows()
        targets = rows(num_rows, dtype=torch.int64)
        loss = None if reduction == "none" else rows()
    if num_rows == 0:
        for empty in (loss, count):
            if empty is not None:
                empty.zero_()
    else:
        m = NO_MARGIN if margin is None else margin
        labels = _label_dtype(labels)
        partial = rows(splits, 2, num_rows)
        operand = _operand(x, num_classes, p)
        merged_rows = MERGED_ROWS if num_rows <= MANY_ROWS else MERGED_ROWS_OF_MANY
        rows_per_program = merged_rows if loss is None else num_rows
        with guard(x):
            sweep_kernel[(row_blocks, splits + 1)](
                x, operand, w, labels, scale_tensor, partial, u, inv_x, inv_w, entries, shifts,
                scale, ignore_index, num_rows, num_classes, dim,
                *x.stride(), *operand.stride(), *w.stride(), labels.stride(0), blocks_per_split,
                HAS_SCALE_TENSOR=scale_tensor is not None, SOME_IGNORED=margin is not None,
                KEEP=keeps(kept), **p.constants(),
                BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=block_k, **_options(tile),
            )  # fmt: skip
            rows_kernel[(triton.cdiv(num_rows, rows_per_program),)](
                partial, labels, u, lse, row_loss, loss, d_lse, d_u, count, targets,
                scale, m.cos, m.sin, m.threshold, m.offset,
                ignore_index, num_rows, num_classes, splits, rows_per_program, labels.stride(0),
                HAS_MARGIN=margin is not None, STRAIGHT_THROUGH=m.straight_through,
                REDUCTION=reduction, ACC=TRITON_DTYPE[p.accumulate],
                BLOCK_S=power_of_two(splits, MERGED_SPLITS),
                BLOCK_N=power_of_two(num_rows, merged_rows), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    swept = Swept(lse, u, inv_x, inv_w, kept)
    if margin is None:
        return swept
    return row_loss if loss is None else loss, d_lse, d_u, count, targets, *swept


def sweep_rows(tile: configs.Tile, keeps: bool) -> int:
    """Rows of a tile of the sweep: half of the largest where it also holds what it keeps."""
    return min(tile.rows, KEPT_ROWS) if keeps else tile.rows


def _operand(x: Tensor, num_classes: int, p: Plan) -> Tensor:
    """x as the sweep multiplies it: cast once where each tile of the classes would cast it again.

    fp16 operands are normalised first, in the tile; a step that is bound by its launches has none
    to spare.
    """
    if p.normalize_first or x.shape[0] * num_classes <= LAUNCH_BOUND:
        return x
    return x.to(p.compute)


def cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    budget: int,
) -> Swept:
    """The five outputs of ``fused_margin::cosine_lse``."""
    outputs = _forward(x, w, labels, scale, scale_tensor, compute, None, "none", 0, budget)
    return Swept(*outputs)


def margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    compute: torch.dtype,
    budget: int,
) -> tuple[Tensor, ...]:
    """The ten outputs of ``fused_margin::margin_ce``."""
    return _forward(x, w, labels, scale, None, compute, margin, reduction, ignore_index, budget)


@dataclass(frozen=True)
class Rows:
    """What the backward kernels need of each row, and the flags that go with it."""

    labels: Tensor
    d_lse: Tensor
    d_u: Tensor
    lse: Tensor
    u: Tensor
    inv_x: Tensor
    grad_loss: Tensor | None
    count: Tensor | None
    scale: float
    scale_tensor: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """From labels to 1 / ||x||, in the order of the kernels' parameters."""
        return (
            self.labels, self.scale_tensor, self.grad_loss, self.count, self.d_lse, self.d_u,
            self.lse, self.u, self.inv_x,
        )  # fmt: skip

    @property
    def stride_grad(self) -> int:
        """0 for a 0-d gradient, and for an expanded one."""
        return self.grad_loss.stride(0) if self.grad_loss is not None and self.grad_loss.ndim else 0

    @property
    def flags(self) -> dict[str, bool]:
        """Constexprs that say which of them there are."""
        return {
            "HAS_SCALE_TENSOR": self.scale_tensor is not None,
            "HAS_GRAD": self.grad_loss is not None,
            "HAS_COUNT": self.count is not None,
        }


def backward(
    d_lse: Tensor,
    d_u: Tensor,
    grad_loss: Tensor | None,
    count: Tensor | None,
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    lse: Tensor,
    u: Tensor,
    inv_x: Tensor,
    inv_w: Tensor,
    kept: Tensor,
    *,
    need_x: bool,
    need_w: bool,
    need_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_x, d_w, d_scale of ``fused_margin::cosine_lse_backward``; None where not needed."""
    num_rows, dim = x.shape
    device = x.device
    d_x = torch.empty(x.shape, dtype=x.dtype, device=device) if need_x else None
    d_w = torch.empty(w.shape, dtype=w.dtype, device=device) if need_w else None
    if num_rows == 0:
        return (
            d_x,
            None if d_w is None else d_w.zero_(),
            torch.zeros((), dtype=inv_x.dtype, device=device) if need_scale else None,
        )
    p = plan(x, w, compute)
    # gradients of rows may come with stride 0 (an expanded scalar) and any dtype
    d_lse, d_u = d_lse.to(p.accumulate).contiguous(), d_u.to(p.accumulate).contiguous()
    rows = Rows(
        _label_dtype(labels), d_lse, d_u, lse, u, inv_x, grad_loss, count, scale, scale_tensor
    )
    with guard(x):
        if backward_strategy(x, w, p, kept) == "fused":  # what was kept goes through the chunks
            partial = _fused(p, rows, x, w, inv_w, d_x, d_w, need_scale=need_scale)
        else:
            partial = _chunked(p, rows, x, w, inv_w, kept, d_x, d_w, need_scale=need_scale)
        d_scale_rows = None
        if partial is not None:
            if need_scale:
                d_scale_rows = torch.empty(num_rows, dtype=p.accumulate, device=device)
            finish_kernel[(triton.cdiv(num_rows, FINISH_ROWS),)](
                x, partial, rows.labels, scale_tensor, grad_loss, count, d_u, u, inv_x,
                d_x, d_scale_rows, scale, num_rows, dim, partial.shape[0],
                *x.stride(), rows.labels.stride(0), rows.stride_grad,
                **rows.flags, NEED_X=need_x, NEED_SCALE=need_scale, ACC=TRITON_DTYPE[p.accumulate],
                BLOCK_N=FINISH_ROWS, BLOCK_D=FINISH_COLUMNS,
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return d_x, d_w, None if d_scale_rows is None else d_scale_rows.sum()


def _splits(wanted: int, available: int, bytes_per_split: int) -> int:
    """How many splits of the classes get a partial of d_x each."""
    return max(1, min(wanted, available, PARTIAL_BYTES // bytes_per_split))


def _fused(
    p: Plan,
    rows: Rows,
    x: Tensor,
    w: Tensor,
    inv_w: Tensor,
    d_x: Tensor | None,
    d_w: Tensor | None,
    *,
    need_scale: bool,
) -> Tensor | None:
    """Launch the fused backward; returns the partials of d_x that are still to be merged."""
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    tiles = p.config.fused_tiles(dim)
    if tiles is None:
        raise RuntimeError("the fused backward was chosen without tiles for this D")
    constants = p.constants() | {
        "GRADIENT": TRITON_DTYPE[p.gradient], "GRADIENT_PRECISION": p.gradient_precision,
        "BLOCK_D": power_of_two(dim, tiles[0].inner),
    }  # fmt: skip
    strides = (*x.stride(), *w.stride(), rows.labels.stride(0), rows.stride_grad)
    if d_w is not None:
        tile = tiles[0]
        block_n = power_of_two(num_rows, tile.rows)
        block_c = power_of_two(num_classes, tile.columns)
        fused_weight_kernel[(triton.cdiv(num_classes, block_c),)](
            x, w, *rows.pointers, inv_w, d_w, rows.scale, num_rows, num_classes, dim, *strides,
            **rows.flags, **constants, BLOCK_N=block_n, BLOCK_C=block_c, **_options(tile),
        )  # fmt: skip
    if d_x is None and not need_scale:
        return None
    tile = tiles[1]
    block_n, block_c = power_of_two(num_rows, tile.rows), power_of_two(num_classes, tile.columns)
    row_blocks, class_blocks = triton.cdiv(num_rows, block_n), triton.cdiv(num_classes, block_c)
    splits = _splits(
        triton.cdiv(2 * p.programs, row_blocks),
        triton.cdiv(class_blocks, 4),
        num_rows * dim * p.accumulate.itemsize,
    )
    blocks_per_split = triton.cdiv(class_blocks, splits)
    splits = triton.cdiv(class_blocks, blocks_per_split)
    partial = x.new_empty(splits, num_rows, dim, dtype=p.accumulate)
    fused_embeddings_kernel[(row_blocks, splits)](
        x, w, *rows.pointers, inv_w, partial, rows.scale,
        num_rows, num_classes, dim, blocks_per_split, *strides,
        **rows.flags, **constants, BLOCK_N=block_n, BLOCK_C=block_c, **_options(tile),
    )  # fmt: skip
    return partial


def _chunked(
    p: Plan,
    rows: Rows,
    x: Tensor,
    w: Tensor,
    inv_w: Tensor,
    kept: Tensor,
    d_x: Tensor | None,
    d_w: Tensor | None,
    *,
    need_scale: bool,
) -> Tensor | None:
    """Launch the chunked backward; returns the partials of d_x that are still to be merged."""
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    acc = TRITON_DTYPE[p.accumulate]
    entries, shifts, kept_block = kept_parts(kept, num_rows, p) if keeps(kept) else (None, None, 0)

    def rows_of(*shape: int, dtype: torch.dtype = p.accumulate) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    tile = p.config.gradient
    block_n, block_c = power_of_two(num_rows, tile.rows), power_of_two(num_classes, tile.columns)
    row_blocks = triton.cdiv(num_rows, block_n)
    chunk = _chunk_size(num_rows, num_classes, block_c, p.gradient.itemsize)
    g, radial = rows_of(chunk, num_rows, dtype=p.gradient), rows_of(chunk, row_blocks)

    dx_tile, dw_tile = p.config.embeddings, p.config.weight
    dx_n, dx_d = power_of_two(num_rows, dx_tile.rows), power_of_two(dim, dx_tile.columns)
    dx_blocks = (triton.cdiv(num_rows, dx_n), triton.cdiv(dim, dx_d))
    dw_c, dw_d = power_of_two(chunk, dw_tile.rows), power_of_two(dim, dw_tile.columns)
    needs_v = d_x is not None or need_scale
    splits = _splits(
        p.programs // (dx_blocks[0] * dx_blocks[1]),
        triton.cdiv(chunk, 4 * dx_tile.inner),
        num_rows * dim * p.accumulate.itemsize,
    )
    is_only = d_x is not None and splits == 1 and chunk == num_classes and not need_scale
    partial = rows_of(splits, num_rows, dim) if needs_v and not is_only else None
    class_blocks = triton.cdiv(num_classes, block_c)
    row_radial = rows_of(class_blocks, num_rows) if is_only else None

    operand = _operand(x, num_classes, p)
    for first in range(0, num_classes, chunk):
        length = min(chunk, num_classes - first)
        # one axis: the others of a CUDA grid end at 65,535
        gradient_kernel[(triton.cdiv(length, block_c) * row_blocks,)](
            operand, w, *rows.pointers, inv_w, entries, shifts, g, radial, row_radial,
            rows.scale, first, length, num_rows, dim, row_blocks,
            *operand.stride(), *w.stride(), rows.labels.stride(0), rows.stride_grad,
            **rows.flags, KEPT_BLOCK=kept_block, IS_ONLY=is_only, **p.constants(),
            BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=power_of_two(dim, tile.inner),
            **_options(tile),
        )  # fmt: skip
        if d_w is not None:
            weight_kernel[(triton.cdiv(dim, dw_d) * triton.cdiv(length, dw_c),)](
                x, w, rows.labels, g, radial, inv_w, d_w,
                first, length, num_rows, dim, row_blocks,
                *x.stride(), *w.stride(), rows.labels.stride(0),
                HAS_GRAD=rows.grad_loss is not None, ACC=acc, PRECISION=p.gradient_precision,
                BLOCK_C=dw_c, BLOCK_D=dw_d, BLOCK_K=power_of_two(num_rows, dw_tile.inner),
                **_options(dw_tile),
            )  # fmt: skip
        if needs_v:
            embeddings_kernel[(*dx_blocks, splits)](
                x, w, rows.labels, g, row_radial, rows.inv_x, partial, d_x,
                first, length, num_rows, dim, triton.cdiv(length, splits), class_blocks,
                *x.stride(), *w.stride(), rows.labels.stride(0),
                HAS_GRAD=rows.grad_loss is not None, IS_FIRST=first == 0, IS_ONLY=is_only,
                ACC=acc, PRECISION=p.gradient_precision,
                BLOCK_N=dx_n, BLOCK_D=dx_d, BLOCK_K=dx_tile.inner, **_options(dx_tile),
            )  # fmt: skip
    return partial


def _chunk_size(num_rows: int, num_classes: int, block_c: int, itemsize: int) -> int:
    """Classes of a chunk: as many whole blocks as CHUNK_BYTES of G hold, at least one."""
    blocks = max(1, CHUNK_BYTES // (num_rows * itemsize * block_c))
    return min(num_classes, blocks * block_c)
