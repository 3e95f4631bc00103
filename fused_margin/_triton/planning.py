"""What a call gets: dtypes, tiles, the strategy of its backward, and what its forward keeps."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fused_margin._arguments import PLAIN, Extras
from fused_margin._numerics import accumulation_dtype, needs_shift
from fused_margin._triton import tiles, tuned
from fused_margin._triton.arguments import Kept, Precision, pitch
from fused_margin._triton.tiles import Lent, Tiles, cdiv, power_of_two, rows_held

Tensor = torch.Tensor

# Up to this many cosines a step is bound by its launches, of which the fused backward has fewest.
LAUNCH_BOUND = 1 << 20
# Up to this D the fused backward reads less per cosine than the chunked one writes and reads.
FUSED_DIM = 64
# Most rows of W for each class: the smallest tile holds one class.
LARGEST_CENTERS = 16
# Up to this many rows d_w isn't lent: narrow tiles of the sweep would spill, and W's bytes bind.
LENT_ROWS = 32
# From this scale on a cosine is the logarithm of its exponential, as rounded, where no tile holds
# whole rows of d_w.
LENT_SCALE = 1.0
# Bytes of a block where nothing is kept: a size that may be 0 or 1 would constrain N under
# torch.export.
NOTHING = 2
# Programs in a sweep under the interpreter, so that merges are exercised there too.
INTERPRETER_PROGRAMS = 3
FAILURES = (CompilationError, OutOfResources, PTXASError)  # of tiles that don't fit a device

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def architecture(device: torch.device | int) -> tuple[str, int | str]:
    """A GPU as Triton names it and `tiles.family` takes it: ("cuda", 90), ("hip", "gfx942")."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "hip", properties.gcnArchName.split(":")[0]
    return "cuda", 10 * properties.major + properties.minor


class Device(NamedTuple):
    """What the choice of dtypes and tiles needs to know of a device.

    Attributes:
        family: see `tiles.family`.
        has_tf32: whether it has TF32 products.
        programs: how many programs run at once.
    """

    family: str
    has_tf32: bool
    programs: int


@functools.cache
def _device(index: int | None) -> Device:
    if index is None:
        return Device("interpreter", True, INTERPRETER_PROGRAMS)
    backend, arch = architecture(index)
    has_tf32 = arch == "gfx942" if backend == "hip" else int(arch) >= 80
    programs = torch.cuda.get_device_properties(index).multi_processor_count
    return Device(tiles.family(backend, arch), has_tf32, programs)


@functools.cache
def _name(index: int | None) -> str:
    return "interpreter" if index is None else torch.cuda.get_device_name(index)


def device_name(x: Tensor) -> str:
    """The name of the tensor's device, for which tiles are tuned."""
    return _name(x.device.index if x.device.type == "cuda" else None)


@dataclass(frozen=True)
class Plan:
    """Dtypes and tiles of one call.

    fp16 lacks the exponents for raw operands and for probabilities: they are normalised before the
    cast, and the two products of the backward run in TF32, in which fp16 values are exact.

    Attributes:
        accumulate: dtype of sums. compute: dtype of the operands of the cosine product.
        gradient: dtype of the stored G and of the operands of the backward products.
        precision: the same for kernels, with the precision of the products.
        operands: the operand type of `tiles.OPERANDS` that the tiles are for.
        descriptors: whether W, x and G are read through tensor descriptors.
        tiles: the tiles.
        lent: tiles of the kernels to which d_w is lent; None where it never is.
        programs: how many programs fill the device.
    """

    accumulate: torch.dtype
    compute: torch.dtype
    gradient: torch.dtype
    precision: Precision
    operands: str
    descriptors: bool
    tiles: Tiles
    lent: Lent | None
    programs: int

    @property
    def prepares(self) -> bool:
        """Whether products for cosines take what `prepare_kernel` makes of x."""
        return self.descriptors or self.precision.NORMALIZE_FIRST

    @property
    def describes_products(self) -> bool:
        """Whether the product for d_w takes descriptors, too.

        In TF32 it wants both operands along the batch, to which x would go by 16-way conflicts.
        """
        return self.descriptors and self.gradient.itemsize != 4


def plan(x: Tensor, w: Tensor, compute_dtype: torch.dtype) -> Plan:
    """Choose dtypes and tiles from the inputs, the device and the float32 matmul precision."""
    p = default_plan(x, w, compute_dtype)
    if _override.descriptors is not None:
        p = replace(plain_plan(x, w, compute_dtype), descriptors=_override.descriptors)
    if _override.tiles is not None:
        return replace(p, tiles=_override.tiles)
    saved = tuned.load(*tuned_for(x, w, p))
    return p if saved is None else replace(p, tiles=saved)


def tuned_for(x: Tensor, w: Tensor, p: Plan) -> tuple[Any, ...]:
    """What tiles are saved for, as `tuned.key` takes it: all that decides how fast they run."""
    operands = f"{p.operands} by descriptors" if p.descriptors else p.operands
    return device_name(x), operands, x.dtype, w.dtype, *x.shape


def default_plan(x: Tensor, w: Tensor, compute_dtype: torch.dtype) -> Plan:
    """The plan with the default tiles."""
    return _default_plan(x, w, compute_dtype, x.device.type == "cuda" and describable(x, w))


def plain_plan(x: Tensor, w: Tensor, compute_dtype: torch.dtype) -> Plan:
    """The same without descriptors, which depends on no size: N may be symbolic."""
    return _default_plan(x, w, compute_dtype, False)


def _default_plan(x: Tensor, w: Tensor, compute_dtype: torch.dtype, is_described: bool) -> Plan:
    index = x.device.index if x.device.type == "cuda" else None
    # `torch.get_float32_matmul_precision` raises where this was set by its newer name
    lowers = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return plan_on(_device(index), accumulation_dtype(x, w), compute_dtype, lowers, is_described)


def describable(x: Tensor, w: Tensor) -> bool:
    """Whether a tensor descriptor can address W, and a call is large enough to make some.

    W has rows of contiguous elements, at multiples of 16 bytes.
    """
    is_large = x.shape[0] * w.shape[0] > LAUNCH_BOUND
    stride_row, stride_d = w.stride()
    is_real = type(w) in (Tensor, torch.nn.Parameter)
    start = w.data_ptr() if is_real else w.storage_offset() * w.itemsize
    return is_large and stride_d == 1 and (stride_row * w.itemsize) % 16 == 0 and start % 16 == 0


@functools.lru_cache(maxsize=256)  # each call asks
def plan_on(
    device: Device,
    accumulate: torch.dtype,
    compute_dtype: torch.dtype,
    lowers: bool,
    is_described: bool,
) -> Plan:
    """The plan with the default tiles of a device.

    Args:
        device: the device. accumulate: dtype of sums. compute_dtype: dtype asked for in products.
        lowers: whether fp32 products may be less than IEEE's.
        is_described: whether tensor descriptors can be used.
    """
    tf32 = "tf32" if device.has_tf32 else "ieee"
    cosines = products = "ieee"
    compute = gradient = torch.float32
    if accumulate is torch.float64:
        compute = gradient = torch.float64
        operands = "fp64"
    elif compute_dtype is torch.bfloat16:
        compute = gradient = torch.bfloat16
        operands = "bf16"
    elif compute_dtype is torch.float16:
        compute, products, operands = torch.float16, tf32, "fp16"
    else:
        cosines = products = operands = tf32 if lowers else "ieee"
    precision = Precision(
        ACC=TRITON_DTYPE[accumulate],
        COMPUTE=TRITON_DTYPE[compute],
        GRADIENT=TRITON_DTYPE[gradient],
        COSINES=cosines,
        PRODUCTS=products,
        NORMALIZE_FIRST=compute is torch.float16,
    )
    described = tiles.DESCRIBED.get((device.family, operands)) if is_described else None
    lent = tiles.LENT if described is None else tiles.DESCRIBED_LENT
    chosen = tiles.default(device.family, operands) if described is None else described
    return Plan(
        accumulate, compute, gradient, precision, operands, described is not None, chosen,
        lent.get((device.family, operands)), device.programs,
    )  # fmt: skip


def with_centers(p: Plan, centers: int) -> Plan:
    """A plan without descriptors for K rows of W for each class, which share a tile."""
    if centers == 1:
        return p
    if centers > LARGEST_CENTERS:
        raise ValueError(
            f"the kernels take at most {LARGEST_CENTERS} sub-centres of a class, got {centers}; use"
            ' backend="reference"'
        )
    places = 1 << (centers - 1).bit_length()
    precision = p.precision._replace(CENTERS=centers, PLACES=places)
    return replace(p, precision=precision, lent=None)


STRATEGIES = ("chunked", "fused", "kept", "lent")


@dataclass(frozen=True)
class Override:
    """What replaces the defaults: a strategy of the backward, tiles, the use of descriptors."""

    strategy: str | None = None
    tiles: Tiles | None = None
    descriptors: bool | None = None


_override = Override()
_override_lock = threading.RLock()


@contextlib.contextmanager
def override(
    strategy: str | None = None, tiles: Tiles | None = None, descriptors: bool | None = None
) -> Iterator[None]:
    """Force a strategy, tiles or descriptors in the whole process: for tests and tuning.

    Autograd's own threads have to see it, and other threads see it, too: they must not use the
    losses meanwhile.
    """
    global _override
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    with _override_lock:
        before, _override = _override, Override(strategy, tiles, descriptors)
        try:
            yield
        finally:
            _override = before


def strategy_for(
    num_rows: int, num_classes: int, dim: int, tiles: Tiles, kept_bytes: int, budget: int
) -> str:
    """Which backward a call gets (docs/design.md).

    ``"kept"`` if an entry for each cosine, ``kept_bytes`` in all, is within the caller's budget;
    ``"lent"`` is not decided here but by `is_lent`, before: without a loan it is "chunked";
    ``"fused"`` for small D, and where launches are what a step costs, if there are tiles for D;
    else ``"chunked"``.
    """
    if _override.strategy is not None:
        if _override.strategy == "fused" and tiles.for_fused(dim) is None:
            raise ValueError(f"no fused tiles for D = {dim}")
        return "chunked" if _override.strategy == "lent" else _override.strategy
    if kept_bytes <= budget:
        return "kept"
    is_small = dim <= FUSED_DIM or num_rows * num_classes <= LAUNCH_BOUND
    return "fused" if is_small and tiles.for_fused(dim) is not None else "chunked"


def _kept_bytes(block_c: int, num_rows: int, p: Plan) -> int:
    """Bytes of the entries of a block of classes, with its shifts."""
    return pitch(num_rows) * (block_c * p.gradient.itemsize + p.accumulate.itemsize)


def _kept_block(num_classes: int, p: Plan) -> int:
    """Classes that share a shift: the default tile's, so that a graph outlives another tuning."""
    return power_of_two(num_classes, p.tiles.forward.c)


def kept_shape(
    x: Tensor, w: Tensor, compute_dtype: torch.dtype, budget: int, extras: Extras = PLAIN
) -> tuple[int, int | torch.SymInt]:
    """Shape of the bytes that the forward keeps: blocks of classes, bytes of each, or `NOTHING`.

    An entry for each cosine, a row for each class up to whole blocks, in the dtype of G, comes
    first in memory, then all shifts. What `strategy_for` decides is a formula without cases here,
    so that `torch.compile` and `torch.export` need not know N.
    """
    if extras.reshapes or (budget <= 0 and _override.strategy != "kept"):
        return 0, NOTHING
    num_rows, num_classes = x.shape[0], int(w.shape[0])
    p = plain_plan(x, w, compute_dtype)
    block_c = _kept_block(num_classes, p)
    blocks, size = cdiv(num_classes, block_c), _kept_bytes(block_c, num_rows, p)
    if _override.strategy is not None:
        fits = int(_override.strategy == "kept")
    else:
        fits = torch.sym_min(1, budget // torch.sym_max(1, blocks * size))
    return blocks, torch.sym_max(NOTHING, size * fits)


def keeps(kept: Tensor) -> bool:
    """Whether there is anything in what `kept_shape` made room for."""
    return kept.shape[1] > NOTHING


def backward_strategy(x: Tensor, w: Tensor, p: Plan, kept: Tensor) -> str:
    """Which backward follows a forward: whether anything is kept was the forward's to decide."""
    if keeps(kept):
        return "kept"
    return strategy_for(x.shape[0], w.shape[0], x.shape[1], p.tiles, kept_bytes=1, budget=0)


def kept_parts(kept: Tensor, num_rows: int, p: Plan) -> tuple[Kept | None, int]:
    """What is in ``kept``, and the classes of a block; None and 0 if nothing is.

    The block is that of the forward, whatever tiles or precision have been chosen since.
    """
    if not keeps(kept):
        return None, 0
    blocks, size = kept.shape
    columns = pitch(num_rows)
    block_c = (size // columns - p.accumulate.itemsize) // p.gradient.itemsize
    end = blocks * block_c * columns * p.gradient.itemsize
    flat = kept.view(-1)
    entries, shifts = flat[:end].view(p.gradient), flat[end:].view(p.accumulate)
    return Kept(entries, shifts, columns, columns), block_c


def lent_rows(x: Tensor, w: Tensor, p: Plan) -> int:
    """Of how many rows of the batch, the first, d_w holds the exponentials; 0 if it isn't lent.

    All; or, where a tile holds whole rows of d_w, so many whole tiles that not much is formed
    again.
    """
    num_rows, dim = x.shape
    if p.lent is None or (dim * w.itemsize) % p.gradient.itemsize:
        return 0
    if p.accumulate is torch.float64 and w.dtype is not p.accumulate:
        return 0  # targets are added to what has been rounded to the dtype of d_w
    held = rows_held(num_rows, dim * w.itemsize // p.gradient.itemsize, p.lent.weight.n)
    return held if held == num_rows or dim <= p.lent.weight.d else 0


def is_lent(x: Tensor, w: Tensor, scale: float, p: Plan, budget: int) -> bool:
    """Whether a forward whose d_w may be lent leaves its exponentials there.

    Where the backward would else be "chunked", if exponentials need no shift, and d_w holds enough
    of them.
    """
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    if lent_rows(x, w, p) == 0 or needs_shift(scale, num_classes, p.accumulate):
        return False
    if p.lent is not None and dim > p.lent.weight.d and scale < LENT_SCALE:
        return False
    if _override.strategy is not None:
        return _override.strategy == "lent"
    if num_rows <= LENT_ROWS or num_rows * num_classes <= LAUNCH_BOUND:  # two launches more
        return False
    block_c = _kept_block(num_classes, p)
    needed = cdiv(num_classes, block_c) * _kept_bytes(block_c, num_rows, p)
    return strategy_for(num_rows, num_classes, dim, p.tiles, needed, budget) == "chunked"
