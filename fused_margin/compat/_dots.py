"""Losses whose logits keep a norm, which the kernels don't know.

The logit of a class is s a_n b_k c_nk, with a_n = ||x_n|| or 1 and b_k = ||w_k|| or 1. The scale of
the kernels is one number for all rows and classes, so this is plain PyTorch on any device, block by
block of classes: neither the (N, C) logits nor a normalised copy of the weights is made, and d_w is
the only (C, D). Loops stay inside operators, as in `_weight_sweeps`. Equations refer to
``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fused_margin import _ops, _transforms, _validate, _validate_settings, margins
from fused_margin._numerics import CLAMPED_INVERSE_NORM, accumulation_dtype, normalized, sum_dtype
from fused_margin._weight_sweeps import _add_rows, _blocks
from fused_margin.functional import Psi

Tensor = torch.Tensor

# Bytes of the logits (N, B) of a block, and of its normalised weights (B, D)
CPU_BYTES, OTHER_BYTES = 4 << 20, 64 << 20

_lib = torch.library.Library("fused_margin", "FRAGMENT")
_lib.define(
    "dots_lse(Tensor x, Tensor w, Tensor labels, bool normalize) -> (Tensor lse, Tensor rows)",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "dots_lse_backward(Tensor g_lse, Tensor g_rows, Tensor lse, Tensor x, Tensor w, Tensor labels,"
    " bool normalize, bool need_x, bool need_w) -> (Tensor d_x, Tensor d_w)",
    tags=torch.Tag.pt2_compliant_tag,
)
_ops_here = torch.ops.fused_margin


def losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    psi: Psi,
    scale: float,
    *,
    keep_x: bool = False,
    keep_w: bool = False,
) -> Tensor:
    """Cross-entropy of each row with target logit s a_n b_y psi(u_n), (N,).

    Args:
        embeddings: (N, D).
        weight: (C, D).
        labels: (N,); a row of label -100 is left out, its loss is 0.
        psi: margin, as in `functional.margin_softmax`.
        scale: s > 0.
        keep_x: whether a_n is the norm of the embedding, not 1.
        keep_w: whether b_k is the norm of the weight, not 1.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    scale = _validate_settings.number_scale(scale)
    labels = _ops.check_labels(labels, weight.shape[0], -100)
    ignored = labels == _ops.IGNORED
    dtype, wide = accumulation_dtype(embeddings, weight), sum_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.masked_fill(ignored[:, None], 0.0).to(dtype)
        queries = scale * (x if keep_x else F.normalize(x))
        lse, rows = _ops_here.dots_lse(queries, weight, labels, not keep_w)
        x, rows = x.to(wide), rows.to(wide)  # (N, D) each
        u = margins.clamp_cosine((F.normalize(x) * F.normalize(rows)).sum(dim=1))
        is_built_in = isinstance(psi, margins.Margin)
        target = scale * (margins.apply(u, psi) if is_built_in else psi(u))
        if keep_x:
            target = target * torch.linalg.vector_norm(x, dim=1)
        if keep_w:
            target = target * torch.linalg.vector_norm(rows, dim=1)
        loss = -F.logsigmoid(target - lse)  # eq. 4
        # a label out of range on a GPU makes its row NaN, as in `functional`
        poison = torch.where(labels == _ops.INVALID, float("nan"), 1.0).to(loss.dtype)
        return (loss * poison).masked_fill(ignored, 0.0).to(dtype)


def logits(
    embeddings: Tensor,
    weight: Tensor,
    scale: float,
    *,
    keep_x: bool = False,
    keep_w: bool = False,
) -> Tensor:
    """s a_n b_k c_nk without a margin, (N, C), for those who want the whole matrix."""
    _validate.matrices(embeddings, weight)
    _validate.plain("weight", weight)
    dtype = accumulation_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x, w = embeddings.to(dtype), weight.to(dtype)
        return scale * ((x if keep_x else F.normalize(x)) @ (w if keep_w else F.normalize(w)).t())


def _classes(x: Tensor, w: Tensor) -> Iterator[tuple[int, int]]:
    """First and last class of each block."""
    limit = CPU_BYTES if x.device.type == "cpu" else OTHER_BYTES
    return _blocks(w.shape[0], max(64, limit // (x.dtype.itemsize * max(*x.shape, 1))))


def _block(
    x: Tensor, w: Tensor, labels: Tensor, normalize: bool, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (N, B) with -inf at targets, w or w_hat, and 1 / ||w||."""
    w = w[start:stop]
    w, inverse = normalized(w) if normalize else (w.to(x.dtype), None)
    values = x @ w.t()
    inside = ((labels >= start) & (labels < stop)).nonzero()[:, 0]
    values[inside, labels[inside] - start] = -float("inf")
    return values, w, inverse


def _forward(x: Tensor, w: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the other classes (eq. 2), (N,), and the target's rows, (N, D)."""
    lse = x.new_full((x.shape[0],), -float("inf"))
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _classes(x, w):
            values = _block(x, w, labels, normalize, start, stop)[0]
            lse = torch.logaddexp(lse, values.logsumexp(dim=1))
    return lse, w[labels.clamp_min(0)]


def _backward(
    g_lse: Tensor, g_rows: Tensor, lse: Tensor, x: Tensor, w: Tensor, labels: Tensor,
    normalize: bool, need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients by x and w (eq. 7, 8): each row of d_w is written once, and the targets' added."""
    d_x = x.new_zeros(x.shape if need_x else (0,))
    d_w = w.new_empty(w.shape if need_w else (0,))
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _classes(x, w):
            values, rows, inverse = _block(x, w, labels, normalize, start, stop)
            g = values.sub_(lse[:, None]).exp_().mul_(g_lse[:, None])
            if need_x:
                d_x.addmm_(g, rows)
            if need_w:
                q = g.t() @ x
                if inverse is not None:
                    radial = (q * rows).sum(dim=1, keepdim=True)
                    radial.masked_fill_(inverse >= CLAMPED_INVERSE_NORM, 0.0)
                    q.addcmul_(radial, rows, value=-1.0).mul_(inverse)
                d_w[start:stop] = q
        if need_w:
            _add_rows(d_w, labels.clamp_min(0), g_rows.to(d_w.dtype))
    return d_x, d_w


def _plain(x: Tensor, w: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """`_forward` with all derivatives, and with the (N, C) logits."""
    rows = w.to(x.dtype)
    values = x @ (F.normalize(rows) if normalize else rows).t()
    classes = torch.arange(values.shape[1], device=x.device)
    values = values.masked_fill(classes[None, :] == labels[:, None], -float("inf"))
    return values.logsumexp(dim=1), w[labels.clamp_min(0)]


class _DotsLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w, labels, normalize):
        with torch._C._AutoDispatchBelowAutograd():
            lse, rows = _ops_here.dots_lse(x, w, labels, normalize)
        ctx.save_for_backward(x, w, labels, lse)
        ctx.normalize = normalize
        return lse, rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g_lse, g_rows), (x, w, labels, lse) = grad_outputs, ctx.saved_tensors
        need_x, need_w, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or _transforms.is_transformed(g_lse, g_rows):
            with torch.enable_grad():
                wanted = [t for t, is_needed in ((x, need_x), (w, need_w)) if is_needed]
                outputs = _plain(x, w, labels, ctx.normalize)
                found = iter(
                    torch.autograd.grad(
                        outputs, wanted, (g_lse, g_rows), create_graph=True, allow_unused=True
                    )
                )
            d_x, d_w = (next(found) if is_needed else None for is_needed in (need_x, need_w))
            return d_x, d_w, None, None
        d_x, d_w = _ops_here.dots_lse_backward(
            g_lse, g_rows, lse, x, w, labels, ctx.normalize, need_x, need_w
        )
        return d_x if need_x else None, d_w if need_w else None, None, None


def _dots_lse_autograd(x: Tensor, w: Tensor, labels: Tensor, normalize: bool) -> Any:
    if _transforms.is_transformed(x, w):
        return _plain(x, w, labels, normalize)
    return _DotsLse.apply(x, w, labels, normalize)


_lib.impl("dots_lse", _forward, "CompositeExplicitAutograd")  # plain PyTorch, any device
_lib.impl("dots_lse_backward", _backward, "CompositeExplicitAutograd")
_lib.impl("dots_lse", _dots_lse_autograd, "Autograd")


@torch.library.register_fake("fused_margin::dots_lse", lib=_lib)
def _(x, w, labels, normalize):
    return x.new_empty(x.shape[0]), w.new_empty((x.shape[0], w.shape[1]))


@torch.library.register_fake("fused_margin::dots_lse_backward", lib=_lib)
def _(g_lse, g_rows, lse, x, w, labels, normalize, need_x, need_w):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        w.new_empty(w.shape if need_w else (0,)),
    )
