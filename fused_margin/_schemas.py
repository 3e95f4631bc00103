"""The operators' schemas, and what they return of fake tensors."""

from __future__ import annotations

from typing import Any

import torch

from fused_margin import _cpu
from fused_margin._arguments import Extras, Found, Losses, Swept
from fused_margin._numerics import accumulation_dtype

Tensor = torch.Tensor

# `numbers` is what Python floats become, fp64 on the CPU: the scale and, in ``margin_ce``, the four
# coefficients of the margin. As `float` arguments they would be constants of a compiled graph;
# so would integers, were they not `SymInt`.
lib = torch.library.Library("fused_margin", "DEF")
lib.define(
    "check_labels(Tensor labels, int num_classes, SymInt ignore_index) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.define(
    "cosine_lse(Tensor x, Tensor w, Tensor labels, Tensor numbers, Tensor? scale_tensor,"
    " Tensor? threshold, Tensor? phi, Tensor? nearer, Tensor? classes, int centers,"
    " bool has_total, ScalarType compute_dtype, str backend, SymInt budget)"
    " -> (Tensor lse, Tensor u, Tensor inv_x, Tensor inv_w, Tensor kept, Tensor total,"
    " Tensor class_sum, Tensor hardest, Tensor hardest_cosine, Tensor rank)",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.define(
    "margin_ce(Tensor x, Tensor w, Tensor labels, Tensor numbers, bool straight_through,"
    " str reduction, SymInt ignore_index, ScalarType compute_dtype, str backend, SymInt budget)"
    " -> (Tensor loss, Tensor slope_lse, Tensor slope_u, Tensor num_counted, Tensor targets,"
    " Tensor lse, Tensor u, Tensor inv_x, Tensor inv_w, Tensor kept)",
    tags=torch.Tag.pt2_compliant_tag,
)
lib.define(
    "cosine_lse_backward(Tensor slope_lse, Tensor slope_u, Tensor? grad, Tensor? num_counted,"
    " Tensor? slope_total, Tensor x, Tensor w, Tensor labels, Tensor numbers,"
    " Tensor? scale_tensor, Tensor? threshold, Tensor? phi, Tensor? nearer, Tensor? classes,"
    " int centers, bool has_total, ScalarType compute_dtype, str backend, Tensor lse, Tensor u,"
    " Tensor inv_x, Tensor inv_w, Tensor kept, Tensor? class_sum, bool need_x, bool need_w,"
    " bool need_scale)"
    " -> (Tensor d_x, Tensor d_w, Tensor d_scale)",
    tags=torch.Tag.pt2_compliant_tag,
)
ops = torch.ops.fused_margin


def triton() -> Any:
    """The launches of the kernels, loaded where they are first asked for."""
    from fused_margin._triton import launch

    return launch


def named(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by their names; ``w`` has as many rows as take part."""
    names = (argument.name for argument in operator.default._schema.arguments)
    call = dict(zip(names, args, strict=not kwargs)) | kwargs
    return call | {"w": Extras(classes=call.get("classes")).rows_like(call["w"])}


@torch.library.register_fake("fused_margin::check_labels", lib=lib)
def _(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.int64)


def _fake_swept(
    x: Tensor, w: Tensor, compute_dtype: torch.dtype, backend: str, budget: int, extras: Extras
) -> Swept:
    if backend == "triton":
        shape = triton().kept_shape(x, w, compute_dtype, budget, extras)
    else:
        shape = (_cpu.kept_bytes(x, w, budget),)
    return Swept.empty(x, w, accumulation_dtype(x, w), shape)


@torch.library.register_fake("fused_margin::cosine_lse", lib=lib)
def _(x, w, labels, numbers, scale_tensor, threshold, phi, nearer, classes, centers, has_total,
      compute_dtype, backend, budget):  # fmt: skip
    extras = Extras(threshold, phi, nearer, classes, centers, has_total)
    w = extras.rows_like(w)
    found = Found.empty(x, accumulation_dtype(x, w), extras)
    return _fake_swept(x, w, compute_dtype, backend, budget, extras) + found


@torch.library.register_fake("fused_margin::margin_ce", lib=lib)
def _(x, w, labels, numbers, straight_through, reduction, ignore_index, compute_dtype, backend,
      budget):  # fmt: skip
    losses = Losses.empty(x, accumulation_dtype(x, w), is_reduced=reduction != "none")
    return losses + _fake_swept(x, w, compute_dtype, backend, budget, Extras())


@torch.library.register_fake("fused_margin::cosine_lse_backward", lib=lib)
def _(*args):
    call = named(ops.cosine_lse_backward, args, {})
    x, w = call["x"], call["w"]
    like_scale = x if call["scale_tensor"] is None else call["scale_tensor"]
    return (
        x.new_empty(x.shape if call["need_x"] else (0,)),
        w.new_empty(w.shape if call["need_w"] else (0,)),
        like_scale.new_empty(like_scale.shape if call["need_scale"] else (0,)),
    )
