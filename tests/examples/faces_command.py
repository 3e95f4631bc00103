"""Runs of examples/article_faces.py on a few tiny images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import article_faces
import numpy as np
import pytest
from PIL import Image
from study import training

LOSSES = ["arcface", "arcface+regular_face", "cosface", "fixed_adacos", "cross_entropy"]
GROUPS, CLASSES_PER_GROUP, IMAGES = 4, 3, 6
SIZE = 16
QUICK = [
    "--device", "cpu", "--image-size", str(SIZE), "--folds", "2", "--epochs", "1",
    "--batch-size", "16", "--embedding-size", "16", "--seeds", "0",
]  # fmt: skip


def write_people(
    root: Path,
    groups: int = GROUPS,
    classes: int = CLASSES_PER_GROUP,
    images: int = IMAGES,
    color: bool = False,
) -> Path:
    """Write images of 16 x 16: a pattern of each class, with noise."""
    generator = np.random.default_rng(0)
    shape = (SIZE, SIZE, 3) if color else (SIZE, SIZE)
    for group in range(groups):
        for person in range(classes):
            folder = root / f"g{group}" / f"s{person}"
            folder.mkdir(parents=True)
            coarse = generator.integers(0, 256, (4, 4, 3) if color else (4, 4))
            pattern = coarse.repeat(4, axis=0).repeat(4, axis=1)
            for image in range(images):
                noisy = pattern + generator.integers(-30, 31, shape)
                pixels = noisy.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


def run_main(people: Path, *arguments: str) -> int:
    """Run in this process, where importing torch is already paid for."""
    return article_faces.main(["--images", str(people), *QUICK, "--quiet", *arguments])


def read_runs(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"]


def table_rows(output: str, count: int) -> dict[str, list[str]]:
    """Map the first cell of each line below the table's rule to the line's cells."""
    lines = output.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return {line.split()[0]: line.split() for line in lines[rule + 1 : rule + 1 + count]}


def count_epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the epochs trained from now on."""
    train_epoch, epochs = training.train_epoch, []

    def counted(*arguments: Any) -> float:
        epochs.append(1)
        return train_epoch(*arguments)

    monkeypatch.setattr(training, "train_epoch", counted)
    return epochs


def assert_refused(
    capsys: pytest.CaptureFixture[str], run: Callable[[], int], *messages: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    usage, error = captured.err.splitlines()
    assert usage.startswith("usage:")
    for message in messages:
        assert message in error
