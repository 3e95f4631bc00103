r"""Margin-softmax losses as functions of embeddings, class weights and labels.

For row n with cosines :math:`c_{nk} = \hat x_n \cdot \hat w_k` and label :math:`y_n`, every loss is

.. math:: -\log \frac{e^{s \psi(u_n)}}{e^{s \psi(u_n)} + \sum_{k \ne y_n} e^{s c_{nk}}},
    \qquad u_n = c_{n y_n},

with a margin :math:`\psi` on the target cosine. Neither the (N, C) cosines nor a normalised copy of
the weights is built, except by ``backend="reference"``; a bounded part of the cosines may be kept
for the backward (``memory_budget``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fused_margin import _compiled, _ops, _reference, _validate, margins
from fused_margin._numerics import accumulation_dtype, requested_dtype

__all__ = [
    "arcface",
    "cosface",
    "cosine_logits",
    "cosine_lse",
    "fixed_adacos",
    "fixed_adacos_scale",
    "margin_softmax",
    "normalized_softmax",
]


Psi = margins.Margin | Callable[[torch.Tensor], torch.Tensor]


def _margin_softmax(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    psi: Psi,
    scale: float | torch.Tensor,
    reduction: str,
    ignore_index: int,
    backend: str,
    memory_budget: int | None,
) -> torch.Tensor:
    """`margin_softmax` of checked tensors: the fused operator, or autograd over N numbers."""
    _validate.psi(psi)
    _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    ignore_index = _validate.ignore_index(ignore_index)
    memory_budget = _validate.memory_budget(memory_budget)
    scale = _validate.scale(scale, embeddings.device)
    backend = _validate.backend(backend, embeddings.device)
    built_in = psi if isinstance(psi, margins.Margin) and not psi.is_tensor else None
    if built_in is not None and not isinstance(scale, torch.Tensor) and backend != "reference":
        compute_dtype = _compute_dtype(embeddings, weight, backend)
        return _ops.margin_ce(
            embeddings, weight, labels, scale, built_in, reduction, ignore_index, compute_dtype,
            backend, memory_budget,
        )  # fmt: skip
    labels = _ops.check_labels(labels, weight.shape[0], ignore_index)
    ignored = labels == _ops.IGNORED
    # nothing of an ignored row, NaN or infinite as it may be, reaches anything
    embeddings = embeddings.masked_fill(ignored[:, None], 0.0)
    if backend == "reference":
        lse, u = _reference.cosine_lse(embeddings, weight, labels, scale)
    else:
        compute_dtype = _compute_dtype(embeddings, weight, backend)
        lse, u = _ops.cosine_lse(
            embeddings, weight, labels, scale, compute_dtype, backend, memory_budget
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        # -log sigmoid(t - lse) is the cross-entropy without cancellation (eq. 4)
        loss = -F.logsigmoid(scale * _target(psi, u) - lse)
        # a label out of range on a GPU makes its row NaN, in the loss and in the gradients
        poison = torch.where(labels == _ops.INVALID, float("nan"), 1.0).to(loss.dtype)
        loss = (loss * poison).masked_fill(ignored, 0.0)
        loss = loss.to(accumulation_dtype(embeddings, weight))
        if reduction == "none":
            return loss
        total = loss.sum()
        if reduction == "sum":
            return total
        return total / (~ignored).sum().clamp_min(1)


def _compute_dtype(embeddings: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.dtype:
    """The dtype asked for in products; with FUSED_MARGIN_TUNE=1 tiles not yet tuned are."""
    dtype = requested_dtype(embeddings, weight)
    is_eager = not torch.compiler.is_compiling()
    if backend == "triton" and _validate.tunes_on_demand() and is_eager:
        from fused_margin import tuning

        tuning.tune_once(embeddings, weight, dtype)
    return dtype


def _target(psi: Psi, u: torch.Tensor) -> torch.Tensor:
    """psi(u), (N,)."""
    if isinstance(psi, margins.Margin):
        _validate.coefficients(psi, u)
        return margins.apply(u, psi)
    return _validate.psi_values(psi(margins.clamp_cosine(u)), u)


@_compiled.raising()
def margin_softmax(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    psi: Psi,
    scale: float | torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    r"""Margin softmax with any :math:`\psi`: the loss at the top of this module.

    Args:
        embeddings: see `arcface`, likewise the arguments not listed.
        weight: (C, D).
        labels: (N,).
        psi: a function of the target cosines, (N,) fp32 or fp64 in [-1, 1], to as many numbers,
            made of differentiable operators; or one of `margins`, as ``margins.additive(0.35)``.
            `margins.sine` gives it sin(theta) with a finite slope. What it makes of ignored rows
            is not looked at. It may close over tensors that are learnt, and over what differs from
            row to row.
        scale: s > 0; float, or 0-d floating tensor.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of ignored rows.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes to keep for the backward, see `arcface`.

    Returns:
        0-d loss, or (N,).

    Raises:
        TypeError: psi can't be called.
        ValueError: psi returned something else than (N,) numbers.
    """
    _validate.tensors(embeddings, weight, labels)
    return _margin_softmax(
        embeddings, weight, labels, psi, scale, reduction, ignore_index, backend, memory_budget
    )


@_compiled.raising()
def arcface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor = 0.5,
    scale: float | torch.Tensor = 64.0,
    *,
    boundary: str = "linear",
    grad: str = "exact",
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
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
            nothing tells the two apart.
        scale: s > 0; float, or 0-d floating tensor (differentiable). The values of tensors on a
            GPU are not checked, since reading them would need a synchronisation; nor is a tensor
            margin under ``torch.compile``, nor what ``torch.vmap`` maps over.
        boundary: where theta + m > pi: ``"linear"`` uses cos(theta) - m sin(m), ``"continuous"``
            cos(theta) - (1 + cos(pi - m)), ``"none"`` keeps cos(theta + m).
        grad: ``"exact"``, or ``"straight_through"``, which takes psi' as 1.
        reduction: ``"mean"`` over the rows that are not ignored (0 if there are none), ``"sum"``,
            or ``"none"``.
        ignore_index: label of rows that contribute neither loss nor gradient.
        backend: ``"auto"`` (Triton for GPU tensors, class-blocked for CPU tensors),
            ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes that the forward may keep for the backward, which then forms fewer
            cosines again, beyond what the memory of the weight's coming gradient holds. That is
            made ahead and holds all that is needed if N <= D (N <= 2 D with bf16 products of an
            fp32 weight), unless the weight has a gradient already. By default nothing more on a
            GPU, and on a CPU 40 MiB and 224 KiB for each row above 256. A CPU keeps what fits. A
            GPU keeps all or nothing: N' C' times 2 bytes with bf16 products, 8 in fp64, else 4,
            and up to 3 % more for their shifts, where N' is N rounded up to a multiple of 16, C' is
            C to one of 128. ``"reference"`` keeps everything in any case.

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
    ignore_index = _validate.ignore_index(ignore_index)
    margin = _validate.angular_margin(margin, labels, ignore_index)
    margin = _row_margin(margin, embeddings, weight)
    spec = margins.angular(margin, boundary, grad)
    return _margin_softmax(
        embeddings, weight, labels, spec, scale, reduction, ignore_index, backend, memory_budget
    )


@_compiled.raising()
def cosface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor = 0.35,
    scale: float | torch.Tensor = 64.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    r"""CosFace: :math:`\psi(\cos\theta) = \cos\theta - m`.

    Args:
        embeddings: see `arcface`, likewise the arguments not listed.
        weight: (C, D).
        labels: (N,).
        margin: m, an offset of the cosine, at most 2; float, or (N,) floating tensor.
        scale: s > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of ignored rows.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes to keep for the backward, see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018,
        arXiv:1801.09414, eq. 4.
    """
    _validate.tensors(embeddings, weight, labels)
    ignore_index = _validate.ignore_index(ignore_index)
    margin = _validate.cosine_margin(margin, labels, ignore_index)
    margin = _row_margin(margin, embeddings, weight)
    return _margin_softmax(
        embeddings,
        weight,
        labels,
        margins.additive(margin),
        scale,
        reduction,
        ignore_index,
        backend,
        memory_budget,
    )


@_compiled.raising()
def fixed_adacos(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    r"""Fixed AdaCos: no margin, and the scale :math:`s = \sqrt 2 \ln(C - 1)`.

    Args:
        embeddings: see `arcface`, likewise the arguments not listed.
        weight: (C, D), C >= 3: for C = 2 the scale would be 0.
        labels: (N,).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of ignored rows.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes to keep for the backward, see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Zhang et al., AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
        Representations, 2019, arXiv:1905.00292, eq. 12.
    """
    _validate.tensors(embeddings, weight, labels)
    scale = fixed_adacos_scale(weight.shape[0])
    return _margin_softmax(
        embeddings, weight, labels, margins.NO_MARGIN, scale, reduction, ignore_index, backend,
        memory_budget,
    )  # fmt: skip


def fixed_adacos_scale(num_classes: int) -> float:
    r""":math:`\sqrt 2 \ln(C - 1)`, the scale of Fixed AdaCos, for C >= 3 classes."""
    return math.sqrt(2.0) * math.log(_validate.fixed_adacos_classes(num_classes) - 1)


@_compiled.raising()
def normalized_softmax(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> torch.Tensor:
    r"""Softmax cross-entropy of scaled cosines: :math:`\psi(\cos\theta) = \cos\theta`.

    Args:
        embeddings: see `arcface`, likewise the arguments not listed.
        weight: (C, D).
        labels: (N,).
        scale: s > 0, the inverse of a temperature.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: label of ignored rows.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes to keep for the backward, see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Wang et al., NormFace: L2 Hypersphere Embedding for Face Verification, 2017,
        arXiv:1704.06369; Zhai and Wu, Classification is a Strong Baseline for Deep Metric
        Learning, 2019, arXiv:1811.12649.
    """
    _validate.tensors(embeddings, weight, labels)
    return _margin_softmax(
        embeddings, weight, labels, margins.NO_MARGIN, scale, reduction, ignore_index, backend,
        memory_budget,
    )  # fmt: skip


@_compiled.raising(num_outputs=2)
def cosine_lse(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Log-sum-exp of the scaled cosines of the *other* classes, and the target cosine.

    .. math:: \ell_n = \log \sum_{k \ne y_n} e^{s\,c_{nk}}, \qquad u_n = c_{n y_n}

    The primitive under every loss: ``-F.logsigmoid(scale * psi(u) - lse)`` is the softmax
    cross-entropy with a margin psi, by autograd over N numbers. `margin_softmax` is that with
    ignored rows, labels out of range and reductions seen to.

    Args:
        embeddings: (N, D).
        weight: (C, D), C >= 1.
        labels: (N,), any integer dtype. A label outside [0, C) means "no target here": lse runs
            over all classes and u is 0. That is what a shard of the classes needs. It may be of one
            class: lse of a row whose target that is has nothing to run over, and is -inf, with no
            gradient; ``torch.logaddexp`` merges it with another shard's.
        scale: s > 0; float, or 0-d floating tensor.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        memory_budget: bytes to keep for the backward, see `arcface`.

    Returns:
        lse (N,) and u (N,), fp32 or fp64, differentiable in embeddings, weight and a tensor scale.
        u lies within [-1, 1]; `margins.sine` gives its sine, with a finite slope.
    """
    _validate.tensors(embeddings, weight, labels, min_classes=1)
    memory_budget = _validate.memory_budget(memory_budget)
    scale = _validate.scale(scale, embeddings.device)
    backend = _validate.backend(backend, embeddings.device)
    if backend == "reference":
        lse, u = _reference.cosine_lse(embeddings, weight, labels, scale)
        return lse, u.to(lse.dtype)
    compute_dtype = _compute_dtype(embeddings, weight, backend)
    lse, u = _ops.cosine_lse(
        embeddings, weight, labels, scale, compute_dtype, backend, memory_budget
    )
    dtype = accumulation_dtype(embeddings, weight)
    return lse.to(dtype), u.to(dtype)


def cosine_logits(
    embeddings: torch.Tensor, weight: torch.Tensor, scale: float | torch.Tensor
) -> torch.Tensor:
    """Scaled cosines s cos(theta), (N, C), in fp32 (fp64): for those who want the whole matrix.

    Args:
        embeddings: (N, D).
        weight: (C, D).
        scale: s > 0; float, or 0-d floating tensor.

    Returns:
        (N, C), by plain eager PyTorch on any device, differentiable.
    """
    _validate.matrices(embeddings, weight)
    scale = _validate.scale(scale, embeddings.device)
    dtype = accumulation_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x, w = _reference.normalize(embeddings, dtype), _reference.normalize(weight, dtype)
        return scale * (x @ w.t())


def _row_margin(
    margin: float | torch.Tensor, embeddings: torch.Tensor, weight: torch.Tensor
) -> float | torch.Tensor:
    if isinstance(margin, torch.Tensor):
        return margin.to(accumulation_dtype(embeddings, weight))
    return margin
