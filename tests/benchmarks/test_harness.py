"""The gate, the rounds and the files that every benchmark has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, harness

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("wrong_part", ["loss", "d_x", "d_w of targets", "d_w of other classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_refuses_a_wrong_part(dtype: torch.dtype, wrong_part: str) -> None:
    problem = baselines.make_problem("arcface", 32, 500, 64).to(dtype)
    gate = harness.Gate(problem)
    contender = baselines.ours(problem)
    factor = 1.0 + 3.0 * harness.TOLERANCES[dtype]
    is_target = torch.zeros(500, 1, dtype=torch.bool)
    is_target[problem.labels] = True
    x, w = contender.leaves
    if wrong_part == "loss":
        right = contender.compute_loss
        contender.compute_loss = lambda: right() * factor
    elif wrong_part == "d_x":
        x.register_hook(lambda grad: grad * factor)
    else:
        rows = is_target if wrong_part == "d_w of targets" else ~is_target
        w.register_hook(lambda grad: torch.where(rows, grad * factor, grad))
    with pytest.raises(harness.WrongResultError, match=wrong_part):
        gate.check(contender)


def test_gate_refuses_a_wrong_forward_alone() -> None:
    problem = baselines.make_problem("arcface", 4, 10, 8)
    contender = baselines.ours(problem)
    right = contender.compute_loss
    contender.compute_loss = lambda: right() * (1.0 if torch.is_grad_enabled() else float("nan"))
    with pytest.raises(harness.WrongResultError, match="loss"):
        harness.Gate(problem).check(contender)


def test_gate_refuses_nan() -> None:
    problem = baselines.make_problem("arcface", 4, 10, 8)
    contender = baselines.ours(problem)
    contender.leaves[0].register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(harness.WrongResultError, match="d_x"):
        harness.Gate(problem).check(contender)


def test_wrong_result_of_ours_ends_the_run() -> None:
    problem = baselines.make_problem("arcface", 4, 50, 8)
    gate = harness.Gate(problem)
    gate.expected()
    wrong = baselines.ours(dataclasses.replace(problem, scale=1.01 * problem.scale))
    with pytest.raises(harness.WrongResultError, match="fused_margin"):
        harness.admit(gate, {"ours": wrong})


def test_rival_that_fails_is_listed() -> None:
    problem = baselines.make_problem("arcface", 4, 50, 8)
    rival = baselines.careful(problem)

    def fail() -> Tensor:
        raise AssertionError("no kernel for this\nand a long traceback")

    rival.compute_loss = fail
    errors, refused = harness.admit(harness.Gate(problem), {"careful": rival})
    assert errors == {}
    assert refused == {"careful": "failed: AssertionError: no kernel for this"}


def test_every_round_times_every_contender_with_gradients_cleared() -> None:
    log: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def clear(self) -> None:
            log.append(f"clear {self.name}")

        def step(self) -> None:
            log.append(f"step {self.name}")

    seconds = harness.interleave([Recorder("a"), Recorder("b")], rounds=8, warmups=1)
    assert [len(samples) for samples in seconds] == [8, 8]
    steps = [line for line in log if line.startswith("step")]
    assert len(steps) == 2 * 9
    rounds = [tuple(steps[start : start + 2]) for start in range(0, 18, 2)]
    assert set(rounds) == {("step a", "step b"), ("step b", "step a")}  # nobody always goes first
    assert all(log[log.index(step) - 1] == step.replace("step", "clear") for step in set(steps))


def test_json_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "result.json"
    harness.write_json(path, {"run": 1})
    folders = []

    def interrupted(source: Path, target: Path) -> Path:
        folders.append(source.parent)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harness.write_json(path, {"run": 2})
    with pytest.raises(TypeError):
        harness.write_json(path, {"run": object()})
    assert folders == [path.parent]  # a rename across file systems wouldn't be atomic
    assert json.loads(path.read_text()) == {"run": 1}
    assert list(path.parent.iterdir()) == [path]
