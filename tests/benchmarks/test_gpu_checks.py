"""What ``python -m benchmarks.gpu`` calls right, and how it forces strategies and times calls."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import HAS_TRITON

from benchmarks import baselines, gpu_checks, gpu_timing, harness, shapes

# --- correctness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.5, 0.0])
def test_yardstick_agrees_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    monkeypatch.setattr(gpu_checks, "YARDSTICK_BYTES", 8 * 40 * 7)  # blocks of seven classes
    problem = baselines.make_problem("arcface", 40, 60, 24)
    problem = dataclasses.replace(problem, x=problem.x.double(), w=problem.w.double())
    if not margin:
        problem = problem.without_margin()
    reference = baselines.ours(problem, backend="reference")
    loss = reference.step()
    d_x, d_w = reference.gradients()
    upstream = torch.full((40,), 1.0 / 40, dtype=torch.float64)
    errors = gpu_checks.relative_errors(problem, loss, d_x, d_w, upstream)
    assert set(errors) == {"loss", "d_x", "d_w of targets", "d_w of other classes"}
    assert max(errors.values()) < 1e-13
    is_target = torch.zeros(60, dtype=torch.bool).index_fill(0, problem.labels, True)
    assert not bool(is_target.all())
    for part, wrong in {
        "loss": (loss * 1.01, d_x, d_w),
        "d_x": (loss, d_x * 1.01, d_w),
        "d_w of targets": (loss, d_x, torch.where(is_target[:, None], d_w * 1.01, d_w)),
        "d_w of other classes": (loss, d_x, torch.where(is_target[:, None], d_w, d_w * 1.01)),
    }.items():
        errors = gpu_checks.relative_errors(problem, *wrong, upstream)
        assert errors.pop(part) == pytest.approx(0.01)
        assert max(errors.values()) < 1e-13


def test_judgement() -> None:
    assert gpu_checks.judge("it", {"loss": 1e-6}, "ieee") == {"loss": 1e-6}
    for error in (1e-3, float("nan")):
        with pytest.raises(harness.WrongResultError, match="it: relative error above 1e-05"):
            gpu_checks.judge("it", {"loss": error}, "ieee")


def test_checks_refuse_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of check sees its kind of mistake."""
    checks, wrong = gpu_checks, harness.WrongResultError
    mode, device = checks.MODES["fp32"], torch.device("cpu")
    right = checks._result
    count = iter(range(1000))

    def drifting(bound: Any, upstream: Any = None) -> tuple[torch.Tensor, ...]:
        loss, d_x, d_w = right(bound, upstream)
        return loss, d_x * (1.0 + 1e-3 * next(count)), d_w

    next(count)
    monkeypatch.setattr(checks, "_result", drifting)
    with pytest.raises(wrong, match="d_x"):
        checks.check_case(mode, "cpu", device, (33, 257, 50, "sum"))
    with pytest.raises(wrong, match="d_x"):
        checks.check_strides(mode, "cpu", device)
    with pytest.raises(wrong, match="d_x of repeat 0 differs"):
        checks.check_repeats(mode, "cpu", device)
    monkeypatch.setattr(checks, "_result", lambda bound, upstream: None)
    with pytest.raises(wrong, match="raised nothing"):
        checks.check_labels(mode, "cpu", device)


def test_a_strategy_is_forced_on_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str] = []
    seen: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def override(*, strategy: str) -> Iterator[None]:
        active.append(strategy)
        yield
        active.pop()

    planning = SimpleNamespace(override=override)
    monkeypatch.setitem(sys.modules, "fused_margin._triton.planning", planning)
    mode = gpu_checks.MODES["tf32"]
    bound = gpu_checks.bind(mode.problem(4, 10, 8, torch.device("cpu")), mode, "chunked")
    compute_loss = bound.compute_loss

    def recording() -> torch.Tensor:
        seen.append((*active, torch.get_float32_matmul_precision()))
        return compute_loss()

    bound.compute_loss = recording
    bound.leaves[0].register_hook(lambda gradient: seen.append(tuple(active)))
    before = torch.get_float32_matmul_precision()
    bound.step()
    bound.forward()
    assert seen == [("chunked", "high"), ("chunked",), ("high",)]
    assert active == []
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("strategy", ["chunked", "fused", "kept"])
def test_strategies_are_those_of_the_backend(strategy: str) -> None:
    """The names and arguments used here are those that the backend takes."""
    checks = gpu_checks
    mode = checks.MODES["fp32"]
    problem = mode.problem(33, 70, 20, torch.device("cpu"))
    if torch.cuda.is_available():
        problem = mode.problem(33, 70, 20, torch.device("cuda"))
    bound = checks.bind(problem, mode, strategy, backend="triton")
    assert max(checks.gate(problem, bound, "ieee").values()) < 1e-5


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_choice_of_the_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "family", lambda device: "sm_90")
    mode, device = gpu_checks.MODES["autocast-bf16"], torch.device("cuda", 0)
    shape = shapes.SHAPES["webface42m"]
    assert gpu_checks.chosen_strategy(shape, mode, device) == "chunked"
    assert gpu_checks.offers("fused", 64, mode, device)
    assert not gpu_checks.offers("fused", 512, mode, device)
    assert gpu_checks.offers("kept", 512, mode, device)
    cpu = torch.device("cpu")
    assert gpu_checks.chosen_strategy(shape, mode, cpu) == "cpu"
    assert gpu_checks.strategies(cpu) == ("cpu",)


def test_suite_of_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "pytest.txt"

    def run(code: str, timeout: float = 60.0) -> dict[str, Any]:
        monkeypatch.setattr(gpu_checks, "PYTEST", [sys.executable, "-u", "-c", code])
        return gpu_checks.run_tests(log, timeout)

    passed = "print('tests/t.py::a PASSED [ 50%]'); print('tests/t.py::b PASSED [100%]')"
    assert run(passed) == {"passed": 2, "had_time_for_all": True}
    late = run(f"{passed}; import time; time.sleep(100)", 2.0)
    assert late == {"passed": 2, "had_time_for_all": False}
    failed = "print('tests/t.py::a[1] FAILED [ 50%]')"
    with pytest.raises(harness.WrongResultError, match=r"1 tests failed: tests/t.py::a\[1\]"):
        run(f"{failed}; import time; time.sleep(100)", 2.0)
    with pytest.raises(harness.WrongResultError, match="exit status 4"):
        run("import sys; sys.exit(4)")


# --- timing ---------------------------------------------------------------------------------------


class Recorder:
    """Enters in a log what is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def clear(self) -> None:
        self.log.append(f"clear {self.name}")

    def step(self) -> None:
        self.log.append(f"call {self.name}")


def test_rounds() -> None:
    log: list[str] = []
    rounds_left = iter([True] * 5 + [False])
    samples = gpu_timing.interleave(
        gpu_timing.Meter(), [Recorder(name, log) for name in "ab"], lambda: next(rounds_left)
    )
    assert list(map(len, samples)) == [3, 3]
    called = [line[-1] for line in log if line.startswith("call")]
    assert [sorted(called[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5
    assert called[:2] * 5 != called  # the order changes
    for index, line in enumerate(log):
        if line.startswith("call"):
            assert log[index - 1] == log[index + 1] == f"clear {line[-1]}"
    assert gpu_timing.summary([]) is None


def test_rounds_of_slow_calls_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, timed = gpu_timing.Meter(), [Recorder("a", [])]
    monkeypatch.setattr(gpu_timing, "PATIENCE", 0.0)
    (samples,) = gpu_timing.interleave(meter, timed, lambda: True)
    assert len(samples) == gpu_timing.ENOUGH_ROUNDS == 5
    monkeypatch.setattr(gpu_timing, "PATIENCE", 100.0)
    (samples,) = gpu_timing.interleave(meter, timed, lambda: True)
    assert len(samples) == gpu_timing.MAX_ROUNDS


def test_summary() -> None:
    assert gpu_timing.summary([]) is None
    assert gpu_timing.summary([0.002, 0.001, 0.004]) == {
        "median_ms": 2.0, "min_ms": 1.0, "max_ms": 4.0, "rounds": 3,
    }  # fmt: skip
