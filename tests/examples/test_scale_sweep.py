"""The sweep trains at every point of its grid, on each kind of data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scale_sweep
import torch
from mnist_files import write_mnist
from PIL import Image
from study import runner, synthetic, training

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--device", "cpu", "--epochs", "1", "--batch-size", "16", "--embedding-size", "8", "--quiet",
    "--scales", "2", "16", "--margins", "0", "0.5", "--seeds", "0",
]  # fmt: skip


def run_main(path: Path, *arguments: str) -> dict[str, Any]:
    assert scale_sweep.main([*SMALL, "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


def write_folder(root: Path, names: str = "abcde") -> None:
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir()
        for index in range(6):
            pixels = generator.integers(0, 255, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


@pytest.mark.parametrize(("data", "classes"), [("mnist", 10), ("folder", 5), ("synthetic", 20)])
def test_every_point_of_the_grid(tmp_path: Path, data: str, classes: int) -> None:
    arguments = ["--data", data]
    if data == "synthetic":
        arguments += ["--classes", "20"]
    else:
        root = tmp_path / "data"
        root.mkdir()
        (write_mnist if data == "mnist" else write_folder)(root)
        arguments += ["--root", str(root)]
        arguments += (
            ["--image-size", "32", "--test-share", "0.4"] if data == "folder" else ["--limit", "40"]
        )
    content = run_main(tmp_path / "sweep.json", *arguments)
    fixed = round(math.sqrt(2) * math.log(classes - 1), 4)
    assert content["settings"]["classes"] == classes
    assert content["settings"]["fixed_adacos_scale"] == fixed
    points = [(run["scale"], run["margin"]) for run in content["runs"]]
    assert points == [(s, m) for s in sorted([2.0, 16.0, fixed]) for m in (0.0, 0.5)]
    for run in content["runs"]:
        assert 0 <= run["nearest"] <= 100
        assert 0 <= run["arg_max"] <= 100
        assert 0 <= run["eer"] <= 100
        assert run["threads"] == 1
    first_losses = [run["losses"][0] for run in content["runs"]]
    assert len(set(first_losses)) == len(points)  # scale and margin reach the loss


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (None, "", "can't be read (JSONDecodeError: "),
        ('"eer": ', '"e": ', "'eer' is missing"),
        ('"seed": ', '"s": ', "'seed' is missing"),
        ('"nearest": ', '"nearest": "%", "n": ', "not what its script writes (TypeError: "),
    ],
)
def test_a_file_of_junk_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: str | None,
    after: str,
    message: str,
) -> None:
    path = tmp_path / "sweep.json"
    data = ["--data", "synthetic", "--classes", "5"]
    run_main(path, *data)
    path.write_text(after if before is None else path.read_text().replace(before, after))
    with pytest.raises(SystemExit, match="2"):
        run_main(path, *data, "--resume")
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {path}: " in error
    assert message in error
    assert "name another file" in error


@pytest.mark.parametrize(
    ("option", "value"),
    [("--classes", "3"), ("--classes", "10000001"), ("--per-class", "0"), ("--threads", "1025")],
)
def test_numbers_out_of_bounds_are_errors(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        scale_sweep.main(["--data", "synthetic", option, value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: expected a whole number from " in error
    assert error.endswith(f"got '{value}'")


@pytest.mark.parametrize(
    ("labels", "each"),
    [(torch.arange(10).repeat(900), 200), (torch.arange(6000).repeat_interleave(3), 2)],
    ids=["many images", "many classes"],
)
def test_pairs_are_of_as_many_images_of_each_class(labels: torch.Tensor, each: int) -> None:
    some = scale_sweep.paired_images(labels)
    assert len(some) == len(some.unique()) == 2000
    counts = labels[some].bincount()
    assert (counts == each).all()


def test_one_held_out_image_of_each_class_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path)
    with pytest.raises(SystemExit):
        scale_sweep.main([*SMALL, "--data", "folder", "--root", str(tmp_path)])
    assert "--test-share 0.2 holds out one image of each class" in capsys.readouterr().err


def test_the_best_points_are_trained_again_with_other_seeds(tmp_path: Path) -> None:
    options = ["--data", "synthetic", "--classes", "20"]
    path = tmp_path / "sweep.json"
    grid = run_main(path, *options)["runs"]
    confirm = [*options, "--resume", "--confirm-seeds", "7", "8"]
    runs = run_main(path, *confirm)["runs"]
    assert runs[: len(grid)] == grid

    def best(candidates: list[dict[str, Any]]) -> tuple[float, float]:
        run = max(candidates, key=lambda run: run["nearest"])
        return run["scale"], run["margin"]

    fixed = (round(math.sqrt(2) * math.log(19), 4), 0.0)
    points = {fixed, best(grid), best([run for run in grid if run["margin"] == 0]), (64.0, 0.5)}
    found = [(run["scale"], run["margin"], run["seed"]) for run in runs[len(grid) :]]
    assert sorted(found) == sorted((*point, seed) for point in points for seed in (7, 8))
    assert all(run["confirms"] for run in runs[len(grid) :])
    # A point that is named has them too, and the others keep theirs.
    named = run_main(path, *confirm, "--confirm-points", "3,0.1", "2,0")["runs"]
    assert named[: len(runs)] == runs
    added = {(run["scale"], run["margin"], run["seed"]) for run in named[len(runs) :]}
    asked = {(3.0, 0.1), (2.0, 0.0)} - points
    assert added == {(*point, seed) for point in asked for seed in (7, 8)}
    assert all(run["confirms"] for run in named[len(grid) :])
    runs = named
    # More seeds for the grid are none of these runs: they chose nothing.
    more = run_main(path, *options, "--resume", "--seeds", "0", "1")["runs"][len(runs) :]
    assert {run["seed"] for run in more} == {1}
    assert len(more) == len(grid)


def test_points_are_chosen_by_the_seeds_of_the_grid_only() -> None:
    def run(point: tuple[float, float], seed: int, nearest: float, eer: float) -> dict[str, Any]:
        scale, margin = point
        return {"scale": scale, "margin": margin, "seed": seed, "nearest": nearest, "eer": eer}

    runs = [
        run((2.0, 0.0), 0, 50.0, 4.0), run((2.0, 0.0), 1, 60.0, 5.0),
        run((4.0, 0.0), 0, 58.0, 6.0), run((4.0, 0.0), 1, 50.0, 6.0),
        run((4.0, 0.5), 0, 70.0, 7.0), run((4.0, 0.5), 1, 70.0, 7.0),
        run((2.0, 0.5), 0, 40.0, 2.0), run((2.0, 0.5), 1, 40.0, 3.0),
        run((8.0, 0.5), 0, 99.0, 0.1),  # seed 1 has diverged
        {**run((4.0, 0.0), 2, 99.0, 0.1), "confirms": True},
    ]  # fmt: skip
    chosen = scale_sweep.Chosen.by(runs, 3.1)
    assert chosen.points == [(3.1, 0.0), (2.0, 0.0), (4.0, 0.5), (64.0, 0.5)]
    chosen = scale_sweep.Chosen.by(runs, 3.1, hold_out=True)  # then EER is of classes never seen
    assert chosen.points == [(3.1, 0.0), (2.0, 0.0), (4.0, 0.5), (2.0, 0.5), (64.0, 0.5)]
    assert chosen.best_verified == (2.0, 0.5)
    with pytest.raises(ValueError, match="no point without a margin"):
        scale_sweep.Chosen.by(runs[4:], 3.1)


def test_classes_held_out_are_verified_and_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write_folder(root, "abcdefg")
    options = ["--data", "folder", "--root", str(root), "--image-size", "32"]
    options += ["--hold-out", "classes", "--folds", "2"]
    trained, pairs = [], []
    fit, pair_scores = runner.fit, scale_sweep.pair_scores

    def watched(network: Any, criterion: Any, *others: Any, **named: Any) -> Any:
        trained.append((criterion.num_classes, len(others[1])))
        return fit(network, criterion, *others, **named)

    def paired(embeddings: torch.Tensor, labels: torch.Tensor) -> Any:
        pairs.append(labels.bincount().tolist())
        return pair_scores(embeddings, labels)

    monkeypatch.setattr(runner, "fit", watched)
    monkeypatch.setattr(scale_sweep, "pair_scores", paired)
    path = tmp_path / "open.json"
    content = run_main(path, *options)
    folds = content["settings"]["folds"]
    assert sorted(name for fold in folds for name in fold) == list("abcdefg")
    sizes = [len(fold) for fold in folds]
    assert sorted(sizes) == [3, 4]
    assert [run["fold"] for run in content["runs"]] == [0] * 6 + [1] * 6
    assert trained == [(7 - sizes[run["fold"]], 5 * (7 - sizes[run["fold"]]))
                       for run in content["runs"]]  # fmt: skip
    assert pairs == [[6] * sizes[run["fold"]] for run in content["runs"]]
    scales = [fm.functional.fixed_adacos_scale(7 - size) for size in sizes]
    for run in content["runs"]:
        assert run["fixed"] == (run["scale"] == pytest.approx(scales[run["fold"]], abs=1e-4))
    mean = round(sum(round(scale, 4) for scale in scales) / 2, 4)
    assert content["settings"]["fixed_adacos_scale"] == mean

    again = run_main(path, *options, "--resume", "--confirm-seeds", "7")["runs"]
    confirming = scale_sweep.confirming(again)
    assert {run["seed"] for run in confirming} == {7}
    assert {run["fold"] for run in confirming} == {0, 1}
    points = scale_sweep.Chosen.by(scale_sweep.averaged(again), mean, hold_out=True).points
    assert len(confirming) == 2 * len(points)


def test_a_fold_that_leaves_two_classes_to_train_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path)
    options = ["--data", "folder", "--root", str(tmp_path), "--hold-out", "classes"]
    with pytest.raises(SystemExit, match="2"):
        scale_sweep.main([*SMALL, *options, "--folds", "2"])
    assert "needs 3 classes or more, got 2" in capsys.readouterr().err


def test_runs_of_folds_are_averaged_as_one() -> None:
    def run(scale: float, seed: int, fold: int, eer: float, **more: bool) -> dict[str, Any]:
        return {
            "scale": scale, "margin": 0.0, "seed": seed, "fold": fold, "fixed": scale < 4,
            "nearest": 90.0, "arg_max": 80.0, "eer": eer, **more,
        }  # fmt: skip

    runs = [
        run(3.0, 0, 0, 4.0), run(3.2, 0, 1, 6.0), run(3.0, 1, 0, 5.0), run(3.2, 1, 1, 9.0),
        run(8.0, 0, 0, 1.0), run(8.0, 0, 1, 2.0), run(8.0, 1, 0, 3.0),  # seed 1 lacks a fold
        run(3.0, 7, 0, 2.0, confirms=True), run(3.2, 7, 1, 3.0, confirms=True),
    ]  # fmt: skip
    whole = [(r["scale"], r["seed"], r["eer"]) for r in scale_sweep.averaged(runs)]
    assert whole == [(3.1, 0, 5.0), (3.1, 1, 7.0), (8.0, 0, 1.5), (3.1, 7, 2.5)]
    assert [bool(r.get("confirms")) for r in scale_sweep.averaged(runs)] == [False] * 3 + [True]
    by_fold = scale_sweep.averaged(runs, over="seed")
    assert [(r["scale"], r["fold"], r["eer"]) for r in by_fold] == [
        (3.1, 0, 4.5), (3.1, 1, 7.5), (8.0, 0, 2.0), (3.1, 0, 2.0), (3.1, 1, 3.0)
    ]  # fmt: skip
    plain = [{"scale": 2.0, "margin": 0.0, "seed": 0, "nearest": 1.0}]
    assert scale_sweep.averaged(plain) == plain


def test_nothing_is_confirmed_if_no_scale_without_a_margin_has_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = tmp_path / "sweep.json", ["--data", "synthetic", "--classes", "20"]
    grid = run_main(path, *options, "--margins", "0.5", "--seeds", "0", "1")["runs"]
    more = [*SMALL, "--json", str(path), *options, "--margins", "0", "--resume"]
    assert scale_sweep.main([*more, "--confirm-seeds", "9"]) == 1
    assert "no point without a margin was trained with every seed" in capsys.readouterr().err
    runs = json.loads(path.read_text())["runs"]
    assert runs[: len(grid)] == grid
    assert not any(run.get("confirms") for run in runs)


@pytest.mark.parametrize("seed", ["0", "4"])
def test_a_seed_that_chooses_does_not_confirm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: str
) -> None:
    options = ["--data", "synthetic", "--classes", "20"]
    path = tmp_path / "sweep.json"
    content = run_main(path, *options, "--seeds", "4")
    with pytest.raises(SystemExit):
        run_main(path, *options, "--resume", "--confirm-seeds", seed)
    assert f"--confirm-seeds: {seed} can't both choose points" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


def test_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data", "synthetic", "--classes", "20"]
    whole = run_main(tmp_path / "whole.json", *options)
    train_epoch, calls = training.train_epoch, []

    def stops(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    path = tmp_path / "parts.json"
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", stops)
        assert scale_sweep.main([*SMALL, "--json", str(path), *options]) == 130
    assert len(json.loads(path.read_text())["runs"]) == 3
    assert run_main(path, *options, "--resume") == whole


def test_synthetic_identities() -> None:
    def make(seed: int = 0) -> Any:
        return synthetic.synthetic_identities(
            30, per_class=6, test_per_class=2, noise=0.5, seed=seed
        )

    data, again = make(), make()
    assert data.train.shape == (180, 64)
    assert data.test.shape == (60, 64)
    assert torch.equal(data.train, again.train)
    assert not torch.equal(data.train, make(1).train)
    assert data.train_labels.bincount().tolist() == [6] * 30
    assert data.test_labels.bincount().tolist() == [2] * 30
    everything = torch.cat([data.train, data.test])
    assert len(everything.unique(dim=0)) == 240  # test samples are new ones
    # The noise is what tells samples of a class apart: less of it, closer together.
    calm = synthetic.synthetic_identities(30, per_class=6, test_per_class=2, noise=0.1, seed=0)
    spread = [part.train.view(30, 6, 64).std(dim=1).mean() for part in (calm, data)]
    assert 0 < 2 * spread[0] < spread[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "--data mnist needs --root DIR"),
        (["--data", "synthetic", "--root", "."], "--root is not for --data synthetic"),
        (["--data", "folder", "--root", "nowhere"], "nowhere: no such folder"),
        (["--data", "mnist", "--root", "nowhere"], "nowhere: no such folder"),
        (["--data", "synthetic", "--classes", "3"], "from 4 to 10000000"),
        (["--data", "synthetic", "--scales", "0"], "above 0"),
        (["--data", "synthetic", "--margins", "4"], "expected radians from 0 to pi"),
        (
            ["--data", "synthetic", "--margins", "0.5", "--confirm-seeds", "9"],
            "--confirm-seeds compares with the best scale without a margin",
        ),
        (["--data", "synthetic", "--confirm-seeds", "9", "9"], "--confirm-seeds: each only once"),
        (["--data", "synthetic", "--confirm-points", "4,0"], "needs --confirm-seeds"),
        (["--data", "synthetic", "--confirm-points", "4"], "expected SCALE,MARGIN such as 16,0.5"),
        (["--data", "synthetic", "--confirm-points", "4,4"], "expected radians from 0 to pi"),
        (["--data", "synthetic", "--confirm-points", "0,0.5"], "above 0"),
        (["--data", "synthetic", "--hold-out", "classes"], "--hold-out is not for --data synth"),
        (["--data", "folder", "--root", ".", "--folds", "3"], "--folds is for --hold-out"),
    ],
)
def test_bad_arguments_end_before_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(scale_sweep, "run_jobs", None)  # training would be a TypeError
    with pytest.raises(SystemExit) as stop:
        scale_sweep.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
