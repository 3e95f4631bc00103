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

from fused_margin._triton.primitives import (
    CLAMPED,
    IGNORED,
    cast,
    dot,
    in_parts,
    load_scale,
    used_rows,
)


@triton.jit
def _row_labels(labels_ptr, offs_n, mask_n, stride_label, HAS_GRAD: tl.constexpr):
    """Labels, -1 past the end, and the rows of which anything may be used; both (BLOCK_N,).

    Labels that come with a gradient of the loss are `margin_ce`'s, which mark ignored rows.
    """
    labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=mask_n, other=-1).to(
        tl.int64
    )
    return labels, used_rows(labels, mask_n, IGNORED, HAS_GRAD)


@triton.jit
def _row_factor(grad_ptr, count_ptr, offs_n, mask_x, stride_grad, HAS_GRAD: tl.constexpr,
                HAS_COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """What multiplies d_lse and d_u of each row, (BLOCK_N,): the loss's gradient over the count.

    0 for ignored rows, whose gradient may be infinite or NaN.
    """
    factor = tl.full([BLOCK_N], 1.0, ACC)
    if HAS_GRAD:
        offs = offs_n.to(tl.int64) * stride_grad
        factor = tl.load(grad_ptr + offs, mask=mask_x, other=0.0).to(ACC)
    if HAS_COUNT:
        factor = factor / tl.maximum(tl.load(count_ptr), 1.0)
    return factor


@triton.jit
def _row_quantities(
    labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr, inv_x_ptr,
    offs_n, mask_n, stride_label, stride_grad,
    HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """label, mask of x, g_lse, g_u, lse, u and 1 / ||x|| of each row; all (BLOCK_N,).

    g is 0 past the end and for ignored rows.
    """
    labels, mask_x = _row_labels(labels_ptr, offs_n, mask_n, stride_label, HAS_GRAD)
    factor = _row_factor(
        grad_ptr, count_ptr, offs_n, mask_x, stride_grad, HAS_GRAD, HAS_COUNT, ACC, BLOCK_N
    )
    g_lse = tl.load(d_lse_ptr + offs_n, mask=mask_x, other=0.0) * factor
    g_u = tl.load(d_u_ptr + offs_n, mask=mask_x, other=0.0) * factor
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    u = tl.load(u_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    inv_x = tl.load(inv_x_ptr + offs_n, mask=mask_n, other=0.0)
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
def _products(
    operand_ptr, w_ptr, offs_n, offs_c, mask_x, mask_c, inv_x, inv_w,
    stride_on, stride_od, stride_wc, stride_wd, D,
    NORMALIZE_FIRST: tl.constexpr, ACC: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w . x of one tile, (BLOCK_C, BLOCK_N); with NORMALIZE_FIRST the cosines.

    W comes first in the product, so that a tile cast on the fly can go from registers into the
    matrix unit. fp16 operands are normalised before the cast (NORMALIZE_FIRST), since fp16 lacks
    the exponents for raw ones.
    """
    tile = tl.zeros([BLOCK_C, BLOCK_N], ACC)
    w_rows = w_ptr + offs_c.to(tl.int64)[:, None] * stride_wc
    x_rows = operand_ptr + offs_n.to(tl.int64)[None, :] * stride_on
    for k in range(0, D, BLOCK_K):
        offs_d = k + tl.arange(0, BLOCK_K)
        mask_d = offs_d < D
        offs_d = offs_d.to(tl.int64)
        w = tl.load(w_rows + offs_d[None, :] * stride_wd, mask=mask_c[:, None] & mask_d[None, :],
                    other=0.0)  # (BLOCK_C, BLOCK_K)  # fmt: skip
        x = tl.load(x_rows + offs_d[:, None] * stride_od, mask=mask_d[:, None] & mask_x[None, :],
                    other=0.0)  # (BLOCK_K, BLOCK_N)  # fmt: skip
        if NORMALIZE_FIRST:
            w = w.to(ACC) * inv_w[:, None]
            x = x.to(ACC) * inv_x[None, :]
        tile = dot(cast(w, COMPUTE), cast(x, COMPUTE), tile, PRECISION)
    return tile


@triton.jit
def _finish_gradient(
    tile, labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr, inv_x_ptr,
    kept_ptr, shift_ptr, g_ptr, row_radial_ptr, s, inv_w, offs_local, offs_c, mask_c, first_row, N,
    stride_label, stride_grad,
    HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr, KEPT_BLOCK: tl.constexpr,
    IS_ONLY: tl.constexpr, NORMALIZE_FIRST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores G / (||x|| ||w||) of a part of a tile; returns sum_n G c of its rows per class."""
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_c[:, None] & mask_n[None, :]
    labels, _, g_lse, g_u, lse, u, inv_x = _row_quantities(
        labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr, inv_x_ptr,
        offs_n, mask_n, stride_label, stride_grad, HAS_GRAD, HAS_COUNT, ACC, BLOCK_N,
    )  # fmt: skip
    if KEPT_BLOCK:
        kept = tl.load(kept_ptr + offs_c.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask,
                       other=0.0).to(ACC)  # fmt: skip
        shift = tl.load(shift_ptr + (offs_c // KEPT_BLOCK).to(tl.int64)[:, None] * N
                        + offs_n[None, :], mask=mask, other=0.0)  # fmt: skip
        g, cos = _kept_gradient_tile(kept, shift, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
    else:
        cos = tile
        if not NORMALIZE_FIRST:
            cos = cos * inv_w[:, None] * inv_x[None, :]
        g, cos = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
    if IS_ONLY:
        row_radial = tl.sum(g * cos, axis=0)  # (BLOCK_N,)
        tl.store(row_radial_ptr + offs_n, row_radial, mask=mask_n)
    radial = tl.sum(g * cos, axis=1)
    g = g * (inv_w[:, None] * inv_x[None, :])
    tl.store(g_ptr + offs_local.to(tl.int64)[:, None] * N + offs_n[None, :],
             cast(g, g_ptr.dtype.element_ty), mask=mask)  # fmt: skip
    return radial


@triton.jit
def gradient_kernel(
    operand_ptr, w_ptr, labels_ptr, scale_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr,
    lse_ptr, u_ptr, inv_x_ptr, inv_w_ptr, kept_ptr, shift_ptr, g_ptr, radial_ptr, row_radial_ptr,
    scale: tl.float64, first_class, num_classes, N, D, num_row_blocks,
    stride_on, stride_od, stride_wc, stride_wd, stride_label, stride_grad,
    HAS_SCALE_TENSOR: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr,
    KEPT_BLOCK: tl.constexpr, IS_ONLY: tl.constexpr, ACC: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, NORMALIZE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G / (||x|| ||w||) of one tile into the chunk (num_classes, N), and sum_n G c per class.

    With IS_ONLY also sum_k G c per row, (class blocks, N). KEPT_BLOCK is the block of classes that
    shared a shift in the forward, 0 if nothing was kept. Row blocks come first, so that those of a
    block of classes find its rows of W in the L2 cache.
    """
    pid_n, pid_c = tl.program_id(0) % num_row_blocks, tl.program_id(0) // num_row_blocks
    offs_local = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_local < num_classes
    offs_c = first_class + offs_local
    s = load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    tile = tl.zeros([BLOCK_C, BLOCK_N], ACC)
    if not KEPT_BLOCK:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _, mask_x = _row_labels(labels_ptr, offs_n, offs_n < N, stride_label, HAS_GRAD)
        inv_x = tl.zeros([BLOCK_N], ACC)
        if NORMALIZE_FIRST:
            inv_x = tl.load(inv_x_ptr + offs_n, mask=mask_x, other=0.0)
        tile = _products(
            operand_ptr, w_ptr, offs_n, offs_c, mask_x, mask_c, inv_x, inv_w,
            stride_on, stride_od, stride_wc, stride_wd, D, NORMALIZE_FIRST,
            ACC, COMPUTE, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K,
        )  # fmt: skip
    row_radial = row_radial_ptr
    if IS_ONLY:
        row_radial += pid_c.to(tl.int64) * N
    parts = in_parts(tile, BLOCK_C, BLOCK_N)
    PARTS: tl.constexpr = len(parts)
    radial = tl.zeros([BLOCK_C], ACC)
    for i in tl.static_range(PARTS):
        radial += _finish_gradient(
            parts[i], labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr,
            inv_x_ptr, kept_ptr, shift_ptr, g_ptr, row_radial, s, inv_w, offs_local, offs_c,
            mask_c, pid_n * BLOCK_N + i * (BLOCK_N // PARTS), N, stride_label, stride_grad,
            HAS_GRAD, HAS_COUNT, KEPT_BLOCK, IS_ONLY, NORMALIZE_FIRST, ACC, BLOCK_N // PARTS,
        )  # fmt: skip
    tl.store(radial_ptr + offs_local.to(tl.int64) * num_row_blocks + pid_n, radial, mask=mask_c)


@triton.jit
def _store_d_w(d_w_ptr, tile, w, radial, inv_w, rows, offs_d, mask, D, ACC: tl.constexpr):
    """d_w (C, D) of ``rows`` (eq. 8), from q / ||w|| and q . w_hat."""
    radial = tl.where(inv_w < CLAMPED, radial * inv_w, 0.0)
    d_w = tile - radial[:, None] * (w.to(ACC) * inv_w[:, None])  # 1 / ||w||^2 would underflow
    tl.store(d_w_ptr + rows[:, None] * D + offs_d, cast(d_w, d_w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_d_x(d_x_ptr, tile, x, radial, inv_x, rows, offs_d, mask, D, ACC: tl.constexpr):
    """d_x (N, D) of ``rows`` (eq. 8), from v / ||x|| and v . x_hat."""
    radial = tl.where(inv_x < CLAMPED, radial * inv_x, 0.0)
    d_x = tile - radial[:, None] * (x.to(ACC) * inv_x[:, None])
    tl.store(d_x_ptr + rows[:, None] * D + offs_d, cast(d_x, d_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    x_ptr, w_ptr, labels_ptr, g_ptr, radial_ptr, inv_w_ptr, d_w_ptr,
    first_class, num_classes, N, D, num_row_blocks,
    stride_xn, stride_xd, stride_wc, stride_wd, stride_label,
    HAS_GRAD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_w of one tile (eq. 8), (BLOCK_C, BLOCK_D), written once to d_w (C, D) contiguous."""
    num_blocks_d = tl.cdiv(D, BLOCK_D)
    pid_c, pid_d = tl.program_id(0) // num_blocks_d, tl.program_id(0) % num_blocks_d
    offs_local = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_local < num_classes
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    OPERAND: tl.constexpr = g_ptr.dtype.element_ty
    g_rows = g_ptr + offs_local.to(tl.int64)[:, None] * N
    x_columns = x_ptr + offs_d.to(tl.int64)[None, :] * stride_xd
    radial = tl.zeros([BLOCK_C], ACC)
    for i in range(0, num_row_blocks):
        radial += tl.load(radial_ptr + offs_local.to(tl.int64) * num_row_blocks + i, mask=mask_c,
                          other=0.0)  # fmt: skip
    offs_c = (first_class + offs_local).to(tl.int64)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    tile = tl.zeros([BLOCK_C, BLOCK_D], ACC)
    offs_n = tl.arange(0, BLOCK_K)
    _, mask_x = _row_labels(labels_ptr, offs_n, offs_n < N, stride_label, HAS_GRAD)
    for k in range(0, N, BLOCK_K):
        offs_n = k + tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        g = tl.load(g_rows + offs_n[None, :], mask=mask_c[:, None] & mask_n[None, :],
                    other=0.0)  # (BLOCK_C, BLOCK_K)  # fmt: skip
        x = tl.load(x_columns + offs_n.to(tl.int64)[:, None] * stride_xn,
                    mask=mask_x[:, None] & mask_d[None, :],
                    other=0.0)  # (BLOCK_K, BLOCK_D)  # fmt: skip
        tile = dot(g, cast(x, OPERAND), tile, PRECISION)
        offs_n += BLOCK_K
        _, mask_x = _row_labels(labels_ptr, offs_n, offs_n < N, stride_label, HAS_GRAD)
    parts = in_parts(tile, BLOCK_C, BLOCK_D)
    PARTS: tl.constexpr = len(parts)
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for i in tl.static_range(PARTS):
        offs_d = pid_d * BLOCK_D + i * WIDTH + tl.arange(0, WIDTH)
        mask = mask_c[:, None] & (offs_d < D)[None, :]
        w = tl.load(w_ptr + offs_c[:, None] * stride_wc + offs_d.to(tl.int64)[None, :] * stride_wd,
                    mask=mask, other=0.0)  # fmt: skip
        _store_d_w(d_w_ptr, parts[i], w, radial, inv_w, offs_c, offs_d[None, :], mask, D, ACC)


@triton.jit
def embeddings_kernel(
    x_ptr, w_ptr, labels_ptr, g_ptr, row_radial_ptr, inv_x_ptr, partial_ptr, d_x_ptr,
    first_class, num_classes, N, D, classes_per_split, num_class_blocks,
    stride_xn, stride_xd, stride_wc, stride_wd, stride_label,
    HAS_GRAD: tl.constexpr, IS_FIRST: tl.constexpr, IS_ONLY: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds this split of the chunk to its own partial of d_x, (num_splits, N, D).

    With IS_ONLY there is one split of one chunk, and it writes d_x (N, D) itself (eq. 8).
    """
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    OPERAND: tl.constexpr = g_ptr.dtype.element_ty
    w_columns = w_ptr + offs_d.to(tl.int64)[None, :] * stride_wd
    tile = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start = split * classes_per_split
    stop = tl.minimum(start + classes_per_split, num_classes)
    for k in range(start, stop, BLOCK_K):
        offs_local = k + tl.arange(0, BLOCK_K)
        mask_c = offs_local < stop
        g = tl.load(g_ptr + offs_local.to(tl.int64)[None, :] * N + offs_n[:, None],
                    mask=mask_n[:, None] & mask_c[None, :],
                    other=0.0)  # (BLOCK_N, BLOCK_K)  # fmt: skip
        w = tl.load(w_columns + (first_class + offs_local).to(tl.int64)[:, None] * stride_wc,
                    mask=mask_c[:, None] & mask_d[None, :],
                    other=0.0)  # (BLOCK_K, BLOCK_D)  # fmt: skip
        tile = dot(g, cast(w, OPERAND), tile, PRECISION)
    rows = offs_n.to(tl.int64)
    radial = tl.zeros([BLOCK_N], ACC)  # sum_k G_nk c_nk
    inv_x = tl.zeros([BLOCK_N], ACC)
    mask_x = mask_n
    if IS_ONLY:
        for j in range(0, num_class_blocks):
            radial += tl.load(row_radial_ptr + tl.cast(j, tl.int64) * N + offs_n, mask=mask_n,
                              other=0.0)  # fmt: skip
        inv_x = tl.load(inv_x_ptr + offs_n, mask=mask_n, other=0.0)
        _, mask_x = _row_labels(labels_ptr, offs_n, mask_n, stride_label, HAS_GRAD)
    parts = in_parts(tile, BLOCK_N, BLOCK_D)
    PARTS: tl.constexpr = len(parts)
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for i in tl.static_range(PARTS):
        offs_d = tl.program_id(1) * BLOCK_D + i * WIDTH + tl.arange(0, WIDTH)
        mask_d = offs_d < D
        mask = mask_n[:, None] & mask_d[None, :]
        if IS_ONLY:
            x = tl.load(
                x_ptr + rows[:, None] * stride_xn + offs_d.to(tl.int64)[None, :] * stride_xd,
                mask=mask_x[:, None] & mask_d[None, :], other=0.0,
            )  # fmt: skip
            _store_d_x(d_x_ptr, parts[i], x, radial, inv_x, rows, offs_d[None, :], mask, D, ACC)
        else:
            partial = partial_ptr + (split.to(tl.int64) * N + rows)[:, None] * D + offs_d[None, :]
            part = parts[i]
            if not IS_FIRST:
                part += tl.load(partial, mask=mask, other=0.0)
            tl.store(partial, part, mask=mask)


@triton.jit
def fused_weight_kernel(
    x_ptr, w_ptr, labels_ptr, scale_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr,
    lse_ptr, u_ptr, inv_x_ptr, inv_w_ptr, d_w_ptr,
    scale: tl.float64, N, C, D,
    stride_xn, stride_xd, stride_wc, stride_wd, stride_label, stride_grad,
    HAS_SCALE_TENSOR: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr,
    ACC: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr, GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_w of one block of classes over all rows, held in registers; BLOCK_D >= D."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    classes = offs_c.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    columns = offs_d.to(tl.int64)[None, :]
    s = load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
    inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
    w_tile = w_ptr + classes[:, None] * stride_wc + columns * stride_wd
    w = tl.load(w_tile, mask=mask_c[:, None] & mask_d[None, :], other=0.0)  # (BLOCK_C, BLOCK_D)
    if NORMALIZE_FIRST:
        w = w.to(ACC) * inv_w[:, None]
    w = cast(w, COMPUTE)
    tile = tl.zeros([BLOCK_C, BLOCK_D], ACC)
    radial = tl.zeros([BLOCK_C], ACC)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        labels, mask_x, g_lse, g_u, lse, u, inv_x = _row_quantities(
            labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr, inv_x_ptr,
            offs_n, mask_n, stride_label, stride_grad, HAS_GRAD, HAS_COUNT, ACC, BLOCK_N,
        )  # fmt: skip
        x = tl.load(x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + columns * stride_xd,
                    mask=mask_x[:, None] & mask_d[None, :],
                    other=0.0)  # (BLOCK_N, BLOCK_D)  # fmt: skip
        if NORMALIZE_FIRST:
            operand = cast(x.to(ACC) * inv_x[:, None], COMPUTE)
        else:
            operand = cast(x, COMPUTE)
        cos = dot(w, tl.trans(operand), tl.zeros([BLOCK_C, BLOCK_N], ACC), PRECISION)
        if not NORMALIZE_FIRST:
            cos = cos * inv_w[:, None] * inv_x[None, :]
        g, cos = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
        radial += tl.sum(g * cos, axis=1)
        g = g * inv_x[None, :]
        tile = dot(cast(g, GRADIENT), cast(x, GRADIENT), tile, GRADIENT_PRECISION)
    mask = mask_c[:, None] & mask_d[None, :]
    w = tl.load(w_tile, mask=mask, other=0.0)  # again, in its own precision
    tile = tile * inv_w[:, None]
    _store_d_w(d_w_ptr, tile, w, radial, inv_w, classes, offs_d[None, :], mask, D, ACC)


@triton.jit
def fused_embeddings_kernel(
    x_ptr, w_ptr, labels_ptr, scale_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr,
    lse_ptr, u_ptr, inv_x_ptr, inv_w_ptr, partial_ptr,
    scale: tl.float64, N, C, D, blocks_per_split,
    stride_xn, stride_xd, stride_wc, stride_wd, stride_label, stride_grad,
    HAS_SCALE_TENSOR: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr,
    ACC: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr, GRADIENT: tl.constexpr, GRADIENT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial of d_x of one split of the classes for one block of rows, held in registers.

    BLOCK_D >= D.
    """
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    columns = offs_d.to(tl.int64)[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    s = load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
    labels, mask_x, g_lse, g_u, lse, u, inv_x = _row_quantities(
        labels_ptr, grad_ptr, count_ptr, d_lse_ptr, d_u_ptr, lse_ptr, u_ptr, inv_x_ptr,
        offs_n, mask_n, stride_label, stride_grad, HAS_GRAD, HAS_COUNT, ACC, BLOCK_N,
    )  # fmt: skip
    x = tl.load(x_ptr + rows[:, None] * stride_xn + columns * stride_xd,
                mask=mask_x[:, None] & mask_d[None, :],
                other=0.0)  # (BLOCK_N, BLOCK_D)  # fmt: skip
    if NORMALIZE_FIRST:
        x = x.to(ACC) * inv_x[:, None]
    operand = tl.trans(cast(x, COMPUTE))  # (BLOCK_D, BLOCK_N)
    tile = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(C, BLOCK_C))
    for block in range(first, last):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        inv_w = tl.load(inv_w_ptr + offs_c, mask=mask_c, other=0.0)
        w = tl.load(w_ptr + offs_c.to(tl.int64)[:, None] * stride_wc + columns * stride_wd,
                    mask=mask_c[:, None] & mask_d[None, :],
                    other=0.0)  # (BLOCK_C, BLOCK_D)  # fmt: skip
        if NORMALIZE_FIRST:
            w_operand = cast(w.to(ACC) * inv_w[:, None], COMPUTE)
        else:
            w_operand = cast(w, COMPUTE)
        cos = dot(w_operand, operand, tl.zeros([BLOCK_C, BLOCK_N], ACC), PRECISION)
        if not NORMALIZE_FIRST:
            cos = cos * inv_w[:, None] * inv_x[None, :]
        g, _ = _gradient_tile(cos, offs_c, mask_c, labels, s, g_lse, g_u, lse, u)
        g = tl.trans(g * inv_w[:, None])  # (BLOCK_N, BLOCK_C)
        tile = dot(cast(g, GRADIENT), cast(w, GRADIENT), tile, GRADIENT_PRECISION)
    partial = partial_ptr + (split.to(tl.int64) * N + rows)[:, None] * D + offs_d[None, :]
    tl.store(partial, tile * inv_x[:, None], mask=mask)


@triton.jit
def _merge_partials(partial_ptr, rows, offs_d, mask, N, D, num_splits, ACC: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """d_x before the projection, (BLOCK_N, BLOCK_D): the sum over splits, in order."""
    v = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for j in range(0, num_splits):
        offs = (tl.cast(j, tl.int64) * N + rows)[:, None] * D + offs_d
        v += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    return v


@triton.jit
def finish_kernel(
    x_ptr, partial_ptr, labels_ptr, scale_ptr, grad_ptr, count_ptr, d_u_ptr, u_ptr, inv_x_ptr,
    d_x_ptr, d_scale_ptr, scale: tl.float64, N, D, num_splits,
    stride_xn, stride_xd, stride_label, stride_grad,
    HAS_SCALE_TENSOR: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_COUNT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the partials and projects: d_x (N, D) (eq. 8), and rows of d_scale (eq. 9)."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64)
    _, mask_x = _row_labels(labels_ptr, offs_n, mask_n, stride_label, HAS_GRAD)
    radial = tl.zeros([BLOCK_N], ACC)  # sum_k G_nk c_nk
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = mask_x[:, None] & (offs_d < D)[None, :]
        offs_d = offs_d.to(tl.int64)[None, :]
        v = _merge_partials(
            partial_ptr, rows, offs_d, mask, N, D, num_splits, ACC, BLOCK_N, BLOCK_D
        )
        x = tl.load(x_ptr + rows[:, None] * stride_xn + offs_d * stride_xd, mask=mask, other=0.0)
        radial += tl.sum(v * x.to(ACC), axis=1)
    if NEED_SCALE:
        s = load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
        factor = _row_factor(
            grad_ptr, count_ptr, offs_n, mask_x, stride_grad, HAS_GRAD, HAS_COUNT, ACC, BLOCK_N
        )
        g_u = tl.load(d_u_ptr + offs_n, mask=mask_x, other=0.0) * factor
        u = tl.load(u_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
        g_u = tl.where(u == 0.0, 0.0, g_u)  # infinite, maybe, where there is no target
        tl.store(d_scale_ptr + offs_n, (radial - g_u * u) / s, mask=mask_n)
    if NEED_X:
        inv_x = tl.load(inv_x_ptr + offs_n, mask=mask_n, other=0.0)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < D)[None, :]
            mask = mask_n[:, None] & mask_d
            offs_d = offs_d.to(tl.int64)[None, :]
            v = _merge_partials(
                partial_ptr, rows, offs_d, mask, N, D, num_splits, ACC, BLOCK_N, BLOCK_D
            )
            x = tl.load(x_ptr + rows[:, None] * stride_xn + offs_d * stride_xd,
                        mask=mask_x[:, None] & mask_d, other=0.0)  # fmt: skip
            _store_d_x(d_x_ptr, v, x, radial, inv_x, rows, offs_d, mask, D, ACC)
