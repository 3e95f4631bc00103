"""The backward after a forward to which d_w was lent, of whose rows a tile holds whole ones.

Equations refer to ``docs/math.md``.

There lie the exponentials of class k, Q_kn = exp(s c_kn) / ||w_k||, 0 at the targets, in what will
be row k of d_w. With f_n = g_lse s exp(-lse_n), G_kn = f_n ||w_k|| Q_kn for k != y_n (eq. 7): no
cosine is formed again, and nothing is done to an exponential. Two products are left: for d_x,
sum_k Q_kn w_k, by `embeddings_kernel`, and for d_w, sum_n Q_kn f_n x_hat_n, whose programs read the
rows of Q over which they write their rows of d_w, and no others. A row of d_w that is too short for
all of the batch holds the exponentials of its first rows; those of the others are formed again, for
some classes at a time.

f_n may be beyond what fp32 holds, as a loss tends to 0. Its ratio to exp(M) goes into a product,
with M = 0 where the largest f_n is from 1 to exp(80), and else one that brings it there; what is
multiplied by exp(M), by halves, is finite.
"""

import triton
import triton.language as tl

from fused_margin._triton import arguments
from fused_margin._triton.backward import (
    _merge_partials,
    _row_quantities,
    _store_d_w,
    _store_d_x,
    _used_rows,
)
from fused_margin._triton.primitives import at, cast, dot, in_parts, load_scale

PITCH = tl.constexpr(
    arguments.PITCH
)  # what lies past N and within it are numbers, to multiply by 0
LARGEST_LOG = tl.constexpr(80.0)  # of a factor in a product: exp(80) is 5e34
SCANNED = tl.constexpr(256)  # rows looked at at a time, for the largest factor of all


@triton.jit
def _log_factor(rows, offs_n, mask_n, s, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """log |f_n| and the sign of f_n, (BLOCK_N,); -inf and 0 past the end and for ignored rows."""
    _, _, g_lse, _, lse, _, _ = _row_quantities(rows, offs_n, mask_n, ACC, BLOCK_N)
    a = g_lse * s
    is_zero = a == 0.0
    lse = tl.where(lse == -float("inf"), 0.0, lse)  # without any other class nothing is left
    log_factor = tl.where(is_zero, -float("inf"), tl.log(tl.where(is_zero, 1.0, tl.abs(a))) - lse)
    return log_factor, tl.where(is_zero, 0.0, tl.where(a < 0.0, -1.0, 1.0))


@triton.jit(do_not_specialize=["N"])
def lent_prepare_kernel(
    x, rows, operand_ptr, largest_ptr, stride_operand, scale: tl.float64, N, D, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """f_n x_hat_n / exp(M) in the dtype of products, (N, D), and M."""
    s = load_scale(scale, rows, P.ACC)
    largest = tl.full([SCANNED], -float("inf"), P.ACC)
    for n in range(0, N, SCANNED):
        offs = n + tl.arange(0, SCANNED)
        log_factor, _ = _log_factor(rows, offs, offs < N, s, P.ACC, SCANNED)
        largest = tl.maximum(largest, log_factor)
    largest = tl.max(largest, axis=0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    # not less than there is need for: what is small against the largest f_n may have a large Q_kn
    excess = largest - LARGEST_LOG
    largest = tl.minimum(largest, tl.where(excess > 0.0, excess, 0.0))
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if tl.program_id(0) == 0:
        tl.store(largest_ptr, largest)
    _, mask_x = _used_rows(rows, offs_n, mask_n)
    log_factor, sign = _log_factor(rows, offs_n, mask_n, s, P.ACC, BLOCK_N)
    inv_x = tl.load(rows.inv_x + offs_n, mask=mask_n, other=0.0)
    ratio = sign * tl.exp(log_factor - largest)
    operand = operand_ptr + offs_n.to(tl.int64)[:, None] * stride_operand
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < D
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & mask_d, other=0.0)
        # in this order: the direction first, as the inverse of a small norm is large
        scaled = cast(x_rows.to(P.ACC) * inv_x[:, None] * ratio[:, None], P.GRADIENT)
        tl.store(operand + offs_d, scaled, mask=mask_n[:, None] & mask_d)


@triton.jit
def _add_product(tile, q, operand, q_desc, x_desc, first_class, first_row, offs_c, mask_c, N, D,
                 P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Adds sum_n Q_kn f_n x_hat_n over N rows of the batch, of which ``operand`` has others first.

    Descriptors read classes from ``first_class`` on, pointers those of ``offs_c``.
    """
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for n in range(0, N, BLOCK_N):
        if q_desc is not None:
            q_rows = q_desc.load([first_class, n])  # (BLOCK_C, BLOCK_N)
            x_rows = x_desc.load([first_row + n, 0])  # (BLOCK_N, BLOCK_D)
        else:
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_q = mask_c[:, None] & (offs_n < tl.cdiv(N, PITCH) * PITCH)[None, :]
            q_rows = tl.load(at(q, offs_c[:, None], offs_n[None, :]), mask=mask_q, other=0.0)
            x_rows = tl.load(at(operand, (first_row + offs_n)[:, None], offs_d),
                             mask=(offs_n < N)[:, None] & (offs_d < D), other=0.0)  # fmt: skip
        tile = dot(q_rows, x_rows, tile, P, False)
    return tile


@triton.jit(do_not_specialize=["first_class", "num_classes", "num_lent", "num_beyond"])
def lent_weight_kernel(
    operand, w, q, beyond, x_desc, q_desc, beyond_desc, largest_ptr, inv_w_ptr, d_w_ptr,
    first_class, num_classes, num_lent, num_beyond, D, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of d_w of a block of classes, but for their targets (eq. 8), over their exponentials.

    Of ``num_classes`` from ``first_class`` on. Exponentials of the first ``num_lent`` rows of the
    batch lie in d_w, those of ``num_beyond`` others, if there are any, in ``beyond``.
    """
    offs_local = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_local < num_classes
    offs_c = first_class + offs_local
    first_local = tl.program_id(0) * BLOCK_C
    tile = tl.zeros([BLOCK_C, BLOCK_D], P.ACC)
    tile = _add_product(tile, q, operand, q_desc, x_desc, first_class + first_local, 0,
                        offs_c, mask_c, num_lent, D, P, BLOCK_N, BLOCK_D)  # fmt: skip
    if beyond.ptr is not None:
        tile = _add_product(tile, beyond, operand, beyond_desc, x_desc, first_local, num_lent,
                            offs_local, mask_c, num_beyond, D, P, BLOCK_N, BLOCK_D)  # fmt: skip
    tl.debug_barrier()  # all warps have read their exponentials before one writes over them
    half = tl.exp(0.5 * tl.load(largest_ptr))
    tile = tile * half * half
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    offs_c = offs_c.to(tl.int64)
    radial = tl.zeros([BLOCK_C], P.ACC)
    parts = in_parts(tile, BLOCK_C, BLOCK_D, True)
    PARTS: tl.constexpr = len(parts)
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for i in tl.static_range(PARTS):
        offs_d = (i * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = mask_c[:, None] & (offs_d < D)
        w_rows = tl.load(at(w, offs_c[:, None], offs_d), mask=mask, other=0.0)
        radial += tl.sum(parts[i] * w_rows.to(P.ACC), axis=1)
    for i in tl.static_range(PARTS):
        offs_d = (i * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = mask_c[:, None] & (offs_d < D)
        w_rows = tl.load(at(w, offs_c[:, None], offs_d), mask=mask, other=0.0)
        _store_d_w(d_w_ptr, parts[i], w_rows, radial, inv_w, offs_c, offs_d, mask, D, P.ACC)


@triton.jit
def _of_class(rows, label, offs_n, N, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which rows have this target, with g_u / ||x|| and g_u u of each, (BLOCK_N,)."""
    labels, mask_x, _, g_u, _, u, inv_x = _row_quantities(rows, offs_n, offs_n < N, ACC, BLOCK_N)
    is_here = mask_x & (labels == label)
    return is_here, tl.where(is_here, g_u * inv_x, 0.0), tl.where(is_here, g_u * u, 0.0)


@triton.jit(do_not_specialize=["N"])
def lent_targets_kernel(
    x, w, rows, inv_w_ptr, d_w_ptr, N, C, D, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to a row of d_w the part of the rows whose target it is: the first of these does."""
    row = tl.program_id(0)
    label = tl.load(rows.labels + row.to(tl.int64) * rows.stride_label).to(tl.int64)
    earlier = 0
    for n in range(0, row, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        is_here, _, _ = _of_class(rows, label, offs_n, row, P.ACC, BLOCK_N)
        earlier += tl.sum(is_here.to(tl.int32), axis=0)
    if (earlier == 0) & (label >= 0) & (label < C):
        inv_w = tl.full([1], 0.0, P.ACC) + tl.load(inv_w_ptr + label)
        radial = tl.zeros([1], P.ACC)
        for n in range(row, N, BLOCK_N):
            _, _, of_radial = _of_class(rows, label, n + tl.arange(0, BLOCK_N), N, P.ACC, BLOCK_N)
            radial += tl.sum(of_radial, axis=0)
        offs_c = tl.full([1], 0, tl.int64) + label
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)[None, :]
            mask = offs_d < D
            tile = tl.zeros([1, BLOCK_D], P.ACC)
            for n in range(row, N, BLOCK_N):
                offs_n = n + tl.arange(0, BLOCK_N)
                is_here, factor, _ = _of_class(rows, label, offs_n, N, P.ACC, BLOCK_N)
                x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=is_here[:, None] & mask,
                                 other=0.0).to(P.ACC)  # fmt: skip
                tile += tl.sum(x_rows * factor[:, None], axis=0)[None, :]
            before = tl.load(d_w_ptr + offs_c[:, None] * D + offs_d, mask=mask, other=0.0)
            w_row = tl.load(at(w, offs_c[:, None], offs_d), mask=mask, other=0.0)
            tile = before.to(P.ACC) + tile * inv_w[:, None]
            _store_d_w(d_w_ptr, tile, w_row, radial, inv_w, offs_c, offs_d, mask, D, P.ACC)


@triton.jit
def _v(
    w, rows, partial_ptr, factors, of_target, label, offs_n, mask_x, offs_d, N, D, num_splits,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_k G_nk w_hat_k / ||x_n||, (BLOCK_N, BLOCK_D)."""
    a, decay = factors
    mask = mask_x[:, None] & (offs_d < D)
    v = _merge_partials(
        partial_ptr, offs_n.to(tl.int64), offs_d, mask, N, D, num_splits, ACC, BLOCK_N, BLOCK_D
    )
    w_rows = tl.load(at(w, label[:, None], offs_d), mask=mask & (label >= 0)[:, None], other=0.0)
    return v * decay[:, None] * a[:, None] + w_rows.to(ACC) * of_target[:, None]


@triton.jit(do_not_specialize=["N", "num_splits"])
def lent_finish_kernel(
    x, w, rows, partial_ptr, inv_w_ptr, d_x_ptr, scale: tl.float64, N, C, D, num_splits,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the partials, adds the targets and projects: d_x (N, D) (eq. 8)."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    s = load_scale(scale, rows, P.ACC)
    labels, mask_x, g_lse, g_u, lse, _, inv_x = _row_quantities(
        rows, offs_n, mask_n, P.ACC, BLOCK_N
    )
    has_target = (labels >= 0) & (labels < C)
    label = tl.where(has_target, labels, -1)
    inv_w = tl.load(inv_w_ptr + label, mask=has_target, other=0.0)
    of_target = tl.where(has_target, g_u * inv_w * inv_x, 0.0)
    # one after the other: their product may be less than fp32 holds
    factors = g_lse * s * inv_x, tl.exp(tl.where(lse == -float("inf"), 0.0, -lse))
    radial = tl.zeros([BLOCK_N], P.ACC)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        v = _v(w, rows, partial_ptr, factors, of_target, label, offs_n, mask_x, offs_d, N, D,
               num_splits, P.ACC, BLOCK_N, BLOCK_D)  # fmt: skip
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & (offs_d < D),
                         other=0.0)  # fmt: skip
        radial += tl.sum(v * x_rows.to(P.ACC), axis=1)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        v = _v(w, rows, partial_ptr, factors, of_target, label, offs_n, mask_x, offs_d, N, D,
               num_splits, P.ACC, BLOCK_N, BLOCK_D)  # fmt: skip
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & (offs_d < D),
                         other=0.0)  # fmt: skip
        mask = mask_n[:, None] & (offs_d < D)
        _store_d_x(d_x_ptr, v, x_rows, radial, inv_x, offs_n.to(tl.int64), offs_d, mask, D, P.ACC)
