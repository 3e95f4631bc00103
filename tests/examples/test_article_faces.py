"""The second experiment trains, measures, goes on after an interruption, refuses what can't be."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import article_faces
import hypothesis
import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import strategies as st
from PIL import Image
from study import criteria, measure, networks, runner, training
from study import images as images_module
from torch import nn

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = hypothesis.settings(max_examples=50, derandomize=True, deadline=None, database=None)
LOSSES = ["arcface", "arcface+regular_face", "cosface", "fixed_adacos", "cross_entropy"]
PUBLISHED = ["arcface+regular_face", "fixed_adacos", "cross_entropy"]
GROUPS, CLASSES_PER_GROUP, IMAGES = 4, 3, 6
SIZE = 16
QUICK = [
    "--device", "cpu", "--image-size", str(SIZE), "--folds", "2", "--epochs", "1",
    "--batch-size", "16", "--embedding-size", "16", "--seeds", "0",
]  # fmt: skip


def write_people(
    root: Path,
    groups: int = GROUPS,
    classes: int = CLASSES_PER_GROUP,
    images: int = IMAGES,
    color: bool = False,
) -> Path:
    """Write images of 16 x 16: a pattern of each class, with noise."""
    generator = np.random.default_rng(0)
    shape = (SIZE, SIZE, 3) if color else (SIZE, SIZE)
    for group in range(groups):
        for person in range(classes):
            folder = root / f"g{group}" / f"s{person}"
            folder.mkdir(parents=True)
            coarse = generator.integers(0, 256, (4, 4, 3) if color else (4, 4))
            pattern = coarse.repeat(4, axis=0).repeat(4, axis=1)
            for image in range(images):
                noisy = pattern + generator.integers(-30, 31, shape)
                pixels = noisy.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("people") / "people")


@pytest.fixture(scope="module")
def data(people: Path) -> Any:
    return images_module.load_folder(people, SIZE)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(training, "train_epoch", refuse)


def run_main(people: Path, *arguments: str) -> int:
    """Run in this process, where importing torch is already paid for."""
    return article_faces.main(["--images", str(people), *QUICK, "--quiet", *arguments])


def read_runs(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"]


def without_seconds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def table_rows(output: str, count: int) -> dict[str, list[str]]:
    """Map the first cell of each line below the table's rule to the line's cells."""
    lines = output.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return {line.split()[0]: line.split() for line in lines[rule + 1 : rule + 1 + count]}


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
    arguments = ["--losses", *LOSSES, "--epochs", "5", "--batch-size", "30", "--lr", "0.003"]
    assert run_main(people, *arguments, "--no-flip", "--json", str(path)) == 0
    runs = read_runs(path)
    assert len(runs) == 2 * len(LOSSES)
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


def count_epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the epochs trained from now on."""
    train_epoch, epochs = training.train_epoch, []

    def counted(*arguments: Any) -> float:
        epochs.append(1)
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "train_epoch", counted)
    return epochs


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


def splits_of(data: Any, folds: Any, seed: int, fold: int) -> Any:
    return article_faces.split_run(data.labels, folds, fold, 0.2, seed)


def test_splits_keep_what_is_measured_from_training(data: Any) -> None:
    folds = article_faces.deal_folds(data, "classes", 3)
    assert sorted(chain(*folds)) == list(range(12))
    assert [len(fold) for fold in folds] == [4, 4, 4]
    for fold, classes in enumerate(folds):
        split = splits_of(data, folds, 0, fold)
        rows = torch.cat([split.train, split.test, split.held_out])
        assert rows.sort().values.equal(torch.arange(len(data.images)))
        assert sorted(set(data.labels[split.held_out].tolist())) == classes
        assert not set(data.labels[split.train].tolist()) & set(classes)
        assert split.num_classes == 8
        assert split.train_labels.bincount().tolist() == [5] * 8
        assert split.test_labels.bincount().tolist() == [1] * 8
        assert split.held_out_labels.bincount().tolist() == [6] * 4
        for rows, labels in (
            (split.train, split.train_labels),
            (split.test, split.test_labels),
            (split.held_out, split.held_out_labels),
        ):
            pairs = set(zip(data.labels[rows].tolist(), labels.tolist(), strict=True))
            assert len(pairs) == len({new for _, new in pairs}) == len({old for old, _ in pairs})
        # A label means the same class among the images trained on and those tested on.
        train = dict(
            zip(split.train_labels.tolist(), data.labels[split.train].tolist(), strict=True)
        )
        for new, old in zip(
            split.test_labels.tolist(), data.labels[split.test].tolist(), strict=True
        ):
            assert train[new] == old


def test_seed_draws_the_test_images_but_not_the_folds(data: Any) -> None:
    folds = article_faces.deal_folds(data, "classes", 3)
    torch.manual_seed(99)
    assert article_faces.deal_folds(data, "classes", 3) == folds
    assert folds != [list(range(k, 12, 3)) for k in range(3)]
    assert folds != [list(range(4 * k, 4 * k + 4)) for k in range(3)]
    drawn = [splits_of(data, folds, seed, 0).test for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    # Whatever the fold, a seed leaves the same images of a class out.
    everywhere = [set(splits_of(data, folds, 0, fold).test.tolist()) for fold in range(3)]
    assert len(set.union(*everywhere)) == 12


def test_groups_are_held_out_whole(data: Any) -> None:
    folds = article_faces.deal_folds(data, "groups", 2)
    groups = [{data.groups[c] for c in fold} for fold in folds]
    assert [len(fold) for fold in folds] == [6, 6]
    assert [len(names) for names in groups] == [2, 2]
    assert not groups[0] & groups[1]


@SETTINGS
@hypothesis.given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(2, 4))
def test_folds_share_the_groups_evenly_or_are_refused(sizes: list[int], count: int) -> None:
    groups = tuple(f"g{group}" for group, size in enumerate(sizes) for _ in range(size))
    names = tuple(f"{group}/{index}" for index, group in enumerate(groups))
    labels = torch.arange(len(names)).repeat_interleave(2)
    data = images_module.LabelledImages(torch.empty(0), labels, names, groups, ())
    if len(sizes) < count:
        with pytest.raises(article_faces.ProtocolError, match="to deal: use fewer folds or"):
            article_faces.deal_folds(data, "groups", count)
        return
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    if min(sum(sizes[group] for group in order[fold::count]) for fold in range(count)) < 2:
        with pytest.raises(article_faces.ProtocolError, match="is alone in its fold"):
            article_faces.deal_folds(data, "groups", count)
        return
    folds = article_faces.deal_folds(data, "groups", count)
    dealt = [{groups[c] for c in fold} for fold in folds]
    assert sorted(chain(*folds)) == list(range(len(names)))
    assert sum(map(len, dealt)) == len(sizes)  # no group in two folds
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


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
    assert list(table_rows(capsys.readouterr().out, 3)) == PUBLISHED


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


def test_result_is_measured_on_the_right_images(data: Any) -> None:
    """A network whose embedding is a thumbnail: what is measured can be computed without it."""
    folds = article_faces.deal_folds(data, "classes", 2)
    split = splits_of(data, folds, 3, 1)
    generator = torch.Generator().manual_seed(2)
    noise = 0.3 * torch.randn(72, 1, 2, 2, generator=generator).repeat_interleave(8, 2)
    brightness = 4 * torch.rand(72, 1, 1, 1, generator=generator)  # cosines don't see it
    images = brightness * (data.images + noise.repeat_interleave(8, 3))
    thumbnail = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())  # four pixels, no weights
    criterion = criteria.LinearCrossEntropy(split.num_classes, 4)
    unused: Any = None
    result = article_faces.measure(
        runner.Training(thumbnail, criterion, None, unused, unused, unused, 0),
        training.Progress([1.5], [0.2]),
        images,
        split,
    )
    points = images.view(-1, 2, 8, 2, 8).mean(dim=(2, 4)).flatten(1)
    unit = points / points.norm(dim=1, keepdim=True)
    truth, gallery = data.labels[split.test], data.labels[split.train]

    def share(correct: torch.Tensor) -> Any:
        return pytest.approx(100 * correct.double().mean().item())

    by_cosine = gallery[(unit[split.test] @ unit[split.train].T).argmax(dim=1)] == truth
    assert result["test_nearest"] == share(by_cosine)
    distances = torch.cdist(points[split.test], points[split.train])
    by_distance = gallery[distances.argmin(dim=1)] == truth
    assert result["test_nearest_euclidean"] == share(by_distance)
    assert by_cosine.sum() != by_distance.sum()
    logits = criterion.head(points[split.test])
    assert result["test_arg_max"] == share(logits.argmax(dim=1) == split.test_labels)
    logits = criterion.head(points[split.train])
    assert result["train_arg_max"] == share(logits.argmax(dim=1) == split.train_labels)
    cosines = (unit[split.train] @ unit[split.train].T).fill_diagonal_(-2)
    assert result["train_nearest"] == share(gallery[cosines.argmax(dim=1)] == gallery)
    assert result["train_nearest_itself"] == 100 != result["train_nearest"]
    unseen = torch.cat([torch.nonzero(data.labels == c)[:, 0] for c in sorted(folds[1])])
    pairs = measure.pair_scores(points[unseen], data.labels[unseen])
    assert result["verification"] == measure.verification(*pairs)
    assert (result["losses"], result["seconds"], result["scale"]) == ([1.5], [0.2], None)


def made_up_run(loss: str, seed: int, fold: int, value: float, rates: list[str]) -> dict[str, Any]:
    metrics = ("test_nearest", "test_nearest_euclidean", "test_arg_max", "train_nearest",
               "train_nearest_itself", "train_arg_max")  # fmt: skip
    return {
        "loss": loss, "seed": seed, "fold": fold, "scale": 5.0 + fold, "margin": None,
        "classes": 7 + fold, "test_images": 1000 + fold, "held_out_classes": 3 - fold,
        **{name: value + place for place, name in enumerate(metrics)},
        "verification": {
            "eer": value / 2, "auc": value / 100, "tar": dict.fromkeys(rates, value / 4),
            "genuine_pairs": 10, "impostor_pairs": 2000 + fold,
        },
        "losses": [1.0], "seconds": [1.0 + seed, 3.0 + fold],
    }  # fmt: skip


def test_summary_averages_folds_first_and_then_seeds() -> None:
    values = {(0, 0): 60.0, (0, 1): 80.0, (1, 0): 71.0, (1, 1): 73.0, (2, 0): 75.0, (2, 1): 79.0}
    runs = [
        made_up_run("a", seed, fold, value, ["0.1", "0.01", "0.001"] if fold else ["0.1", "0.01"])
        for (seed, fold), value in values.items()
    ] + [made_up_run("b", 0, fold, 50.0, ["0.1", "0.01", "0.001"]) for fold in (0, 1)]
    first, second = article_faces.summarise(runs)
    by_seed = [70.0, 72.0, 77.0]
    deviation = statistics.stdev(by_seed)
    assert (first["loss"], first["runs"], first["seeds"]) == ("a", 6, 3)
    assert first["scale"] == (5.0, 6.0)
    assert first["seconds"] == statistics.median([1, 3, 1, 4, 2, 3, 2, 4, 3, 3, 3, 4])
    half = 4.302653 * deviation / math.sqrt(3)  # t(0.975, 2)
    for place, metric in enumerate(("test_nearest", "test_nearest_euclidean", "test_arg_max")):
        assert first[metric]["mean"] == pytest.approx(73.0 + place)
        assert first[metric]["std"] == pytest.approx(deviation)
        assert first[metric]["half_interval"] == pytest.approx(half)
    assert first["eer"]["mean"] == pytest.approx(73.0 / 2)
    assert first["auc"]["std"] == pytest.approx(deviation / 100)
    assert list(first["tar"]) == ["0.1", "0.01"]  # what every fold can quote
    assert first["tar"]["0.01"]["mean"] == pytest.approx(73.0 / 4)
    assert second["test_nearest"] == {"mean": 50.0, "std": None, "half_interval": None}

    table = article_faces.format_table(runs)
    assert "TAR % at FAR 1 %" in table
    assert f"5.00 to 6.00       –  73.00 ± {deviation:.2f}" in table
    assert "trained on 7 / 8 classes, tested on 1,000 / 1,001 other images" in table
    assert "classes never seen: 3 + 2 = 5" in table
    assert "genuine pairs: 10 + 10 = 20; impostor pairs: 2,000 + 2,001 = 4,001" in table
    assert "some runs are missing" in table  # of the second loss


def test_summary_of_too_few_pairs_quotes_no_rate() -> None:
    runs = [made_up_run("a", 0, 0, 50.0, ["0.1"]), made_up_run("a", 0, 1, 50.0, [])]
    assert article_faces.summarise(runs)[0]["tar"] == {}
    header, _, line, *_ = article_faces.format_table(runs).splitlines()
    assert "TAR %  " in header
    assert line.split()[-3] == "–"


def test_summary_of_nothing() -> None:
    assert article_faces.summarise([]) == []
    assert article_faces.format_table([]).splitlines()[0].startswith("loss")


class FakeNetwork(nn.Module):
    """A network like timm's: its attribute says what its pretrained weights were made for."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3)}
        self.head = nn.Linear(channels * SIZE * SIZE, outputs)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach())
        return self.head(images.flatten(1))


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put a module named timm in place, and keep what it is asked for and gives."""
    calls = []

    def create_model(name: str, *, pretrained: bool, in_chans: int, num_classes: int) -> nn.Module:
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if name == "offline" and pretrained:
            raise OSError("no route to host")
        network = FakeNetwork(in_chans, num_classes)
        calls.append((name, pretrained, in_chans, num_classes, network))
        return network

    timm: Any = types.ModuleType("timm")
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


@pytest.mark.parametrize("pretrained", [False, True])
def test_network_of_timm(
    people: Path, tmp_path: Path, fake_timm: list[tuple[Any, ...]], pretrained: bool
) -> None:
    path = tmp_path / "faces.json"
    arguments = ["--model", "tiny", *["--pretrained"] * pretrained, "--losses", "cosface"]
    assert run_main(people, *arguments, "--json", str(path)) == 0
    assert [call[:4] for call in fake_timm] == [("tiny", pretrained, 1, 16)] * 3  # a check, 2 runs
    settings = json.loads(path.read_text())["settings"]
    assert (settings["model"], settings["pretrained"]) == ("tiny", pretrained)
    assert settings["parameters"] == (SIZE * SIZE + 1) * 16
    checked = fake_timm[0][4].seen[0]
    # Pixels in [0, 1] with the means and deviations of the channels averaged, or in [-1, 1].
    low, high = ((0 - 0.4) / 0.2, (1 - 0.4) / 0.2) if pretrained else (-1, 1)
    assert low - 1e-5 <= checked.min() < low + 0.8
    assert high - 0.8 < checked.max() <= high + 1e-5


def test_pretrained_network_gets_each_channel_its_own_way(
    tmp_path: Path, fake_timm: list[tuple[Any, ...]]
) -> None:
    root = write_people(tmp_path / "people", color=True)
    assert run_main(root, "--model", "tiny", "--pretrained", "--losses", "cosface") == 0
    assert fake_timm[0][2] == 3
    network = article_faces.PretrainedInput(nn.Identity(), (0.2, 0.4, 0.6), (0.1, 0.2, 0.3), 3)
    white = network(torch.ones(2, 3, 4, 4))
    for channel, expected in enumerate((8.0, 3.0, 4 / 3)):
        torch.testing.assert_close(white[:, channel], torch.full((2, 4, 4), expected))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "unknown"], "--model unknown: Unknown model (unknown)"),
        (
            ["--model", "offline", "--pretrained"],
            "--model offline --pretrained: can't get the weights (no route to host)",
        ),
        (
            ["--model", "tiny", "--image-size", "17"],
            "tiny can't train on a batch of 14 images of 17 x 17 (mat1 and mat2 shapes",
        ),
    ],
    ids=["unknown", "offline", "size"],
)
def test_errors_of_timm_come_before_training(
    people: Path,
    capsys: pytest.CaptureFixture[str],
    fake_timm: list[tuple[Any, ...]],
    arguments: list[str],
    message: str,
) -> None:
    assert_refused(capsys, lambda: run_main(people, *arguments), message)
    assert len(fake_timm) <= 1


@pytest.mark.usefixtures("no_training")
def test_missing_timm_is_an_error(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "pip install timm, or leave --model out"
    assert_refused(capsys, lambda: run_main(people, "--model", "tiny"), message)


def assert_refused(
    capsys: pytest.CaptureFixture[str], run: Callable[[], int], *messages: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    usage, error = captured.err.splitlines()
    assert usage.startswith("usage:")
    for message in messages:
        assert message in error


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "7"], "--image-size: expected a whole number from 8 to 1024, got '7'"),
        (["--losses", "softmax"], "invalid choice: 'softmax'"),
        (["--losses", "arcface", "arcface"], "--losses: each only once, got arcface arcface"),
        (["--as-published", "--losses", "cosface"], "--losses cosface: --as-published there are"),
        (["--pretrained"], "--pretrained is for --model NAME"),
        (["--folds", "1"], "--folds: expected a whole number of at least 2, got '1'"),
        (["--folds", "13"], "--folds 13 with 12 classes to deal: use fewer folds"),
        (["--folds", "7"], "is alone in its fold, without a class to be told from"),
        (["--hold-out", "groups", "--folds", "5"], "4 groups to deal: use fewer folds or --hold-"),
        (["--hold-out", "letters"], "invalid choice: 'letters'"),
        (["--test-share", "0"], "--test-share: expected a number above 0, at most 0.9, got '0'"),
        (["--test-share", "1"], "--test-share: expected a number above 0, at most 0.9, got '1'"),
        (["--seeds", "1", "1"], "--seeds: each only once, got 1 1"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["--lr", "0"], "--lr: expected a number above 0, at most 10, got '0'"),
        (["--device", "cuda:99"], "try --device cpu"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--resume"], "--resume needs --json FILE"),
        (["--json", "no/such/folder/faces.json"], "can't write 'no/such/folder/faces.json'"),
        (["--batch-size", "29"], "can't train on a batch of 1 images of 16 x 16 (Expected more"),
        (
            ["--as-published", "--embedding-size", "5"],
            "--losses cross_entropy, training on 6 classes: the outputs are the logits: 5 can't",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_errors(
    people: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert_refused(capsys, lambda: run_main(people, *arguments), message)


@pytest.mark.usefixtures("no_training")
def test_images_that_cannot_be_used_are_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere"
    assert_refused(capsys, lambda: run_main(missing), f"{missing}: no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, lambda: run_main(tmp_path / "empty"), ".pgm", "empty: no .png, ")
    single = write_people(tmp_path / "one", groups=1, classes=1)
    assert_refused(capsys, lambda: run_main(single), "only one class, 'g0/s0'")
    few = write_people(tmp_path / "few", images=1)
    assert_refused(capsys, lambda: run_main(few), "a single image in 'g0/s0', 'g0/s1', 'g0/s2'")
    broken = write_people(tmp_path / "broken")
    (broken / "g1" / "s1" / "3.png").write_bytes(b"")
    where = str(broken / "g1" / "s1" / "3.png")
    assert_refused(capsys, lambda: run_main(broken), where, "remove or replace it")


@pytest.mark.usefixtures("no_training")
def test_images_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    message = "the following arguments are required: --images"
    assert_refused(capsys, lambda: article_faces.main(QUICK), message)


@pytest.mark.usefixtures("no_training")
def test_single_group_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_people(tmp_path / "people", groups=1, classes=4)
    message = "--folds 2 with 1 group to deal: use fewer folds or --hold-out classes"
    assert_refused(capsys, lambda: run_main(root, "--hold-out", "groups"), message)


@pytest.mark.usefixtures("no_training")
def test_two_training_classes_are_too_few_for_fixed_adacos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_people(tmp_path / "people", groups=2, classes=2)
    message = "--losses fixed_adacos, training on 2 classes: Fixed AdaCos needs C >= 3"
    assert_refused(capsys, lambda: run_main(root), message)


@pytest.mark.usefixtures("no_training")
def test_too_many_pairs_are_refused(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(article_faces, "MOST_VERIFIED", 35)
    message = "a fold holds 36 images, and all pairs are compared, of 35 at most; use more folds"
    assert_refused(capsys, lambda: run_main(people), message)


def test_file_of_other_runs_is_refused(
    people: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "faces.json"
    arguments = ["--losses", "fixed_adacos", "--json", str(path)]
    assert run_main(people, *arguments) == 0
    before = path.read_text()
    capsys.readouterr()
    count = count_epochs(monkeypatch)
    again = f"{path} exists; add --resume"
    assert_refused(capsys, lambda: run_main(people, *arguments), again)
    for change, message in (
        (["--epochs", "2"], "epochs 1, now 2"),
        (["--no-flip"], "flip True, now False"),
        (["--hold-out", "groups"], "hold_out 'classes', now 'groups'"),
        (["--as-published"], "lr 0.001, now 0.01"),
    ):
        with_change = [*arguments, *change, "--resume"]
        assert_refused(capsys, lambda given=with_change: run_main(people, *given), message)
    other = write_people(tmp_path / "people", images=4)
    assert_refused(capsys, lambda: run_main(other, *arguments, "--resume"), "images_sha256")
    groups = [*arguments, "--hold-out", "groups", "--resume"]
    assert_refused(capsys, lambda: run_main(people, *groups), "…, now [[")  # not every class twice
    (tmp_path / "faces.json.checkpoint").write_bytes(b"damaged")
    assert run_main(people, *arguments, "--seeds", "0", "1", "--resume") == 1
    assert "faces.json.checkpoint: can't be read" in capsys.readouterr().err
    assert not count
    assert path.read_text() == before


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


def test_network_of_the_arguments() -> None:
    arguments = argparse.Namespace(model=None, embedding_size=7, precision="bf16", pretrained=False)
    network = article_faces.build_network(arguments, 3)
    output = network.eval()(torch.zeros(2, 3, 32, 32))
    assert output.shape == (2, 7)
    assert output.dtype == torch.float32
    assert network.precision == "bf16"


def test_a_run_that_lacks_something_is_named_before_training(
    people: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "faces.json"
    arguments = ["--losses", "fixed_adacos", "--json", str(path), "--seeds", "0"]
    assert run_main(people, *arguments) == 0
    capsys.readouterr()
    path.write_text(path.read_text().replace('"eer"', '"e"'))
    count = count_epochs(monkeypatch)
    message = f"{path}: not what its script writes, 'eer' is missing: name another file"
    assert_refused(capsys, lambda: run_main(people, *arguments, "1", "--resume"), message)
    assert not count
