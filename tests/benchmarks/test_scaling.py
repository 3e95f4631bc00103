"""``python -m benchmarks.scaling``: its points, and how it goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, scaling

pytestmark = pytest.mark.usefixtures("one_thread")


SCALING = ["--classes", "16,64,256,1024", "--rows", "2,4", "--n", "4", "--c", "32", "--d", "8"]
SCALING += ["--seconds", "0", "--no-memory"]


def test_scaling_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scaling.json"
    measure, measured = scaling.measure, []

    def interrupted(point, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(point)
        return measure(point, *arguments, **keywords)

    monkeypatch.setattr(scaling, "measure", interrupted)
    assert scaling.main([*SCALING, "--json", str(path)]) == 130
    before = json.loads(path.read_text())["points"]
    assert [(point["n"], point["c"]) for point in before] == [(2, 32), (4, 32), (4, 16)]

    first, measured[:] = measured[:], []
    assert scaling.main([*SCALING, "--json", str(path), "--resume"]) == 0
    assert not set(measured) & set(first)
    result = json.loads(path.read_text())
    assert result["points"][:3] == before
    assert [point["c"] for point in result["points"][3:]] == [64, 256, 1024]
    for point in result["points"]:
        assert set(point["results"]) == {"ours", "careful", "products"}
        assert all(row["median_s"] > 0 for row in point["results"].values())
    assert set(result["slopes"]) == {"classes", "rows"}
    assert "1,024" in capsys.readouterr().out


def test_scaling_does_not_mix_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    environment = harness.environment() | {"torch": "1.0"}
    path.write_text(json.dumps({"environment": environment, "points": []}))
    assert scaling.main([*SCALING, "--json", str(path), "--resume"]) == 1
    assert "another torch (1.0, now " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"environment": {}}', '{"environment": {}, "points": [{"n": 1}]}',
     '{"environment": [1], "points": []}', '{"environment": {}, "points": 3}', "\udcff"],
)  # fmt: skip
def test_scaling_names_a_file_it_can_not_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "scaling.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert scaling.main([*SCALING, "--json", str(path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} holds no points of this benchmark (")
    assert "start anew without --resume, or name another file" in error


def test_scaling_needs_a_file_to_resume() -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--resume"])


def test_eager_code_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    point = scaling.Point("classes", 4, 100, 8)
    needed = 2 * 4 * 100 * 8 + 16 * 100 * 8  # W, its gradient, and five more of their size less d_w
    monkeypatch.setattr(scaling.harness, "machine_memory", lambda: int(needed / 0.6) + 1)
    assert scaling.fits(point)
    monkeypatch.setattr(scaling.harness, "machine_memory", lambda: int(needed / 0.6) - 1)
    peak = {"peak_growth_mib": 2.0, "above_x_w_and_d_w_mib": 1.0}
    monkeypatch.setattr(scaling.memory, "measure_apart", lambda n, c, d, key: peak)
    entry = scaling.measure(point, 0.0, with_memory=True)
    assert set(entry["results"]) == {"ours", "products"}
    assert entry["memory"] == {
        "ours": peak,
        "careful": {"by_formula_mib": pytest.approx(16 * 100 * 8 / 2**20)},
    }
    assert entry["without_time"] == {"careful": "needs more than 60% of the memory"}


def test_slope_is_that_of_the_larger_half() -> None:
    sizes = [1, 10, 100, 1000, 10_000]
    flat_then_square = [1.0, 1.0, 1.0, 100.0, 10_000.0]
    assert scaling.slope(sizes, flat_then_square) == pytest.approx(2.0)
    assert scaling.slope([10, 1000], [1.0, 2.0]) is None
