"""Forward kernel: one sweep over W that ends in the loss. Equations refer to ``docs/math.md``."""

import triton
import triton.language as tl

from fused_margin._triton.primitives import (
    IGNORED,
    INVALID,
    NOT_ZERO,
    cast,
    cosine_tile,
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
def forward_kernel(
    x_ptr, w_ptr, labels_ptr, scale_ptr, partial_ptr, counters_ptr,
    lse_ptr, u_ptr, inv_x_ptr, inv_w_ptr, row_loss_ptr, loss_ptr, d_lse_ptr, d_u_ptr, count_ptr,
    targets_ptr, kept_ptr, shift_ptr,
    scale: tl.float64,
    cos_m: tl.float64, sin_m: tl.float64, threshold: tl.float64, offset: tl.float64,
    ignore_index, N, C, D, stride_xn, stride_xd, stride_wc, stride_wd, stride_label,
    blocks_per_split, num_splits, rotation,
    HAS_SCALE_TENSOR: tl.constexpr, HAS_MARGIN: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    REDUCTION: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, NORMALIZE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j) sweeps split j of the classes for row block i.

    The last program of a row block merges the partials of all splits in fixed order (eq. 3), finds
    the target cosines and, with HAS_MARGIN, the losses; the last of those sums the losses. Which
    program is last varies, the order of every sum does not. With KEEP it leaves the shift of each
    block of classes, (class blocks, N), and for each cosine, (C, N) up to whole blocks, either
    z = s c - shift, where that is above -1, or exp(z); the first is below 0, the second is not.
    """
    pid_n = tl.program_id(0)
    # `rotation` is 0 but in tests, where it changes which program comes last in the interpreter.
    split = (tl.program_id(1) + rotation) % num_splits
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=mask_n, other=-1).to(
        tl.int64
    )
    mask_x = used_rows(labels, mask_n, ignore_index, HAS_MARGIN)
    s = load_scale(scale, scale_ptr, HAS_SCALE_TENSOR, ACC)
    inv_x = row_inverse_norm(x_ptr, offs_n, mask_x, stride_xn, stride_xd, D, ACC, BLOCK_N, NARROW)

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
        cos, inv_w = cosine_tile(
            x_ptr, w_ptr, offs_n, offs_c, mask_x, mask_c, inv_x, inv_w,
            stride_xn, stride_xd, stride_wc, stride_wd, D, not NORMALIZE_FIRST, NORMALIZE_FIRST,
            ACC, COMPUTE, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K,
        )  # (BLOCK_C, BLOCK_N)  # fmt: skip
        tl.store(inv_w_ptr + offs_c, inv_w, mask=mask_c & (pid_n == 0))
        is_left_out = (offs_c[:, None] == labels[None, :]) | (offs_c >= C)[:, None]
        z = tl.where(is_left_out, -float("inf"), s * cos)
        new_max = tl.maximum(run_max, tl.max(z, axis=0))
        # a tile may hold nothing but a row's target: -inf - -inf must not become NaN
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        z = z - shift[None, :]
        e = tl.exp(z)
        if KEEP:
            tl.store(shift_ptr + tl.cast(block, tl.int64) * N + offs_n, shift, mask=mask_n)
            kept = tl.where(z > -1.0, z - NOT_ZERO, e)
            tl.store(kept_ptr + offs_c.to(tl.int64)[:, None] * N + offs_n[None, :],
                     cast(kept, kept_ptr.dtype.element_ty),
                     mask=mask_n[None, :])  # whole blocks, with 0 past the last class  # fmt: skip
        run_sum = run_sum * tl.exp(run_max - shift) + tl.sum(e, axis=0)
        run_max = new_max

    partial = partial_ptr + split.to(tl.int64) * 2 * N  # (num_splits, 2, N)
    tl.store(partial + offs_n, run_max, mask=mask_n)
    tl.store(partial + N + offs_n, run_sum, mask=mask_n)
    tl.debug_barrier()  # every thread's partials are stored before one thread releases them
    arrived = tl.atomic_add(counters_ptr + pid_n, 1, sem="acq_rel", scope="gpu")
    if arrived == num_splits - 1:
        tl.debug_barrier()
        run_max = tl.full([BLOCK_N], -float("inf"), ACC)
        run_sum = tl.zeros([BLOCK_N], ACC)
        for j in range(0, num_splits):
            partial = partial_ptr + tl.cast(j, tl.int64) * 2 * N
            z_max = tl.load(partial + offs_n, mask=mask_n, other=0.0, cache_modifier=".cg")
            z_sum = tl.load(partial + N + offs_n, mask=mask_n, other=1.0, cache_modifier=".cg")
            new_max = tl.maximum(run_max, z_max)
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            run_sum = run_sum * tl.exp(run_max - shift) + z_sum * tl.exp(z_max - shift)
            run_max = new_max
        lse = run_max.to(tl.float64) + tl.log(run_sum.to(tl.float64))
        u = _target_cosine(
            x_ptr, w_ptr, offs_n, mask_x, labels,
            stride_xn, stride_xd, stride_wc, stride_wd, C, D, BLOCK_N, NARROW,
        )  # fmt: skip
        tl.store(lse_ptr + offs_n, lse, mask=mask_n)
        tl.store(u_ptr + offs_n, u, mask=mask_n)
        tl.store(inv_x_ptr + offs_n, inv_x, mask=mask_n)
        if HAS_MARGIN:
            is_valid = (labels >= 0) & (labels < C)
            loss, d_lse, d_u = margin_loss(
                u, tl.where(is_valid, lse, float("nan")), tl.full([1], scale, tl.float64),
                tl.full([1], cos_m, tl.float64), tl.full([1], sin_m, tl.float64),
                tl.full([1], threshold, tl.float64), tl.full([1], offset, tl.float64),
                STRAIGHT_THROUGH,
            )  # fmt: skip
            ignored = labels == ignore_index
            targets = tl.where(ignored, IGNORED, tl.where(is_valid, labels, INVALID))
            tl.store(targets_ptr + offs_n, targets, mask=mask_n)
            tl.store(row_loss_ptr + offs_n, tl.where(ignored, 0.0, loss).to(ACC), mask=mask_n)
            tl.store(d_lse_ptr + offs_n, tl.where(ignored, 0.0, d_lse).to(ACC), mask=mask_n)
            tl.store(d_u_ptr + offs_n, tl.where(ignored, 0.0, d_u).to(ACC), mask=mask_n)
            tl.debug_barrier()
            num_row_blocks = tl.num_programs(0)
            arrived = tl.atomic_add(counters_ptr + num_row_blocks, 1, sem="acq_rel", scope="gpu")
            if arrived == num_row_blocks - 1:
                tl.debug_barrier()
                total = tl.zeros([BLOCK_N], ACC)
                count = tl.zeros([BLOCK_N], tl.int64)
                for i in range(0, num_row_blocks):
                    offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
                    mask_n = offs_n < N
                    labels = tl.load(labels_ptr + offs_n.to(tl.int64) * stride_label, mask=mask_n,
                                     other=0).to(tl.int64)  # fmt: skip
                    total += tl.load(row_loss_ptr + offs_n, mask=mask_n, other=0.0,
                                     cache_modifier=".cg")  # fmt: skip
                    count += (mask_n & (labels != ignore_index)).to(tl.int64)
                num_counted = tl.sum(count, axis=0).to(ACC)
                tl.store(count_ptr, num_counted)
                if REDUCTION == "sum":
                    tl.store(loss_ptr, tl.sum(total, axis=0))
                if REDUCTION == "mean":
                    tl.store(loss_ptr, tl.sum(total, axis=0) / tl.maximum(num_counted, 1.0))
