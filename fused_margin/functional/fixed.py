"""Losses whose margin is the same function of every row's target cosine."""

from __future__ import annotations

import math

import torch
from typing_extensions import Unpack

from fused_margin import _validate, _validate_margins, margins
from fused_margin._numerics import accumulation_dtype
from fused_margin.functional.core import margin_loss
from fused_margin.functional.options import CallOptions, choose, loss


@loss
def arcface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor = 0.5,
    scale: float | torch.Tensor = 64.0,
    *,
    boundary: str = "linear",
    grad: str = "exact",
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""ArcFace: :math:`\psi(\cos\theta) = \cos(\theta + m)`.

    Args:
        embeddings: (N, D), N >= 0; fp16, bf16, fp32 or fp64; need not be normalised.
        weight: (C, D), C >= 2; fp32, fp64 or the embeddings' dtype; need not be normalised.
        labels: (N,), any integer dtype, in [0, C) or equal to ``ignore_index``.
        margin: m in radians, at most pi; float, or (N,) floating tensor (one margin per row;
            differentiable; whatever ignored rows hold is not looked at). Margins per class, (C,),
            become margins per row as ``margins[labels]`` (``margins[labels.clamp_min(0)]`` if
            ignored labels are negative); unindexed they are refused, except where N = C, when
            nothing tells the two apart. A module takes them as they are.
        scale: s > 0; float, or 0-d floating tensor (differentiable). The values of tensors on a
            GPU are not checked, since reading them would need a synchronisation; nor is a tensor
            margin under ``torch.compile``, nor what ``torch.vmap`` maps over.
        boundary: where theta + m > pi: ``"linear"`` uses cos(theta) - m sin(m), ``"continuous"``
            cos(theta) - (1 + cos(pi - m)), ``"none"`` keeps cos(theta + m). ``"easy"``, the easy
            margin, has cos(theta + m) where cos(theta) >= 0, and cos(theta) elsewhere.
        grad: ``"exact"``, or ``"straight_through"``, which takes psi' as 1.
        **options: keywords that all losses share.

            - reduction: ``"mean"`` over the rows that are not ignored, by their weights (0 if
              there are none), ``"sum"``, or ``"none"``.
            - ignore_index: label of rows that contribute neither loss nor gradient, -100.
            - backend: ``"auto"`` (Triton for GPU tensors, class-blocked for CPU tensors),
              ``"reference"``, ``"cpu"`` or ``"triton"``.
            - memory_budget: bytes that the forward may keep for the backward, which then forms
              fewer cosines again, beyond what the memory of the weight's coming gradient holds.
              That is made ahead and holds all that is needed if N <= D (N <= 2 D with bf16 products
              of an fp32 weight), unless the weight has a gradient already. By default nothing more
              on a GPU, and on a CPU 40 MiB and 224 KiB for each row above 256. A CPU keeps what
              fits. A GPU keeps all or nothing: N' C' times 2 bytes with bf16 products, 8 in fp64,
              else 4, and up to 3 % more for their shifts, where N' is N rounded up to a multiple of
              16, C' is C to one of 128. ``"reference"`` keeps everything in any case.
            - class_weight: (C,) floating, as `torch.nn.functional.cross_entropy` takes it: a row's
              loss is multiplied by that of its label, and a mean divided by their sum.
            - sample_weight: (N,) floating, one more factor of each row, in the mean likewise: a
              weight of 2 counts as two rows, and one of 0 as none. What ignored rows hold is not
              looked at. The values of either are not checked; both are differentiable.
            - focal_gamma: multiplies a row's loss by (1 - p)^gamma, p the softmax probability of
              the target with its margin; None for no factor. Lin et al., Focal Loss for Dense
              Object Detection, 2017, arXiv:1708.02002, eq. 4.
            - focal_alpha: multiplies every loss, in the mean too; None for no factor.
            - label_smoothing: epsilon in [0, 1]: the cross-entropy with the target's probability
              lowered by it, and epsilon / C given to each class (eq. 22), as
              `torch.nn.functional.cross_entropy` has it of these logits. It takes no further
              product. A ``class_weight`` is a factor of the whole.
            - negatives: one of `fused_margin.negatives`, which reshapes the other classes' logits.
            - sub_centers: K: the weight is (C K, D), K rows for each class one after the other,
              and of a class the largest cosine counts, the first of several. Deng et al.,
              Sub-center ArcFace, 2020.
            - return_stats: return the loss and a `metrics.Evaluation` of the same sweep, as
              precise as its products: accuracy, the hardest other class, target cosines.

    Returns:
        0-d loss, or (N,) for ``reduction="none"``; fp32, or fp64 if an input is fp64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, option or value; a label out of range on a CPU. On a GPU
            such a row's loss is NaN, and so are its gradients, those of every class included,
            since raising would need a synchronisation; with ``FUSED_MARGIN_CHECK_LABELS=1`` in
            the environment it raises there too.

        `torch.compile` with ``fullgraph=True`` raises the same, as the graph runs: not where a
        compiled function would catch it.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 3.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.choice("boundary", boundary, _validate.BOUNDARIES)
    _validate.choice("grad", grad, _validate.GRADS)
    chosen = choose(options, arcface)
    margin = _validate_margins.angular_margin(margin, labels, chosen.ignore_index)
    psi = margins.angular(_row_margin(margin, embeddings, weight), boundary, grad)
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


@loss
def cosface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor = 0.35,
    scale: float | torch.Tensor = 64.0,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""CosFace: :math:`\psi(\cos\theta) = \cos\theta - m`.

    Args:
        embeddings: see `arcface`, likewise what follows.
        weight: (C, D).
        labels: (N,).
        margin: m, an offset of the cosine, at most 2; float, or (N,) floating tensor.
        scale: s > 0.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018,
        arXiv:1801.09414, eq. 4.
    """
    _validate.tensors(embeddings, weight, labels)
    chosen = choose(options, cosface)
    margin = _validate_margins.cosine_margin(margin, labels, chosen.ignore_index)
    psi = margins.additive(_row_margin(margin, embeddings, weight))
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


@loss
def fixed_adacos(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""Fixed AdaCos: no margin, and the scale :math:`s = \sqrt 2 \ln(C - 1)`.

    Args:
        embeddings: see `arcface`, likewise what follows.
        weight: (C, D), C >= 3: for C = 2 the scale would be 0.
        labels: (N,).
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Zhang et al., AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
        Representations, 2019, arXiv:1905.00292, eq. 12.
    """
    _validate.tensors(embeddings, weight, labels)
    chosen = choose(options, fixed_adacos)
    num_classes = _validate.centers(weight.shape[0], chosen.sub_centers)
    scale = fixed_adacos_scale(num_classes)
    return margin_loss(embeddings, weight, labels, margins.NO_MARGIN, scale, chosen)


def fixed_adacos_scale(num_classes: int) -> float:
    r""":math:`\sqrt 2 \ln(C - 1)`, the scale of Fixed AdaCos, for C >= 3 classes."""
    return math.sqrt(2.0) * math.log(_validate.fixed_adacos_classes(num_classes) - 1)


@loss
def normalized_softmax(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""Softmax cross-entropy of scaled cosines: :math:`\psi(\cos\theta) = \cos\theta`.

    Args:
        embeddings: see `arcface`, likewise what follows.
        weight: (C, D).
        labels: (N,).
        scale: s > 0, the inverse of a temperature.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017,
        arXiv:1704.06369; Zhai and Wu, Classification is a Strong Baseline for Deep Metric
        Learning, 2019, arXiv:1811.12649.
    """
    _validate.tensors(embeddings, weight, labels)
    return margin_loss(
        embeddings, weight, labels, margins.NO_MARGIN, scale, choose(options, normalized_softmax)
    )


@loss
def combined_margin(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    m1: float = 1.0,
    m2: float = 0.5,
    m3: float = 0.0,
    scale: float | torch.Tensor = 64.0,
    *,
    boundary: str = "none",
    grad: str = "exact",
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""The combined margin of insightface: :math:`\psi(\cos\theta) = \cos(m_1\theta + m_2) - m_3`.

    ================================================  ====  ====  ====  =====
    what people train with                            m1    m2    m3    scale
    ================================================  ====  ====  ====  =====
    insightface, MS1M: ArcFace                        1     0.5   0     64
    insightface, Glint360K, WebFace 4M to 42M         1     0     0.4   64
    ArcFace's paper, CM1                              1     0.3   0.2   64
    ArcFace's paper, CM2                              0.9   0.4   0.15  64
    PaddleClas, PLSC, each alone                      1.35  0.5   0.4   64
    ================================================  ====  ====  ====  =====

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        m1: multiplies the angle, in [0.01, 16].
        m2: radians, within pi.
        m3: an offset of the cosine, within 2.
        scale: s > 0.
        boundary: where m1 theta + m2 > pi: ``"none"`` keeps the formula, which rises again there,
            as insightface does; ``"continuous"`` goes on from -1 - m3 as cos(theta) does.
        grad: ``"exact"``, or ``"straight_through"``, as insightface's code has it: psi' is 1.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,). With m1 = 1 and either m2 or m3 = 0 it is as fast as `arcface`.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 4.
    """
    _validate.tensors(embeddings, weight, labels)
    psi = margins.combined(m1, m2, m3, boundary, grad)
    return margin_loss(embeddings, weight, labels, psi, scale, choose(options, combined_margin))


@loss
def sphereface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float = 1.5,
    scale: float | torch.Tensor = 30.0,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""SphereFace of normalised embeddings: :math:`(-1)^k \cos(m\theta) - 2k`.

    k is the floor of m theta / pi. In the paper embeddings keep their norm, in the place of the
    scale, and m is 4, approached by annealing; with a scale, m = 1.5 and s = 30 are usual.

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        margin: m, which multiplies the angle, in [1, 16]; not only integers.
        scale: s > 0.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017,
        arXiv:1704.08063, eq. 6; SphereFace Revived: Unifying Hyperspherical Face Recognition, 2022,
        arXiv:2109.05565.
    """
    _validate.tensors(embeddings, weight, labels)
    psi = margins.multiplied(margin)
    return margin_loss(embeddings, weight, labels, psi, scale, choose(options, sphereface))


def _row_margin(
    margin: float | torch.Tensor, embeddings: torch.Tensor, weight: torch.Tensor
) -> float | torch.Tensor:
    if isinstance(margin, torch.Tensor):
        return margin.to(accumulation_dtype(embeddings, weight))
    return margin
