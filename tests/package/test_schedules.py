"""Schedules: their curves, on any setting, through wrappers and checkpoints."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import fused_margin as fm
from fused_margin.compat import heads, insightface, pml
from fused_margin.schedules import Exponential, Linear, Schedule


def _values(schedule: Schedule, steps: int) -> list[float]:
    values = [schedule.criterion.margin]
    for _ in range(steps):
        schedule.step()
        values.append(schedule.criterion.margin)
    return values


def test_linear() -> None:
    """As Hyperion's warm-up: the margin times epoch over the epochs of warming."""
    criterion = fm.ArcFaceLoss(5, 4, 0.3)
    values = _values(Linear(criterion, 0.0, 0.3, 0, 4), 6)
    assert values == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3, 0.3, 0.3])


def test_exponential() -> None:
    """As WeSpeaker's, whose epochs are counted from 1: 0 to epoch 20, 0.2 from 40 on."""
    criterion = fm.ArcFaceLoss(5, 4, 0.2)
    values = _values(Exponential(criterion, 0.0, 0.2, 19, 39), 60)
    expected = [
        0.2 * (1.0 - math.exp((epoch - 20) / 20 * math.log(1e-3))) for epoch in range(20, 40)
    ]
    assert values == pytest.approx([0.0] * 19 + expected + [0.2] * 22)


def test_a_step_at_once() -> None:
    criterion = fm.CosFaceLoss(5, 4)
    assert _values(Linear(criterion, 0.1, 0.4, 2, 2), 3) == [0.1, 0.1, 0.4, 0.4]


@pytest.mark.parametrize(
    ("make", "setting", "initial", "final"),
    [
        (fm.NormalizedSoftmaxLoss, "scale", 16.0, 64.0), (fm.SphereFaceLoss, "margin", 1.0, 4.0),
        (fm.CombinedMarginLoss, "m2", 0.0, 0.5), (fm.MagFaceLoss, "upper_margin", 0.5, 0.8),
        (fm.AdaFaceLoss, "margin", 0.0, 0.4), (fm.ElasticFaceLoss, "sigma", 0.0, 0.05),
        (fm.ArcFaceLoss, "focal_gamma", 0.0, 2.0),
    ],
)  # fmt: skip
def test_any_number(make: Any, setting: str, initial: float, final: float) -> None:
    criterion = make(5, 4)
    schedule = Linear(criterion, initial, final, 0, 2, setting=setting)
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for expected in (initial, (initial + final) / 2, final):
        assert getattr(criterion, setting) == schedule.last_value == pytest.approx(expected)
        assert bool(criterion(x, labels).isfinite())
        schedule.step()


def test_margins_of_classes() -> None:
    criterion = fm.ArcFaceLoss(5, 4)
    final = fm.margins.by_class_size(torch.tensor([1, 5, 9, 20, 100]))
    schedule = Linear(criterion, 0.0, final, 0, 2)
    assert criterion.margin == 0.0
    schedule.step()
    torch.testing.assert_close(criterion.margin, final / 2)
    restored = Linear(fm.ArcFaceLoss(5, 4), 0.0, 0.1, 0, 1)
    restored.load_state_dict(_through_a_file(schedule.state_dict()))
    torch.testing.assert_close(restored.criterion.margin, final / 2)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", [Linear, Exponential])
def test_checkpoints(kind: type[Schedule]) -> None:
    """A new process goes on where the old one stopped, whatever its schedule was told."""
    first = kind(fm.ArcFaceLoss(5, 4), 0.0, 0.5, 1, 9)
    for _ in range(4):
        first.step()
    second = kind(fm.ArcFaceLoss(5, 4, 0.5), 0.1, 0.2, 0, 1)
    second.load_state_dict(_through_a_file(first.state_dict()))
    assert second.criterion.margin == first.criterion.margin == first.last_value
    assert _values(second, 8) == _values(first, 8)
    with pytest.raises(ValueError, match="lacks steps"):
        second.load_state_dict({key: 0 for key in first.state_dict() if key != "steps"})
    with pytest.raises(ValueError, match="of a schedule of 'margin', this one is of 'scale'"):
        kind(fm.ArcFaceLoss(5, 4), 9.0, 8.0, 0, 1, setting="scale").load_state_dict(
            first.state_dict()
        )


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: pml.ArcFaceLoss(5, 4), "margin"),
        (lambda: pml.CosFaceLoss(5, 4, margin=0.1), "scale"),
        (
            lambda: insightface.PartialFC_V2(insightface.CombinedMarginLoss(64, 1, 0.5, 0), 4, 5),
            "m2",
        ),
        (lambda: insightface.PartialFC_V2(insightface.CosFace(64, 0.4), 4, 5), "m"),
        (lambda: heads.ArcMarginProduct(4, 5), "margin"),
        (lambda: heads.WeSpeakerAAM(4, 5), "margin"),
    ],
)
def test_losses_as_other_packages_have_them(make: Any, setting: str) -> None:
    criterion = make()
    schedule = Linear(criterion, 0.5, 0.25, 0, 1, setting=setting)
    x, labels = torch.randn(3, 4, generator=torch.manual_seed(0)), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(2):
        losses.append(float(criterion(x, labels).detach()))
        schedule.step()
    assert losses[0] != losses[1]


def test_the_loss_is_found_inside() -> None:
    """Of a model, or of what wraps one: an attribute of the wrapper would change nothing."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": fm.ArcFaceLoss(5, 4)})
    schedule = Linear(model, 0.0, 0.4, 0, 2)
    schedule.step()
    assert model["head"].margin == pytest.approx(0.2)
    compiled: Any = torch.compile(model["head"], backend="eager")
    Linear(compiled, 0.1, 0.4, 0, 2)
    assert model["head"].margin == 0.1
    assert repr(schedule) == "Linear(0.0, 0.4, 0, 2, 'margin')"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(nn.Linear(3, 3), 0, 1, 0, 1), "this Linear contains no loss"),
        (
            lambda: Linear(fm.FixedAdaCosLoss(5, 4), 0, 1, 0, 1),
            "FixedAdaCosLoss has no setting 'margin', but scale, reduction",
        ),
        (
            lambda: Linear(insightface.CombinedMarginLoss(64, 1, 0.5, 0), 0, 1, 0, 1),
            "has no setting 'margin', but s, m1, m2, m3, .*'margin' is m2 or m3 here",
        ),
        (
            lambda: Linear(nn.ModuleList([fm.ArcFaceLoss(5, 4), fm.CosFaceLoss(5, 4)]), 0, 1, 0, 1),
            "2 losses have the setting 'margin': ArcFaceLoss, CosFaceLoss; give each",
        ),
        (lambda: Linear(fm.ArcFaceLoss(5, 4), 0.0, 28.6, 0, 1), "radians"),
        (lambda: Linear(fm.ArcFaceLoss(5, 4), 28.6, 0.0, 0, 1), "radians"),
        (lambda: Linear(fm.ArcFaceLoss(5, 4), 0, 1, 3, 2), "last_step must be >= first_step"),
        (lambda: Linear(fm.ArcFaceLoss(5, 4), 0, 1, -1, 2), "first_step must be >= 0"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="criterion must be a loss of fused_margin, got float"):
        Linear(0.3, 0, 1, 0, 1)  # pyright: ignore[reportArgumentType]
    learnt = fm.ArcFaceLoss(5, 4, scale=nn.Parameter(torch.tensor(9.0)))
    with pytest.raises(TypeError, match="scale is learnt"):
        Linear(learnt, 9.0, 8.0, 0, 1, setting="scale")
    with pytest.raises(NotImplementedError):
        Schedule(fm.ArcFaceLoss(5, 4), 0.0, 0.5, 0, 2).step()


def test_a_state_of_another_curve_is_refused() -> None:
    criterion = fm.ArcFaceLoss(10, 8)
    state = fm.schedules.Linear(criterion, 0.0, 0.2, 0, 10).state_dict()
    with pytest.raises(ValueError, match="called 'Linear', this one is of 'Exponential'"):
        fm.schedules.Exponential(criterion, 0.0, 0.2, 0, 10).load_state_dict(state)
