"""Dense oracle in plain eager PyTorch: N x C tensors, any device, twice differentiable.

Everything is computed in fp32 (fp64 if an input is fp64), whatever the embeddings' dtype, with
autocast off. No optimised backend imports this module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_margin import _validate
from fused_margin._numerics import NORM_EPS, accumulation_dtype


def normalize(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x / max(||x||, 1e-12) along the last dimension, in ``dtype``."""
    return F.normalize(x.to(dtype), dim=-1, eps=NORM_EPS)


def cosine_lse(
    x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the non-target classes (eq. 2) and target cosine (eq. 1).

    Args:
        x: (N, D). w: (C, D). labels: (N,) integer; outside [0, C) means no target.
        scale: s, float or 0-d tensor.

    Returns:
        lse (N,), u (N,), differentiable twice.
    """
    dtype = accumulation_dtype(x, w)
    if (
        isinstance(scale, torch.Tensor)
        and scale.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        _validate.positive_scale(scale.detach().item())
    with torch.autocast(x.device.type, enabled=False):
        x, w = normalize(x, dtype), normalize(w, dtype)
        num_classes = w.shape[0]
        labels = labels.long()
        has_target = (labels >= 0) & (labels < num_classes)  # (N,)
        target = labels.where(has_target, torch.zeros_like(labels))
        u = (x * w[target]).sum(dim=1).where(has_target, torch.zeros_like(x[:, 0]))
        classes = torch.arange(num_classes, device=x.device)
        is_target = classes[None, :] == labels[:, None]  # (N, C)
        logits = (scale * (x @ w.t())).masked_fill(is_target, -float("inf"))
        return logits.logsumexp(dim=1), u
