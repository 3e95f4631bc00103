"""How good embeddings are: nearest neighbour among known classes, verification of unseen ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDED_AT_ONCE = 1024  # images
COMPARED_AT_ONCE = 512  # queries: 512 x 60,000 similarities are 123 MB
FEWEST_ERRORS = 10  # a rate measured by fewer than ten false accepts is not quoted
CURVE_POINTS = 100


class DivergedError(RuntimeError):
    """Losses or embeddings are no longer finite."""


@torch.no_grad()
def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Embed images in evaluation mode: (count, channels, height, width) -> (count, D), fp32.

    Raises:
        DivergedError: embeddings are not finite.
    """
    network.eval()
    embeddings = torch.cat([network(batch) for batch in images.split(EMBEDDED_AT_ONCE)]).float()
    if not embeddings.isfinite().all():
        raise DivergedError("embeddings are not finite; lower the learning rate")
    return embeddings


def percent(correct: Tensor) -> float:
    """Return the share of True, in %."""
    return 100 * correct.sum().item() / len(correct)


@torch.no_grad()
def nearest_neighbour_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    leave_one_out: bool = False,
) -> float:
    """Return the share of queries whose nearest gallery entry has their label, in %.

    Works through the queries in blocks: the whole (Q, G) matrix of similarities may not fit memory.
    Euclidean distances are compared in fp64: of long embeddings that lie close together, fp32 would
    find the wrong one.

    Args:
        queries: (Q, D) embeddings.
        query_labels: (Q,) labels.
        gallery: (G, D) embeddings.
        gallery_labels: (G,) labels.
        metric: "euclidean" compares the embeddings as they are, without normalising them.
        leave_one_out: query i is gallery entry i and must not be its own neighbour; needs G >= 2.
    """
    if metric == "cosine":
        queries, gallery = F.normalize(queries), F.normalize(gallery)
        half_squares = gallery.new_zeros(len(gallery))
    else:
        queries, gallery = queries.double(), gallery.double()
        half_squares = gallery.square().sum(dim=1) / 2
    nearest = []
    for rows in torch.arange(len(queries), device=queries.device).split(COMPARED_AT_ONCE):
        # |q - g|^2 = |q|^2 - 2 (q.g - |g|^2 / 2): the nearest has the largest q.g - |g|^2 / 2.
        similarity = queries[rows] @ gallery.T - half_squares  # (rows, G)
        if leave_one_out:
            similarity.scatter_(1, rows[:, None], -math.inf)
        nearest.append(similarity.argmax(dim=1))
    return percent(gallery_labels[torch.cat(nearest)] == query_labels)


@torch.no_grad()
def arg_max_accuracy(criterion: Any, embeddings: Tensor, labels: Tensor) -> float:
    """Return the share of largest logits that are the label's, in %."""
    return percent(criterion.logits(embeddings).argmax(dim=1) == labels)


def closed_set(
    criterion: Any, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """Measure the accuracies, in %, on the classes trained on: by nearest neighbour and by arg max.

    Args:
        criterion: has `logits`.
        train: (G, D) embeddings of the training images, the gallery; train_labels: (G,).
        test: (Q, D) embeddings of other images of the same classes; test_labels: (Q,).
    """
    gallery, queries = (train, train_labels), (test, test_labels)
    return {
        "test_nearest": nearest_neighbour_accuracy(*queries, *gallery),
        "test_nearest_euclidean": nearest_neighbour_accuracy(
            *queries, *gallery, metric="euclidean"
        ),
        "test_arg_max": arg_max_accuracy(criterion, *queries),
        "train_nearest": nearest_neighbour_accuracy(*gallery, *gallery, leave_one_out=True),
        "train_nearest_itself": nearest_neighbour_accuracy(*gallery, *gallery, metric="euclidean"),
        "train_arg_max": arg_max_accuracy(criterion, *gallery),
    }


def pair_scores(embeddings: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine of every pair of images, and whether both show the same class.

    Args:
        embeddings: (count, D).
        labels: (count,).

    Returns:
        Cosines and truths of the count (count - 1) / 2 pairs, as NumPy arrays.
    """
    unit = F.normalize(embeddings.double())
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    cosines = (unit @ unit.T)[first, second]
    return cosines.numpy(force=True), (labels[first] == labels[second]).numpy(force=True)


def verification(cosines: np.ndarray, genuine: np.ndarray) -> dict[str, Any]:
    """Measure how well a threshold on the cosine tells genuine pairs from impostor pairs.

    Args:
        cosines: one per pair.
        genuine: whether the pair shows one class.

    Returns:
        `genuine_pairs`, `impostor_pairs`; `auc`, area under the ROC curve; `eer`, the equal error
        rate in %, interpolated linearly; `tar`, the true accept rate in % by false accept rate, for
        powers of ten down to 10 / impostor pairs, below which too few false accepts are behind it;
        `roc`, the curve from that rate on: 100 points (false accept rate, true accept rate) as
        fractions.

    Raises:
        ValueError: there are no genuine or no impostor pairs.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    impostors = int((~genuine).sum())
    if impostors == 0 or impostors == len(genuine):
        raise ValueError("verification needs both genuine and impostor pairs")
    false_accepts, true_accepts, _ = roc_curve(genuine, cosines, drop_intermediate=False)
    lowest = FEWEST_ERRORS / impostors

    def true_accept_rate(rate: float) -> float:
        # The strictest count of false accepts is a step function: no more than `rate` of them.
        return float(true_accepts[np.searchsorted(false_accepts, rate, side="right") - 1])

    rates = [10.0**-power for power in range(1, 9) if 10.0**-power >= lowest]
    axis = np.geomspace(min(lowest, 1.0), 1.0, CURVE_POINTS)
    return {
        "genuine_pairs": len(genuine) - impostors,
        "impostor_pairs": impostors,
        "auc": float(roc_auc_score(genuine, cosines)),
        "eer": 100 * equal_error_rate(false_accepts, true_accepts),
        "tar": {f"{rate:g}": 100 * true_accept_rate(rate) for rate in rates},
        "roc": [[float(f"{rate:.4g}"), round(true_accept_rate(rate), 5)] for rate in axis],
    }


def equal_error_rate(false_accepts: np.ndarray, true_accepts: np.ndarray) -> float:
    """Return where false accepts equal false rejects, on the straight line between two points."""
    gap = false_accepts - (1 - true_accepts)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    if gap[after] == 0 or after == 0:
        return float(false_accepts[after])
    part = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(
        false_accepts[after - 1] + part * (false_accepts[after] - false_accepts[after - 1])
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return mean, sample standard deviation and half the 95 % confidence interval of the mean.

    The interval is Student's: it takes the values for independent and normal. Of a single value
    neither deviation nor interval is known: None.
    """
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, deviation, half
