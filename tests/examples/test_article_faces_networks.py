"""The networks of the second experiment, those of timm among them."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import article_faces
import pytest
import torch
from faces_command import SIZE, assert_refused, run_main, write_people
from study import networks
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeNetwork(nn.Module):
    """A network like timm's: its attribute says what its pretrained weights were made for."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3)}
        self.head = nn.Linear(channels * SIZE * SIZE, outputs)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach())
        return self.head(images.flatten(1))


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put a module named timm in place, and keep what it is asked for and gives."""
    calls = []

    def create_model(name: str, *, pretrained: bool, in_chans: int, num_classes: int) -> nn.Module:
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if name == "offline" and pretrained:
            raise OSError("no route to host")
        network = FakeNetwork(in_chans, num_classes)
        calls.append((name, pretrained, in_chans, num_classes, network))
        return network

    timm: Any = types.ModuleType("timm")
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


@pytest.mark.parametrize("pretrained", [False, True])
def test_network_of_timm(
    people: Path, tmp_path: Path, fake_timm: list[tuple[Any, ...]], pretrained: bool
) -> None:
    path = tmp_path / "faces.json"
    arguments = ["--model", "tiny", *["--pretrained"] * pretrained, "--losses", "cosface"]
    assert run_main(people, *arguments, "--json", str(path)) == 0
    assert [call[:4] for call in fake_timm] == [("tiny", pretrained, 1, 16)] * 3  # a check, 2 runs
    settings = json.loads(path.read_text())["settings"]
    assert (settings["model"], settings["pretrained"]) == ("tiny", pretrained)
    assert settings["parameters"] == (SIZE * SIZE + 1) * 16
    checked = fake_timm[0][4].seen[0]
    # Pixels in [0, 1] with the means and deviations of the channels averaged, or in [-1, 1].
    low, high = ((0 - 0.4) / 0.2, (1 - 0.4) / 0.2) if pretrained else (-1, 1)
    assert low - 1e-5 <= checked.min() < low + 0.8
    assert high - 0.8 < checked.max() <= high + 1e-5


def test_pretrained_network_gets_each_channel_its_own_way(
    tmp_path: Path, fake_timm: list[tuple[Any, ...]]
) -> None:
    root = write_people(tmp_path / "people", color=True)
    assert run_main(root, "--model", "tiny", "--pretrained", "--losses", "cosface") == 0
    assert fake_timm[0][2] == 3
    network = networks.PretrainedInput(nn.Identity(), (0.2, 0.4, 0.6), (0.1, 0.2, 0.3), 3)
    white = network(torch.ones(2, 3, 4, 4))
    for channel, expected in enumerate((8.0, 3.0, 4 / 3)):
        torch.testing.assert_close(white[:, channel], torch.full((2, 4, 4), expected))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "unknown"], "--model unknown: Unknown model (unknown)"),
        (
            ["--model", "offline", "--pretrained"],
            "--model offline --pretrained: can't get the weights (no route to host)",
        ),
        (
            ["--model", "tiny", "--image-size", "17"],
            "tiny can't train on a batch of 14 images of 17 x 17 (mat1 and mat2 shapes",
        ),
    ],
    ids=["unknown", "offline", "size"],
)
def test_errors_of_timm_come_before_training(
    people: Path,
    capsys: pytest.CaptureFixture[str],
    fake_timm: list[tuple[Any, ...]],
    arguments: list[str],
    message: str,
) -> None:
    assert_refused(capsys, lambda: run_main(people, *arguments), message)
    assert len(fake_timm) <= 1


@pytest.mark.usefixtures("no_training")
def test_missing_timm_is_an_error(
    people: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "pip install timm, or leave --model out"
    assert_refused(capsys, lambda: run_main(people, "--model", "tiny"), message)


def test_network_of_the_arguments() -> None:
    arguments = argparse.Namespace(model=None, embedding_size=7, precision="bf16", pretrained=False)
    network = article_faces.build_network(arguments, 3)
    output = network.eval()(torch.zeros(2, 3, 32, 32))
    assert output.shape == (2, 7)
    assert output.dtype == torch.float32
    assert network.precision == "bf16"
