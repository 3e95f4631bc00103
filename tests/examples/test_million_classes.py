"""The example of a million classes, with fewer: it learns, resumes, and says what it takes."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import million_classes
import numpy as np
import pytest
import torch
from helpers import ROOT
from study import identities as identities_module
from study import memory as memory_module
from torch.profiler import ProfilerActivity, profile

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("fixed_adacos", "arcface", "cosface")
SMALL = [
    "--device", "cpu", "--classes", "2000", "--embedding", "16", "--batch", "32", "--steps", "6",
    "--identities-seen", "40", "--quiet",
]  # fmt: skip
TIMES = ("seconds", "steps_per_second", "measuring_seconds", "checkpoint_seconds", "memory")


def run_main(*arguments: str) -> int:
    """Run in this process, where importing torch is already paid for."""
    return million_classes.main([*SMALL, *arguments])


def read_run(path: Path, what: str = "training") -> dict[str, Any]:
    (run,) = [run for run in json.loads(path.read_text())["runs"] if run["what"] == what]
    return run


def identities(num_classes: int = 1000, num_trained: int = 50, seed: int = 0) -> Any:
    return identities_module.Identities(num_classes, num_trained, seed)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(million_classes, "train_step", refuse)


def call_in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` at the beginning of this step, the first being 0."""
    train_step = million_classes.train_step

    def wrapped(training: Any, index: int, batch: int) -> float:
        if index == step:
            action()
        return train_step(training, index, batch)

    monkeypatch.setattr(million_classes, "train_step", wrapped)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


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


# --- identities -----------------------------------------------------------------------------------


def test_a_direction_depends_on_seed_and_class_only() -> None:
    classes = np.array([5, 999_999_999_999, 0, 5])
    rows = identities().directions(classes)
    assert rows.shape == (4, identities_module.LATENT_SIZE)
    assert np.array_equal(rows[0], rows[3])
    # Other company, another order, another object with other classes to choose from.
    again = identities(3000, 7).directions(np.array([0, 17, 999_999_999_999]))
    assert np.array_equal(again[0], rows[2])
    assert np.array_equal(again[2], rows[1])
    assert np.abs(identities(seed=1).directions(classes) - rows).min() > 0


def test_directions_are_uniform_on_the_sphere() -> None:
    size = identities_module.LATENT_SIZE
    rows = identities().directions(np.arange(2000))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    # Means and covariances of 2000 rows: five standard deviations.
    assert np.abs(rows.mean(axis=0)).max() < 5 / math.sqrt(2000 * size)
    covariance = rows.T @ rows / 2000 * size
    assert np.abs(covariance - np.eye(size)).max() < 5 * math.sqrt(2 / 2000)


def test_numbers_next_to_each_other_have_unrelated_streams() -> None:
    made = identities()
    streams = [
        made.generator(stream, number).integers(2**63, size=64)
        for stream in identities_module.Stream
        for number in range(3)
    ]
    assert len(np.unique(np.concatenate(streams))) == 64 * len(streams)


def test_a_batch_depends_on_seed_and_step_only() -> None:
    made = identities()
    observations, labels = made.batch(3, 16)
    made.batch(4, 16)
    for again in (made.batch(3, 16), identities().batch(3, 16)):
        assert again[0].equal(observations)
        assert again[1].equal(labels)
    assert not made.batch(4, 16)[1].equal(labels)
    assert not identities(seed=1).batch(3, 16)[0].equal(observations)
    assert observations.shape == (16, million_classes.OBSERVED_SIZE)
    assert observations.dtype is torch.float32


def test_batches_are_of_trained_classes_and_fresh_samples_new() -> None:
    made = identities(num_classes=5000)
    trained, untrained = set(made.trained.tolist()), set(made.untrained.tolist())
    assert len(trained) == 50
    assert len(untrained) == identities_module.FRESH_SAMPLES
    assert not trained & untrained
    assert max(trained | untrained) > 4500  # from all over the range
    seen = {label for step in range(40) for label in made.batch(step, 32)[1].tolist()}
    assert seen == trained
    observations, labels = made.fresh(made.trained)
    assert set(labels.tolist()) <= trained
    assert set(made.fresh(made.untrained)[1].tolist()) <= untrained
    batches = torch.cat([made.batch(step, len(labels))[0] for step in range(40)])
    assert torch.cdist(observations, batches).min() > 0


def test_samples_of_an_identity_are_alike_and_noisy() -> None:
    made = identities(num_classes=100, num_trained=2)
    observations, labels = made.fresh(made.trained)
    first, second = (observations[labels == label] for label in labels.unique())
    within = (first.mean(dim=0) - first).norm(dim=1).mean()
    between = (first.mean(dim=0) - second.mean(dim=0)).norm()
    assert 0.2 * between < within < 2 * between


def test_identities_take_no_memory() -> None:
    tracemalloc.start()
    try:
        made = identities(num_classes=10**12, num_trained=1024)
        made.batch(0, 128)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


# --- training -------------------------------------------------------------------------------------


def small_training(*arguments: str) -> tuple[Any, Any]:
    parsed = million_classes.parse_arguments(million_classes.make_parser(), [*SMALL, *arguments])
    return million_classes.prepare(parsed), parsed


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


def test_nearest_class_is_the_arg_max(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, weight = torch.randn(20, 8), torch.randn(500, 8) * torch.rand(500, 1)
    expected = (embeddings @ torch.nn.functional.normalize(weight).T).argmax(dim=1)
    for block in (1, 37, 500, 8192):
        monkeypatch.setattr(million_classes, "CLASSES_COMPARED", block)
        assert million_classes.nearest_classes(embeddings, weight).equal(expected)


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


# --- interruption and resumption ------------------------------------------------------------------


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


# --- memory ---------------------------------------------------------------------------------------


def allocated_at_peak(action: Callable[[], object]) -> tuple[int, int]:
    """Peak of what torch allocates meanwhile, and the largest piece, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = np.array([event.nbytes() for event in events])
    return int(changes.cumsum().max()), int(changes.max())


def forward_backward(
    loss: str, num_rows: int, num_classes: int, dim: int, *, eager: bool
) -> Callable[[], None]:
    criterion = million_classes.LOSSES[loss](num_classes, dim)
    embeddings = torch.randn(num_rows, dim, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))

    def step() -> None:
        if eager:
            million_classes.eager_loss(criterion, embeddings, labels).backward()
        else:
            criterion(embeddings, labels).backward()

    return step


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("num_rows", "dim"), [(96, 16), (64, 64), (16, 96)])
def test_eager_code_takes_what_the_formula_says(loss: str, num_rows: int, dim: int) -> None:
    num_classes = 20_000
    step = forward_backward(loss, num_rows, num_classes, dim, eager=True)
    peak, _ = allocated_at_peak(step)
    measured = peak - 4 * num_classes * dim  # without the gradient of the weights
    formula = million_classes.eager_bytes(loss, num_rows, num_classes, dim)
    assert 0.97 * formula < measured < 1.1 * formula


@pytest.mark.parametrize("loss", LOSSES)
def test_training_holds_no_batch_by_classes_matrix(loss: str) -> None:
    num_rows, num_classes, dim = 64, 500_000, 4
    step = forward_backward(loss, num_rows, num_classes, dim, eager=False)
    fm.empty_cache()
    peak, largest = allocated_at_peak(step)
    matrix, gradient = 4 * num_rows * num_classes, 4 * num_classes * dim
    assert largest < 0.4 * matrix
    assert peak - gradient < 0.6 * matrix
    assert peak < million_classes.working_bytes(argparse.Namespace(batch=num_rows, embedding=dim))


def test_evaluation_holds_no_batch_by_classes_matrix() -> None:
    training, _ = small_training("--classes", "100000", "--embedding", "4")
    fm.empty_cache()
    _, largest = allocated_at_peak(lambda: million_classes.evaluate(training, 32))
    assert largest < 0.2 * 4 * identities_module.FRESH_SAMPLES * 100_000


@pytest.mark.parametrize("loss", LOSSES)
def test_eager_code_computes_the_same(loss: str) -> None:
    criterion: Any = million_classes.LOSSES[loss](300, 8).double()
    embeddings, labels = torch.randn(40, 8, dtype=torch.float64), torch.randint(300, (40,))
    with torch.no_grad():  # targets at every angle, past pi - m too
        embeddings[:20] = criterion.weight[labels[:20]] * torch.linspace(-1, 1, 20)[:, None]
        embeddings[:20] += 0.1 * torch.randn(20, 8)
    gradients = []
    for compute in (criterion, lambda *given: million_classes.eager_loss(criterion, *given)):
        leaf = embeddings.clone().requires_grad_()
        criterion.weight.grad = None
        loss_value = compute(leaf, labels)
        loss_value.backward()
        gradients.append((loss_value.detach(), leaf.grad, criterion.weight.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_of_this_process_and_from_now_on() -> None:
    torch.ones(200 << 20, dtype=torch.uint8)  # freed: not to be counted
    memory: Any = million_classes.PeakMemory(torch.device("cpu"))
    assert memory.is_exact
    assert memory.growth() < 8 << 20
    torch.ones(100 << 20, dtype=torch.uint8)
    assert 95 << 20 < memory.growth() < 110 << 20


def test_peak_that_cannot_be_reset_is_reported_as_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text = Path.write_text

    def refuse(path: Path, *given: Any, **named: Any) -> int:
        if path.name == "clear_refs":
            raise PermissionError(path)
        return write_text(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", refuse)
    path = tmp_path / "result.json"
    assert run_main("--json", str(path)) == 0
    assert read_run(path)["memory"]["peak_growth_is_exact"] is False
    assert "all else (network, cosines, ...), at least " in capsys.readouterr().out


def test_available_memory_is_the_least_of_system_and_groups(tmp_path: Path) -> None:
    def write(folder: Path, limit: str, used: int, reclaimable: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\nslab 7\n")

    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    left = memory_module.left_in_control_groups
    write(root / "user" / "session", "1000", 300, 50)
    write(root / "user", "max", 400, 50)
    membership.write_text("4:memory:/elsewhere\n0::/user/session\n")
    assert left(membership, root) == [750]
    write(root, "5000", 400, 0)  # as a container sees its own
    assert left(membership, root) == [750, 4600]
    membership.write_text("4:memory:/elsewhere\n")
    assert left(membership, root) == [4600]
    assert left(tmp_path / "missing", root) == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_available_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = million_classes.available_bytes(torch.device("cpu"))
    assert available is not None
    assert 0 < available <= total


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
    monkeypatch.setattr(million_classes, "available_bytes", lambda _: 1 << 30)
    error = refused(capsys, "--classes", "1000000", "--embedding", "128")
    assert "1.24 GiB of memory needed for 1,000,000 classes x 128" in error
    assert "(weights and gradient 0.95), 1.00 GiB available" in error
    assert "lower --classes, --embedding or --batch" in error
    assert "--compare-eager" not in error


def test_memory_is_checked_for_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(million_classes, "available_bytes", lambda _: 400 << 20)
    size = ["--classes", "100000", "--batch", "128", "--steps", "1"]
    assert "leave out --compare-eager, or lower" in refused(capsys, *size, "--compare-eager")
    assert run_main(*size) == 0


def test_unknown_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(million_classes, "available_bytes", lambda _: None)
    assert run_main("--steps", "1") == 0
    assert "doesn't say how much memory is available: not checked" in capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
def test_too_little_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(free=200_000)  # a checkpoint is 128,000
    monkeypatch.setattr(million_classes.shutil, "disk_usage", lambda _: usage)
    error = refused(capsys, "--json", str(tmp_path / "result.json"))
    assert f"is free in {tmp_path}" in error
