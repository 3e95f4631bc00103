"""The second experiment's splits, what it measures on them, and its summary."""

from __future__ import annotations

import math
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import article_faces
import hypothesis
import pytest
import torch
from faces_command import SIZE
from hypothesis import strategies as st
from study import criteria, measure, runner, training
from study import images as images_module
from study.folds import ProtocolError, deal_folds, split_run
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = hypothesis.settings(max_examples=50, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def data(people: Path) -> Any:
    return images_module.load_folder(people, SIZE)


def splits_of(data: Any, folds: Any, seed: int, fold: int) -> Any:
    return split_run(data.labels, folds, fold, 0.2, seed)


def test_splits_keep_what_is_measured_from_training(data: Any) -> None:
    folds = deal_folds(data, "classes", 3)
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
    folds = deal_folds(data, "classes", 3)
    torch.manual_seed(99)
    assert deal_folds(data, "classes", 3) == folds
    assert folds != [list(range(k, 12, 3)) for k in range(3)]
    assert folds != [list(range(4 * k, 4 * k + 4)) for k in range(3)]
    drawn = [splits_of(data, folds, seed, 0).test for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    # Whatever the fold, a seed leaves the same images of a class out.
    everywhere = [set(splits_of(data, folds, 0, fold).test.tolist()) for fold in range(3)]
    assert len(set.union(*everywhere)) == 12


def test_groups_are_held_out_whole(data: Any) -> None:
    folds = deal_folds(data, "groups", 2)
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
        with pytest.raises(ProtocolError, match="to deal: use fewer folds or"):
            deal_folds(data, "groups", count)
        return
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    if min(sum(sizes[group] for group in order[fold::count]) for fold in range(count)) < 2:
        with pytest.raises(ProtocolError, match="is alone in its fold"):
            deal_folds(data, "groups", count)
        return
    folds = deal_folds(data, "groups", count)
    dealt = [{groups[c] for c in fold} for fold in folds]
    assert sorted(chain(*folds)) == list(range(len(names)))
    assert sum(map(len, dealt)) == len(sizes)  # no group in two folds
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_result_is_measured_on_the_right_images(data: Any) -> None:
    """A network whose embedding is a thumbnail: what is measured can be computed without it."""
    folds = deal_folds(data, "classes", 2)
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
