"""What all losses share: the sweep, the cross-entropy of N rows, weights and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import Unpack

from fused_margin import (
    _compiled,
    _ops,
    _reference,
    _transforms,
    _validate,
    _validate_margins,
    _validate_others,
    margins,
)
from fused_margin._arguments import Found
from fused_margin._numerics import accumulation_dtype
from fused_margin.distributed import _logits as _sharded_logits
from fused_margin.distributed import _sweep as _sharded
from fused_margin.functional.options import CallOptions, Options, choose, loss
from fused_margin.functional.sweeps import compute_dtype, sweep
from fused_margin.metrics import Evaluation

# Of class weights that are normalised at a time for logits without gradients.
LOGITS_BLOCK_BYTES = 4 << 20

# of labels, C and, of a shard, its first class: the classes that take part, and labels among them
Sampler = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Psi = margins.Margin | Callable[[torch.Tensor], torch.Tensor]


def margin_loss(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    psi: Psi,
    scale: float | torch.Tensor,
    options: Options,
    penalty: torch.Tensor | None = None,
    sampler: Sampler | None = None,
) -> Any:
    """`margin_softmax` of checked tensors: the fused operator, or autograd over N numbers.

    ``penalty``: what is added to each row's loss, (N,). ``sampler``: which classes take part.
    """
    _validate_margins.psi(psi)
    scale = _validate.scale(scale, embeddings.device)
    backend = _validate.backend(options.backend, embeddings.device)
    num_classes = _validate.centers(weight.shape[0], options.sub_centers)
    is_weighed = penalty is not None or options.is_weighed
    reduction = "none" if is_weighed else options.reduction
    ignore_index = options.ignore_index
    asked = options.asked
    if asked.has_total and asked.negatives is not None:
        _validate_others.smoothed(asked.negatives)
    built_in = psi if isinstance(psi, margins.Margin) and not psi.is_tensor else None
    is_sharded = _validate.is_class_sharded(weight)
    if is_sharded:
        scale = _sharded.shared_scale(scale, weight)
    # the operator would see one rank's classes; a sampler knows classes by their number among all
    sees_all = not is_sharded and sampler is None and asked.is_nothing
    hard = stats = None
    if (
        sees_all
        and built_in is not None
        and not isinstance(scale, torch.Tensor)
        and backend != "reference"
    ):
        dtype = compute_dtype(embeddings, weight, backend)
        rows = _ops.margin_ce(
            embeddings, weight, labels, scale, built_in, reduction, ignore_index, dtype, backend,
            options.memory_budget,
        )  # fmt: skip
        if not is_weighed:
            return rows
        ignored = labels.long() == ignore_index
    else:
        targets = _ops.check_labels(labels, num_classes, ignore_index)
        ignored = targets == _ops.IGNORED
        # nothing of an ignored row, NaN or infinite as it may be, reaches anything
        embeddings = embeddings.masked_fill(ignored[:, None], 0.0)
        lse, u, found = sweep(
            embeddings, weight, targets, scale, backend, options.memory_budget, asked, sampler
        )
        with torch.autocast(embeddings.device.type, enabled=False):
            target = _target(psi, u)
            # -log sigmoid(t - lse) is the cross-entropy without cancellation (eq. 4)
            rows = hard = -F.logsigmoid(scale * target - lse)
            if asked.has_total:  # a mean over all classes (eq. 22)
                of_all = (target + found.total) / num_classes
                rows = hard + options.label_smoothing * (scale * (target - of_all))
            # a label out of range on a GPU makes its row NaN, in the loss and in the gradients
            poison = torch.where(targets == _ops.INVALID, float("nan"), 1.0).to(rows.dtype)
            rows = (rows * poison).masked_fill(ignored, 0.0)
            rows = rows.to(accumulation_dtype(embeddings, weight))
        if asked.has_stats:
            stats = _evaluation(u, found, ignored, num_classes)
    with torch.autocast(embeddings.device.type, enabled=False):
        if is_weighed:
            hard = rows if hard is None else hard.to(rows.dtype)
            loss = _weigh(rows, hard, labels, ignored, num_classes, options, penalty)
        else:
            loss = _reduce(rows, (~ignored).sum().clamp_min(1), options.reduction)
    return loss if stats is None else (loss, stats)


def _evaluation(
    u: torch.Tensor, found: Found, ignored: torch.Tensor, num_classes: int
) -> Evaluation:
    """What the sweep found of each row, NaN or -1 where it is ignored."""
    dtype = found.hardest_cosine.dtype
    # nothing is nearer than NaN by comparison, and such a row isn't right
    rank = torch.where(u.isnan(), num_classes - 1, found.rank)
    return Evaluation(
        u.detach().to(dtype).masked_fill(ignored, float("nan")),
        rank.masked_fill(ignored, -1),
        found.hardest.masked_fill(ignored, -1),
        found.hardest_cosine.masked_fill(ignored, float("nan")),
    )


def _weigh(
    rows: torch.Tensor,
    hard: torch.Tensor,
    labels: torch.Tensor,
    ignored: torch.Tensor,
    num_classes: int,
    options: Options,
    penalty: torch.Tensor | None,
) -> torch.Tensor:
    """The losses of rows (N,), made focal, weighed and reduced (eq. 15).

    ``hard``: the same without label smoothing, which knows the target's probability.
    """
    if options.focal_gamma is not None:
        # 1 - p of the target is 1 - e^-loss; at a loss of 0 a power below 1 has no slope
        missing = -torch.expm1(-hard.clamp_min(_TINY))
        # a tensor as exponent, since Dynamo keeps a float symbolic in a product
        rows = rows * missing.pow(rows.new_ones(()) * options.focal_gamma)
    if options.focal_alpha is not None:
        rows = rows * options.focal_alpha
    if penalty is not None:
        _validate_others.penalty(penalty, rows)
        rows = rows + penalty.to(rows.dtype).masked_fill(ignored, 0.0)
    weights = torch.ones_like(rows)
    if options.class_weight is not None:
        _validate.numbers_per(
            "class_weight", options.class_weight, "class", num_classes, rows.device
        )
        weights = options.class_weight[labels.long().clamp(0, num_classes - 1)].to(rows.dtype)
    if options.sample_weight is not None:
        _validate.numbers_per(
            "sample_weight", options.sample_weight, "row", rows.shape[0], rows.device
        )
        # 0 before the product: a NaN there would make the gradient of class_weight NaN
        weights = weights * options.sample_weight.to(rows.dtype).masked_fill(ignored, 0.0)
    weights = weights.masked_fill(ignored, 0.0)
    total = weights.sum()
    return _reduce(rows * weights, total.masked_fill(total == 0, 1.0), options.reduction)


_TINY = torch.finfo(torch.float32).tiny


def _reduce(rows: torch.Tensor, total: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / total if reduction == "mean" else rows.sum()


def _target(psi: Psi, u: torch.Tensor) -> torch.Tensor:
    """psi(u), (N,)."""
    if isinstance(psi, margins.Margin):
        _validate_margins.coefficients(psi, u)
        return margins.apply(u, psi)
    return _validate_margins.psi_values(psi(margins.clamp_cosine(u)), u)


@loss
def margin_softmax(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    psi: Psi,
    scale: float | torch.Tensor,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""Margin softmax with any :math:`\psi`: the loss at the top of this module.

    Args:
        embeddings: see `arcface`.
        weight: (C, D).
        labels: (N,).
        psi: a function of the target cosines, (N,) fp32 or fp64 in [-1, 1], to as many numbers,
            made of differentiable operators; or one of `margins`, as ``margins.additive(0.35)``.
            `margins.sine` gives it sin(theta) with a finite slope. What it makes of ignored rows
            is not looked at. It may close over tensors that are learnt, and over what differs from
            row to row.
        scale: s > 0; float, or 0-d floating tensor.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    Raises:
        TypeError: psi can't be called.
        ValueError: psi returned something else than (N,) numbers.
    """
    _validate.tensors(embeddings, weight, labels)
    return margin_loss(embeddings, weight, labels, psi, scale, choose(options, margin_softmax))


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
    if _validate.is_class_sharded(weight):
        scale = _sharded.shared_scale(scale, weight)
    lse, u, _ = sweep(embeddings, weight, labels, scale, backend, memory_budget)
    dtype = accumulation_dtype(embeddings, weight)
    return lse.to(dtype), u.to(dtype)


@_compiled.raising()
def cosine_logits(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    sub_centers: int = 1,
) -> torch.Tensor:
    """Scaled cosines s cos(theta), (N, C), in fp32 (fp64): for those who want the whole matrix.

    Args:
        embeddings: (N, D).
        weight: (C, D), or (C K, D).
        scale: s > 0; float, or 0-d floating tensor, whose value is not looked at in a graph.
        sub_centers: K rows of weights for each class, of which the nearest counts.

    Returns:
        (N, C), by plain eager PyTorch on any device, differentiable. Of a weight that is sharded on
        classes, the logits of this rank's rows for all of them.
    """
    _validate.matrices(embeddings, weight)
    scale = _validate.scale(scale, embeddings.device)
    sub_centers = _validate.size("sub_centers", sub_centers, 1)
    _validate.centers(weight.shape[0], sub_centers)
    if _validate.is_class_sharded(weight):
        of_shard = functools.partial(_logits, sub_centers=sub_centers)
        return _sharded_logits.logits(of_shard, embeddings, weight, scale, sub_centers)
    return _logits(embeddings, weight, scale, sub_centers)


def _logits(
    embeddings: torch.Tensor, weight: torch.Tensor, scale: float | torch.Tensor, sub_centers: int
) -> torch.Tensor:
    """The same of checked arguments; C may be 0."""
    num_classes = weight.shape[0] // sub_centers
    dtype = accumulation_dtype(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        x = _reference.normalize(embeddings, dtype)
        if _is_watched(embeddings, weight, scale):
            return scale * _nearest(x @ _reference.normalize(weight, dtype).t(), sub_centers)
        # no normalised copy of all weights
        logits = x.new_empty(x.shape[0], num_classes)
        size = max(1, LOGITS_BLOCK_BYTES // (weight.shape[1] * dtype.itemsize * sub_centers))
        for start in range(0, num_classes, size):
            stop = min(start + size, num_classes)
            w = _reference.normalize(weight[start * sub_centers : stop * sub_centers], dtype)
            logits[:, start:stop] = scale * _nearest(x @ w.t(), sub_centers)
        return logits


def _nearest(cosines: torch.Tensor, sub_centers: int) -> torch.Tensor:
    """The largest cosine of each class, (N, C); with the gradient that the loss gives it."""
    if sub_centers == 1:
        return cosines
    of_class = cosines.unflatten(1, (-1, sub_centers))
    first = of_class.detach().argmax(dim=2, keepdim=True)
    return of_class.gather(2, first)[:, :, 0]


def _is_watched(*inputs: float | torch.Tensor) -> bool:
    """Whether autograd, a transform, a compiler or a tracer sees what is made of inputs."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] - it is documented
        or torch.onnx.is_in_onnx_export()
        or _transforms.is_transformed(*inputs)
        or (
            torch.is_grad_enabled()
            and any(isinstance(part, torch.Tensor) and part.requires_grad for part in inputs)
        )
    )
