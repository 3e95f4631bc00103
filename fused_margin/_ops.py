"""Registered operators: schemas, fakes, autograd, and dispatch to the device kernels.

Two primitives (``docs/design.md``): ``cosine_lse``, on which any margin is ordinary autograd over N
numbers, and ``margin_ce``, with a built-in margin and the loss inside. They share one backward
operator. Each "Autograd" implementation is an ``autograd.Function`` that calls the operator below
autograd; the backward operator has one too, so that double backward raises instead of returning
gradients that silently require no grad.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from fused_margin import _cpu, _loans, _schemas, _total, _transforms, _updates, _validate
from fused_margin._arguments import (
    IGNORED,
    INVALID,
    PLAIN,
    Extras,
    Found,
    Gradients,
    Inputs,
    Loan,
    Losses,
    Needs,
    Slopes,
    Swept,
    Update,
    rows_of,
)
from fused_margin._numerics import accumulation_dtype, normalized
from fused_margin.margins import Margin

Tensor = torch.Tensor

_ops, _lib, _triton = _schemas.ops, _schemas.lib, _schemas.triton


# --- check_labels ---------------------------------------------------------------------------------


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    labels = labels.long()
    if labels.device.type == "cpu" or _validate.checks_labels_on_gpu():
        _validate.label_range(labels, num_classes, ignore_index)
    inside = (labels >= 0) & (labels < num_classes)
    checked = torch.where(inside, labels, INVALID)
    return torch.where(labels == ignore_index, IGNORED, checked)


# plain PyTorch, for any device that the reference may run on
_lib.impl("check_labels", _check_labels, "CompositeExplicitAutograd")


# --- cosine_lse -----------------------------------------------------------------------------------


def _inputs(
    x: Tensor, w: Tensor, labels: Tensor, numbers: Tensor, scale_tensor: Tensor | None,
    threshold: Tensor | None, phi: Tensor | None, nearer: Tensor | None, classes: Tensor | None,
    centers: int, has_total: bool, compute_dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    """The operator's arguments under their names."""
    extras = Extras(threshold, phi, nearer, classes, centers, has_total)
    w = extras.rows_like(w)
    return Inputs(x, w, labels, numbers.tolist()[0], scale_tensor, compute_dtype, extras)


def _cosine_lse(
    inputs: Inputs, backend: str, budget: int, lends_for: Needs | None = None
) -> tuple[Swept, Found, Loan | None]:
    """lse, u, what the backward needs, and what `Extras` ask for.

    Args:
        inputs: what to sweep over. backend, budget: as the operator's.
        lends_for: the gradients that a backward will be asked for, for which d_w may be lent.
    """
    x, w, scale_tensor = inputs.x, inputs.w, inputs.scale_tensor
    if backend == "triton":
        if scale_tensor is not None and scale_tensor.device.type == "cpu":
            _validate.positive_scale(scale_tensor.detach().item())
        swept, found, loan = _triton().cosine_lse(inputs, budget, lends_for)
    else:
        swept, found, loan = _cpu.cosine_lse(inputs, budget, lends_for)
    if found is None:
        found = Found.empty(x, accumulation_dtype(x, w), inputs.extras)
    if inputs.extras.adds_vectors:
        with torch.autocast(x.device.type, enabled=False):
            omega = _total.class_sum(w, swept.inv_w)
            found = found._replace(class_sum=omega, total=_total.of_others(omega, x, swept.u))
    return swept, found, loan


# --- margin_ce ------------------------------------------------------------------------------------


def _margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    numbers: Tensor,
    straight_through: bool,
    reduction: str,
    ignore_index: int,
    compute_dtype: torch.dtype,
    backend: str,
    budget: int,
    lends_for: Needs | None = None,
) -> tuple[Losses, Swept, Loan | None]:
    """The loss, its slopes and what the backward needs; arguments as for `_cosine_lse`."""
    scale, cos, sin, threshold, offset = numbers.tolist()
    margin = Margin(cos, sin, threshold, offset, straight_through)
    inputs = Inputs(x, w, labels, scale, None, compute_dtype)
    if backend == "triton":
        if labels.device.type == "cpu" or _validate.checks_labels_on_gpu():
            _validate.label_range(labels.long(), w.shape[0], ignore_index)
        return _triton().margin_ce(inputs, margin, reduction, ignore_index, budget, lends_for)
    return _cpu.margin_ce(inputs, margin, reduction, ignore_index, budget, lends_for)


# --- backward -------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What autograd keeps of a call: tensors, as the backward operator takes them."""

    x: Tensor
    w: Tensor
    labels: Tensor
    numbers: Tensor
    scale_tensor: Tensor | None = None
    threshold: Tensor | None = None
    phi: Tensor | None = None
    nearer: Tensor | None = None
    classes: Tensor | None = None


class _Settings(NamedTuple):
    """What else the backward has to know of a call."""

    centers: int
    has_total: bool
    compute_dtype: torch.dtype
    backend: str
    needs: Needs


def _differentiate(
    slopes: Slopes, saved: _Saved, swept: Swept, omega: Tensor | None, settings: _Settings,
    loan: Loan | None = None, update: Update | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that are needed.

    d_w is in the memory of ``loan``, if there is one; its rows go to ``update``, if that is given.
    """
    centers, has_total, compute_dtype, backend, needs = settings
    inputs = _inputs(*saved, centers, has_total, compute_dtype)
    x, w, g_total, unit, of_hat = inputs.x, inputs.w, None, None, None
    if slopes.total is not None and omega is not None:
        # of all classes, and not of the target
        g_total, slopes = slopes.total, slopes._replace(u=slopes.u - slopes.total, total=None)
        unit = normalized(x.double())
        of_hat = _total.direction(g_total, unit)
    if update is not None and not x.shape[0]:
        _updates.by_zeros(update, w, swept.inv_w.dtype)
        needs, update = needs._replace(w=False), None
    if backend == "triton":
        if update is not None and of_hat is not None:
            update = _total.completing(update, of_hat, w, swept.inv_w)
        gradients = _triton().backward(slopes, inputs, swept, needs, loan, update)
    else:
        gradients = _cpu.backward(slopes, inputs, swept, needs, loan, update, of_hat)
    if update is not None and gradients.w is not None:  # of few classes, in one piece
        update(0, gradients.w.to(swept.inv_w.dtype))
        gradients = gradients._replace(w=None)
    if g_total is not None and omega is not None and unit is not None:
        with torch.autocast(x.device.type, enabled=False):
            if gradients.x is not None:
                _total.add_to_d_x(gradients.x, g_total, omega, unit)
            if gradients.w is not None and of_hat is not None and backend == "triton":
                _total.add_to_d_w(gradients.w, of_hat, w, swept.inv_w)
    d_scale, scale_tensor = gradients.scale, saved.scale_tensor
    if d_scale is not None and scale_tensor is not None:
        d_scale = d_scale.to(scale_tensor.dtype).reshape(scale_tensor.shape)
    return gradients._replace(scale=d_scale)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, by whose schema its arguments come."""
    slopes, saved, swept, needs = args[:5], args[5:14], args[18:23], args[24:]
    settings: Any = (*args[14:18], Needs(*needs))
    saved, omega = _Saved(*saved), args[23]
    d_x, d_w, d_scale = _differentiate(
        Slopes(*slopes), saved, Swept(*swept), omega, _Settings(*settings)
    )
    x, w, scale_tensor = saved.x, saved.w, saved.scale_tensor
    like_scale = x if scale_tensor is None else scale_tensor
    # an operator returns tensors only: an empty one for what isn't needed
    return (
        x.new_empty(0) if d_x is None else d_x,
        w.new_empty(0) if d_w is None else d_w,
        like_scale.new_empty(0) if d_scale is None else d_scale,
    )


def _cosine_lse_operator(*args: Any) -> tuple[Tensor, ...]:
    """As an operator, which lends nothing."""
    *inputs, backend, budget = args
    swept, found, _ = _cosine_lse(_inputs(*inputs), backend, budget)
    return swept + found


def _margin_ce_operator(*args: Any) -> tuple[Tensor, ...]:
    losses, swept, _ = _margin_ce(*args)
    if losses.targets is args[2]:  # no operator returns an input
        losses = losses._replace(targets=losses.targets.clone())
    return losses + swept


for _key in ("CPU", "CUDA"):
    _lib.impl("cosine_lse", _cosine_lse_operator, _key)
    _lib.impl("margin_ce", _margin_ce_operator, _key)
    _lib.impl("cosine_lse_backward", _backward, _key)


# --- autograd -------------------------------------------------------------------------------------


def _is_unobserved(x: Tensor, w: Tensor) -> bool:
    """Whether only the implementation would see a call of an operator below autograd.

    No mode or subclass of tensors does: the dispatcher's 15 microseconds are for nothing, and what
    an operator may not do, lend the memory of one of its outputs, can be done.
    """
    plain = (Tensor, torch.nn.Parameter)
    return (
        type(x) in plain
        and type(w) in plain
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
        and not _is_traced_by_jit()
    )


def _named(operator: str) -> contextlib.AbstractContextManager[Any]:
    """The name of an operator that isn't called as one, for a profile."""
    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        return torch.profiler.record_function(f"fused_margin::{operator}")
    return contextlib.nullcontext()


def _lends_for(ctx: Any, w: Tensor, needs: Needs, classes: Tensor | None = None) -> Needs | None:
    """What a forward may prepare for in the memory of d_w; notes in ``ctx`` who updates W."""
    ctx.updating = _updates.noted(ctx, w) if needs.w and classes is None else None
    return needs if needs.w and ctx.updating is None else None


def _updating(ctx: Any, *incoming: Tensor | None) -> _updates.Updated | None:
    """Who takes the rows of d_w, if an optimiser does, in a backward that nothing observes."""
    is_plain = torch._C._len_torch_dispatch_stack() == 0 and not torch.is_grad_enabled()
    if ctx.updating is None or not is_plain or _transforms.is_transformed(*incoming):
        return None
    return ctx.updating if ctx.updating.is_due(ctx) else None


def _gradients(
    slopes: Slopes, saved: _Saved, swept: Swept, omega: Tensor | None, ctx: Any,
    update: Update | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """d_x, d_w and d_scale, None where they are not needed, or an update has taken d_w."""
    *flags, needs = ctx.settings
    if update is not None:
        with _named("cosine_lse_backward"):
            return _differentiate(slopes, saved, swept, omega, ctx.settings, None, update)
    if ctx.loan is not None:  # an output as long as it is without a loan, with nothing in it
        nothing = swept.kept.new_empty((0, *swept.kept.shape[1:]))
        swept = swept._replace(kept=nothing)
    args: tuple[Any, ...] = (*slopes, *saved, *flags, *swept, omega, *needs)
    incoming = slopes.lse, slopes.u, slopes.grad, slopes.total
    if torch.is_grad_enabled() or _transforms.is_transformed(*incoming):
        # with create_graph, or a tangent: to be refused
        gradients = _ops.cosine_lse_backward.default(*args)
    elif _is_unobserved(saved.x, saved.w) and not _transforms.is_batched(*incoming):
        with _named("cosine_lse_backward"):
            loan = _loans.take(ctx, saved.w)
            return _differentiate(slopes, saved, swept, omega, ctx.settings, loan)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _ops.cosine_lse_backward.default(*args)
    return tuple(
        gradient if is_needed else None
        for gradient, is_needed in zip(gradients, needs, strict=True)
    )


class _CosineLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, backend, budget = args
        x, w, _, _, _, threshold, phi, nearer, classes, *flags = inputs
        needs_x, needs_w, _, _, needs_scale, *_ = ctx.needs_input_grad
        needs, loan, ctx.updating = Needs(needs_x, needs_w, needs_scale), None, None
        if _is_unobserved(x, w):
            with _named("cosine_lse"):
                swept, found, loan = _cosine_lse(
                    _inputs(*inputs), backend, budget, _lends_for(ctx, w, needs, classes)
                )
            outputs = swept + found
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = _ops.cosine_lse.default(*args)
        _loans.lend(ctx, w, loan)
        swept, found = Swept(*outputs[:5]), Found(*outputs[5:])
        extras = Extras(threshold, phi, nearer, classes, *flags[:2])
        omega = found.class_sum if extras.adds_vectors else None
        ctx.save_for_backward(*inputs[:9], *swept, omega)
        ctx.mark_non_differentiable(
            swept.inv_x, swept.inv_w, swept.kept, found.class_sum, found.hardest,
            found.hardest_cosine, found.rank,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        settings: Any = (*flags, backend, needs)
        ctx.settings = _Settings(*settings)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        g_lse, g_u, g_total = grad_outputs[0], grad_outputs[1], grad_outputs[5]
        if g_lse is None and g_u is None and g_total is None:
            return (None,) * 14
        updating = _updating(ctx, g_lse, g_u, g_total)
        *saved, lse, u, inv_x, inv_w, kept, omega = ctx.saved_tensors
        swept = Swept(lse, u, inv_x, inv_w, kept)
        g_lse = torch.zeros_like(swept.lse) if g_lse is None else g_lse
        g_u = torch.zeros_like(swept.u) if g_u is None else g_u
        slopes = Slopes(g_lse, g_u, None, None, g_total)
        update = None if updating is None else updating.begin(slopes)
        d_x, d_w, d_scale = _gradients(slopes, _Saved(*saved), swept, omega, ctx, update)
        if d_w is not None and saved[-1] is not None:
            d_w = rows_of(d_w, saved[-1], saved[1].shape)
        return d_x, d_w, None, None, d_scale, *(None,) * 9


def _record_margin_ce(ctx: Any, *args: Any, may_lend: bool) -> tuple[Tensor, ...]:
    """Outputs of ``margin_ce``, with ``ctx`` holding what its backward needs.

    ``may_lend``: whether nobody sees the outputs that are for the backward.
    """
    x, w, _, numbers, _, reduction, _, compute_dtype, backend, _ = args
    needs_x, needs_w, *_ = ctx.needs_input_grad
    needs, loan, ctx.updating = Needs(needs_x, needs_w, False), None, None
    if _is_unobserved(x, w):
        with _named("margin_ce"):
            lends_for = _lends_for(ctx, w, needs)
            losses, swept, loan = _margin_ce(*args, lends_for=lends_for if may_lend else None)
        outputs = losses + swept
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _ops.margin_ce.default(*args)
    _loans.lend(ctx, w, loan)
    _, slope_lse, slope_u, num_counted, targets, *swept = outputs
    num_counted = num_counted if reduction == "mean" else None
    ctx.save_for_backward(x, w, targets, numbers, slope_lse, slope_u, num_counted, *swept)
    ctx.set_materialize_grads(False)
    ctx.settings = _Settings(1, False, compute_dtype, backend, needs)
    return outputs


class _MarginCe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args) -> Any:
        outputs = _record_margin_ce(ctx, *args, may_lend=False)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad, *_ = grad_outputs
        if grad is None:
            return (None,) * 10
        updating = _updating(ctx, grad)
        x, w, targets, numbers, slope_lse, slope_u, num_counted, *swept = ctx.saved_tensors
        slopes = Slopes(slope_lse, slope_u, grad, num_counted)
        update = None if updating is None else updating.begin(slopes)
        saved = _Saved(x, w, targets, numbers)
        d_x, d_w, _ = _gradients(slopes, saved, Swept(*swept), None, ctx, update)
        return d_x, d_w, *(None,) * 8


class _MarginLoss(_MarginCe):
    """The loss alone: what eager code takes, since each output of a function costs time."""

    @staticmethod
    def forward(ctx: Any, *args) -> Any:
        return _record_margin_ce(ctx, *args, may_lend=True)[0]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.cosine_lse_backward.default(*args)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(
            "the gradient of a fused_margin loss is not differentiable a second time on this"
            ' backend; use backend="reference", which is plain eager autograd, for double backward'
        )


def _recorded(function: Any, operator: Any) -> Any:
    """The "Autograd" implementation of an operator: its function where autograd records.

    A compiled graph calls it with inputs that require gradients and autograd off, and has a
    backward of its own: what it returns has to be as the fake says, and nothing may be lent.
    """

    def called(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return _transforms.refusing(called)


_lib.impl("cosine_lse", _recorded(_CosineLse, _ops.cosine_lse.default), "Autograd")
_lib.impl("margin_ce", _recorded(_MarginCe, _ops.margin_ce.default), "Autograd")
_lib.impl("cosine_lse_backward", _transforms.refusing(_Backward.apply), "Autograd")


DEFAULT_BUDGET, KEEP_NOTHING = -1, 0  # the backend's own rule; no bytes


def _is_traced_by_jit() -> bool:
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - it is documented


def _budget(memory_budget: int | None, *tensors: Tensor | None) -> int:
    """Bytes that may be kept for a backward, none if none can follow."""
    is_recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    # a trace is compared with one made without gradients, and must not depend on it
    if not is_recorded and not _is_traced_by_jit():
        return KEEP_NOTHING
    return DEFAULT_BUDGET if memory_budget is None else memory_budget


@functools.lru_cache(maxsize=64)
def _kept_numbers(values: tuple[float, ...]) -> Tensor:
    """The same for whoever asks again, to be read."""
    with torch.inference_mode(False):  # autograd can't save what is made in it
        return torch.from_numpy(np.array(values, dtype=np.float64))


def _numbers(*values: Any) -> Tensor:
    """Python numbers as an operator takes them: fp64 on the CPU, (len(values),)."""
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        # Dynamo keeps a float symbolic in a product, and not in torch.tensor or torch.full
        return torch.stack([one * value for value in values])
    if torch._C._len_torch_dispatch_stack() == 0 and not _is_traced_by_jit():
        return _kept_numbers(values)
    return torch.tensor(values, dtype=torch.float64, device="cpu")  # which a mode, or a trace, sees


def cosine_lse(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    compute_dtype: torch.dtype,
    backend: str,
    memory_budget: int | None,
    extras: Extras = PLAIN,
) -> tuple[Tensor, Tensor, Found]:
    """lse and u, (N,) fp64, and what ``extras`` ask for, by the ``cosine_lse`` operator.

    Differentiable in x, w and a tensor scale, as is the total.
    """
    value, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    lse, u, _, _, _, *found = _ops.cosine_lse.default(
        x, w, labels, _numbers(value), tensor, *extras, compute_dtype, backend,
        _budget(memory_budget, x, w, tensor),
    )  # fmt: skip
    return lse, u, Found(*found)


def margin_ce(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    scale: float,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    compute_dtype: torch.dtype,
    backend: str,
    memory_budget: int | None,
) -> Tensor:
    """The loss by the ``margin_ce`` operator; differentiable in x and w."""
    *coefficients, straight_through = margin
    budget = _budget(memory_budget, x, w)
    is_traced = torch.compiler.is_compiling() or _is_traced_by_jit()
    is_plain = not is_traced and not _transforms.is_transformed(x, w)
    args = (
        x, w, labels, _numbers(scale, *coefficients), straight_through, reduction, ignore_index,
        compute_dtype, backend, budget,
    )  # fmt: skip
    if is_plain and budget != KEEP_NOTHING:  # autograd records
        return _MarginLoss.apply(*args)
    return _ops.margin_ce.default(*args)[0]


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels as int64 with IGNORED and INVALID rows marked; raises where that needs no sync."""
    return _ops.check_labels(labels, num_classes, ignore_index)
