"""Types of command-line arguments, and what a result says of the machine it came from."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fused_margin as fm


def whole_number(at_least: int, at_most: int = 2**63 - 1) -> Callable[[str], int]:
    bounds = f"of at least {at_least}" if at_most == 2**63 - 1 else f"from {at_least} to {at_most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or not at_least <= int(text) <= at_most:
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")
        return int(text)

    return parse


def real_number(above: float, at_most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not above < value <= at_most:
            raise argparse.ArgumentTypeError(
                f"expected a number above {above:g}, at most {at_most:g}, got {text!r}"
            )
        return value

    return parse


learning_rate = real_number(0, 10)
thread_count = whole_number(1, 1024)  # torch crashes where it can't start them all


def usable_device(text: str) -> torch.device:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:INDEX, got {text!r}")
    device, gpus = torch.device(text), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise argparse.ArgumentTypeError(f"asked for {text!r} with {gpus} GPUs; try --device cpu")
    return device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def writable_file(text: str) -> Path:
    """A file that can be written: in a folder that exists, and not a folder itself."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"can't write {text!r}; name a file in a folder that exists and is writable"
        )
    return path


def versions() -> dict[str, str]:
    """Say what made a result, for its JSON."""
    return {
        "fused_margin": fm.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class, which torch.load refuses
    }
