"""The planner's formulas by hand, its advice, and the tables of docs/scaling.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import ROOT

from fused_margin import plan
from fused_margin.distributed import bytes_per_step

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
PLANNED = plan.Setting(100_000_000, 512, 64)


def test_formulas() -> None:
    found = plan.plan(PLANNED._replace(rows=10, optimizer="adam", embeddings="bf16"))
    shard = 1_562_500 * 512 * 4
    assert found.memory["class weights"] == found.memory["gradient"] == shard
    assert found.memory["optimiser state"] == 2 * shard
    assert found.memory["all embeddings, gradient"] == 640 * 512 * 6
    assert found.sent == 63 * (10 * (2 * 2 * 512 + 72) + 24)
    assert found.seconds["products"] == 8 * 640 * 1_562_500 * 512 / 200e12
    assert found.seconds["sending"] == found.sent / 50e9


def test_sampling_takes_its_share() -> None:
    full, sampled = plan.plan(PLANNED), plan.plan(PLANNED._replace(rate=0.1))
    assert sampled.memory["gradient"] * 10 == full.memory["gradient"]
    assert sampled.memory["class weights"] == full.memory["class weights"]
    assert sampled.seconds["products"] * 10 == pytest.approx(full.seconds["products"])
    fewest = plan.plan(PLANNED._replace(rate=1e-9))
    assert fewest.memory["gradient"] == PLANNED.rows * 512 * 4


def test_without_a_gradient() -> None:
    full = plan.plan(PLANNED)
    within = plan.plan(PLANNED._replace(in_backward=True))
    half = plan.plan(PLANNED._replace(in_backward=True, weights="bf16"))
    assert within.memory["gradient"] == half.memory["gradient"] == plan.BLOCK
    for name in ("class weights", "optimiser state"):
        assert within.memory[name] == full.memory[name] == 2 * half.memory[name]


def test_sub_centers_are_so_many_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and time of as many classes, but what each class has once."""
    several = plan.plan(PLANNED._replace(sub_centers=3))
    rows = plan.plan(PLANNED._replace(classes=3 * PLANNED.classes))
    assert several.memory == rows.memory
    assert several.seconds == rows.seconds
    assert several.sent == rows.sent
    assert "sampled" not in " ".join(plan.advice(PLANNED._replace(sub_centers=3)))
    line = ["--classes", "1e6", "--dim", "512", "--gpus", "4", "--sub-centers", "3"]
    assert plan.main(line) == 0
    assert re.search(r"class weights +1\.54 GB", capsys.readouterr().out)
    for wrong, said in (
        (["--rate", "0.1"], "sampled negatives can't be had with sub-centres"),
        (["--gpus", "7"], "use a number of classes that is a multiple of 7"),
    ):
        with pytest.raises(SystemExit):
            plan.main([*line, *wrong])
        assert said in " ".join(capsys.readouterr().err.split())


def test_nothing_sent_grows_with_classes() -> None:
    assert plan.plan(PLANNED).sent == plan.plan(PLANNED._replace(classes=64)).sent
    assert bytes_per_step(5, 7, 1) == 0
    assert bytes_per_step(5, 7, 3, torch.float64) == 2 * (5 * (2 * 7 * 8 + 72) + 24)


def test_fewest_gpus() -> None:
    setting = PLANNED._replace(classes=10**9)
    assert not plan.fits(setting)
    count = plan.fewest_gpus(setting)
    assert count is not None
    assert plan.fits(setting._replace(gpus=count))
    assert not plan.fits(setting._replace(gpus=count - 1))
    assert plan.fewest_gpus(setting._replace(gpu_memory=16.001e9)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "with sampled negatives at a rate of 0.1"),
        ({"classes": 10**6}, "It fits as it is."),
        ({"classes": 10**9}, "It fits on 97 GPUs."),
        ({"classes": 10**9, "gpu_memory": 90e9}, "It fits with sampled negatives"),
        ({"classes": 10**9, "optimizer": "adam", "gpu_memory": 115e9}, "SGD and momentum"),
        ({"classes": 10**5, "gpus": 1024}, "Sending takes more than half"),
    ],
)
def test_advice(change: dict[str, Any], said: str) -> None:
    assert said in " ".join(plan.advice(PLANNED._replace(**change)))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--classes", "1e8", "--dim", "512", "--gpus", "64", "--gpu-memory", "80"]
    assert plan.main(line) == 0
    text = capsys.readouterr().out
    assert "100,000,000 classes x 512 on 64 GPUs: 1,562,500 classes and 128 rows each" in text
    assert re.search(r"total +9\.77 GB  of 80\.00 GB less 16\.00 GB reserved", text)
    assert plan.main([*line, "--gpu-memory", "20"]) == 1
    assert "It doesn't fit." in capsys.readouterr().out
    for wrong in (["--classes", "1.5"], ["--network", "0"], ["--rate", "x"]):
        with pytest.raises(SystemExit):
            plan.main([*line, *wrong])


def test_table_of_the_document() -> None:
    rows = [line for line in DOCUMENT.splitlines() if re.match(r"\| [\d,]+ \| [\d.]+ GB", line)]
    assert len(rows) == 5
    for row in rows:
        first, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for gpus, cell in zip((1, 8, 64, 256, 1024), cells, strict=True):
            found = plan.plan(plan.Setting(int(first.replace(",", "")), 512, gpus))
            memory, time = sum(found.memory.values()) / 1e9, 1e3 * sum(found.seconds.values())
            assert cell == f"{memory:.1f} GB, {time:.0f} ms"


def test_measured_bytes_of_the_document() -> None:
    """Peaks within 5 % of the plan, and bytes equal."""
    lines = [line for line in DOCUMENT.splitlines() if re.search(r"\| [−+][\d.]+ % \|", line)]
    assert len(lines) == 5
    rows = 0
    for line in lines:
        what, _, peak, planned, share, sent, expected = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        rows += bool(what)
        ratio = 100 * (float(peak) / float(planned) - 1)
        assert f"{ratio:.1f} %".replace("-", "−") == share
        assert abs(ratio) < 5
        assert sent == expected
    assert rows == 2


def test_what_more_gpus_can_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Too many hold too many gathered rows; and no number helps where all memory is reserved."""
    few = ["--classes", "1e7", "--dim", "512", "--gpus", "1", "--gpu-memory", "80"]
    assert plan.main([*few, "--reserved", "79"]) == 1
    assert "It fits on " in capsys.readouterr().out
    assert plan.main([*few, "--reserved", "80"]) == 1
    assert "which leaves nothing: set --reserved" in capsys.readouterr().out
