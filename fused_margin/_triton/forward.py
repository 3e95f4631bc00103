"""Forward kernels: a sweep over W that knows no margin, then what is linear in N.

Equations refer to ``docs/math.md``.
"""

import triton
import triton.language as tl

from fused_margin._triton.primitives import (
    IGNORED,
    INVALID,
    NOT_ZERO,
    cast,
    dot,
    inverse_norm,
    load_scale,
    margin_loss,
    row_inverse_norm,
    used_rows,
)

NARROW = tl.constexpr(16)  # columns of a row-wise pass: wider ones hold too many pointers


@triton.jit
def _target_cosine(
    x_ptr, w_ptr, offs_n, mask_x, labels, stride_xn, stride_xd, stride_wc, stride_wd, C, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u (eq. 1), (BLOCK_N,) fp64 in [-1, 1]: a dot of its own; 0 for a label outside [0, C).

    Norms and dot are fp64: near u = 1 the margin, and near theta = 0 the loss itself, would amplify
    the rounding of fp32.
    """
    has_target = mask_x & (labels >= 0) & (labels < C)
    product = tl.zeros([BLOCK_N], tl.float64)
    x_squares = tl.zeros([BLOCK_N], tl.float64)
    w_squares = tl.zeros([BLOCK_N], tl.float64)
    for k in range(0, D, BLOCK_K):
        offs_d = k + tl.arange(0, BLOCK_K)
        mask = has_target[:, None] & (offs_d < D)[None, :]
        offs_d = offs_d.to(tl.int64)[None, :]
        w = tl.load(w_ptr + labels[:, None] * stride_wc + offs_d * stride_wd, mask=mask,
                    other=0.0).to(tl.float64)  # (BLOCK_N, BLOCK_K)  # fmt: skip
        x = tl.load(x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_d * stride_xd,
                    mask=mask, other=0.0).to(tl.float64)  # (BLOCK_N, BLOCK_K)  # fmt: skip
        product += tl.sum(x * w, axis=1)
        x_squares += tl.sum(x * x, axis=1)
        w_squares += tl.sum(w * w, axis=1)
    u = product * inverse_norm(w_squares) * inverse_norm(x_squares)  # 0 without a target
    return tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # NaN stays


@triton.jit
def _cosines(
    operand_ptr, w_ptr, offs_n, offs_c, mask_x, mask_c, inv_x, inv_w,
    stride_on, stride_od, stride_wc, stride_wd, D,
    ACC: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x . w, (BLOCK_N, BLOCK_C), and the inverse norms of the classes, (BLOCK_C,), in one pass.

    x comes first in the product and W is cast on its way to shared memory, so that large tiles fit;
    the squares of W are summed per element, and over a row only at the end. With NORMALIZE_FIRST
    the norms are given, and the products are cosines.
    """
    tile = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_C, BLOCK_K], ACC)
    offs_k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + offs_c.to(tl.int64)[:, None] * stride_wc
    x_rows = operand_ptr + offs_n.to(tl.int64)[:, None] * stride_on
    for k in range(0, D, BLOCK_K):
        mask_d = (k + offs_k < D)[None, :]
        offs_d = (k + offs_k).to(tl.int64)[None, :]
        x = tl.load(x_rows + offs_d * stride_od, mask=mask_x[:, None] & mask_d,
                    other=0.0)  # (BLOCK_N, BLOCK_K)  # fmt: skip
        w = tl.load(w_rows + offs_d * stride_wd, mask=mask_c[:, None] & mask_d,
                    other=0.0)  # (BLOCK_C, BLOCK_K)  # fmt: skip
        if NORMALIZE_FIRST:
            x = x.to(ACC) * inv_x[:, None]
            w = w.to(ACC) * inv_w[:, None]
        else:
            w_wide = w.to(ACC)
            squares += w_wide * w_wide
        tile = dot(cast(x, COMPUTE), tl.trans(cast(w, COMPUTE)), tile, PRECISION)
    if not NORMALIZE_FIRST:
        inv_w = inverse_norm(tl.sum(squares, axis=1))
    return tile, inv_w


@triton.jit
def sweep_kernel(
    x_ptr, operand_ptr, w_ptr, labels_ptr, scale_ptr, partial_ptr, u_ptr, inv_x_ptr, inv_w_ptr,
    kept_ptr, shift_ptr, scale: tl.float64, ignore_index, N, C, D,
    stride_xn, stride_xd, stride_on, stride_od, stride_wc, stride_wd, stride_label,
    blocks_per_split,
    HAS_SCALE_TENSOR: tl.constexpr, SOME_IGNORED: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) finds norms and target cosines of row block i, (i, j) sweeps split j - 1.

    A sweep leaves the maximum of the scaled cosines of all but the target, and the sum of their
    exponentials relative to it, in ``partial`` (num_splits, 2, N). ``operand`` is x,
    or x in the dtype of the product. With KEEP it leaves the shift of each block of classes, (class
    blocks, N), and for each cosine, (C, N) up to whole blocks, either z = s c - shift, where that
    is above -1, or exp(z); the first is below 0, the second is not.
    """
    pid_n = tl.program_id(0)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=mask_n, other=-1).to(
        tl.int64
    )
    mask_x = used_rows(labels, mask_n, ignore_index, SOME_IGNORED)
    inv_x = row_inverse_norm(x_ptr, offs_n, mask_x, stride_xn, stride_xd, D, ACC, BLOCK_N, NARROW)
    if tl.program_id(1) == 0:
        u = _target_cosine(
            x_ptr, w_ptr, offs_n, mask_x, labels,
            stride_xn, stride_xd, stride_wc, stride_wd, C, D, BLOCK_N, NARROW,
        )  # fmt: skip
        tl.store(u_ptr + offs_n, u, mask=mask_n)
        tl.store(inv_x_ptr + offs_n, inv_x, mask=mask_n)
    else:
        split = tl.program_id(1) - 1
        factor = tl.zeros([BLOCK_N], ACC) + load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
        if not NORMALIZE_FIRST:
            factor = factor * inv_x
        # a label outside [0, C) is no class's
        target = tl.where((labels >= 0) & (labels < C), labels, -1).to(tl.int32)
        run_max = tl.full([BLOCK_N], -float("inf"), ACC)
        run_sum = tl.zeros([BLOCK_N], ACC)
        first = split * blocks_per_split
        last = tl.minimum(first + blocks_per_split, tl.cdiv(C, BLOCK_C))
        for block in range(first, last):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            inv_w = tl.zeros([BLOCK_C], ACC)
            if NORMALIZE_FIRST:
                inv_w = row_inverse_norm(
                    w_ptr, offs_c, mask_c, stride_wc, stride_wd, D, ACC, BLOCK_C, NARROW
                )
            z, inv_w = _cosines(
                operand_ptr, w_ptr, offs_n, offs_c, mask_x, mask_c, inv_x, inv_w,
                stride_on, stride_od, stride_wc, stride_wd, D,
                ACC, COMPUTE, PRECISION, NORMALIZE_FIRST, BLOCK_N, BLOCK_C, BLOCK_K,
            )  # (BLOCK_N, BLOCK_C)  # fmt: skip
            if pid_n == 0:
                tl.store(inv_w_ptr + offs_c, inv_w, mask=mask_c)
            z = z * factor[:, None]
            if not NORMALIZE_FIRST:
                z = z * inv_w[None, :]
            is_left_out = (offs_c[None, :] == target[:, None]) | (offs_c >= C)[None, :]
            z = tl.where(is_left_out, -float("inf"), z)
            new_max = tl.maximum(run_max, tl.max(z, axis=1))
            # a tile may hold nothing but a row's target: -inf - -inf must not become NaN
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            z = z - shift[:, None]
            e = tl.exp(z)
            if KEEP:
                tl.store(shift_ptr + tl.cast(block, tl.int64) * N + offs_n, shift, mask=mask_n)
                kept = tl.where(z > -1.0, z - NOT_ZERO, e)
                tl.store(kept_ptr + offs_c.to(tl.int64)[None, :] * N + offs_n[:, None],
                         cast(kept, kept_ptr.dtype.element_ty),
                         mask=mask_n[:, None])  # whole blocks, 0 past the last class  # fmt: skip
            run_sum = run_sum * tl.exp(run_max - shift) + tl.sum(e, axis=1)
            run_max = new_max
        partial = partial_ptr + split.to(tl.int64) * 2 * N
        tl.store(partial + offs_n, run_max, mask=mask_n)
        tl.store(partial + N + offs_n, run_sum, mask=mask_n)


@triton.jit
def _merge(partial_ptr, offs_n, mask_n, N, num_splits, ACC: tl.constexpr,
           BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """lse (eq. 3) from the partials of all splits, (BLOCK_N,) fp64; in fixed order."""
    run_max = tl.full([BLOCK_N], -float("inf"), ACC)
    run_sum = tl.zeros([BLOCK_N], ACC)
    for j in range(0, num_splits, BLOCK_S):
        splits = j + tl.arange(0, BLOCK_S)
        partial = partial_ptr + splits.to(tl.int64)[:, None] * 2 * N + offs_n[None, :]
        mask = (splits < num_splits)[:, None] & mask_n[None, :]
        z_max = tl.load(partial, mask=mask, other=-float("inf"))  # (BLOCK_S, BLOCK_N)
        z_sum = tl.load(partial + N, mask=mask, other=0.0)
        new_max = tl.maximum(run_max, tl.max(z_max, axis=0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        z_sum = z_sum * tl.exp(z_max - shift[None, :])
        run_sum = run_sum * tl.exp(run_max - shift) + tl.sum(z_sum, axis=0)
        run_max = new_max
    run_sum = tl.where(mask_n, run_sum, 1.0)
    return run_max.to(tl.float64) + tl.log(run_sum.to(tl.float64))


@triton.jit
def rows_kernel(
    partial_ptr, labels_ptr, u_ptr, lse_ptr, row_loss_ptr, loss_ptr, d_lse_ptr, d_u_ptr, count_ptr,
    targets_ptr, scale: tl.float64,
    cos_m: tl.float64, sin_m: tl.float64, threshold: tl.float64, offset: tl.float64,
    ignore_index, N, C, num_splits, rows_per_program, stride_label,
    HAS_MARGIN: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, REDUCTION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse of each row and, with HAS_MARGIN, its loss, the loss's derivatives and its label's kind.

    A reduced loss is the sum of a single program's rows, which then are all.
    """
    total = tl.zeros([BLOCK_N], ACC)
    start = tl.program_id(0) * rows_per_program
    for n in range(start, tl.minimum(start + rows_per_program, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        lse = _merge(partial_ptr, offs_n, mask_n, N, num_splits, ACC, BLOCK_S, BLOCK_N)
        tl.store(lse_ptr + offs_n, lse, mask=mask_n)
        if HAS_MARGIN:
            labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=mask_n,
                             other=-1).to(tl.int64)  # fmt: skip
            u = tl.load(u_ptr + offs_n, mask=mask_n, other=0.0)
            is_valid = (labels >= 0) & (labels < C)
            loss, d_lse, d_u = margin_loss(
                u, tl.where(is_valid, lse, float("nan")), tl.full([1], scale, tl.float64),
                tl.full([1], cos_m, tl.float64), tl.full([1], sin_m, tl.float64),
                tl.full([1], threshold, tl.float64), tl.full([1], offset, tl.float64),
                STRAIGHT_THROUGH,
            )  # fmt: skip
            is_ignored = labels == ignore_index
            row_loss = tl.where(is_ignored, 0.0, loss).to(ACC)
            targets = tl.where(is_ignored, IGNORED, tl.where(is_valid, labels, INVALID))
            tl.store(targets_ptr + offs_n, targets, mask=mask_n)
            tl.store(row_loss_ptr + offs_n, row_loss, mask=mask_n)
            tl.store(d_lse_ptr + offs_n, tl.where(is_ignored, 0.0, d_lse).to(ACC), mask=mask_n)
            tl.store(d_u_ptr + offs_n, tl.where(is_ignored, 0.0, d_u).to(ACC), mask=mask_n)
            total += tl.where(mask_n, row_loss, 0.0)
    if HAS_MARGIN and start == 0:
        count = tl.zeros([BLOCK_N], tl.int64)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=offs_n < N,
                             other=0).to(tl.int64)  # fmt: skip
            count += ((offs_n < N) & (labels != ignore_index)).to(tl.int64)
        num_counted = tl.sum(count, axis=0).to(ACC)
        tl.store(count_ptr, num_counted)
        if REDUCTION == "sum":
            tl.store(loss_ptr, tl.sum(total, axis=0))
        if REDUCTION == "mean":
            tl.store(loss_ptr, tl.sum(total, axis=0) / tl.maximum(num_counted, 1.0))
