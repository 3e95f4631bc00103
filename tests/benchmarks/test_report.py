"""docs/benchmarks.md and its charts from results, and what can't be reported."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from benchmarks import charts, harness, planned, report
from fused_margin import plan

pytestmark = pytest.mark.usefixtures("one_thread")


DRY_STEPS = {"environment": {"cpu": "a", "threads": 1}}


def scaling_result(environment: dict[str, Any]) -> dict[str, Any]:
    points = []
    for sweep, sizes in (("classes", (1000, 30_000, 1_000_000)), ("rows", (16, 64))):
        for size in sizes:
            n, c = (256, size) if sweep == "classes" else (size, 100_000)
            careful = {"by_formula_mib": c * 4e-3}
            if size < 1_000_000:
                careful["above_x_w_and_d_w_mib"] = c * 4e-3
            names = ("ours", "careful", "products")
            points.append(
                {
                    "sweep": sweep,
                    "n": n,
                    "c": c,
                    "d": 128,
                    "results": {key: {"name": key, "median_s": 1e-8 * n * c} for key in names},
                    "memory": {
                        "ours": {"above_x_w_and_d_w_mib": 37.0},
                        "careful": careful,
                    },
                }
            )
    return {
        "benchmark": "scaling, ArcFace, forward + backward, fp32",
        "environment": environment,
        "points": points,
        "slopes": {"classes": {"ours": 0.98, "careful": None}, "rows": {"ours": None}},
    }


def losses_result(environment: dict[str, Any]) -> dict[str, Any]:
    row = {"kind": "asks more", "over": "ArcFace", "median_s": 0.5, "times": 1.07}
    return {
        "benchmark": "losses, forward + backward, fp32",
        "shape": {"n": 64, "c": 100_000, "d": 512},
        "rounds": 9,
        "environment": environment,
        "results": {"CurricularFace": row},
    }


def gpu_result(environment: dict[str, Any]) -> dict[str, Any]:
    floor = {"step_ms": 10.0, "8NCD_ms": 11.0}
    errors = {"loss": 1e-4, "d_x": 2e-3}
    row = {"relative_errors": errors, "extra_bytes": 1 << 26, "floor": floor}
    rows = {
        "ours": row | {"name": "fused_margin", "step": {"median_ms": 15.0}},
        "liger": row | {"name": "Liger", "step": {"median_ms": 45.0}},
        "cce": {"floor": floor, "status": "unavailable", "message": "not installed"},
    }
    shape = {"name": "llm", "num_rows": 4096, "num_classes": 128_256, "dim": 4096, "origin": ""}
    return {
        "benchmark": "gpu",
        "dry_run": False,
        "steps": {
            "environment": environment | {"device": "NVIDIA H200", "gpu": {"name": "NVIDIA H200"}},
            "baselines/llm/bf16": {"shape": shape, "mode": "bf16", "rows": rows},
        },
    }


@pytest.fixture
def results(cpu_result, tmp_path: Path) -> Path:
    """A folder with one result of each kind."""
    cpu, _ = cpu_result
    environment = cpu["environment"]
    row = {
        "shape_name": "mnist", "loss": "arcface", "dtype": "fp32", "fraction_of_floor": 0.25,
        "median_s": 0.004,
    }  # fmt: skip
    everything = {
        "cpu": cpu,
        "losses": losses_result(environment),
        "scaling": scaling_result(environment),
        "gpu": gpu_result(environment),
        "memory": {
            "benchmark": "memory, ArcFace, forward + backward, fp32",
            "shape": {"n": 256, "c": 1_000_000, "d": 128},
            "environment": environment,
            "above_x_w_and_d_w_mib": 37.3,
            "eager_by_formula_mib": 3906.0,
        },
        "shapes": {
            "benchmark": "shapes, forward and forward + backward",
            "environment": environment,
            "rows": [
                row | {"contender": "ours", "work": "step"},
                row | {"contender": "careful", "work": "step", "median_s": 0.006},
            ],
        },
    }
    for name, result in everything.items():
        harness.write_json(tmp_path / "results" / f"{name}.json", result)
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (512, "512"), (1000, "1 k"), (1024, "1,024"), (30_000, "30 k"),
     (85_742, "85,742"), (1e6, "1 M"), (1_500_000, "1,500 k")],
)  # fmt: skip
def test_numbers_on_axes(value: float, text: str) -> None:
    assert charts._plain(value) == text


def test_report_has_tables_and_charts_of_every_kind(
    results: Path, cpu_result, tmp_path: Path
) -> None:
    docs = tmp_path / "docs"
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    text = (docs / "benchmarks.md").read_text()
    cpu, _ = cpu_result
    ratios = cpu["ratios_of_medians"]
    line = next(line for line in text.splitlines() if line.startswith("| 8 | 200 | 16 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4] == f"{ratios['ours_over_quickest']:.2f}"
    assert cells[5] == f"{ratios['ours_bf16_over_quickest_bf16']:.2f}"
    assert "The three products, bf16, ms: whole, rows first " in text
    assert cells[6:9] == [
        f"{ratios['careful_over_ours']:.2f}", "–", f"{ratios['usual_over_ours']:.2f}"
    ]  # fmt: skip
    assert cells[-1] == f"{ratios['ours_over_ours_bf16']:.2f}"
    assert "Liger, fp32 sums (runs on GPUs only, not on cpu)" in text
    assert "`python -m benchmarks.cpu --n 8 --c 200 --d 16 --rounds 3`" in text
    assert "fused_margin C^0.98" in text
    assert "4,000 (formula)" in text
    assert "| mnist | ArcFace | fp32 | forward + backward | 4 | 25% | 1.50 |" in text
    assert "| **fused_margin** | 15 | 1.00 | 0.67 | 2e-03 | 64 |" in text
    assert "| CurricularFace | asks more | ArcFace | 500 | 1.07 |" in text
    assert "`python -m benchmarks.losses --n 64 --rounds 9`" in text
    assert "Cut Cross-Entropy (not installed)" in text
    assert "## NVIDIA H200" in text
    assert cpu["environment"]["date"][:10] in text

    images = {path.name for path in (docs / "images").iterdir()}
    assert images == {
        "cpu.png", "gpu-llm-bf16.png", "scaling-classes-memory.png", "scaling-classes-time.png",
        "scaling-rows-memory.png", "scaling-rows-time.png",
    }  # fmt: skip
    assert all(f"(images/{name})" in text for name in images)
    for name in images:
        data = (docs / "images" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 80_000
        width, height = struct.unpack(">II", data[16:24])
        assert 700 < width < 1000
        assert 200 < height < 700


def test_report_is_the_same_each_time(results: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("once", "twice"):
        docs = tmp_path / name
        assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
        files = sorted(path for path in docs.rglob("*") if path.is_file())
        contents.append({path.relative_to(docs): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_report_takes_the_newer_of_two(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads((results / "cpu.json").read_text())
    old["environment"]["date"] = "2001-01-01T00:00:00+00:00"
    (results / "another.json").write_text(json.dumps(old))
    stems = {result.stem for result in report.load(results)}
    assert "cpu" in stems
    assert "another" not in stems
    assert "another.json is left out for the newer cpu.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a result"),
        ("[]", "not a result"),
        ('{"benchmark": "cpu, x"}', "not a result"),
        ('{"benchmark": "weather", "environment": {"cpu": "a", "threads": 1}}', "'weather'"),
        (json.dumps({"benchmark": "gpu", "dry_run": True, "steps": DRY_STEPS}), "dry run"),
    ],
)
def test_report_names_the_file_it_can_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "strange.json").write_text(content)
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert report.main(arguments) == 1
    printed = capsys.readouterr().err
    assert "strange.json" in printed
    assert message in printed
    assert not (tmp_path / "docs").exists()


def test_report_names_the_result_that_lacks_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"benchmark": "cpu, x", "environment": {"cpu": "a", "threads": 1}, "shape": {}}
    (tmp_path / "lacking.json").write_text(json.dumps(result))
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert report.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: lacking.json can't be reported (KeyError(")
    assert "measure again, or remove the file" in error


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": []}', '{"benchmarks": 1}',
     '{"benchmarks": [{"extra_info": {"contender": "ours", "environment": {}}, "stats": {}}]}'],
)  # fmt: skip
def test_report_names_a_file_of_cases_it_can_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    folders = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert report.main([*folders, "--bench", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: ")
    assert not (tmp_path / "results").exists()


def test_pictures_of_the_planner(tmp_path: Path) -> None:
    assert planned.main(["--out", str(tmp_path)]) == 0
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for what in ("memory", "time"):
        name = f"scaling-{what}.png"
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (ROOT / "docs" / "images" / name).is_file()
        assert f"(images/{name})" in text
    of_one, *_, of_many = planned.lines("memory")[-1].values
    found = [plan.plan(plan.Setting(10**9, 512, gpus)) for gpus in (1, 1024)]
    assert [of_one, of_many] == [sum(one.memory.values()) / 1e9 for one in found]


def test_report_refuses_an_empty_folder(tmp_path: Path) -> None:
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 1
    with pytest.raises(report.ReportError, match="no case"):
        report.condense({"benchmarks": []})


def test_committed_report_is_that_of_the_committed_results() -> None:
    document = ROOT / "docs" / "benchmarks.md"
    built = report.build(report.load(ROOT / "benchmarks" / "results"))
    assert document.read_text(encoding="utf-8") == built.text(), "stale: make bench-report"
    images = ROOT / "docs" / report.IMAGES
    assert [name for name in built.charts if not (images / name).is_file()] == []
