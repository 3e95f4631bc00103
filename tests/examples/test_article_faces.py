"""The second experiment trains, measures, goes on after an interruption, refuses what can't be."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import article_faces
import pytest
import torch
from faces_command import LOSSES, QUICK, SIZE, count_epochs, read_runs, run_main, table_rows
from helpers import ROOT
from study import criteria, networks, runner, training
from torch import nn

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = ["arcface+regular_face", "fixed_adacos", "adacos", "cross_entropy"]


def without_seconds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def test_end_to_end(people: Path, tmp_path: Path) -> None:
    path = tmp_path / "faces.json"
    done = subprocess.run(
        [
            sys.executable, "-W", "error", str(ROOT / "examples" / "article_faces.py"),
            "--images", str(people), *QUICK, "--seeds", "0", "1", "--json", str(path),
        ],
        # batches too small for a second thread; MKL's own variable would win
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    settings, runs = content["settings"], content["runs"]
    names = [f"g{group}/s{person}" for group in range(4) for person in range(3)]
    assert sorted(chain(*settings["folds"])) == names
    assert [len(fold) for fold in settings["folds"]] == [6, 6]
    expected = {
        "experiment": "faces", "images": "people", "count": 72, "channels": 1, "classes": 12,
        "groups": 4, "model": "SmallResidualNetwork", "as_published": False, "image_size": SIZE,
        "pretrained": False, "epochs": 1, "batch_size": 16, "embedding_size": 16, "lr": 0.001,
        "hold_out": "classes", "test_share": 0.2, "flip": True, "precision": "fp32",
        "device": "cpu",
    }  # fmt: skip
    computed = {"folds", "parameters", "images_sha256"}
    assert {name: settings[name] for name in settings if name not in computed} == expected
    network = networks.SmallResidualNetwork(1, 16)
    assert settings["parameters"] == sum(p.numel() for p in network.parameters())
    assert str(tmp_path) not in path.read_text()
    assert content["versions"]["torch"] == torch.__version__

    keys = [(run["seed"], run["fold"], run["loss"]) for run in runs]
    assert keys == [(seed, fold, loss) for seed in (0, 1) for fold in (0, 1) for loss in LOSSES]
    fixed_scale = math.sqrt(2) * math.log(5)
    scales = dict(zip(LOSSES, [64.0, 64.0, 64.0, fixed_scale, None], strict=True))
    margins = dict(zip(LOSSES, [math.radians(28.6)] * 2 + [0.35, None, None], strict=True))
    for run in runs:
        assert run["scale"] == scales[run["loss"]]
        assert run["margin"] == margins[run["loss"]]
        assert (run["classes"], run["train_images"], run["test_images"]) == (6, 30, 6)
        assert (run["held_out_classes"], run["held_out_images"]) == (6, 36)
        assert run["verification"]["genuine_pairs"] == 6 * 15
        assert run["verification"]["impostor_pairs"] == 36 * 35 // 2 - 6 * 15
        assert list(run["verification"]["tar"]) == ["0.1"]  # 540 pairs: 54 of them, or 5
        assert 0 <= run["verification"]["eer"] <= 100
        assert len(run["losses"]) == len(run["seconds"]) == run["threads"] == 1
        for metric in ("test_nearest", "test_nearest_euclidean", "test_arg_max", "train_nearest"):
            assert 0 <= run[metric] <= 100

    rows = table_rows(done.stdout, len(LOSSES))
    assert list(rows) == LOSSES
    assert rows["arcface"][1:4] == ["64.00", "0.50", "rad"]
    assert rows["cosface"][1:4] == ["64.00", "0.35", "cos"]
    assert rows["fixed_adacos"][1:3] == [f"{fixed_scale:.2f}", "–"]
    assert rows["cross_entropy"][1:3] == ["–", "–"]
    assert "TAR % at FAR 10 %" in done.stdout
    for loss in LOSSES:
        by_seed = [
            statistics.fmean(r["test_nearest"] for r in runs if (r["loss"], r["seed"]) == (loss, s))
            for s in (0, 1)
        ]
        cell = f"{statistics.fmean(by_seed):.2f} ± {statistics.stdev(by_seed):.2f}"
        assert cell in done.stdout
        assert rows[loss][-1] == "4"
    assert "trained on 6 / 6 classes, tested on 6 / 6 other images" in done.stdout
    assert "verified on classes never seen: 6 + 6 = 12" in done.stdout
    assert "genuine pairs: 90 + 90 = 180; impostor pairs: 540 + 540 = 1,080" in done.stdout
    assert "±: sample standard deviation over seeds" in done.stdout
    assert "missing" not in done.stdout
    assert "people: 72 images of 12 classes" in done.stderr
    assert "cross_entropy seed 1 fold 1: 100%" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_every_loss_learns(people: Path, tmp_path: Path) -> None:
    path = tmp_path / "faces.json"
    every = [*LOSSES, "adacos", "adaface", "subcenter_arcface"]
    arguments = ["--losses", *every, "--epochs", "5", "--batch-size", "30", "--lr", "0.003"]
    assert run_main(people, *arguments, "--no-flip", "--json", str(path)) == 0
    runs = read_runs(path)
    assert len(runs) == 2 * len(every)
    adacos = [run["scale"] for run in runs if run["loss"] == "adacos"]
    assert all(0 < scale != pytest.approx(math.sqrt(2) * math.log(5)) for scale in adacos)
    for run in runs:
        assert run["test_nearest"] >= 80, run  # chance is 17
        assert run["train_nearest"] >= 80, run
        assert run["losses"][-1] < run["losses"][0], run
        assert run["verification"]["auc"] > 0.8, run  # chance is 0.5


def fail_in_run(
    monkeypatch: pytest.MonkeyPatch, number: int, after_epochs: int, failure: BaseException
) -> None:
    """Fail in the run of this number, counted from 1, when it has trained so many epochs."""
    fit, started = training.fit, []

    def failing(*arguments: Any, **options: Any) -> Iterator[Any]:
        started.append(arguments)
        epochs = fit(*arguments, **options)
        if len(started) != number:
            yield from epochs
            return
        for _ in range(after_epochs):
            yield next(epochs)
        raise failure

    monkeypatch.setattr(runner, "fit", failing)


INTERRUPTIBLE = ["--epochs", "3", "--losses", "arcface+regular_face", "cosface"]


@pytest.fixture(scope="module")
def uninterrupted(
    people: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs and lines printed."""
    path, output = tmp_path_factory.mktemp("whole") / "faces.json", io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(output):
        assert run_main(people, *INTERRUPTIBLE, "--json", str(path)) == 0
    torch.set_num_threads(threads)
    return read_runs(path), output.getvalue().splitlines()


@pytest.mark.parametrize(
    ("run", "after_epochs"),
    [(1, 0), (3, 0), (3, 1), (4, 2), (3, 3)],
    ids=["at-once", "between-runs", "after-an-epoch", "in-the-last-run", "before-measuring"],
)
def test_interrupted_and_resumed_is_as_never_interrupted(
    people: Path,
    uninterrupted: tuple[list[dict[str, Any]], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: int,
    after_epochs: int,
) -> None:
    whole, lines = uninterrupted
    path = tmp_path / "faces.json"
    arguments = [*INTERRUPTIBLE, "--json", str(path)]
    with monkeypatch.context() as patch:
        fail_in_run(patch, run, after_epochs, KeyboardInterrupt())
        assert run_main(people, *arguments) == 130
    captured = capsys.readouterr()
    is_kept = run > 1 or after_epochs > 0
    assert f"interrupted with {run - 1} of 4 runs finished" in captured.err
    assert ("; --resume goes on" in captured.err) == is_kept
    finished = without_seconds(read_runs(path)) if path.exists() else []
    assert finished == without_seconds(whole[: run - 1])
    assert ("some runs are missing" in captured.out) == (run == 4)  # one loss has a run more

    torch.rand(3)  # what was drawn in between makes no difference
    with monkeypatch.context() as patch:
        epochs = count_epochs(patch)
        assert run_main(people, *arguments, *["--resume"] * is_kept) == 0
    assert len(epochs) == 4 * 3 - 3 * (run - 1) - after_epochs
    assert without_seconds(read_runs(path)) == without_seconds(whole)
    after = capsys.readouterr().out.splitlines()
    for line, expected in zip(after[2:4], lines[2:4], strict=True):
        assert line.split()[:-2] == expected.split()[:-2]  # all but the seconds, and the runs
    assert list(tmp_path.iterdir()) == [path]


def test_seeds_and_losses_can_be_added(
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "faces.json"
    assert run_main(people, "--losses", "cosface", "--json", str(path)) == 0
    before = read_runs(path)
    epochs = count_epochs(monkeypatch)
    more = ["--losses", "fixed_adacos", "cosface", "--seeds", "0", "4", "--json", str(path)]
    capsys.readouterr()
    assert run_main(people, *more, "--resume") == 0
    assert len(epochs) == 6
    assert read_runs(path)[:2] == before
    rows = table_rows(capsys.readouterr().out, 2)
    assert {name: row[-1] for name, row in rows.items()} == {"fixed_adacos": "4", "cosface": "4"}


def test_interrupted_without_a_file_still_prints(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_in_run(monkeypatch, 3, 0, KeyboardInterrupt())
    assert run_main(people, "--losses", "cosface", "arcface") == 130
    captured = capsys.readouterr()
    assert "interrupted with 2 of 4 runs finished\n" in captured.err
    assert set(table_rows(captured.out, 2)) == {"cosface", "arcface"}


def test_diverged_run_ends_with_an_error(
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, train_epoch, epochs = tmp_path / "faces.json", training.train_epoch, []

    def diverging(*arguments: Any) -> float:
        epochs.append(1)
        return train_epoch(*arguments) if len(epochs) < 4 else math.nan

    monkeypatch.setattr(training, "train_epoch", diverging)
    arguments = ["--epochs", "2", "--losses", "cosface", "arcface", "--json", str(path)]
    assert run_main(people, *arguments) == 1
    captured = capsys.readouterr()
    assert "error: arcface seed 0 fold 0, epoch 2: loss nan; lower --lr" in captured.err
    assert [run["loss"] for run in read_runs(path)] == ["cosface"]
    assert list(table_rows(captured.out, 1)) == ["cosface"]


def capture_trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keep what every run starts to train with, and the initial weights."""
    fit, captured = training.fit, []

    def capture(
        network: nn.Module, criterion: Any, regularizer: Any, images: Any, labels: Any, recipe: Any,
        seed: int, **options: Any,
    ) -> Iterator[Any]:  # fmt: skip
        captured.append(
            {
                "weights": [p.detach().clone() for p in network.parameters()],
                "class_weights": [p.detach().clone() for p in criterion.parameters()],
                "network": network, "criterion": criterion, "regularizer": regularizer,
                "images": images, "labels": labels, "recipe": recipe, "seed": seed,
            }
        )  # fmt: skip
        yield from fit(network, criterion, regularizer, images, labels, recipe, seed, **options)

    monkeypatch.setattr(runner, "fit", capture)
    return captured


def test_all_losses_start_alike(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture_trainings(monkeypatch)
    losses = LOSSES[1:4]
    assert run_main(people, "--seeds", "0", "1", "--losses", *losses) == 0
    assert len(captured) == 2 * 2 * len(losses)
    runs = [captured[start : start + len(losses)] for start in range(0, 12, len(losses))]
    for same_seed_and_fold in runs:
        first = same_seed_and_fold[0]
        for other in same_seed_and_fold[1:]:
            assert all(map(torch.equal, first["weights"], other["weights"]))
            assert first["images"].equal(other["images"])
            assert first["labels"].equal(other["labels"])
            assert first["seed"] == other["seed"]
            assert first["recipe"] == other["recipe"]
    assert not torch.equal(runs[0][0]["weights"][0], runs[2][0]["weights"][0])


def test_defaults_are_the_mended_experiment(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture_trainings(monkeypatch)
    assert run_main(people) == 0
    for name, run in zip(LOSSES * 2, captured, strict=True):
        recipe = run["recipe"]
        assert recipe == training.Recipe(epochs=1, batch_size=16, lr=1e-3, flip=True)
        with_regularizer = isinstance(run["regularizer"], fm.regularizers.RegularFace)
        assert with_regularizer == ("regular_face" in name)
        assert (run["regularizer"] is None) != with_regularizer
        for network in (run["weights"], run["class_weights"]):
            assert network
        for before, parameter in zip(
            run["class_weights"], run["criterion"].parameters(), strict=True
        ):
            assert not torch.equal(before, parameter)  # class weights are trained


def test_as_published(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured = capture_trainings(monkeypatch)
    assert run_main(people, "--as-published") == 0
    for name, run in zip(PUBLISHED * 2, captured, strict=True):
        recipe = run["recipe"]
        assert (recipe.lr, recipe.train_class_weights) == (0.01, False)
        assert isinstance(run["regularizer"], fm.regularizers.RegularFace) == ("arcface" in name)
        assert isinstance(run["criterion"], criteria.OutputCrossEntropy) == (
            name == "cross_entropy"
        )
        for before, parameter in zip(
            run["class_weights"], run["criterion"].parameters(), strict=True
        ):
            assert torch.equal(before, parameter)
        trained = zip(run["weights"], run["network"].parameters(), strict=True)
        assert not any(torch.equal(before, parameter) for before, parameter in trained)
    assert list(table_rows(capsys.readouterr().out, 4)) == PUBLISHED


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--no-flip"], {"flip": False}),
        (["--lr", "0.003"], {"lr": 0.003}),
        (["--as-published", "--lr", "0.003"], {"lr": 0.003, "train_class_weights": False}),
        (["--precision", "bf16"], {"precision": "bf16"}),
        (["--epochs", "2", "--batch-size", "7"], {"epochs": 2, "batch_size": 7}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_training(
    people: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: dict[str, Any]
) -> None:
    captured = capture_trainings(monkeypatch)
    assert run_main(people, "--losses", "fixed_adacos", *arguments) == 0
    for run in captured:
        assert {name: getattr(run["recipe"], name) for name in expected} == expected
        assert run["network"].precision == run["recipe"].precision


def test_defaults_of_the_command_line() -> None:
    arguments = article_faces.parse_arguments(
        article_faces.make_parser(), ["--images", "somewhere", "--device", "cpu"]
    )
    expected = {
        "image_size": 64, "model": None, "pretrained": False, "as_published": False,
        "losses": LOSSES, "epochs": 10, "batch_size": 16, "embedding_size": 512, "lr": 1e-3,
        "seeds": [0, 1, 2], "folds": 4, "hold_out": "classes", "test_share": 0.2, "flip": True,
        "precision": "fp32", "json": None, "resume": False,
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_mirrored_images_are_trained_on_only_with_flip(
    people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of an epoch, as the network gets them: some mirrored, or none."""
    forward = networks.SmallResidualNetwork.forward
    seen: list[torch.Tensor] = []

    def recording(self: Any, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.append(images.detach().clone())
        return forward(self, images)

    monkeypatch.setattr(networks.SmallResidualNetwork, "forward", recording)
    mirrored = {}
    for arguments in ([], ["--no-flip"]):
        seen.clear()
        captured = capture_trainings(monkeypatch)
        assert run_main(people, "--losses", "cosface", *arguments) == 0
        batches = torch.cat(seen[1:])  # without the check before training
        known = torch.cat([run["images"] for run in captured])
        as_is = (batches[:, None] == known).flatten(2).all(dim=2).any(dim=1)
        turned = (batches.flip(-1)[:, None] == known).flatten(2).all(dim=2).any(dim=1)
        assert (as_is ^ turned).all()
        mirrored[len(arguments)] = int(turned.sum())
    assert mirrored[1] == 0
    assert 15 <= mirrored[0] <= 45  # of 60


def test_threads_are_set(people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert run_main(people, "--losses", "cosface", "--threads", "2") == 0
    assert asked == [2]
