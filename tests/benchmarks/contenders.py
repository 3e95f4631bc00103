"""Which of the contenders don't run everywhere, and one that says what is asked of it."""

from __future__ import annotations

import torch.nn.functional as F

HAS_LCE = hasattr(F, "linear_cross_entropy")
GPU_ONLY = {"cce", "cce_exact", "liger", "liger_fp32"}


class Recorder:
    """Enters in a log what is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def clear(self) -> None:
        self.log.append(f"clear {self.name}")

    def step(self) -> None:
        self.log.append(f"step {self.name}")
