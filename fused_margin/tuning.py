"""Tuning of the Triton kernels' tiles for one device and shape, on request only.

    from fused_margin import tuning
    tuning.tune(num_rows=512, num_classes=360_232, embedding_size=512)

or ``python -m fused_margin.tuning --n 512 --c 360232 --d 512``. The choice is saved in
``~/.cache/fused_margin/tiles.json`` (``FUSED_MARGIN_CACHE_DIR`` names another directory) and used
from then on for that device, Triton version, operand type, dtypes and range of N and D (up to the
next power of 2). Nothing is tuned inside a training step unless ``FUSED_MARGIN_TUNE=1`` asks for
it: then a call in eager code that has no entry takes a minute, and the compilation of one candidate
longer. While it runs, no other thread may use the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_margin import _validate, functional
from fused_margin._numerics import compute_dtype

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
        saved_as: the file, and the key in it, which says what the tiles are for; None if nothing
            was to be saved, or no candidate was timed.
    """

    config: Config
    rows: list[dict[str, Any]]
    complete: bool
    saved_as: tuple[Path, str] | None


def _candidates(
    config: Config, operands: str, num_rows: int, num_classes: int, dim: int
) -> Iterator[tuple[str, str, Tile, Config]]:
    """(kernel, strategy, tile, configuration with it): the present tile of each kernel, and others.

    The kernels take turns, so that each has had some when time runs out. A tile that this N, C or D
    would cut down is left out: it would be saved untried.
    """
    from fused_margin._triton import configs

    has_matrix_unit = operands in ("bf16", "fp16", "tf32")
    wide = [
        configs.Tile(rows, columns, inner, warps, stages)
        for rows, columns in ((64, 128), (128, 128), (128, 64), (64, 64), (64, 256), (128, 256))
        for warps, stages in ((8, 3), (4, 3), (8, 4), (4, 4), (8, 2), (8, 1), (4, 1))
        for inner in (64, 32)
        if has_matrix_unit or rows * columns * inner <= 64 * 64 * 32
    ]
    narrow = [
        (rows, columns, warps, stages)
        for rows, columns in ((64, 32), (32, 64), (64, 64), (32, 32), (32, 128), (128, 32))
        for warps, stages in ((8, 2), (4, 2), (8, 3), (4, 3), (4, 1))
    ]

    def cut(size: int, tile_size: int) -> bool:
        return tile_size > max(16, 1 << (size - 1).bit_length())

    turns: list[list[tuple[str, str, Tile, Config]]] = []
    for kernel in ("gradient", "forward", "weight", "embeddings"):
        of_d = kernel in ("weight", "embeddings")
        present = getattr(config, kernel)
        rows_of, columns_of = (
            num_classes if kernel == "weight" else num_rows,
            dim if of_d else num_classes,
        )
        turns.append(
            [
                (kernel, "chunked", tile, replace(config, **{kernel: tile}))
                for tile in (present, *(tile for tile in wide if tile != present))
                if tile == present or not (cut(rows_of, tile.rows) or cut(columns_of, tile.columns))
            ]
        )
    tiles = config.fused_tiles(dim)
    for position, kernel in enumerate(("fused_weight", "fused_embeddings") if tiles else ()):
        assert tiles is not None
        present, turn = tiles[position], []
        others = (configs.Tile(r, c, present.inner, *more) for r, c, *more in narrow)
        for tile in (present, *(tile for tile in others if tile != present)):
            if tile == present or not (cut(num_rows, tile.rows) or cut(num_classes, tile.columns)):
                pair = (tile, tiles[1]) if position == 0 else (tiles[0], tile)
                fused = tuple(pair if old == tiles else old for old in config.fused)
                turn.append((kernel, "fused", tile, replace(config, fused=fused)))
        turns.append(turn)
    for one_each in zip_longest(*turns):
        yield from (candidate for candidate in one_each if candidate is not None)


def _merge(best: Config, candidate: Config, kernel: str, dim: int) -> Config:
    """``best`` with the candidate's tile of ``kernel``."""
    if not kernel.startswith("fused"):
        return replace(best, **{kernel: getattr(candidate, kernel)})
    position = ("fused_weight", "fused_embeddings").index(kernel)
    new, old = candidate.fused_tiles(dim), best.fused_tiles(dim)
    assert new is not None
    assert old is not None
    pair = (new[0], old[1]) if position == 0 else (old[0], new[1])
    return replace(best, fused=tuple(pair if tiles == old else tiles for tiles in best.fused))


def _relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Euclidean, in fp64, a block of rows at a time: a whole fp64 copy might not fit."""
    got, want = torch.atleast_1d(got, want)
    rows = max(1, (1 << 22) // max(1, got[0].numel()))
    difference = reference = 0.0
    for g, w in zip(got.split(rows), want.split(rows), strict=True):
        difference += float((g.double() - w.double()).square().sum())
        reference += float(w.double().square().sum())
    return math.sqrt(difference / reference) if reference else math.sqrt(difference)


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
    autocast: torch.dtype | None = None,
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
        dtype: dtype of the embeddings.
        weight_dtype: dtype of the class weights.
        autocast: autocast's dtype, if the steps run under it.
        device: a CUDA or ROCm device; the CPU with Triton's interpreter, which times nothing real.
        seconds: stop trying candidates after this long.
        save: write the choice to the cache file, from which later calls and processes take it.

    Returns:
        The tiles and every candidate's time.

    Raises:
        ValueError: the device can't run the Triton kernels; the cache file can't be used.
        OSError: the cache file can't be written.
    """
    device = torch.device(device)
    _validate.backend("triton", device)
    from fused_margin._triton import launch, tuned

    deadline = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        )
        w = normal(num_classes, embedding_size).to(device, weight_dtype).requires_grad_()
        x = normal(num_rows, embedding_size).to(device, dtype).requires_grad_()
        labels = torch.randint(num_classes, (num_rows,), generator=generator, device="cpu")
        labels = labels.to(device)
        stack.enter_context(launch.guard(x))
        stack.enter_context(launch.tuning_flag())

        def forward() -> torch.Tensor:
            return functional.arcface(x, w, labels, backend="triton")

        def step() -> tuple[torch.Tensor, ...]:
            loss = forward()
            return loss.detach(), *torch.autograd.grad(loss, (x, w))

        p = launch.plan(x, w, compute_dtype(x, w))
        best, rows, complete = p.config, [], True
        with launch.override("chunked", best):
            expected = step()
        fastest: dict[str, float] = {}
        for kernel, strategy, tile, candidate in _candidates(
            best, p.operands, num_rows, num_classes, embedding_size
        ):
            if time.monotonic() > deadline:
                complete = False
                break
            trial = _merge(best, candidate, kernel, embedding_size)
            row: dict[str, Any] = {"kernel": kernel, "tile": asdict(tile)}
            rows.append(row)
            try:
                with launch.override(strategy, trial):
                    worst = max(map(_relative_error, step(), expected))
                    if not worst <= TOLERANCE[p.operands]:
                        row["error"] = f"relative error {worst:.1e} against the default tiles"
                        continue
                    if kernel == "forward":
                        with torch.no_grad():
                            row["milliseconds"] = _timed(device, forward)
                    else:
                        row["milliseconds"] = _timed(device, step)
            except torch.AcceleratorError:
                raise  # the device's state is lost
            except (*launch.FAILURES, RuntimeError) as error:  # memory, or a pass of the compiler
                row["error"] = f"{type(error).__name__}: {error}"
                continue
            if row["milliseconds"] < fastest.get(kernel, float("inf")):
                fastest[kernel] = row["milliseconds"]
                best = trial
    saved_as = None
    if save and fastest:
        about = {
            "n": num_rows, "c": num_classes, "d": embedding_size,
            "milliseconds": fastest, "complete": complete,
        }  # fmt: skip
        key = launch.tuned_key(x, w, p)
        saved_as = tuned.save(key, best, about), key
    return Tuned(best, rows, complete, saved_as)


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
    parser.add_argument("--dtype", choices=dtypes, default="bf16", help="embeddings (%(default)s)")
    parser.add_argument("--autocast", choices=("bf16", "fp16"), help="autocast's dtype (none)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit (%(default)s)")
    parser.add_argument("--no-save", action="store_true", help="only print")
    settings = parser.parse_args(arguments)
    if min(settings.n, settings.c, settings.d) < 1:
        parser.error(f"sizes must be at least 1, got {settings.n}, {settings.c}, {settings.d}")
    kind = torch.device(settings.device).type
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is false")
    if kind == "cpu" and not _validate.INTERPRETED:
        parser.error("a CPU runs the kernels only in Triton's interpreter: TRITON_INTERPRET=1")
    result = tune(
        settings.n,
        settings.c,
        settings.d,
        dtype=dtypes[settings.dtype],
        autocast=dtypes.get(settings.autocast),
        device=settings.device,
        seconds=settings.seconds,
        save=not settings.no_save,
    )
    for row in sorted(result.rows, key=lambda r: (r["kernel"], r.get("milliseconds", 1e9))):
        outcome = f"{row['milliseconds']:9.3f} ms" if "milliseconds" in row else row["error"]
        print(f"{row['kernel']:17} {tuple(row['tile'].values())!s:26} {outcome}")
    if not result.complete:
        print(f"stopped after {settings.seconds:g} s, before every candidate", file=sys.stderr)
    if result.saved_as is None:
        print("nothing saved")
    else:
        file, key = result.saved_as
        print(f"the fastest of each kernel saved to {file}, for {key}")


if __name__ == "__main__":
    main()
