"""The benchmarks run, write what they promise, and time nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return (
        importlib.import_module("benchmarks.baselines"),
        importlib.import_module("benchmarks.harness"),
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_cpu_run_writes_times_ratios_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    sizes = ["--n", "8", "--c", "200", "--d", "16", "--rounds", "3"]
    done = run(
        "-m", "benchmarks.cpu", *sizes, "--threads", "1", "--no-compile", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["shape"] == {"n": 8, "c": 200, "d": 16}
    assert set(result["results"]) == {"ours", "careful", "usual", "ours_bf16", "products"}
    for row in result["results"].values():
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] == row["median_s"] > 0
        assert row["name"] in done.stdout
    medians = {key: row["median_s"] for key, row in result["results"].items()}
    assert result["ratios_of_medians"] == pytest.approx(
        {
            "careful_over_ours": medians["careful"] / medians["ours"],
            "usual_over_ours": medians["usual"] / medians["ours"],
            "ours_over_products": medians["ours"] / medians["products"],
            "ours_over_ours_bf16": medians["ours"] / medians["ours_bf16"],
        }
    )
    environment = result["environment"]
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert {"fused_margin", "cpu", "date", "git_revision"} <= set(environment)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's clear_refs")
def test_memory_run_counts_and_enforces_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    sizes = ["--n", "256", "--c", "40000", "--d", "64"]
    done = run("-m", "benchmarks.memory", *sizes, "--limit-mib", "64", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    d_w = 40_000 * 64 * 4 / 2**20
    assert result["d_w_mib"] == pytest.approx(d_w)
    assert result["peak_growth_mib"] > d_w  # the gradient itself is seen
    assert result["above_x_w_and_d_w_mib"] == pytest.approx(result["peak_growth_mib"] - d_w)
    assert result["eager_by_formula_mib"] > 3 * 256 * 40_000 * 4 / 2**20

    done = run("-m", "benchmarks.memory", "--n", "8", "--c", "100", "--d", "8", "--limit-mib=-999")
    assert done.returncode == 1
    assert "above the limit" in done.stderr


def test_pytest_cases_run() -> None:
    cases = "mnist and not compiled"
    done = run("-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-k", cases)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("loss", ["arcface", "fixed_adacos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_passes_every_contender(benchmarks, loss: str, dtype: torch.dtype) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem(loss, 32, 500, 64).to(dtype)
    gate = harness.Gate(problem)
    names = ["ours", "careful", *(["usual"] if dtype is torch.float32 else [])]
    for name in names:
        errors = gate.check(baselines.CONTENDERS[name](problem))
        assert set(errors) == {"loss", "d_x", "d_w of targets", "d_w of other classes"}


@pytest.mark.parametrize("wrong_part", ["loss", "d_x", "d_w of targets", "d_w of other classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_refuses_a_wrong_part(benchmarks, dtype: torch.dtype, wrong_part: str) -> None:
    baselines, harness = benchmarks
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


def test_gate_refuses_nan(benchmarks) -> None:
    baselines, harness = benchmarks
    problem = baselines.make_problem("arcface", 4, 10, 8)
    contender = baselines.ours(problem)
    contender.leaves[0].register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(harness.WrongResultError, match="d_x"):
        harness.Gate(problem).check(contender)


def test_every_round_times_every_contender_with_gradients_cleared(benchmarks) -> None:
    _, harness = benchmarks
    log: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def clear(self) -> None:
            log.append(f"clear {self.name}")

        def step(self) -> None:
            log.append(f"step {self.name}")

    seconds = harness.interleave([Recorder("a"), Recorder("b")], rounds=4, warmups=1)
    assert [len(samples) for samples in seconds] == [4, 4]
    steps = [line for line in log if line.startswith("step")]
    assert len(steps) == 2 * 5
    rounds = [steps[start : start + 2] for start in range(0, 10, 2)]
    assert all(sorted(order) == ["step a", "step b"] for order in rounds)
    assert rounds[1] != rounds[2]  # nobody always goes first
    assert all(log[log.index(step) - 1] == step.replace("step", "clear") for step in set(steps))


def test_shapes_are_named_after_themselves(benchmarks) -> None:
    shapes = importlib.import_module("benchmarks.shapes")
    assert all(name == shape.name for name, shape in shapes.SHAPES.items())
    assert set(shapes.CPU_SHAPES) <= set(shapes.SHAPES)
    ms1m = shapes.SHAPES["ms1m"]
    assert (ms1m.num_rows, ms1m.num_classes, ms1m.dim) == (256, 85_742, 512)
