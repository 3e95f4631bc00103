"""Registered operators: schemas, fakes, autograd, and dispatch to the device kernels.

Two primitives (``docs/design.md``): ``cosine_lse``, on which any margin is ordinary autograd over N
numbers, and ``margin_ce``, with a built-in margin and the loss inside. They share one backward
operator. Each "Autograd" implementation is an ``autograd.Function`` that calls the operator below
autograd; the backward operator has one too, so that double backward raises instead of returning
gradients that silently require no grad. PyTorch's private registration API stays in this file.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from fused_margin import _cpu, _validate
from fused_margin._numerics import accumulation_dtype
from fused_margin.margins import Margin

Tensor = torch.Tensor

_lib = torch.library.Library("fused_margin", "DEF")
_lib.define(
    "check_labels(Tensor labels, int num_classes, int ignore_index) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "cosine_lse(Tensor x, Tensor w, Tensor labels, float scale, Tensor? scale_tensor,"
    " ScalarType compute, str backend, int budget)"
    " -> (Tensor lse, Tensor u, Tensor inv_x, Tensor inv_w, Tensor kept)",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "margin_ce(Tensor x, Tensor w, Tensor labels, float scale, float cos_m, float sin_m,"
    " float threshold, float offset, bool straight_through, str reduction, int ignore_index,"
    " ScalarType compute, str backend, int budget)"
    " -> (Tensor loss, Tensor lse, Tensor u, Tensor d_lse, Tensor d_u, Tensor count,"
    " Tensor inv_x, Tensor inv_w, Tensor kept)",
    tags=torch.Tag.pt2_compliant_tag,
)
_lib.define(
    "cosine_lse_backward(Tensor d_lse, Tensor d_u, Tensor? grad_loss, Tensor? count, Tensor x,"
    " Tensor w, Tensor labels, float scale, Tensor? scale_tensor, ScalarType compute, str backend,"
    " Tensor lse, Tensor u, Tensor inv_x, Tensor inv_w, Tensor kept,"
    " bool need_x, bool need_w, bool need_scale)"
    " -> (Tensor d_x, Tensor d_w, Tensor d_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)
_ops = torch.ops.fused_margin

# Labels as `check_labels` returns them.
IGNORED, INVALID = -1, -2


def _triton():
    from fused_margin._triton import launch

    return launch


def _raise_out_of_range(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {num_classes}) or equal to ignore_index={ignore_index}, but"
            f" labels[{row}] is {int(labels[row])} ({int(wrong.sum())} such labels); remap the"
            " labels or give the loss as many classes as there are"
        )


# --- check_labels ---------------------------------------------------------------------------------


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    labels = labels.long()
    if labels.device.type == "cpu" or _validate.checks_labels_on_gpu():
        _raise_out_of_range(labels, num_classes, ignore_index)
    inside = (labels >= 0) & (labels < num_classes)
    checked = torch.where(inside, labels, INVALID)
    return torch.where(labels == ignore_index, IGNORED, checked)


# plain PyTorch, for any device that the reference may run on
_lib.impl("check_labels", _check_labels, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margin::check_labels", lib=_lib)
def _(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.int64)


# --- cosine_lse -----------------------------------------------------------------------------------


def _scale_value(scale: float, scale_tensor: Tensor | None) -> float:
    if scale_tensor is None:
        return scale
    return _validate.positive_scale(scale_tensor.detach().item())


def _cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    backend: str,
    budget: int,
) -> tuple[Tensor, ...]:
    if backend == "triton":
        if scale_tensor is not None and scale_tensor.device.type == "cpu":
            _scale_value(scale, scale_tensor)
        return _triton().cosine_lse(x, w, labels, scale, scale_tensor, compute, budget)
    with torch.autocast("cpu", enabled=False):
        value = _scale_value(scale, scale_tensor)
        lse, u, inv_x, inv_w, kept = _cpu.forward(x, w, labels.long(), value, compute, budget)
        return lse.to(inv_x.dtype), u.to(inv_x.dtype), inv_x, inv_w, kept


def _fake_kept(x: Tensor, w: Tensor, compute: torch.dtype, backend: str, budget: int) -> Tensor:
    if backend == "triton":
        shape = _triton().kept_shape(x, w, compute, budget)
        return x.new_empty(shape, dtype=torch.uint8)
    dtype = _cpu.product_dtype(compute, accumulation_dtype(x, w))
    return x.new_empty(_cpu.kept_classes(x, w, compute, budget), x.shape[0], dtype=dtype)


@torch.library.register_fake("fused_margin::cosine_lse", lib=_lib)
def _(x, w, labels, scale, scale_tensor, compute, backend, budget):
    dtype = accumulation_dtype(x, w)
    num_rows, num_classes = x.shape[0], w.shape[0]
    lse, u, inv_x = (x.new_empty(num_rows, dtype=dtype) for _ in range(3))
    inv_w = x.new_empty(num_classes, dtype=dtype)
    return lse, u, inv_x, inv_w, _fake_kept(x, w, compute, backend, budget)


# --- margin_ce ------------------------------------------------------------------------------------


def _margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    cos_m: float,
    sin_m: float,
    threshold: float,
    offset: float,
    straight_through: bool,
    reduction: str,
    ignore_index: int,
    compute: torch.dtype,
    backend: str,
    budget: int,
) -> tuple[Tensor, ...]:
    margin = Margin(cos_m, sin_m, threshold, offset, straight_through)
    if backend == "triton":
        if labels.device.type == "cpu" or _validate.checks_labels_on_gpu():
            _raise_out_of_range(labels.long(), w.shape[0], ignore_index)
        return _triton().margin_ce(
            x, w, labels, scale, margin, reduction, ignore_index, compute, budget
        )
    with torch.autocast("cpu", enabled=False):
        labels = labels.long()
        _raise_out_of_range(labels, w.shape[0], ignore_index)
        targets = labels.where(labels != ignore_index, IGNORED)
        lse, u, inv_x, inv_w, kept = _cpu.forward(x, w, targets, scale, compute, budget)
        loss, d_lse, d_u, count = _cpu.margin_forward(lse, u, targets, scale, margin, IGNORED)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / count.clamp_min(1.0)
        rows = (part.to(inv_x.dtype) for part in (loss, lse, u, d_lse, d_u, count))
        return (*rows, inv_x, inv_w, kept)


@torch.library.register_fake("fused_margin::margin_ce", lib=_lib)
def _(x, w, labels, scale, cos_m, sin_m, threshold, offset, straight_through, reduction,
      ignore_index, compute, backend, budget):  # fmt: skip
    dtype = accumulation_dtype(x, w)
    num_rows, num_classes = x.shape[0], w.shape[0]
    loss = x.new_empty((num_rows,) if reduction == "none" else (), dtype=dtype)
    lse, u, d_lse, d_u, inv_x = (x.new_empty(num_rows, dtype=dtype) for _ in range(5))
    count, inv_w = x.new_empty((), dtype=dtype), x.new_empty(num_classes, dtype=dtype)
    kept = _fake_kept(x, w, compute, backend, budget)
    return loss, lse, u, d_lse, d_u, count, inv_x, inv_w, kept


# --- backward -------------------------------------------------------------------------------------


def _backward(
    d_lse: Tensor,
    d_u: Tensor,
    grad_loss: Tensor | None,
    count: Tensor | None,
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    compute: torch.dtype,
    backend: str,
    lse: Tensor,
    u: Tensor,
    inv_x: Tensor,
    inv_w: Tensor,
    kept: Tensor,
    need_x: bool,
    need_w: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        d_x, d_w, d_scale = _triton().backward(
            d_lse, d_u, grad_loss, count, x, w, labels, scale, scale_tensor, compute,
            lse, u, inv_x, inv_w, kept, need_x=need_x, need_w=need_w, need_scale=need_scale,
        )  # fmt: skip
    else:
        with torch.autocast("cpu", enabled=False):
            if grad_loss is not None:
                factor = grad_loss if count is None else grad_loss / count.clamp_min(1.0)
                d_lse, d_u = d_lse * factor, d_u * factor
            d_x, d_w, d_scale = _cpu.backward(
                d_lse, d_u, x, w, labels.long(), _scale_value(scale, scale_tensor), compute,
                lse, u, inv_x, inv_w, kept,
                need_x=need_x, need_w=need_w, need_scale=need_scale,
            )  # fmt: skip
    if d_scale is not None and scale_tensor is not None:
        d_scale = d_scale.to(scale_tensor.dtype).reshape(scale_tensor.shape)
    return tuple(
        like.new_empty(0) if grad is None else grad
        for grad, like in (
            (d_x, x),
            (d_w, w),
            (d_scale, x if scale_tensor is None else scale_tensor),
        )
    )  # type: ignore[return-value]  # a 3-tuple; the generator hides its length


@torch.library.register_fake("fused_margin::cosine_lse_backward", lib=_lib)
def _(d_lse, d_u, grad_loss, count, x, w, labels, scale, scale_tensor, compute, backend,
      lse, u, inv_x, inv_w, kept, need_x, need_w, need_scale):  # fmt: skip
    like_scale = x if scale_tensor is None else scale_tensor
    return (
        x.new_empty(x.shape if need_x else (0,)),
        w.new_empty(w.shape if need_w else (0,)),
        like_scale.new_empty(like_scale.shape if need_scale else (0,)),
    )


for _key in ("CPU", "CUDA"):
    _lib.impl("cosine_lse", _cosine_lse, _key)
    _lib.impl("margin_ce", _margin_ce, _key)
    _lib.impl("cosine_lse_backward", _backward, _key)


# --- autograd -------------------------------------------------------------------------------------


def _gradients(
    ctx: Any,
    d_lse: Tensor,
    d_u: Tensor,
    grad_loss: Tensor | None,
    count: Tensor | None,
    saved: tuple[Any, ...],
) -> tuple[Tensor | None, ...]:
    x, w, labels, scale_tensor, lse, u, inv_x, inv_w, kept = saved
    need_x, need_w = ctx.needs_input_grad[:2]
    need_scale = scale_tensor is not None and ctx.needs_input_grad[4]
    d_x, d_w, d_scale = _ops.cosine_lse_backward(
        d_lse, d_u, grad_loss, count, x, w, labels, ctx.scale, scale_tensor, ctx.compute,
        ctx.backend, lse, u, inv_x, inv_w, kept, need_x, need_w, need_scale,
    )  # fmt: skip
    return d_x if need_x else None, d_w if need_w else None, d_scale if need_scale else None


class _CosineLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w, labels, scale, scale_tensor, compute, backend, budget):
        with torch._C._AutoDispatchBelowAutograd():
            lse, u, inv_x, inv_w, kept = _ops.cosine_lse(
                x, w, labels, scale, scale_tensor, compute, backend, budget
            )
        ctx.save_for_backward(x, w, labels, scale_tensor, lse, u, inv_x, inv_w, kept)
        ctx.mark_non_differentiable(inv_x, inv_w, kept)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.compute, ctx.backend = scale, compute, backend
        return lse, u, inv_x, inv_w, kept

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        saved = ctx.saved_tensors
        g_lse, g_u = grad_outputs[:2]
        if g_lse is None and g_u is None:
            return (None,) * 8
        g_lse = torch.zeros_like(saved[4]) if g_lse is None else g_lse
        g_u = torch.zeros_like(saved[5]) if g_u is None else g_u
        d_x, d_w, d_scale = _gradients(ctx, g_lse, g_u, None, None, saved)
        return d_x, d_w, None, None, d_scale, None, None, None


class _MarginCe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w, labels, scale, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _ops.margin_ce(x, w, labels, scale, *settings)
        _, lse, u, d_lse, d_u, count, inv_x, inv_w, kept = outputs
        ctx.save_for_backward(x, w, labels, lse, u, d_lse, d_u, count, inv_x, inv_w, kept)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.scale, (ctx.compute, ctx.backend) = scale, settings[-3:-1]
        ctx.is_mean = settings[5] == "mean"
        ctx.num_settings = len(settings)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * (4 + ctx.num_settings)
        x, w, labels, lse, u, d_lse, d_u, count, inv_x, inv_w, kept = ctx.saved_tensors
        saved = (x, w, labels, None, lse, u, inv_x, inv_w, kept)
        d_x, d_w, _ = _gradients(ctx, d_lse, d_u, grad_loss, count if ctx.is_mean else None, saved)
        return d_x, d_w, None, None, *(None,) * ctx.num_settings


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.cosine_lse_backward(*args)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(
            "the gradient of a fused_margin loss is not differentiable a second time on this"
            ' backend; use backend="reference", which is plain eager autograd, for double backward'
        )


_lib.impl("cosine_lse", lambda *args: _CosineLse.apply(*args), "Autograd")
_lib.impl("margin_ce", lambda *args: _MarginCe.apply(*args), "Autograd")
_lib.impl("cosine_lse_backward", lambda *args: _Backward.apply(*args), "Autograd")


def _tune_on_demand(x: Tensor, w: Tensor, compute: torch.dtype, backend: str) -> None:
    """With FUSED_MARGIN_TUNE=1 tune tiles that aren't yet; in eager code only."""
    if backend == "triton" and _validate.tunes_on_demand() and not torch.compiler.is_compiling():
        from fused_margin import tuning  # which stands above the operators

        tuning.tune_once(x, w, compute)


DEFAULT_BUDGET = -1  # the backend's own rule


def _budget(memory_budget: int | None, *tensors: Tensor | None) -> int:
    """Bytes that may be kept for a backward, 0 if none can follow."""
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return 0
    return DEFAULT_BUDGET if memory_budget is None else memory_budget


def cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    compute: torch.dtype,
    backend: str,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """Call the ``cosine_lse`` operator; differentiable in x, w and a tensor scale."""
    _tune_on_demand(x, w, compute, backend)
    value, tensor = (0.0, scale) if isinstance(scale, Tensor) else (scale, None)
    budget = _budget(memory_budget, x, w, tensor)
    outputs = _ops.cosine_lse(x, w, labels, value, tensor, compute, backend, budget)
    return outputs[0], outputs[1]


def margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    compute: torch.dtype,
    backend: str,
    memory_budget: int | None,
) -> Tensor:
    """Call the ``margin_ce`` operator; differentiable in x and w."""
    _tune_on_demand(x, w, compute, backend)
    budget = _budget(memory_budget, x, w)
    outputs = _ops.margin_ce(
        x, w, labels, scale, *margin, reduction, ignore_index, compute, backend, budget
    )
    return outputs[0]


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels as int64 with IGNORED and INVALID rows marked; raises where that needs no sync."""
    return _ops.check_labels(labels, num_classes, ignore_index)
