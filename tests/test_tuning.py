"""Tuning of tiles: candidates, the gate, the cache file. The interpreter stands in for a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_margin.functional as fmf
from fused_margin import tuning

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from fused_margin._triton import configs, launch, tuned  # after the check for Triton

TINY = {"num_rows": 3, "num_classes": 7, "embedding_size": 5, "dtype": torch.float32}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSED_MARGIN_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates for each kernel."""
    candidates = tuning._candidates

    def first_two(config: configs.Config, dim: int):
        seen: dict[str, int] = {}
        for candidate in candidates(config, dim):
            seen[candidate[0]] = seen.get(candidate[0], 0) + 1
            if seen[candidate[0]] <= 2:
                yield candidate

    monkeypatch.setattr(tuning, "_candidates", first_two)
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(tuning, "WARM_UPS", 0)


def _default() -> configs.Config:
    return configs.config("interpreter", "ieee")


def _plan() -> configs.Config:
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    return launch.plan(x, w, torch.float32).config


@pytest.mark.usefixtures("few")
def test_every_kernel_is_tuned_and_the_choice_is_used(directory: Path) -> None:
    result = tuning.tune(**TINY, device="cpu", seconds=600)
    kernels = {row["kernel"] for row in result.rows}
    assert kernels == {
        "forward", "gradient", "weight", "embeddings", "fused_weight", "fused_embeddings",
    }  # fmt: skip
    assert result.complete
    assert all(row["milliseconds"] > 0 for row in result.rows)
    content = json.loads((directory / "tiles.json").read_text())
    ((key, entry),) = content["entries"].items()
    assert key.startswith("interpreter, triton ")
    assert key.endswith("ieee, D <= 16")
    assert entry["about"]["c"] == 7
    assert [path.name for path in directory.iterdir()] == ["tiles.json"], "no temporary file stays"
    assert _plan() == result.config
    tuned.forget()
    assert _plan() == result.config, "another process reads the same"


def test_the_choice_is_for_its_operands_and_range_of_d() -> None:
    config = dataclasses.replace(_default(), forward=configs.Tile(32, 16, 16, 1, 1))
    tuned.save("interpreter", "ieee", 12, config, {})
    assert _plan() == config
    x, w = torch.randn(3, 17), torch.randn(7, 17)
    assert launch.plan(x, w, torch.float32).config == _default()
    assert launch.plan(x[:, :5], w[:, :5], torch.float16).config != config


def test_entries_of_others_stay() -> None:
    for operands in ("ieee", "bf16"):
        tuned.save("interpreter", operands, 12, _default(), {})
    entries = json.loads(tuned.cache_file().read_text())["entries"]
    assert len(entries) == 2


@pytest.mark.usefixtures("few")
def test_a_wrong_candidate_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _default()
    wrong = configs.Tile(16, 16, 16, 1, 1)
    launch_chunked = launch._chunked

    def corrupting(p, rows, x, w, inv_w, kept, d_x, d_w, **options):
        partial = launch_chunked(p, rows, x, w, inv_w, kept, d_x, d_w, **options)
        if p.config.gradient == wrong:
            d_w.mul_(1.5)
        return partial

    def candidates(config: configs.Config, dim: int):
        for tile in (config.gradient, wrong):
            yield "gradient", "chunked", tile, dataclasses.replace(config, gradient=tile)

    monkeypatch.setattr(launch, "_chunked", corrupting)
    monkeypatch.setattr(tuning, "_candidates", candidates)
    result = tuning.tune(**TINY, device="cpu", save=False)
    assert result.config.gradient == default.gradient
    assert "relative error" in result.rows[1]["error"]
    assert not tuned.cache_file().exists()


@pytest.mark.usefixtures("few")
def test_time_runs_out() -> None:
    result = tuning.tune(**TINY, device="cpu", seconds=0.0)
    assert not result.complete
    assert result.config == _default()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "entries": {"a": {}}}'])
def test_a_broken_file_is_named(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "tiles.json").write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json can't be read .* default tiles"):
        assert _plan() == _default()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_another_user_s_file_is_not_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save("interpreter", "ieee", 5, _default(), {})
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    tuned.forget()
    with pytest.warns(UserWarning, match="belongs to another user"):
        _plan()


@pytest.mark.usefixtures("few")
def test_tuning_on_demand(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only with the variable, and only once."""
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    labels = torch.randint(7, (3,))
    fmf.arcface(x, w, labels, backend="triton").backward()
    assert not directory.exists(), "nothing is tuned unasked"
    monkeypatch.setenv("FUSED_MARGIN_TUNE", "1")
    fmf.arcface(x, w, labels, backend="triton").backward()
    assert "tuning tiles for N, C, D = (3, 7, 5), ieee" in capsys.readouterr().err
    before = tuned.cache_file().stat().st_mtime_ns
    fmf.arcface(x, w, labels, backend="triton").backward()
    assert not capsys.readouterr().err
    assert tuned.cache_file().stat().st_mtime_ns == before


@pytest.mark.usefixtures("few")
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cpu",
        "--n",
        "3",
        "--c",
        "7",
        "--d",
        "5",
        "--dtype",
        "fp32",
        "--seconds",
        "600",
        "--no-save",
    ]
    tuning.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(" ms" in line for line in lines)
    assert not tuned.cache_file().exists()
