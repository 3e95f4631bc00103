"""What the steps of ``python -m benchmarks.gpu`` share: the result file, the meter, the clock."""

from __future__ import annotations

import importlib
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import baselines, gpu_checks, gpu_timing, harness, roofline
from benchmarks.gpu_checks import Mode
from benchmarks.shapes import SHAPES, Shape
from fused_margin import _validate

CHECKS_SHARE = 1 / 3  # of the time, at most
# The fused strategy is for small D, which none of the large shapes has.
SMALL_DIM = Shape("ms1m_d128", 256, 85_742, 128, "ms1m with a smaller embedding")
SLOW = 20.0  # a contender this many times slower than the fastest is timed once
DRY_ROUNDS = 3
YARDSTICK_MEMORY = 2 << 30  # what the gate takes at most
FAILED = ("wrong", "error", "killed", "crashed")

# What goes wrong with a step or a contender without stopping the others. Anything else ends the
# process, which is recorded too.
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,  # of which out of memory, CUDA's and torch.compile's errors are kinds
    ImportError,
    OSError,
    ValueError,
    subprocess.SubprocessError,
)
if _validate.has_triton():
    ERRORS += (importlib.import_module("triton.errors").TritonError,)
# Foreign code under versions it was not made for.
RIVAL_ERRORS = (*ERRORS, AttributeError, TypeError, AssertionError, LookupError)

Details = dict[str, Any]
Contender = baselines.Contender | baselines.BareProducts
Binder = Callable[[baselines.Problem], Contender]


@dataclass(frozen=True)
class Step:
    """One entry of the result.

    ``call`` fills in the entry. ``limit``: seconds after which the step is given up. ``at_least``:
    seconds that must be left to begin. A failed check makes the command fail. A step that runs the
    profiler takes no times that it would disturb; those after it are left to another process.
    """

    key: str
    call: Callable[[Details], None]
    limit: float = 60.0
    at_least: float = 3.0
    is_check: bool = False
    runs_profiler: bool = False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:500]


def _status(error: Exception) -> Details:
    kind = "wrong" if isinstance(error, harness.WrongResultError) else "error"
    return {"status": kind, "error": type(error).__name__, "message": _first_line(error)}


def tiny(shape: Shape) -> Shape:
    """The shape for a dry run."""
    rows, classes, dim = min(shape.num_rows, 16), min(shape.num_classes, 300), min(shape.dim, 32)
    return Shape(shape.name, rows, classes, dim, shape.origin)


class Run:
    """The result file, the meter and the clock."""

    def __init__(
        self, path: Path, meter: gpu_timing.Meter, now: Callable[[], float] = time.time
    ) -> None:
        self.path, self.meter, self.now = path, meter, now
        self.result: Details = json.loads(path.read_text())
        self.device = meter.device
        self.on_gpu = self.device.type == "cuda"
        self.step_deadline = self.result["deadline"]

    def left(self) -> float:
        """Seconds until the end."""
        return self.result["deadline"] - self.now()

    def left_for_checks(self) -> float:
        """Seconds until the end of the share for correctness."""
        started, deadline = self.result["started"], self.result["deadline"]
        return started + CHECKS_SHARE * (deadline - started) - self.now()

    def is_time_left(self) -> bool:
        """Whether the step in progress may go on."""
        return self.now() < self.step_deadline

    def save(self) -> None:
        """Write the file."""
        harness.write_json(self.path, self.result)

    def do(self, step: Step) -> bool:
        """Do a step that has no entry yet, or enter why it is skipped.

        Returns:
            whether this process can go on: not if the device can't be used any more, or if the
            step wants times and the profiler has run, in which case the step is not begun.
        """
        steps = self.result["steps"]
        if step.key in steps:
            return True
        if not step.runs_profiler and not self.meter.is_undisturbed():
            return False
        left = min(self.left(), self.left_for_checks()) if step.is_check else self.left()
        details: Details = {"is_check": step.is_check}
        steps[step.key] = details
        if left < step.at_least:
            details |= {"status": "skipped", "message": "out of time"}
            self.save()
            return True
        harness.progress(f"{step.key} ({self.left():.0f} s left)")
        limit = min(step.limit, self.left())
        start = self.now()
        self.step_deadline = start + 0.8 * limit
        self.result["running"] = {"key": step.key, "until": start + limit}
        self.save()
        try:
            step.call(details)
        except ERRORS as error:
            details |= _status(error)
            harness.progress(f"{step.key}: {type(error).__name__}: {_first_line(error)}")
        details.setdefault("status", "done")
        details["seconds"] = self.now() - start
        self.result["running"] = None
        self.save()
        return self.meter.is_usable()

    # --- what the steps share ---------------------------------------------------------------------

    def shape(self, name: str) -> Shape:
        """A named shape; a tiny one in a dry run."""
        shape = SMALL_DIM if name == SMALL_DIM.name else SHAPES[name]
        return tiny(shape) if self.result["dry_run"] else shape

    def problem(self, shape: Shape, mode: Mode) -> baselines.Problem:
        """The data of a shape on this device."""
        return mode.problem(shape.num_rows, shape.num_classes, shape.dim, self.device)

    def rates(self) -> roofline.Device | None:
        """The device as measured by an earlier step."""
        details = self.result["steps"].get("rates", {})
        if details.get("status") != "done":
            return None
        return roofline.Device(
            details["name"], details["rates"], details["bandwidth"], details["source"]
        )

    def refusal(self, mode: str, strategy: str) -> str | None:
        """The first failed check of a combination."""
        prefix = f"check/{mode}/{strategy}/"
        for key, details in self.result["steps"].items():
            if key.startswith(prefix) and details["status"] in FAILED:
                return f"{key}: {details.get('message', details['status'])}"
        return None

    def floors(self, shape: Shape, mode: Mode, strategy: str) -> Details:
        """Milliseconds of the floors of forward and step, and of 8NCD flops alone."""
        device = self.rates()
        if device is None:
            return {}
        works = [roofline.work(shape, mode.dtypes, strategy, backward=b) for b in (False, True)]
        forward, step = (1e3 * roofline.floor(work, device) for work in works)
        operand = next(iter(works[0].flops))
        return {
            "forward_ms": forward,
            "step_ms": step,
            "8NCD_ms": 1e3 * roofline.ideal(shape, operand, device, 8),
        }

    def misfit(self, shape: Shape, mode: Mode, extra: float) -> str | None:
        """Why inputs, gradients and ``extra`` bytes don't fit the device."""
        free = self.meter.free()
        if free is None:
            return None
        inputs = shape.num_rows * shape.dim * mode.dtypes.x.itemsize
        inputs += shape.num_classes * shape.dim * mode.dtypes.w.itemsize
        needed = 2 * inputs + extra + YARDSTICK_MEMORY
        if needed <= free:
            return None
        return f"needs {needed / 2**30:.1f} GiB by formula, {free / 2**30:.1f} are free"

    def time_all(
        self, rows: Details, shape: Shape, mode: Mode, contenders: Mapping[str, Binder]
    ) -> None:
        """Gate each contender, take its peak memory, and time those that pass, interleaved."""
        if contenders:
            with gpu_checks.forced(None, mode):
                bound = self._admit(rows, self.problem(shape, mode), mode, contenders)
                self._rounds(rows, bound)

    def _admit(
        self,
        rows: Details,
        problem: baselines.Problem,
        mode: Mode,
        contenders: Mapping[str, Binder],
    ) -> dict[str, Contender]:
        bound: dict[str, Contender] = {}
        for name, bind in contenders.items():
            row = rows[name]
            if not self.is_time_left():
                row |= {"status": "skipped", "message": "out of time"}
                continue
            harness.progress(f"  {name}")
            try:
                contender = bind(problem)
                row["name"] = contender.name
                if isinstance(contender, baselines.Contender):  # products have no loss to judge
                    errors = gpu_checks.gate(problem, contender, mode.dtypes.operand)
                    row |= {"drops_margin": contender.drops_margin, "relative_errors": errors}
                row |= self._first_step(contender)
                bound[name] = contender
            except baselines.UnavailableError as error:
                row |= {"status": "unavailable", "message": _first_line(error)}
            except RIVAL_ERRORS as error:
                row |= _status(error)
                if not self.meter.is_usable():
                    raise
            row.setdefault("status", "done")
            self.save()
        return bound

    def _rounds(self, rows: Details, bound: Mapping[str, Contender]) -> None:
        fastest = min((rows[name]["first_ms"] for name in bound if name != "products"), default=0.0)
        is_quick = {name: rows[name]["first_ms"] <= SLOW * fastest for name in bound}
        for name, contender in bound.items():
            if is_quick[name]:
                continue
            contender.clear()
            rows[name]["step"] = gpu_timing.summary([self.meter.seconds(contender.step)])
            contender.clear()
        quick = {name: contender for name, contender in bound.items() if is_quick[name]}
        for work in ("step", "forward"):  # the more important first
            samples = gpu_timing.interleave(
                self.meter,
                [one if work == "step" else harness.ForwardAlone(one) for one in quick.values()],
                self.is_time_left,
                DRY_ROUNDS if self.result["dry_run"] else gpu_timing.MAX_ROUNDS,
            )
            for name, seconds in zip(quick, samples, strict=True):
                rows[name][work] = gpu_timing.summary(seconds)
            self.save()
        for name in bound:
            row = rows[name]
            if row["step"] is not None and row["floor"]:
                row["fraction_of_floor"] = row["floor"]["step_ms"] / row["step"]["median_ms"]

    def _first_step(self, contender: Contender) -> Details:
        """Peak memory above inputs and gradients, and a time that includes no compilation."""
        contender.clear()
        growth = self.meter.peak(contender.step)
        extra = None
        if growth is not None and isinstance(contender, baselines.Contender):
            gradients = contender.gradients()
            extra = growth - sum(part.numel() * part.element_size() for part in gradients)
        contender.clear()
        first = 1e3 * self.meter.seconds(contender.step)
        contender.clear()
        return {"extra_bytes": extra, "first_ms": first}
