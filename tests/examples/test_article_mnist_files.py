"""The first experiment goes on after an interruption, and refuses files that it can't use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mnist_command import run_main, without_times
from mnist_files import write_mnist
from study import store, training

pytestmark = pytest.mark.usefixtures("one_thread")


def interrupt(monkeypatch: pytest.MonkeyPatch, after_epochs: int, error: BaseException) -> None:
    train_epoch, calls = training.train_epoch, []

    def stops(*arguments: Any) -> float:
        if len(calls) == after_epochs:
            raise error
        calls.append(arguments)
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "train_epoch", stops)


@pytest.mark.parametrize("after_epochs", [0, 1, 2, 3])
def test_interrupted_and_resumed(
    mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after_epochs: int,
) -> None:
    options = ["--losses", "arcface", "fixed_adacos", "--seeds", "0"]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert run_main(mnist, *options, "--json", str(whole)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, after_epochs, KeyboardInterrupt())
        assert run_main(mnist, *options, "--json", str(parts)) == 130
    captured = capsys.readouterr()
    message = f"interrupted with {after_epochs // 2} of 2 runs finished"
    hint = "; --resume goes on from the last epoch\n" if after_epochs else "\n"
    assert message + hint in captured.err
    assert (tmp_path / "parts.json.checkpoint").exists() == (after_epochs % 2 == 1)
    resume = ["--resume"] * bool(after_epochs)  # before the first epoch there is nothing to keep
    assert run_main(mnist, *options, "--json", str(parts), *resume) == 0
    assert without_times(parts) == without_times(whole)
    assert not (tmp_path / "parts.json.checkpoint").exists()

    assert run_main(mnist, *options, "--json", str(parts), "--resume") == 0  # nothing is left
    assert without_times(parts) == without_times(whole)


def test_seeds_can_be_added(mnist: Path, tmp_path: Path) -> None:
    options = ["--losses", "fixed_adacos", "--json", str(tmp_path / "runs.json")]
    assert run_main(mnist, *options, "--seeds", "0") == 0
    assert run_main(mnist, *options, "--seeds", "0", "1", "--resume") == 0
    runs = without_times(tmp_path / "runs.json")
    assert [run["seed"] for run in runs] == [0, 1]
    assert runs[0]["losses"] != runs[1]["losses"]


@pytest.fixture
def begun(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study that was interrupted after its first epoch: a checkpoint, and no file yet."""
    path = tmp_path / "begun.json"
    with monkeypatch.context() as patch:
        interrupt(patch, 1, KeyboardInterrupt())
        assert run_main(mnist, "--losses", "arcface", "--json", str(path)) == 130
    assert not path.exists()
    return path


def test_a_checkpoint_is_not_lost_by_a_forgotten_resume(
    mnist: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = begun.with_name("begun.json.checkpoint")
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit):
        run_main(mnist, "--losses", "arcface", "--json", str(begun))
    assert f"{checkpoint} exists; add --resume" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_and_kept(
    mnist: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = begun.with_name("begun.json.checkpoint")
    before = checkpoint.read_bytes()
    options = ["--losses", "arcface", "--json", str(begun), "--resume"]
    assert run_main(mnist, *options, "--lr", "0.002") == 1
    assert "begun with other settings (lr 0.001, now 0.002)" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


def test_nothing_to_resume_is_an_error(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(mnist, "--json", str(tmp_path / "typo.json"), "--resume")
    assert "--resume: there is neither" in capsys.readouterr().err


def test_other_images_are_not_mixed_in(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.json"
    options = ["--losses", "fixed_adacos", "--json", str(path)]
    assert run_main(mnist, *options, "--seeds", "0", "--limit", "40") == 0
    other = tmp_path / "other"
    write_mnist(other)
    name = "t10k-images-idx3-ubyte"
    content = bytearray((other / name).read_bytes())
    content[-1] ^= 255  # one pixel
    (other / name).write_bytes(content)
    with pytest.raises(SystemExit):
        run_main(other, *options, "--seeds", "1", "--limit", "40", "--resume")
    assert "begun with other settings (images_sha256" in capsys.readouterr().err


def test_runs_of_another_process_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    first = store.Runs(path, {}, resume=False)
    second = store.Runs(path, {}, resume=False)
    first.add({"k": 1}, {})
    with pytest.raises(store.StoreError, match="was changed by another process"):
        second.add({"k": 2}, {})
    first.add({"k": 3}, {})
    assert [run["k"] for run in json.loads(path.read_text())["runs"]] == [1, 3]


def test_a_checkpoint_that_cant_be_written_is_an_error(
    mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(store.torch, "save", full)
    assert run_main(mnist, "--losses", "arcface", "--json", str(tmp_path / "runs.json")) == 1
    assert "runs.json.checkpoint: can't be written (disk full)" in capsys.readouterr().err


def test_lines_over_other_seeds_are_pointed_out(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--json", str(tmp_path / "runs.json")]
    assert run_main(mnist, *options, "--losses", "arcface", "cosface", "--seeds", "0") == 0
    assert "some runs are missing" not in capsys.readouterr().out
    assert run_main(mnist, *options, "--losses", "arcface", "--seeds", "1", "--resume") == 0
    assert "some runs are missing" in capsys.readouterr().out


def spoil_settings(path: Path) -> None:
    content = json.loads(path.read_text())
    content["settings"]["epochs"] = 9
    path.write_text(json.dumps(content))


def spoil_torch(path: Path) -> None:
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))


def test_another_platform_may_add_runs(mnist: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    options = ["--losses", "fixed_adacos", "--json", str(path)]
    assert run_main(mnist, *options, "--seeds", "0") == 0
    content = json.loads(path.read_text())
    content["versions"]["platform"] = "elsewhere"
    path.write_text(json.dumps(content))
    assert run_main(mnist, *options, "--seeds", "0", "1", "--resume") == 0
    content = json.loads(path.read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    assert content["versions"]["platform"] == "elsewhere"


@pytest.mark.parametrize(
    ("spoil", "resume", "message"),
    [
        (lambda path: None, False, "exists; add --resume to go on with it"),
        (spoil_settings, True, "begun with other settings (epochs 9, now 2)"),
        (spoil_torch, True, "begun with other versions (torch '1.0', now"),
        (lambda path: path.write_text("{"), True, "can't be read"),
        (lambda path: path.write_text("[]"), True, "not the results of a study"),
        (
            lambda path: path.write_text('{"settings": [], "versions": {}, "runs": null}'),
            True,
            "not the results of a study",
        ),
    ],
    ids=["no --resume", "other settings", "other torch", "damaged", "other file", "other types"],
)
def test_a_file_of_results_that_cant_be_used(
    mnist: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    resume: bool,
    message: str,
) -> None:
    path = tmp_path / "runs.json"
    options = ["--losses", "fixed_adacos", "--seeds", "0", "--json", str(path)]
    assert run_main(mnist, *options) == 0
    spoil(path)
    before = path.read_text()
    with pytest.raises(SystemExit):
        run_main(mnist, *options, *["--resume"] * resume)
    assert message in capsys.readouterr().err
    assert path.read_text() == before


def test_a_damaged_checkpoint_is_an_error(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.json.checkpoint").write_bytes(b"PK\x03\x04 not a checkpoint")
    options = ["--losses", "fixed_adacos", "--json", str(tmp_path / "runs.json"), "--resume"]
    assert run_main(mnist, *options) == 1
    assert "runs.json.checkpoint: can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"{}",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
        b"\x80",
        b"\n",
        bytes(100),
        b"PK\x03\x04",
    ],
)
def test_a_checkpoint_of_junk_is_named(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "runs.json.checkpoint"
    path.write_bytes(content)
    options = ["--losses", "fixed_adacos", "--json", str(tmp_path / "runs.json"), "--resume"]
    assert run_main(mnist, *options) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path}: can't be read (")
    assert error.endswith("); remove it to train this run from its beginning")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ((), [1], "not a checkpoint of a study"),
        (("key",), None, "not a checkpoint of a study"),
        (("settings",), [1], "not a checkpoint of a study"),
        (("state",), None, "not a checkpoint of a study"),
        (("state",), {}, "not the state of this run (KeyError: 'progress')"),
        (("state", "progress"), None, "not the state of this run (TypeError: "),
        (("state", "progress"), {"losses": 3}, "not the state of this run (TypeError: "),
        (("state", "progress"), {"epochs": []}, "not the state of this run (TypeError: "),
        (("state", "network"), {}, "not the state of this run (RuntimeError: "),
        (("state", "criterion"), [], "not the state of this run (TypeError: "),
        (("state", "optimizer"), {}, "not the state of this run (KeyError: "),
        (("state", "order"), 5, "not the state of this run (TypeError: "),
        (("state", "random"), [], "not the state of this run (IndexError: "),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_checkpoint_of_another_shape_is_named(
    mnist: Path,
    begun: Path,
    capsys: pytest.CaptureFixture[str],
    part: tuple[str, ...],
    value: Any,
    message: str,
) -> None:
    path = begun.with_name("begun.json.checkpoint")
    content = {"whole": torch.load(path, weights_only=True)}
    holder: Any = content
    for name in ("whole", *part)[:-1]:
        holder = holder[name]
    holder[("whole", *part)[-1]] = value
    torch.save(content["whole"], path)
    assert run_main(mnist, "--losses", "arcface", "--json", str(begun), "--resume") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {path}: {message}")
    assert error.endswith("; remove it to train this run from its beginning")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: "", "can't be read (JSONDecodeError: "),
        (lambda content: "\0\0", "can't be read (JSONDecodeError: "),
        (lambda content: "[" * 100_000, "can't be read (RecursionError: "),
        (lambda content: json.dumps({**content, "runs": [1]}), "not the results of a study"),
        (lambda content: json.dumps({**content, "runs": [{}]}), "'loss' is missing"),
        (lambda content: json.dumps(content).replace("seconds", "s"), "'seconds' is missing"),
        (
            lambda content: json.dumps(content).replace(
                '"test_nearest": ', '"test_nearest": "%", "": '
            ),
            "not what its script writes (TypeError: ",
        ),
    ],
)
def test_a_file_of_junk_is_named_before_training(
    mnist: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Any], str],
    message: str,
) -> None:
    path = tmp_path / "runs.json"
    options = ["--losses", "fixed_adacos", "--json", str(path), "--seeds", "0"]
    assert run_main(mnist, *options) == 0
    path.write_text(spoil(json.loads(path.read_text())))
    before = path.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_main(mnist, *options, "1", "--resume")
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert f"error: {path}: " in error
    assert message in error
    assert "name another file" in error
    assert captured.out == ""
    assert path.read_text() == before
