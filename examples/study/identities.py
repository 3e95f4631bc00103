"""Identities and samples that are computed when they are asked for, for any number of classes."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from .synthetic import LATENT_SIZE, OBSERVED_SIZE, observe_through

NOISE = 0.5  # expected length of what a sample adds to its identity's direction, of length 1
FRESH_SAMPLES = 512  # that loss and accuracy are measured on


class Stream(IntEnum):
    """What random numbers are for; the streams are independent."""

    MAP = 0
    CHOICE = 1
    DIRECTION = 2
    BATCH = 3
    FRESH = 4


class Identities:
    """Identities and samples computed when they are asked for: a million take no memory.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is a function of a
    key and a counter. The number of a class is the counter's highest word, and that of a step
    likewise, so that each has a stream of its own that can be begun anywhere, in any order.

    Attributes:
        trained: classes the batches are drawn from.
        untrained: other classes, none if all are trained on.
    """

    def __init__(
        self, num_classes: int, num_trained: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.device = seed, device
        chosen = self.generator(Stream.CHOICE).choice(
            num_classes, min(num_classes, num_trained + FRESH_SAMPLES), replace=False
        )
        self.trained, self.untrained = chosen[:num_trained], chosen[num_trained:]
        draw = self.generator(Stream.MAP).standard_normal
        self.first, self.second = (
            self._on_device(draw((size, OBSERVED_SIZE)) * 3 / math.sqrt(size))
            for size in (LATENT_SIZE, OBSERVED_SIZE)
        )

    def generator(self, stream: Stream, number: int = 0) -> np.random.Generator:
        key = np.array([self.seed, stream], dtype=np.uint64)
        counter = np.array([0, 0, 0, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def directions(self, classes: np.ndarray) -> np.ndarray:
        """Unit vectors of these classes, (count, LATENT_SIZE)."""
        rows = [
            self.generator(Stream.DIRECTION, int(index)).standard_normal(LATENT_SIZE)
            for index in classes
        ]
        points = np.stack(rows)
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    def _observe(
        self, count: int, among: np.ndarray, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw observations (count, OBSERVED_SIZE) and their classes (count,)."""
        classes = generator.choice(among, count)
        noise = generator.standard_normal((count, LATENT_SIZE)) * NOISE / math.sqrt(LATENT_SIZE)
        samples = self._on_device(self.directions(classes) + noise)
        labels = torch.from_numpy(classes).to(self.device)
        return observe_through(self.first, self.second, samples), labels

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """What this step is trained on: observations and labels."""
        return self._observe(size, self.trained, self.generator(Stream.BATCH, step))

    def fresh(self, among: np.ndarray) -> tuple[Tensor, Tensor]:
        """Observations and labels, of these classes, that no step is trained on."""
        return self._observe(FRESH_SAMPLES, among, self.generator(Stream.FRESH))
