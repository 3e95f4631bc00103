"""What a launch computes and moves: flops, bytes between L2 and multiprocessors, device memory.

A tile of an operand comes from L2 once for each tile of the result that needs it: tiles x steps x
operand bytes. Counted besides: what epilogues read and write of size C D, N D or N C, and rows'
numbers, which each tile reads. Not counted: labels and norms of W, read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fused_margin._triton.arguments import pitch

if TYPE_CHECKING:
    from benchmarks.launches import Launch

ROW_BYTES = 36  # of a row in an epilogue of the gradient: label, lse, u, two slopes, norm


@dataclass(frozen=True)
class Traffic:
    """One launch.

    Attributes:
        flops: of products.
        l2_bytes: between L2 and multiprocessors, both ways.
        memory_bytes: from and to device memory at least: matrices of C x D and N x D, and what is
            kept. scratch_bytes: of the chunk of G and partials of d_x, which the L2 cache may hold.
        programs: in the grid. tiles: how often a main loop is gone through. steps: of all these.
        rounds: of the longest program's loads that have to wait for each other, without products.
    """

    flops: float = 0.0
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    scratch_bytes: float = 0.0
    programs: int = 0
    tiles: int = 0
    steps: int = 0
    rounds: int = 0

    def l2_bytes_per_flop(self) -> float | None:
        """None without a product."""
        return self.l2_bytes / self.flops if self.flops else None


@dataclass(frozen=True)
class _Call:
    """A launch's arguments by name."""

    launch: Launch
    given: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.given[name]

    @property
    def n(self) -> int:
        return self.launch.keywords["BLOCK_N"]

    @property
    def c(self) -> int:
        return self.launch.keywords["BLOCK_C"]

    @property
    def d(self) -> int:
        return self.launch.keywords["BLOCK_D"]

    def size(self, name: str) -> int:
        """Bytes of an element of a tensor, or of a group of arguments that begins with one."""
        value = self.given[name]
        return (value[0] if isinstance(value, tuple) else value).element_size()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def _sweep(call: _Call) -> Traffic:
    row_blocks, class_blocks = call.launch.grid[0], cdiv(call.C, call.c)
    x, w = call.N * call.D * call.size("operand"), call.C * call.D * call.size("w")
    kept = 0
    if call.kept.entries is not None:
        kept = call.C * call.kept.pitch * call.kept.entries.element_size()
    tiles = row_blocks * class_blocks
    return Traffic(
        flops=2.0 * call.N * call.C * call.D,
        l2_bytes=x * class_blocks + w * row_blocks + kept,
        memory_bytes=x + w + kept,
        programs=math.prod(call.launch.grid) - row_blocks,
        tiles=tiles,
        steps=tiles * cdiv(call.D, call.d),
    )


def _gradient(call: _Call) -> Traffic:
    classes, row_blocks, class_blocks = (
        call.num_classes, call.num_row_blocks, cdiv(call.num_classes, call.c)
    )  # fmt: skip
    tiles = row_blocks * class_blocks
    g = classes * call.chunk.pitch * call.chunk.g.element_size()
    rows = ROW_BYTES * call.N * class_blocks
    if call.kept.entries is not None:
        kept = classes * call.kept.pitch * call.kept.entries.element_size()
        return Traffic(
            l2_bytes=kept + rows + g, memory_bytes=kept, scratch_bytes=g,
            programs=call.launch.grid[0], tiles=tiles,
        )  # fmt: skip
    x, w = call.N * call.D * call.size("operand"), classes * call.D * call.size("w")
    return Traffic(
        flops=2.0 * call.N * classes * call.D,
        l2_bytes=x * class_blocks + w * row_blocks + rows + g,
        memory_bytes=x + w,
        scratch_bytes=g,
        programs=call.launch.grid[0],
        tiles=tiles,
        steps=tiles * cdiv(call.D, call.d),
    )


def _weight(call: _Call) -> Traffic:
    classes, class_blocks, blocks = (
        call.num_classes, cdiv(call.num_classes, call.c), cdiv(call.D, call.d)
    )  # fmt: skip
    size_x = call.size("x") if call.x_desc is None else call.x_desc.base.element_size()
    x, g = call.N * call.D * size_x, classes * call.chunk.pitch * call.chunk.g.element_size()
    matrices = classes * call.D * (call.size("w") + call.size("d_w_ptr"))
    return Traffic(
        flops=2.0 * call.N * classes * call.D,
        l2_bytes=g * blocks + x * class_blocks + matrices,
        memory_bytes=x + matrices,
        scratch_bytes=g,
        programs=call.launch.grid[0],
        tiles=call.launch.grid[0],
        steps=call.launch.grid[0] * cdiv(call.N, call.n),
    )


def _embeddings(call: _Call) -> Traffic:
    row_blocks, blocks, splits = call.launch.grid
    classes, programs = call.num_classes, math.prod(call.launch.grid)
    is_lent = call.chunk.radial is None  # then rows of g lie where rows of d_w will
    columns = pitch(call.N) if is_lent else call.chunk.pitch
    g = classes * columns * call.chunk.g.element_size()
    w = classes * call.D * call.size("w")
    partial = 0
    if call.partial_ptr is not None:  # written, and read where there is something before
        once = splits * call.N * call.D * call.size("partial_ptr")
        partial = once if call.first_class == 0 else 2 * once
    return Traffic(
        flops=2.0 * call.N * classes * call.D,
        l2_bytes=g * blocks + w * row_blocks + partial,
        memory_bytes=w + g if is_lent else w,
        scratch_bytes=partial if is_lent else g + partial,
        programs=programs,
        tiles=programs,
        steps=programs * cdiv(call.classes_per_split, call.c),
    )


def _lent_prepare(call: _Call) -> Traffic:
    both = call.N * call.D * (call.size("x") + call.size("operand_ptr"))
    scans = call.launch.grid[0] * ROW_BYTES * call.N
    return Traffic(
        l2_bytes=both + scans, memory_bytes=both, programs=call.launch.grid[0],
        rounds=cdiv(call.N, 256) + cdiv(call.D, call.d),
    )  # fmt: skip


def _lent_weight(call: _Call) -> Traffic:
    class_blocks, classes = cdiv(call.num_classes, call.c), call.num_classes
    num_rows, q = call.num_lent, classes * pitch(call.num_lent) * call.size("q")
    beyond = 0  # of rows whose exponentials lie elsewhere
    if call.beyond.ptr is not None:
        num_rows += call.num_beyond
        beyond = classes * pitch(call.num_beyond) * call.size("beyond")
    x = num_rows * call.D * call.size("operand")
    matrices = classes * call.D * (call.size("w") + call.size("d_w_ptr"))
    return Traffic(
        flops=2.0 * num_rows * classes * call.D,
        l2_bytes=q + beyond + x * class_blocks + matrices,
        memory_bytes=x + q + matrices,
        scratch_bytes=beyond,
        programs=class_blocks,
        tiles=class_blocks,
        steps=class_blocks * cdiv(num_rows, call.n),
    )


def _lent_targets(call: _Call) -> Traffic:
    rows = call.N * call.D * (call.size("x") + call.size("w") + 2 * call.size("d_w_ptr"))
    scans = call.N * ROW_BYTES * call.N * (1 + cdiv(call.D, call.d))
    return Traffic(
        l2_bytes=rows + scans, memory_bytes=rows, programs=call.N,
        rounds=cdiv(call.N, call.n) * (1 + cdiv(call.D, call.d)),
    )  # fmt: skip


def _lent_finish(call: _Call) -> Traffic:
    partial = call.num_splits * call.N * call.D * call.size("partial_ptr")
    rows = call.N * call.D * (call.size("x") + call.size("w"))
    d_x = call.N * call.D * call.size("d_x_ptr")
    reads = cdiv(call.num_splits, call.launch.keywords["num_stages"])
    return Traffic(
        l2_bytes=2 * (partial + rows) + d_x, memory_bytes=rows + d_x, scratch_bytes=partial,
        programs=call.launch.grid[0], rounds=2 * cdiv(call.D, call.d) * reads,
    )  # fmt: skip


def _fused_weight(call: _Call) -> Traffic:
    programs = call.launch.grid[0]
    x = call.N * call.D * call.size("x")
    matrices = call.C * call.D * (call.size("w") + call.size("d_w_ptr"))
    return Traffic(
        flops=4.0 * call.N * call.C * call.D,
        l2_bytes=x * programs + matrices,
        memory_bytes=x + matrices,
        programs=programs,
        tiles=programs,
        steps=programs * cdiv(call.N, call.n),
    )


def _fused_embeddings(call: _Call) -> Traffic:
    row_blocks, splits = call.launch.grid
    x, w = call.N * call.D * call.size("x"), call.C * call.D * call.size("w")
    partial = splits * call.N * call.D * call.size("partial_ptr")
    return Traffic(
        flops=4.0 * call.N * call.C * call.D,
        l2_bytes=x * splits + w * row_blocks + partial,
        memory_bytes=x + w,
        scratch_bytes=partial,
        programs=row_blocks * splits,
        tiles=row_blocks * splits,
        steps=row_blocks * cdiv(call.C, call.c),
    )


def _prepare(call: _Call) -> Traffic:
    x, operand = (call.N * call.D * call.size(name) for name in ("x", "operand_ptr"))
    passes = 2 if call.launch.keywords["P"].NORMALIZE_FIRST else 1  # norms of x come first
    return Traffic(
        l2_bytes=passes * x + operand, memory_bytes=x + operand, programs=call.launch.grid[0],
        rounds=passes * cdiv(call.D, call.d),
    )  # fmt: skip


def _rows(call: _Call) -> Traffic:
    partial = call.num_splits * 2 * call.N * call.size("partial_ptr")
    merges = cdiv(call.num_splits, call.launch.keywords["BLOCK_S"])
    # of each block of rows: what was merged, label and cosine; all labels are counted at the end
    rounds = cdiv(min(call.rows_per_program, call.N), call.n) * (merges + 1)
    return Traffic(
        l2_bytes=partial, scratch_bytes=partial, programs=call.launch.grid[0],
        rounds=rounds + cdiv(call.N, call.n),
    )  # fmt: skip


def _finish(call: _Call) -> Traffic:
    partial = call.num_splits * call.N * call.D * call.size("partial_ptr")
    x = call.N * call.D * call.size("x")
    d_x = 0 if call.d_x_ptr is None else call.N * call.D * call.size("d_x_ptr")
    passes = 1 if call.d_x_ptr is None else 2
    # loads of partials don't wait for each other, but the compiler keeps few on their way
    reads = cdiv(call.num_splits, call.launch.keywords["num_stages"])
    rounds = passes * cdiv(call.D, call.d) * reads
    return Traffic(
        l2_bytes=passes * (partial + x) + d_x, memory_bytes=x + d_x, scratch_bytes=partial,
        programs=call.launch.grid[0], rounds=rounds,
    )  # fmt: skip


_OF: dict[str, Callable[[_Call], Traffic]] = {
    "prepare_kernel": _prepare,
    "sweep_kernel": _sweep,
    "rows_kernel": _rows,
    "gradient_kernel": _gradient,
    "weight_kernel": _weight,
    "embeddings_kernel": _embeddings,
    "fused_weight_kernel": _fused_weight,
    "fused_embeddings_kernel": _fused_embeddings,
    "finish_kernel": _finish,
    "lent_prepare_kernel": _lent_prepare,
    "lent_weight_kernel": _lent_weight,
    "lent_targets_kernel": _lent_targets,
    "lent_finish_kernel": _lent_finish,
}


def traffic(launch: Launch) -> Traffic:
    """What a recorded launch computes and moves.

    Raises:
        ValueError: nothing is known of its kernel.
    """
    name = launch.kernel.__name__
    if name not in _OF:
        raise ValueError(f"what {name} moves isn't known: add it to benchmarks/traffic.py")
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    return _OF[name](_Call(launch, given))
