"""Dense oracle in plain eager PyTorch: N x C tensors, any device, every derivative.

Everything is computed in fp32 (fp64 if an input is fp64), whatever the embeddings' dtype, with
autocast off; the target cosine in fp64 where the device has it. No optimised backend imports this
module.
"""

from __future__ import annotations

import torch

from fused_margin import _transforms, _validate
from fused_margin._arguments import PLAIN, Extras, Found
from fused_margin._numerics import NORM_EPS, accumulation_dtype, shrinkage, sum_dtype
from fused_margin.margins import clamp_cosine, sine


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
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    extras: Extras = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, Found]:
    """Log-sum-exp over the non-target classes (eq. 2) and target cosine (eq. 1).

    Args:
        x: (N, D). w: (C K, D), K rows for each class.
        labels: (N,) integer, rows of w; outside [0, C K) means no target.
        scale: s, float or 0-d tensor.
        extras: K, and what else is asked for.

    Returns:
        lse (N,) in the accumulation dtype, and u (N,) within [-1, 1] in `sum_dtype`; differentiable
        any number of times, as is the total of what else was found.
    """
    dtype = accumulation_dtype(x, w)
    if isinstance(scale, torch.Tensor) and _transforms.is_readable(scale):
        _validate.positive_scale(scale.detach().item())
    with torch.autocast(x.device.type, enabled=False):
        x, w = x.to(dtype), w.to(dtype)
        num_classes = w.shape[0] // extras.centers
        labels = labels.long()
        has_target = (labels >= 0) & (labels < w.shape[0])  # (N,)
        target = labels.where(has_target, 0)
        wide = sum_dtype(x, w)
        u = (normalize(x, wide) * normalize(w[target], wide)).sum(dim=1)
        u = clamp_cosine(u).where(has_target, 0.0)
        classes = torch.arange(num_classes, device=x.device)
        own = labels.where(has_target, -1).div(extras.centers, rounding_mode="floor")
        is_target = classes[None, :] == own[:, None]  # (N, C)
        cosines = normalize(x, dtype) @ normalize(w, dtype).t()
        if extras.centers > 1:
            of_class = cosines.view(x.shape[0], num_classes, extras.centers)
            first = of_class.detach().argmax(dim=2, keepdim=True)  # of equal ones the first
            cosines = of_class.gather(2, first)[:, :, 0]
        found = _found(cosines, is_target, extras, x)
        phi = cosines
        if extras.threshold is not None and extras.phi is not None:
            phi = _reshaped(cosines, extras.threshold, extras.phi)
        # what is left out of the softmax is left out of the sum; 0 times infinity has no gradient
        is_out = is_target | phi.isneginf()
        phi = phi.masked_fill(is_out, 0.0)
        if extras.has_total:
            found = found._replace(total=phi.sum(dim=1).to(wide))
        return _logsumexp(scale * phi, is_out), u, found


def _logsumexp(logits: torch.Tensor, is_out: torch.Tensor) -> torch.Tensor:
    """Over the classes that are in, (N,); -inf without a gradient where there is none."""
    is_empty = is_out.all(dim=1)
    # torch's own derivative of a sum over nothing is NaN
    lse = logits.masked_fill(is_out & ~is_empty[:, None], -float("inf")).logsumexp(dim=1)
    return lse.masked_fill(is_empty, -float("inf"))


def _reshaped(cosines: torch.Tensor, threshold: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """phi of cosines (N, C) (eq. 20), whose gradient is its slope.

    A slope that isn't the derivative, of a phi with a factor that is held constant, is constant to
    second derivatives too.
    """
    offset, linear, square, slope, slope_linear, below, *root = phi.to(cosines.dtype)
    is_above = cosines > threshold.to(cosines.dtype)[:, None]
    fixed = cosines.detach()
    # a parabola in c whose derivative at c is e + f c, and whose value there is phi(c); or a line
    is_derivative = (slope == linear) & (slope_linear == 2.0 * square)
    value = offset + fixed * (linear + square * fixed)
    step = cosines - fixed
    tangent = (slope + slope_linear * fixed) * step
    tangent = tangent + 0.5 * slope_linear * is_derivative * step.square()
    if root:
        value = value + root[0] * sine(cosines)
    return torch.where(is_above, value + tangent, below * cosines)


def _found(
    cosines: torch.Tensor, is_target: torch.Tensor, extras: Extras, x: torch.Tensor
) -> Found:
    """The nearest other class of each row, and how many are nearer than the target."""
    found = Found.empty(x, cosines.dtype, extras)
    if extras.nearer is None:
        return found
    others = cosines.detach().masked_fill(is_target, -float("inf"))
    nearest = others.max(dim=1)
    rank = (others > extras.nearer[:, None]).sum(dim=1)
    return found._replace(hardest=nearest.indices, hardest_cosine=nearest.values, rank=rank)
