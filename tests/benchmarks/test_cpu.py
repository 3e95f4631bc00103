"""``python -m benchmarks.cpu`` writes what it promises, and times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import pytest
import torch
from contenders import GPU_ONLY, HAS_LCE
from helpers import ROOT

from benchmarks import baselines, cpu, harness

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = {"products", "quickest", "quickest_bf16"}
TINY = ["--n", "4", "--c", "50", "--d", "8", "--rounds", "1"]


def test_cpu_run_writes_times_ratios_and_environment(cpu_result) -> None:
    result, printed = cpu_result
    assert result["shape"] == {"n": 8, "c": 200, "d": 16}
    lower_bounds = {"lce", "lce_chunked"} if HAS_LCE else set()
    ours = {"ours", "ours_bf16", "ours_autocast"}
    eager = {"careful", "careful_bf16", "usual"}
    assert set(result["results"]) == ours | lower_bounds | eager | PRODUCTS
    for key, row in result["results"].items():
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] == row["median_s"] > 0
        assert row["name"] in printed
        assert row.get("drops_margin", False) == (key in lower_bounds)
    medians = {key: row["median_s"] for key, row in result["results"].items()}
    rivals = {"careful", "usual"} | lower_bounds
    assert result["ratios_of_medians"] == pytest.approx(
        {
            **{f"{key}_over_ours": medians[key] / medians["ours"] for key in rivals},
            "ours_over_products": medians["ours"] / medians["products"],
            "ours_over_quickest": medians["ours"] / medians["quickest"],
            "ours_bf16_over_quickest_bf16": medians["ours_bf16"] / medians["quickest_bf16"],
            "ours_over_ours_bf16": medians["ours"] / medians["ours_bf16"],
            "ours_over_ours_autocast": medians["ours"] / medians["ours_autocast"],
            "careful_bf16_over_ours_bf16": medians["careful_bf16"] / medians["ours_bf16"],
        }
    )
    environment = result["environment"]
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert {"fused_margin", "cpu", "device", "date", "git_revision"} <= set(environment)


def test_cpu_run_lists_those_without_a_time(cpu_result) -> None:
    result, printed = cpu_result
    assert set(result["without_time"]) == GPU_ONLY | (set() if HAS_LCE else {"lce", "lce_chunked"})
    for key in GPU_ONLY:
        assert result["without_time"][key] == "runs on GPUs only, not on cpu"
        assert f"no time for {key}: runs on GPUs only" in printed


@pytest.mark.skipif(not HAS_LCE, reason="torch has no linear_cross_entropy")
def test_cpu_run_records_the_search_for_the_chunk(cpu_result) -> None:
    result, _ = cpu_result
    row = result["results"]["lce_chunked"]
    assert set(row["search_s"]) == {"8", "4", "2", "1"}
    assert row["search_s"][str(row["chunk_rows"])] == min(row["search_s"].values())
    assert row["own_choice_s"] > 0


def test_cpu_run_takes_the_peak_of_each_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure_apart(n: int, c: int, d: int, key: str, mode: str, **options: Any):
        asked.append((n, c, d, key, mode))
        return {"peak_growth_mib": 2.0, "above_x_w_and_d_w_mib": 1.0}

    monkeypatch.setattr(cpu.memory, "measure_apart", measure_apart)
    settings = cpu._parse([*TINY, "--no-compile"])
    result = cpu.measure(settings)
    assert {(4, 50, 8, "ours", mode) for mode in ("fp32", "bf16", "autocast")} <= set(asked)
    for key, row in result["results"].items():
        assert row.get("above_x_w_and_d_w_mib") == (None if key in PRODUCTS else 1.0)


def test_results_are_named_after_device_and_shape() -> None:
    stem = cpu.file_stem
    assert stem({"n": 64, "c": 100_000, "d": 512}) == "n64"
    assert stem({"n": 64, "c": 5_000, "d": 512}) == "n64-c5000-d512"
    path = harness.result_path("n64")
    assert path.parent == ROOT / "benchmarks" / "results"
    assert path.name == f"{harness.slug(harness.cpu_name())}-n64.json"


def test_wrong_rival_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.CONTENDERS["careful"]

    def wrong(problem):
        return right(dataclasses.replace(problem, scale=1.01 * problem.scale))

    monkeypatch.setitem(baselines.EVERYONE, "careful", wrong)
    result = cpu.measure(cpu._parse([*TINY, "--no-compile", "--no-memory"]))
    assert "careful" not in result["results"]
    assert "careful_over_ours" not in result["ratios_of_medians"]
    assert result["without_time"]["careful"].startswith("wrong result: careful eager")
    assert "no time for careful: wrong result" in cpu.table(result)


def test_cpu_run_in_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians over processes, each of which made the whole run."""
    arguments = [*TINY, "--threads", "1", "--no-compile", "--no-memory", "--processes", "2"]
    settings = cpu._parse(arguments)
    result = cpu.measure_repeatedly(settings)
    assert result["processes"] == 2
    for row in result["results"].values():
        assert len(row["medians_s"]) == 2
        assert row["median_s"] == pytest.approx(sum(row["medians_s"]) / 2)
        assert row["min_s"] <= min(row["medians_s"]) <= max(row["medians_s"]) <= row["max_s"]
    ours, careful = (result["results"][key]["medians_s"] for key in ("ours", "careful"))
    each = [theirs / mine for theirs, mine in zip(careful, ours, strict=True)]
    assert result["ratios_by_process"]["careful_over_ours"] == pytest.approx(each)
    assert result["ratios_of_medians"]["careful_over_ours"] == pytest.approx(sum(each) / 2)
    printed = cpu.table(result)
    least, most = sorted(1.0 / one for one in each)
    assert f"over 2 processes: median {(least + most) / 2:.2f}, from {least:.2f} to" in printed
    assert "process 2 of 2" in capsys.readouterr().err


def test_a_process_with_a_wrong_result_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "gate\nerror: ours: 7 above\n")

    monkeypatch.setattr(harness.subprocess, "run", run)
    assert cpu.main([*TINY, "--processes", "3"]) == 1
    assert "error: in process 1: ours: 7 above" in capsys.readouterr().err
