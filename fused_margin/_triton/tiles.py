"""Tiles: one default per kernel, architecture family and operand type.

They are chosen from what the compiler reports without a GPU (registers, spills, shared memory;
``python -m benchmarks.kernels``); those of sm_90 with bf16 products are measured (docs/design.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fused_margin._triton.arguments import pitch


@dataclass(frozen=True)
class Tile:
    """What a program of one kernel works on at a time, and how it runs.

    Attributes:
        n: rows of the batch. c: classes. d: embedding dimensions; in the fused kernels, which hold
            all of D, the largest D that the tile is for.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    n: int
    c: int
    d: int
    num_warps: int
    num_stages: int

    def with_rows(self, most: int) -> Tile:
        """The tile with at most so many rows."""
        return self if self.n <= most else replace(self, n=most)


@dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels with products.

    ``fused`` are those of `fused_weight_kernel` and `fused_embeddings_kernel`, from small D to
    large. Beyond the last there is no fused backward: its tiles would spill. ``eighths`` is whether
    a wide tile of `gradient_kernel` is finished in eighths, else in quarters. ``kept_rows`` is the
    most rows of ``forward`` in a sweep that also holds what it keeps: with more it spills.
    ``asked_rows`` likewise in one that makes or finds out more about other classes than exp(s c),
    and ``shaped_rows`` of ``gradient`` where other logits enter lse.
    """

    forward: Tile
    gradient: Tile
    weight: Tile
    embeddings: Tile
    fused: tuple[tuple[Tile, Tile], ...]
    eighths: bool = False
    kept_rows: int = 128
    asked_rows: int = 128
    shaped_rows: int = 128

    def for_fused(self, dim: int) -> tuple[Tile, Tile] | None:
        """The fused tiles for D = ``dim``, or None."""
        return next((tiles for tiles in self.fused if dim <= tiles[0].d), None)


# Of `Tiles`, beside the fused: two axes of a kernel's result, and the one that is summed over.
AXES = {
    "forward": ("n", "c", "d"),
    "gradient": ("n", "c", "d"),
    "weight": ("c", "d", "n"),
    "embeddings": ("n", "d", "c"),
}
# Of `Tiles`, the most rows of a tile in sweeps that do more.
LIMITS = ("kept_rows", "asked_rows", "shaped_rows")
OPERANDS = ("bf16", "fp16", "tf32", "ieee", "fp64")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv` takes 10 microseconds on the host."""
    return -(-a // b)


def power_of_two(size: int, limit: int) -> int:
    """The smallest block that covers ``size``, at least 16 (a product's minimum), at most limit."""
    return min(limit, max(16, 1 << max(size - 1, 0).bit_length()))


@functools.lru_cache(maxsize=1024)  # each launch asks
def cut(tile: Tile, num_rows: int, num_classes: int, dim: int) -> Tile:
    """The tile, no larger than sizes call for."""
    return replace(
        tile,
        n=power_of_two(num_rows, tile.n),
        c=power_of_two(num_classes, tile.c),
        d=power_of_two(dim, tile.d),
    )


def _fused(weight: Tile, embeddings: Tile, *dims: int) -> tuple[tuple[Tile, Tile], ...]:
    return tuple((replace(weight, d=dim), replace(embeddings, d=dim)) for dim in dims)


_HALF = Tiles(
    forward=Tile(64, 128, 64, 8, 3),
    gradient=Tile(64, 128, 64, 8, 3),
    weight=Tile(64, 128, 128, 8, 3),
    embeddings=Tile(128, 64, 128, 8, 3),
    fused=_fused(Tile(32, 64, 0, 8, 2), Tile(64, 32, 0, 8, 2), 64, 128),
)
_TF32 = Tiles(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=Tile(32, 128, 128, 8, 3),
    embeddings=Tile(128, 32, 128, 8, 3),
    fused=_fused(Tile(32, 64, 0, 8, 2), Tile(64, 32, 0, 8, 2), 64),
)
# fp16 is normalised in the tile, and its backward products run in TF32 (see `planning.Plan`).
_FP16 = Tiles(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=_TF32.weight,
    embeddings=_TF32.embeddings,
    fused=_HALF.fused,
)
# IEEE fp32 has no matrix unit: small tiles, or the fused multiply-adds spill.
_SMALL = Tiles(
    forward=Tile(64, 64, 16, 8, 2),
    gradient=Tile(32, 64, 16, 8, 2),
    weight=Tile(16, 64, 64, 8, 2),
    embeddings=Tile(64, 16, 64, 8, 2),
    fused=(),
    asked_rows=32,
)
_TINY = Tiles(
    forward=Tile(16, 32, 16, 1, 1),
    gradient=Tile(16, 32, 16, 1, 1),
    weight=Tile(16, 32, 16, 1, 1),
    embeddings=Tile(16, 16, 32, 1, 1),
    fused=_fused(Tile(16, 32, 0, 1, 1), Tile(16, 32, 0, 1, 1), 16, 64),
)


def _shallow(tiles: Tiles, stages: int) -> Tiles:
    each = {kernel: replace(getattr(tiles, kernel), num_stages=stages) for kernel in AXES}
    fused = tuple(
        (replace(w, num_stages=stages), replace(x, num_stages=stages)) for w, x in tiles.fused
    )
    return replace(tiles, **each, fused=fused)


def _small_cosines(tiles: Tiles, tile: Tile) -> Tiles:
    return replace(tiles, forward=tile, gradient=tile)


def _hopper(tiles: Tiles) -> Tiles:
    """64 classes a step, which the warp-group product needs."""
    return replace(tiles, fused=tuple((w, replace(x, c=64)) for w, x in tiles.fused))


# Large tiles, whose operands come from L2 fewer times; with these a program fills a multiprocessor.
_HOPPER_BF16 = replace(
    _hopper(_HALF),
    forward=Tile(256, 128, 32, 8, 4),
    gradient=Tile(128, 128, 64, 8, 3),
    weight=Tile(64, 128, 256, 8, 3),
    embeddings=Tile(256, 64, 128, 8, 3),
    eighths=True,
)
_HOPPER_TF32 = replace(
    _TF32,
    forward=Tile(128, 128, 32, 8, 3),
    gradient=Tile(128, 128, 32, 8, 3),
    weight=Tile(32, 128, 256, 8, 3),
    embeddings=Tile(256, 32, 128, 8, 3),
    eighths=True,
)
_HOPPER_FP16 = replace(_HOPPER_TF32, forward=Tile(256, 128, 32, 8, 3), fused=_hopper(_FP16).fused)


def _amd(tiles: Tiles) -> Tiles:
    """64 KiB of shared memory; fused tiles larger than 32 x 32 spill."""
    dims = (w.d for w, _ in tiles.fused)
    return replace(
        _shallow(tiles, 1),
        fused=_fused(Tile(32, 32, 0, 4, 1), Tile(32, 32, 0, 4, 1), *dims),
    )


_DEFAULT = {"bf16": _HALF, "fp16": _FP16, "tf32": _TF32, "ieee": _SMALL, "fp64": _SMALL}
_AMPERE = _DEFAULT | {
    "bf16": replace(
        _HALF,
        forward=Tile(128, 128, 32, 8, 3),
        gradient=Tile(128, 128, 32, 8, 3),
        kept_rows=64,
        asked_rows=64,
    ),
    # with 32 dimensions 8 bytes spilled
    "fp16": replace(_FP16, forward=Tile(64, 128, 64, 8, 2), shaped_rows=32),
}
_ADA = {operand: _shallow(tiles, 2) for operand, tiles in _DEFAULT.items()}
_HOPPER = _DEFAULT | {"bf16": _HOPPER_BF16, "fp16": _HOPPER_FP16, "tf32": _HOPPER_TF32}
_TABLE: dict[str, dict[str, Tiles]] = {
    "sm_75": _AMPERE,
    "sm_80": _AMPERE,
    # 99 KiB of shared memory; these spilled 8 bytes with the tiles of the others
    "sm_86": _ADA
    | {
        "bf16": replace(
            _ADA["bf16"], forward=Tile(128, 128, 32, 8, 2), asked_rows=64, shaped_rows=32
        ),
        "fp16": replace(
            _ADA["fp16"], gradient=Tile(128, 128, 32, 8, 2), weight=Tile(32, 64, 128, 8, 2)
        ),
        "tf32": replace(_ADA["tf32"], weight=Tile(32, 64, 128, 8, 2)),
    },
    "sm_90": _HOPPER,
    # with more rows of cosines they spill
    "sm_100": {
        "bf16": replace(
            _HOPPER_BF16,
            forward=Tile(128, 128, 64, 8, 3),
            gradient=Tile(64, 128, 64, 8, 3),
            eighths=False,
        ),
        "fp16": _small_cosines(_hopper(_FP16), Tile(64, 64, 64, 8, 3)),
        "tf32": replace(_small_cosines(_TF32, Tile(64, 64, 64, 8, 3)), asked_rows=32),
        "ieee": replace(_SMALL, asked_rows=64),
        # with two stages, 8 bytes spilled where cosines are kept, and 24 in the product for d_x
        "fp64": replace(_SMALL, forward=Tile(64, 64, 16, 8, 1), embeddings=Tile(64, 16, 64, 8, 1)),
    },
    "gfx942": {operand: _amd(tiles) for operand, tiles in _DEFAULT.items()}
    # with 64 dimensions a step, 52 bytes spilled; with 8 warps, 36 where cosines are kept
    | {
        "bf16": replace(_amd(_HALF), gradient=Tile(64, 128, 32, 8, 1)),
        "ieee": replace(_amd(_SMALL), forward=Tile(64, 64, 16, 4, 1)),
    },
    "interpreter": dict.fromkeys(OPERANDS, _TINY),
}


# Where W, x and G are read through tensor descriptors (TMA), as candidates with bf16 products were
# faster there.
DESCRIBED: dict[tuple[str, str], Tiles] = {
    ("sm_90", "bf16"): replace(
        _HOPPER_BF16, forward=Tile(256, 128, 64, 8, 3), gradient=Tile(128, 128, 64, 8, 3)
    ),
    # with 128 rows what is kept spilled 8 bytes
    ("sm_90", "fp16"): replace(
        _HOPPER_FP16,
        forward=Tile(256, 128, 64, 8, 3),
        gradient=Tile(128, 128, 64, 8, 3),
        kept_rows=64,
    ),
}


@dataclass(frozen=True)
class Lent:
    """What the kernels to which d_w is lent work on.

    Attributes:
        weight: tile of `lent_weight_kernel`, which holds whole rows of d_w: d is the largest D.
        rows: the most rows of a tile of the sweep, which holds exponentials too.
    """

    weight: Tile
    rows: int = 128


_LENT_BF16, _LENT_TF32 = Lent(Tile(64, 64, 512, 8, 2)), Lent(Tile(32, 64, 512, 8, 2))
_LENDING = _TABLE.keys() - {"sm_75"}  # in whose 64 KiB of shared memory no whole rows of d_w fit
LENT: dict[tuple[str, str], Lent] = {
    **{(family, "bf16"): _LENT_BF16 for family in _LENDING},
    **{(family, operand): _LENT_TF32 for family in _LENDING for operand in ("tf32", "fp16")},
    ("sm_80", "bf16"): replace(_LENT_BF16, rows=64),
    ("sm_100", "bf16"): replace(_LENT_BF16, rows=64),
    ("sm_90", "bf16"): Lent(Tile(64, 64, 512, 8, 3)),
    ("gfx942", "bf16"): Lent(Tile(64, 64, 512, 8, 1)),
    **{("gfx942", operand): Lent(Tile(16, 32, 512, 8, 1)) for operand in ("tf32", "fp16")},
    **{("interpreter", operand): Lent(Tile(16, 32, 64, 1, 1)) for operand in OPERANDS},
}
# the same where descriptors are used
DESCRIBED_LENT: dict[tuple[str, str], Lent] = {
    ("sm_90", "bf16"): Lent(Tile(64, 64, 512, 8, 3), rows=256),
    ("sm_90", "fp16"): _LENT_TF32,
}


# Of a batch whose exponentials d_w can't hold, it holds at least one row in so many.
LEAST_LENT = 4
# At least so many rows are formed again: narrower sweeps that lend spill.
LEAST_AGAIN = 33


def rows_held(num_rows: int, columns: int, tile: int) -> int:
    """Of how many rows of the batch d_w holds exponentials, in rows of ``columns`` of its own.

    All, or so many whole tiles that not too much is formed again; 0 if that can't be.
    """
    if pitch(num_rows) <= columns:
        return num_rows
    whole = min(columns, max(0, num_rows - LEAST_AGAIN)) // tile * tile
    return whole if whole * LEAST_LENT >= num_rows else 0


def family(backend: str, arch: int | str) -> str:
    """The family of a device, given as Triton names it: ``("cuda", 90)``, ``("hip", "gfx942")``."""
    if backend == "hip":
        return "gfx942"
    arch = int(arch)
    if arch >= 120 or arch in (86, 87, 89):
        return "sm_86"
    return next((f"sm_{least}" for least in (100, 90, 80) if arch >= least), "sm_75")


def default(family: str, operand: str) -> Tiles:
    """The default tiles of a family for an operand type of `OPERANDS`."""
    return _TABLE[family][operand]
