"""What the kernels make of the cosines of other classes. Equations refer to ``docs/math.md``."""

import triton
import triton.language as tl

from fused_margin._triton.primitives import SINE_SQUARED_FLOOR


@triton.jit
def class_rows(block, num_rows, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of W of a block, and which of them there are; (BLOCK_C,) each.

    The K of a class stay together, and take a power of two of places.
    """
    place = tl.arange(0, BLOCK_C)
    if P.CENTERS == 1:
        offs = block * BLOCK_C + place
        return offs, offs < num_rows
    else:
        center = place % P.PLACES
        first = (block * (BLOCK_C // P.PLACES) + place // P.PLACES) * P.CENTERS
        return first + center, (center < P.CENTERS) & (first < num_rows)


@triton.jit
def num_blocks(num_rows, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Blocks that so many rows of W make."""
    return tl.cdiv(num_rows, BLOCK_C // P.PLACES * P.CENTERS)


@triton.jit
def own_class(labels, num_rows, P: tl.constexpr):
    """The class of a label, a row of W; -1 for one outside, which is no class's."""
    is_inside = (labels >= 0) & (labels < num_rows)
    return tl.where(is_inside, labels // P.CENTERS, -1).to(tl.int32)


@triton.jit
def _first_of_largest(z, places, AXIS: tl.constexpr, P: tl.constexpr):
    """z where it is the first of the largest along an axis, elsewhere -inf."""
    largest = tl.expand_dims(tl.max(z, axis=AXIS), AXIS)
    first = tl.min(tl.where(z == largest, places, P.PLACES), axis=AXIS)
    is_first = places == tl.expand_dims(first, AXIS)
    return tl.where(is_first | (z != z), z, -float("inf"))  # NaN stays


@triton.jit
def nearest_of_columns(z, P: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """z (ROWS, BLOCK_C), -inf where another of the class's rows of W is nearer."""
    of_class = z.reshape(ROWS, BLOCK_C // P.PLACES, P.PLACES)
    places = tl.arange(0, P.PLACES)[None, None, :]
    return _first_of_largest(of_class, places, 2, P).reshape(ROWS, BLOCK_C)


@triton.jit
def nearest_of_rows(z, P: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of z (BLOCK_C, COLUMNS)."""
    of_class = z.reshape(BLOCK_C // P.PLACES, P.PLACES, COLUMNS)
    places = tl.arange(0, P.PLACES)[None, :, None]
    return _first_of_largest(of_class, places, 1, P).reshape(BLOCK_C, COLUMNS)


@triton.jit
def shaped(z, threshold, others, s):
    """s phi(c) and its slope (eq. 20) of z = s c; -inf stays.

    With ``others.root``, a flag, phi has a seventh number.

    Args:
        z: a tile. threshold: s tau, broadcast to it. others: `Others`. s: (1,).
    """
    ACC: tl.constexpr = z.dtype
    offset, linear = tl.load(others.phi).to(ACC), tl.load(others.phi + 1).to(ACC)
    square, slope = tl.load(others.phi + 2).to(ACC), tl.load(others.phi + 3).to(ACC)
    slope_linear, below = tl.load(others.phi + 4).to(ACC), tl.load(others.phi + 5).to(ACC)
    is_above = z > threshold
    finite = tl.where(z == -float("inf"), 0.0, z)
    value = s * offset + finite * (linear + square / s * finite)
    above = slope + slope_linear / s * finite
    if others.root is not None:
        root = tl.load(others.phi + 6).to(ACC)
        cos = finite / s
        sine_squared = 1.0 - cos * cos
        value += s * root * tl.sqrt(tl.maximum(sine_squared, tl.full([1, 1], 0.0, ACC)))
        floor = tl.full([1, 1], SINE_SQUARED_FLOOR, ACC)
        above -= root * cos / tl.sqrt(tl.maximum(sine_squared, floor))
    value = tl.where(is_above, value, below * finite)
    value = tl.where(z == -float("inf"), z, value)
    return value, tl.where(is_above, above, below)
