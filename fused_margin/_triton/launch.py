"""Launches the kernels: allocation, grids and tiles. No mathematics."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fused_margin._numerics import accumulation_dtype
from fused_margin._triton import configs, tuned
from fused_margin._triton.backward import (
    embeddings_kernel,
    finish_kernel,
    fused_embeddings_kernel,
    fused_weight_kernel,
    gradient_kernel,
    weight_kernel,
)
from fused_margin._triton.forward import forward_kernel
from fused_margin.margins import NO_MARGIN, Margin

Tensor = torch.Tensor

# Bytes of the chunk of G that the backward keeps at a time, and of all partials of d_x.
CHUNK_BYTES = 32 << 20
PARTIAL_BYTES = 64 << 20
# Up to this many cosines a step is bound by its launches, of which the fused backward has fewest.
LAUNCH_BOUND = 1 << 20
# Up to this D the fused backward reads less per cosine than the chunked one writes and reads.
FUSED_DIM = 64
# Rows and columns that a program of `finish_kernel` works on at a time.
FINISH_ROWS, FINISH_COLUMNS = 16, 128
# Programs in a sweep under the interpreter, so that merges are exercised there too.
INTERPRETER_PROGRAMS = 3
FAILURES = (CompilationError, OutOfResources, PTXASError)  # of tiles that don't fit a device
is_tuning = False  # while `fused_margin.tuning` tries candidates
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


@functools.cache
def _name(index: int | None) -> str:
    return "interpreter" if index is None else torch.cuda.get_device_name(index)


def device_name(x: Tensor) -> str:
    """The name of the tensor's device, for which tiles are tuned."""
    return _name(x.device.index if x.device.type == "cuda" else None)


def power_of_two(size: int, limit: int) -> int:
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
        operands: the operand type of `configs.OPERANDS` that the tiles are for.
        programs: how many programs fill the device.
    """

    accumulate: torch.dtype
    compute: torch.dtype
    gradient: torch.dtype
    precision: str
    gradient_precision: str
    operands: str
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
    p = _default_plan(x, w, compute)
    if _override.config is not None:
        return replace(p, config=_override.config)
    config = tuned.load(tuned_key(x, w, p))
    return p if config is None else replace(p, config=config)


def tuned_key(x: Tensor, w: Tensor, p: Plan) -> str:
    """What the tiles of a call are saved under: all that decides whether and how fast they run."""
    storage = (str(t.dtype).removeprefix("torch.") for t in (x, w))
    return tuned.key(device_name(x), p.operands, *storage, *x.shape)


def _default_plan(x: Tensor, w: Tensor, compute: torch.dtype) -> Plan:
    """The plan with the default tiles."""
    accumulate = accumulation_dtype(x, w)
    family, has_tf32, programs = _device(x.device.index if x.device.type == "cuda" else None)

    def tiles(operands: str) -> configs.Config:
        return configs.config(family, operands)

    lowers = torch.get_float32_matmul_precision() != "highest"
    if accumulate is torch.float64:
        return Plan(accumulate, torch.float64, torch.float64, "ieee", "ieee", "fp64",
                    tiles("fp64"), programs)  # fmt: skip
    tf32 = "tf32" if has_tf32 else "ieee"
    if compute is torch.bfloat16:
        return Plan(accumulate, compute, compute, "ieee", "ieee", "bf16",
                    tiles("bf16"), programs)  # fmt: skip
    if compute is torch.float16:
        return Plan(accumulate, compute, torch.float32, "ieee", tf32, "fp16",
                    tiles("fp16"), programs)  # fmt: skip
    precision = tf32 if lowers else "ieee"
    return Plan(accumulate, torch.float32, torch.float32, precision, precision, precision,
                tiles(precision), programs)  # fmt: skip


@contextlib.contextmanager
def tuning_flag() -> Iterator[None]:
    """Keep the calls inside from tuning on demand."""
    global is_tuning
    before, is_tuning = is_tuning, True
    try:
        yield
    finally:
        is_tuning = before


_tried: set[str] = set()  # keys that `tune_once` has tuned, or failed to, in this process


def tune_once(x: Tensor, w: Tensor, compute: torch.dtype) -> None:
    """Tune for this call if nothing is saved for it; not while a graph is being captured."""
    if is_tuning or not x.shape[0]:
        return
    p = _default_plan(x, w, compute)
    key = tuned_key(x, w, p)
    with guard(x):
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
    if key in _tried or tuned.load(key) is not None:
        return
    _tried.add(key)
    from fused_margin import tuning

    shape = (x.shape[0], *w.shape)
    print(f"fused_margin: tuning tiles for N, C, D = {shape}, {p.operands}", file=sys.stderr)
    autocast = compute if p.accumulate is torch.float32 and compute is not x.dtype else None
    try:
        tuning.tune(*shape, dtype=x.dtype, weight_dtype=w.dtype, autocast=autocast, device=x.device)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        warnings.warn(f"tuning failed, training goes on without: {error}", stacklevel=2)


STRATEGIES = ("chunked", "fused", "kept")


@dataclass(frozen=True)
class Override:
    """What replaces the defaults: a strategy of the backward, tiles."""

    strategy: str | None = None
    config: configs.Config | None = None


_override = Override()
_override_lock = threading.RLock()


@contextlib.contextmanager
def override(strategy: str | None = None, config: configs.Config | None = None) -> Iterator[None]:
    """Force a strategy or tiles, in the whole process: for tests, benchmarks and tuning.

    Autograd's own threads have to see it, and other threads see it, too: they must not use the
    losses meanwhile.
    """
    global _override
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    with _override_lock:
        before, _override = _override, Override(strategy, config)
        try:
            yield
        finally:
            _override = before


def strategy_for(
    num_rows: int, num_classes: int, dim: int, config: configs.Config, kept_bytes: int, budget: int
) -> str:
    """Which backward a call gets (docs/design.md).

    ``"kept"`` if the forward's exponentials, ``kept_bytes``, are within the caller's budget;
    ``"fused"`` for small D, and where launches are what a step costs, if there are tiles for D;
    else ``"chunked"``.
    """
    if _override.strategy is not None:
        if _override.strategy == "fused" and config.fused_tiles(dim) is None:
            raise ValueError(f"no fused tiles for D = {dim}")
        return _override.strategy
    if kept_bytes <= budget:
        return "kept"
    is_small = dim <= FUSED_DIM or num_rows * num_classes <= LAUNCH_BOUND
    return "fused" if is_small and config.fused_tiles(dim) is not None else "chunked"


def _kept_bytes(block_c: int, num_rows: int, p: Plan) -> int:
    """Bytes of a block of classes of the kept exponentials, with its shifts."""
    return num_rows * (block_c * p.gradient.itemsize + p.accumulate.itemsize)


def _kept_block(num_classes: int, p: Plan) -> int:
    """Classes that share a shift: the default tile's, so that a graph outlives another tuning."""
    return power_of_two(num_classes, p.config.forward.columns)


def kept_shape(x: Tensor, w: Tensor, compute: torch.dtype, budget: int) -> tuple[int, int]:
    """Shape of the bytes that the forward keeps: blocks of classes, bytes of each.

    All exponentials, a row for each class up to whole blocks, in the dtype of G, come first in
    memory, then all shifts.
    """
    if budget <= 0 and _override.strategy != "kept":
        return 0, 0
    # under torch.compile the number of rows may stay symbolic
    num_rows, dim, num_classes = x.shape[0], int(x.shape[1]), int(w.shape[0])
    p = _default_plan(x, w, compute)
    block_c = _kept_block(num_classes, p)
    blocks, size = triton.cdiv(num_classes, block_c), _kept_bytes(block_c, num_rows, p)
    chosen = strategy_for(num_rows, num_classes, dim, p.config, blocks * size, budget)
    return (blocks, size) if chosen == "kept" and num_rows else (0, 0)


def _kept_parts(kept: Tensor, num_rows: int, p: Plan) -> tuple[Tensor, Tensor, int]:
    """The exponentials and the shifts in ``kept``, and the classes of a block."""
    blocks, size = kept.shape
    block_c = (size // num_rows - p.accumulate.itemsize) // p.gradient.itemsize
    end = blocks * block_c * num_rows * p.gradient.itemsize
    flat = kept.view(-1)
    return flat[:end].view(p.gradient), flat[end:].view(p.accumulate), block_c


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
    exponentials, shifts, kept_block = (
        _kept_parts(kept, num_rows, p) if kept.numel() else (None, None, 0)
    )
    block_n = power_of_two(num_rows, tile.rows)
    block_c = kept_block or power_of_two(num_classes, tile.columns)
    block_k = power_of_two(dim, tile.inner)
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
        with guard(x):
            forward_kernel[(row_blocks, splits)](
                x, w, labels, scale_tensor, rows(splits, 2, num_rows), counters,
                lse, u, inv_x, inv_w, row_loss, loss, d_lse, d_u, count, exponentials, shifts,
                scale, m.cos, m.sin, m.threshold, m.offset, ignore_index,
                num_rows, num_classes, dim, *x.stride(), *w.stride(), labels.stride(0),
                blocks_per_split, splits, ROTATION,
                HAS_SCALE_TENSOR=scale_tensor is not None, HAS_MARGIN=margin is not None,
                STRAIGHT_THROUGH=m.straight_through, REDUCTION=reduction,
                KEEP=kept.numel() > 0, **p.constants(),
                BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=block_k, **_options(tile),
            )  # fmt: skip
    if margin is None:
        return lse, u, inv_x, inv_w, kept
    return row_loss if loss is None else loss, lse, u, d_lse, d_u, count, inv_x, inv_w, kept


def cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    budget: int,
) -> tuple[Any, ...]:
    """The five outputs of ``fused_margin::cosine_lse``."""
    return _forward(x, w, labels, scale, scale_tensor, compute, None, "none", 0, budget)


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
    """The nine outputs of ``fused_margin::margin_ce``."""
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
    # gradients of rows may come with stride 0 (an expanded scalar) and any dtype
    d_lse, d_u = d_lse.to(p.accumulate).contiguous(), d_u.to(p.accumulate).contiguous()
    rows = Rows(
        _label_dtype(labels), d_lse, d_u, lse, u, inv_x, grad_loss, count, scale, scale_tensor
    )
    # what was kept goes through the chunks; whether anything is kept was the forward's to decide
    strategy = "kept" if kept.numel() else strategy_for(num_rows, num_classes, dim, p.config, 1, 0)
    launch = _fused if strategy == "fused" else _chunked
    with guard(x):
        partial = launch(p, rows, x, w, inv_w, kept, d_x, d_w, need_scale=need_scale)
        d_scale_rows = None
        if partial is not None:
            if need_scale:
                d_scale_rows = torch.empty(num_rows, dtype=p.accumulate, device=device)
            finish_kernel[(triton.cdiv(num_rows, FINISH_ROWS),)](
                x, partial, scale_tensor, grad_loss, count, d_u, u, inv_x, d_x, d_scale_rows,
                scale, num_rows, dim, partial.shape[0], *x.stride(), rows.stride_grad,
                **rows.flags, NEED_X=need_x, NEED_SCALE=need_scale, ACC=_TRITON_DTYPE[p.accumulate],
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
    kept: Tensor,
    d_x: Tensor | None,
    d_w: Tensor | None,
    *,
    need_scale: bool,
) -> Tensor | None:
    """Launch the fused backward; returns the partials of d_x that are still to be merged."""
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    tiles = p.config.fused_tiles(dim)
    if tiles is None or kept.numel():
        raise RuntimeError("the fused backward was chosen without tiles for this D")
    block_d = max(16, triton.next_power_of_2(dim))
    constants = p.constants() | {
        "GRADIENT": _TRITON_DTYPE[p.gradient], "GRADIENT_PRECISION": p.gradient_precision,
        "BLOCK_D": block_d,
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
    acc = _TRITON_DTYPE[p.accumulate]
    exponentials, shifts, kept_block = (
        _kept_parts(kept, num_rows, p) if kept.numel() else (None, None, 0)
    )

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
        triton.cdiv(2 * p.programs, dx_blocks[0] * dx_blocks[1]),
        triton.cdiv(chunk, 4 * dx_tile.inner),
        num_rows * dim * p.accumulate.itemsize,
    )
    is_only = d_x is not None and splits == 1 and chunk == num_classes and not need_scale
    partial = rows_of(splits, num_rows, dim) if needs_v and not is_only else None
    class_blocks = triton.cdiv(num_classes, block_c)
    row_radial = rows_of(class_blocks, num_rows) if is_only else None

    for first in range(0, num_classes, chunk):
        length = min(chunk, num_classes - first)
        gradient_kernel[(triton.cdiv(length, block_c), row_blocks)](
            x, w, *rows.pointers, inv_w, exponentials, shifts, g, radial, row_radial,
            rows.scale, first, length, num_rows, dim,
            *x.stride(), *w.stride(), rows.labels.stride(0), rows.stride_grad,
            **rows.flags, KEPT_BLOCK=kept_block, IS_ONLY=is_only, **p.constants(),
            BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_K=power_of_two(dim, tile.inner),
            **_options(tile),
        )  # fmt: skip
        if d_w is not None:
            # one axis: the others of a CUDA grid end at 65,535
            weight_kernel[(triton.cdiv(dim, dw_d) * triton.cdiv(length, dw_c),)](
                x, w, g, radial, inv_w, d_w, first, length, num_rows, dim, row_blocks,
                *x.stride(), *w.stride(), ACC=acc, PRECISION=p.gradient_precision,
                BLOCK_C=dw_c, BLOCK_D=dw_d, BLOCK_K=power_of_two(num_rows, dw_tile.inner),
                **_options(dw_tile),
            )  # fmt: skip
        if needs_v:
            embeddings_kernel[(*dx_blocks, splits)](
                x, w, g, row_radial, rows.inv_x, partial, d_x,
                first, length, num_rows, dim, triton.cdiv(length, splits), class_blocks,
                *x.stride(), *w.stride(),
                IS_FIRST=first == 0, IS_ONLY=is_only, ACC=acc, PRECISION=p.gradient_precision,
                BLOCK_N=dx_n, BLOCK_D=dx_d, BLOCK_K=dx_tile.inner, **_options(dx_tile),
            )  # fmt: skip
    return partial


def _chunk_size(num_rows: int, num_classes: int, block_c: int, itemsize: int) -> int:
    """Classes of a chunk: as many whole blocks as CHUNK_BYTES of G hold, at least one."""
    blocks = max(1, CHUNK_BYTES // (num_rows * itemsize * block_c))
    return min(num_classes, blocks * block_c)
