"""Tile configurations: one default per architecture family and operand type.

The tiles are chosen from what the compiler reports without a GPU (registers, spills, shared memory;
``python -m benchmarks.kernels``); their speed is not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """Block sizes along the two output dimensions and the summed one, and how to run them.

    Attributes:
        rows: rows of the batch in a tile (BLOCK_N), or classes (BLOCK_C) in `Config.weight`.
        columns: classes (BLOCK_C) in the cosine tiles, embedding dimensions (BLOCK_D) elsewhere.
        inner: the summed dimension in a step (BLOCK_K).
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the four kernels with products."""

    forward: Tile
    gradient: Tile
    weight: Tile
    embeddings: Tile


OPERANDS = ("bf16", "fp16", "tf32", "ieee", "fp64")

_HALF = Config(
    forward=Tile(64, 128, 64, 8, 3),
    gradient=Tile(64, 128, 64, 8, 3),
    weight=Tile(128, 128, 64, 8, 3),
    embeddings=Tile(128, 128, 64, 8, 3),
)
_TF32 = Config(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=Tile(128, 128, 32, 8, 3),
    embeddings=Tile(128, 128, 32, 8, 3),
)
# fp16 is normalised in the tile, and its backward products run in TF32 (see `launch.Plan`).
_FP16 = Config(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=_TF32.weight,
    embeddings=_TF32.embeddings,
)
# IEEE fp32 has no matrix unit: small tiles, or the fused multiply-adds spill.
_SMALL = Config(*[Tile(64, 64, 16, 8, 2)] * 4)
_TINY = Config(
    forward=Tile(16, 32, 16, 1, 1),
    gradient=Tile(16, 32, 16, 1, 1),
    weight=Tile(32, 16, 16, 1, 1),
    embeddings=Tile(16, 32, 16, 1, 1),
)


def _shallow(config: Config, stages: int) -> Config:
    tiles = (config.forward, config.gradient, config.weight, config.embeddings)
    return Config(*(replace(tile, num_stages=stages) for tile in tiles))


def _small_cosines(config: Config, tile: Tile) -> Config:
    return replace(config, forward=tile, gradient=tile)


_DEFAULT = {"bf16": _HALF, "fp16": _FP16, "tf32": _TF32, "ieee": _SMALL, "fp64": _SMALL}
_TABLE: dict[str, dict[str, Config]] = {
    "sm_80": _DEFAULT,
    # 99 KiB of shared memory
    "sm_86": {operand: _shallow(config, 2) for operand, config in _DEFAULT.items()},
    "sm_90": _DEFAULT,
    # with 64 x 128 cosines, 8 to 16 bytes spilled
    "sm_100": _DEFAULT
    | {
        operand: _small_cosines(_DEFAULT[operand], Tile(64, 64, 64, 8, 3))
        for operand in ("bf16", "fp16", "tf32")
    },
    # 64 KiB of shared memory
    "gfx942": {operand: _shallow(config, 1) for operand, config in _DEFAULT.items()},
    "interpreter": dict.fromkeys(OPERANDS, _TINY),
}


def family(backend: str, arch: int | str) -> str:
    """The family of a device, given as Triton names it: ``("cuda", 90)``, ``("hip", "gfx942")``."""
    if backend == "hip":
        return "gfx942"
    arch = int(arch)
    if arch >= 120 or arch in (86, 87, 89):
        return "sm_86"
    return "sm_100" if arch >= 100 else "sm_90" if arch >= 90 else "sm_80"


def config(family: str, operand: str) -> Config:
    """The default tiles of a family for an operand type of `OPERANDS`."""
    return _TABLE[family][operand]
