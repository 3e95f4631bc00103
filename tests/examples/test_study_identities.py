"""Synthetic identities: computed from their numbers, alike in nothing else, and free."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from study import identities as identities_module
from study import synthetic

pytestmark = pytest.mark.usefixtures("one_thread")


def identities(num_classes: int = 1000, num_trained: int = 50, seed: int = 0) -> Any:
    return identities_module.Identities(num_classes, num_trained, seed)


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
    assert observations.shape == (16, synthetic.OBSERVED_SIZE)
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
