"""The example trains, measures what it says, and refuses what it can't do."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_digits
from helpers import ROOT
from mnist_files import IDX_NAMES, idx_bytes, write_mnist
from study import digits as digits_data
from study import measure
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("arcface", "cosface", "fixed_adacos", "cross_entropy")
SCALES = {
    "arcface": 64.0,
    "cosface": 64.0,
    "fixed_adacos": math.sqrt(2) * math.log(9),
    "cross_entropy": None,
}
ACCURACIES = ("test_nearest", "test_arg_max", "train_nearest", "train_arg_max")
MARGINS = {"arcface": 0.5, "cosface": 0.35, "fixed_adacos": None, "cross_entropy": None}
QUICK = ["--device", "cpu", "--epochs", "1", "--limit", "200"]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "train_digits.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # batches too small for a second thread
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def run_main(*arguments: str) -> int:
    """Run in this process, where importing torch is already paid for."""
    return train_digits.main([*QUICK, "--quiet", *arguments])


def table_rows(output: str) -> dict[str, list[str]]:
    """Map the first cell of each line below the table's rule to the line's cells."""
    lines = output.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    end = next(i for i, line in enumerate(lines) if line.startswith("1-NN: "))
    return {line.split()[0]: line.split() for line in lines[rule + 1 : end]}


@pytest.fixture(scope="module")
def digits() -> Any:
    return digits_data.load_scikit_learn_digits()


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(train_digits, "run", refuse)


def test_digits_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run_script(*QUICK, "--batch-size", "32", "--seed", "7", "--json", str(path))
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert [entry["loss"] for entry in content["results"]] == list(LOSSES)
    for entry in content["results"]:
        assert entry["seed"] == 7
        assert entry["scale"] == SCALES[entry["loss"]]
        assert entry["margin"] == MARGINS[entry["loss"]]
        assert all(0 <= entry[name] <= 100 for name in ACCURACIES)
        assert entry["seconds_per_epoch"] > 0
        assert len(entry["epoch_losses"]) == 1
        assert 0 < entry["epoch_losses"][0] < 100
    assert content["status"] == "complete"
    expected = {
        "data": "digits", "root": None, "limit": 200, "losses": list(LOSSES), "epochs": 1,
        "batch_size": 32, "embedding_size": 128, "lr": 1e-3, "seeds": [7], "device": "cpu",
        "json": str(path), "quiet": False, "train_images": 200, "test_images": 450,
        "threads": content["settings"]["threads"],
    }  # fmt: skip
    assert content["settings"] == expected
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["fused_margin"]

    rows = table_rows(done.stdout)
    assert list(rows) == list(LOSSES)
    for entry in content["results"]:
        assert rows[entry["loss"]][-6:-2] == [f"{entry[name]:.2f}" for name in ACCURACIES]
    assert rows["arcface"][1:4] == ["64.00", "0.50", "rad"]
    assert rows["fixed_adacos"][1:3] == ["3.11", "–"]
    assert re.split(r" {2,}", done.stdout.splitlines()[0])[3:] == [
        "test 1-NN %", "test arg max %", "train 1-NN %", "train arg max %", "s/epoch", "runs",
    ]  # fmt: skip
    for measure_name in ("1-NN: class of the nearest", "arg max: class of the largest logit"):
        assert f"\n{measure_name}" in done.stdout
    for entry in content["results"]:  # a progress bar each, with the loss in it
        assert f"{entry['loss']:13} seed 7: 100%" in done.stderr
        assert f"loss {entry['epoch_losses'][0]:.4f}" in done.stderr


@pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gzip"])
def test_mnist_end_to_end(tmp_path: Path, zipped: bool) -> None:
    write_mnist(tmp_path, lambda name: name + ".gz" * zipped, zipped)
    source = ["--device", "cpu", "--data", "mnist", "--root", str(tmp_path)]
    done = run_script(*source, "--epochs", "3", "--batch-size", "8", "--quiet", "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["settings"]["root"] == str(tmp_path)
    assert (content["settings"]["train_images"], content["settings"]["test_images"]) == (60, 20)
    assert list(table_rows(done.stderr)) == list(LOSSES)
    by_loss = {entry["loss"]: entry["test_nearest"] for entry in content["results"]}
    assert by_loss["arcface"] > 50  # chance is 10


def test_missing_mnist_is_refused_by_the_script(tmp_path: Path) -> None:
    done = run_script("--data", "mnist", "--root", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    usage, error = done.stderr.splitlines()
    assert usage.startswith("usage:")
    for name in (*IDX_NAMES, str(tmp_path), str(tmp_path / "MNIST" / "raw")):
        assert name in error


def test_every_loss_learns_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_digits.main(["--device", "cpu", "--epochs", "8", "--quiet", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["settings"]["train_images"] == 1347
    for entry in content["results"]:
        assert all(entry[name] >= 97 for name in ACCURACIES), entry
        assert entry["epoch_losses"][-1] < entry["epoch_losses"][0] / 2, entry


def test_same_seed_same_result_and_seeds_are_summarised(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        assert run_main("--losses", "cosface", "--seeds", "3", "5", "8", "--json", "-") == 0
        captured = capsys.readouterr()
        outputs.append((json.loads(captured.out), captured.err))
    (first, table), (again, _) = outputs
    results = first["results"]
    assert [entry["seed"] for entry in results] == [3, 5, 8]
    assert len({entry["epoch_losses"][0] for entry in results}) == 3
    for entry, repeated in zip(results, again["results"], strict=True):
        del entry["seconds_per_epoch"], repeated["seconds_per_epoch"]
        assert entry == repeated

    (summary,) = first["summary"]
    assert summary["runs"] == 3
    for name in ACCURACIES:
        values = [entry[name] for entry in results]
        assert summary[name] == pytest.approx(np.mean(values))
        assert summary[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in table


@pytest.fixture
def settings() -> Any:
    return train_digits.parse_settings(train_digits.make_parser(), [*QUICK, "--quiet"])


@pytest.mark.parametrize("name", ["arcface", "cosface", "fixed_adacos"])
def test_class_weights_are_trained(digits: Any, settings: Any, name: str) -> None:
    torch.manual_seed(0)
    model = train_digits.SmallCNN(8, settings.embedding_size)
    criterion: Any = train_digits.LOSSES[name](10, settings.embedding_size)
    before = [p.detach().clone() for p in (criterion.weight, *model.parameters())]
    list(train_digits.train(model, criterion, digits.limited(200), 0, settings))
    for old, new in zip(before, (criterion.weight, *model.parameters()), strict=True):
        assert not torch.equal(old, new)
    # Adam's two steps of 1e-3 move every class, not only by rounding.
    assert ((criterion.weight - before[0]).norm(dim=1) > 1e-3).all()


def test_all_losses_start_from_the_same_network(
    digits: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = []

    def capture(model: nn.Module, *_: object) -> Iterator[float]:
        networks.append([p.detach().clone() for p in model.parameters()])
        yield 1.0

    monkeypatch.setattr(train_digits, "train", capture)
    for name in LOSSES:
        train_digits.run(name, digits.limited(20), 4, settings)
    for network in networks[1:]:
        assert all(map(torch.equal, networks[0], network))


class LabelRecorder(nn.Module):
    """A criterion whose loss is the mean label; it keeps the labels of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.batches.append(labels)
        return labels.float().mean() + 0 * embeddings.sum()


def test_every_image_is_trained_on_even_in_a_last_batch_of_one(digits: Any, settings: Any) -> None:
    data, recorder = digits.limited(129), LabelRecorder()
    settings.batch_size = 64
    (mean_loss,) = train_digits.train(train_digits.SmallCNN(8, 4), recorder, data, 0, settings)
    assert [len(batch) for batch in recorder.batches] == [64, 64, 1]
    assert torch.cat(recorder.batches).sort().values.equal(data.train_labels.sort().values)
    assert mean_loss == pytest.approx(data.train_labels.float().mean().item())  # by image


def test_seed_decides_the_order_of_batches(digits: Any, settings: Any) -> None:
    settings.epochs, orders = 2, []
    for seed in (0, 0, 1):
        torch.rand(len(orders))  # what was drawn before, as by another loss, makes no difference
        recorder = LabelRecorder()
        model = train_digits.SmallCNN(8, 4)
        list(train_digits.train(model, recorder, digits.limited(200), seed, settings))
        orders.append(torch.cat(recorder.batches))
    assert orders[0].equal(orders[1])
    assert not orders[0].equal(orders[2])
    first, second = orders[0].split(200)
    assert not first.equal(second)
    assert not first.equal(digits.train_labels[:200])


def fail_from_second_loss(monkeypatch: pytest.MonkeyPatch, failure: BaseException | float) -> None:
    """From the second loss on, the second epoch raises, or has a loss of `failure`."""
    train, calls = train_digits.train, []

    def second_fails(*arguments: Any) -> Iterator[float]:
        calls.append(arguments)
        losses = train(*arguments)
        yield next(losses)
        if len(calls) < 2:
            yield from losses
        elif isinstance(failure, BaseException):
            raise failure
        else:
            yield failure

    monkeypatch.setattr(train_digits, "train", second_fails)


@pytest.mark.parametrize(
    ("failure", "code", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted", "interrupted with 1 runs finished"),
        (math.nan, 1, "diverged", "cosface, epoch 2: loss nan; lower --lr"),
        (math.inf, 1, "diverged", "cosface, epoch 2: loss inf; lower --lr"),
    ],
    ids=["ctrl-c", "nan", "inf"],
)
def test_unfinished_run_reports_what_is_finished(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException | float,
    code: int,
    status: str,
    message: str,
) -> None:
    path = tmp_path / "result.json"
    fail_from_second_loss(monkeypatch, failure)
    assert run_main("--epochs", "2", "--json", str(path)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert list(table_rows(captured.out)) == ["arcface"]
    content = json.loads(path.read_text())
    assert content["status"] == status
    assert [entry["loss"] for entry in content["results"]] == ["arcface"]
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    train_digits.write_json(str(path), {"run": 1})
    train_digits.write_json(str(path), {"run": 2})
    assert json.loads(path.read_text()) == {"run": 2}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        train_digits.write_json(str(path), {"run": 3})
    assert json.loads(path.read_text()) == {"run": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_point_is_not_its_own_neighbour() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 8, generator=generator)
    labels = torch.randint(0, 10, (2000,), generator=generator)
    accuracy = measure.nearest_neighbour_accuracy
    assert accuracy(points, labels, points, labels) == 100
    # Random labels: 10 % +- 0.7 % (one standard deviation of 2000 draws).
    assert 7 < accuracy(points, labels, points, labels, leave_one_out=True) < 13


def test_a_duplicate_is_a_neighbour() -> None:
    points = torch.randn(50, 8).repeat(2, 1)
    labels = torch.arange(50).repeat(2)
    accuracy = measure.nearest_neighbour_accuracy
    assert accuracy(points, labels, points, labels, leave_one_out=True) == 100


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_judged_by_both_measures(digits: Any, name: str) -> None:
    data = digits.limited(100)
    model = train_digits.SmallCNN(8, 6).eval()
    criterion: Any = train_digits.LOSSES[name](10, 6)
    train, test = (nn.functional.normalize(model(x)) for x in (data.train_images, data.test_images))
    own = torch.eye(len(train), dtype=torch.bool)
    weight = criterion.weight
    bias = criterion.head.bias if name == "cross_entropy" else torch.zeros(10)
    if name != "cross_entropy":
        weight = nn.functional.normalize(weight)
    # What margin losses compare are cosines; normalising an embedding doesn't change its arg max.
    logits = [model(x) @ weight.T + bias for x in (data.train_images, data.test_images)]
    train_labels, test_labels = data.train_labels, data.test_labels

    def percent(predicted: torch.Tensor, labels: torch.Tensor) -> float:
        return 100 * (predicted == labels).double().mean().item()

    others = (train @ train.T).masked_fill(own, -2.0)
    expected = {
        "test_nearest": percent(train_labels[(test @ train.T).argmax(dim=1)], test_labels),
        "test_arg_max": percent(logits[1].argmax(dim=1), test_labels),
        "train_nearest": percent(train_labels[others.argmax(dim=1)], train_labels),
        "train_arg_max": percent(logits[0].argmax(dim=1), train_labels),
    }
    model.train()  # evaluation has to turn it off
    assert train_digits.evaluate(model, criterion, data) == pytest.approx(expected)


def test_digits_split_is_stratified_and_fixed(digits: Any) -> None:
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert (test - 0.25 * (train + test)).abs().max() <= 1
    again = digits_data.load_scikit_learn_digits()
    assert again.test_images.equal(digits.test_images)
    # Together the two sets are the whole data set: nothing is in both, nothing is lost.
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1).double().mul(16).numpy()
    assert np.array_equal(both[np.lexsort(both.T)], pixels[np.lexsort(pixels.T)])


@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gzip"])
@pytest.mark.parametrize("dotted", [False, True], ids=["dashed", "dotted"])
def test_mnist_is_read_under_all_its_names(
    tmp_path: Path, folder: str, zipped: bool, dotted: bool
) -> None:
    def rename(name: str) -> str:
        return (name.replace("-idx", ".idx") if dotted else name) + ".gz" * zipped

    write_mnist(tmp_path / folder, rename, zipped)
    data = digits_data.load_mnist(tmp_path)
    assert data.train_images.shape == (60, 1, 28, 28)
    assert data.test_images.shape == (20, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.tolist() == [i % 10 for i in range(60)]
    bright = data.train_images[:, 0].mean(dim=2).argmax(dim=1)  # the row that holds 255s
    assert bright.equal(2 * data.train_labels + 4)
    assert data.train_images.max() == 1


def test_file_unpacked_under_its_gz_name_is_read(tmp_path: Path) -> None:
    write_mnist(tmp_path, lambda name: name + ".gz", zipped=False)
    assert len(digits_data.load_mnist(tmp_path).train_images) == 60


@pytest.mark.usefixtures("no_training")
def test_only_what_is_missing_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    (tmp_path / IDX_NAMES[1]).unlink()
    (tmp_path / IDX_NAMES[0]).write_bytes(b"damaged, but missing files come first")
    with pytest.raises(SystemExit) as caught:
        train_digits.main(["--data", "mnist", "--root", str(tmp_path)])
    assert caught.value.code == 2
    assert "missing train-labels-idx1-ubyte (also" in capsys.readouterr().err


IMAGES = np.zeros((20, 28, 28), np.uint8)
LABELS = np.zeros(20, np.uint8)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IDX_NAMES[2], idx_bytes(IMAGES)[:-1], "15679 bytes of data, but .* 15680 .20 x 28 x 28."),
        (IDX_NAMES[2], idx_bytes(IMAGES) + b"\0", "15681 bytes of data, but .* 15680 "),
        (IDX_NAMES[2], b"\0\0\x08", "3 bytes, too short for an IDX header"),
        (IDX_NAMES[2], b"", "0 bytes, too short"),
        (IDX_NAMES[2], gzip.compress(idx_bytes(IMAGES))[:-9], "can't be read .*ended before"),
        (IDX_NAMES[2], b"\x1f\x8b" + b"\0" * 40, "can't be read "),
        (IDX_NAMES[2], idx_bytes(IMAGES, 0x0D03), "magic number 0x00000d03, expected 0x00000803"),
        (IDX_NAMES[3], idx_bytes(IMAGES), "magic number 0x00000803, expected 0x00000801"),
        (IDX_NAMES[2], idx_bytes(IMAGES[:, 1:]), r"expected 2 or more .* 28 x 28, got .20, 27, 28"),
        (IDX_NAMES[2], idx_bytes(IMAGES[:1]), r"expected 2 or more .* got .1, 28, 28"),
        (IDX_NAMES[3], idx_bytes(LABELS[1:]), "holds 20 images but .* 19 labels"),
        (IDX_NAMES[3], idx_bytes(LABELS + 10), "expected labels 0 to 9, got 10"),
    ],
    ids=[
        "truncated", "trailing", "header", "empty", "truncated-gzip", "broken-gzip", "magic",
        "images-for-labels", "height", "one-image", "count", "label",
    ],
)  # fmt: skip
def test_damaged_mnist_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        train_digits.main(["--data", "mnist", "--root", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / name) in error
    with pytest.raises(digits_data.DataError, match=message):
        digits_data.load_mnist(tmp_path)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "softmax"], "invalid choice: 'softmax'"),
        (["--losses", "arcface", "arcface"], "--losses: each only once, got arcface arcface"),
        (["--seeds", "1", "2", "1"], "--seeds: each only once, got 1 2 1"),
        (["--seed", "-1"], "--seed: expected a whole number of at least 0, got '-1'"),
        (["--seed", "1", "--seeds", "2", "3"], "not allowed with argument --seed"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["--batch-size", "1.5"], "--batch-size: expected a whole number of at least 1, got '1.5'"),
        (["--embedding-size", "65537"], "expected a whole number from 1 to 65536, got '65537'"),
        (["--limit", "1"], "--limit: expected a whole number of at least 2, got '1'"),
        (["--limit", "1348"], "--limit 1348: there are only 1347 training images"),
        (["--lr", "0"], "--lr: expected a number above 0, at most 10, got '0'"),
        (["--lr", "nan"], "--lr: expected a number above 0, at most 10, got 'nan'"),
        (["--lr", "fast"], "--lr: expected a number above 0, at most 10, got 'fast'"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--device", "cuda:99"], "try --device cpu"),
        (["--data", "mnist"], "--data mnist needs --root DIR"),
        (["--root", "somewhere"], "--root is for --data mnist"),
        (["--json", "no/such/folder/result.json"], "--json: can't write 'no/such/folder/"),
        (["--json", "."], "--json: can't write '.'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train_digits.main(arguments)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage:")
    assert message in error


@pytest.mark.parametrize("script", ["article_faces", "scale_sweep", "study_report"])
def test_without_the_extra_a_sentence_says_so(script: str) -> None:
    code = f"import runpy, sys; sys.modules['PIL'] = None; runpy.run_path('{script}.py')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
        cwd=ROOT / "examples", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "pip install '.[examples]'" in done.stderr
