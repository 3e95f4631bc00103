"""The first experiment: what it trains, what it measures, how it is interrupted and resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import article_mnist
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from mnist_command import SMALL, run_main
from mnist_files import IDX_NAMES
from study import criteria, runner, store, training
from study.measure import embed

import fused_margin as fm

pytestmark = pytest.mark.usefixtures("one_thread")


def test_end_to_end(mnist: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "article_mnist.py"), *SMALL]
    done = subprocess.run(
        [*command, "--root", str(mnist), "--seeds", "4", "--json", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert content["settings"] == {
        "experiment": "mnist", "as_published": False, "epochs": 2, "batch_size": 16,
        "embedding_size": 12, "lr": 0.001, "precision": "fp32", "device": "cpu",
        "train_images": 60, "test_images": 20,
        "images_sha256": content["settings"]["images_sha256"],
    }  # fmt: skip
    assert len(content["settings"]["images_sha256"]) == 64
    assert content["versions"]["torch"] == torch.__version__
    names = [run["loss"] for run in content["runs"]]
    plain = [
        "arcface", "cosface", "fixed_adacos", "adacos", "adaface", "subcenter_arcface",
        "cross_entropy",
    ]  # fmt: skip
    regularized = [name for name in plain if name != "subcenter_arcface"]
    assert names == plain + [f"{name}+center_invariant" for name in regularized]
    for run in content["runs"]:
        assert run["seed"] == 4
        assert len(run["losses"]) == len(run["seconds"]) == 2
        assert run["threads"] == 1
        for key in ("test_nearest", "test_nearest_euclidean", "test_arg_max", "train_nearest"):
            assert 0 <= run[key] <= 100
        assert run["train_nearest_itself"] == 100  # each image is its own neighbour
        assert len(run["cosines"]) == 3  # before training, and after each epoch
        for histograms in run["cosines"]:
            assert sum(histograms["target"]) == sum(histograms["hardest_negative"]) == 60
    by_loss = {run["loss"]: run for run in content["runs"]}
    assert by_loss["fixed_adacos"]["scale"] == pytest.approx(math.sqrt(2) * math.log(9))
    assert by_loss["arcface"]["margin"] == pytest.approx(math.radians(28.6))
    assert by_loss["cross_entropy"]["scale"] is None
    assert 0 < by_loss["adacos"]["scale"] != by_loss["fixed_adacos"]["scale"]  # it has moved
    assert by_loss["adaface"]["margin"] == 0.4
    assert "Fixed AdaCos + CenterInvariant" in done.stdout
    assert f"{by_loss['arcface']['test_nearest']:.2f}" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_as_published(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert run_main(mnist, "--as-published", "--seeds", "0", "--json", str(path)) == 0
    content = json.loads(path.read_text())
    assert content["settings"]["lr"] == 0.01
    losses = [
        "arcface+center_invariant", "simple_arcface", "fixed_adacos", "adacos", "cross_entropy",
    ]  # fmt: skip
    assert [run["loss"] for run in content["runs"]] == losses
    assert "Simple ArcFace" in capsys.readouterr().out


@pytest.mark.parametrize("frozen", [True, False])
def test_class_weights_are_frozen_only_as_published(mnist: Path, frozen: bool) -> None:
    data = article_mnist.load_data(mnist, None, torch.device("cpu"))
    recipe = training.Recipe(2, 16, 0.01, train_class_weights=not frozen)
    variant = article_mnist.variants(frozen)["arcface+center_invariant"]
    setup = article_mnist.prepare(variant, data, recipe, 0, 12)
    weight = setup.criterion.get_parameter("weight")
    before = weight.detach().clone()
    list(fit(setup))
    assert torch.equal(weight, before) == frozen


def fit(setup: Any, **keywords: Any) -> Iterator[Any]:
    return training.fit(
        setup.network, setup.criterion, setup.regularizer, setup.images, setup.labels,
        setup.recipe, setup.seed, **keywords,
    )  # fmt: skip


def test_a_regularizer_of_frozen_weights_changes_nothing(mnist: Path) -> None:
    # So the article's "ArcFace with regulariser" was ArcFace alone.
    data = article_mnist.load_data(mnist, None, torch.device("cpu"))
    recipe = training.Recipe(2, 16, 0.01, train_class_weights=False)
    networks = []
    for regularizer in (fm.regularizers.CenterInvariant, None):
        variant = criteria.Variant("", criteria.arcface, regularizer)
        setup = article_mnist.prepare(variant, data, recipe, 0, 12)
        list(fit(setup))
        networks.append(setup.network.state_dict())
    for name, parameter in networks[0].items():
        assert torch.equal(parameter, networks[1][name]), name


def test_simple_arcface_takes_degrees_off_the_cosine() -> None:
    criterion = criteria.DegreesAsOffsetLoss(7, 5)
    embeddings, labels = torch.randn(9, 5, requires_grad=True), torch.randint(7, (9,))
    cosine = F.normalize(embeddings) @ F.normalize(criterion.weight).T
    logits = 64 * (cosine - 28.6 * F.one_hot(labels, 7))
    expected = F.cross_entropy(logits, labels)
    loss = criterion(embeddings, labels)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_margin_on_every_class_is_no_margin() -> None:
    # So the article's AdaCos is the fixed scale alone.
    criterion = fm.FixedAdaCosLoss(7, 5)
    embeddings, labels = torch.randn(9, 5), torch.randint(7, (9,))
    published = F.cross_entropy(criterion.scale * (F.normalize(embeddings)
        @ F.normalize(criterion.weight).T + 28.6), labels)  # fmt: skip
    torch.testing.assert_close(criterion(embeddings, labels), published, rtol=1e-4, atol=1e-5)


def test_published_cross_entropy_is_over_the_outputs() -> None:
    criterion = criteria.OutputCrossEntropy(3, 8)
    outputs, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(criterion(outputs, labels), F.cross_entropy(outputs, labels))
    assert criterion.logits(outputs) is outputs
    assert not list(criterion.parameters())
    with pytest.raises(ValueError, match="2 can't tell 3 classes"):
        criteria.OutputCrossEntropy(3, 2)


def test_the_regularizer_is_added() -> None:
    setup = small_setup(criteria.Variant("", criteria.arcface, fm.regularizers.CenterInvariant))
    setup.criterion.weight.data *= torch.linspace(1, 3, 3)[:, None]
    norms = [setup.criterion.weight.detach().norm(dim=1)]
    list(fit(setup))
    norms.append(setup.criterion.weight.detach().norm(dim=1))
    assert norms[1].std() < 0.95 * norms[0].std()  # the norms are pulled together


def small_setup(variant: Any, **recipe: Any) -> Any:
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Dropout(0.3),
        torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(21, 1, 4, 4, generator=generator)
    settings = {"epochs": 4, "batch_size": 8, "lr": 0.05} | recipe
    return runner.Training(
        network,
        variant.build(3, 5),
        variant.regularizer and variant.regularizer(),
        images,
        torch.arange(21) % 3,
        training.Recipe(**settings),
        7,
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"flip": True, "record_cosines": True}])
def test_a_resumed_training_gives_the_same_bits(
    tmp_path: Path, stop_after: int, options: dict[str, Any]
) -> None:
    variant = criteria.losses()["arcface"]
    whole = small_setup(variant, **options)
    *_, expected = fit(whole)

    path, key = tmp_path / "runs.json", {"loss": "arcface"}
    runs = store.Runs(path, {"a": 1}, resume=False)
    begun = small_setup(variant, **options)
    for epoch in fit(begun, checkpoint=lambda state: runs.save_checkpoint(key, state)):
        if len(epoch.losses) == stop_after:
            break
    again = store.Runs(path, {"a": 1}, resume=True)
    torch.rand(5)  # what happens in between makes no difference
    resumed = small_setup(variant, **options)
    *_, progress = fit(resumed, resume_from=again.load_checkpoint(key))
    assert progress.losses == expected.losses
    assert progress.cosines == expected.cosines
    assert len(progress.cosines) == (5 if "record_cosines" in options else 0)
    for name, parameter in whole.network.state_dict().items():
        assert torch.equal(parameter, resumed.network.state_dict()[name]), name
    assert torch.equal(whole.criterion.weight, resumed.criterion.weight)


def test_every_image_is_trained_on_once_an_epoch_whole_or_mirrored() -> None:
    for flip in (False, True):
        setup = small_setup(criteria.losses()["arcface"], flip=flip, epochs=1)
        seen: list[torch.Tensor] = []
        setup.network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        list(fit(setup))
        assert [len(batch) for batch in seen] == [8, 8, 5]
        rows = torch.cat(seen).flatten(1)
        whole, mirrored = setup.images.flatten(1), setup.images.flip(-1).flatten(1)
        is_whole = (rows[:, None] == whole).all(-1)
        is_mirrored = (rows[:, None] == mirrored).all(-1)
        assert (is_whole | is_mirrored).sum(0).eq(1).all()
        assert is_mirrored.any() == flip
        assert is_whole.any()


def test_cosine_histograms_against_a_loop() -> None:
    setup = small_setup(criteria.losses()["cosface"])
    counts = training.cosine_histograms(setup.network, setup.criterion, setup.images, setup.labels)
    weights = [weight / weight.norm() for weight in setup.criterion.weight.detach()]
    expected = {"target": [0] * 40, "hardest_negative": [0] * 40}
    setup.network.eval()
    for image, label in zip(setup.images, setup.labels.tolist(), strict=True):
        embedding = setup.network(image[None])[0].detach()
        cosines = [float(embedding @ weight / embedding.norm()) for weight in weights]
        target = cosines.pop(label)
        expected["target"][int((target + 1) * 20)] += 1
        expected["hardest_negative"][int((max(cosines) + 1) * 20)] += 1
    assert counts == expected


def test_cosines_of_sub_centres_are_those_of_the_nearest_row_of_a_class() -> None:
    setup = small_setup(criteria.losses()["subcenter_arcface"])
    assert setup.criterion.sub_centers == 3
    counts = training.cosine_histograms(setup.network, setup.criterion, setup.images, setup.labels)
    cosines = setup.criterion.logits(embed(setup.network, setup.images)) / 64
    target = cosines.gather(1, setup.labels[:, None])
    hardest = cosines.scatter(1, setup.labels[:, None], -1.0).amax(dim=1)
    assert counts["target"] == target.histc(40, -1, 1).tolist()
    assert counts["hardest_negative"] == hardest.histc(40, -1, 1).tolist()


def test_embeddings_that_are_not_finite_are_not_measured(
    mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = training.Network.forward

    def infinite(self: Any, images: torch.Tensor) -> torch.Tensor:
        embeddings = forward(self, images)
        return embeddings if self.training else embeddings / 0

    monkeypatch.setattr(training.Network, "forward", infinite)
    assert run_main(mnist, "--losses", "arcface", "--seeds", "0") == 1
    captured = capsys.readouterr()
    assert "arcface seed 0, embeddings are not finite" in captured.err
    assert "ArcFace" not in captured.out


def test_a_diverged_run_doesnt_keep_the_others_from_running(
    mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_epoch, calls = training.train_epoch, []

    def diverges(*arguments: Any) -> float:
        calls.append(arguments)
        return math.nan if len(calls) == 1 else train_epoch(*arguments)

    monkeypatch.setattr(training, "train_epoch", diverges)
    path = tmp_path / "runs.json"
    losses = ["--losses", "arcface", "fixed_adacos", "--seeds", "0"]
    assert run_main(mnist, *losses, "--json", str(path)) == 1
    assert "arcface seed 0, epoch 1: loss nan; lower --lr" in capsys.readouterr().err
    assert [run["loss"] for run in json.loads(path.read_text())["runs"]] == ["fixed_adacos"]
    assert run_main(mnist, *losses, "--json", str(path), "--resume") == 0


def test_three_dimensions_keep_points_for_a_picture(mnist: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    options = ["--embedding-size", "3", "--losses", "arcface", "cross_entropy", "--seeds", "0"]
    assert run_main(mnist, *options, "--json", str(path)) == 0
    for run in json.loads(path.read_text())["runs"]:
        points, weights = (
            torch.tensor(run["sphere"]["points"]),
            torch.tensor(run["sphere"]["weights"]),
        )
        assert points.shape == (20, 3)
        assert weights.shape == (10, 3)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(20), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --json FILE"),
        (["--seeds", "1", "1"], "--seeds: each only once, got 1 1"),
        (["--losses", "arcface", "arcface"], "--losses: each only once"),
        (["--losses", "simple_arcface"], "--losses simple_arcface: without --as-published"),
        (["--as-published", "--losses", "cosface"], "--losses cosface: --as-published there are"),
        (["--as-published", "--embedding-size", "9"], "needs at least 10"),
        (["--limit", "61"], "--limit 61: there are only 60 training images"),
        (["--lr", "nan"], "above 0, at most 10, got 'nan'"),
        (["--epochs", "0"], "whole number of at least 1, got '0'"),
        (["--json", "missing/result.json"], "can't write 'missing/result.json'"),
    ],
)
def test_bad_arguments_end_before_training(
    mnist: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(article_mnist, "run_jobs", None)  # training would be a TypeError
    with pytest.raises(SystemExit) as stop:
        run_main(mnist, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_data_ends_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(tmp_path)
    error = capsys.readouterr().err
    assert all(name in error for name in IDX_NAMES)
