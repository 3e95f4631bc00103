"""Arguments and uses that would give other numbers than were meant: refused, or made right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FUSED_BACKENDS, device_of
from torch import nn

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import plan
from fused_margin.compat import heads
from fused_margin.optim import RowSparseAdam, SGDInBackward

Tensor = torch.Tensor
FP64 = torch.float64
CLASSES, DIM, ROWS = 10, 8, 6
X = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
W = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1))
Y = torch.arange(ROWS)
SUB_CENTERS = fm.ArcFaceLoss(5, DIM, sub_centers=2)
NORM, STD = torch.tensor(20.0), torch.tensor(100.0)


class Penalised(fm.ArcFaceLoss):
    """With a penalty of a shape that it is given."""

    shape: tuple[int, ...] = (ROWS, 1)

    def penalty(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.new_ones(self.shape)


def _centers(index: int) -> Tensor:
    centers = torch.arange(CLASSES)
    centers[3] = index
    return centers


def _with_penalty(*shape: int) -> Any:
    criterion = Penalised(CLASSES, DIM)
    criterion.shape = shape
    return criterion(X, Y)


def _assigned(criterion: Any, name: str, value: Any) -> Any:
    setattr(criterion, name, value)
    return criterion(X, Y)


def _statistics(x: Any = X, y: Any = Y, mean: Any = NORM, **options: Any) -> Any:
    return fmf.adaface_statistics(x, y, mean, STD, **options)


def _planned(**change: Any) -> Any:
    return plan.plan(plan.Setting(1000, 64, 2)._replace(**change))


def _schedule(setting: str, initial: Any, final: Any) -> Any:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, focal_gamma=1.0, memory_budget=1000)
    return fm.schedules.Linear(criterion, initial, final, 0, 4, setting=setting)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "penalty (N, 1)": (
        lambda: _with_penalty(ROWS, 1), ValueError, r"penalty must .*shape \(6,\).*\(6, 1\)"
    ),
    "penalty 0-d": (lambda: _with_penalty(), ValueError, r"penalty must .*shape \(6,\)"),
    "statistics of a column of labels": (
        lambda: _statistics(y=Y[:, None]), ValueError, r"labels must have shape \(6,\).*squeeze"
    ),
    "statistics of one label": (lambda: _statistics(y=Y[:1]), ValueError, "labels must have shape"),
    "statistics of a list": (lambda: _statistics(y=Y.tolist()), TypeError, "labels must be a tens"),
    "statistics of a row": (lambda: _statistics(X[0]), ValueError, r"embeddings must have shape"),
    "statistics, float labels": (lambda: _statistics(y=Y / 2), TypeError, "an integer dtype"),
    "several means": (lambda: _statistics(mean=torch.ones(3)), ValueError, "norm_mean must"),
    "no mean": (lambda: _statistics(mean=None), TypeError, "norm_mean must be a number"),
    "ignored label": (lambda: _statistics(ignore_index="a"), TypeError, "ignore_index must be"),
    "mean of NaN": (lambda: fmf.adaface(X, W, Y, norm_mean=math.nan), ValueError, "norm_mean must"),
    "std below 0": (lambda: fmf.adaface(X, W, Y, norm_std=-0.001), ValueError, "norm_std must"),
    "a number as psi": (
        lambda: fm.negatives.misclassified(0.35), TypeError, "psi must be a function"  # pyright: ignore[reportArgumentType]
    ),
    "psi of integers": (
        lambda: fmf.margin_softmax(X, W, Y, lambda u: (u > 0).long(), 8.0), TypeError,
        "psi must return floating numbers",
    ),
    "threshold of NaN": (
        lambda: fmf.arcface(X, W, Y, negatives=fm.negatives.Negatives(math.nan, (0.0,) * 6)),
        ValueError, "threshold of negatives must be a cosine",
    ),
    "a centre below 0": (
        lambda: fm.metrics.outlier_angles(X, W, Y, _centers(-1)), ValueError,
        r"in \[0, 10\), got -1",
    ),
    "a centre too far": (
        lambda: fm.metrics.outlier_angles(X, W, Y, _centers(10)), ValueError, "got 10 of class 3"
    ),
    "offsets of classes": (
        lambda: fm.MVSoftmaxLoss(CLASSES, DIM, torch.full((CLASSES,), 3.0))(X, Y), ValueError,
        "offset of the cosine, at most 2",
    ),
    "falling margins": (
        lambda: fmf.magface(X, W, Y, 0.8, 0.45), ValueError, "lower_margin must be at most"
    ),
    "falling margins, assigned": (
        lambda: _assigned(fm.MagFaceLoss(CLASSES, DIM), "lower_margin", 0.9), ValueError,
        "lower_margin must be at most",
    ),
    "smallest margin": (
        lambda: fm.margins.by_class_size(Y, math.nan), ValueError, "smallest must be in"
    ),
    "power below 0": (
        lambda: fm.margins.by_class_size(Y, power=-1.0), ValueError, r"power must be in \[0, 10\]"
    ),
    "offset of NaN": (lambda: fm.margins.additive(math.nan), ValueError, "margin must be finite"),
    "offset of a word": (lambda: fm.margins.additive("a"), TypeError, "margin must be a number"),  # pyright: ignore[reportArgumentType]
    "generator": (
        lambda: fmf.elasticface(X, W, Y, generator=5), TypeError, "generator must be a torch.Gen"  # pyright: ignore[reportArgumentType]
    ),
    "penalty that grows": (
        lambda: heads.WeSpeakerAAM(DIM, CLASSES, 32.0, 0.5, mp=0.5, k_top=5)(X, Y), ValueError,
        r"mp = 0.5 is for a margin of 0.2.*1.25 radians.*at most 0.4",
    ),
    "sub-centres pushed apart": (
        lambda: fm.regularizers.regular_face(SUB_CENTERS.weight), ValueError,
        "sub_centers=2: 2 rows for each class.*dominant_centers",
    ),
    "beta of 1": (
        lambda: RowSparseAdam([nn.Parameter(W)], betas=(0.9, 1.0)), ValueError, r"in \[0, 1\)"
    ),
    "one beta": (
        lambda: RowSparseAdam([nn.Parameter(W)], betas=(0.9,)), ValueError, "two numbers"  # pyright: ignore[reportArgumentType]
    ),
    "schedule from None": (lambda: _schedule("focal_gamma", None, 2.0), TypeError, "focal_gamma"),
    "schedule to NaN": (lambda: _schedule("margin", 0.0, math.nan), ValueError, "must be finite"),
    "schedule of words": (lambda: _schedule("boundary", "none", "easy"), TypeError, "boundary"),
    "schedule of integers": (
        lambda: _schedule("memory_budget", 0, 100), ValueError, "memory_budget is an integer"
    ),
    "no GPUs": (lambda: _planned(gpus=0), ValueError, "gpus must be >= 1"),
    "classes below 0": (lambda: _planned(classes=-5), ValueError, "classes must be >= 2"),
    "another optimiser": (lambda: _planned(optimizer="adamw"), ValueError, "'momentum', 'adam'"),
    "rate of 0": (lambda: _planned(rate=0.0), ValueError, "rate must be"),
    "seed": (
        lambda: setattr(fm.sampling.NegativeSampler(0.1), "seed", -1), ValueError, "seed must be >="
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


PREDICTED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "predict": (lambda: fm.metrics.predict(X, W, 11).cosines, ValueError),
    "inter_topk": (lambda: fmf.arcface(X, W, Y, negatives=fmf.inter_topk(X, W, Y, 9)), ValueError),
    "adaface_statistics": (lambda: _statistics(momentum=2.0)[0], ValueError),
    "adacos_scale": (lambda: fmf.adacos_scale(X, W, Y[:2], 8.0), ValueError),
    "curricularface_t": (lambda: fmf.curricularface_t(X, W, Y, 3.0), ValueError),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_errors_of_what_returns_other_things_survive_compile(name: str) -> None:
    call, kind = PREDICTED[name]
    torch._dynamo.reset()
    with pytest.raises(kind) as eager:
        call()
    with pytest.raises(kind) as compiled:
        torch.compile(call, backend="aot_eager", fullgraph=True)()
    assert str(compiled.value) == str(eager.value)


def test_floats_and_tensors_are_one_to_adaface() -> None:
    """Statistics so far may be either, and keep a tensor's dtype."""
    floats = fmf.adaface_statistics(X, Y, 20.0, 100.0, 0.5)
    wide = [value.double() for value in (NORM, STD)]
    for mean, std in ((NORM, STD), wide):
        found = fmf.adaface_statistics(X, Y, mean, std, 0.5)
        assert [value.dtype for value in found] == [mean.dtype] * 2
        torch.testing.assert_close([value.float() for value in found], list(floats))


TWICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inter_topk": lambda x, w: fmf.arcface(
        x, w, Y, 0.2, 8.0, backend="reference", negatives=fmf.inter_topk(x, w, Y, 3, 0.5)
    ),
    "curricular": lambda x, w: fmf.curricularface(x, w, Y, 0.2, 8.0, t=0.3, backend="reference"),
}


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_are_those_of_the_gradient(name: str) -> None:
    x, w = (part.double().requires_grad_() for part in (X, W))
    assert torch.autograd.gradgradcheck(TWICE[name], (x, w))


def test_second_derivatives_with_factors_that_are_constant() -> None:
    """Of Circle loss, of the target and of other classes alike: what plain autograd makes of it."""

    def plain(x: Tensor, w: Tensor) -> Tensor:
        c = nn.functional.normalize(x) @ nn.functional.normalize(w).t()
        others = (c.detach() + 0.35).clamp_min(0.0) * (c - 0.35)
        targets = (1.35 - c.detach()).clamp_min(0.0) * (c - 0.65)
        is_target = nn.functional.one_hot(Y, CLASSES).bool()
        return nn.functional.cross_entropy(8.0 * torch.where(is_target, targets, others), Y)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return fmf.circle_softmax(x, w, Y, 0.35, 8.0, backend="reference")

    leaves = X.double(), W.double()
    found = torch.autograd.functional.hessian(ours, leaves)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(plain, leaves))


EMPTY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    **{
        kind.__name__: (lambda x, y, kind=kind: kind(CLASSES, DIM)(x, y))
        for kind in (fm.CurricularFaceLoss, fm.MVSoftmaxLoss, fm.CircleSoftmaxLoss, fm.AdaCosLoss)
    },
    "sub-centres": fm.ArcFaceLoss(CLASSES, DIM, sub_centers=2),
    "reference": fm.ArcFaceLoss(CLASSES, DIM, backend="reference"),
    "statistics": lambda x, y: fm.ArcFaceLoss(CLASSES, DIM)(x, y, return_stats=True)[0],
    "predict": lambda x, y: fm.metrics.predict(x, W, 2).cosines,
    "logits": lambda x, y: fmf.cosine_logits(x, W, 8.0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_in_a_graph(name: str) -> None:
    torch._dynamo.reset()
    call = EMPTY[name]
    empty = X[:0], Y[:0]
    compiled = torch.compile(call, backend="aot_eager")(*empty)
    torch.testing.assert_close(compiled, call(*empty))


def test_statistics_that_to_empty_has_left_without_values() -> None:
    """Class weights that are loaded alone aren't trained with whatever was in memory."""
    for kind in (fm.AdaFaceLoss, fm.AdaCosLoss, fm.CurricularFaceLoss):
        criterion = kind(CLASSES, DIM, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            criterion.weight.copy_(W)
        with pytest.raises(
            ValueError, match=r"without values: call criterion.reset_parameters\(\)"
        ):
            criterion(X, Y)
        fresh = kind(CLASSES, DIM)
        criterion.reset_parameters()
        criterion.load_state_dict({**fresh.state_dict(), "weight": W})
        fresh.load_state_dict({**fresh.state_dict(), "weight": W})
        assert criterion(X, Y) == fresh(X, Y)


def test_statistics_that_are_assigned_stay_wide() -> None:
    criterion = fm.AdaFaceLoss(CLASSES, DIM)
    half = {name: value.bfloat16() for name, value in criterion.state_dict().items()}
    criterion.load_state_dict(half, assign=True)
    assert criterion.weight.dtype is torch.bfloat16
    assert criterion.norm_mean.dtype is torch.float32


def test_a_schedule_without_steps_begins_with_its_last_value() -> None:
    criterion = fm.CosFaceLoss(CLASSES, DIM)
    schedule = fm.schedules.Linear(criterion, 0.0, 0.35, 0, 0)
    assert criterion.margin == 0.35
    schedule.load_state_dict(schedule.state_dict())
    assert criterion.margin == 0.35


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
@pytest.mark.parametrize("after", [False, True])
def test_hooks_of_weights_that_the_backward_updates(backend: str, after: bool) -> None:
    device = device_of(backend)
    criterion = fm.CosFaceLoss(CLASSES, DIM, backend=backend).to(device)
    optimizer = SGDInBackward([criterion.weight], lr=0.1)
    if after:
        hook = criterion.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    else:
        hook = criterion.weight.register_hook(lambda grad: grad.clamp(-1.0, 1.0))
    before = criterion.weight.detach().clone()
    loss = criterion(X.to(device), Y.to(device))
    with pytest.raises(RuntimeError, match=r"have hooks.*nothing has been changed"):
        loss.backward()
    assert torch.equal(criterion.weight, before)
    hook.remove()
    criterion(X.to(device), Y.to(device)).backward()
    optimizer.step()
    assert not torch.equal(criterion.weight, before)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.03), "step_size", 0.03),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum", 0.5),
        (lambda p: torch.optim.Adam(p), "exp_avg", 0.0),
    ],
)
def test_state_of_new_classes_begins_as_in_torch(
    make: Callable[[Any], torch.optim.Optimizer], name: str, expected: float
) -> None:
    criterion = fm.CosFaceLoss(CLASSES, DIM, dtype=FP64)
    optimizer = make(criterion.parameters())
    criterion(X.double(), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.state[criterion.weight][name].clone()
    criterion.grow(3, optimizer)
    found = optimizer.state[criterion.weight][name]
    torch.testing.assert_close(found[CLASSES:], torch.full((3, DIM), expected, dtype=FP64))
    assert torch.equal(found[:CLASSES], before)
