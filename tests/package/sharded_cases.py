"""What ranks do in tests of sharded classes: each loss beside the same loss in one process."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from combined_cases import KINDS
from torch import nn
from two_processes import Arrays, whole

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fused_margin as fm
from fused_margin import _setup
from fused_margin.optim import SGDInBackward

Tensor = torch.Tensor
DIM = 6
FP64 = torch.float64


class Own(fm.MarginSoftmaxLoss):
    """A margin of one's own."""

    def psi(self, embeddings: Tensor, labels: Tensor) -> Any:
        return lambda u: 2 * u * u.abs() - 1


class InterTopK(fm.ArcFaceLoss):
    """The penalty on the nearest classes of all ranks."""

    kind = "arc"

    def negatives(self, embeddings: Tensor, labels: Tensor) -> Any:
        return fm.functional.inter_topk(embeddings, self, labels, 3, 0.1, kind=self.kind)


class InterTopKOfCosines(InterTopK):
    """The other form."""

    kind = "cos"


def _elastic(num_classes: int, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return fm.ElasticFaceLoss(num_classes, DIM, generator=generator, plus=True, **options)


def _learnt() -> nn.Parameter:
    return nn.Parameter(torch.tensor(9.0, dtype=FP64))


def _per_class(num_classes: int) -> Tensor:
    return torch.linspace(0.1, 0.9, num_classes, dtype=FP64)


# By the number of classes: every loss, and every option that isn't the default.
CRITERIA: dict[str, Callable[..., Any]] = {
    "arcface": lambda C, **kw: fm.ArcFaceLoss(C, DIM, **kw),
    "arcface, continuous": lambda C, **kw: fm.ArcFaceLoss(
        C, DIM, 1.3, 9.0, boundary="continuous", **kw
    ),
    "arcface, straight through": lambda C, **kw: fm.ArcFaceLoss(
        C, DIM, boundary="none", grad="straight_through", **kw
    ),
    "arcface, easy, sum": lambda C, **kw: fm.ArcFaceLoss(
        C, DIM, boundary="easy", reduction="sum", **kw
    ),
    "arcface, a margin a class": lambda C, **kw: fm.ArcFaceLoss(C, DIM, _per_class(C), **kw),
    "arcface, learnt scale": lambda C, **kw: fm.ArcFaceLoss(C, DIM, scale=_learnt(), **kw),
    "cosface": lambda C, **kw: fm.CosFaceLoss(C, DIM, **kw),
    "cosface, rows": lambda C, **kw: fm.CosFaceLoss(C, DIM, reduction="none", **kw),
    "cosface, weighed": lambda C, **kw: fm.CosFaceLoss(
        C, DIM, class_weight=_per_class(C), focal_gamma=1.5, focal_alpha=0.7, **kw
    ),
    "cosface, reference": lambda C, **kw: fm.CosFaceLoss(C, DIM, backend="reference", **kw),
    "cosface, learnt scale, reference": lambda C, **kw: fm.CosFaceLoss(
        C, DIM, scale=_learnt(), backend="reference", **kw
    ),
    "fixed adacos": lambda C, **kw: fm.FixedAdaCosLoss(C, DIM, **kw),
    "softmax, ignored class": lambda C, **kw: fm.NormalizedSoftmaxLoss(
        C, DIM, 200.0, ignore_index=1, **kw
    ),
    "softmax, no budget": lambda C, **kw: fm.NormalizedSoftmaxLoss(C, DIM, memory_budget=0, **kw),
    "combined": lambda C, **kw: fm.CombinedMarginLoss(C, DIM, 1.1, 0.3, 0.2, **kw),
    "sphereface": lambda C, **kw: fm.SphereFaceLoss(C, DIM, **kw),
    "adacos": lambda C, **kw: fm.AdaCosLoss(C, DIM, **kw),
    "adaface": lambda C, **kw: fm.AdaFaceLoss(C, DIM, **kw),
    "magface": lambda C, **kw: fm.MagFaceLoss(C, DIM, **kw),
    "elasticface": _elastic,
    "own": lambda C, **kw: Own(C, DIM, 12.0, **kw),
    "curricularface": lambda C, **kw: fm.CurricularFaceLoss(C, DIM, 0.3, 9.0, **kw),
    "mv-softmax, a margin a class": lambda C, **kw: fm.MVSoftmaxLoss(
        C, DIM, _per_class(C), 9.0, **kw
    ),
    "circle softmax": lambda C, **kw: fm.CircleSoftmaxLoss(C, DIM, scale=9.0, **kw),
    "smoothed, learnt scale": lambda C, **kw: fm.ArcFaceLoss(
        C, DIM, 0.2, _learnt(), label_smoothing=0.1, **kw
    ),
    "inter-topk": lambda C, **kw: InterTopK(C, DIM, 0.2, 9.0, **kw),
    "inter-topk, cos, sub-centres": lambda C, **kw: InterTopKOfCosines(
        C, DIM, 0.2, 9.0, sub_centers=2, **kw
    ),
    "curricularface, smoothed": lambda C, **kw: fm.CurricularFaceLoss(
        C, DIM, 0.3, 9.0, label_smoothing=0.2, **kw
    ),
    "sub-centres": lambda C, **kw: fm.CosFaceLoss(
        C, DIM, 0.2, 9.0, sub_centers=2, label_smoothing=0.1, **kw
    ),
    "sub-centres, reference": lambda C, **kw: fm.CosFaceLoss(
        C, DIM, 0.2, 9.0, sub_centers=2, backend="reference", **kw
    ),
}
# which are asked for statistics of the batch, too
WITH_STATS = ("cosface", "curricularface", "sub-centres", "sub-centres, reference")
TRITON: dict[str, Callable[..., Any]] = {
    "arcface, triton": lambda C, **kw: fm.ArcFaceLoss(C, DIM, backend="triton", **kw),
}
# every loss of the table in README.md
OF_TABLE: dict[str, Callable[..., Any]] = {
    name: functools.partial(lambda kind, C, **kw: kind(C, DIM, **kw), kind)
    for name, kind in KINDS.items()
}
ROW_WEIGHTS = ("cosface, weighed", "elasticface")  # which are called with sample_weight
TOO_FEW = {"fixed adacos": 3, "adacos": 3}  # classes that a loss needs at least


class Part(NamedTuple):
    """A rank's rows of a batch."""

    x: Tensor
    labels: Tensor
    weights: Tensor


def batch(counts: list[int], num_classes: int) -> list[Part]:
    """Rows of each rank, of norms 0.5 to 20, with one ignored where a rank has three or more."""
    generator = torch.Generator().manual_seed(sum(counts) + num_classes)
    parts = []
    for count in counts:
        x = torch.randn(count, DIM, generator=generator, dtype=FP64)
        x *= torch.linspace(0.5, 20.0, count, dtype=FP64)[:, None] / math.sqrt(DIM)
        labels = torch.randint(num_classes, (count,), generator=generator)
        if count >= 3:
            labels[1] = -100
        parts.append(Part(x, labels, torch.rand(count, generator=generator, dtype=FP64) + 0.1))
    return parts


def built(name: str, num_classes: int) -> Any:
    criterion = (CRITERIA | TRITON | OF_TABLE)[name](num_classes, dtype=FP64)
    with torch.no_grad():
        criterion.weight.normal_(generator=torch.Generator().manual_seed(11))
    _setup._calls[criterion] = _setup._DECIDED  # no search for data-parallel modules: that is slow
    return criterion


def call(criterion: Any, name: str, part: Part, x: Tensor) -> Tensor:
    """The loss, as a scalar of which to take gradients."""
    keywords: dict[str, Any] = {}
    if name in ROW_WEIGHTS:
        keywords["sample_weight"] = part.weights
    labels = part.labels.masked_fill(part.labels == -100, criterion.ignore_index)
    if name in WITH_STATS:
        keywords["return_stats"] = True
    loss = criterion(x, labels, **keywords)
    if name in WITH_STATS:
        loss, stats = loss
        criterion.stats = {f"stats: {key}": value for key, value in stats._asdict().items()}
    return (loss * torch.linspace(0.3, 1.0, len(loss), dtype=FP64)).sum() if loss.ndim else loss


def measured(criterion: Any, name: str, part: Part) -> dict[str, Tensor]:
    """Loss and all gradients of this rank, of the same draws at each call."""
    torch.manual_seed(3)
    x = part.x.clone().requires_grad_()
    loss = call(criterion, name, part, x)
    loss.backward()
    assert x.grad is not None
    found = {"loss": loss.detach(), "d_x": x.grad}
    for parameter_name, parameter in criterion.named_parameters():
        grad = parameter.grad
        found[f"d_{parameter_name}"] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    for key, value in getattr(criterion, "stats", {}).items():
        found[key] = value.double().nan_to_num(-2.0)
    return found | {buffer: value.clone() for buffer, value in criterion.named_buffers()}


def difference(name: str, counts: list[int], num_classes: int) -> dict[str, float]:
    """By what a sharded loss differs from a whole one, in units of what is there.

    The whole one runs on each rank, with all classes and this rank's rows; the gradients of its
    parameters are averaged over the ranks.
    """
    part = batch(counts, num_classes)[dist.get_rank()]
    criterion = built(name, num_classes)
    sharded = fm.distributed.shard_classes(copy.deepcopy(criterion))
    if name == "elasticface":  # whose copies share the generator
        criterion.generator, sharded.generator = (torch.Generator().manual_seed(3) for _ in "ab")
    expected = measured(criterion, name, part)
    for key, value in expected.items():
        if key in ("d_weight", "d_scale"):
            dist.all_reduce(value)
            value /= dist.get_world_size()
    found = measured(sharded, name, part)
    assert found.keys() == expected.keys()
    return {
        key: float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-3))
        for key, value in expected.items()
        if value.numel()
    }


def differences(names: list[str], counts: list[int], num_classes: int) -> dict[str, Any]:
    """`difference` of several losses, but for those that need more classes."""
    # of the interpreter of Triton 3.6, as in pyproject.toml
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    return {
        name: difference(name, counts, num_classes)
        for name in names
        if num_classes >= TOO_FEW.get(name, 2) and not _is_cut(name, num_classes)
    }


def _is_cut(name: str, num_classes: int) -> bool:
    """Whether the two rows of a class would come to lie on two ranks: it is refused."""
    if "sub-centres" not in name or -(-2 * num_classes // dist.get_world_size()) % 2 == 0:
        return False
    try:
        fm.distributed.shard_classes(built(name, num_classes))
    except ValueError as error:
        return "without cutting one" in str(error)
    return False


def whole_batch(name: str, count: int, num_classes: int) -> dict[str, float]:
    """By what even batches differ from one process with all rows."""
    parts = batch([count] * dist.get_world_size(), num_classes)
    for part in parts:
        part.labels.clamp_(min=0)
    criterion = built(name, num_classes)
    sharded = fm.distributed.shard_classes(copy.deepcopy(criterion))
    everything = Part(*(torch.cat(rows) for rows in zip(*parts, strict=True)))
    expected = measured(criterion, name, everything)
    found = measured(sharded, name, parts[dist.get_rank()])
    dist.all_reduce(found["loss"])
    found["loss"] /= dist.get_world_size()
    expected["d_x"] = expected["d_x"].chunk(dist.get_world_size())[dist.get_rank()]
    expected["d_x"] = expected["d_x"] * dist.get_world_size()  # of this rank's own mean
    return {
        key: float((found[key] - value).abs().max() / value.abs().max())
        for key, value in expected.items()
        if not key.startswith("stats")  # which are of this rank's rows
    }


def whole_batches(names: list[str], count: int, num_classes: int) -> dict[str, dict[str, float]]:
    """`whole_batch` of several losses."""
    return {name: whole_batch(name, count, num_classes) for name in names}


def sums_of_uneven(counts: list[int], num_classes: int) -> dict[str, float]:
    """The remedy for uneven batches: sums, times ranks over rows."""
    parts, ranks = batch(counts, num_classes), dist.get_world_size()
    criterion = built("cosface", num_classes)
    sharded: Any = fm.distributed.shard_classes(copy.deepcopy(criterion))
    everything = Part(*(torch.cat(rows) for rows in zip(*parts, strict=True)))
    expected = measured(criterion, "cosface", everything)
    counted = int((everything.labels != -100).sum())
    sharded.reduction = "sum"
    part = parts[dist.get_rank()]
    (sharded(part.x, part.labels) * (ranks / counted)).backward()
    found = sharded.weight.grad.full_tensor()
    return {"d_weight": float((found - expected["d_weight"]).abs().max())}


def logits_differ(counts: list[int], num_classes: int) -> list[float]:
    """Logits and the gradients of a function of them, beside a whole criterion's."""
    part = batch(counts, num_classes)[dist.get_rank()]
    criterion = built("arcface, learnt scale", num_classes)
    sharded = fm.distributed.shard_classes(copy.deepcopy(criterion))
    results = []
    for one in (criterion, sharded):
        x = part.x.clone().requires_grad_()
        found = one.logits(x)
        (found.square() * torch.linspace(0.1, 1.0, num_classes)).sum().backward()
        with torch.no_grad():
            assert torch.equal(one.logits(part.x), found.detach())
        grads = [x.grad, one.weight.grad, one.scale.grad]
        grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        results.append([found.detach(), *grads])
    expected, found = results
    for grad in expected[2:]:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    assert [one.shape for one in expected] == [one.shape for one in found]
    return [
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
        if a.numel()
    ]


def metrics_differ(name: str, counts: list[int], num_classes: int) -> dict[str, float]:
    """The nearest classes and standings of this rank's rows, beside a whole criterion's."""
    part = batch(counts, num_classes)[dist.get_rank()]
    if len(part.x) > 3:
        part.x[3] = math.nan
    if _is_cut(name, num_classes):
        return {}
    criterion = built(name, num_classes)
    sharded = fm.distributed.shard_classes(copy.deepcopy(criterion))
    found, expected = (
        {
            **{f"evaluate: {k}": v for k, v in evaluated._asdict().items()},
            **{
                f"predict {k}: {key}": value
                for k in {1, 2, min(5, num_classes), num_classes}
                for key, value in fm.metrics.predict(part.x, one, k)._asdict().items()
            },
        }
        for one in (sharded, criterion)
        for evaluated in [fm.metrics.evaluate(part.x, one, part.labels)]
    )
    assert [value.shape for value in found.values()] == [v.shape for v in expected.values()]
    assert [value.dtype for value in found.values()] == [v.dtype for v in expected.values()]
    kept = part.x.isfinite().all(dim=1)
    for values in (found, expected):
        for key in values:  # of a row of NaN every class is as near as any other
            if key.startswith("predict"):
                values[key] = values[key][kept]
    return {
        key: float((found[key].double() - value.double()).nan_to_num(0.0).abs().max())
        + float((found[key].isnan() != value.isnan()).any())
        for key, value in expected.items()
        if value.numel()
    }


def ties(num_classes: int) -> list[list[int]]:
    """Classes of equal rows, of which the first rank's come first."""
    criterion = fm.CosFaceLoss(num_classes, DIM, dtype=FP64)
    with torch.no_grad():
        criterion.weight.copy_(torch.ones(num_classes, DIM))
    fm.distributed.shard_classes(criterion)
    x = torch.ones(2, DIM, dtype=FP64)
    return fm.metrics.predict(x, criterion, num_classes).classes.tolist()


def other_numbers() -> str:
    """The error of ranks that ask for different numbers of classes."""
    criterion = fm.distributed.shard_classes(fm.CosFaceLoss(9, DIM))
    try:
        fm.metrics.predict(torch.ones(2, DIM), criterion, 1 + dist.get_rank())
    except ValueError as error:
        return str(error)
    return ""


def metrics_traffic(count: int, num_classes: int, k: int) -> int:
    """Bytes that a rank sends to predict and to evaluate."""
    criterion = fm.distributed.shard_classes(fm.CosFaceLoss(num_classes, DIM))
    x, labels = torch.ones(count, DIM), torch.zeros(count, dtype=torch.int64)
    with fm.distributed.count_traffic() as counted:
        fm.metrics.predict(x, criterion, k)
        fm.metrics.evaluate(x, criterion, labels)
    return counted.total()


STEPS, CLASSES, ROWS = 50, 13, 12


def train(name: str, is_sharded: bool, foreach: bool, *, in_backward: bool = False) -> Arrays:
    """50 steps of SGD with momentum over a backbone and a loss, whole or sharded.

    ``in_backward``: its class weights by `SGDInBackward`.
    """
    torch.manual_seed(5)
    backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, DIM)).double()
    criterion = built(name, CLASSES)
    model: Any = backbone
    ranks = dist.get_world_size() if is_sharded else 1
    if is_sharded:
        fm.distributed.shard_classes(criterion)
        model = nn.parallel.DistributedDataParallel(backbone)
    others = [p for p in criterion.parameters() if p is not criterion.weight]
    groups = [{"params": model.parameters()}]
    groups += [{"params": others if in_backward else criterion.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, foreach=foreach)
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if in_backward:
        optimizers.append(SGDInBackward([criterion.weight], lr=0.01, momentum=0.9))
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        rows = torch.randn(ROWS, 8, generator=generator, dtype=FP64)
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        if is_sharded:
            rows, labels = (part.chunk(ranks)[dist.get_rank()] for part in (rows, labels))
        criterion(model(rows), labels).backward()
        for one in optimizers:
            one.step()
        if is_sharded and step == 0:
            fm.check_setup(criterion, optimizers)
        for one in optimizers:
            one.zero_grad()
    return whole(model) | whole(criterion)
