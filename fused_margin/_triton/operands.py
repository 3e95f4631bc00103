"""What launches are given: operands, descriptors, and room for what kernels find."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_margin._arguments import Extras, Found, Gradients, Inputs, Needs, Swept, Update
from fused_margin._triton.arguments import Others, Rows
from fused_margin._triton.planning import LAUNCH_BOUND, Plan
from fused_margin._triton.tiles import Lent, Tile, cdiv, cut

Tensor = torch.Tensor

# Bytes of all partials of d_x.
PARTIAL_BYTES = 64 << 20


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launch on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def keywords(tile: Tile) -> dict[str, Any]:
    """A tile as keywords of a kernel."""
    return {
        "BLOCK_N": tile.n, "BLOCK_C": tile.c, "BLOCK_D": tile.d,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def rows_of_block(tile: Tile, p: Plan) -> int:
    """Rows of W in a block of classes."""
    return tile.c // p.precision.PLACES * p.precision.CENTERS


def loadable(labels: Tensor) -> Tensor:
    """Kernels load 8 to 64 bit integers; Triton has no wide unsigned tensors from PyTorch."""
    wide_unsigned = (torch.uint16, torch.uint32, torch.uint64)
    return labels.long() if labels.dtype in wide_unsigned else labels


def operand_of(x: Tensor, num_classes: int, p: Plan) -> Tensor:
    """x as the sweep multiplies it: cast once where each tile of the classes would cast it again.

    A step that is bound by its launches has none to spare.
    """
    return x if x.shape[0] * num_classes <= LAUNCH_BOUND else x.to(p.compute)


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of blocks of a matrix."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def room_for_others(inputs: Inputs, p: Plan, splits: int, weighs: bool) -> Others:
    """What a sweep of so many splits is told of other classes, with memory for what it finds."""
    extras, num_rows = inputs.extras, inputs.x.shape[0]

    def empty(is_asked: bool, dtype: torch.dtype = p.accumulate) -> Tensor | None:
        return inputs.x.new_empty((splits, num_rows), dtype=dtype) if is_asked else None

    looks, adds = extras.nearer is not None, extras.adds_in_sweep
    return Others(
        extras.threshold, extras.phi, root_of(extras), extras.nearer, empty(looks),
        empty(looks, torch.int32), empty(looks, torch.int32), empty(adds), empty(weighs),
    )  # fmt: skip


def root_of(extras: Extras) -> Tensor | None:
    """phi, as the flag that it has a root."""
    return extras.phi if extras.phi is not None and extras.phi.shape[0] == 7 else None


def merged(inputs: Inputs, p: Plan, others: Others) -> Found:
    """What the splits of a sweep found, together."""
    extras = inputs.extras
    found = Found.empty(inputs.x, p.accumulate, extras)
    if others.total is not None:
        found = found._replace(total=others.total.sum(dim=0, dtype=torch.float64))
    if others.best is not None and others.best_class is not None and others.count is not None:
        largest = others.best.amax(dim=0)
        # the first class of those
        last = torch.iinfo(torch.int32).max
        hardest = others.best_class.masked_fill(others.best < largest, last).amin(dim=0)
        scale = inputs.scale if inputs.scale_tensor is None else inputs.scale_tensor
        found = found._replace(
            hardest=hardest.long(), hardest_cosine=(largest / scale).to(p.accumulate),
            rank=others.count.sum(dim=0),
        )  # fmt: skip
    return found


def split_count(wanted: int, available: int, bytes_per_split: int) -> int:
    """How many splits of the classes get a partial of d_x each."""
    return max(1, min(wanted, available, PARTIAL_BYTES // bytes_per_split))


def embeddings_grid(
    p: Plan, num_rows: int, num_classes: int, dim: int
) -> tuple[Tile, tuple[int, int], int]:
    """Tile, blocks and splits of `embeddings_kernel` over so many classes at a time."""
    tile = cut(p.tiles.embeddings, num_rows, num_classes, dim)
    grid = cdiv(num_rows, tile.n), cdiv(dim, tile.d)
    splits = split_count(
        p.programs // (grid[0] * grid[1]),
        cdiv(num_classes, 4 * tile.c),
        num_rows * dim * p.accumulate.itemsize,
    )
    return tile, grid, splits


class Left(NamedTuple):
    """What a sweep leaves in the memory of d_w, or in a buffer for some of the classes.

    Attributes:
        q: exponentials, (C, N and more), in rows as long as those of d_w, or of the buffer.
        tiles: of the kernels that are to take them, whatever precision is asked for by then.
        num_rows: of the batch, the first, whose exponentials they are.
    """

    q: Tensor
    tiles: Lent
    num_rows: int


class Call(NamedTuple):
    """What all launches of a backward share."""

    p: Plan
    rows: Rows
    inputs: Inputs
    swept: Swept
    gradients: Gradients
    needs: Needs
    update: Update | None


def some_rows(call: Call, here: slice) -> Call:
    """The call for some rows of the batch."""
    rows, gradients = call.rows, call.gradients
    of_each = ("labels", "u", "inv_x", "lse", "slope_lse", "slope_u")
    taken: dict[str, Any] = {name: getattr(rows, name)[here] for name in of_each}
    if rows.grad is not None and rows.stride_grad:
        taken["grad"] = rows.grad[here]
    d_x = None if gradients.x is None else gradients.x[here]
    return call._replace(
        rows=rows._replace(**taken), inputs=call.inputs._replace(x=call.inputs.x[here]),
        gradients=gradients._replace(x=d_x),
    )  # fmt: skip
