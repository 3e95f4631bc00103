"""The example of a million classes goes on after an interruption, and refuses other files."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import million_classes
import pytest
import torch
from million_command import call_in_step, press_ctrl_c, read_run, run_main

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = ("seconds", "steps_per_second", "measuring_seconds", "checkpoint_seconds", "memory")


@pytest.fixture
def final_weights(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Class weights and network at each evaluation."""
    kept: list[torch.Tensor] = []
    evaluate = million_classes.evaluate

    def wrapped(training: Any, batch: int) -> dict[str, Any]:
        parameters = [training.criterion.weight, *training.network.parameters()]
        kept.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        return evaluate(training, batch)

    monkeypatch.setattr(million_classes, "evaluate", wrapped)
    return kept


def without_times(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in TIMES}


@pytest.mark.parametrize("loss", ["fixed_adacos", "arcface"])
def test_resumed_after_ctrl_c_is_the_same_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    final_weights: list[torch.Tensor],
    loss: str,
) -> None:
    whole, path = tmp_path / "whole.json", tmp_path / "result.json"
    assert run_main("--loss", loss, "--json", str(whole)) == 0
    with monkeypatch.context() as patch:
        call_in_step(patch, 2, press_ctrl_c)
        assert run_main("--loss", loss, "--json", str(path)) == 130
    # The step during which it was pressed is finished.
    assert "interrupted after 3 of 6 steps; --resume goes on" in capsys.readouterr().err
    assert not path.exists()
    assert (tmp_path / "result.json.checkpoint").exists()
    steps: list[int] = []
    with monkeypatch.context() as patch:
        for step in range(6):
            call_in_step(patch, step, lambda step=step: steps.append(step))
        assert run_main("--loss", loss, "--json", str(path), "--resume") == 0
    assert steps == [3, 4, 5]
    assert without_times(read_run(path)) == without_times(read_run(whole))
    assert len(read_run(path)["seconds"]) == 6
    assert final_weights[-1].equal(final_weights[1])
    assert len(final_weights) == 4  # what was measured before is in the checkpoint
    assert sorted(tmp_path.iterdir()) == [path, whole]


def test_resumed_after_a_crash_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final_weights: list[torch.Tensor]
) -> None:
    whole, path = tmp_path / "whole.json", tmp_path / "result.json"
    assert run_main("--json", str(whole)) == 0

    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        call_in_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run_main("--json", str(path), "--checkpoint-every", "2")
    saved = torch.load(tmp_path / "result.json.checkpoint", weights_only=True)
    assert len(saved["state"]["progress"]["losses"]) == 4
    assert run_main("--json", str(path), "--resume", "--checkpoint-every", "2") == 0
    assert without_times(read_run(path)) == without_times(read_run(whole))
    assert final_weights[-1].equal(final_weights[1])


def test_ctrl_c_without_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_in_step(monkeypatch, 0, press_ctrl_c)
    assert run_main() == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "interrupted after 1 of 6 steps; nothing is kept without --json" in captured.err


def test_second_ctrl_c_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()
        raise AssertionError("not stopped")

    call_in_step(monkeypatch, 1, press_twice)
    assert run_main() == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_finished_run_is_reported_again_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    assert run_main("--json", str(path), "--compare-eager") == 0
    printed, content = capsys.readouterr().out, path.read_text()
    call_in_step(monkeypatch, 0, lambda: pytest.fail("trained again"))
    assert run_main("--json", str(path), "--compare-eager", "--resume") == 0
    assert capsys.readouterr().out == printed
    assert path.read_text() == content


def test_losses_and_seeds_can_be_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert run_main("--json", str(path), "--steps", "1") == 0
    for more in (["--seed", "1"], ["--loss", "cosface"]):
        assert run_main("--json", str(path), "--steps", "1", "--resume", *more) == 0
    runs = json.loads(path.read_text())["runs"]
    keys = [(run["loss"], run["seed"]) for run in runs]
    assert keys == [("fixed_adacos", 0), ("fixed_adacos", 1), ("cosface", 0)]
    assert runs[0]["losses"] != runs[1]["losses"]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a run that was interrupted and left a checkpoint."""
    path = tmp_path / "result.json"
    with monkeypatch.context() as patch:
        call_in_step(patch, 0, press_ctrl_c)
        assert run_main("--json", str(path)) == 130
    yield path
    assert not path.exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--seed", "1"], "of a run with another --loss or --seed"),
        (["--loss", "arcface"], "of a run with another --loss or --seed"),
        (["--lr", "0.1"], "begun with other settings (lr 0.001, now 0.1)"),
        (["--steps", "7"], "begun with other settings (steps 6, now 7)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    interrupted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    other: list[str],
    message: str,
) -> None:
    call_in_step(monkeypatch, 0, lambda: pytest.fail("training began"))
    with pytest.raises(SystemExit) as caught:
        run_main("--json", str(interrupted), "--resume", *other)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert interrupted.with_name("result.json.checkpoint").exists()


def test_a_damaged_checkpoint_is_refused(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupted.with_name("result.json.checkpoint")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(SystemExit) as caught:
        run_main("--json", str(interrupted), "--resume")
    assert caught.value.code == 2
    assert f"{checkpoint}: can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02."])
def test_a_checkpoint_of_junk_is_named(
    interrupted: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    checkpoint = interrupted.with_name("result.json.checkpoint")
    checkpoint.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run_main("--json", str(interrupted), "--resume")
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {checkpoint}: can't be read (" in error
    assert error.endswith("); remove it to train this run from its beginning")


@pytest.mark.parametrize(
    ("name", "value"),
    [("network", {}), ("criterion", 1), ("network_optimizer", {}), ("progress", {"losses": 3})],
)
def test_a_checkpoint_of_another_shape_is_named(
    interrupted: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    checkpoint = interrupted.with_name("result.json.checkpoint")
    content = torch.load(checkpoint, weights_only=True)
    content["state"][name] = value
    torch.save(content, checkpoint)
    with pytest.raises(SystemExit, match="2"):
        run_main("--json", str(interrupted), "--resume")
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {checkpoint}: not the state of this run (" in error
    assert error.endswith("); remove it to train this run from its beginning")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "can't be read"), ("7", "not the results"), (None, "'losses' is missing")],
)
def test_a_file_of_junk_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "result.json"
    assert run_main("--json", str(path)) == 0
    path.write_text(path.read_text().replace('"losses"', '"l"') if content is None else content)
    with pytest.raises(SystemExit, match="2"):
        run_main("--json", str(path), "--resume")
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {path}: " in error
    assert message in error
    assert "name another file" in error
