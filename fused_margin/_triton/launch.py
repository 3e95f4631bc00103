"""Launches the kernels: allocation, grids and tiles. No mathematics."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fused_margin._numerics import accumulation_dtype
from fused_margin._triton import configs
from fused_margin._triton.backward import (
    embeddings_kernel,
    finish_kernel,
    gradient_kernel,
    weight_kernel,
)
from fused_margin._triton.forward import forward_kernel
from fused_margin.margins import NO_MARGIN, Margin

Tensor = torch.Tensor

# Bytes of the chunk of G that the backward keeps at a time, and of all partials of d_x.
CHUNK_BYTES = 32 << 20
PARTIAL_BYTES = 64 << 20
# Rows and columns that a program of `finish_kernel` works on at a time.
FINISH_ROWS, FINISH_COLUMNS = 16, 128
# Programs in a sweep under the interpreter, so that merges are exercised there too.
INTERPRETER_PROGRAMS = 3
# For tests: the order in which the interpreter runs the splits of the forward sweep.
ROTATION = 0

_TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@functools.cache
def _device(index: int | None) -> tuple[str, bool, int]:
    """Family, whether it has TF32 products, and how many programs run at once."""
    if index is None:
        return "interpreter", True, INTERPRETER_PROGRAMS
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return configs.family("hip", arch), arch == "gfx942", properties.multi_processor_count
    arch = 10 * properties.major + properties.minor
    return configs.family("cuda", arch), arch >= 80, properties.multi_processor_count


def _power_of_two(size: int, limit: int) -> int:
    """The smallest block that covers ``size``, at least 16 (a product's minimum), at most limit."""
    return min(limit, max(16, triton.next_power_of_2(size)))


@dataclass(frozen=True)
class Plan:
    """Dtypes and tiles of one call.

    fp16 lacks the exponents for raw operands and for probabilities: it is normalised before the
    cast in the cosine tiles, and the two products of the backward run in TF32, in which fp16 values
    are exact.

    Attributes:
        accumulate: dtype of sums. compute: dtype of the operands of the cosine product.
        gradient: dtype of the stored G and of the operands of the backward products.
        precision: of the cosine product; gradient_precision: of the backward products.
        programs: how many programs fill the device.
    """

    accumulate: torch.dtype
    compute: torch.dtype
    gradient: torch.dtype
    precision: str
    gradient_precision: str
    config: configs.Config
    programs: int

    @property
    def normalize_first(self) -> bool:
        """Whether operands are normalised before the cast."""
        return self.compute is torch.float16

    def constants(self) -> dict[str, Any]:
        """Constexprs of the kernels with a cosine tile."""
        return {
            "ACC": _TRITON_DTYPE[self.accumulate],
            "COMPUTE": _TRITON_DTYPE[self.compute],
            "PRECISION": self.precision,
            "NORMALIZE_FIRST": self.normalize_first,
        }


def plan(x: Tensor, w: Tensor, compute: torch.dtype) -> Plan:
    """Choose dtypes and tiles from the inputs, the device and the float32 matmul precision."""
    accumulate = accumulation_dtype(x, w)
    family, has_tf32, programs = _device(x.device.index if x.device.type == "cuda" else None)
    lowers = torch.get_float32_matmul_precision() != "highest"
    if accumulate is torch.float64:
        return Plan(accumulate, torch.float64, torch.float64, "ieee", "ieee",
                    configs.config(family, "fp64"), programs)  # fmt: skip
    tf32 = "tf32" if has_tf32 else "ieee"
    if compute is torch.bfloat16:
        return Plan(accumulate, compute, compute, "ieee", "ieee",
                    configs.config(family, "bf16"), programs)  # fmt: skip
    if compute is torch.float16:
        return Plan(accumulate, compute, torch.float32, "ieee", tf32,
                    configs.config(family, "fp16"), programs)  # fmt: skip
    precision = tf32 if lowers else "ieee"
    return Plan(accumulate, torch.float32, torch.float32, precision, precision,
                configs.config(family, precision), programs)  # fmt: skip


def _guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
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
) -> tuple[Any, ...]:
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    p = plan(x, w, compute)
    tile = p.config.forward
    block_n, block_c = _power_of_two(num_rows, tile.rows), _power_of_two(num_classes, tile.columns)
    block_k = _power_of_two(dim, tile.inner)
    row_blocks, class_blocks = triton.cdiv(num_rows, block_n), triton.cdiv(num_classes, block_c)
    splits = min(class_blocks, max(1, p.programs // max(row_blocks, 1)))
    blocks_per_split = triton.cdiv(class_blocks, splits)
    splits = triton.cdiv(class_blocks, blocks_per_split)

    def rows(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=p.accumulate, device=x.device)

    lse, u, inv_x, inv_w = rows(num_rows), rows(num_rows), rows(num_rows), rows(num_classes)
    row_loss = loss = d_lse = d_u = count = None
    if margin is not None:
        row_loss, d_lse, d_u, count = rows(num_rows), rows(num_rows), rows(num_rows), rows()
        loss = None if reduction == "none" else rows()
    if num_rows == 0:
        for empty in (loss, count):
            if empty is not None:
                empty.zero_()
    else:
        m = NO_MARGIN if margin is None else margin
        labels = _label_dtype(labels)
        counters = torch.zeros(row_blocks + 1, dtype=torch.int32, device=x.device)
        with _guard(x):
            forward_kernel[(row_blocks, splits)](
                x, w, labels, scale_tensor, rows(splits, 2, num_rows), counters,
                lse, u, inv_x, inv_w, row_loss, loss, d_lse, d_u, count,
                scale, m.cos, m.sin, m.threshold, m.offset, ignore_index,
                num_rows, num_classes, dim, *x.stride(), *w.stride(), labels.stride(0),
                blocks_per_split, splits, ROTATION,
                HAS_SCALE_TENSOR=scale_tensor is not None, HAS_MARGIN=margin is not None,
                STRAIGHT_THROUGH=m.straight_through, REDUCTION=reduction, **p.constants(),
                BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=block_k, **_options(tile),
            )  # fmt: skip
    if margin is None:
        return lse, u, inv_x, inv_w
    return row_loss if loss is None else loss, lse, u, d_lse, d_u, count, inv_x, inv_w


def cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
) -> tuple[Any, ...]:
    """lse, u, inv_x, inv_w of ``fused_margin::cosine_lse``."""
    return _forward(x, w, labels, scale, scale_tensor, compute, None, "none", 0)


def margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    """The eight outputs of ``fused_margin::margin_ce``."""
    return _forward(x, w, labels, scale, None, compute, margin, reduction, ignore_index)


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
    *,
    need_x: bool,
    need_w: bool,
    need_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_x, d_w, d_scale of ``fused_margin::cosine_lse_backward``; None where not needed."""
    (num_rows, dim), num_classes = x.shape, w.shape[0]
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
    labels = _label_dtype(labels)
    # gradients of rows may come with stride 0 (an expanded scalar) and any dtype
    d_lse, d_u = d_lse.to(p.accumulate).contiguous(), d_u.to(p.accumulate).contiguous()
    stride_grad = grad_loss.stride(0) if grad_loss is not None and grad_loss.ndim else 0
    row_flags = {"HAS_GRAD": grad_loss is not None, "HAS_COUNT": count is not None}
    scale_flags = {"HAS_SCALE_TENSOR": scale_tensor is not None}
    acc = _TRITON_DTYPE[p.accumulate]

    tile = p.config.gradient
    block_n, block_c = _power_of_two(num_rows, tile.rows), _power_of_two(num_classes, tile.columns)
    row_blocks = triton.cdiv(num_rows, block_n)
    chunk = _chunk_size(num_rows, num_classes, block_c, p.gradient.itemsize)
    g = torch.empty(chunk, num_rows, dtype=p.gradient, device=device)
    radial = torch.empty(chunk, row_blocks, dtype=p.accumulate, device=device)

    dx_tile, dw_tile = p.config.embeddings, p.config.weight
    dx_n, dx_d = _power_of_two(num_rows, dx_tile.rows), _power_of_two(dim, dx_tile.columns)
    dx_blocks = (triton.cdiv(num_rows, dx_n), triton.cdiv(dim, dx_d))
    dw_c, dw_d = _power_of_two(chunk, dw_tile.rows), _power_of_two(dim, dw_tile.columns)
    partial = None
    splits = 1
    if need_x or need_scale:
        fits = PARTIAL_BYTES // (num_rows * dim * p.accumulate.itemsize)
        wanted = triton.cdiv(2 * p.programs, dx_blocks[0] * dx_blocks[1])
        splits = max(1, min(wanted, fits, triton.cdiv(chunk, 4 * dx_tile.inner)))
        partial = torch.empty(splits, num_rows, dim, dtype=p.accumulate, device=device)

    with _guard(x):
        for first in range(0, num_classes, chunk):
            length = min(chunk, num_classes - first)
            gradient_kernel[(triton.cdiv(length, block_c), row_blocks)](
                x, w, labels, scale_tensor, grad_loss, count, d_lse, d_u,
                lse, u, inv_x, inv_w, g, radial, scale, first, length, num_rows, num_classes, dim,
                *x.stride(), *w.stride(), labels.stride(0), stride_grad,
                **scale_flags, **row_flags, **p.constants(),
                BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=_power_of_two(dim, tile.inner),
                **_options(tile),
            )  # fmt: skip
            if d_w is not None:
                # one axis: the others of a CUDA grid end at 65,535
                weight_kernel[(triton.cdiv(dim, dw_d) * triton.cdiv(length, dw_c),)](
                    x, w, g, radial, inv_w, d_w, first, length, num_rows, dim, row_blocks,
                    *x.stride(), *w.stride(), ACC=acc, PRECISION=p.gradient_precision,
                    BLOCK_C=dw_c, BLOCK_D=dw_d, BLOCK_K=_power_of_two(num_rows, dw_tile.inner),
                    **_options(dw_tile),
                )  # fmt: skip
            if partial is not None:
                embeddings_kernel[(*dx_blocks, splits)](
                    w, g, partial, first, length, num_rows, dim, triton.cdiv(length, splits),
                    *w.stride(), IS_FIRST=first == 0, ACC=acc, PRECISION=p.gradient_precision,
                    BLOCK_N=dx_n, BLOCK_D=dx_d, BLOCK_K=dx_tile.inner, **_options(dx_tile),
                )  # fmt: skip
        d_scale_rows = None
        if partial is not None:
            if need_scale:
                d_scale_rows = torch.empty(num_rows, dtype=p.accumulate, device=device)
            finish_kernel[(triton.cdiv(num_rows, FINISH_ROWS),)](
                x, partial, scale_tensor, grad_loss, count, d_u, u, inv_x, d_x, d_scale_rows,
                scale, num_rows, dim, splits, *x.stride(), stride_grad,
                **scale_flags, **row_flags, NEED_X=need_x, NEED_SCALE=need_scale, ACC=acc,
                BLOCK_N=FINISH_ROWS, BLOCK_D=_power_of_two(dim, FINISH_COLUMNS),
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return d_x, d_w, None if d_scale_rows is None else d_scale_rows.sum()


def _chunk_size(num_rows: int, num_classes: int, block_c: int, itemsize: int) -> int:
    """Classes of a chunk: as many whole blocks as CHUNK_BYTES of G hold, at least one."""
    blocks = max(1, CHUNK_BYTES // (num_rows * itemsize * block_c))
    return min(num_classes, blocks * block_c)
