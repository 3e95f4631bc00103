"""The command lines: peak memory, the cases of pytest-benchmark, and numbers out of bounds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from torch import Tensor

from benchmarks import losses, memory, report, shapes, test_bench
from fused_margin import functional

pytestmark = pytest.mark.usefixtures("one_thread")
HAS_PEAK = Path("/proc/self/clear_refs").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # nothing is measured in what looks like one of several processes
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_run_counts_and_enforces_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    sizes = ["--n", "256", "--c", "40000", "--d", "64"]
    done = run("-m", "benchmarks.memory", *sizes, "--limit-mib", "0", "--json", str(path))
    assert done.returncode == 1
    assert "above the limit" in done.stderr
    result = json.loads(path.read_text())
    d_w = 40_000 * 64 * 4 / 2**20
    assert result["d_w_mib"] == pytest.approx(d_w)
    assert result["peak_growth_mib"] > d_w  # the gradient itself is seen
    assert result["above_x_w_and_d_w_mib"] == pytest.approx(result["peak_growth_mib"] - d_w)
    assert result["eager_by_formula_mib"] > 3 * 256 * 40_000 * 4 / 2**20
    assert result["contender"] == "ours"


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_steps_show_that_there_is_no_gradient(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    sizes = ["--n=8", "--c=200000", "--d=64", "--rounds=1", "--threads=1"]
    done = run("-m", "benchmarks.steps", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    contenders, d_w = result["contenders"], result["weight_bytes"]
    assert d_w == 200_000 * 64 * 4
    for entry in contenders.values():
        assert entry["name"] in done.stdout
        assert entry["median_s"] > 0
    peaks = {key: entry["peak_bytes"] for key, entry in contenders.items()}
    assert peaks["after"] - peaks["within"] > 0.7 * d_w
    assert peaks["within"] - peaks["within_bf16"] > 0.7 * d_w  # half of weights and of momentum
    assert peaks["after"] - peaks["sampled"] > 0.5 * d_w


def test_costs_of_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.json"
    sizes = ["--n=20", "--c=40", "--d=16", "--rounds=2"]
    assert losses.main([*sizes, "--json", str(path)]) == 0
    printed, results = capsys.readouterr().out, json.loads(path.read_text())["results"]
    assert results["ArcFace"]["times"] == 1.0
    for name, row in results.items():
        assert name in printed
        assert row["times"] > 0
        assert 0.0 < max(row["relative_errors"].values()) < losses.TOLERANCE
    assert {row["over"] for row in results.values()} == {"ArcFace", "ArcFace, 3 C classes"}


def test_a_wrong_loss_has_no_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TOLERANCE", 1e-9)
    assert losses.main(["--n=20", "--c=40", "--d=16", "--rounds=1"]) == 1
    assert "ArcFace: relative error" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_of_a_rival_is_measured_apart() -> None:
    found = memory.measure_apart(256, 40_000, 16, "careful", loss="fixed_adacos")
    assert set(found) == {"peak_growth_mib", "above_x_w_and_d_w_mib"}
    at_least_two_matrices = 2 * 256 * 40_000 * 4 / 2**20
    assert found["above_x_w_and_d_w_mib"] > at_least_two_matrices


@pytest.mark.skipif(not HAS_PEAK, reason="needs Linux's clear_refs")
def test_memory_that_can_not_be_measured_has_a_reason() -> None:
    found = memory.measure_apart(8, 100, 8, "liger", mode="bf16")
    assert found == {"peak_not_measured": "exit status 1: liger: runs on GPUs only, not on cpu"}


def test_pytest_cases_run_and_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    cases = "mnist and arcface and autocast and not compiled"
    arguments = ["--benchmark-only", f"--benchmark-json={path}", "-k", cases]
    done = run("-m", "pytest", "benchmarks/test_bench.py", "-q", *arguments)
    assert done.returncode == 0, done.stdout
    condensed = report.condense(json.loads(path.read_text()))
    assert len(condensed["rows"]) == 2 * 2  # two contenders, forward with and without backward
    for row in condensed["rows"]:
        assert row["shape"] == {"n": 128, "c": 10, "d": 128}
        assert (row["shape_name"], row["loss"], row["dtype"]) == ("mnist", "arcface", "autocast")
        assert row["contender"] in {"ours", "careful"}
        assert row["fraction_of_floor"] == pytest.approx(row["floor_s"] / row["median_s"])
        assert set(row["relative_errors"]) >= {"loss", "d_x", "d_w of targets"}
        assert row["rounds"] == 25
    assert {"device", "torch", "git_revision"} <= set(condensed["environment"])


def test_pytest_cases_cover_losses_dtypes_and_shapes() -> None:
    names = {parameter.id for parameter in test_bench.parameters()}
    for shape in ("mnist", "voxceleb2", "sop", "ms1m"):
        for mode in ("fp32", "bf16", "autocast"):
            for key in ("ours", "careful", "compiled"):
                assert f"{shape}-arcface-{mode}-{key}" in names
        assert f"{shape}-fixed_adacos-fp32-ours" in names
        assert f"{shape}-arcface-fp32-lce_chunked" in names


def test_shapes_are_named_after_themselves() -> None:
    assert all(name == shape.name for name, shape in shapes.SHAPES.items())
    assert set(shapes.CPU_SHAPES) <= set(shapes.SHAPES)
    ms1m = shapes.SHAPES["ms1m"]
    assert (ms1m.num_rows, ms1m.num_classes, ms1m.dim) == (256, 85_742, 512)


SMALL, LEAST_1, LEAST_2 = "0 -1 x 1.5", "of at least 1", "of at least 2"
THREADS = ("--threads", f"{SMALL} 1025", "from 1 to 1024")
OPTIONS: dict[str, list[tuple[str, str, str]]] = {
    "cpu": [
        *((option, f"{SMALL} 1", LEAST_2) for option in ("--n", "--c", "--d")),
        ("--rounds", SMALL, LEAST_1),
        THREADS,
    ],
    "memory": [
        ("--n", SMALL, LEAST_1),
        ("--c", f"{SMALL} 1", LEAST_2),
        ("--d", SMALL, LEAST_1),
        ("--chunk", SMALL, LEAST_1),
        ("--limit-mib", "-1 nan x", "from 0 to 1e+09"),
        THREADS,
    ],
    "scaling": [
        *((option, f"{SMALL} 1", LEAST_2) for option in ("--n", "--c", "--d")),
        *((option, f"{SMALL} 1 8,1 8, ,", LEAST_2) for option in ("--classes", "--rows")),
        ("--seconds", "-1 nan inf x", "from 0 to 86400"),
        THREADS,
    ],
    "roofline": [
        ("--n", SMALL, LEAST_1),
        ("--c", f"{SMALL} 1", LEAST_2),
        ("--d", SMALL, LEAST_1),
    ],
    "gpu": [("--minutes", "0 -1 nan inf x", "from 0.1 to 1440")],
    "kernels": [("--dims", f"{SMALL} 8 100 16384", "a power of 2")],
}


@pytest.mark.parametrize(
    ("command", "option", "value", "bounds"),
    [
        (command, option, value, bounds)
        for command, options in OPTIONS.items()
        for option, values, bounds in options
        for value in values.split()
    ],
)
def test_numbers_out_of_bounds_are_one_line_errors(
    capsys: pytest.CaptureFixture[str], command: str, option: str, value: str, bounds: str
) -> None:
    if command == "kernels":
        pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"benchmarks.{command}").main([f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    given = value.split(",")[-1] if "," in value else value
    assert error.startswith(f"python -m benchmarks.{command}: error: argument {option}: expected a")
    assert bounds in error
    assert error.endswith(f"got {given!r}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "fixed_adacos", "--c", "2"], "--loss fixed_adacos needs --c 3 or more"),
        (["--chunk", "5"], "--chunk is for --contender lce_chunked"),
    ],
)
def test_memory_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        memory.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["cpu", "scaling"])
def test_a_wrong_result_ends_the_command_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """With two columns the remedy is a larger problem."""
    right = functional.arcface

    def wrong(*args: Any, backend: str = "auto", **options: Any) -> Tensor:
        factor = 1.0 if backend == "reference" else 1.01
        return factor * right(*args, backend=backend, **options)

    monkeypatch.setattr(functional, "arcface", wrong)
    sizes = ["--n", "2", "--c", "10", "--d", "2", "--no-memory"]
    more = {
        "cpu": ["--rounds", "1", "--no-compile"],
        "scaling": ["--rows", "2", "--classes", "10", "--seconds", "0"],
    }
    assert importlib.import_module(f"benchmarks.{command}").main([*sizes, *more[command]]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: fused_margin: relative error above 2e-05 in ")
    assert error.endswith("N=2, D=2 leave few digits to compare: try N >= 8 and D >= 16")


def test_kernels_say_that_triton_is_missing() -> None:
    code = """
import runpy, sys
sys.modules["triton"] = None
runpy.run_module("benchmarks.kernels", run_name="__main__")
"""
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Triton compiles the kernels and isn't installed; ")
    assert "Traceback" not in done.stderr
