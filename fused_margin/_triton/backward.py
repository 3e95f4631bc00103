"""Backward kernels. Equations refer to ``docs/math.md``.

Chunked: for one chunk of classes at a time `gradient_kernel` recomputes the cosines (or takes what
the forward kept of them) and stores G (eq. 7), divided by both norms, so that the two products that
follow take x and W as they are: `weight_kernel` finishes each row of d_w and writes it once,
`embeddings_kernel` adds to fp32 partials of d_x that `finish_kernel` merges in fixed order, or
finishes d_x itself where one split of one chunk is all there is.

Fused, for small D: `fused_weight_kernel` and `fused_embeddings_kernel` each recompute the cosines
and hold rows of d_w, or of d_x, in registers; G is never stored.

No atomics.
"""

import triton
import triton.language as tl

from fused_margin._triton.others import class_rows, nearest_of_rows, own_class, shaped
from fused_margin._triton.primitives import (
    CLAMPED,
    IGNORED,
    around_cast,
    at,
    cast,
    dot,
    in_parts,
    load_labels,
    load_scale,
)


@triton.jit
def _used_rows(rows, offs_n, mask_n):
    """Labels, -1 past the end, and the rows of which anything may be used; both (BLOCK_N,)."""
    labels = load_labels(rows, offs_n, mask_n)
    if rows.grad is not None:
        mask_n = mask_n & (labels != IGNORED)
    return labels, mask_n


@triton.jit
def _row_factor(rows, offs_n, mask_x, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """What multiplies the slopes of each row, (BLOCK_N,): the loss's gradient over the count.

    0 for ignored rows, whose gradient may be infinite or NaN.
    """
    factor = tl.full([BLOCK_N], 1.0, ACC)
    if rows.grad is not None:
        offs = offs_n.to(tl.int64) * rows.stride_grad
        factor = tl.load(rows.grad + offs, mask=mask_x, other=0.0).to(ACC)
    if rows.num_counted is not None:
        factor = factor / tl.maximum(tl.load(rows.num_counted), 1.0)
    return factor


@triton.jit
def _row_quantities(rows, offs_n, mask_n, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """label, mask of x, g_lse, g_u, lse, u and 1 / ||x|| of each row; all (BLOCK_N,).

    g is 0 past the end and for ignored rows.
    """
    labels, mask_x = _used_rows(rows, offs_n, mask_n)
    factor = _row_factor(rows, offs_n, mask_x, ACC, BLOCK_N)
    g_lse = tl.load(rows.slope_lse + offs_n, mask=mask_x, other=0.0) * factor
    g_u = tl.load(rows.slope_u + offs_n, mask=mask_x, other=0.0) * factor
    lse = tl.load(rows.lse + offs_n, mask=mask_n, other=0.0).to(ACC)
    u = tl.load(rows.u + offs_n, mask=mask_n, other=0.0).to(ACC)
    inv_x = tl.load(rows.inv_x + offs_n, mask=mask_n, other=0.0)
    return labels, mask_x, g_lse, g_u, lse, u, inv_x


@triton.jit
def _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u):
    """G (eq. 7), 0 past the last class, and the cosines with u at the targets.

    Both (BLOCK_C, BLOCK_N).
    """
    # a label outside [0, C) may equal a class past the last
    is_target = mask_c[:, None] & (offs_c[:, None] == labels[None, :])
    # exponentials of the target, and past the last class, may overflow and are not used
    is_other = mask_c[:, None] & (offs_c[:, None] != labels[None, :])
    z = s * cos - lse[None, :]
    # lse is no less than any s c; at a huge scale the rounding of either is
    e = tl.exp(tl.where(is_other & ~(z > 0.0), z, 0.0))
    g = tl.where(is_other, (g_lse * s)[None, :] * e, 0.0)
    return tl.where(is_target, g_u[None, :], g), tl.where(is_target, u[None, :], cos)


@triton.jit
def _shaped_gradient_tile(
    cos, offs_c, mask_c, first_row, rows, num_rows, s, g_lse, g_u, lse, u, N,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same where other logits than s c enter lse (eq. 20), and their sum has a gradient."""
    others = rows.others
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = load_labels(rows, offs_n, mask_n)
    is_target = mask_c[:, None] & (offs_c[:, None] == labels[None, :])
    is_own = (offs_c // P.CENTERS)[:, None] == own_class(labels, num_rows, P)[None, :]
    z = tl.where(is_own | ~mask_c[:, None], -float("inf"), s * cos)
    if P.CENTERS > 1:
        z = nearest_of_rows(z, P, BLOCK_C, BLOCK_N)
    slope = tl.full([1, 1], 1.0, P.ACC)
    if others.threshold is not None:
        threshold = s * tl.load(others.threshold + offs_n, mask=mask_n, other=0.0)
        z, slope = shaped(z, threshold[None, :], others, s)
    is_in = z != -float("inf")
    # without any other class lse is -inf, and nothing is in
    z = tl.where(is_in, z, 0.0) - tl.where(lse == -float("inf"), 0.0, lse)[None, :]
    e = tl.exp(tl.where(is_in & ~(z > 0.0), z, 0.0))
    g = (g_lse * s)[None, :] * e * slope
    if others.slope_total is not None:
        of_total = tl.load(others.slope_total + offs_n, mask=mask_n, other=0.0).to(P.ACC)
        g += of_total[None, :] * slope
    g = tl.where(is_in, g, 0.0)
    return tl.where(is_target, g_u[None, :], g), tl.where(is_target, u[None, :], cos)


@triton.jit
def _kept_gradient_tile(kept, shift, offs_c, mask_c, labels, s, g_lse, g_u, lse, u):
    """The same from what the forward kept, z = s c - shift below 0 or e = exp(z) above.

    All (BLOCK_C, BLOCK_N). 0 is kept at targets, past the last class, and where e underflowed.
    """
    is_target = mask_c[:, None] & (offs_c[:, None] == labels[None, :])
    z = tl.where(kept < 0.0, kept, 0.0)
    e = tl.where(kept < 0.0, 1.0, kept)
    factor = tl.exp(tl.where(kept != 0.0, z + (shift - lse[None, :]), 0.0))
    g = (g_lse * s)[None, :] * e * factor
    cos = (z + tl.log(tl.where(e > 0.0, e, 1.0)) + shift) / s  # without use where g is 0
    return tl.where(is_target, g_u[None, :], g), tl.where(is_target, u[None, :], cos)


@triton.jit
def _lent_gradient_tile(q, inv_w, offs_c, mask_c, labels, s, g_lse, g_u, lse, u):
    """The same from what the forward left in d_w, exp(s c) / ||w||, 0 at the targets."""
    is_target = mask_c[:, None] & (offs_c[:, None] == labels[None, :])
    e = q / inv_w[:, None]
    # without any other class lse is -inf, and nothing is left
    share = tl.exp(tl.where(lse == -float("inf"), 0.0, -lse))
    g = (g_lse * s)[None, :] * (e * share[None, :])
    cos = tl.log(tl.where(e > 0.0, e, 1.0)) / s  # without use where g is 0
    return tl.where(is_target, g_u[None, :], g), tl.where(is_target, u[None, :], cos)


@triton.jit
def _products(
    operand, w, x_desc, w_desc, first_row, first_class, offs_n, offs_c, mask_x, mask_c,
    inv_w, D, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w . x of one tile, (BLOCK_C, BLOCK_N); with NORMALIZE_FIRST x is normalised.

    W comes first in the product, so that a tile cast on the fly can go from registers into the
    matrix unit.
    """
    tile = tl.zeros([BLOCK_C, BLOCK_N], P.ACC)
    for d in range(0, D, BLOCK_D):
        if x_desc is not None:
            w_rows = w_desc.load([first_class, d])  # (BLOCK_C, BLOCK_D)
            x_rows = x_desc.load([first_row, d]).T  # (BLOCK_D, BLOCK_N)
        else:
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            w_rows = tl.load(
                at(w, offs_c[:, None], offs_d[None, :]), mask=mask_c[:, None] & mask_d[None, :],
                other=0.0,
            )  # fmt: skip
            x_rows = tl.load(
                at(operand, offs_n[None, :], offs_d[:, None]),
                mask=mask_d[:, None] & mask_x[None, :], other=0.0,
            )  # fmt: skip
        if P.NORMALIZE_FIRST:
            before, _ = around_cast(inv_w)
            w_rows = w_rows.to(P.ACC) * before[:, None]
        tile = dot(cast(w_rows, P.COMPUTE), cast(x_rows, P.COMPUTE), tile, P, True)
    return tile


@triton.jit
def _finish_gradient(
    tile, rows, kept, chunk, row_radial_ptr, s, inv_w, offs_local, offs_c, mask_c, first_row, N,
    num_rows, KEPT_BLOCK: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stores G / (||x|| ||w||) of a part of a tile; returns sum_n G c of its rows per class."""
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_c[:, None] & (offs_n < chunk.pitch)[None, :]
    labels, _, g_lse, g_u, lse, u, inv_x = _row_quantities(rows, offs_n, mask_n, P.ACC, BLOCK_N)
    if kept.entries is not None:
        entries = tl.load(kept.entries + offs_c.to(tl.int64)[:, None] * kept.stride
                          + offs_n[None, :], mask=mask, other=0.0).to(P.ACC)  # fmt: skip
        if kept.shifts is None:
            divisor = tl.where(mask_c, inv_w, 1.0)
            g, cos = _lent_gradient_tile(
                entries, divisor, offs_c, mask_c, labels, s, g_lse, g_u, lse, u
            )  # fmt: skip
        else:
            shift = tl.load(kept.shifts + (offs_c // KEPT_BLOCK).to(tl.int64)[:, None] * kept.pitch
                            + offs_n[None, :], mask=mask, other=0.0)  # fmt: skip
            g, cos = _kept_gradient_tile(
                entries, shift, offs_c, mask_c, labels, s, g_lse, g_u, lse, u
            )  # fmt: skip
    else:
        if P.NORMALIZE_FIRST:
            _, after = around_cast(inv_w)
            cos = tile * after[:, None]
        else:
            cos = tile * inv_w[:, None] * inv_x[None, :]
        IS_SHAPED: tl.constexpr = rows.others.threshold is not None or P.CENTERS > 1
        if IS_SHAPED:
            g, cos = _shaped_gradient_tile(
                cos, offs_c, mask_c, first_row, rows, num_rows, s, g_lse, g_u, lse, u, N, P,
                BLOCK_C, BLOCK_N,
            )  # fmt: skip
        else:
            g, cos = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
    if row_radial_ptr is not None:
        row_radial = tl.sum(g * cos, axis=0)  # (BLOCK_N,)
        tl.store(row_radial_ptr + offs_n, row_radial, mask=mask_n)
    radial = tl.sum(g * cos, axis=1)
    g = g * (inv_w[:, None] * inv_x[None, :])
    tl.store(chunk.g + offs_local.to(tl.int64)[:, None] * chunk.pitch + offs_n[None, :],
             cast(g, chunk.g.dtype.element_ty), mask=mask)  # fmt: skip
    return radial


@triton.jit(do_not_specialize=["first_class", "num_classes", "N", "num_row_blocks"])
def gradient_kernel(
    operand, w, x_desc, w_desc, rows, inv_w_ptr, kept, chunk, scale: tl.float64, first_class,
    num_classes, N, D, num_row_blocks, KEPT_BLOCK: tl.constexpr, EIGHTHS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of a `Chunk` of ``num_classes`` classes from ``first_class`` on.

    KEPT_BLOCK is the block of classes that shared a shift in the forward, 0 if none has one.
    Row blocks come first, so that those of a block of classes find its rows of W in the L2 cache.
    """
    pid_n, pid_c = tl.program_id(0) % num_row_blocks, tl.program_id(0) // num_row_blocks
    offs_local, mask_c = class_rows(pid_c, num_classes, P, BLOCK_C)
    offs_c = first_class + offs_local
    s = load_scale(scale, rows, P.ACC)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    tile = tl.zeros([BLOCK_C, BLOCK_N], P.ACC)
    if kept.entries is None:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _, mask_x = _used_rows(rows, offs_n, offs_n < N)
        tile = _products(
            operand, w, x_desc, w_desc, pid_n * BLOCK_N, first_class + pid_c * BLOCK_C,
            offs_n, offs_c, mask_x, mask_c, inv_w, D, P, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    row_radial_ptr = chunk.row_radial
    if row_radial_ptr is not None:
        row_radial_ptr += pid_c.to(tl.int64) * N
    parts = in_parts(tile, BLOCK_C, BLOCK_N, EIGHTHS)
    PARTS: tl.constexpr = len(parts)
    radial = tl.zeros([BLOCK_C], P.ACC)
    for i in tl.static_range(PARTS):
        radial += _finish_gradient(
            parts[i], rows, kept, chunk, row_radial_ptr, s, inv_w, offs_local, offs_c, mask_c,
            pid_n * BLOCK_N + i * (BLOCK_N // PARTS), N, num_classes + first_class, KEPT_BLOCK, P,
            BLOCK_N // PARTS, BLOCK_C,
        )  # fmt: skip
    radial_ptr = chunk.radial + offs_local.to(tl.int64) * num_row_blocks + pid_n
    tl.store(radial_ptr, radial, mask=mask_c)


@triton.jit
def _store_d_w(d_w_ptr, tile, w, radial, inv_w, classes, offs_d, mask, D, ACC: tl.constexpr):
    """d_w (C, D) of some classes (eq. 8), from q / ||w|| and q . w_hat."""
    radial = tl.where(inv_w < CLAMPED, radial * inv_w, 0.0)
    d_w = tile - radial[:, None] * (w.to(ACC) * inv_w[:, None])  # 1 / ||w||^2 would underflow
    tl.store(
        d_w_ptr + classes[:, None] * D + offs_d, cast(d_w, d_w_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def _store_d_x(d_x_ptr, tile, x, radial, inv_x, row, offs_d, mask, D, ACC: tl.constexpr):
    """d_x (N, D) of some rows (eq. 8), from v / ||x|| and v . x_hat."""
    radial = tl.where(inv_x < CLAMPED, radial * inv_x, 0.0)
    d_x = tile - radial[:, None] * (x.to(ACC) * inv_x[:, None])
    d_x = cast(d_x, d_x_ptr.dtype.element_ty)
    tl.store(d_x_ptr + row[:, None] * D + offs_d, d_x, mask=mask)


@triton.jit(do_not_specialize=["first_class", "num_classes", "N", "num_row_blocks"])
def weight_kernel(
    x, w, x_desc, g_desc, rows, chunk, inv_w_ptr, d_w_ptr, first_class, num_classes, N, D,
    num_row_blocks, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_w of one tile of a chunk (eq. 8), (BLOCK_C, BLOCK_D), written once to d_w, contiguous.

    The chunk is of ``num_classes`` classes from ``first_class`` on.
    """
    num_blocks_d = tl.cdiv(D, BLOCK_D)
    pid_c, pid_d = tl.program_id(0) // num_blocks_d, tl.program_id(0) % num_blocks_d
    offs_local = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_local < num_classes
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    radial = tl.zeros([BLOCK_C], P.ACC)
    for i in range(0, num_row_blocks):
        radial += tl.load(chunk.radial + offs_local.to(tl.int64) * num_row_blocks + i,
                          mask=mask_c, other=0.0)  # fmt: skip
    offs_c = (first_class + offs_local).to(tl.int64)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    tile = tl.zeros([BLOCK_C, BLOCK_D], P.ACC)
    if x_desc is not None:
        for n in range(0, N, BLOCK_N):
            g = g_desc.load([pid_c * BLOCK_C, n])  # (BLOCK_C, BLOCK_N)
            x_rows = x_desc.load([n, pid_d * BLOCK_D])  # (BLOCK_N, BLOCK_D)
            tile = dot(g, cast(x_rows, P.GRADIENT), tile, P, False)
    else:
        g_rows = chunk.g + offs_local.to(tl.int64)[:, None] * chunk.pitch
        offs_n = tl.arange(0, BLOCK_N)
        _, mask_x = _used_rows(rows, offs_n, offs_n < N)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_g = mask_c[:, None] & (offs_n < chunk.pitch)[None, :]
            g = tl.load(g_rows + offs_n[None, :], mask=mask_g, other=0.0)
            x_rows = tl.load(
                at(x, offs_n[:, None], offs_d[None, :]), mask=mask_x[:, None] & mask_d[None, :],
                other=0.0,
            )  # fmt: skip
            tile = dot(g, cast(x_rows, P.GRADIENT), tile, P, False)
            offs_n += BLOCK_N
            _, mask_x = _used_rows(rows, offs_n, offs_n < N)
    parts = in_parts(tile, BLOCK_C, BLOCK_D)
    PARTS: tl.constexpr = len(parts)
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for i in tl.static_range(PARTS):
        offs_d = pid_d * BLOCK_D + i * WIDTH + tl.arange(0, WIDTH)
        mask = mask_c[:, None] & (offs_d < D)[None, :]
        w_rows = tl.load(at(w, offs_c[:, None], offs_d[None, :]), mask=mask, other=0.0)
        _store_d_w(d_w_ptr, parts[i], w_rows, radial, inv_w, offs_c, offs_d[None, :], mask, D,
                   P.ACC)  # fmt: skip


@triton.jit(
    do_not_specialize=["first_class", "num_classes", "N", "classes_per_split", "num_class_blocks"]
)
def embeddings_kernel(
    x, w, rows, chunk, partial_ptr, d_x_ptr, first_class, num_classes, N, D, classes_per_split,
    num_class_blocks,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds this split of a chunk of ``num_classes`` to its own partial of d_x, (num_splits, N, D).

    Without partials there is one split of one chunk, and it writes d_x (N, D) itself (eq. 8).
    """
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    tile = tl.zeros([BLOCK_N, BLOCK_D], P.ACC)
    start = split * classes_per_split
    stop = tl.minimum(start + classes_per_split, num_classes)
    for c in range(start, stop, BLOCK_C):
        offs_local = c + tl.arange(0, BLOCK_C)
        mask_c = offs_local < stop
        g = tl.load(chunk.g + offs_local.to(tl.int64)[None, :] * chunk.pitch + offs_n[:, None],
                    mask=(offs_n < chunk.pitch)[:, None] & mask_c[None, :],
                    other=0.0)  # (BLOCK_N, BLOCK_C)  # fmt: skip
        w_rows = tl.load(
            at(w, (first_class + offs_local)[:, None], offs_d[None, :]),
            mask=mask_c[:, None] & mask_d[None, :], other=0.0,
        )  # (BLOCK_C, BLOCK_D)  # fmt: skip
        tile = dot(g, cast(w_rows, P.GRADIENT), tile, P, False)
    row = offs_n.to(tl.int64)
    radial = tl.zeros([BLOCK_N], P.ACC)  # sum_k G_nk c_nk
    inv_x = tl.zeros([BLOCK_N], P.ACC)
    mask_x = mask_n
    if partial_ptr is None:
        for j in range(0, num_class_blocks):
            radial += tl.load(chunk.row_radial + tl.cast(j, tl.int64) * N + offs_n, mask=mask_n,
                              other=0.0)  # fmt: skip
        inv_x = tl.load(rows.inv_x + offs_n, mask=mask_n, other=0.0)
        _, mask_x = _used_rows(rows, offs_n, mask_n)
    parts = in_parts(tile, BLOCK_N, BLOCK_D)
    PARTS: tl.constexpr = len(parts)
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for i in tl.static_range(PARTS):
        offs_d = tl.program_id(1) * BLOCK_D + i * WIDTH + tl.arange(0, WIDTH)
        mask_d = offs_d < D
        mask = mask_n[:, None] & mask_d[None, :]
        if partial_ptr is None:
            x_rows = tl.load(
                at(x, offs_n[:, None], offs_d[None, :]), mask=mask_x[:, None] & mask_d[None, :],
                other=0.0,
            )  # fmt: skip
            _store_d_x(d_x_ptr, parts[i], x_rows, radial, inv_x, row, offs_d[None, :], mask, D,
                       P.ACC)  # fmt: skip
        else:
            partial = partial_ptr + (split.to(tl.int64) * N + row)[:, None] * D + offs_d[None, :]
            # a tensor, as the interpreter of Triton 3.9 makes no mask of a number's comparison
            is_later = tl.zeros([1, 1], tl.int32) + first_class > 0
            before = tl.load(partial, mask=mask & is_later, other=0.0)
            tl.store(partial, before + parts[i], mask=mask)


@triton.jit(do_not_specialize=["N"])
def fused_weight_kernel(
    x, w, rows, inv_w_ptr, d_w_ptr, scale: tl.float64, N, C, D,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_w of one block of classes over all rows, held in registers; BLOCK_D >= D."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    s = load_scale(scale, rows, P.ACC)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    mask = mask_c[:, None] & mask_d
    operand = tl.load(at(w, offs_c[:, None], offs_d), mask=mask, other=0.0)  # (BLOCK_C, BLOCK_D)
    if P.NORMALIZE_FIRST:
        before, after = around_cast(inv_w)
        operand = operand.to(P.ACC) * before[:, None]
    operand = cast(operand, P.COMPUTE)
    tile = tl.zeros([BLOCK_C, BLOCK_D], P.ACC)
    radial = tl.zeros([BLOCK_C], P.ACC)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        labels, mask_x, g_lse, g_u, lse, u, inv_x = _row_quantities(
            rows, offs_n, offs_n < N, P.ACC, BLOCK_N
        )
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & mask_d,
                         other=0.0)  # (BLOCK_N, BLOCK_D)  # fmt: skip
        if P.NORMALIZE_FIRST:
            x_operand = cast(x_rows.to(P.ACC) * inv_x[:, None], P.COMPUTE)
        else:
            x_operand = cast(x_rows, P.COMPUTE)
        cos = dot(operand, tl.trans(x_operand), tl.zeros([BLOCK_C, BLOCK_N], P.ACC), P, True)
        if P.NORMALIZE_FIRST:
            cos = cos * after[:, None]
        else:
            cos = cos * inv_w[:, None] * inv_x[None, :]
        g, cos = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
        radial += tl.sum(g * cos, axis=1)
        g = g * inv_x[None, :]
        tile = dot(cast(g, P.GRADIENT), cast(x_rows, P.GRADIENT), tile, P, False)
    w_rows = tl.load(at(w, offs_c[:, None], offs_d), mask=mask, other=0.0)  # in its own precision
    tile = tile * inv_w[:, None]
    _store_d_w(d_w_ptr, tile, w_rows, radial, inv_w, offs_c.to(tl.int64), offs_d, mask, D, P.ACC)


@triton.jit(do_not_specialize=["N", "blocks_per_split"])
def fused_embeddings_kernel(
    x, w, rows, inv_w_ptr, partial_ptr, scale: tl.float64, N, C, D, blocks_per_split,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial of d_x of one split of the classes for one block of rows, held in registers.

    BLOCK_D >= D.
    """
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    s = load_scale(scale, rows, P.ACC)
    labels, mask_x, g_lse, g_u, lse, u, inv_x = _row_quantities(
        rows, offs_n, mask_n, P.ACC, BLOCK_N
    )
    operand = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & mask_d,
                      other=0.0)  # (BLOCK_N, BLOCK_D)  # fmt: skip
    if P.NORMALIZE_FIRST:
        operand = operand.to(P.ACC) * inv_x[:, None]
    operand = tl.trans(cast(operand, P.COMPUTE))  # (BLOCK_D, BLOCK_N)
    tile = tl.zeros([BLOCK_N, BLOCK_D], P.ACC)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(C, BLOCK_C))
    for block in range(first, last):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
        w_rows = tl.load(at(w, offs_c[:, None], offs_d), mask=mask_c[:, None] & mask_d,
                         other=0.0)  # (BLOCK_C, BLOCK_D)  # fmt: skip
        if P.NORMALIZE_FIRST:
            before, after = around_cast(inv_w)
            w_operand = cast(w_rows.to(P.ACC) * before[:, None], P.COMPUTE)
        else:
            w_operand = cast(w_rows, P.COMPUTE)
        cos = dot(w_operand, operand, tl.zeros([BLOCK_C, BLOCK_N], P.ACC), P, True)
        if P.NORMALIZE_FIRST:
            cos = cos * after[:, None]
        else:
            cos = cos * inv_w[:, None] * inv_x[None, :]
        g, _ = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
        g = tl.trans(g * inv_w[:, None])  # (BLOCK_N, BLOCK_C)
        tile = dot(cast(g, P.GRADIENT), cast(w_rows, P.GRADIENT), tile, P, False)
    partial = partial_ptr + (split.to(tl.int64) * N + offs_n.to(tl.int64))[:, None] * D + offs_d
    tl.store(partial, tile * inv_x[:, None], mask=mask_n[:, None] & mask_d)


@triton.jit
def _merge_partials(partial_ptr, row, offs_d, mask, N, D, num_splits, ACC: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """d_x before the projection, (BLOCK_N, BLOCK_D): the sum over splits, in order."""
    v = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for j in range(0, num_splits):
        offs = (tl.cast(j, tl.int64) * N + row)[:, None] * D + offs_d
        v += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    return v


@triton.jit(do_not_specialize=["N", "num_splits"])
def finish_kernel(
    x, rows, partial_ptr, d_x_ptr, d_scale_ptr, scale: tl.float64, N, D, num_splits,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the partials and projects: d_x (N, D) (eq. 8), and rows of d_scale (eq. 9)."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    row = offs_n.to(tl.int64)
    _, mask_x = _used_rows(rows, offs_n, mask_n)
    radial = tl.zeros([BLOCK_N], P.ACC)  # sum_k G_nk c_nk
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        mask = mask_x[:, None] & (offs_d < D)
        v = _merge_partials(
            partial_ptr, row, offs_d, mask, N, D, num_splits, P.ACC, BLOCK_N, BLOCK_D
        )
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask, other=0.0)
        radial += tl.sum(v * x_rows.to(P.ACC), axis=1)
    if d_scale_ptr is not None:
        s = load_scale(scale, rows, P.ACC)
        factor = _row_factor(rows, offs_n, mask_x, P.ACC, BLOCK_N)
        g_u = tl.load(rows.slope_u + offs_n, mask=mask_x, other=0.0) * factor
        u = tl.load(rows.u + offs_n, mask=mask_n, other=0.0).to(P.ACC)
        g_u = tl.where(u == 0.0, 0.0, g_u)  # infinite, maybe, where there is no target
        tl.store(d_scale_ptr + offs_n, (radial - g_u * u) / s, mask=mask_n)
    if d_x_ptr is not None:
        inv_x = tl.load(rows.inv_x + offs_n, mask=mask_n, other=0.0)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)[None, :]
            mask_d = offs_d < D
            mask = mask_n[:, None] & mask_d
            v = _merge_partials(
                partial_ptr, row, offs_d, mask, N, D, num_splits, P.ACC, BLOCK_N, BLOCK_D
            )
            x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & mask_d,
                             other=0.0)  # fmt: skip
            _store_d_x(d_x_ptr, v, x_rows, radial, inv_x, row, offs_d, mask, D, P.ACC)
