"""Launches the kernels: allocation and grids. No mathematics, and no choices: see `planning`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fused_margin import _loans
from fused_margin._arguments import (
    IGNORED,
    TAKEN,
    Extras,
    Found,
    Gradients,
    Inputs,
    Loan,
    Losses,
    Needs,
    Slopes,
    Swept,
    Update,
)
from fused_margin._triton.arguments import Chunk, Kept, LossOutputs, Matrix, Others, Rows, pitch
from fused_margin._triton.backward import (
    embeddings_kernel,
    finish_kernel,
    fused_embeddings_kernel,
    fused_weight_kernel,
    gradient_kernel,
    weight_kernel,
)
from fused_margin._triton.forward import prepare_kernel, rows_kernel, sweep_kernel
from fused_margin._triton.lent import (
    lent_finish_kernel,
    lent_prepare_kernel,
    lent_targets_kernel,
    lent_weight_kernel,
)
from fused_margin._triton.operands import (
    Call,
    Left,
    describe,
    embeddings_grid,
    guard,
    keywords,
    loadable,
    merged,
    operand_of,
    room_for_others,
    root_of,
    rows_of_block,
    some_rows,
    split_count,
)
from fused_margin._triton.planning import (
    NOTHING,
    Plan,
    backward_strategy,
    is_lent,
    kept_parts,
    kept_shape,
    lent_rows,
    plain_plan,
    plan,
    with_centers,
)
from fused_margin._triton.tiles import cdiv, cut, power_of_two
from fused_margin.margins import NO_MARGIN, Margin

Tensor = torch.Tensor

# Bytes of the chunk of G that the backward keeps at a time.
CHUNK_BYTES = 64 << 20
# Most rows of a tile of `gradient_kernel` where it has no product.
KEPT_GRADIENT_ROWS = 64
# Rows and columns that a program of `prepare_kernel` or `finish_kernel` works on at a time: few, to
# fill a GPU.
FEW_ROWS, FEW_COLUMNS = 4, 128
# Splits and rows that `rows_kernel` merges at a time: many, as a single program may go through all.
MERGED_SPLITS, MERGED_ROWS = 32, 128
# Rows that `lent_targets_kernel` looks at at a time, for those of a class.
SCANNED_ROWS = 64


def _plan(inputs: Inputs) -> Plan:
    """The plan of a call; descriptors know neither classes with several rows nor some of them."""
    x, w, compute_dtype, extras = inputs.x, inputs.w, inputs.compute_dtype, inputs.extras
    p = plan(x, w, compute_dtype)
    if extras.centers == 1 and extras.classes is None:
        return p
    p = plain_plan(x, w, compute_dtype) if p.descriptors else p
    return with_centers(p, extras.centers)


def _prepare(
    p: Plan, x: Tensor, rows: Rows, inv_x: Tensor | None, ignore_index: int | None
) -> Tensor:
    """x as products and descriptors want it, (N, D), 0 in ignored rows; fills ``inv_x``."""
    num_rows, dim = x.shape
    operand = x.new_empty((num_rows, 8 * cdiv(dim, 8)), dtype=p.compute)  # rows of whole 16 bytes
    prepare_kernel[(cdiv(num_rows, FEW_ROWS),)](
        Matrix.of(x), rows, operand, inv_x, operand.stride(0), ignore_index or 0, num_rows, dim,
        SOME_IGNORED=ignore_index is not None, P=p.precision,
        BLOCK_N=FEW_ROWS, BLOCK_D=FEW_COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return operand[:, :dim]


def _sweep(
    inputs: Inputs,
    p: Plan,
    rows: Rows,
    swept: Swept,
    left: Left | None,
    ignore_index: int | None,
    weighs: bool = False,
    most_classes: int | None = None,
) -> tuple[Tensor, Others | None]:
    """Launch a sweep; returns its partials, (num_splits, 2, N), and those of what else it found.

    Rows with the label ``ignore_index`` are not looked at, unless it is None. ``weighs``: whether
    the mean of s phi(c) is to be found. ``most_classes``: of all calls that run the same code.
    """
    x, w, asks = inputs.x, inputs.w, not inputs.extras.is_plain
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    kept, kept_block = kept_parts(swept.kept, num_rows, p)
    tile = p.tiles.forward
    if left is not None:
        q, tiles, num_lent = left
        kept = Kept(q, None, pitch(num_lent), q.stride(0))
        # addresses of listed rows take registers
        fewer = p.tiles.asked_rows if inputs.extras.classes is not None else tiles.rows
        tile = tile.with_rows(min(tiles.rows, fewer))
    elif asks:
        tile = tile.with_rows(p.tiles.asked_rows)
    elif kept is not None:
        tile = tile.with_rows(p.tiles.kept_rows)
    tile = cut(tile, num_rows, most_classes or num_classes, dim)
    if kept_block and tile.c != kept_block:  # tuned, it might not fit with other classes
        default = plain_plan(x, w, inputs.compute_dtype).tiles
        tile = cut(default.forward.with_rows(default.kept_rows), num_rows, kept_block, dim)
    class_blocks, row_blocks = cdiv(num_classes, rows_of_block(tile, p)), cdiv(num_rows, tile.n)
    # one program of each row block is for its target cosines
    splits = min(class_blocks, max(1, p.programs // max(row_blocks, 1) - 1))
    blocks_per_split = cdiv(class_blocks, splits)
    splits = cdiv(class_blocks, blocks_per_split)
    partial = x.new_empty((splits, 2, num_rows), dtype=p.accumulate)
    if asks:
        rows = rows._replace(others=room_for_others(inputs, p, splits, weighs))
    x_desc = w_desc = None
    if p.prepares:
        operand = _prepare(p, x, rows, swept.inv_x, ignore_index)
    else:
        operand = operand_of(x, num_classes, p)
    if p.descriptors:
        x_desc, w_desc = describe(operand, tile.n, tile.d), describe(w, tile.c, tile.d)
    sweep_kernel[(row_blocks, splits + 1)](
        Matrix.of(x), Matrix.of(operand), Matrix.of(w, inputs.extras.classes), x_desc, w_desc,
        rows, partial, swept.inv_w, kept or Kept(), inputs.scale, ignore_index or 0, num_rows,
        num_classes, dim, blocks_per_split, SOME_IGNORED=ignore_index is not None, P=p.precision,
        **keywords(tile),
    )  # fmt: skip
    return partial, rows.others if asks else None


def _lend(x: Tensor, w: Tensor, p: Plan) -> Loan | None:
    """Memory of d_w, for a sweep to leave exponentials in; None if there are no tiles for it."""
    if p.lent is None:
        return None
    d_w = w.new_empty(w.shape)  # contiguous whatever the strides of w
    return Loan(d_w, Left(d_w.view(p.gradient), p.lent, lent_rows(x, w, p)))


def _memory(
    inputs: Inputs, p: Plan, budget: int, lends_for: Needs | None
) -> tuple[Swept, Loan | None]:
    """Memory for what a sweep leaves, that of d_w included if it is lent."""
    x, w, loan = inputs.x, inputs.w, None
    # to read another than a number would need a synchronisation
    may_lend = inputs.scale_tensor is None and not inputs.extras.reshapes and _loans.may_lend(w)
    shape = kept_shape(x, w, inputs.compute_dtype, budget, inputs.extras)
    may_lend = may_lend and shape[1] == NOTHING  # tiles that were tuned may need more room
    if lends_for is not None and may_lend and is_lent(x, w, inputs.scale, p, budget):
        loan = _lend(x, w, p)
    return Swept.empty(x, w, p.accumulate, shape), loan


def _rows(
    p: Plan,
    rows: Rows,
    partial: Tensor,
    num_classes: int,
    scale: float,
    margin: Margin,
    losses: LossOutputs,
    reduction: str,
    ignore_index: int,
) -> None:
    """Launch what is linear in N: lse, and losses where they are asked for."""
    num_splits, _, num_rows = partial.shape
    is_reduced = losses.reduced is not None
    rows_per_program = num_rows if is_reduced else MERGED_ROWS
    rows_kernel[(cdiv(num_rows, rows_per_program),)](
        partial, rows, losses, scale, margin.cos, margin.sin, margin.threshold, margin.offset,
        ignore_index, num_rows, num_classes, num_splits, rows_per_program,
        STRAIGHT_THROUGH=margin.straight_through, REDUCTION=reduction, P=p.precision,
        BLOCK_S=MERGED_SPLITS, BLOCK_N=power_of_two(num_rows, MERGED_ROWS),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def cosine_lse(
    inputs: Inputs, budget: int, lends_for: Needs | None = None
) -> tuple[Swept, Found, Loan | None]:
    """What ``fused_margin::cosine_lse`` returns; with ``lends_for`` d_w may be lent."""
    x, w, extras = inputs.x, inputs.w, inputs.extras
    p = _plan(inputs)
    swept, loan = _memory(inputs, p, budget, lends_for)
    found = Found.empty(x, p.accumulate, extras)
    if x.shape[0]:
        labels = loadable(inputs.labels)
        rows = Rows(
            labels, labels.stride(0), swept.u, swept.inv_x, swept.lse, scale=inputs.scale_tensor
        )
        with guard(x):
            partial, others = _sweep(
                inputs, p, rows, swept, None if loan is None else loan.left, None
            )
            _rows(p, rows, partial, w.shape[0], inputs.scale, NO_MARGIN, LossOutputs(), "none", 0)
            if others is not None:
                found = merged(inputs, p, others)
    else:
        swept.inv_w.zero_()  # label smoothing adds up w_hat all the same
    return swept, found, loan


def margin_ce(
    inputs: Inputs,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    budget: int,
    lends_for: Needs | None = None,
) -> tuple[Losses, Swept, Loan | None]:
    """What ``fused_margin::margin_ce`` returns; with ``lends_for`` d_w may be lent."""
    x, w, num_rows = inputs.x, inputs.w, inputs.x.shape[0]
    p = plan(x, w, inputs.compute_dtype)
    swept, loan = _memory(inputs, p, budget, lends_for)
    reduced = None if reduction == "none" else x.new_empty((), dtype=p.accumulate)
    outputs = Losses.empty(x, p.accumulate, is_reduced=False)  # rows' losses come first anyway
    if num_rows:
        labels = loadable(inputs.labels)
        rows = Rows(
            labels, labels.stride(0), swept.u, swept.inv_x, swept.lse, outputs.slope_lse,
            outputs.slope_u, num_counted=outputs.num_counted,
        )  # fmt: skip
        losses = LossOutputs(outputs.loss, reduced, outputs.targets)
        with guard(x):
            partial, _ = _sweep(
                inputs, p, rows, swept, None if loan is None else loan.left, ignore_index
            )
            _rows(
                p, rows, partial, w.shape[0], inputs.scale, margin, losses, reduction, ignore_index
            )
    else:
        outputs.num_counted.zero_()
        if reduced is not None:
            reduced.zero_()
    return outputs if reduced is None else outputs._replace(loss=reduced), swept, loan


def backward(
    slopes: Slopes, inputs: Inputs, swept: Swept, needs: Needs, loan: Loan | None = None,
    update: Update | None = None,
) -> Gradients:  # fmt: skip
    """Vector-Jacobian product of a sweep, for the gradients of lse and u in ``slopes``.

    ``update`` takes the rows of d_w, if it is given, and may change W there.
    """
    x, w, num_rows = inputs.x, inputs.w, inputs.x.shape[0]
    extras, p = inputs.extras, _plan(inputs)
    # contiguous whatever the strides of x and w, as the operator's fake promises
    d_x = x.new_empty(x.shape) if needs.x else None
    is_again = loan is TAKEN
    if is_again:
        loan = _lend(x, w, p)
    d_w = w.new_empty(w.shape) if needs.w and loan is None and update is None else None
    if num_rows == 0:
        zero = x.new_zeros((), dtype=p.accumulate) if needs.scale else None
        return Gradients(d_x, None if d_w is None else d_w.zero_(), zero)
    labels, grad = loadable(inputs.labels), slopes.grad
    rows = Rows(
        labels, labels.stride(0), swept.u, swept.inv_x, swept.lse,
        # slopes may come with stride 0 (an expanded scalar) and any dtype
        slopes.lse.to(p.accumulate).contiguous(), slopes.u.to(p.accumulate).contiguous(),
        grad, grad.stride(0) if grad is not None and grad.ndim else 0,
        slopes.num_counted, inputs.scale_tensor,
    )  # fmt: skip
    if extras.reshapes:
        of_total = None if slopes.total is None else slopes.total.to(p.accumulate).contiguous()
        others = Others(extras.threshold, extras.phi, root_of(extras), slope_total=of_total)
        rows = rows._replace(others=others)
    call = Call(p, rows, inputs, swept, Gradients(d_x, d_w, None), needs, update)
    with guard(x):
        left = None
        if loan is not None:
            left = loan.left
            if is_again:
                _sweep_again(call, left)
            if x.shape[1] <= left.tiles.weight.d:
                return _lent(call, loan)
            call = call._replace(gradients=Gradients(d_x, loan.d_w, None))
        d_scale = None
        if extras.reshapes and needs.scale:
            d_scale = _d_scale(call)  # before W may change
        is_plain = not extras.reshapes and update is None and left is None
        is_fused = is_plain and backward_strategy(x, w, p, swept.kept) == "fused"
        partial = _fused(call) if is_fused else _chunked(call, left)  # as what was kept
        if partial is not None:
            of_rows = x.new_empty(num_rows, dtype=p.accumulate) if needs.scale else None
            finish_kernel[(cdiv(num_rows, FEW_ROWS),)](
                Matrix.of(x), rows, partial, d_x, of_rows, inputs.scale, num_rows, x.shape[1],
                partial.shape[0], P=p.precision, BLOCK_N=FEW_ROWS, BLOCK_D=FEW_COLUMNS,
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
            if d_scale is None and of_rows is not None:
                d_scale = of_rows.sum()
    return Gradients(d_x, call.gradients.w, d_scale)


def _d_scale(call: Call) -> Tensor:
    """The derivative by s where logits are s phi(c): by a sweep of its own for their mean."""
    x, w, p = call.inputs.x, call.inputs.w, call.p
    nothing = kept_shape(x, w, call.inputs.compute_dtype, 0)
    swept = Swept.empty(x, w, p.accumulate, nothing)
    rows = Rows(
        call.rows.labels, call.rows.stride_label, swept.u, swept.inv_x, scale=call.rows.scale
    )
    inputs = call.inputs._replace(extras=call.inputs.extras._replace(nearer=None, has_total=False))
    partial, others = _sweep(inputs, p, rows, swept, None, None, weighs=True)
    if others is None or others.weighted is None or call.rows.slope_lse is None:
        raise RuntimeError("a sweep that weighs logits left no sums of them")
    lse = call.swept.lse
    shares = (partial[:, 0] - lse).exp().masked_fill(lse.isneginf(), 0.0)
    mean = (shares * others.weighted).sum(dim=0)  # of s phi(c)
    scale = inputs.scale if inputs.scale_tensor is None else inputs.scale_tensor
    return (call.rows.slope_lse * mean).sum() / scale


def _fused(call: Call) -> Tensor | None:
    """Launch the fused backward; returns the partials of d_x that are still to be merged."""
    p, rows, inputs, swept, gradients, needs, _ = call
    x, w, inv_w = inputs.x, inputs.w, swept.inv_w
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    tiles = p.tiles.for_fused(dim)
    if tiles is None:
        raise RuntimeError("the fused backward was chosen without tiles for this D")
    weight_tile, embeddings_tile = (cut(tile, num_rows, num_classes, dim) for tile in tiles)
    if needs.w:
        fused_weight_kernel[(cdiv(num_classes, weight_tile.c),)](
            Matrix.of(x), Matrix.of(w, inputs.extras.classes), rows, inv_w, gradients.w,
            inputs.scale, num_rows, num_classes, dim, P=p.precision, **keywords(weight_tile),
        )  # fmt: skip
    if not (needs.x or needs.scale):
        return None
    tile = embeddings_tile
    row_blocks, class_blocks = cdiv(num_rows, tile.n), cdiv(num_classes, tile.c)
    splits = split_count(
        cdiv(2 * p.programs, row_blocks),
        cdiv(class_blocks, 4),
        num_rows * dim * p.accumulate.itemsize,
    )
    blocks_per_split = cdiv(class_blocks, splits)
    splits = cdiv(class_blocks, blocks_per_split)
    partial = x.new_empty((splits, num_rows, dim), dtype=p.accumulate)
    fused_embeddings_kernel[(row_blocks, splits)](
        Matrix.of(x), Matrix.of(w, inputs.extras.classes), rows, inv_w, partial, inputs.scale,
        num_rows, num_classes, dim, blocks_per_split, P=p.precision, **keywords(tile),
    )  # fmt: skip
    return partial


def _chunked(call: Call, left: Left | None) -> Tensor | None:
    """Launch the chunked backward; returns the partials of d_x that are still to be merged.

    What may be ``left`` in d_w is read for a chunk before its rows of d_w are written.
    """
    p, rows, inputs, swept, gradients, needs, update = call
    x, w, inv_w = inputs.x, inputs.w, swept.inv_w
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    kept, kept_block = kept_parts(swept.kept, num_rows, p)
    if left is not None:
        kept = Kept(left.q, None, pitch(num_rows), left.q.stride(0))
    tile = p.tiles.gradient
    if inputs.extras.reshapes:
        tile = tile.with_rows(p.tiles.shaped_rows)
    if kept is not None:
        tile = tile.with_rows(KEPT_GRADIENT_ROWS)
    tile = cut(tile, num_rows, num_classes, dim)
    block_rows, row_blocks = rows_of_block(tile, p), cdiv(num_rows, tile.n)
    class_blocks = cdiv(num_classes, block_rows)
    class_bytes = pitch(num_rows) * p.gradient.itemsize
    if update is not None:  # rows of d_w lie in a buffer too
        class_bytes = max(class_bytes, dim * p.accumulate.itemsize)
    # as many whole blocks as the bytes hold, at least one
    size = min(num_classes, max(1, CHUNK_BYTES // (class_bytes * block_rows)) * block_rows)
    weight_tile = cut(p.tiles.weight, num_rows, size, dim)
    needs_v = needs.x or needs.scale
    embeddings_tile, grid, splits = embeddings_grid(p, num_rows, size, dim)
    # one split of one chunk is all there is
    is_only = needs.x and splits == 1 and size == num_classes and not needs.scale

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=p.accumulate)

    chunk = Chunk(
        g=x.new_empty((size, pitch(num_rows)), dtype=p.gradient),
        radial=empty(size, row_blocks),
        row_radial=empty(class_blocks, num_rows) if is_only else None,
        pitch=pitch(num_rows),
    )
    partial = empty(splits, num_rows, dim) if needs_v and not is_only else None
    of_chunk = None if update is None else empty(size, dim)
    x_in, w_in = Matrix.of(x), Matrix.of(w, inputs.extras.classes)
    x_desc = w_desc = x_in_product = g_desc = None
    operand = x
    describes_product = needs.w and p.describes_products
    if describes_product or (kept is None and p.prepares):
        operand = _prepare(p, x, rows, None, IGNORED if rows.grad is not None else None)
    elif kept is None:
        operand = operand_of(x, num_classes, p)
    if describes_product:
        x_in_product = describe(operand, weight_tile.n, weight_tile.d)
    if kept is None and p.descriptors:
        x_desc, w_desc = describe(operand, tile.n, tile.d), describe(w, tile.c, tile.d)
    operand = Matrix.of(operand)
    for first in range(0, num_classes, size):
        length = min(size, num_classes - first)
        if x_in_product is not None and (g_desc is None or length < size):
            g_desc = describe(chunk.g[:length], weight_tile.c, weight_tile.n)
        # one axis: the others of a CUDA grid end at 65,535
        gradient_kernel[(cdiv(length, block_rows) * row_blocks,)](
            operand, w_in, x_desc, w_desc, rows, inv_w, kept or Kept(), chunk, inputs.scale, first,
            length, num_rows, dim, row_blocks, KEPT_BLOCK=kept_block,
            EIGHTHS=p.tiles.eighths, P=p.precision, **keywords(tile),
        )  # fmt: skip
        if needs.w:
            w_here, inv_here, d_w, begin = w_in, inv_w, gradients.w, first
            if of_chunk is not None:  # as if the chunk were all classes
                here = slice(first, first + length)
                w_here, inv_here, d_w, begin = Matrix.of(w[here]), inv_w[here], of_chunk, 0
            blocks = cdiv(dim, weight_tile.d) * cdiv(length, weight_tile.c)
            weight_kernel[(blocks,)](
                x_in, w_here, x_in_product, g_desc, rows, chunk, inv_here, d_w, begin, length,
                num_rows, dim, row_blocks, P=p.precision, **keywords(weight_tile),
            )  # fmt: skip
        if needs_v:
            embeddings_kernel[(*grid, splits)](
                x_in, w_in, rows, chunk, partial, gradients.x, first, length, num_rows, dim,
                cdiv(length, splits), class_blocks, P=p.precision, **keywords(embeddings_tile),
            )  # fmt: skip
        if update is not None and of_chunk is not None:
            update(first, of_chunk[:length])
    return partial


def _sweep_again(call: Call, left: Left, first: int = 0, last: int | None = None) -> None:
    """Leave in new memory what the forward had left of some classes, or of all.

    Args:
        call: of the rows of the batch in question.
        left: where to, with a place for as many classes as there are at most.
        first: of the classes. last: after the last; None for all.
    """
    x, w, p, classes = call.inputs.x, call.inputs.w, call.p, call.inputs.extras.classes
    labels = call.rows.labels
    if last is not None:
        labels = labels.long() - first
        if classes is None:
            w = w[first:last]
        else:  # which number the rows of W
            w, classes = w[: last - first], classes[first:last]
    swept = Swept.empty(x, w, p.accumulate, kept_shape(x, w, call.inputs.compute_dtype, 0))
    rows = Rows(labels, labels.stride(0), swept.u, swept.inv_x)
    # what else it was asked for, it has answered
    inputs = call.inputs._replace(w=w, extras=Extras(classes=classes))
    ignored = None if call.rows.grad is None else IGNORED - first
    _sweep(inputs, p, rows, swept, left, ignored, most_classes=left.q.shape[0])


class _Embeddings:
    """d_x of a call whose exponentials are there, of some classes after others."""

    def __init__(self, call: Call, most_classes: int) -> None:
        """``most_classes``: how many are added at a time."""
        p, (num_rows, dim) = call.p, call.inputs.x.shape
        self.call = call
        self.tile, self.grid, splits = embeddings_grid(p, num_rows, most_classes, dim)
        self.partial = call.inputs.x.new_empty((splits, num_rows, dim), dtype=p.accumulate)
        self.w = Matrix.of(call.inputs.w, call.inputs.extras.classes)  # which copies a list

    def add(self, q: Tensor, first: int, num_classes: int) -> None:
        """Add the product with ``num_classes`` rows of W from ``first`` on."""
        call, (splits, num_rows, dim) = self.call, self.partial.shape
        embeddings_kernel[(*self.grid, splits)](
            Matrix.of(call.inputs.x), self.w, call.rows, Chunk(q, None, None, q.stride(0)),
            self.partial, call.gradients.x, first, num_classes, num_rows, dim,
            cdiv(num_classes, splits), 0, P=call.p.precision, **keywords(self.tile),
        )  # fmt: skip

    def finish(self) -> None:
        """Write d_x."""
        call, (splits, num_rows, dim) = self.call, self.partial.shape
        lent_finish_kernel[(cdiv(num_rows, FEW_ROWS),)](
            Matrix.of(call.inputs.x), self.w, call.rows, self.partial, call.swept.inv_w,
            call.gradients.x, call.inputs.scale, num_rows, call.inputs.w.shape[0], dim, splits,
            P=call.p.precision, BLOCK_N=FEW_ROWS, BLOCK_D=FEW_COLUMNS, num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip


def _lent(call: Call, loan: Loan) -> Gradients:
    """Launch the backward whose exponentials lie in d_w, of whose rows a tile holds whole ones."""
    p, rows, inputs, swept, gradients, _, _ = call
    x, w, left = inputs.x, inputs.w, loan.left
    q, num_lent = left.q, left.num_rows
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    x_in, w_in = Matrix.of(x), Matrix.of(w, inputs.extras.classes)
    operand = x.new_empty((num_rows, 8 * cdiv(dim, 8)), dtype=p.gradient)
    largest = x.new_empty((), dtype=p.accumulate)
    lent_prepare_kernel[(cdiv(num_rows, FEW_ROWS),)](
        x_in, rows, operand, largest, operand.stride(0), inputs.scale, num_rows, dim,
        P=p.precision, BLOCK_N=FEW_ROWS, BLOCK_D=FEW_COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    operand = operand[:, :dim]
    if gradients.x is not None:
        embeddings = _Embeddings(some_rows(call, slice(num_lent)), num_classes)
        embeddings.add(q, 0, num_classes)
        embeddings.finish()
        del embeddings  # with its partials
    tile = cut(left.tiles.weight, num_lent, num_classes, dim)
    x_desc = q_desc = beyond_desc = None
    if p.describes_products and (dim * w.itemsize) % 16 == 0:
        x_desc = describe(operand, tile.n, tile.d)
        q_desc = describe(q[:, :num_lent], tile.c, tile.n)
    for first, length, beyond in _beyond(call, left, tile.c):
        beyond_in = Matrix() if beyond is None else Matrix.of(beyond)
        if q_desc is not None and beyond is not None:
            numbers = beyond[:length, : num_rows - num_lent]
            beyond_desc = describe(numbers, tile.c, tile.n)
        lent_weight_kernel[(cdiv(length, tile.c),)](
            Matrix.of(operand), w_in, Matrix.of(q), beyond_in, x_desc, q_desc, beyond_desc,
            largest, swept.inv_w, loan.d_w, first, length, num_lent, num_rows - num_lent, dim,
            P=p.precision, **keywords(tile),
        )  # fmt: skip
    lent_targets_kernel[(num_rows,)](
        x_in, w_in, rows, swept.inv_w, loan.d_w, num_rows, num_classes, dim, P=p.precision,
        BLOCK_N=SCANNED_ROWS, BLOCK_D=FEW_COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return Gradients(gradients.x, loan.d_w, None)


def _beyond(call: Call, left: Left, block: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """Chunks of classes: the first, how many, and exponentials of rows of which d_w has none.

    They are formed again, in memory that all chunks share, and d_x of these rows is made of them.
    All classes are one chunk where there are no such rows.
    """
    p, (num_rows, _), num_classes = call.p, call.inputs.x.shape, call.inputs.w.shape[0]
    if left.num_rows == num_rows:
        yield 0, num_classes, None
        return
    call = some_rows(call, slice(left.num_rows, None))
    columns = pitch(num_rows - left.num_rows)
    blocks = max(1, CHUNK_BYTES // (columns * p.gradient.itemsize * block))
    size = min(num_classes, blocks * block)
    q = call.inputs.x.new_empty((size, columns), dtype=p.gradient)
    embeddings = None if call.gradients.x is None else _Embeddings(call, size)
    for first in range(0, num_classes, size):
        length = min(size, num_classes - first)
        again = Left(q, left.tiles, num_rows - left.num_rows)
        _sweep_again(call, again, first, first + length)
        if embeddings is not None:
            embeddings.add(q, first, length)
        yield first, length, q
    if embeddings is not None:
        embeddings.finish()
