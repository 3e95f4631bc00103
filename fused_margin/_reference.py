"""Dense oracle in plain eager PyTorch: N x C tensors, any device, every derivative.

Everything is computed in fp32 (fp64 if an input is fp64), whatever the embeddings' dtype, with
autocast off; the target cosine in fp64 where the device has it. No optimised backend imports this
module.
"""

from __future__ import annotations

import torch

from fused_margin import _transforms, _validate
from fused_margin._numerics import NORM_EPS, accumulation_dtype, shrinkage, sum_dtype
from fused_margin.margins import clamp_cosine


def normalize(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x / max(||x||, 1e-12) along the last dimension, in ``dtype``."""
    x = x.to(dtype)
    shrink = shrinkage(x)
    small = x * shrink
    is_clamped = torch.linalg.vector_norm(small.detach(), dim=-1, keepdim=True) <= NORM_EPS
    # the second derivative of a norm is NaN at 0, so such rows are filled before, not after it
    norm = torch.linalg.vector_norm(small.masked_fill(is_clamped, 1.0), dim=-1, keepdim=True)
    # of x itself, so that autograd notices a change of it in place
    return x / norm.masked_fill(is_clamped, NORM_EPS) * shrink


def cosine_lse(
    x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the non-target classes (eq. 2) and target cosine (eq. 1).

    Args:
        x: (N, D). w: (C, D). labels: (N,) integer; outside [0, C) means no target.
        scale: s, float or 0-d tensor.

    Returns:
        lse (N,) in the accumulation dtype, and u (N,) within [-1, 1] in `sum_dtype`; differentiable
        any number of times.
    """
    dtype = accumulation_dtype(x, w)
    if isinstance(scale, torch.Tensor) and _transforms.is_readable(scale):
        _validate.positive_scale(scale.detach().item())
    with torch.autocast(x.device.type, enabled=False):
        x, w = x.to(dtype), w.to(dtype)
        num_classes = w.shape[0]
        labels = labels.long()
        has_target = (labels >= 0) & (labels < num_classes)  # (N,)
        target = labels.where(has_target, 0)
        wide = sum_dtype(x, w)
        u = (normalize(x, wide) * normalize(w[target], wide)).sum(dim=1)
        u = clamp_cosine(u).where(has_target, 0.0)
        classes = torch.arange(num_classes, device=x.device)
        is_target = classes[None, :] == labels[:, None]  # (N, C)
        logits = scale * (normalize(x, dtype) @ normalize(w, dtype).t())
        if num_classes == 1:  # a sum over no class, whose derivative logsumexp would make NaN
            return logits[:, 0].masked_fill(has_target, -float("inf")), u
        return logits.masked_fill(is_target, -float("inf")).logsumexp(dim=1), u
