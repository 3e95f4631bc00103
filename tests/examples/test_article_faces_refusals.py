"""What the second experiment refuses, before it trains: settings, images, and files."""

from __future__ import annotations

from pathlib import Path

import article_faces
import pytest
from faces_command import QUICK, assert_refused, count_epochs, run_main, write_people
from study import folds

pytestmark = pytest.mark.usefixtures("one_thread")


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
    monkeypatch.setattr(folds, "MOST_VERIFIED", 35)
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
