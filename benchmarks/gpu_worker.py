"""The process that does the steps of ``python -m benchmarks.gpu``, which starts and watches it.

Its argument is the JSON file that the command made. Steps found in it are not done again, so that a
new worker goes on where one that crashed or hung has stopped. The file is written whole before and
after each step, and within the longer ones.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import baselines, gpu_checks, gpu_timing, harness, roofline
from benchmarks.gpu_checks import MODES, Mode
from benchmarks.shapes import SHAPES, Shape
from fused_margin import _validate

RESTART = 75  # exit status: this process can't use the device any more, another one can
CHECKS_SHARE = 0.25  # of the time, at most
MAIN_MODE = "autocast-bf16"
MAIN_SHAPES = ("webface42m", "llm", "ms1m")
OTHER_SHAPES = ("glint360k", "sop", "voxceleb2")
# The fused strategy is for small D, which none of the large shapes has.
SMALL_DIM = Shape("ms1m_d128", 256, 85_742, 128, "ms1m with a smaller embedding")
LAUNCH_BOUND_SHAPES = ("mnist", "faces16")
PROFILED_SHAPES = ("mnist", "ms1m", "glint360k", "webface42m", "llm")
OTHER_MODES = ("tf32", "bf16", "bf16-weight", "fp16", "fp32")
SLOW = 20.0  # a contender this many times slower than the fastest is timed once
DRY_ROUNDS = 3
YARDSTICK_MEMORY = 2 << 30  # what the gate takes at most
NEEDS_GPU = {"status": "skipped", "message": "needs a GPU"}
NOT_OFFERED = {"status": "skipped", "message": "there is no such strategy for D and dtypes"}
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
        self,
        details: Details,
        problem: baselines.Problem,
        mode: Mode,
        contenders: Mapping[str, Callable[[], baselines.Contender]],
    ) -> None:
        """Gate each contender, take its peak memory, and time those that pass, interleaved."""
        with gpu_checks.forced(None, mode):
            bound = self._admit(details["rows"], problem, mode, contenders)
            self._rounds(details["rows"], bound)

    def _admit(
        self,
        rows: Details,
        problem: baselines.Problem,
        mode: Mode,
        contenders: Mapping[str, Callable[[], baselines.Contender]],
    ) -> dict[str, baselines.Contender]:
        bound: dict[str, baselines.Contender] = {}
        for name, make in contenders.items():
            row = rows[name]
            if not self.is_time_left():
                row |= {"status": "skipped", "message": "out of time"}
                continue
            harness.progress(f"  {name}")
            try:
                contender = make()
                row |= {"name": contender.name, "drops_margin": contender.drops_margin}
                row["relative_errors"] = gpu_checks.gate(problem, contender, mode.dtypes.operand)
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

    def _rounds(self, rows: Details, bound: Mapping[str, baselines.Contender]) -> None:
        fastest = min((rows[name]["first_ms"] for name in bound), default=0.0)
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

    def _first_step(self, contender: baselines.Contender) -> Details:
        """Peak memory above inputs and gradients, and a time that includes no compilation."""
        contender.clear()
        growth = self.meter.peak(contender.step)
        extra = None
        if growth is not None:
            gradients = contender.gradients()
            extra = growth - sum(part.numel() * part.element_size() for part in gradients)
        contender.clear()
        first = 1e3 * self.meter.seconds(contender.step)
        contender.clear()
        return {"extra_bytes": extra, "first_ms": first}


# --- steps ----------------------------------------------------------------------------------------


def environment(run: Run, details: Details) -> None:
    """Versions and, if the vendor's tool is there, driver, clocks and limits."""
    details |= harness.environment(run.device)
    queries = {
        "nvidia-smi": [
            "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit",
            "--format=csv",
        ],
        "rocm-smi": ["--showdriverversion", "--showclocks", "--showmaxpower", "--json"],
    }
    for tool, arguments in queries.items():
        if run.on_gpu and shutil.which(tool) is not None:
            done = subprocess.run(
                [tool, *arguments], capture_output=True, text=True, timeout=20, check=False
            )
            details[tool] = (done.stdout or done.stderr).strip().splitlines()


def rates(run: Run, details: Details) -> None:
    """Products and copy on this device: what the floors are made from."""
    device = roofline.measure(run.device, seconds=0.02 if run.result["dry_run"] else 0.3)
    details |= {
        "name": device.name,
        "rates": dict(device.rates),
        "bandwidth": device.bandwidth,
        "source": device.source,
    }


def compare_strategies(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """Every strategy on one shape."""
    details["rows"] = rows = {}
    wanted = []
    for strategy in gpu_checks.strategies(run.device):
        work = roofline.work(shape, mode.dtypes, strategy, backward=True)
        row: Details = {"floor": run.floors(shape, mode, strategy)}
        rows[strategy] = row
        row["expected_extra_bytes"] = work.memory
        if not gpu_checks.offers(strategy, shape.dim, mode, run.device):
            row |= NOT_OFFERED
        elif reason := run.refusal(mode.name, strategy):
            row |= {"status": "refused", "message": reason}
        elif reason := run.misfit(shape, mode, work.memory):
            row |= {"status": "skipped", "message": reason}
        else:
            wanted.append(strategy)
    if not wanted:
        return
    problem = run.problem(shape, mode)
    makers = {
        strategy: (lambda strategy=strategy: gpu_checks.bind(problem, mode, strategy))
        for strategy in wanted
    }
    run.time_all(details, problem, mode, makers)


def compare_baselines(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """This package, by its own choice of strategy, against everyone."""
    strategy = gpu_checks.chosen_strategy(shape, mode, run.device)
    rows, wanted = {}, []
    details |= {"rows": rows, "strategy": strategy}
    floor = run.floors(shape, mode, strategy)
    eager = roofline.work(shape, mode.dtypes, "eager", backward=True).memory
    # the others normalise W before their own work: five of C x D in the derivative, one is d_w
    normalising = 4.0 * shape.num_classes * shape.dim * mode.dtypes.w.itemsize
    for key in baselines.EVERYONE:
        row: Details = {"floor": floor}
        rows[key] = row
        extra = eager if key in baselines.DENSE else normalising
        if key == "ours":
            extra = roofline.work(shape, mode.dtypes, strategy, backward=True).memory
        if key == "compiled" and run.result["dry_run"]:
            row |= {"status": "skipped", "message": "not compiled in a dry run"}
        elif reason := run.misfit(shape, mode, extra):
            row |= {"status": "skipped", "message": reason}
        else:
            wanted.append(key)
    problem = run.problem(shape, mode)
    makers: dict[str, Callable[[], baselines.Contender]] = {
        key: (lambda key=key: baselines.EVERYONE[key](problem)) for key in wanted
    }
    if "ours" in makers:
        makers["ours"] = lambda: gpu_checks.bind(problem, mode, None)
    run.time_all(details, problem, mode, makers)


def profile_kernels(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """Launches and device time of each kernel, in one forward and in one step."""
    strategy = gpu_checks.chosen_strategy(shape, mode, run.device)
    details["strategy"] = strategy
    work = roofline.work(shape, mode.dtypes, strategy, backward=True)
    if reason := run.misfit(shape, mode, work.memory):
        details |= {"status": "skipped", "message": reason}
        return
    problem = run.problem(shape, mode)
    ours = gpu_checks.bind(problem, mode, None)
    for _ in range(2):  # compiles, and warms up
        ours.clear()
        ours.step()
    ours.clear()
    details["forward"] = run.meter.kernels(ours.forward)
    details["step"] = run.meter.kernels(ours.step)
    if details["step"] is None:
        details |= NEEDS_GPU


def launch_bound(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """The time of a step that is little but launches, alone and replayed from a graph."""
    problem = run.problem(shape, mode)
    ours = gpu_checks.bind(problem, mode, None)
    details["relative_errors"] = gpu_checks.gate(problem, ours, mode.dtypes.operand)
    details["rows"] = rows = {}
    repeats = 5 if run.result["dry_run"] else 200
    contenders = {"ours": ours, "careful": baselines.careful(problem)}
    for key, contender in contenders.items():

        def step(contender: baselines.Contender = contender) -> None:
            contender.clear()
            contender.step()

        forward_ms = 1e3 * gpu_timing.back_to_back(contender.forward, run.device, repeats)
        step_ms = 1e3 * gpu_timing.back_to_back(step, run.device, repeats)
        rows[key] = {"forward_ms": forward_ms, "step_ms": step_ms}
        run.save()
        if run.on_gpu:
            graph, _ = gpu_checks.capture(contender)
            replay_ms = 1e3 * gpu_timing.back_to_back(graph.replay, run.device, repeats)
            rows[key]["graph_replay_ms"] = replay_ms
            run.save()


def tiles(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """Candidates of tile sizes; the user's cache of tuned tiles is not written to."""
    tuning = importlib.import_module("fused_margin.tuning")
    x, compute = mode.dtypes.x, mode.dtypes.compute
    tuned = tuning.tune(
        shape.num_rows, shape.num_classes, shape.dim, dtype=x, weight_dtype=mode.dtypes.w,
        autocast=None if compute is x else compute, device=run.device.type,
        seconds=min(60.0, 0.8 * run.left()), save=False,
    )  # fmt: skip
    details |= {"tiles": tuned.rows, "chosen": str(tuned.tiles)}


def _checks(run: Run) -> list[Step]:
    """What says whether results are right, the most important first."""
    device = run.device
    available = gpu_checks.strategies(device)

    def check(
        kind: str, mode: str, strategy: str, dim: int, function: Callable[..., Details]
    ) -> Step:
        def call(details: Details) -> None:
            if kind == "graph" and not run.on_gpu:
                details |= NEEDS_GPU
                return
            if not gpu_checks.offers(strategy, dim, MODES[mode], device):
                details |= NOT_OFFERED
                return
            details |= {"found": function(MODES[mode], strategy, device)}

        return Step(f"check/{mode}/{strategy}/{kind}", call, is_check=True)

    def cases(index: int) -> list[Step]:
        case = gpu_checks.CASES[index]
        if run.result["dry_run"]:
            case = (min(case[0], 33), min(case[1], 257), *case[2:])
        kind = "-".join(map(str, case))
        function = functools.partial(gpu_checks.check_case, case=case)
        return [
            check(kind, mode, strategy, case[2], function)
            for mode in MODES
            for strategy in available
        ]

    def conduct(mode: str) -> list[Step]:
        functions = {
            "labels": gpu_checks.check_labels,
            "repeats": gpu_checks.check_repeats,
            "graph": gpu_checks.check_graph,
            "strides": gpu_checks.check_strides,
        }
        return [
            check(kind, mode, strategy, gpu_checks.SMALL[2], function)
            for kind, function in functions.items()
            for strategy in available
        ]

    def pytest(details: Details) -> None:
        if not run.on_gpu:
            details |= NEEDS_GPU
            return
        seconds = min(0.6 * run.left_for_checks(), 0.9 * run.left())
        details |= gpu_checks.run_tests(run.path.parent / "pytest.txt", seconds)

    at_least = 20.0 if run.on_gpu else 0.0
    return [
        *cases(0),
        *conduct(MAIN_MODE),
        Step("check/pytest", pytest, limit=600.0, at_least=at_least, is_check=True),
        *(step for index in range(1, len(gpu_checks.CASES)) for step in cases(index)),
        *(step for mode in MODES if mode != MAIN_MODE for step in conduct(mode)),
    ]


def _measurements(run: Run) -> list[Step]:
    """What takes times, the most important first."""

    def measure(
        kind: str, names: Iterable[str], modes: Iterable[str] = (MAIN_MODE,)
    ) -> Iterator[Step]:
        function, limit = MEASUREMENTS[kind]
        for mode_name, name in itertools.product(modes, names):

            def call(details: Details, name: str = name, mode_name: str = mode_name) -> None:
                shape = run.shape(name)
                details |= {"shape": dataclasses.asdict(shape), "mode": mode_name}
                function(run, details, shape, MODES[mode_name])

            yield Step(
                f"{kind}/{name}/{mode_name}",
                call,
                limit=limit,
                at_least=0.5 if run.result["dry_run"] else 10.0,
                runs_profiler=kind == "kernels",
            )

    steps = [
        *measure("strategies", MAIN_SHAPES),
        *measure("small", LAUNCH_BOUND_SHAPES, (MAIN_MODE, "fp32")),
        *measure("kernels", PROFILED_SHAPES),  # together: one process is lost to them
        *measure("baselines", MAIN_SHAPES),
        *measure("strategies", [SMALL_DIM.name]),
    ]
    for name in OTHER_SHAPES:
        steps += [*measure("strategies", [name]), *measure("baselines", [name])]
    steps += measure("strategies", ["ms1m"], OTHER_MODES)
    steps += measure("baselines", ["ms1m"], ["tf32"])
    if run.on_gpu:
        steps += measure("tiles", (*MAIN_SHAPES, "glint360k"))
    return [*steps, *measure("strategies", ["ten_million"])]


# The steps that measure one shape in one mode, by the first word of their key; seconds at most.
MEASUREMENTS: dict[str, tuple[Callable[[Run, Details, Shape, Mode], None], float]] = {
    "strategies": (compare_strategies, 90.0),
    "baselines": (compare_baselines, 150.0),
    "small": (launch_bound, 45.0),
    "kernels": (profile_kernels, 45.0),
    "tiles": (tiles, 90.0),
}


def plan(run: Run) -> list[Step]:
    """All steps, in the order in which they are done."""
    return [
        Step("environment", lambda details: environment(run, details)),
        Step("rates", lambda details: rates(run, details)),
        *([] if run.result["skip_checks"] else _checks(run)),
        *_measurements(run),
    ]


def work(
    path: Path, meter: gpu_timing.Meter | None = None, now: Callable[[], float] = time.time
) -> int:
    """Do the steps that the file lacks; returns the exit status."""
    if meter is None:
        on_gpu = json.loads(path.read_text())["device"] == "cuda"
        meter = gpu_timing.CudaMeter() if on_gpu else gpu_timing.Meter()
    run = Run(path, meter, now)
    for step in plan(run):
        if not run.do(step):
            harness.progress("another process goes on")
            return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
