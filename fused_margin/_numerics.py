"""Numerical conventions that every backend shares."""

from __future__ import annotations

import torch

# x_hat = x / max(||x||, NORM_EPS), the convention of torch.nn.functional.normalize
NORM_EPS = 1e-12

# An inverse norm from here on comes from the clamp, where the gradient has no projection. A little
# below 1 / NORM_EPS, which rounding may miss.
CLAMPED_INVERSE_NORM = 0.999 / NORM_EPS


def accumulation_dtype(x: torch.Tensor, w: torch.Tensor) -> torch.dtype:
    """fp64 if either input is fp64, else fp32: the dtype of sums, norms, loss, lse and u."""
    return torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32


def compute_dtype(x: torch.Tensor, w: torch.Tensor) -> torch.dtype:
    """The dtype in which products are asked for: autocast's if it is on, else the embeddings'.

    As under autocast itself, fp64 is never lowered.
    """
    if accumulation_dtype(x, w) is torch.float64:
        return torch.float64
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
