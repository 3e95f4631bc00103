"""Losses that reshape the logits of other classes too (eq. 20 of ``docs/math.md``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from fused_margin import (
    _collectives,
    _compiled,
    _ops,
    _validate,
    _validate_margins,
    _validate_others,
    margins,
    metrics,
    negatives,
)
from fused_margin._numerics import accumulation_dtype
from fused_margin.distributed import _shards
from fused_margin.functional.core import margin_loss
from fused_margin.functional.options import CallOptions, Options, choose, loss
from fused_margin.functional.sweeps import target_cosines
from fused_margin.negatives import Negatives

Tensor = torch.Tensor


def _with(own: Negatives, options: CallOptions, call: Callable[..., Any]) -> Options:
    """The options of a loss that has negatives of its own."""
    _validate_others.none_of_the_callers(call.__name__, options.get("negatives"))
    return choose(options, call)._replace(negatives=own)


@torch.no_grad()
@_compiled.raising()
def curricularface_t(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    t: float | Tensor,
    momentum: float = 0.01,
    *,
    ignore_index: int = -100,
    sub_centers: int = 1,
) -> Tensor:
    r"""CurricularFace's moving mean of target cosines, with this batch taken in (eq. 23).

    .. math:: t_k = (1 - \alpha)\,t_{k-1} + \alpha\,\operatorname{mean} u_n

    over the rows that are not ignored and whose cosine is finite. O(N D). Where
    `torch.distributed` is initialised it is a collective, over the rows of all ranks, or of those
    that hold a sharded weight.

    Args:
        embeddings: (N, D).
        weight: (C, D).
        labels: (N,).
        t: the mean before, in [-1, 1], which starts at 0; float, or 0-d floating tensor, whose
            value is not looked at in a graph.
        momentum: alpha, the part of this batch, in [0, 1].
        ignore_index: label of rows that are left out.
        sub_centers: K, see `arcface`.

    Returns:
        0-d, without gradient: t as it was where there is no row.

    References:
        Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition,
        2020, arXiv:2004.00288, eq. 10.
    """
    _validate.tensors(embeddings, weight, labels)
    t, ignore_index = _validate_others.curriculum(t), _validate.ignore_index(ignore_index)
    momentum = _validate.between("momentum", momentum, 0.0, 1.0)
    sub_centers = _validate.size("sub_centers", sub_centers, 1)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    targets = _ops.check_labels(labels, num_classes, ignore_index)
    with torch.autocast(embeddings.device.type, enabled=False):
        u = target_cosines(embeddings, weight, targets, sub_centers)
        # a batch that overflowed, which a gradient scaler drops, must not stay in the mean
        counted = (targets >= 0) & u.isfinite()
        local = torch.stack([counted.sum().to(u.dtype), u.masked_fill(~counted, 0.0).sum()])
        groups = _shards.holders(weight)
        count, total = _collectives.of_each_rank(local, groups).sum(dim=0).unbind()
        given = t if isinstance(t, Tensor) else u.new_ones(()) * t
        found = given + momentum * (total / count.clamp_min(1.0) - given)
        return torch.where(count > 0, found, given).to(accumulation_dtype(embeddings, weight))


@loss
def curricularface(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.5,
    scale: float | Tensor = 64.0,
    *,
    t: float | Tensor = 0.0,
    boundary: str = "linear",
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""CurricularFace: ArcFace that weighs hard other classes more the better the model gets.

    The logit of another class is :math:`s\,c\,(t + c)` where :math:`c > \cos(\theta_y + m)`.

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        margin: m in radians; float, or (N,) floating tensor.
        scale: s > 0.
        t: the moving mean of target cosines, in [-1, 1], from `curricularface_t`; float, or 0-d
            tensor, whose value is not looked at in a graph.
        boundary: of the target's logit, see `arcface`.
        **options: see `arcface`; but no ``negatives``.

    Returns:
        0-d loss, or (N,).

    References:
        Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition,
        2020, arXiv:2004.00288, eq. 5 to 10.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.boundary(boundary)
    ignore_index = _validate.ignore_index(options.get("ignore_index", -100))
    margin = _validate_margins.angular_margin(margin, labels, ignore_index)
    psi = margins.angular(margin, boundary)
    chosen = _with(negatives.curricular(t, margin), options, curricularface)
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


@loss
def mv_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float | Tensor | None = None,
    scale: float | Tensor = 32.0,
    *,
    kind: str = "cos",
    t: float = 1.2,
    boundary: str = "linear",
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""MV-softmax: other classes that a row is nearer to than the margin allows count for more.

    The logit of another class is :math:`s\,(t\,c + t - 1)` where :math:`c > \psi(\cos\theta_y)`.

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        margin: m, an offset of the cosine for ``"cos"``, 0.35 by default, radians for ``"arc"``,
            0.5; float, or (N,) floating tensor.
        scale: s > 0.
        kind: ``"cos"`` (MV-AM-Softmax: CosFace) or ``"arc"`` (MV-Arc-Softmax: ArcFace).
        t: from 1, which is the loss without, to 10.
        boundary: see `arcface`; of ``"arc"`` only.
        **options: see `arcface`; but no ``negatives``.

    Returns:
        0-d loss, or (N,).

    References:
        Wang et al., Mis-classified Vector Guided Softmax Loss for Face Recognition, 2019,
        arXiv:1912.00833, eq. 5, 7, with adaptive weights. The authors' code has no margin on a
        target whose cosine it would make negative; the paper has it everywhere, as here.
    """
    _validate.tensors(embeddings, weight, labels)
    ignore_index = _validate.ignore_index(options.get("ignore_index", -100))
    margin = _validate_margins.of_kind(margin, kind, labels, ignore_index)
    psi = mv_psi(margin, kind, boundary)
    chosen = _with(negatives.misclassified(psi, t), options, mv_softmax)
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


def mv_psi(margin: float | Tensor, kind: str, boundary: str) -> margins.Margin:
    """cos(theta + m), or cos(theta) - m, of a checked margin."""
    _validate.boundary(boundary)
    return margins.angular(margin, boundary) if kind == "arc" else margins.additive(margin)


@loss
def circle_softmax(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float = 0.35,
    scale: float | Tensor = 64.0,
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""Circle loss with class weights: what is farther from its optimum is pulled harder.

    The target's logit is :math:`s\,[1 + m - u]_+ (u - (1 - m))`, that of another class
    :math:`s\,[c + m]_+ (c - m)`. The factors in brackets are constants to the gradient.

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        margin: m, an offset of the cosine, in [0, 1].
        scale: s > 0.
        **options: see `arcface`; but no ``negatives``.

    Returns:
        0-d loss, or (N,).

    References:
        Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, 2020,
        arXiv:2002.10857, eq. 6, 8.
    """
    _validate.tensors(embeddings, weight, labels)
    chosen = _with(negatives.circle(margin), options, circle_softmax)
    return margin_loss(embeddings, weight, labels, margins.circle(margin), scale, chosen)


@torch.no_grad()
@_compiled.raising(returned=lambda refused: Negatives(refused, (0.0, 1.0, 0.0, 1.0, 0.0, 1.0)))
def inter_topk(
    embeddings: Tensor,
    weight: Tensor | nn.Module,
    labels: Tensor,
    k: int = 5,
    penalty: float = 0.06,
    *,
    kind: str = "arc",
    sub_centers: int | None = None,
) -> Negatives:
    r"""The inter-topk penalty: a row's k nearest other classes come nearer by :math:`m'`.

    .. math:: \varphi(c) = \cos(\theta - m') \quad\text{or}\quad c + m'

    What it returns goes to a loss as ``negatives``, or is what a module's method ``negatives``
    returns. The first form goes with an angular margin, as ArcFace's, the second with CosFace's.

    It costs a product with the weights, without gradients, that finds the cosine midway between
    the k-th other class and the next, which is the threshold. Of classes that are equally near at
    that place, or nearer to each other than the products of the loss are rounded (with bf16 ones
    2^-8), all or none may get it; the same call does the same again.

    Where classes are sharded over ranks it is a collective, and the k are those among all classes.

    Args:
        embeddings: (N, D), not normalised.
        weight: the criterion, which knows its weight and sub-centres; or (C, D) or (C K, D).
        labels: (N,).
        k: how many other classes, from 1 to 8; all of them if there are no more.
        penalty: m', in [0, 1]: radians for ``"arc"``, an offset of the cosine for ``"cos"``.
        kind: ``"arc"`` or ``"cos"``.
        sub_centers: K, see `arcface`; 1 of a tensor.

    References:
        Zhao et al., Multi-query Multi-head Attention Pooling and Inter-topK Penalty for Speaker
        Verification, 2022, arXiv:2110.05042, section 2.2.
    """
    weight, sub_centers = metrics.class_rows(weight, sub_centers)
    _validate.tensors(embeddings, weight, labels)
    k, penalty = _validate_others.top(k), _validate.between("penalty", penalty, 0.0, 1.0)
    _validate_margins.kind(kind)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    found = metrics.predict(embeddings, weight, min(k + 2, num_classes), sub_centers=sub_centers)
    is_target = found.classes == labels.long()[:, None]
    others = found.cosines.masked_fill(is_target, -math.inf).sort(dim=1, descending=True).values
    every = others.new_full(labels.shape, -2.0)
    threshold = (others[:, k - 1] + others[:, k]) / 2.0 if num_classes > k + 1 else every
    if kind == "cos":
        return Negatives(threshold, (penalty, 1.0, 0.0, 1.0, 0.0, 1.0))
    cos = math.cos(penalty)
    return Negatives(threshold, (0.0, cos, 0.0, cos, 0.0, 1.0, math.sin(penalty)))
