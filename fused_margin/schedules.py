r"""Schedules of a loss's settings: a margin that grows, a scale that falls.

They step as those of `torch.optim.lr_scheduler` do, once an epoch or once a batch, whatever their
numbers count::

    criterion = fm.ArcFaceLoss(num_classes=5994, embedding_size=256, margin=0.2, scale=32.0)
    schedule = fm.schedules.Exponential(criterion, 0.0, 0.2, first_step=20, last_step=40)
    for epoch in range(150):
        train(...)
        schedule.step()

=====================================  ===========================================================
what people train with                 schedule, stepped once an epoch
=====================================  ===========================================================
WeSpeaker, epochs 20 to 40             ``Exponential(criterion, 0.0, 0.2, 19, 39)``
3D-Speaker, epochs 20 to 50            ``Exponential(criterion, 0.0, 0.3, 19, 49)``
Hyperion, ``margin_warmup_epochs=20``  ``Linear(criterion, 0.0, 0.3, 0, 20)``
=====================================  ===========================================================

(The first two count epochs from 1.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_margin import _validate_schedules

__all__ = ["Exponential", "Linear", "Schedule"]


class Schedule:
    """Moves a setting from one value to another; a subclass says along which curve.

    The first value is set at once, and up to ``first_step``; the last from ``last_step`` on.

    Args:
        criterion: a loss of this package, or what contains one: a model, what
            `DistributedDataParallel` or `torch.compile` made of it.
        initial: the value until ``first_step``, in the setting's unit. A margin may be a tensor,
            (C,), one for each class.
        final: the value from ``last_step`` on.
        first_step: the step from which on the setting moves, >= 0.
        last_step: the step at which it arrives, >= first_step.
        setting: which of ``criterion.settings``; a number, and no Parameter. Of `compat`'s losses
            which of their attributes, in its unit there: ``margin`` of ``compat.pml.ArcFaceLoss``,
            radians, or ``m2`` of insightface's ``CombinedMarginLoss`` in a ``PartialFC_V2``.

    Attributes:
        last_value: the value that was set last.

    Raises:
        ValueError: no loss in ``criterion`` has such a setting, or several have.
    """

    def __init__(
        self,
        criterion: nn.Module,
        initial: float | torch.Tensor,
        final: float | torch.Tensor,
        first_step: int,
        last_step: int,
        *,
        setting: str = "margin",
    ) -> None:
        self.criterion: Any = _validate_schedules.criterion(criterion, setting)
        self.setting = setting
        self.initial, self.final = initial, final
        for value in (initial, final):
            _validate_schedules.end(setting, value)
        self.first_step, self.last_step = _validate_schedules.steps(first_step, last_step)
        self.steps = 0
        for value in (final, initial, self.value(0)):  # so that either is refused now
            self._set(value)

    def fraction(self, progress: float) -> float:
        """Which part of the way is gone, of ``progress`` in (0, 1) through its steps."""
        raise NotImplementedError

    def value(self, step: int) -> float | torch.Tensor:
        """The value at a step, counted from 0."""
        if step >= self.last_step:
            return self.final
        if step <= self.first_step:
            return self.initial
        progress = (step - self.first_step) / (self.last_step - self.first_step)
        return self.initial + (self.final - self.initial) * self.fraction(progress)

    def step(self) -> None:
        """Count a step, an epoch or a batch, and set the value."""
        self.steps += 1
        self._set(self.value(self.steps))

    def _set(self, value: float | torch.Tensor) -> None:
        setattr(self.criterion, self.setting, value)
        self.last_value = value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the criterion's, whose state has no settings."""
        names = ("setting", "initial", "final", "first_step", "last_step", "steps")
        return {"kind": type(self).__name__} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, and set its value.

        Raises:
            ValueError: it is of another setting or kind of schedule, or lacks an entry.
        """
        _validate_schedules.state(state, self.state_dict())
        self.initial, self.final = state["initial"], state["final"]
        self.first_step, self.last_step = _validate_schedules.steps(
            state["first_step"], state["last_step"]
        )
        self.steps = state["steps"]
        self._set(self.value(self.steps))

    def __repr__(self) -> str:
        arguments = (self.initial, self.final, self.first_step, self.last_step)
        return f"{type(self).__name__}{(*arguments, self.setting)}"


class Linear(Schedule):
    """In equal steps; see `Schedule` for the arguments."""

    def fraction(self, progress: float) -> float:
        """As much of the value as of the steps."""
        return progress


class Exponential(Schedule):
    r"""Fast, then ever slower: :math:`1 - 10^{-3 p}` of the way at a part p of the steps.

    That is WeSpeaker's and 3D-Speaker's exponential increase; the last thousandth is taken at once
    at ``last_step``. See `Schedule` for the arguments.
    """

    def fraction(self, progress: float) -> float:
        """1 - 0.001^p."""
        return 1.0 - 1e-3**progress
