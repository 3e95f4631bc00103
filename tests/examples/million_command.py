"""Runs of examples/million_classes.py with few classes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import million_classes
import pytest

LOSSES = ("fixed_adacos", "arcface", "cosface")
SMALL = [
    "--device", "cpu", "--classes", "2000", "--embedding", "16", "--batch", "32", "--steps", "6",
    "--identities-seen", "40", "--quiet",
]  # fmt: skip


def run_main(*arguments: str) -> int:
    """Run in this process, where importing torch is already paid for."""
    return million_classes.main([*SMALL, *arguments])


def read_run(path: Path, what: str = "training") -> dict[str, Any]:
    (run,) = [run for run in json.loads(path.read_text())["runs"] if run["what"] == what]
    return run


def call_in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` at the beginning of this step, the first being 0."""
    train_step = million_classes.train_step

    def wrapped(training: Any, index: int, batch: int) -> float:
        if index == step:
            action()
        return train_step(training, index, batch)

    monkeypatch.setattr(million_classes, "train_step", wrapped)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def small_training(*arguments: str) -> tuple[Any, Any]:
    parsed = million_classes.parse_arguments(million_classes.make_parser(), [*SMALL, *arguments])
    return million_classes.prepare(parsed), parsed
