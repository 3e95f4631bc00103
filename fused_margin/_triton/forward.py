"""Forward kernels: a sweep over W that knows no margin, then what is linear in N.

Equations refer to ``docs/math.md``.
"""

import triton
import triton.language as tl

from fused_margin._triton.others import (
    class_rows,
    nearest_of_columns,
    num_blocks,
    own_class,
    shaped,
)
from fused_margin._triton.primitives import (
    IGNORED,
    INVALID,
    NOT_ZERO,
    around_cast,
    at,
    cast,
    dot,
    inverse_norm,
    load_labels,
    load_scale,
    margin_loss,
    row_inverse_norm,
)

NARROW = tl.constexpr(16)  # columns of a row-wise pass: wider ones hold too many pointers


@triton.jit
def _target_cosine(x, w, offs_n, mask_x, labels, C, D,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """u (eq. 1), (BLOCK_N,) fp64 in [-1, 1]: a dot of its own; 0 for a label outside [0, C).

    Norms and dot are fp64: near u = 1 the margin, and near theta = 0 the loss itself, would amplify
    the rounding of fp32.
    """
    has_target = mask_x & (labels >= 0) & (labels < C)
    # a list of rows is read without a mask; not by a select, which Triton 3.6 doesn't compile here
    labels = tl.minimum(tl.maximum(labels, 0), C - 1)
    product = tl.zeros([BLOCK_N], tl.float64)
    x_squares = tl.zeros([BLOCK_N], tl.float64)
    w_squares = tl.zeros([BLOCK_N], tl.float64)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        mask = has_target[:, None] & (offs_d < D)
        w_rows = tl.load(at(w, labels[:, None], offs_d), mask=mask, other=0.0).to(tl.float64)
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask, other=0.0).to(tl.float64)
        product += tl.sum(x_rows * w_rows, axis=1)
        x_squares += tl.sum(x_rows * x_rows, axis=1)
        w_squares += tl.sum(w_rows * w_rows, axis=1)
    u = product * inverse_norm(w_squares) * inverse_norm(x_squares)  # 0 without a target
    return tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # NaN stays


@triton.jit(do_not_specialize=["ignore_index", "N"])
def prepare_kernel(
    x, rows, operand_ptr, inv_x_ptr, stride_operand, ignore_index, N, D, SOME_IGNORED: tl.constexpr,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x in the dtype of products, 0 where it is ignored, and inverse norms if asked for.

    With NORMALIZE_FIRST it is normalised.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask_x = mask_n
    if SOME_IGNORED:
        mask_x = mask_n & (load_labels(rows, offs_n, mask_n) != ignore_index)
    sum_squares = tl.zeros([BLOCK_N], P.ACC)
    inv_x = tl.zeros([BLOCK_N], P.ACC)
    if P.NORMALIZE_FIRST:
        inv_x = row_inverse_norm(x, offs_n, mask_x, D, P.ACC, BLOCK_N, BLOCK_D)
    operand = operand_ptr + offs_n.to(tl.int64)[:, None] * stride_operand
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)[None, :]
        x_rows = tl.load(at(x, offs_n[:, None], offs_d), mask=mask_x[:, None] & (offs_d < D),
                         other=0.0)  # (BLOCK_N, BLOCK_D)  # fmt: skip
        wide = x_rows.to(P.ACC)
        if P.NORMALIZE_FIRST:
            x_rows = wide * inv_x[:, None]
        else:
            sum_squares += tl.sum(wide * wide, axis=1)
        tl.store(operand + offs_d, cast(x_rows, P.COMPUTE), mask=mask_n[:, None] & (offs_d < D))
    if inv_x_ptr is not None:
        if not P.NORMALIZE_FIRST:
            inv_x = inverse_norm(sum_squares)
        tl.store(inv_x_ptr + offs_n, inv_x, mask=mask_n)


@triton.jit
def _cosines(
    operand, w, x_desc, w_desc, first_row, first_class, offs_n, offs_c, mask_x, mask_c,
    before, D, SCALES: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x . w, (BLOCK_N, BLOCK_C), and the inverse norms of the classes, (BLOCK_C,), in one pass.

    x comes first in the product and W is cast on its way to shared memory, so that large tiles fit;
    the squares of W are summed per element, and over a row only at the end; or W is
    multiplied by ``before``, a factor for each row, before the cast (SCALES).
    """
    tile = tl.zeros([BLOCK_N, BLOCK_C], P.ACC)
    squares = tl.zeros([BLOCK_C, BLOCK_D], P.ACC)
    for d in range(0, D, BLOCK_D):
        if x_desc is not None:
            x_rows = x_desc.load([first_row, d])  # (BLOCK_N, BLOCK_D)
            w_rows = w_desc.load([first_class, d])  # (BLOCK_C, BLOCK_D)
        else:
            offs_d = d + tl.arange(0, BLOCK_D)[None, :]
            mask_d = offs_d < D
            x_rows = tl.load(at(operand, offs_n[:, None], offs_d), mask=mask_x[:, None] & mask_d,
                             other=0.0)  # fmt: skip
            w_rows = tl.load(at(w, offs_c[:, None], offs_d), mask=mask_c[:, None] & mask_d,
                             other=0.0)  # fmt: skip
        wide = w_rows.to(P.ACC)
        if SCALES:
            w_rows = wide * before[:, None]
        else:
            squares += wide * wide
        tile = dot(cast(x_rows, P.COMPUTE), tl.trans(cast(w_rows, P.COMPUTE)), tile, P, True)
    return tile, inverse_norm(tl.sum(squares, axis=1))


@triton.jit
def _keep(kept, z, e, shift, block, offs_n, offs_c):
    """Store the shift of a block of classes, and of each of its cosines z, where above -1, or e.

    The first is below 0, the second is not.
    """
    mask = offs_n < kept.pitch
    tl.store(kept.shifts + tl.cast(block, tl.int64) * kept.pitch + offs_n, shift, mask=mask)
    entries = tl.where(z > -1.0, z - NOT_ZERO, e)
    tl.store(kept.entries + offs_c.to(tl.int64)[None, :] * kept.pitch + offs_n[:, None],
             cast(entries, kept.entries.dtype.element_ty),
             mask=mask[:, None])  # whole blocks, 0 past the last class  # fmt: skip


@triton.jit
def _lend(kept, e, inv_w, offs_n, offs_c, C):
    """Store exponentials over the norms of the classes."""
    mask = (offs_n < kept.pitch)[:, None] & (offs_c < C)[None, :]
    tl.store(kept.entries + offs_c.to(tl.int64)[None, :] * kept.stride + offs_n[:, None],
             cast(e * inv_w[None, :], kept.entries.dtype.element_ty), mask=mask)  # fmt: skip


@triton.jit
def _sweep(
    operand, w, x_desc, w_desc, inv_w_ptr, kept, target, s, inv_x, others, split,
    blocks_per_split, offs_n, mask_x, sizes, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum of z = s c and sum of exp(z - maximum) over blocks of classes, (BLOCK_N,) each.

    All but the row's target, -1 if it has none. What `Others` ask for is stored.
    """
    N, C, D = sizes
    factor = tl.zeros([BLOCK_N], P.ACC) + s
    if not P.NORMALIZE_FIRST:  # else x is normalised
        factor = factor * inv_x
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks(C, P, BLOCK_C))
    best = tl.full([BLOCK_N], -float("inf"), P.ACC)
    best_class = tl.zeros([BLOCK_N], tl.int32)
    count = tl.zeros([BLOCK_N], tl.int32)
    total = tl.zeros([BLOCK_N], P.ACC)
    weighted = tl.zeros([BLOCK_N], P.ACC)
    mask_n = offs_n < N
    IS_LENT: tl.constexpr = kept.entries is not None and kept.shifts is None
    run_max = tl.full([BLOCK_N], -float("inf"), P.ACC)
    run_sum = tl.zeros([BLOCK_N], P.ACC)
    for block in range(first, last):
        offs_c, mask_c = class_rows(block, C, P, BLOCK_C)
        inv_w = tl.zeros([BLOCK_C], P.ACC)
        z, inv_w = _cosines(
            operand, w, x_desc, w_desc, tl.program_id(0) * BLOCK_N, block * BLOCK_C,
            offs_n, offs_c, mask_x, mask_c, inv_w, D, False, P, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # (BLOCK_N, BLOCK_C)  # fmt: skip
        if tl.program_id(0) == 0:
            tl.store(inv_w_ptr + offs_c, inv_w, mask=mask_c)
        after = inv_w
        if P.NORMALIZE_FIRST:
            before, after = around_cast(inv_w)
            # once more then; no `if`, in which Triton 3.6 compiles no product for Blackwell
            for _ in range(0, tl.max((mask_c & (before != 1.0)).to(tl.int32), axis=0)):
                z, _ = _cosines(
                    operand, w, x_desc, w_desc, tl.program_id(0) * BLOCK_N, block * BLOCK_C,
                    offs_n, offs_c, mask_x, mask_c, before, D, True, P, BLOCK_N, BLOCK_C,
                    BLOCK_D,
                )  # fmt: skip
        z = z * factor[:, None] * after[None, :]
        is_own = (offs_c // P.CENTERS)[None, :] == target[:, None]
        z = tl.where(is_own | ~mask_c[None, :], -float("inf"), z)
        if P.CENTERS > 1:
            z = nearest_of_columns(z, P, BLOCK_N, BLOCK_C)
        if others.nearer is not None:
            largest = tl.max(z, axis=1)
            # the first class of those
            index = tl.min(tl.where(z == largest[:, None], offs_c[None, :], C), axis=1)
            best_class = tl.where(largest > best, index // P.CENTERS, best_class)
            best = tl.maximum(best, largest)
            nearer = s * tl.load(others.nearer + offs_n, mask=mask_n, other=0.0)
            count += tl.sum((z > nearer[:, None]).to(tl.int32), axis=1)
        if others.threshold is not None:
            threshold = s * tl.load(others.threshold + offs_n, mask=mask_n, other=0.0)
            z, _ = shaped(z, threshold[:, None], others, s)
        if others.total is not None:
            total += tl.sum(tl.where(z == -float("inf"), 0.0, z), axis=1)
        if IS_LENT:  # exponentials need no shift
            new_max = tl.zeros([BLOCK_N], P.ACC)
        else:
            new_max = tl.maximum(run_max, tl.max(z, axis=1))
        # a tile may hold nothing but a row's target: -inf - -inf must not become NaN
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        z = z - shift[:, None]
        e = tl.exp(z)
        if kept.entries is not None:
            if IS_LENT:
                _lend(kept, e, inv_w, offs_n, offs_c, C)
            else:
                _keep(kept, z, e, shift, block, offs_n, offs_c)
        run_sum = run_sum * tl.exp(run_max - shift) + tl.sum(e, axis=1)
        if others.weighted is not None:
            logits = tl.where(e > 0.0, z + shift[:, None], 0.0)
            weighted = weighted * tl.exp(run_max - shift) + tl.sum(e * logits, axis=1)
        run_max = new_max
    offs = split.to(tl.int64) * N + offs_n
    if others.nearer is not None:
        tl.store(others.best + offs, best, mask=mask_n)
        tl.store(others.best_class + offs, best_class, mask=mask_n)
        tl.store(others.count + offs, count, mask=mask_n)
    if others.total is not None:
        tl.store(others.total + offs, total / s, mask=mask_n)
    if others.weighted is not None:
        tl.store(others.weighted + offs, weighted, mask=mask_n)
    return run_max, run_sum


@triton.jit(do_not_specialize=["ignore_index", "N", "blocks_per_split"])
def sweep_kernel(
    x, operand, w, x_desc, w_desc, rows, partial_ptr, inv_w_ptr, kept, scale: tl.float64,
    ignore_index, N, C, D, blocks_per_split, SOME_IGNORED: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) finds norms and target cosines of row block i, (i, j) sweeps split j - 1.

    A sweep leaves the maximum of the scaled cosines of all but the target, and the sum of their
    exponentials relative to it, in ``partial`` (num_splits, 2, N). ``operand`` is x, or x in the
    dtype of the product; with descriptors or NORMALIZE_FIRST, what `prepare_kernel` made of x. In
    ``kept``, if it has entries, a sweep leaves of each cosine either z = s c - shift, where that is
    above -1, or exp(z); or exp(s c) / ||w||, if d_w is lent.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = load_labels(rows, offs_n, mask_n)
    mask_x = mask_n
    if SOME_IGNORED:
        mask_x = mask_n & (labels != ignore_index)
    IS_PREPARED: tl.constexpr = x_desc is not None or P.NORMALIZE_FIRST
    if IS_PREPARED:
        inv_x = tl.load(rows.inv_x + offs_n, mask=mask_n, other=0.0)
    else:
        inv_x = row_inverse_norm(x, offs_n, mask_x, D, P.ACC, BLOCK_N, NARROW)
    if tl.program_id(1) == 0:
        u = _target_cosine(x, w, offs_n, mask_x, labels, C, D, BLOCK_N, NARROW)
        tl.store(rows.u + offs_n, u, mask=mask_n)
        if not IS_PREPARED:
            tl.store(rows.inv_x + offs_n, inv_x, mask=mask_n)
    else:
        split = tl.program_id(1) - 1
        s = load_scale(scale, rows, P.ACC)
        run_max, run_sum = _sweep(
            operand, w, x_desc, w_desc, inv_w_ptr, kept, own_class(labels, C, P), s, inv_x,
            rows.others, split, blocks_per_split, offs_n, mask_x, (N, C, D), P,
            BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
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
    is_empty = run_sum == 0.0  # all other classes are left out, or there is none
    run_sum = tl.where(mask_n & ~is_empty, run_sum, 1.0)
    lse = run_max.to(tl.float64) + tl.log(run_sum.to(tl.float64))
    return tl.where(is_empty, -float("inf"), lse)


@triton.jit
def _row_losses(
    rows, losses, lse, offs_n, mask_n, scale, cos_m, sin_m, threshold, offset, ignore_index, C,
    STRAIGHT_THROUGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the loss of each row, its derivatives and the kind of its label; returns the loss."""
    labels = load_labels(rows, offs_n, mask_n)
    u = tl.load(rows.u + offs_n, mask=mask_n, other=0.0)
    is_valid = (labels >= 0) & (labels < C)
    loss, slope_lse, slope_u = margin_loss(
        u, tl.where(is_valid, lse, float("nan")), tl.full([1], scale, tl.float64),
        tl.full([1], cos_m, tl.float64), tl.full([1], sin_m, tl.float64),
        tl.full([1], threshold, tl.float64), tl.full([1], offset, tl.float64),
        STRAIGHT_THROUGH,
    )  # fmt: skip
    is_ignored = labels == ignore_index
    loss = tl.where(is_ignored, 0.0, loss).to(ACC)
    targets = tl.where(is_ignored, IGNORED, tl.where(is_valid, labels, INVALID))
    tl.store(losses.targets + offs_n, targets, mask=mask_n)
    tl.store(losses.rows + offs_n, loss, mask=mask_n)
    tl.store(rows.slope_lse + offs_n, tl.where(is_ignored, 0.0, slope_lse).to(ACC), mask=mask_n)
    tl.store(rows.slope_u + offs_n, tl.where(is_ignored, 0.0, slope_u).to(ACC), mask=mask_n)
    return tl.where(mask_n, loss, 0.0)


@triton.jit(do_not_specialize=["ignore_index", "N", "num_splits", "rows_per_program"])
def rows_kernel(
    partial_ptr, rows, losses, scale: tl.float64,
    cos_m: tl.float64, sin_m: tl.float64, threshold: tl.float64, offset: tl.float64,
    ignore_index, N, C, num_splits, rows_per_program,
    STRAIGHT_THROUGH: tl.constexpr, REDUCTION: tl.constexpr,
    P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse of each row and, where ``losses`` are asked for, those with what their backward needs.

    A reduced loss is the sum of a single program's rows, which then are all.
    """
    total = tl.zeros([BLOCK_N], P.ACC)
    start = tl.program_id(0) * rows_per_program
    for n in range(start, tl.minimum(start + rows_per_program, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        lse = _merge(partial_ptr, offs_n, mask_n, N, num_splits, P.ACC, BLOCK_S, BLOCK_N)
        tl.store(rows.lse + offs_n, lse, mask=mask_n)
        if losses.rows is not None:
            total += _row_losses(
                rows, losses, lse, offs_n, mask_n, scale, cos_m, sin_m, threshold, offset,
                ignore_index, C, STRAIGHT_THROUGH, P.ACC,
            )  # fmt: skip
    if losses.rows is not None and start == 0:
        count = tl.zeros([BLOCK_N], tl.int64)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            is_counted = load_labels(rows, offs_n, offs_n < N) != ignore_index
            count += ((offs_n < N) & is_counted).to(tl.int64)
        num_counted = tl.sum(count, axis=0).to(P.ACC)
        tl.store(rows.num_counted, num_counted)
        if REDUCTION == "sum":
            tl.store(losses.reduced, tl.sum(total, axis=0))
        if REDUCTION == "mean":
            tl.store(losses.reduced, tl.sum(total, axis=0) / tl.maximum(num_counted, 1.0))
