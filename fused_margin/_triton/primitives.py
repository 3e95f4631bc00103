"""Pieces that the forward and backward kernels share. Equations refer to ``docs/math.md``."""

import triton
import triton.language as tl

from fused_margin import _arguments, _numerics, _validate, margins

INTERPRETED = tl.constexpr(_validate.INTERPRETED)
NORM_EPS = tl.constexpr(_numerics.NORM_EPS)
IGNORED = tl.constexpr(_arguments.IGNORED)
INVALID = tl.constexpr(_arguments.INVALID)
# Inverse norms of rows of W that fp16 holds as they are: it ends at 65,504, and loses digits of
# numbers below 2^-14, in steps of 2^-24.
LEAST_INVERSE, LARGEST_INVERSE = tl.constexpr(2.0**-15), tl.constexpr(2.0**8)
NOT_ZERO = tl.constexpr(2.0**-100)  # a kept exponent of 0 becomes its negative
CLAMPED = tl.constexpr(_numerics.CLAMPED_INVERSE_NORM)
SINE_SQUARED_FLOOR = tl.constexpr(margins.SINE_SQUARED_FLOOR)
QUARTERED = tl.constexpr(64)  # columns from which on a tile is finished in quarters
LOG1P_TERMS = tl.constexpr(18)  # r <= 1/3: the first term left out is below 2^-60


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE and x.dtype != tl.bfloat16:
        # the interpreter truncates, and garbles fp64: round the upper half of the bits first
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    if tl.float64 == DTYPE and x.dtype.primitive_bitwidth == 16:
        # Triton lays out an operand by the width it was loaded with, and its fp64 product takes
        # none of 16 bits: a sum of one term hides that width
        x = tl.sum(x.to(tl.float64)[:, :, None], axis=2)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, P: tl.constexpr, OF_COSINES: tl.constexpr):
    """acc + a b, in the precision of cosines or of the products with G."""
    if INTERPRETED:  # the interpreter's product of bf16 operands multiplies their bit patterns
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    if OF_COSINES:
        return tl.dot(a, b, acc, input_precision=P.COSINES, out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=P.PRODUCTS, out_dtype=acc.dtype)


@triton.jit
def log1p(a):
    """log(1 + a) for a in [0, 1], to full relative precision whatever the device's log (eq. 10)."""
    r = a / (2.0 + a)
    r_squared = r * r
    series = tl.zeros_like(r)
    for i in tl.static_range(LOG1P_TERMS):
        series = series * r_squared + 1.0 / (2 * (LOG1P_TERMS - 1 - i) + 1)
    return 2.0 * r * series


@triton.jit
def inverse_norm(sum_squares):
    """1 / max(sqrt(sum_squares), eps); NaN, not 0, where the squares overflowed."""
    # a bare constant is fp32 in `maximum`, even beside fp64
    eps = tl.full([1], NORM_EPS, sum_squares.dtype)
    inverse = 1.0 / tl.maximum(tl.sqrt(sum_squares), eps)
    return tl.where(sum_squares == float("inf"), float("nan"), inverse)


@triton.jit
def around_cast(inv_w):
    """What rows of W are multiplied by before a cast to fp16, and their products after; (R,) each.

    The inverse norms before it, where fp16 would not hold a row, else after it: a sweep knows no
    norm before its products, and all kernels have to round alike.
    """
    is_beyond = (inv_w < LEAST_INVERSE) | (inv_w > LARGEST_INVERSE)
    return tl.where(is_beyond, inv_w, 1.0), tl.where(is_beyond, 1.0, inv_w)


@triton.jit
def at(matrix, rows, dims):
    """Pointers to elements of a `Matrix`; rows and dims broadcast, as (R, 1) and (1, K) do."""
    if matrix.index is not None:
        rows = tl.load(matrix.index + rows.to(tl.int64))
    return matrix.ptr + rows.to(tl.int64) * matrix.stride_row + dims.to(tl.int64) * matrix.stride_d


@triton.jit
def row_inverse_norm(matrix, offs, mask, D, ACC: tl.constexpr, BLOCK: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """1 / max(||row||, eps) of the rows ``offs``, (BLOCK,)."""
    sum_squares = tl.zeros([BLOCK], ACC)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        rows = tl.load(
            at(matrix, offs[:, None], offs_d[None, :]),
            mask=mask[:, None] & (offs_d < D)[None, :], other=0.0,
        ).to(ACC)  # (BLOCK, BLOCK_D)  # fmt: skip
        sum_squares += tl.sum(rows * rows, axis=1)
    return inverse_norm(sum_squares)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile, (ROWS, COLUMNS / 2) each."""
    left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's quarters from left to right."""
    left, right = _halves(tile, ROWS, COLUMNS)
    first, second = _halves(left, ROWS, COLUMNS // 2)
    third, fourth = _halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def in_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EIGHTHS: tl.constexpr = False):
    """A wide tile's quarters or eighths, left to right: an epilogue of one fits in registers.

    A narrow tile is its only part.
    """
    if COLUMNS < QUARTERED:
        return (tile,)
    elif EIGHTHS and COLUMNS > QUARTERED:
        left, right = _halves(tile, ROWS, COLUMNS)
        a, b, c, d = _quarters(left, ROWS, COLUMNS // 2)
        e, f, g, h = _quarters(right, ROWS, COLUMNS // 2)
        return a, b, c, d, e, f, g, h
    else:
        return _quarters(tile, ROWS, COLUMNS)


@triton.jit
def load_labels(rows, offs_n, mask_n):
    """Labels, (BLOCK_N,) int64, -1 past the end."""
    offs = offs_n.to(tl.int64) * rows.stride_label
    return tl.load(rows.labels + offs, mask=mask_n, other=-1).to(tl.int64)


@triton.jit
def load_scale(scale, rows, ACC: tl.constexpr):
    """s, (1,): from memory, or from an fp64 argument."""
    if rows.scale is not None:
        return tl.full([1], 0.0, ACC) + tl.load(rows.scale).to(ACC)
    else:
        return tl.full([1], scale, ACC)


@triton.jit
def margin_loss(u, lse, s, cos_m, sin_m, threshold, offset, STRAIGHT_THROUGH: tl.constexpr):
    """Loss and its derivatives by lse and by u (eq. 4 to 6); all (BLOCK_N,), u in [-1, 1]."""
    sine_squared = 1.0 - u * u
    is_angular = u >= threshold
    psi = tl.where(is_angular, u * cos_m - tl.sqrt(sine_squared) * sin_m, u - offset)
    slope = tl.full(u.shape, 1.0, u.dtype)
    if not STRAIGHT_THROUGH:
        floor = tl.full([1], SINE_SQUARED_FLOOR, u.dtype)
        inv_sine = 1.0 / tl.sqrt(tl.maximum(sine_squared, floor))
        slope = tl.where(is_angular, cos_m + u * sin_m * inv_sine, slope)
    gap = s * psi - lse
    e = tl.exp(-tl.abs(gap))
    loss = tl.maximum(-gap, 0.0) + log1p(e)
    sigma = tl.where(gap > 0.0, e, 1.0) / (1.0 + e)  # sigmoid(-gap)
    return loss, sigma, -sigma * s * slope
