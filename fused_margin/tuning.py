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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_margin import _ops, _validate, _warnings, margins
from fused_margin._numerics import requested_dtype

if TYPE_CHECKING:
    from fused_margin._triton.tiles import Tile, Tiles

__all__ = ["Tuned", "tune"]

FUSED = ("fused_weight", "fused_embeddings")  # in the order of `Tiles.fused`
WARM_UPS, REPEATS = 2, 7
# Extent of the candidates along a result's two axes; the fused kernels have their own.
SHAPES = ((64, 128), (128, 128), (256, 128), (128, 64), (64, 64), (64, 256), (128, 256))
TOLERANCE = {"bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3, "ieee": 1e-4, "fp64": 1e-9}


@dataclass(frozen=True)
class Tuned:
    """Result of `tune`.

    Attributes:
        tiles: the tiles that won.
        rows: one dict for each candidate: ``kernel``, ``tile`` (its fields), ``milliseconds`` of
            the forward, or of forward and backward, or ``error``.
        complete: False if time ran out before every candidate was tried.
        saved_as: the file, and the key in it, which says what the tiles are for; None if nothing
            was to be saved, or no candidate was timed.
    """

    tiles: Tiles
    rows: list[dict[str, Any]]
    complete: bool
    saved_as: tuple[Path, str] | None


def candidates(
    tiles: Tiles, operands: str, num_rows: int, num_classes: int, dim: int
) -> Iterator[tuple[str, Tile]]:
    """(kernel, tile): the present tile of each kernel, and others.

    `tune` tries them, `benchmarks.gpu` through it, and `benchmarks.kernels` compiles them.

    The kernels take turns, so that each has had some when time runs out. A tile that this N, C or D
    would cut down along its result is left out: it would be saved untried.
    """
    from fused_margin._triton.tiles import AXES, Tile, cut

    has_matrix_unit = operands in ("bf16", "fp16", "tf32")
    wide = [
        (first, second, inner, warps, stages)
        for first, second in SHAPES
        for warps, stages in ((8, 3), (4, 3), (8, 4), (4, 4), (8, 2), (8, 1), (4, 1))
        for inner in (64, 32)
        if has_matrix_unit or first * second * inner <= 64 * 64 * 32
    ]
    narrow = [
        (n, c, warps, stages)
        for n, c in ((64, 32), (32, 64), (64, 64), (32, 32), (32, 128), (128, 32))
        for warps, stages in ((8, 2), (4, 2), (8, 3), (4, 3), (4, 1))
    ]

    def turn(kernel: str, present: Tile, others: Iterator[Tile], axes: tuple[str, ...]):
        """The present tile, and those of the others that the sizes don't cut down."""
        yield kernel, present
        for tile in others:
            fitted = cut(tile, num_rows, num_classes, dim)
            fits = all(getattr(fitted, axis) == getattr(tile, axis) for axis in axes)
            if tile != present and fits:
                yield kernel, tile

    def of_axes(axes: tuple[str, str, str]) -> Iterator[Tile]:
        for *extents, warps, stages in wide:
            along = dict(zip(axes, extents, strict=True))
            yield Tile(**along, num_warps=warps, num_stages=stages)

    turns = [
        turn(kernel, getattr(tiles, kernel), of_axes(axes), axes[:2])
        for kernel, axes in AXES.items()
    ]
    for kernel, present in zip(FUSED, tiles.for_fused(dim) or (), strict=False):
        others = (Tile(n, c, present.d, *more) for n, c, *more in narrow)
        turns.append(turn(kernel, present, others, ("n", "c")))
    for one_each in zip_longest(*turns):
        yield from (candidate for candidate in one_each if candidate is not None)


def with_tile(tiles: Tiles, kernel: str, tile: Tile, dim: int) -> Tiles:
    """``tiles`` with another tile for ``kernel``."""
    if kernel not in FUSED:
        return replace(tiles, **{kernel: tile})
    present = tiles.for_fused(dim)
    assert present is not None
    pair = (tile, present[1]) if kernel == FUSED[0] else (present[0], tile)
    return replace(tiles, fused=tuple(pair if old == present else old for old in tiles.fused))


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


class _Step(NamedTuple):
    """A step of ArcFace to be timed, on random numbers."""

    x: torch.Tensor
    w: torch.Tensor
    labels: torch.Tensor
    compute_dtype: torch.dtype

    @classmethod
    def make(
        cls,
        num_rows: int,
        num_classes: int,
        dim: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        device: torch.device,
        offset: int,
    ) -> _Step:
        """Under the autocast of now, with so many elements before W in its memory."""
        generator = torch.Generator().manual_seed(0)

        def normal(size: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
            made = torch.randn(offset + size * dim, generator=generator, device="cpu")
            return made.to(device, dtype)[offset:].view(size, dim).requires_grad_()

        w, x = normal(num_classes, weight_dtype, offset), normal(num_rows, dtype)
        labels = torch.randint(num_classes, (num_rows,), generator=generator, device="cpu")
        return cls(x, w, labels.to(device), requested_dtype(x, w))

    def forward(self) -> torch.Tensor:
        """The loss."""
        margin = margins.angular(0.5, "linear", "exact")
        return _ops.margin_ce(
            self.x, self.w, self.labels, 64.0, margin, "mean", -100, self.compute_dtype, "triton",
            None,
        )  # fmt: skip

    def run(self) -> tuple[torch.Tensor, ...]:
        """The loss and its gradients."""
        loss = self.forward()
        return loss.detach(), *torch.autograd.grad(loss, (self.x, self.w))


def _try(
    work: _Step, kernel: str, trial: Tiles, expected: tuple[torch.Tensor, ...], tolerance: float
) -> dict[str, Any]:
    """``milliseconds`` of a step with other tiles for a kernel, or ``error``."""
    from fused_margin._triton import planning

    try:
        with planning.override("fused" if kernel in FUSED else "chunked", trial):
            worst = max(map(_relative_error, work.run(), expected))
            if not worst <= tolerance:
                return {"error": f"relative error {worst:.1e} against the default tiles"}
            if kernel != "forward":
                return {"milliseconds": _timed(work.x.device, work.run)}
            with torch.no_grad():
                return {"milliseconds": _timed(work.x.device, work.forward)}
    except torch.AcceleratorError:
        raise  # the device's state is lost
    except (*planning.FAILURES, RuntimeError) as error:  # memory, or a pass of the compiler
        return {"error": f"{type(error).__name__}: {error}"}


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
        TypeError: a size is no integer, or a dtype no floating one.
        ValueError: a size is too small; the device can't run the Triton kernels; the cache file
            can't be used.
        OSError: the cache file can't be written.
    """
    num_rows = _validate.size("num_rows", num_rows, 1)
    num_classes = _validate.size("num_classes", num_classes, 2)
    embedding_size = _validate.size("embedding_size", embedding_size, 1)
    for name, asked in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        _validate.floating(name, asked)
    device = torch.device(device)
    _validate.backend("triton", device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} but torch.cuda.is_available() is false")
    sizes = num_rows, num_classes, embedding_size
    return _tune(_Setting(sizes, dtype, weight_dtype, autocast, device), seconds, save)


class _Setting(NamedTuple):
    """What to tune for; see `tune`. ``sizes``: N, C, D. ``offset``: see `_Step.make`."""

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    autocast: torch.dtype | None
    device: torch.device
    offset: int = 0


def _tune(setting: _Setting, seconds: float, save: bool) -> Tuned:
    """`tune` of checked arguments."""
    from fused_margin._triton import planning, tuned
    from fused_margin._triton.operands import guard

    sizes, dtype, weight_dtype, autocast, device, offset = setting
    num_rows, num_classes, embedding_size = sizes
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        )
        work = _Step.make(*sizes, dtype, weight_dtype, device, offset)
        stack.enter_context(guard(work.x))
        p = planning.plan(work.x, work.w, work.compute_dtype)
        best, rows, complete = p.tiles, [], True
        with planning.override("chunked", best):
            expected = work.run()
        fastest: dict[str, float] = {}
        for kernel, tile in candidates(best, p.operands, num_rows, num_classes, embedding_size):
            if time.monotonic() > deadline:
                complete = False
                break
            trial = with_tile(best, kernel, tile, embedding_size)
            row: dict[str, Any] = {"kernel": kernel, "tile": asdict(tile)}
            rows.append(row | _try(work, kernel, trial, expected, TOLERANCE[p.operands]))
            if rows[-1].get("milliseconds", math.inf) < fastest.get(kernel, math.inf):
                fastest[kernel] = rows[-1]["milliseconds"]
                best = trial
    saved_as = None
    if save and fastest:
        about = {"n": num_rows, "c": num_classes, "d": embedding_size, "complete": complete}
        about |= {"milliseconds": fastest}
        key = tuned.key(*planning.tuned_for(work.x, work.w, p))
        saved_as = tuned.save(key, best, about), key
    return Tuned(best, rows, complete, saved_as)


_tried: set[str] = set()  # keys that `tune_once` has tuned, or failed to, in this process


def tune_once(x: torch.Tensor, w: torch.Tensor, compute_dtype: torch.dtype) -> None:
    """Tune for this call if nothing is saved for it; not while a graph is being captured."""
    if not x.shape[0]:
        return
    from fused_margin._triton import planning, tuned
    from fused_margin._triton.operands import guard

    with guard(x):
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
    p = planning.default_plan(x, w, compute_dtype)
    call = planning.tuned_for(x, w, p)
    key = tuned.key(*call)
    if key in _tried or tuned.load(*call) is not None:
        return
    _tried.add(key)
    shape = x.shape[0], w.shape[0], w.shape[1]
    print(f"fused_margin: tuning tiles for N, C, D = {shape}, {p.operands}", file=sys.stderr)
    is_autocast = p.accumulate is torch.float32 and compute_dtype is not x.dtype
    autocast = compute_dtype if is_autocast else None
    # W as this call's, read by descriptors or not: what is saved is for one of them
    offset = 0 if planning.describable(x, w) else 1
    setting = _Setting(shape, x.dtype, w.dtype, autocast, x.device, offset)
    try:
        _tune(setting, seconds=60.0, save=True)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        _warnings.warn(f"tuning failed, training goes on without: {error}")


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
    for name, least in (("n", 1), ("c", 2), ("d", 1)):
        if getattr(settings, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(settings, name)}")
    if not settings.seconds >= 0.0:
        parser.error(f"--seconds must be a number from 0 up, got {settings.seconds}")
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        parser.error(f"--device must be cuda, cuda:INDEX or cpu, got {settings.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is false")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {settings.device}: there are {torch.cuda.device_count()} GPUs")
    if device.type == "cpu" and not _validate.INTERPRETED:
        parser.error("a CPU runs the kernels only in Triton's interpreter: TRITON_INTERPRET=1")
    try:
        result = tune(
            settings.n,
            settings.c,
            settings.d,
            dtype=dtypes[settings.dtype],
            autocast=dtypes.get(settings.autocast),
            device=device,
            seconds=settings.seconds,
            save=not settings.no_save,
        )
    except (OSError, ValueError) as error:  # no Triton, another device, the file of the tiles
        parser.error(str(error))
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
