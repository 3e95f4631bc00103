"""``python -m benchmarks.gpu``, without a GPU: its steps, its limits, and what it calls wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT

from benchmarks import baselines, gpu, gpu_checks, gpu_timing, gpu_worker, harness, roofline

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def new_file(tmp_path: Path) -> Path:
    """The file of a dry run that has not begun, with two minutes."""
    path = tmp_path / "gpu.json"
    harness.write_json(path, gpu.new_result("cpu", 2.0))
    return path


def steps_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["steps"]


def keep_steps(monkeypatch: pytest.MonkeyPatch, *prefixes: str) -> None:
    """Restrict the plan."""
    whole = gpu_worker.plan
    monkeypatch.setattr(
        gpu_worker, "plan", lambda run: [s for s in whole(run) if s.key.startswith(prefixes)]
    )


# --- the complete command -------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [*command, "--minutes", "1.5"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "gpu.json").read_text())
    assert result["status"] == "complete"
    assert result["running"] is None
    steps = result["steps"]
    assert {details["status"] for details in steps.values()} == {"done", "skipped"}
    skipped = {key for key, details in steps.items() if details["status"] == "skipped"}
    assert "check/pytest" in skipped
    assert all(steps[key]["message"] == "needs a GPU" for key in skipped)
    assert steps["environment"]["torch"] == torch.__version__
    assert steps["rates"]["source"] == "measured"

    row = steps["strategies/webface42m/autocast-bf16"]["rows"]["cpu"]
    assert 0.0 < row["floor"]["step_ms"] < row["step"]["median_ms"]
    assert row["forward"]["rounds"] == row["step"]["rounds"] == 3
    assert max(row["relative_errors"].values()) < 0.05
    rivals = steps["baselines/llm/autocast-bf16"]["rows"]
    assert rivals["careful"]["step"]["median_ms"] > 0.0
    assert rivals["cce"]["status"] == rivals["liger"]["status"] == "unavailable"
    assert "GPUs only" in rivals["cce"]["message"]
    assert rivals["usual"]["status"] == "unavailable"  # bf16
    assert steps["baselines/ms1m/tf32"]["rows"]["usual"]["step"]["median_ms"] > 0.0
    assert rivals["products"]["name"] == "three torch.mm"
    assert steps["descriptors/glint360k/autocast-bf16"]["status"] == "skipped"
    small = steps["small/mnist/fp32"]["rows"]["ours"]
    assert small["forward_ms"] > 0.0

    lines = done.stdout.splitlines()
    assert "DRY RUN" in lines[1]
    assert lines[-1] == "complete; 0 steps had no time"
    assert any(line.startswith("webface42m   autocast-bf16 strategy: cpu") for line in lines)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "choose another directory" in again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "CUDA or ROCm device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks import gpu_checks, gpu_worker
from benchmarks.gpu_worker import Step
{change}
sys.exit(gpu_worker.work(Path(sys.argv[1])))
"""


@pytest.fixture
def with_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the command start workers that first run some code."""

    def use(change: str) -> None:
        code = WORKER.format(change=change)
        monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", code])

    return use


def test_a_failed_gate_ends_with_status_1(
    with_worker: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong combination is not timed; the others are."""
    with_worker(
        "gpu_checks.TOLERANCES['bf16'] = 1e-9\n"
        "plan = gpu_worker.plan\n"
        "wanted = ('rates', 'check/autocast-bf16/cpu/33', 'check/fp32/cpu/33', 'strategies/ms1m')\n"
        "gpu_worker.plan = lambda run: [s for s in plan(run) if s.key.startswith(wanted)]"
    )
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--device", "cpu", "--minutes", "1"]) == 1
    steps = steps_of(out / "gpu.json")
    key = "check/autocast-bf16/cpu/33-257-50-none"
    assert steps[key]["status"] == "wrong"
    assert steps[key]["error"] == "WrongResultError"
    refused = steps["strategies/ms1m/autocast-bf16"]["rows"]["cpu"]
    assert refused["status"] == "refused"
    assert key in refused["message"]
    assert "step" not in refused
    assert steps["strategies/ms1m/fp32"]["rows"]["cpu"]["step"]["median_ms"] > 0.0
    wrong = steps["strategies/ms1m/bf16"]["rows"]["cpu"]  # found by the gate before timing
    assert wrong["status"] == "wrong"
    assert "step" not in wrong
    printed = capsys.readouterr().out
    assert f"FAILED {key}" in printed
    assert "FAILED strategies/ms1m/bf16, cpu: cpu: relative error above 1e-09" in printed


def test_steps_that_hang_or_crash_do_not_stop_the_others(
    with_worker: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_worker(
        "def plan(run):\n"
        "    return [\n"
        "        Step('first', lambda details: details.update(value=1)),\n"
        "        Step('check/crash', lambda details: os._exit(3), is_check=True),\n"
        "        Step('hang', lambda details: time.sleep(1000), limit=0.5),\n"
        "        Step('error', lambda details: int('x')),\n"
        "        Step('last', lambda details: details.update(value=2)),\n"
        "    ]\n"
        "gpu_worker.plan = plan"
    )
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--device", "cpu", "--minutes", "1"]) == 1
    steps = steps_of(out / "gpu.json")
    assert list(steps) == ["first", "check/crash", "hang", "error", "last"]
    assert steps["first"]["value"] == 1
    assert steps["check/crash"]["status"] == "crashed"
    assert steps["check/crash"]["message"] == "the process ended with status 3"
    assert steps["hang"]["status"] == "killed"
    assert steps["error"]["error"] == "ValueError"
    assert steps["last"]["value"] == 2
    assert capsys.readouterr().out.splitlines()[-1] == "complete; 0 steps had no time"


@pytest.mark.slow
def test_the_time_is_a_hard_limit(
    with_worker: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step that would go on is cut off, and what came before is kept and printed."""
    marker = tmp_path / "alive"
    with_worker(
        "def forever(details):\n"
        "    while True:\n"
        f"        Path({str(marker)!r}).write_text(str(time.time()))\n"
        "        time.sleep(0.05)\n"
        "gpu_worker.plan = lambda run: [\n"
        "    Step('first', lambda details: details.update(value=1)),\n"
        "    Step('forever', forever, limit=1000.0),\n"
        "]"
    )
    out = tmp_path / "out"
    start = time.time()
    assert gpu.main(["--out", str(out), "--device", "cpu", "--minutes", "0.2"]) == 0
    assert time.time() - start < 14.0
    result = json.loads((out / "gpu.json").read_text())
    assert result["status"] == "out of time"
    assert result["steps"]["first"]["value"] == 1
    assert result["steps"]["forever"]["message"] == "out of time"
    assert capsys.readouterr().out.splitlines()[-1] == "out of time; 1 steps had no time"
    last = marker.read_text()
    time.sleep(0.2)
    assert marker.read_text() == last  # the worker is gone


def test_an_interruption_keeps_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
    new_file: Path,
) -> None:
    result = json.loads(new_file.read_text())
    result["steps"] = {"done": {"status": "done"}, "begun": {"is_check": True}}
    result["running"] = {"key": "begun", "until": time.time() + 100}
    harness.write_json(new_file, result)
    workers: list[subprocess.Popen[bytes]] = []

    def interrupted(path: Path, process: subprocess.Popen[bytes]) -> str:
        workers.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", "import time; time.sleep(1000)"])
    monkeypatch.setattr(gpu, "_watch", interrupted)
    end = gpu.supervise(new_file)
    assert end["status"] == "interrupted"
    assert end["steps"] == {
        "done": {"status": "done"},
        "begun": {"is_check": True, "status": "skipped", "message": "interrupted"},
    }
    assert json.loads(new_file.read_text()) == end
    assert [worker.poll() for worker in workers] == [-9]
    assert gpu.failures(end) == []
    assert "interrupted" in gpu.table(end).splitlines()[-1]


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        gpu, "supervise", lambda path: json.loads(path.read_text()) | {"status": "interrupted"}
    )
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted; 0 steps had no time"


def test_a_step_that_ends_as_its_time_does_is_kept(
    monkeypatch: pytest.MonkeyPatch, new_file: Path
) -> None:
    """The worker may finish a step between the look that finds it late and the kill."""
    result = json.loads(new_file.read_text())
    result["steps"] = {"late": {"status": "done"}}
    harness.write_json(new_file, result)
    ends = iter(["killed", "restart", "done"])
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", "pass"])
    monkeypatch.setattr(gpu, "_watch", lambda path, process: next(ends))
    end = gpu.supervise(new_file)
    assert end["status"] == "complete"
    assert end["steps"] == {"late": {"status": "done"}}


def test_a_worker_that_can_not_start_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, "-c", "import sys; sys.exit(4)"])
    out = ["--out", str(tmp_path / "out")]
    assert gpu.main([*out, "--device", "cpu", "--minutes", "1"]) == 1


# --- steps ----------------------------------------------------------------------------------------


def test_out_of_time_steps_are_entered(monkeypatch: pytest.MonkeyPatch, new_file: Path) -> None:
    """Checks end with their third, everything else with the time."""
    started = json.loads(new_file.read_text())["started"]
    clock = [started]

    def spend(seconds: float) -> Callable[[dict[str, Any]], None]:
        def call(details: dict[str, Any]) -> None:
            clock[0] += seconds

        return call

    step = gpu_worker.Step
    monkeypatch.setattr(
        gpu_worker,
        "plan",
        lambda run: [
            step("check/a", spend(35.0), is_check=True),
            step("check/b", spend(25.0), is_check=True),
            step("c", spend(50.0)),
            step("d", spend(1.0), at_least=40.0),
            step("e", spend(1.0)),
        ],
    )
    assert gpu_worker.work(new_file, gpu_timing.Meter(), lambda: clock[0]) == 0
    steps = steps_of(new_file)
    assert {key: details["status"] for key, details in steps.items()} == {
        "check/a": "done", "check/b": "skipped", "c": "done", "d": "skipped", "e": "done",
    }  # fmt: skip
    assert steps["check/b"]["message"] == steps["d"]["message"] == "out of time"
    assert steps["c"]["seconds"] == 50.0


def test_steps_already_entered_are_not_done_again(
    monkeypatch: pytest.MonkeyPatch, new_file: Path
) -> None:
    calls: list[str] = []
    step = gpu_worker.Step
    monkeypatch.setattr(
        gpu_worker,
        "plan",
        lambda run: [step(key, lambda details, key=key: calls.append(key)) for key in "ab"],
    )
    result = json.loads(new_file.read_text())
    result["steps"]["a"] = {"status": "crashed"}
    harness.write_json(new_file, result)
    assert gpu_worker.work(new_file, gpu_timing.Meter()) == 0
    assert calls == ["b"]
    assert steps_of(new_file)["a"] == {"status": "crashed"}


def test_a_lost_device_asks_for_another_process(
    monkeypatch: pytest.MonkeyPatch, new_file: Path
) -> None:
    def fail(details: dict[str, Any]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    class Lost(gpu_timing.Meter):
        def is_usable(self) -> bool:
            return False

    steps = [gpu_worker.Step(key, fail, is_check=True) for key in ("a", "b")]
    monkeypatch.setattr(gpu_worker, "plan", lambda run: steps)
    assert gpu_worker.work(new_file, Lost()) == gpu_worker.RESTART
    entered = steps_of(new_file)
    assert list(entered) == ["a"]
    assert entered["a"]["status"] == "error"
    assert entered["a"]["message"] == "CUDA error: an illegal memory access was encountered"
    assert gpu_worker.work(new_file, Lost()) == gpu_worker.RESTART  # goes on with the next
    assert list(steps_of(new_file)) == ["a", "b"]
    assert gpu.failures(json.loads(new_file.read_text())) == [
        f"{key}: CUDA error: an illegal memory access was encountered" for key in "ab"
    ]


def test_rivals_that_are_missing_fail_or_are_wrong(
    monkeypatch: pytest.MonkeyPatch, new_file: Path
) -> None:
    def missing(problem: Any) -> Any:
        raise baselines.UnavailableError("not installed")

    def fails(problem: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(problem: Any) -> Any:
        contender = baselines.careful(problem)
        contender.leaves[0].register_hook(lambda gradient: 1.5 * gradient)
        return contender

    everyone = {
        "ours": baselines.ours, "missing": missing, "fails": fails, "wrong": wrong,
        "careful": baselines.careful,
    }  # fmt: skip
    monkeypatch.setattr(baselines, "EVERYONE", everyone)
    keep_steps(monkeypatch, "rates", "baselines/ms1m/autocast-bf16")
    assert gpu_worker.work(new_file, gpu_timing.Meter()) == 0
    rows = steps_of(new_file)["baselines/ms1m/autocast-bf16"]["rows"]
    assert {key: row["status"] for key, row in rows.items()} == {
        "ours": "done", "missing": "unavailable", "fails": "error", "wrong": "wrong",
        "careful": "done", "auto_chunked": "skipped", "products": "done",
    }  # fmt: skip
    products = rows["products"]
    assert "relative_errors" not in products  # they have no loss
    assert products["step"]["median_ms"] > products["forward"]["median_ms"] > 0.0
    assert rows["missing"]["message"] == "not installed"
    assert rows["fails"]["error"] == "OutOfMemoryError"
    assert "d_x" in rows["wrong"]["message"]
    for key, row in rows.items():
        assert ("step" in row) == (key in ("ours", "careful", "products"))
    assert gpu.failures(json.loads(new_file.read_text())) == []  # rivals' mistakes are theirs


def test_what_does_not_fit_by_formula_is_left_out(
    monkeypatch: pytest.MonkeyPatch, new_file: Path
) -> None:
    class Small(gpu_timing.Meter):
        def free(self) -> int | None:
            return 1 << 20

    keep_steps(monkeypatch, "baselines/ms1m", "strategies/ms1m")
    assert gpu_worker.work(new_file, Small()) == 0
    for details in steps_of(new_file).values():
        for row in details["rows"].values():
            assert row["status"] == "skipped"
            assert "dry run" in row["message"] or "are free" in row["message"]


def test_slow_contenders_are_timed_once(monkeypatch: pytest.MonkeyPatch, new_file: Path) -> None:
    def slow(problem: Any) -> Any:
        contender = baselines.careful(problem)
        quick = contender.compute_loss

        def compute_loss() -> torch.Tensor:
            time.sleep(1.0)
            return quick()

        contender.compute_loss = compute_loss
        return contender

    monkeypatch.setattr(baselines, "EVERYONE", {"careful": baselines.careful, "slow": slow})
    keep_steps(monkeypatch, "baselines/ms1m/autocast-bf16")
    assert gpu_worker.work(new_file, gpu_timing.Meter()) == 0
    rows = steps_of(new_file)["baselines/ms1m/autocast-bf16"]["rows"]
    assert rows["slow"]["step"]["rounds"] == 1
    assert rows["slow"]["step"]["median_ms"] > 1000.0
    assert "forward" not in rows["slow"]
    assert rows["careful"]["step"]["rounds"] == 3


def test_tiles(monkeypatch: pytest.MonkeyPatch, new_file: Path) -> None:
    calls: list[tuple[Any, Any]] = []

    def tune(*sizes: int, **options: Any) -> SimpleNamespace:
        calls.append((sizes, options))
        return SimpleNamespace(rows=[{"kernel": "forward", "milliseconds": 1.0}], tiles="best")

    monkeypatch.setitem(sys.modules, "fused_margin.tuning", SimpleNamespace(tune=tune))
    run = gpu_worker.Run(new_file, gpu_timing.Meter())
    details: dict[str, Any] = {}
    gpu_worker.tiles(run, details, run.shape("ms1m"), gpu_checks.MODES["autocast-bf16"])
    ((sizes, options),) = calls
    assert sizes == (16, 300, 32)
    assert options.pop("seconds") == pytest.approx(60.0 * 2.0 * 0.08)  # of two minutes
    assert options == {
        "dtype": torch.float32, "weight_dtype": torch.float32, "autocast": torch.bfloat16,
        "device": "cpu", "save": False,
    }  # fmt: skip
    assert details["tiles"] == [{"kernel": "forward", "milliseconds": 1.0}]
    assert details["chosen"] == "best"


def test_plan_on_a_gpu(new_file: Path) -> None:
    """Every strategy, dtype and kind of check is there, and the important ones come first."""

    class Gpu(gpu_timing.Meter):
        device = torch.device("cuda", 0)

    result = json.loads(new_file.read_text()) | {"dry_run": False}
    harness.write_json(new_file, result)
    steps = gpu_worker.plan(gpu_worker.Run(new_file, Gpu()))
    keys = [step.key for step in steps]
    assert len(set(keys)) == len(keys)
    for strategy in roofline.GPU_STRATEGIES:
        for mode in roofline.DTYPES:
            of_mode = [key for key in keys if key.startswith(f"check/{mode}/{strategy}/")]
            kinds = {key.rsplit("/", 1)[1] for key in of_mode}
            assert {"labels", "repeats", "graph", "strides"} < kinds
            assert {kind.rsplit("-", 1)[1] for kind in kinds if "-" in kind} == {
                "mean", "sum", "none",
            }  # fmt: skip
    order = [
        "environment", "check/autocast-bf16/chunked/33-257-50-none",
        "check/autocast-bf16/chunked/graph", "check/pytest", "kernels/glint360k/autocast-bf16",
        "strategies/webface42m/autocast-bf16", "descriptors/glint360k/autocast-bf16",
        "tiles/webface42m/autocast-bf16", "small/mnist/autocast-bf16",
        "chunks/glint360k/autocast-bf16", "baselines/webface42m/autocast-bf16",
        "strategies/voxceleb2/autocast-bf16",
    ]  # fmt: skip
    positions = [keys.index(key) for key in order]
    assert positions == sorted(positions)
    assert all(step.is_check == step.key.startswith("check/") for step in steps)
    parts = {key.partition("/")[0] for key in keys}
    assert parts == {"environment", *gpu_worker.PARTS}
    for part in gpu_worker.PARTS:
        harness.write_json(new_file, result | {"skip": [part]})
        without = gpu_worker.plan(gpu_worker.Run(new_file, Gpu()))
        assert [step.key for step in without] == [
            key for key in keys if key.partition("/")[0] != part
        ]


def test_times_are_not_taken_after_the_profiler_has_run(
    new_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slows down later launches, so another process takes what comes after the kernels."""
    keep_steps(monkeypatch, "kernels/ms1m", "kernels/mnist", "baselines/ms1m/autocast")

    class Profiling(gpu_timing.Meter):
        has_profiled = False

        def kernels(self, call: Callable[[], object]) -> dict[str, dict[str, float]]:
            self.has_profiled = True
            call()
            forward, finish = {"count": 1, "ms": 0.5}, {"count": 2, "ms": 2.0}
            return {"sweep_kernel": forward, "finish_kernel": finish}

        def is_undisturbed(self) -> bool:
            return not self.has_profiled

    assert gpu_worker.work(new_file, Profiling()) == gpu_worker.RESTART
    steps = steps_of(new_file)
    assert set(steps) == {f"kernels/{name}/autocast-bf16" for name in ("mnist", "ms1m")}
    assert {details["status"] for details in steps.values()} == {"done"}
    assert gpu_worker.work(new_file, Profiling()) == 0
    assert steps_of(new_file)["baselines/ms1m/autocast-bf16"]["status"] == "done"
    table = gpu.table(json.loads(new_file.read_text()))
    found = "finish_kernel 2.000 (2), sweep_kernel 0.500 (1)"
    assert f"kernels/ms1m/autocast-bf16: ms (launches): {found}" in table.splitlines()


def test_variants_of_the_package_are_timed(new_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under its change, in the forward and in the step, and judged first."""
    seen: list[str] = []

    def change(name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
        @contextlib.contextmanager
        def enter() -> Iterator[None]:
            seen.append(name)
            yield

        return enter

    monkeypatch.setattr(gpu_checks, "forced", lambda *arguments: contextlib.nullcontext())
    run = gpu_worker.Run(new_file, gpu_timing.Meter())
    details: dict[str, Any] = {}
    mode = gpu_checks.MODES["fp32"]
    changes = {"one": change("one"), "other": change("other")}
    gpu_worker._compare_variants(run, details, run.shape("ms1m"), mode, changes)
    assert set(seen) == {"one", "other"}
    for name, row in details["rows"].items():
        assert row["name"] == name
        assert row["step"]["rounds"] == 3
        assert max(row["relative_errors"].values()) < 1e-5
    # in the table they are called by what they vary
    result = json.loads(new_file.read_text()) | {"steps": {"chunks/ms1m/fp32": details}}
    lines = [line.split() for line in gpu.table(result).splitlines()]
    assert [line[2:4] for line in lines if line[:1] == ["ms1m"]] == [
        ["chunk:", "one"], ["chunk:", "other"],
    ]  # fmt: skip
