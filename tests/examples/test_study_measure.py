"""What the studies measure, against the definitions, spelled out."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from study import measure

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = settings(max_examples=50, derandomize=True, deadline=None, database=None)
Metric = Literal["cosine", "euclidean"]


# Few levels: many scores are equal.
LEVELS = st.integers(-5, 5).map(lambda level: level / 5)


@st.composite
def scored_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and truths, in any order, with at least one genuine and one impostor pair."""
    genuine = draw(st.lists(LEVELS, min_size=1, max_size=20))
    impostor = draw(st.lists(LEVELS, min_size=1, max_size=120))
    pairs = [(cosine, True) for cosine in genuine] + [(cosine, False) for cosine in impostor]
    cosines, truths = zip(*draw(st.permutations(pairs)), strict=True)
    return np.array(cosines), np.array(truths)


def roc_points(cosines: np.ndarray, genuine: np.ndarray) -> list[tuple[Fraction, Fraction]]:
    """False and true accept rates at every threshold, from none accepted to all, exactly."""
    impostors, genuines = cosines[~genuine], cosines[genuine]
    return [
        (
            Fraction(int((impostors >= threshold).sum()), len(impostors)),
            Fraction(int((genuines >= threshold).sum()), len(genuines)),
        )
        for threshold in [math.inf, *sorted(set(cosines.tolist()), reverse=True)]
    ]


def random_pairs(seed: int, genuine: int, impostor: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    cosines = np.concatenate(
        [generator.normal(0.5, 0.2, genuine), generator.normal(0.1, 0.2, impostor)]
    )
    return cosines, np.arange(genuine + impostor) < genuine


@SETTINGS
@given(scored_pairs())
def test_auc_is_the_share_of_pairs_in_order(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    cosines, genuine = pairs
    impostors = cosines[~genuine]
    wins = sum(
        Fraction(int((cosine > impostors).sum())) + Fraction(int((cosine == impostors).sum()), 2)
        for cosine in cosines[genuine]
    )
    expected = wins / (len(impostors) * int(genuine.sum()))
    assert measure.verification(cosines, genuine)["auc"] == pytest.approx(float(expected))


@SETTINGS
@given(scored_pairs())
def test_eer_is_where_the_curve_meets_the_diagonal(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    points, expected = roc_points(*pairs), Fraction(-1)
    # FAR + TAR rises from point to point, from 0 to 2: it is 1 once, on the line between two.
    for (far, tar), (next_far, next_tar) in pairwise(points):
        if far + tar <= 1 <= next_far + next_tar:
            part = (1 - far - tar) / (next_far + next_tar - far - tar)
            expected = far + part * (next_far - far)
    assert measure.verification(*pairs)["eer"] == pytest.approx(100 * float(expected), abs=1e-9)


def test_eer_of_two_normal_distributions() -> None:
    eer = measure.verification(*random_pairs(0, 20_000, 200_000))["eer"]
    # Means 0.4 apart with deviation 0.2 cross at one deviation from both.
    exact = 100 * (1 - statistics.NormalDist().cdf(1.0))
    assert eer == pytest.approx(exact, abs=5 * 100 * math.sqrt(0.1587 * 0.8413 / 20_000))


def best_true_accepts(points: list[tuple[Fraction, Fraction]], rate: Fraction) -> Fraction:
    """The most genuine pairs accepted at a threshold that lets in no more impostors than `rate`."""
    return max(true for false, true in points if false <= rate)


@SETTINGS
@given(scored_pairs())
def test_tar_lets_in_no_more_impostors_than_it_says(
    pairs: tuple[np.ndarray, np.ndarray],
) -> None:
    points, result = roc_points(*pairs), measure.verification(*pairs)
    for rate, value in result["tar"].items():
        expected = best_true_accepts(points, Fraction(rate))
        assert value == pytest.approx(100 * float(expected))


@pytest.mark.parametrize(
    ("impostors", "rates"),
    [
        (99, []),
        (100, ["0.1"]),
        (999, ["0.1"]),
        (1000, ["0.1", "0.01"]),
        (9999, ["0.1", "0.01"]),
        (10_000, ["0.1", "0.01", "0.001"]),
        (100_000, ["0.1", "0.01", "0.001", "0.0001"]),
        (1_000_000, ["0.1", "0.01", "0.001", "0.0001", "1e-05"]),
    ],
)
def test_no_rate_is_quoted_below_ten_false_accepts(impostors: int, rates: list[str]) -> None:
    cosines, genuine = random_pairs(1, 50, impostors)
    result = measure.verification(cosines, genuine)
    assert list(result["tar"]) == rates
    assert (result["genuine_pairs"], result["impostor_pairs"]) == (50, impostors)
    lowest = 10 / impostors
    assert result["roc"][0][0] == pytest.approx(lowest, rel=1e-3)
    assert min(rate for rate, _ in result["roc"]) > 0.999 * lowest


@pytest.mark.parametrize("impostors", [150, 3000])
def test_curve_against_counting(impostors: int) -> None:
    cosines, genuine = random_pairs(2, 80, impostors)
    points = roc_points(cosines, genuine)
    curve = measure.verification(cosines, genuine)["roc"]
    axis = np.geomspace(10 / impostors, 1, 100)
    assert len(curve) == 100
    for (far, tar), rate in zip(curve, axis, strict=True):
        assert far == pytest.approx(rate, rel=1e-3)
        whole = Fraction(rate) + Fraction(1, 10**12)  # 10 / 150 as a float is less than that
        assert tar == pytest.approx(float(best_true_accepts(points, whole)), abs=1e-5)
    assert curve[-1] == [1.0, 1.0]
    rates, accepts = np.array(curve).T
    assert (np.diff(rates) > 0).all()
    assert (np.diff(accepts) >= 0).all()
    assert accepts[0] < accepts[-1]


def test_perfect_and_worthless_scores() -> None:
    genuine = np.arange(300) < 100
    perfect = measure.verification(np.where(genuine, 0.9, 0.1), genuine)
    assert (perfect["auc"], perfect["eer"]) == (1.0, 0.0)
    assert perfect["tar"] == {"0.1": 100.0}
    worthless = measure.verification(np.full(300, 0.5), genuine)
    assert (worthless["auc"], worthless["eer"]) == (0.5, 50.0)
    assert worthless["tar"] == {"0.1": 0.0}  # accepting one means accepting all
    reversed_ = measure.verification(np.where(genuine, 0.1, 0.9), genuine)
    assert (reversed_["auc"], reversed_["eer"]) == (0.0, 100.0)


@pytest.mark.parametrize("genuine", [False, True])
def test_verification_needs_both_kinds(genuine: bool) -> None:
    with pytest.raises(ValueError, match="needs both genuine and impostor pairs"):
        measure.verification(np.linspace(0, 1, 5), np.full(5, genuine))


def test_every_pair_is_scored_once() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(9, 4, generator=generator) * torch.rand(9, 1, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 5])
    cosines, genuine = measure.pair_scores(embeddings, labels)
    expected = [
        (torch.cosine_similarity(embeddings[i].double(), embeddings[j].double(), dim=0).item(),
         labels[i].item() == labels[j].item())
        for i in range(9) for j in range(i + 1, 9)
    ]  # fmt: skip
    assert len(cosines) == 9 * 8 / 2
    assert cosines == pytest.approx([cosine for cosine, _ in expected], abs=1e-12)
    assert genuine.tolist() == [same for _, same in expected]


def brute_force_accuracy(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    metric: str,
    leave_one_out: bool,
) -> float:
    correct = 0
    for i, query in enumerate(queries):
        distances = []
        for entry in gallery:
            if metric == "euclidean":
                distances.append(np.linalg.norm(query - entry))
            else:
                cosine = query @ entry / (np.linalg.norm(query) * np.linalg.norm(entry))
                distances.append(-cosine)
        if leave_one_out:
            distances[i] = math.inf
        correct += int(gallery_labels[int(np.argmin(distances))] == query_labels[i])
    return 100 * correct / len(queries)


@pytest.mark.parametrize("block", [1, 7, 512])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_neighbour_against_brute_force(
    monkeypatch: pytest.MonkeyPatch, block: int, leave_one_out: bool, metric: Metric
) -> None:
    monkeypatch.setattr(measure, "COMPARED_AT_ONCE", block)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    # Lengths that differ by 100 make cosine, distance and dot product disagree on who is nearest.
    lengths = 10 ** generator.uniform(-1, 1, (60, 1))
    points = lengths * (generator.normal(size=(60, 5)) + 1.5 * np.eye(5)[labels])
    if leave_one_out:
        arrays = (points, labels, points, labels)
    else:
        arrays = (points[:20], labels[:20], points[20:], labels[20:])
    tensors = [torch.from_numpy(array) for array in arrays]
    accuracy = measure.nearest_neighbour_accuracy(
        *tensors, metric=metric, leave_one_out=leave_one_out
    )
    assert accuracy == brute_force_accuracy(*arrays, metric, leave_one_out)
    other = "euclidean" if metric == "cosine" else "cosine"
    assert accuracy != brute_force_accuracy(*arrays, other, leave_one_out)
    assert 40 < accuracy < 95  # so that an accident doesn't agree


@SETTINGS
@given(st.integers(0, 10**6), st.sampled_from(["cosine", "euclidean"]))
def test_nearest_neighbour_of_random_points(seed: int, metric: Metric) -> None:
    generator = np.random.default_rng(seed)
    points, labels = generator.normal(size=(24, 3)), generator.integers(0, 4, 24)
    arrays = (points[:8], labels[:8], points[8:], labels[8:])
    accuracy = measure.nearest_neighbour_accuracy(
        *(torch.from_numpy(array) for array in arrays), metric=metric
    )
    assert accuracy == brute_force_accuracy(*arrays, metric, leave_one_out=False)


def test_embedding_is_in_evaluation_mode_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EMBEDDED_AT_ONCE", 4)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2), torch.nn.Dropout(0.9))
    images = torch.randn(11, 1, 3, 3)
    embeddings = measure.embed(network.train(), images)
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, network[1](images.flatten(1)), rtol=1e-5, atol=1e-6)


def test_mean_and_interval_against_a_table_of_students_t() -> None:
    mean, deviation, half = measure.mean_and_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert deviation == pytest.approx(math.sqrt(5 / 3))
    assert half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)  # t(0.975, 3)
    assert measure.mean_and_interval([7.0, 9.0])[2] == pytest.approx(12.706205)  # t(0.975, 1)


def test_interval_of_a_single_value_is_unknown() -> None:
    assert measure.mean_and_interval([3.0]) == (3.0, None, None)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        mean, _, half = measure.mean_and_interval(generator.normal(5, 2, 3).tolist())
        assert half is not None
        covered += abs(mean - 5) <= half
    assert 920 <= covered <= 980  # 950, with a standard deviation of 7


def test_long_embeddings_close_together_are_their_own_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 1000 + 1e-3 * torch.randn(500, 16, generator=generator)
    assert len(points.unique(dim=0)) == 500
    labels = torch.arange(500)
    accuracy = measure.nearest_neighbour_accuracy
    assert accuracy(points, labels, points, labels, metric="euclidean") == 100
