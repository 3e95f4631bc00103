"""Images in miniature, which tests only read, and a guard against training."""

from __future__ import annotations

from pathlib import Path

import pytest
from faces_command import write_people
from mnist_files import write_mnist
from study import training


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("people") / "people")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training fail the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(training, "train_epoch", refuse)


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return root
