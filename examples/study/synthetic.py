"""Synthetic identities: any number of classes, told apart by a network that has to be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SIZE = 32
OBSERVED_SIZE = 64
HIDDEN_SIZE = 256


@dataclass(frozen=True)
class SyntheticData:
    """Observations (count, 64) fp32 and labels (count,) of training and test, the same classes."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def observe_through(first: Tensor, second: Tensor, samples: Tensor) -> Tensor:
    """Observations (count, 64) of samples (count, 32), which go on the unit sphere first."""
    return torch.tanh(torch.tanh(3 * F.normalize(samples) @ first) @ second)


def synthetic_identities(
    num_classes: int, *, per_class: int, test_per_class: int, noise: float, seed: int
) -> SyntheticData:
    """Draw identities on a sphere, samples about them, and observe both through a fixed map.

    A class is a direction in 32 dimensions, a sample that direction plus normal noise of the given
    length, back on the sphere. It is observed through a random two-layer map with tanh, so that
    cosines of observations don't tell classes apart and a network has to undo the map.

    Args:
        num_classes: C.
        per_class: training samples of each class.
        test_per_class: test samples of each class.
        noise: expected length of the noise before the sample goes back on the unit sphere.
        seed: of classes, samples and map.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = normal(LATENT_SIZE, OBSERVED_SIZE) * 3 / LATENT_SIZE**0.5
    second = normal(OBSERVED_SIZE, OBSERVED_SIZE) * 3 / OBSERVED_SIZE**0.5
    centers = F.normalize(normal(num_classes, LATENT_SIZE))

    def observe(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(num_classes).repeat_interleave(count)
        samples = centers[labels] + noise / LATENT_SIZE**0.5 * normal(len(labels), LATENT_SIZE)
        return observe_through(first, second, samples), labels

    train, train_labels = observe(per_class)
    test, test_labels = observe(test_per_class)
    return SyntheticData(train, train_labels, test, test_labels)


class Perceptron(nn.Module):
    """Two hidden layers: observations (N, 64) -> (N, D)."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBSERVED_SIZE, HIDDEN_SIZE),
            nn.LayerNorm(HIDDEN_SIZE),
            nn.ReLU(),
            nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
            nn.LayerNorm(HIDDEN_SIZE),
            nn.ReLU(),
            nn.Linear(HIDDEN_SIZE, embedding_size),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)
