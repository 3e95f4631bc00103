"""Tuning of tiles: candidates, the gate, the cache file. The interpreter stands in for a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fused_margin.functional as fmf
from fused_margin import _validate, tuning

pytest.importorskip("triton", reason="Triton is not installed")
from fused_margin._triton import launch, planning, tiles, tuned  # after the check for Triton

pytestmark = pytest.mark.skipif(
    not _validate.INTERPRETED, reason="the interpreter's tiles are tuned here, not a GPU's"
)
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
    candidates = tuning.candidates

    def first_two(present: tiles.Tiles, operands: str, *sizes: int):
        seen: dict[str, int] = {}
        for candidate in candidates(present, "bf16", 512, 512, sizes[2]):
            seen[candidate[0]] = seen.get(candidate[0], 0) + 1
            if seen[candidate[0]] <= 2:
                yield candidate

    monkeypatch.setattr(tuning, "candidates", first_two)
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(tuning, "WARM_UPS", 0)


def _default() -> tiles.Tiles:
    return tiles.default("interpreter", "ieee")


def _plan() -> tiles.Tiles:
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    return planning.plan(x, w, torch.float32).tiles


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
    assert key.endswith("ieee, x float32, w float32, N <= 16, D <= 16")
    assert entry["about"]["complete"] is True
    assert entry["about"]["c"] == 7
    assert not list(directory.glob("*.part")), "no temporary file stays"
    assert _plan() == result.tiles
    tuned.forget()
    assert _plan() == result.tiles, "another process reads the same"


OTHER = dataclasses.replace(
    tiles.default("interpreter", "ieee"), forward=tiles.Tile(32, 16, 16, 1, 1)
)


def _save(chosen: tiles.Tiles = OTHER, operands: str = "ieee") -> None:
    key = tuned.key("interpreter", operands, torch.float32, torch.float32, 3, 5)
    tuned.save(key, chosen, {})


def test_the_choice_is_for_its_dtypes_and_range() -> None:
    _save()
    assert _plan() == OTHER

    def used(x: torch.Tensor, w: torch.Tensor) -> tiles.Tiles:
        return planning.plan(x, w, x.dtype).tiles

    assert used(torch.randn(16, 16), torch.randn(7, 16)) == OTHER
    assert used(torch.randn(3, 17), torch.randn(7, 17)) == _default(), "another range of D"
    assert used(torch.randn(17, 5), torch.randn(7, 5)) == _default(), "another range of N"
    assert used(torch.randn(3, 5).half(), torch.randn(7, 5)) == tiles.default("interpreter", "fp16")


def test_limits_are_saved() -> None:
    """What a default has because more would spill is not lost with its other tiles."""
    limited = dataclasses.replace(OTHER, kept_rows=16, asked_rows=32, shaped_rows=64)
    _save(limited)
    assert _plan() == limited


def test_what_is_kept_has_a_tile_that_was_made_for_it() -> None:
    """Not a tuned one with the other number of classes, which nobody has tried."""
    x, w = torch.randn(3, 5), torch.randn(40, 5)
    few = dataclasses.replace(OTHER, forward=tiles.Tile(16, 16, 16, 1, 3))
    seen: list[int] = []
    sweep_kernel = launch.sweep_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **keywords: Any) -> None:
                seen.append(keywords["num_stages"])
                sweep_kernel[grid](*arguments, **keywords)

            return run

    _save(few)
    with mock.patch.object(launch, "sweep_kernel", Recorded()):
        for budget in (0, 1 << 20):
            x.requires_grad_()
            fmf.arcface(x, w, torch.randint(40, (3,)), backend="triton", memory_budget=budget)
    assert seen == [3, tiles.default("interpreter", "ieee").forward.num_stages]


def test_entries_of_others_stay() -> None:
    _save()
    _save(operands="bf16")
    assert len(json.loads(tuned.cache_file().read_text())["entries"]) == 2


def test_kept_exponentials_do_not_depend_on_the_tuning() -> None:
    """A graph compiled before still fits, and so does a backward that is pending."""
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(40, 5)
    labels = torch.randint(40, (3,))
    before = launch.kept_shape(x, w, torch.float32, 1 << 20)
    loss = fmf.arcface(x, w, labels, backend="triton", memory_budget=1 << 20)
    _save()
    assert launch.kept_shape(x, w, torch.float32, 1 << 20) == before
    (expected,) = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), x)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    loss = fmf.arcface(x, w, labels, backend="triton", memory_budget=1 << 20)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.usefixtures("few")
def test_a_wrong_candidate_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    default = _default()
    wrong = tiles.Tile(16, 16, 16, 1, 1)
    launch_chunked = launch._chunked

    def corrupting(call, left):
        partial = launch_chunked(call, left)
        if call.p.tiles.gradient == wrong:
            call.gradients.w.mul_(1.5)
        return partial

    def candidates(present: tiles.Tiles, operands: str, *sizes: int):
        for tile in (present.gradient, wrong):
            yield "gradient", tile

    monkeypatch.setattr(launch, "_chunked", corrupting)
    monkeypatch.setattr(tuning, "candidates", candidates)
    result = tuning.tune(**TINY, device="cpu", save=False)
    assert result.tiles.gradient == default.gradient
    assert "relative error" in result.rows[1]["error"]
    assert not tuned.cache_file().exists()


@pytest.mark.usefixtures("few")
def test_time_runs_out() -> None:
    result = tuning.tune(**TINY, device="cpu", seconds=0.0)
    assert not result.complete
    assert result.tiles == _default()


NO_POWER_OF_2: dict[str, Any] = {
    name: [48, 16, 16, 1, 1] for name in ("forward", "gradient", "weight", "embeddings")
}
BROKEN = {
    "empty": b"",
    "no version": b"{}",
    "a list": b"[1]",
    "entries are a list": b'{"version": 1, "entries": [1]}',
    "an empty entry": b'{"version": 1, "entries": {"a": {}}}',
    "another version": b'{"version": 99, "entries": {}}',
    "not text": b"\xff\xfe",
    "no power of 2": json.dumps(
        {"version": 1, "entries": {"a": NO_POWER_OF_2 | {"fused": []}}}
    ).encode(),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_left_alone(directory: Path, text: bytes) -> None:
    directory.mkdir()
    (directory / "tiles.json").write_bytes(text)
    with pytest.warns(UserWarning, match=r"the default tiles are used\. Remove the file") as caught:
        assert _plan() == _default()
    assert caught[0].filename == __file__
    with pytest.raises(tuned.UnusableFileError):
        _save()
    assert (directory / "tiles.json").read_bytes() == text


def test_a_directory_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_MARGIN_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="saved tiles can't be read"):
        assert _plan() == _default()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_another_user_s_file_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _save()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    tuned.forget()
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert _plan() == _default()


def test_no_candidate_is_cut_down() -> None:
    """It would be saved without having run."""
    base = tiles.default("sm_90", "bf16")
    for num_rows, num_classes, dim in ((16, 100_000, 512), (512, 10, 512), (512, 100_000, 32)):
        candidates = list(tuning.candidates(base, "bf16", num_rows, num_classes, dim))
        for kernel, tile in candidates:
            present = {base.forward, base.gradient, base.weight, base.embeddings}
            fused = base.for_fused(dim)
            if tile in present or (fused and tile in fused):
                continue
            cut = tiles.cut(tile, num_rows, num_classes, dim)
            for axis in tiles.AXES.get(kernel, ("n", "c"))[:2]:
                assert getattr(cut, axis) == getattr(tile, axis)
    first = [kernel for kernel, _ in tuning.candidates(base, "bf16", 512, 100_000, 64)][:6]
    assert len(set(first)) == 6, "kernels take turns"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tuning_on_demand(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    context: Any,
) -> None:
    """Only with the variable, and only once."""
    monkeypatch.setattr(tuning, "_tried", set())
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    labels = torch.randint(7, (3,))
    fmf.arcface(x, w, labels, backend="triton").backward()
    assert not directory.exists(), "nothing is tuned unasked"
    monkeypatch.setenv("FUSED_MARGIN_TUNE", "1")
    with context():
        fmf.arcface(x, w, labels, backend="triton")
    assert "tuning tiles for N, C, D = (3, 7, 5), ieee" in capsys.readouterr().err
    before = tuned.cache_file().stat().st_mtime_ns
    fmf.arcface(x, w, labels, backend="triton").backward()
    assert not capsys.readouterr().err
    assert tuned.cache_file().stat().st_mtime_ns == before


@pytest.mark.usefixtures("few")
def test_tuning_on_demand_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry is for the dtypes of the call."""
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setenv("FUSED_MARGIN_TUNE", "1")
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        fmf.arcface(x, w, torch.randint(7, (3,)), backend="triton")
    (key,) = json.loads(tuned.cache_file().read_text())["entries"]
    assert key.endswith("bf16, x float32, w float32, N <= 16, D <= 16")


@pytest.mark.parametrize("is_described", [True, False])
def test_tuning_on_demand_is_for_weights_as_the_call_has_them(
    monkeypatch: pytest.MonkeyPatch, is_described: bool
) -> None:
    """Tiles by descriptors are saved for calls that can use them, others for those that can't."""
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setattr(planning, "LAUNCH_BOUND", 0)
    asked: list[tuning._Setting] = []
    monkeypatch.setattr(tuning, "_tune", lambda setting, **_: asked.append(setting))
    x, w = torch.randn(3, 8), torch.randn(7, 8) if is_described else torch.randn(8, 7).t()
    tuning.tune_once(x, w, torch.float32)
    (setting,) = asked
    sizes, dtype, weight_dtype, _, device, offset = setting
    assert sizes == (3, 7, 8)
    work = tuning._Step.make(*sizes, dtype, weight_dtype, device, offset)
    assert planning.describable(work.x, work.w) is is_described
    assert work.w.is_leaf
    assert work.w.requires_grad


@pytest.mark.usefixtures("few")
def test_where_nothing_can_be_saved(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and the next step doesn't try again."""
    directory.mkdir()
    (directory / "tiles.json").write_text("broken")
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setenv("FUSED_MARGIN_TUNE", "1")
    x, w, labels = torch.randn(3, 5), torch.randn(7, 5), torch.randint(7, (3,))
    with (
        pytest.warns(UserWarning, match="the default tiles are used") as of_file,
        pytest.warns(UserWarning, match="tuning failed, training goes on without") as of_tuning,
    ):
        fmf.arcface(x, w, labels, backend="triton")
    # where the loss is called, past torch's frames and the package's
    ours = [item for item in (*of_file, *of_tuning) if item.category is UserWarning]
    assert {item.filename for item in ours} == {__file__}
    fmf.arcface(x, w, labels, backend="triton")


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
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "nothing saved"
    kernels = [line.split()[0] for line in lines]
    assert len(set(kernels)) == 6
    assert len(lines) == 10, "two for each, but one where D cuts the others down"
    assert all(" ms" in line for line in lines)
    assert not tuned.cache_file().exists()
    tuning.main(arguments[:-1])
    assert f"saved to {tuned.cache_file()}, for interpreter, triton" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--n", "0"], "--n must be at least 1, got 0"),
        (["--device", "cpu", "--c", "1"], "--c must be at least 2, got 1"),
        (["--device", "cpu", "--d", "-1"], "--d must be at least 1, got -1"),
        (["--device", "cpu", "--n", "x"], "argument --n: invalid int value: 'x'"),
        (["--device", "cpu", "--seconds", "nan"], "--seconds must be a number from 0 up, got nan"),
        (["--device", "cpu", "--seconds", "-1"], "--seconds must be a number from 0 up, got -1.0"),
        (["--device", "tpu"], "--device must be cuda, cuda:INDEX or cpu, got 'tpu'"),
        (["--device", "meta"], "no kernels for device meta"),
        (["--device", "cuda"], "no GPU: torch.cuda.is_available() is false"),
    ],
)
def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit, match="2"):
        tuning.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_a_file_that_cannot_be_used_on_the_command_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "tiles.json").write_text("{")
    sizes = ["--n", "3", "--c", "7", "--d", "5", "--dtype", "fp32"]
    with (
        pytest.warns(UserWarning, match="the default tiles are used"),
        pytest.raises(SystemExit, match="2"),
    ):
        tuning.main(["--device", "cpu", *sizes])
    assert f"{directory / 'tiles.json'} can't be read" in capsys.readouterr().err
