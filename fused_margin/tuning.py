"""Tuning of the Triton kernels' tiles for one device and shape, on request only.

    from fused_margin import tuning
    tuning.tune(num_rows=512, num_classes=360_232, embedding_size=512)

or ``python -m fused_margin.tuning --n 512 --c 360232 --d 512``. The choice is saved in
``~/.cache/fused_margin/tiles.json`` (``FUSED_MARGIN_CACHE_DIR`` names another directory) and used
from then on for that device, Triton version, operand type and range of D. Nothing is tuned inside a
training step unless ``FUSED_MARGIN_TUNE=1`` asks for it: then the first call that has no entry
takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fused_margin import _validate, functional

if TYPE_CHECKING:
    from fused_margin._triton.configs import Config, Tile

__all__ = ["Tuned", "tune"]

WARM_UPS, REPEATS = 2, 7
TOLERANCE = {"bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3, "ieee": 1e-4, "fp64": 1e-9}


@dataclass(frozen=True)
class Tuned:
    """Result of `tune`.

    Attributes:
        config: the tiles that won.
        rows: one dict for each candidate: ``kernel``, ``tile`` (its fields), ``milliseconds`` of
            the forward, or of forward and backward, or ``error``.
        complete: False if time ran out before every candidate was tried.
    """

    config: Config
    rows: list[dict[str, Any]]
    complete: bool


def _candidates(config: Config, dim: int) -> Iterator[tuple[str, str, Tile, Config]]:
    """(kernel, strategy, tile, configuration with it), the kernels that matter most first."""
    from fused_margin._triton import configs

    wide = [
        configs.Tile(rows, columns, inner, warps, stages)
        for rows, columns in ((64, 128), (128, 128), (128, 64), (64, 64), (64, 256), (128, 256))
        for inner in (32, 64)
        for warps, stages in ((8, 3), (4, 3), (8, 4), (4, 4), (8, 2))
    ]
    for kernel in ("gradient", "forward", "weight", "embeddings"):
        for tile in [getattr(config, kernel), *wide]:
            yield kernel, "chunked", tile, replace(config, **{kernel: tile})
    tiles = config.fused_tiles(dim)
    if tiles is None:
        return
    for position, kernel in enumerate(("fused_weight", "fused_embeddings")):
        for rows, columns in ((32, 64), (64, 32), (64, 64), (32, 32), (32, 128), (128, 32)):
            for warps, stages in ((8, 2), (4, 2), (8, 3), (4, 3)):
                tile = configs.Tile(rows, columns, tiles[0].inner, warps, stages)
                pair = (tile, tiles[1]) if position == 0 else (tiles[0], tile)
                fused = tuple(pair if dim <= old[0].inner else old for old in config.fused)
                yield kernel, "fused", tile, replace(config, fused=fused)


def _merge(best: Config, candidate: Config, kernel: str, dim: int) -> Config:
    """``best`` with the candidate's tile of ``kernel``."""
    if not kernel.startswith("fused"):
        return replace(best, **{kernel: getattr(candidate, kernel)})
    position = ("fused_weight", "fused_embeddings").index(kernel)
    new = candidate.fused_tiles(dim)
    assert new is not None
    fused = []
    for pair in best.fused:
        if dim <= pair[0].inner:
            pair = (new[0], pair[1]) if position == 0 else (pair[0], new[1])
        fused.append(pair)
    return replace(best, fused=tuple(fused))


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Median milliseconds."""
    samples = []
    for repeat in range(WARM_UPS + REPEATS):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            milliseconds = start.elapsed_time(stop)
        else:
            begin = time.perf_counter()
            work()
            milliseconds = 1e3 * (time.perf_counter() - begin)
        if repeat >= WARM_UPS:
            samples.append(milliseconds)
    return statistics.median(samples)


def tune(
    num_rows: int,
    num_classes: int,
    embedding_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    seconds: float = 60.0,
    save: bool = True,
) -> Tuned:
    """Time candidates for the tiles of each kernel, one kernel at a time, and keep the fastest.

    A candidate counts only if its loss and gradients agree with those of the default tiles.

    Args:
        num_rows: N of the steps to tune for.
        num_classes: C.
        embedding_size: D.
        dtype: dtype of the embeddings, hence of the products.
        weight_dtype: dtype of the class weights.
        device: a CUDA or ROCm device; the CPU with Triton's interpreter, which times nothing real.
        seconds: stop trying candidates after this long.
        save: write the choice to the cache file, from which later calls and processes take it.

    Returns:
        The tiles and every candidate's time.

    Raises:
        ValueError: the device can't run the Triton kernels.
    """
    device = torch.device(device)
    _validate.backend("triton", device)
    from fused_margin._triton import launch, tuned

    deadline = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(num_classes, embedding_size, generator=generator).to(device, weight_dtype)
    x = torch.randn(num_rows, embedding_size, generator=generator).to(device, dtype)
    labels = torch.randint(num_classes, (num_rows,), generator=generator).to(device)
    x.requires_grad_()
    w.requires_grad_()

    def forward() -> torch.Tensor:
        return functional.arcface(x, w, labels, backend="triton")

    def step() -> tuple[torch.Tensor, ...]:
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    launch.is_tuning = True
    try:
        p = launch.plan(x, w, dtype)
        best, rows, complete = p.config, [], True
        with launch.override("chunked", best):
            expected = step()
        fastest: dict[str, float] = {}
        for kernel, strategy, tile, candidate in _candidates(best, embedding_size):
            if time.monotonic() > deadline:
                complete = False
                break
            trial = _merge(best, candidate, kernel, embedding_size)
            row: dict[str, Any] = {"kernel": kernel, "tile": asdict(tile)}
            try:
                with launch.override(strategy, trial):
                    worst = max(
                        float((got.double() - want.double()).norm() / want.double().norm())
                        for got, want in zip(step(), expected, strict=True)
                    )
                    if not worst <= TOLERANCE[p.operands]:
                        row["error"] = f"relative error {worst:.1e} against the default tiles"
                    elif kernel == "forward":
                        with torch.no_grad():
                            row["milliseconds"] = _timed(device, forward)
                    else:
                        row["milliseconds"] = _timed(device, step)
            except (*launch.FAILURES, torch.OutOfMemoryError) as error:
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
            if row.get("milliseconds", float("inf")) < fastest.get(kernel, float("inf")):
                fastest[kernel] = row["milliseconds"]
                best = trial
    finally:
        launch.is_tuning = False
    if save:
        about = {"n": num_rows, "c": num_classes, "d": embedding_size, "milliseconds": fastest}
        tuned.save(launch.device_name(x), p.operands, embedding_size, best, about)
    return Tuned(best, rows, complete)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune from the command line."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    parser = argparse.ArgumentParser(
        prog="python -m fused_margin.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=512, help="rows of a batch (%(default)s)")
    parser.add_argument("--c", type=int, default=100_000, help="classes (%(default)s)")
    parser.add_argument("--d", type=int, default=512, help="embedding size (%(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default="bf16", help="products (%(default)s)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit (%(default)s)")
    parser.add_argument("--no-save", action="store_true", help="only print")
    settings = parser.parse_args(arguments)
    result = tune(
        settings.n,
        settings.c,
        settings.d,
        dtype=dtypes[settings.dtype],
        device=settings.device,
        seconds=settings.seconds,
        save=not settings.no_save,
    )
    for row in sorted(result.rows, key=lambda r: (r["kernel"], r.get("milliseconds", 1e9))):
        outcome = f"{row['milliseconds']:9.3f} ms" if "milliseconds" in row else row["error"]
        print(f"{row['kernel']:17} {tuple(row['tile'].values())!s:26} {outcome}")
    if not result.complete:
        print(f"stopped after {settings.seconds:g} s, before every candidate", file=sys.stderr)


if __name__ == "__main__":
    main()
