"""The networks of the two experiments."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ArticleCNN(nn.Module):
    """The network of the article's first experiment: images (N, 1, 28, 28) -> (N, D).

    The article pools after the second ReLU; before it the result is the same, for a quarter of the
    work.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.dropout(x, 0.25, training=self.training).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, training=self.training)
        return self.fc2(x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the image if `stride` is 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResidualNetwork(nn.Module):
    """Four residual blocks and an average: images (N, channels, height, width) -> (N, D)."""

    def __init__(self, channels: int, embedding_size: int, width: int = 16) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, stride=2)
                for before, after in zip([width, *sizes[:-1]], sizes, strict=True)
            )
        )
        self.head = nn.Linear(sizes[-1], embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def timm_network(name: str, channels: int, embedding_size: int, *, pretrained: bool) -> nn.Module:
    """A network of timm with a linear layer to D outputs in place of its classifier.

    Raises:
        ImportError: timm can't be imported.
        ValueError: timm knows no such network, or can't get its weights.
    """
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(
            f"--model {name} needs timm ({error}): pip install timm, or leave --model out"
        ) from error
    try:
        return timm.create_model(
            name, pretrained=pretrained, in_chans=channels, num_classes=embedding_size
        )
    except RuntimeError as error:
        raise ValueError(f"--model {name}: {error}") from error
    except OSError as error:  # of the network and of the disk
        raise ValueError(f"--model {name} --pretrained: can't get the weights ({error})") from error


class PretrainedInput(nn.Module):
    """A network that gets images as they were when its weights were made.

    Args:
        body: the network.
        mean, deviation: of each channel of pixels in [0, 1], subtracted and divided by.
        channels: of the images; a single one gets the averages over the channels.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, body: nn.Module, mean: Sequence[float], deviation: Sequence[float], channels: int
    ) -> None:
        super().__init__()
        self.body = body
        for name, values in (("mean", mean), ("deviation", deviation)):
            by_channel = list(values) if channels > 1 else [statistics.fmean(values)]
            self.register_buffer(name, torch.tensor(by_channel).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(((images + 1) / 2 - self.mean) / self.deviation)
