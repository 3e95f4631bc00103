"""The process that does the steps of ``python -m benchmarks.gpu``, which starts and watches it.

Its argument is the JSON file that the command made. Steps found in it are not done again, so that a
new worker goes on where one that crashed or hung has stopped. The file is written whole before and
after each step, and within the longer ones.
"""

from __future__ import annotations

import contextlib
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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import baselines, gpu_checks, gpu_timing, harness, roofline
from benchmarks.gpu_checks import MODES, Mode
from benchmarks.gpu_run import SMALL_DIM, Binder, Details, Run, Step
from benchmarks.shapes import Shape

RESTART = 75  # exit status: this process can't use the device any more, another one can
TILES_SHARE = 0.08  # of the time, for the candidates of each shape
MAIN_MODE = "autocast-bf16"
MAIN_SHAPES = ("glint360k", "webface42m", "ms1m", "llm")
OTHER_SHAPES = ("sop", "voxceleb2")
TUNED_SHAPES = ("glint360k", "webface42m")  # to compare descriptors, chunks and tiles on
CHUNKS = (16, 32, 64, 128)  # MiB of G at a time
LAUNCH_BOUND_SHAPES = ("mnist", "ms1m")
PROFILED_SHAPES = (*MAIN_SHAPES, "mnist")
OTHER_MODES = ("tf32", "bf16", "bf16-weight", "fp16", "fp32")
COMPILED = ("compiled", "auto_chunked")
NEEDS_GPU = {"status": "skipped", "message": "needs a GPU"}
NOT_OFFERED = {"status": "skipped", "message": "there is no such strategy for D and dtypes"}


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
    contenders: dict[str, Binder] = {}
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
            contenders[strategy] = functools.partial(gpu_checks.bind, mode=mode, strategy=strategy)
    run.time_all(rows, shape, mode, contenders)


def _compare_variants(
    run: Run,
    details: Details,
    shape: Shape,
    mode: Mode,
    changes: Mapping[str, Callable[[], AbstractContextManager[Any]]],
) -> None:
    """The chunked backward under some changes to the package."""
    details["rows"] = rows = {}
    work = roofline.work(shape, mode.dtypes, "chunked", backward=True)
    contenders: dict[str, Binder] = {}
    for name, change in changes.items():
        rows[name] = {"floor": run.floors(shape, mode, "chunked")}
        if reason := run.misfit(shape, mode, 2.0 * work.memory):
            rows[name] |= {"status": "skipped", "message": reason}
            continue

        def bind(
            problem: baselines.Problem,
            name: str = name,
            change: Callable[[], AbstractContextManager[Any]] = change,
        ) -> baselines.Contender:
            ours = gpu_checks.bind(problem, mode, "chunked")
            ours.name, ours.change = name, change
            return ours

        contenders[name] = bind
    run.time_all(rows, shape, mode, contenders)


def compare_descriptors(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """The matrices read as the package chooses, which may be by descriptors, and by pointers."""
    if not run.on_gpu:
        details |= NEEDS_GPU
        return
    planning = importlib.import_module("fused_margin._triton.planning")
    pointers = functools.partial(planning.override, strategy="chunked", descriptors=False)
    changes = {"as chosen": contextlib.nullcontext, "pointers": pointers}
    _compare_variants(run, details, shape, mode, changes)


def compare_chunks(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """Chunks of G of several sizes."""
    if not run.on_gpu:
        details |= NEEDS_GPU
        return
    launch = importlib.import_module("fused_margin._triton.launch")
    changes = {
        f"{size} MiB": functools.partial(mock.patch.object, launch, "CHUNK_BYTES", size << 20)
        for size in CHUNKS
    }
    _compare_variants(run, details, shape, mode, changes)


def compare_baselines(run: Run, details: Details, shape: Shape, mode: Mode) -> None:
    """This package, by its own choice of strategy, against everyone."""
    strategy = gpu_checks.chosen_strategy(shape, mode, run.device)
    rows: Details = {}
    contenders: dict[str, Binder] = {}
    details |= {"rows": rows, "strategy": strategy}
    floor = run.floors(shape, mode, strategy)
    eager = roofline.work(shape, mode.dtypes, "eager", backward=True).memory
    # the others normalise W before their own work: five of C x D in the derivative, one is d_w
    normalising = 4.0 * shape.num_classes * shape.dim * mode.dtypes.w.itemsize
    o, cosines = mode.dtypes.compute.itemsize, shape.num_rows * shape.num_classes
    of_products = float(o * (cosines + 2 * shape.num_classes * shape.dim))
    rivals: dict[str, Binder] = {**baselines.EVERYONE, **baselines.ON_GPU}
    for key, bind in {**rivals, "products": baselines.BareProducts}.items():
        row: Details = {"floor": floor}
        rows[key] = row
        extra = eager if key in baselines.DENSE else normalising
        if key == "products":
            extra = of_products
        if key == "ours":
            extra = roofline.work(shape, mode.dtypes, strategy, backward=True).memory
            bind = functools.partial(gpu_checks.bind, mode=mode, strategy=None)
        if key in COMPILED and run.result["dry_run"]:
            row |= {"status": "skipped", "message": "not compiled in a dry run"}
        elif reason := run.misfit(shape, mode, extra):
            row |= {"status": "skipped", "message": reason}
        else:
            contenders[key] = bind
    run.time_all(rows, shape, mode, contenders)


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
        seconds=min(60.0, 60.0 * TILES_SHARE * run.result["minutes"], 0.8 * run.left()),
        save=False,
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

    return [
        *measure("kernels", PROFILED_SHAPES),  # together: one process is lost to them
        *measure("strategies", MAIN_SHAPES),
        *measure("descriptors", TUNED_SHAPES),
        *(measure("tiles", TUNED_SHAPES) if run.on_gpu else ()),
        *measure("small", LAUNCH_BOUND_SHAPES),
        *measure("chunks", TUNED_SHAPES),
        *measure("baselines", MAIN_SHAPES),
        # for who has more time
        *measure("small", ["mnist"], ["fp32"]),
        *measure("strategies", [SMALL_DIM.name, *OTHER_SHAPES]),
        *measure("strategies", ["ms1m"], OTHER_MODES),
        *measure("strategies", ["ten_million"]),
        *measure("baselines", OTHER_SHAPES),
        *measure("baselines", ["ms1m"], ["tf32"]),
    ]


# The steps that measure one shape in one mode, by the first word of their key; seconds at most.
MEASUREMENTS: dict[str, tuple[Callable[[Run, Details, Shape, Mode], None], float]] = {
    "strategies": (compare_strategies, 90.0),
    "descriptors": (compare_descriptors, 45.0),
    "chunks": (compare_chunks, 45.0),
    "baselines": (compare_baselines, 150.0),
    "small": (launch_bound, 45.0),
    "kernels": (profile_kernels, 45.0),
    "tiles": (tiles, 90.0),
}


# What may be skipped: the first words of the steps' keys.
PARTS = ("rates", "check", *MEASUREMENTS)


def plan(run: Run) -> list[Step]:
    """All steps, in the order in which they are done."""
    steps = [
        Step("environment", lambda details: environment(run, details)),
        Step("rates", lambda details: rates(run, details)),
        *_checks(run),
        *_measurements(run),
    ]
    return [step for step in steps if step.key.partition("/")[0] not in run.result["skip"]]


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
