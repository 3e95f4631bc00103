"""Losses whose logits keep a norm, or have several centres a class, which the kernels don't know.

The logit of a class is s a_n b_k c_nk, with a_n = ||x_n|| or 1 and b_k = ||w_k|| or 1; of K centres
of a class the nearest counts. The scale of the kernels is one number for all rows and classes, so
this is plain PyTorch on any device, block by block of classes: neither the (N, C) logits nor a
normalised copy of the weights is made, and d_w is the only (C, D). Loops stay inside operators, as
in `_weight_sweeps`. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fused_margin import _ops, _transforms, _validate, _validate_settings, margins
from fused_margin._numerics import CLAMPED_INVERSE_NORM, accumulation_dtype, sum_dtype
from fused_margin._weight_sweeps import _add_rows, _blocks, _normalized
from fused_margin.functional import Psi

Tensor = torch.Tensor

# Bytes of the logits (N, B K) of a block, and of its normalised weights (B K, D)
CPU_BYTES, OTHER_BYTES = 4 << 20, 64 << 20

_lib = torch.library.Library("fused_margin", "FRAGMENT")
_lib.define(
    "dots_lse(Tensor x, Tensor w, Tensor labels, bool normalize, int centers)"
    " -> (Tensor lse, Tensor rows)",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "dots_lse_backward(Tensor g_lse, Tensor g_rows, Tensor lse, Tensor x, Tensor w, Tensor labels,"
    " bool normalize, int centers, bool need_x, bool need_w) -> (Tensor d_x, Tensor d_w)",
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
    centers: int = 1,
) -> Tensor:
    """Cross-entropy of each row with target logit s a_n b_y psi(u_n), (N,).

    Args:
        embeddings: (N, D).
        weight: (C K, D), K rows a class.
        labels: (N,); a row of label -100 is left out, its loss is 0.
        psi: margin, as in `functional.margin_softmax`.
        scale: s > 0.
        keep_x: whether a_n is the norm of the embedding, not 1.
        keep_w: whether b_k is the norm of the weight, not 1.
        centers: K.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.plain("weight", weight)
    scale = _validate_settings.number_scale(scale)
    num_classes = weight.shape[0] // centers
    labels = _ops.check_labels(labels, num_classes, -100)
    ignored = labels == _ops.IGNORED
    dtype, wide = accumulation_dtype(embeddings, weight), sum_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = embeddings.masked_fill(ignored[:, None], 0.0).to(dtype)
        queries = scale * (x if keep_x else F.normalize(x))
        lse, rows = _ops_here.dots_lse(queries, weight, labels, not keep_w, centers)
        x, rows = x.to(wide), rows.to(wide)  # (N, D), (N, K, D)
        cosines = (F.normalize(x)[:, None] * F.normalize(rows, dim=2)).sum(dim=2)
        nearest = cosines.detach().argmax(dim=1, keepdim=True)  # the first of equal ones
        u = margins.clamp_cosine(cosines.gather(1, nearest)[:, 0])
        is_built_in = isinstance(psi, margins.Margin)
        target = scale * (margins.apply(u, psi) if is_built_in else psi(u))
        if keep_x:
            target = target * torch.linalg.vector_norm(x, dim=1)
        if keep_w:
            target = target * torch.linalg.vector_norm(rows[:, 0], dim=1)
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
    centers: int = 1,
) -> Tensor:
    """s a_n b_k c_nk without a margin, (N, C), for those who want the whole matrix."""
    _validate.matrices(embeddings, weight)
    _validate.plain("weight", weight)
    dtype = accumulation_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x, w = embeddings.to(dtype), weight.to(dtype)
        dots = (x if keep_x else F.normalize(x)) @ (w if keep_w else F.normalize(w)).t()
        return scale * _nearest(dots, centers)[0]


def _nearest(dots: Tensor, centers: int) -> tuple[Tensor, Tensor | None]:
    """The largest of each K columns, (N, B), and which it is; the first of equal ones."""
    if centers == 1:
        return dots, None
    dots = dots.unflatten(1, (-1, centers))
    which = dots.argmax(dim=2, keepdim=True)
    return dots.gather(2, which)[:, :, 0], which


def _classes(x: Tensor, w: Tensor, centers: int) -> Iterator[tuple[int, int]]:
    """First and last class of each block."""
    num_classes = w.shape[0] // centers
    limit = CPU_BYTES if x.device.type == "cpu" else OTHER_BYTES
    size = max(64, limit // (x.dtype.itemsize * centers * max(*x.shape, 1)))
    return _blocks(num_classes, size)


def _block(
    x: Tensor, w: Tensor, labels: Tensor, normalize: bool, centers: int, start: int, stop: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Logits (N, B) with -inf at targets, which centre each is of, w or w_hat, and 1 / ||w||."""
    w = w[start * centers : stop * centers]
    w, inverse = _normalized(w) if normalize else (w.to(x.dtype), None)
    values, which = _nearest(x @ w.t(), centers)
    inside = ((labels >= start) & (labels < stop)).nonzero()[:, 0]
    values[inside, labels[inside] - start] = -float("inf")
    return values, which, w, inverse


def _forward(
    x: Tensor, w: Tensor, labels: Tensor, normalize: bool, centers: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the other classes (eq. 2), (N,), and the target's rows, (N, K, D)."""
    lse = x.new_full((x.shape[0],), -float("inf"))
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _classes(x, w, centers):
            values = _block(x, w, labels, normalize, centers, start, stop)[0]
            lse = torch.logaddexp(lse, values.logsumexp(dim=1))
    return lse, _rows(w, labels, centers)


def _rows(w: Tensor, labels: Tensor, centers: int) -> Tensor:
    return w[_row_numbers(labels, centers)]


def _row_numbers(labels: Tensor, centers: int) -> Tensor:
    """Rows of w that belong to each label's class, (N, K); a row without target takes class 0's."""
    first = labels.clamp_min(0)[:, None] * centers
    return first + torch.arange(centers, device=labels.device)


def _backward(
    g_lse: Tensor, g_rows: Tensor, lse: Tensor, x: Tensor, w: Tensor, labels: Tensor,
    normalize: bool, centers: int, need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients by x and w (eq. 7, 8): each row of d_w is written once, and the targets' added."""
    d_x = x.new_zeros(x.shape if need_x else (0,))
    d_w = w.new_empty(w.shape if need_w else (0,))
    with torch.autocast(x.device.type, enabled=False):
        for start, stop in _classes(x, w, centers):
            values, which, rows, inverse = _block(x, w, labels, normalize, centers, start, stop)
            g = values.sub_(lse[:, None]).exp_().mul_(g_lse[:, None])
            if which is not None:
                spread = g.new_zeros(*g.shape, centers)
                g = spread.scatter_(2, which, g[:, :, None]).flatten(1)
            if need_x:
                d_x.addmm_(g, rows)
            if need_w:
                q = g.t() @ x
                if inverse is not None:
                    radial = (q * rows).sum(dim=1, keepdim=True)
                    radial.masked_fill_(inverse >= CLAMPED_INVERSE_NORM, 0.0)
                    q.addcmul_(radial, rows, value=-1.0).mul_(inverse)
                d_w[start * centers : stop * centers] = q
        if need_w:
            numbers = _row_numbers(labels, centers).flatten()
            _add_rows(d_w, numbers, g_rows.flatten(0, 1).to(d_w.dtype))
    return d_x, d_w


def _plain(
    x: Tensor, w: Tensor, labels: Tensor, normalize: bool, centers: int
) -> tuple[Tensor, Tensor]:
    """`_forward` with all derivatives, and with the (N, C) logits."""
    rows = w.to(x.dtype)
    values = _nearest(x @ (F.normalize(rows) if normalize else rows).t(), centers)[0]
    classes = torch.arange(values.shape[1], device=x.device)
    values = values.masked_fill(classes[None, :] == labels[:, None], -float("inf"))
    return values.logsumexp(dim=1), _rows(w, labels, centers)


class _DotsLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w, labels, normalize, centers):
        with torch._C._AutoDispatchBelowAutograd():
            lse, rows = _ops_here.dots_lse(x, w, labels, normalize, centers)
        ctx.save_for_backward(x, w, labels, lse)
        ctx.settings = normalize, centers
        return lse, rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g_lse, g_rows), (x, w, labels, lse) = grad_outputs, ctx.saved_tensors
        need_x, need_w, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or _transforms.is_transformed(g_lse, g_rows):
            with torch.enable_grad():
                wanted = [t for t, is_needed in ((x, need_x), (w, need_w)) if is_needed]
                outputs = _plain(x, w, labels, *ctx.settings)
                found = iter(
                    torch.autograd.grad(
                        outputs, wanted, (g_lse, g_rows), create_graph=True, allow_unused=True
                    )
                )
            d_x, d_w = (next(found) if is_needed else None for is_needed in (need_x, need_w))
            return d_x, d_w, None, None, None
        d_x, d_w = _ops_here.dots_lse_backward(
            g_lse, g_rows, lse, x, w, labels, *ctx.settings, need_x, need_w
        )
        return d_x if need_x else None, d_w if need_w else None, None, None, None


def _dots_lse_autograd(x: Tensor, w: Tensor, labels: Tensor, normalize: bool, centers: int) -> Any:
    if _transforms.is_transformed(x, w):
        return _plain(x, w, labels, normalize, centers)
    return _DotsLse.apply(x, w, labels, normalize, centers)


_lib.impl("dots_lse", _forward, "CompositeExplicitAutograd")  # plain PyTorch, any device
_lib.impl("dots_lse_backward", _backward, "CompositeExplicitAutograd")
_lib.impl("dots_lse", _dots_lse_autograd, "Autograd")


@torch.library.register_fake("fused_margin::dots_lse", lib=_lib)
def _(x, w, labels, normalize, centers):
    rows = w.new_empty((x.shape[0], centers, w.shape[1]))
    return x.new_empty(x.shape[0]), rows


@torch.library.register_fake("fused_margin::dots_lse_backward", lib=_lib)
def _(g_lse, g_rows, lse, x, w, labels, normalize, centers, need_x, need_w):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        w.new_empty(w.shape if need_w else (0,)),
    )
