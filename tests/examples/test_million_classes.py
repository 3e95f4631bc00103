"""The example of a million classes, with fewer: it learns, resumes, and says what it takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import million_classes
import numpy as np
import pytest
import torch
from helpers import ROOT
from million_command import LOSSES, SMALL, call_in_step, read_run, run_main, small_training
from study import memory as memory_module

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(million_classes, "train_step", refuse)


# --- the script -----------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    given = [*SMALL[:-1], "--seed", "7", "--lr", "0.002", "--threads", "1", "--json", str(path)]
    done = subprocess.run(
        [
            sys.executable, "-W", "error", str(ROOT / "examples" / "million_classes.py"), *given,
            "--checkpoint-every", "2", "--compare-eager",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [path]  # no checkpoint of a run that is finished
    content = json.loads(path.read_text())
    assert content["settings"] == {
        "experiment": "million_classes", "classes": 2000, "embedding": 16, "batch": 32, "steps": 6,
        "identities_seen": 40, "lr": 0.002, "weight_lr": None, "noise": million_classes.NOISE,
        "device": "cpu",
    }  # fmt: skip
    assert content["versions"]["torch"] == torch.__version__

    run = read_run(path)
    scale = math.sqrt(2) * math.log(1999)
    assert (run["loss"], run["seed"], run["margin"]) == ("fixed_adacos", 7, None)
    assert run["scale"] == pytest.approx(scale)
    assert run["weight_lr"] == pytest.approx(32 / scale)
    assert len(run["losses"]) == len(run["seconds"]) == 6
    assert run["steps_per_second"] > 0
    weights = 4 * 2000 * 16
    assert run["memory"]["class_weights"] == run["memory"]["gradient"] == weights
    assert run["memory"]["eager_by_formula"] == 12 * 2000 * 32

    comparison = read_run(path, "comparison")
    assert comparison["fused"]["loss"] == pytest.approx(comparison["eager"]["loss"], rel=1e-5)
    assert len(comparison["fused"]["seconds"]) == len(comparison["eager"]["seconds"]) == 3

    lines = done.stdout.splitlines()
    assert f"training loss {run['losses'][0]:.2f} in step 1" in lines[0]
    assert f"ln C is {math.log(2000):.2f}" in lines[0]
    trained = next(line for line in lines if line.startswith("the 40 identities trained on"))
    others = next(line for line in lines if line.startswith("the 1,960 others"))
    for name, line in (("trained", trained), ("untrained", others)):
        before, after = run["before"][name], run["after"][name]
        numbers = line.split()[-6:]
        assert numbers[:2] == [f"{before['loss']:.2f}", f"{after['loss']:.2f}"]
        assert numbers[2::2] == [f"{before['accuracy']:.1f}", f"{after['accuracy']:.1f}"]
    assert any(line.startswith("careful eager code ") for line in lines)
    assert "2,000 classes x 16, batches of 32 from 40 of them" in done.stderr
    assert "100%" in done.stderr
    assert "6/6 steps" in done.stderr
    assert f"loss {run['losses'][-1]:.2f}, " in done.stderr
    assert " steps/s]" in done.stderr


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(tmp_path: Path, loss: str) -> None:
    path = tmp_path / "result.json"
    assert run_main("--loss", loss, "--steps", "60", "--json", str(path)) == 0
    run = read_run(path)
    before, after = run["before"]["trained"], run["after"]["trained"]
    assert np.mean(run["losses"][-5:]) < run["losses"][0] / 2
    assert after["loss"] < before["loss"] / 2
    assert before["accuracy"] < 5
    assert after["accuracy"] > 80
    # New samples of new classes: nothing can have been learned of their weights.
    assert run["after"]["untrained"]["accuracy"] < 5
    if loss == "fixed_adacos":
        # Random directions: ln C, and s^2 / (2 D) for the spread of the cosines.
        assert before["loss"] == pytest.approx(math.log(2000) + run["scale"] ** 2 / 32, abs=1)


def test_all_classes_can_be_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--classes", "40", "--steps", "1") == 0
    output = capsys.readouterr().out
    assert "the 40 identities trained on" in output
    assert "others" not in output


def test_only_the_report_when_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main("--steps", "1", "--compare-eager") == 0
    assert capfd.readouterr().err == ""


# --- training -------------------------------------------------------------------------------------


def test_class_weights_are_trained_without_moments() -> None:
    training, _ = small_training()
    before = training.criterion.weight.detach().clone()
    _, labels = training.identities.batch(0, 32)
    million_classes.train_step(training, 0, 32)
    moved = (training.criterion.weight - before).norm(dim=1)
    assert (moved > 0).all()  # every class is in the softmax
    drawn = torch.zeros(2000, dtype=torch.bool).index_fill_(0, labels, True)
    # A class that occurs moves by about its length, 1, for each sample; others hardly.
    assert moved[drawn].min() > 0.5
    assert moved[~drawn].mean() < 0.02
    assert not training.weight_optimizer.state


def test_evaluation_is_of_the_whole_sample() -> None:
    training, _ = small_training()
    result = million_classes.evaluate(training, 100)  # the last of 512 rows are a smaller batch
    for name, among in (
        ("trained", training.identities.trained),
        ("untrained", training.identities.untrained),
    ):
        observations, labels = training.identities.fresh(among)
        with torch.no_grad():
            embeddings = training.network(observations)
            logits = training.criterion.logits(embeddings)
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert result[name]["loss"] == pytest.approx(expected, rel=1e-5)
        accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
        assert result[name]["accuracy"] == pytest.approx(accuracy)


def test_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"

    def spoil() -> None:
        bad = torch.tensor(math.nan, requires_grad=True)
        monkeypatch.setattr(fm.FixedAdaCosLoss, "forward", lambda *_: bad)

    call_in_step(monkeypatch, 2, spoil)
    assert run_main("--json", str(path)) == 1
    assert "step 3: loss nan; lower --lr or --weight-lr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- refusals -------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error, after the usage."""
    with pytest.raises(SystemExit) as caught:
        run_main(*arguments)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage:")
    return error


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "2"], "--classes: expected a whole number of at least 3, got '2'"),
        (["--classes", "1e6"], "--classes: expected a whole number of at least 3, got '1e6'"),
        (
            ["--embedding", "0"],
            "--embedding-size: expected a whole number from 1 to 65536, got '0'",
        ),
        (["--batch", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--steps", "-1"], "--steps: expected a whole number of at least 1, got '-1'"),
        (["--identities-seen", "2001"], "--identities-seen 2001: there are only 2000 --classes"),
        (["--loss", "softmax"], "--loss: invalid choice: 'softmax'"),
        (["--seed", "-1"], "--seed: expected a whole number of at least 0, got '-1'"),
        (["--lr", "0"], "--lr: expected a number above 0, at most 10, got '0'"),
        (["--weight-lr", "nan"], "--weight-lr: expected a number above 0, at most 1e+06"),
        (["--threads", "0"], "--threads: expected a whole number from 1 to 1024, got '0'"),
        (["--threads", "100000"], "--threads: expected a whole number from 1 to 1024"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--json", "no/such/folder/result.json"], "--json: can't write 'no/such/folder/"),
        (["--resume"], "--resume needs --json FILE"),
        (["--checkpoint-every", "5"], "--checkpoint-every needs --json FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.usefixtures("no_training")
def test_nothing_to_resume_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    error = refused(capsys, "--json", str(path), "--resume")
    assert f"there is neither {path} nor {path}.checkpoint" in error


def test_a_file_of_results_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    assert run_main("--json", str(path), "--steps", "1") == 0
    capsys.readouterr()
    call_in_step(monkeypatch, 0, lambda: pytest.fail("training began"))
    assert "add --resume" in refused(capsys, "--json", str(path), "--steps", "1")
    error = refused(capsys, "--json", str(path), "--steps", "2", "--resume")
    assert "other settings (steps 1, now 2)" in error
    path.write_text("{}")
    assert "not the results of a study" in refused(capsys, "--json", str(path), "--resume")


@pytest.mark.usefixtures("no_training")
def test_too_little_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda _: 1 << 30)
    error = refused(capsys, "--classes", "1000000", "--embedding", "128")
    assert "1.24 GiB of memory needed for 1,000,000 classes x 128" in error
    assert "(weights and gradient 0.95), 1.00 GiB available" in error
    assert "lower --classes, --embedding or --batch" in error
    assert "--compare-eager" not in error


def test_memory_is_checked_for_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda _: 400 << 20)
    size = ["--classes", "100000", "--batch", "128", "--steps", "1"]
    assert "leave out --compare-eager, or lower" in refused(capsys, *size, "--compare-eager")
    assert run_main(*size) == 0


def test_unknown_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_module, "available_bytes", lambda _: None)
    assert run_main("--steps", "1") == 0
    assert "doesn't say how much memory is available: not checked" in capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
def test_too_little_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(free=200_000)  # a checkpoint is 128,000
    monkeypatch.setattr(memory_module.shutil, "disk_usage", lambda _: usage)
    error = refused(capsys, "--json", str(tmp_path / "result.json"))
    assert f"is free in {tmp_path}" in error
