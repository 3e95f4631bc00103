"""Runs of examples/article_mnist.py on a few images of MNIST's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import article_mnist

SMALL = ["--device", "cpu", "--epochs", "2", "--batch-size", "16", "--embedding-size", "12"]


def run_main(root: Path, *arguments: str) -> int:
    return article_mnist.main(["--root", str(root), *SMALL, "--quiet", *arguments])


def without_times(path: Path) -> list[dict[str, Any]]:
    runs = json.loads(path.read_text())["runs"]
    for run in runs:
        assert all(second > 0 for second in run.pop("seconds"))
    return runs
