"""What every benchmark shares: the correctness gate, interleaved timing, and the environment."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import fused_margin as fm
from benchmarks.baselines import BareProducts, Contender, Problem, ours
from fused_margin import _cpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1 << 20

# Largest relative error (Euclidean norm) against fp64, by dtype of the products.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
# The same for cross-entropies that are given scaled logits, and round them, not cosines, to bf16.
LOWER_BOUND_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 12e-2}
# Up to which the loss may be so near to 0 that rounding is a large part of it.
ENOUGH_ROWS, ENOUGH_COLUMNS = 8, 16
# Bytes of the (rows, C) fp64 cosines that the yardstick makes at a time.
YARDSTICK_BYTES = 1 << 29

# Packages whose versions go with a result: what runs, and what is compared with.
PACKAGES = (
    "triton",
    "numpy",
    "pytorch-metric-learning",
    "cut-cross-entropy",
    "liger-kernel",
    "pytest-benchmark",
)


class WrongResultError(RuntimeError):
    """A contender failed the gate, so that its time means nothing."""


class Steps(Protocol):
    """What can be timed."""

    @property
    def name(self) -> str:
        """How the table calls it."""
        ...

    def clear(self) -> None:
        """Prepare a step; not timed."""
        ...

    def step(self) -> object:
        """Do what is timed."""
        ...


class Gate:
    """Compares loss and gradients with the dense reference in fp64.

    A contender that drops the margin is compared with the loss without margin, at the same scale.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        is_target = torch.zeros(problem.w.shape[0], dtype=torch.bool, device=problem.device)
        is_target[problem.labels] = True
        self.is_target = is_target
        self._expected: dict[bool, dict[str, Tensor]] = {}  # by whether the margin is dropped

    def in_mode(self, mode: str) -> Gate:
        """Make the gate of `Problem.in_mode`, which shares what is exact where the inputs do."""
        gate = Gate(self.problem.in_mode(mode))
        if gate.problem.x is self.problem.x:
            gate._expected = self._expected
        return gate

    def expected(self, *, drops_margin: bool = False) -> dict[str, Tensor]:
        """Loss and gradients in fp64, computed once."""
        if drops_margin not in self._expected:
            problem = self.problem.without_margin() if drops_margin else self.problem
            self._expected[drops_margin] = self._split(*_exact(problem))
        return self._expected[drops_margin]

    def _remedy(self) -> str:
        """Where rounding alone may be that large: a few easy rows have next to no loss."""
        rows, dim = self.problem.x.shape
        if rows >= ENOUGH_ROWS and dim >= ENOUGH_COLUMNS:
            return ""
        return (
            f"; N={rows}, D={dim} leave few digits to compare: try N >= {ENOUGH_ROWS} and D >="
            f" {ENOUGH_COLUMNS}"
        )

    def _split(self, loss: Tensor, d_x: Tensor, d_w: Tensor) -> dict[str, Tensor]:
        # Rows of d_w that are someone's target are so much larger that they would hide the others.
        parts = {"loss": loss, "d_x": d_x, "d_w of targets": d_w[self.is_target]}
        if not bool(self.is_target.all()):
            parts["d_w of other classes"] = d_w[~self.is_target]
        return parts

    def check(self, contender: Contender) -> dict[str, float]:
        """Run one forward alone and one step, and compare.

        Returns:
            relative errors of loss (the larger of the two), d_x and d_w.

        Raises:
            WrongResultError: an error is above the tolerance, or not a number.
        """
        expected = self.expected(drops_margin=contender.drops_margin)
        contender.clear()
        forward_loss = contender.forward()
        loss = contender.step().detach()
        actual = self._split(loss, *contender.gradients())
        contender.clear()
        errors = {part: relative_error(actual[part], expected[part]) for part in expected}
        forward_error = relative_error(forward_loss, expected["loss"])
        if not forward_error <= errors["loss"]:  # also where it is not a number
            errors["loss"] = forward_error
        tolerances = LOWER_BOUND_TOLERANCES if contender.drops_margin else TOLERANCES
        tolerance = tolerances[self.problem.product_dtype]
        wrong = {part: error for part, error in errors.items() if not error <= tolerance}
        if wrong:
            raise WrongResultError(
                f"{contender.name}: relative error above {tolerance:g} in "
                + ", ".join(f"{part} ({error:.2g})" for part, error in wrong.items())
                + self._remedy()
            )
        return errors


def _exact(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, d_x (N, D) and d_w (C, D) in fp64, by the dense reference on chunks of rows."""
    x, w = problem.x.double(), problem.w.double()
    num_rows = x.shape[0]
    rows = max(1, YARDSTICK_BYTES // (8 * w.shape[0]))
    loss, d_x, d_w = x.new_zeros(()), torch.zeros_like(x), torch.zeros_like(w)
    for start in range(0, num_rows, rows):
        part = slice(start, min(start + rows, num_rows))
        reference = ours(
            replace(problem, x=x[part], w=w, labels=problem.labels[part], autocast_dtype=None),
            backend="reference",
        )
        share = (part.stop - part.start) / num_rows
        loss += share * reference.step().detach()
        part_d_x, part_d_w = reference.gradients()
        d_x[part] = share * part_d_x
        d_w.add_(part_d_w, alpha=share)
    return loss, d_x, d_w


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Of all numbers together, by the Euclidean norm."""
    difference = torch.linalg.vector_norm(value.double() - expected)
    return float(difference / torch.linalg.vector_norm(expected))


def admit(
    gate: Gate, contenders: Mapping[str, Contender]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Let contenders through the gate.

    Returns:
        relative errors of those that pass, and the reason for each rival that doesn't: a wrong
        result, or that it failed to run.

    Raises:
        WrongResultError: this package's own result (a key that begins with "ours") is wrong.
    """
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for key, contender in contenders.items():
        progress(f"gate: {contender.name}")
        if key.startswith("ours"):
            errors[key] = gate.check(contender)
            continue
        try:
            errors[key] = gate.check(contender)
        except WrongResultError as error:
            refused[key] = f"wrong result: {error}"
        except Exception as error:  # noqa: BLE001 - a rival's code may fail in any way; it's listed
            first_line = str(error).partition("\n")[0]
            refused[key] = f"failed: {type(error).__name__}: {first_line}"
        contender.clear()
    return errors, refused


@dataclass
class ForwardAlone:
    """Makes a forward without recording the step that is timed."""

    contender: Contender | BareProducts

    @property
    def name(self) -> str:
        """The contender's own."""
        return self.contender.name

    def clear(self) -> None:
        """Drop the gradients, if there are any."""
        self.contender.clear()

    def step(self) -> object:
        """Compute the loss, or the one product that it needs."""
        return self.contender.forward()


def wall_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock. For CPUs: nothing waits for a device."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    contenders: Sequence[Steps],
    rounds: int,
    warmups: int = 2,
    measure: Callable[[Callable[[], object]], float] = wall_seconds,
    goes_on: Callable[[int], bool] = lambda index: True,
) -> list[list[float]]:
    """Time one step of each contender per round, in an order that is drawn anew for each round.

    So nobody always comes after the same other, who may leave caches or memory in a bad state.
    Gradients are set to None before each step, outside of the timing, so that every contender
    allocates its gradients within it. The garbage collector is off meanwhile.

    Args:
        contenders: what is timed.
        rounds: how many there are.
        warmups: rounds before them, not counted.
        measure: takes the seconds of one call.
        goes_on: asked before each round with its index, negative for warm-ups.

    Returns:
        Seconds, one list per contender, of ``rounds`` unless ``goes_on`` said no before.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    generator = random.Random(0)
    is_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(-warmups, rounds):
            if not goes_on(round_index):
                break
            generator.shuffle(order)
            for index in order:
                contender = contenders[index]
                contender.clear()
                elapsed = measure(contender.step)
                contender.clear()
                if round_index >= 0:
                    seconds[index].append(elapsed)
    finally:
        if is_collecting:
            gc.enable()
    return seconds


class FailedError(RuntimeError):
    """A command in a process of its own has failed; ``last_line`` is the last that it wrote."""

    def __init__(self, status: int, last_line: str) -> None:
        super().__init__(f"exit status {status}: {last_line}")
        self.last_line = last_line


def apart(module: str, options: Mapping[str, Any]) -> Any:
    """What a module of this package writes to ``--json`` in a process of its own.

    Args:
        module: as ``"memory"``.
        options: values by the names of its options; True for a flag, None for one left out.

    Raises:
        FailedError: with its exit status, and the last line that it wrote.
    """
    given = [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in options.items()
        if value is not None
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", f"benchmarks.{module}", *given, f"--json={path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last_line = done.stderr.strip().rpartition("\n")[2]
            raise FailedError(done.returncode, last_line)
        return json.loads(path.read_text(encoding="utf-8"))


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all samples, in seconds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "seconds": list(seconds),
    }


def machine_memory() -> int:
    """Bytes of memory that this process may count on: the machine's, or its control group's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the processor, or of the GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(name: str) -> str:
    """Turn a name into lower-case words joined by hyphens, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive, or no git
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, date and revision, to go with a result."""
    changes = _git("status", "--porcelain", "--", "fused_margin", "benchmarks/*.py")
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "fused_margin": fm.__version__,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_has_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_has_bf16_products": _cpu.has_bf16_products(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {
            "name": properties.name,
            "memory_gib": properties.total_memory / (1 << 30),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return result


def result_path(what: str, device: torch.device | str = "cpu") -> Path:
    """Where the committed result of this device lies: ``results/DEVICE-WHAT.json``."""
    return RESULTS / f"{slug(device_name(device))}-{what}.json"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, one key a line; the file is either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp's files are private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def whole_number(at_least: int, at_most: int = 2**63 - 1) -> Callable[[str], int]:
    """Make the type of an option: a whole number in these bounds."""
    bounds = f"of at least {at_least}" if at_most == 2**63 - 1 else f"from {at_least} to {at_most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")
        return value

    return parse


def real_number(at_least: float, at_most: float) -> Callable[[str], float]:
    """Make the type of an option: a number in these bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(
                f"expected a number from {at_least:g} to {at_most:g}, got {text!r}"
            )
        return value

    return parse


thread_count = whole_number(1, 1024)  # torch crashes where it can't start them all


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE`` and ``--save``, which `save` obeys."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    group.add_argument(
        "--save", action="store_true", help="write it to benchmarks/results, named after the device"
    )


def output_path(settings: argparse.Namespace, what: str) -> Path | None:
    """Where `add_output_options` say that the result goes; None for nowhere."""
    return result_path(what) if settings.save else settings.json


def save(settings: argparse.Namespace, result: Mapping[str, Any], what: str) -> None:
    """Write the result where `output_path` says."""
    path = output_path(settings, what)
    if path is not None:
        write_json(path, result)
        progress(f"wrote {path}")


def carry_out(
    settings: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    what: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, save the result as what it is called, and print its table.

    Returns:
        the exit status: 1 if a result of this package is wrong.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        result = measure(settings)
    except WrongResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save(settings, result, what(result))
    print(table(result))
    return 0


def progress(message: str) -> None:
    """Say on stderr what is going on; results go to stdout."""
    print(message, file=sys.stderr, flush=True)
