"""Losses whose margin or scale follows the batch: its norms, its cosines, or chance."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import Unpack

from fused_margin import (
    _collectives,
    _compiled,
    _ops,
    _validate,
    _validate_margins,
    _validate_others,
    _validate_settings,
    margins,
)
from fused_margin._numerics import accumulation_dtype, sum_dtype
from fused_margin.distributed import _shards
from fused_margin.functional.core import Psi, margin_loss
from fused_margin.functional.options import CallOptions, choose, loss
from fused_margin.functional.sweeps import Asked, sweep

SMALLEST_NORM, LARGEST_NORM = 1e-3, 100.0  # AdaFace clips norms to these
SMALLEST_SPREAD = 1e-3  # added to AdaFace's standard deviation


@torch.no_grad()
@_compiled.raising()
def adacos_scale(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: float | torch.Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    sub_centers: int = 1,
) -> torch.Tensor:
    r"""The next scale of AdaCos (eq. 16), with which `normalized_softmax` is its loss.

    .. math:: s_t = \frac{\ln B}{\cos \min(\pi/4, \theta_{med})}, \qquad
        B = \frac1N \sum_n \sum_{k \ne y_n} e^{s_{t-1} c_{nk}}

    over the rows that are not ignored. It costs a sweep over the classes without gradients, as the
    loss needs another one with the new scale. Where `torch.distributed` is initialised this is a
    collective of all ranks, or of those that hold a sharded weight: B is that of all their rows,
    and the angle the mean of the ranks' medians, weighted by their rows.

    Args:
        embeddings: (N, D).
        weight: (C, D).
        labels: (N,).
        scale: the scale before, which `fixed_adacos_scale` starts; float, or 0-d floating tensor.
        ignore_index: label of rows that are left out.
        backend: see `arcface`.
        sub_centers: K, see `arcface`.

    Returns:
        0-d, in the accumulation dtype, without gradient. It is the scale before where no row is
        left, or where B is so small that the formula is not positive.

    References:
        Zhang et al., AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
        Representations, 2019, arXiv:1905.00292, section 4.2.
    """
    _validate.tensors(embeddings, weight, labels)
    ignore_index = _validate.ignore_index(ignore_index)
    scale = _validate.scale(scale, embeddings.device)
    backend = _validate.backend(backend, embeddings.device)
    sub_centers = _validate.size("sub_centers", sub_centers, 1)
    num_classes = _validate.centers(weight.shape[0], sub_centers)
    targets = _ops.check_labels(labels, num_classes, ignore_index)
    counted = targets >= 0
    embeddings = embeddings.detach().masked_fill(~counted[:, None], 0.0)
    asked = Asked(sub_centers=sub_centers)
    lse, u, _ = sweep(embeddings, weight.detach(), targets, scale, backend, 0, asked)
    with torch.autocast(embeddings.device.type, enabled=False):
        scale = torch.as_tensor(scale, dtype=lse.dtype, device=lse.device)
        found = next_scale(lse, u, counted, scale, _shards.holders(weight))
        return found.to(accumulation_dtype(embeddings, weight))


def next_scale(
    lse: torch.Tensor,
    u: torch.Tensor,
    counted: torch.Tensor,
    scale: torch.Tensor,
    groups: tuple[Any, ...] = (None,),
) -> torch.Tensor:
    """The scale of eq. 16: of this rank's lse and target cosines, and whether they count, (N,).

    ``groups``: see `_collectives.of_each_rank`.
    """
    log_sum = lse.masked_fill(~counted, -math.inf).logsumexp(dim=0)
    count = counted.sum().to(lse.dtype)
    # the lower median of the angles; a NaN is left out, and one more for an empty batch
    turned = torch.cat([-u.masked_fill(~counted, math.nan), u.new_full((1,), math.nan)])
    angle = (-turned.nanmedian()).clamp(-1.0, 1.0).acos().nan_to_num(0.0)
    log_sums, counts, angles = _collectives.of_each_rank(
        torch.stack([log_sum, count, angle.to(lse.dtype) * count]), groups
    ).unbind(dim=1)
    total = counts.sum()
    log_mean = log_sums.logsumexp(dim=0) - total.log()
    found = log_mean / (angles.sum() / total).clamp_max(math.pi / 4).cos()
    return torch.where((total > 0) & (found > 0) & found.isfinite(), found, scale)


def norms(embeddings: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Norms of the rows, (N,) in `sum_dtype`; 0 for ignored ones, of which nothing is used."""
    ignored = labels.long() == ignore_index
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = embeddings.masked_fill(ignored[:, None], 0.0).to(sum_dtype(embeddings))
        return torch.linalg.vector_norm(rows, dim=1)


@torch.no_grad()
@_compiled.raising(num_outputs=2)
def adaface_statistics(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    norm_mean: float | torch.Tensor,
    norm_std: float | torch.Tensor,
    momentum: float = 0.01,
    *,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""AdaFace's moving mean and standard deviation of norms, with this batch taken in (eq. 18).

    .. math:: \mu_t = (1 - \alpha)\,\mu_{t-1} + \alpha\,\operatorname{mean} \lVert x_n \rVert

    and likewise the standard deviation (over N - 1), of norms clipped to [0.001, 100] of the rows
    that are not ignored and whose norm is finite. Where `torch.distributed` is initialised it is a
    collective, over the rows of all ranks, or of those that hold ``weight``, if that is sharded.

    Args:
        embeddings: (N, D).
        labels: (N,).
        norm_mean: the mean before, which starts at 20; float, or 0-d floating tensor.
        norm_std: the standard deviation before, which starts at 100, likewise.
        momentum: alpha, the part of this batch, in [0, 1].
        ignore_index: label of rows that are left out.
        weight: the class weights, (C, D), where they are split over some of the ranks.

    Returns:
        The two, 0-d, without gradient, in the dtypes of tensors that were given, else in the
        accumulation dtype. No row leaves both as they were, a single one the deviation.

    References:
        Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022, arXiv:2204.00964,
        section 3.3.
    """
    _validate_others.batch(embeddings, labels)
    ignore_index = _validate.ignore_index(ignore_index)
    norm_mean = _of_norms("norm_mean", norm_mean, embeddings)
    norm_std = _of_norms("norm_std", norm_std, embeddings)
    momentum = _validate.between("momentum", momentum, 0.0, 1.0)
    found = norms(embeddings, labels, ignore_index)
    # a batch that overflowed, which a gradient scaler drops, must not stay in the statistics
    counted = (labels.long() != ignore_index) & found.isfinite()
    found = found.clamp(SMALLEST_NORM, LARGEST_NORM).masked_fill(~counted, 0.0)
    local = torch.stack([counted.sum().to(found.dtype), found.sum(), found.square().sum()])
    groups = _shards.holders(weight)
    count, total, squares = _collectives.of_each_rank(local, groups).sum(dim=0).unbind()
    mean = total / count.clamp_min(1.0)
    variance = (squares - total * mean) / (count - 1.0).clamp_min(1.0)
    std = variance.clamp_min(0.0).sqrt()
    mean = norm_mean + momentum * (mean - norm_mean)
    std = norm_std + momentum * (std - norm_std)
    return (
        torch.where(count > 0, mean, norm_mean).to(norm_mean.dtype),
        torch.where(count > 1, std, norm_std).to(norm_std.dtype),
    )


def _of_norms(name: str, value: float | torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """A statistic of AdaFace's, checked, as a tensor."""
    value = _validate_others.of_norms(name, value)
    if isinstance(value, torch.Tensor):
        return value
    dtype = accumulation_dtype(embeddings, embeddings)
    return embeddings.new_ones((), dtype=dtype) * value  # in a product it stays symbolic


@loss
def adaface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float = 0.4,
    scale: float | torch.Tensor = 64.0,
    *,
    h: float = 0.333,
    norm_mean: float | torch.Tensor = 20.0,
    norm_std: float | torch.Tensor = 100.0,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""AdaFace: a margin that follows the norm of the embedding, as a measure of its quality.

    .. math:: \psi(\cos\theta) = \cos(\theta - m \hat z) - (m + m \hat z), \qquad
        \hat z = \operatorname{clip}\left(
        h\,\frac{\lVert x \rVert - \mu}{\sigma + 10^{-3}}, -1, 1\right)

    The angle is clipped to [0, pi], and nothing is differentiated through the norm, which is
    clipped to [0.001, 100].

    Args:
        embeddings: see `arcface`, likewise what isn't listed. Their norms count here.
        weight: (C, D).
        labels: (N,).
        margin: m, in radians and as an offset of the cosine.
        scale: s > 0.
        h: how far a standard deviation of the norms turns the margin.
        norm_mean: mu, the mean of norms over many batches, from `adaface_statistics`; float, or 0-d
            floating tensor.
        norm_std: sigma, their standard deviation likewise.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022, arXiv:2204.00964,
        section 3.3.
    """
    _validate.tensors(embeddings, weight, labels)
    chosen = choose(options, adaface)
    psi = adaface_psi(embeddings, labels, margin, h, norm_mean, norm_std, chosen.ignore_index)
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


def adaface_psi(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    margin: float,
    h: float,
    norm_mean: float | torch.Tensor,
    norm_std: float | torch.Tensor,
    ignore_index: int,
) -> Psi:
    """The margin of eq. 17, of a batch's norms."""
    margin = _validate.between("margin", margin, 0.0, LARGEST_ADAFACE_MARGIN, RADIANS)
    h = _validate.between("h", h, 0.0, 100.0)
    norm_mean = _of_norms("norm_mean", norm_mean, embeddings)
    norm_std = _of_norms("norm_std", norm_std, embeddings)
    found = norms(embeddings.detach(), labels, ignore_index).clamp(SMALLEST_NORM, LARGEST_NORM)
    quality = (h * (found - norm_mean) / (norm_std + SMALLEST_SPREAD)).clamp(-1.0, 1.0)
    return margins.adaptive(margin, quality)


LARGEST_ADAFACE_MARGIN = 2.0
RADIANS = "it is an angle in radians and an offset of the cosine, and the scale comes after it"


@loss
def magface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lower_margin: float = 0.45,
    upper_margin: float = 0.8,
    scale: float | torch.Tensor = 64.0,
    *,
    lower_norm: float = 10.0,
    upper_norm: float = 110.0,
    regularizer: float = 35.0,
    boundary: str = "linear",
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""MagFace: ArcFace with a margin that grows with the norm, through which it is differentiated.

    .. math:: m(a) = m_l + \frac{m_u - m_l}{a_u - a_l} (a - a_l), \qquad
        a = \operatorname{clip}(\lVert x \rVert, a_l, a_u)

    and to the loss of each row is added :math:`\lambda\,(a / a_u^2 + 1 / a)`.

    Args:
        embeddings: see `arcface`, likewise what isn't listed. Their norms count here.
        weight: (C, D).
        labels: (N,).
        lower_margin: m_l, radians, of embeddings of norm ``lower_norm`` and less.
        upper_margin: m_u >= m_l, radians, of norm ``upper_norm`` and more.
        scale: s > 0.
        lower_norm: a_l > 0.
        upper_norm: a_u > a_l.
        regularizer: lambda >= 0.
        boundary: see `arcface`.
        **options: see `arcface`; focal factors don't touch what is added.

    Returns:
        0-d loss, or (N,).

    References:
        Meng et al., MagFace: A Universal Representation for Face Recognition and Quality
        Assessment, 2021, arXiv:2103.06627, section 3.
    """
    _validate.tensors(embeddings, weight, labels)
    _validate.choice("boundary", boundary, _validate.BOUNDARIES)
    chosen = choose(options, magface)
    found = magnitudes(embeddings, labels, lower_norm, upper_norm, chosen.ignore_index)
    margin = magface_margin(found, lower_margin, upper_margin, lower_norm, upper_norm)
    penalty = magface_penalty(found, upper_norm, regularizer)
    psi = margins.angular(margin, boundary)
    return margin_loss(embeddings, weight, labels, psi, scale, chosen, penalty)


def magnitudes(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    lower_norm: float,
    upper_norm: float,
    ignore_index: int,
) -> torch.Tensor:
    """MagFace's a, (N,)."""
    lower = _validate.positive("lower_norm", lower_norm)
    upper = _validate.positive("upper_norm", upper_norm)
    _validate.increasing("lower_norm", lower, "upper_norm", upper)
    return norms(embeddings, labels, ignore_index).clamp(lower, upper)


def magface_margin(
    found: torch.Tensor,
    lower_margin: float,
    upper_margin: float,
    lower_norm: float,
    upper_norm: float,
) -> torch.Tensor:
    """m(a) of eq. 19, (N,)."""
    lower = _validate_margins.angle("lower_margin", lower_margin)
    upper = _validate_margins.angle("upper_margin", upper_margin)
    _validate.ordered("lower_margin", lower, "upper_margin", upper)
    # tensors, since Dynamo keeps a float symbolic in a product
    one = found.new_ones(())
    first, last = one * lower, one * upper
    return first + (last - first) * ((found - lower_norm) / (upper_norm - lower_norm))


def magface_penalty(found: torch.Tensor, upper_norm: float, regularizer: float) -> torch.Tensor:
    """What MagFace adds to each row's loss (eq. 19), (N,)."""
    regularizer = _validate.between("regularizer", regularizer, 0.0, _validate.LARGEST_SCALE)
    return regularizer * (found / (upper_norm * upper_norm) + 1.0 / found)


@loss
def elasticface(
    embeddings: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    margin: float | None = None,
    scale: float | torch.Tensor = 64.0,
    *,
    sigma: float = 0.05,
    kind: str = "arc",
    plus: bool = False,
    boundary: str = "none",
    generator: torch.Generator | None = None,
    **options: Unpack[CallOptions],
) -> torch.Tensor:
    r"""ElasticFace: each row's margin is drawn anew, from a normal distribution.

    .. math:: \psi(\cos\theta) = \cos(\theta + e) \quad\text{or}\quad \cos\theta - e,
        \qquad e \sim \mathcal N(m, \sigma^2)

    =================  ========  ======  =======
    of the paper       ``kind``  margin  sigma
    =================  ========  ======  =======
    ElasticFace-Arc    arc       0.5     0.05
    ElasticFace-Arc+   arc       0.5     0.0175
    ElasticFace-Cos    cos       0.35    0.05
    ElasticFace-Cos+   cos       0.35    0.02
    =================  ========  ======  =======

    Args:
        embeddings: see `arcface`, likewise what isn't listed.
        weight: (C, D).
        labels: (N,).
        margin: m, radians for ``"arc"``, 0.5 by default, an offset of the cosine for ``"cos"``,
            0.35.
        scale: s > 0.
        sigma: standard deviation of the margin, in its unit; 0 for the margin itself.
        kind: ``"arc"`` or ``"cos"``.
        plus: ElasticFace+: of the margins drawn, the smallest goes to the row nearest to its class,
            the largest to the farthest.
        boundary: see `arcface`; of ``"arc"`` only.
        generator: where margins are drawn from; torch's own by default. One on a CPU serves every
            device, with the same margins.
        **options: see `arcface`.

    Returns:
        0-d loss, or (N,).

    References:
        Boutros et al., ElasticFace: Elastic Margin Loss for Deep Face Recognition, 2022,
        arXiv:2109.09416; sigma of the "+" variants is that of the authors' code.
    """
    _validate.tensors(embeddings, weight, labels)
    chosen = choose(options, elasticface)
    psi = elastic_psi(
        labels, margin, sigma, kind, boundary, generator, chosen.ignore_index, plus=plus
    )
    return margin_loss(embeddings, weight, labels, psi, scale, chosen)


def elastic_psi(
    labels: torch.Tensor,
    margin: float | None,
    sigma: float,
    kind: str,
    boundary: str,
    generator: torch.Generator | None,
    ignore_index: int,
    *,
    plus: bool,
) -> Psi:
    """ElasticFace's margin, of a batch with so many labels."""
    _validate.choice("boundary", boundary, _validate.BOUNDARIES)
    _validate_margins.mean_margin(margin)
    mean = _validate_margins.of_kind(margin, kind)
    sigma = _validate.between("sigma", sigma, 0.0, 10.0)
    generator = _validate_settings.generator(generator)
    if generator is None:  # a call of its own: Dynamo has none with a generator
        drawn = torch.randn(labels.shape[0], device=labels.device)
    else:
        drawn = torch.randn(labels.shape[0], generator=generator, device=generator.device)
    drawn = mean + sigma * drawn.to(labels.device)

    def psi(u: torch.Tensor) -> torch.Tensor:
        rows = drawn.to(u.dtype)
        if plus:
            rows = _by_distance(rows, u.detach(), labels.long() == ignore_index)
        shape = margins.angular(rows, boundary) if kind == "arc" else margins.additive(rows)
        return margins.apply(u, shape)

    return psi


def _by_distance(values: torch.Tensor, u: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    """``values`` (N,) dealt out anew, the smallest to the largest u; ignored rows keep theirs."""
    order = u.masked_fill(ignored, -math.inf).argsort(descending=True, stable=True)
    ascending = values.masked_fill(ignored, math.inf).sort().values
    dealt = torch.empty_like(values).scatter(0, order, ascending)
    return torch.where(ignored, values, dealt)
