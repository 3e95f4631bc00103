"""Names for what travels together between the operators and the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Labels as `check_labels` and ``margin_ce`` return them.
IGNORED, INVALID = -1, -2


class Swept(NamedTuple):
    """What a sweep leaves for the backward.

    Attributes:
        lse: (N,) fp64 (eq. 2). u: target cosines in [-1, 1], (N,) fp64 (eq. 1).
        inv_x: 1 / max(||x||, eps), (N,). inv_w: likewise (C,); accumulation dtype.
        kept: cosines or exponentials that need not be formed again, as the backend lays them out.
    """

    lse: torch.Tensor
    u: torch.Tensor
    inv_x: torch.Tensor
    inv_w: torch.Tensor
    kept: torch.Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    scale: bool


class Gradients(NamedTuple):
    """d_x (N, D), d_w (C, D) in their input's dtype, d_scale 0-d; None where not asked for."""

    x: torch.Tensor | None
    w: torch.Tensor | None
    scale: torch.Tensor | None
