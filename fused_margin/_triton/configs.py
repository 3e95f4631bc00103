"""Tile configurations: one default per architecture family, operand type and range of D.

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
        columns: embedding dimensions (BLOCK_D) in `Config.weight` and `Config.embeddings`, else
            classes (BLOCK_C).
        inner: the summed dimension in a step (BLOCK_K); in the fused tiles, which hold all of D,
            the largest D (BLOCK_D) that the tile is for.
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
    """Tiles of the kernels with products.

    ``fused`` are the tiles of `fused_weight_kernel` and `fused_embeddings_kernel`, from small D to
    large. Beyond the last there is no fused backward: its tiles would spill.
    """

    forward: Tile
    gradient: Tile
    weight: Tile
    embeddings: Tile
    fused: tuple[tuple[Tile, Tile], ...]

    def fused_tiles(self, dim: int) -> tuple[Tile, Tile] | None:
        """The fused tiles for D = ``dim``, or None."""
        return next((tiles for tiles in self.fused if dim <= tiles[0].inner), None)


KERNELS = ("forward", "gradient", "weight", "embeddings")  # of `Config`, beside the fused
OPERANDS = ("bf16", "fp16", "tf32", "ieee", "fp64")


def _fused(weight: Tile, embeddings: Tile, *dims: int) -> tuple[tuple[Tile, Tile], ...]:
    return tuple((replace(weight, inner=dim), replace(embeddings, inner=dim)) for dim in dims)


_HALF = Config(
    forward=Tile(64, 128, 64, 8, 3),
    gradient=Tile(64, 128, 64, 8, 3),
    weight=Tile(128, 128, 64, 8, 3),
    embeddings=Tile(128, 128, 64, 8, 3),
    fused=_fused(Tile(32, 64, 0, 8, 2), Tile(64, 32, 0, 8, 2), 64, 128),
)
_TF32 = Config(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=Tile(128, 128, 32, 8, 3),
    embeddings=Tile(128, 128, 32, 8, 3),
    fused=_fused(Tile(32, 64, 0, 8, 2), Tile(64, 32, 0, 8, 2), 64),
)
# fp16 is normalised in the tile, and its backward products run in TF32 (see `launch.Plan`).
_FP16 = Config(
    forward=Tile(64, 128, 32, 8, 3),
    gradient=Tile(64, 128, 32, 8, 3),
    weight=_TF32.weight,
    embeddings=_TF32.embeddings,
    fused=_HALF.fused,
)
# IEEE fp32 has no matrix unit: small tiles, or the fused multiply-adds spill.
_SMALL = replace(Config(*[Tile(64, 64, 16, 8, 2)] * 4, fused=()), gradient=Tile(32, 64, 16, 8, 2))
_TINY = Config(
    forward=Tile(16, 32, 16, 1, 1),
    gradient=Tile(16, 32, 16, 1, 1),
    weight=Tile(32, 16, 16, 1, 1),
    embeddings=Tile(16, 32, 16, 1, 1),
    fused=_fused(Tile(16, 32, 0, 1, 1), Tile(16, 32, 0, 1, 1), 16, 64),
)


def _shallow(config: Config, stages: int) -> Config:
    tiles = (getattr(config, kernel) for kernel in KERNELS)
    fused = tuple(
        (replace(w, num_stages=stages), replace(x, num_stages=stages)) for w, x in config.fused
    )
    return Config(*(replace(tile, num_stages=stages) for tile in tiles), fused=fused)


def _small_cosines(config: Config, tile: Tile) -> Config:
    return replace(config, forward=tile, gradient=tile)


def _hopper(config: Config) -> Config:
    """64 classes a step, which the warp-group product needs."""
    return replace(config, fused=tuple((w, replace(x, columns=64)) for w, x in config.fused))


# Large tiles, whose operands come from L2 fewer times; with these a program fills a multiprocessor.
_HOPPER_BF16 = replace(
    _hopper(_HALF),
    forward=Tile(256, 128, 32, 8, 4),
    gradient=Tile(128, 128, 64, 8, 3),
    weight=Tile(128, 256, 64, 8, 3),
    embeddings=Tile(256, 128, 64, 8, 3),
)
_HOPPER_TF32 = replace(
    _TF32,
    forward=Tile(128, 128, 32, 8, 3),
    gradient=Tile(128, 128, 32, 8, 3),
    weight=Tile(128, 256, 32, 8, 3),
    embeddings=Tile(256, 128, 32, 8, 3),
)
_HOPPER_FP16 = replace(_HOPPER_TF32, forward=Tile(256, 128, 32, 8, 3), fused=_hopper(_FP16).fused)


def _amd(config: Config) -> Config:
    """64 KiB of shared memory; fused tiles larger than 32 x 32 spill."""
    dims = (w.inner for w, _ in config.fused)
    return replace(
        _shallow(config, 1),
        fused=_fused(Tile(32, 32, 0, 4, 1), Tile(32, 32, 0, 4, 1), *dims),
    )


_DEFAULT = {"bf16": _HALF, "fp16": _FP16, "tf32": _TF32, "ieee": _SMALL, "fp64": _SMALL}
_AMPERE = _DEFAULT | {
    "bf16": replace(_HALF, forward=Tile(128, 128, 32, 8, 3), gradient=Tile(128, 128, 32, 8, 3)),
    "fp16": replace(_FP16, forward=Tile(64, 128, 64, 8, 2)),  # with 32 dimensions 8 bytes spilled
}
_ADA = {operand: _shallow(config, 2) for operand, config in _DEFAULT.items()}
_HOPPER = _DEFAULT | {"bf16": _HOPPER_BF16, "fp16": _HOPPER_FP16, "tf32": _HOPPER_TF32}
_TABLE: dict[str, dict[str, Config]] = {
    "sm_80": _AMPERE,
    # 99 KiB of shared memory; these three spilled 8 bytes with the tiles of the others
    "sm_86": _ADA
    | {
        "bf16": replace(_ADA["bf16"], forward=Tile(128, 128, 32, 8, 2)),
        "fp16": replace(_ADA["fp16"], gradient=Tile(128, 128, 32, 8, 2)),
        "tf32": replace(_ADA["tf32"], weight=Tile(64, 128, 32, 8, 2)),
    },
    "sm_90": _HOPPER,
    # with more rows of cosines they spill
    "sm_100": {
        "bf16": replace(
            _HOPPER_BF16, forward=Tile(128, 128, 64, 8, 3), gradient=Tile(64, 128, 64, 8, 3)
        ),
        "fp16": _small_cosines(_hopper(_FP16), Tile(64, 64, 64, 8, 3)),
        "tf32": _small_cosines(_TF32, Tile(64, 64, 64, 8, 3)),
        "ieee": _SMALL,
        # with two stages, 8 bytes spilled where cosines are kept
        "fp64": replace(_SMALL, forward=Tile(64, 64, 16, 8, 1)),
    },
    "gfx942": {operand: _amd(config) for operand, config in _DEFAULT.items()}
    # with 64 dimensions a step, 52 bytes spilled; with 8 warps, 36 where cosines are kept
    | {
        "bf16": replace(_amd(_HALF), gradient=Tile(64, 128, 32, 8, 1)),
        "ieee": replace(_amd(_SMALL), forward=Tile(64, 64, 16, 4, 1)),
    },
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
