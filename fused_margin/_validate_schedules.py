"""Every ValueError and TypeError about a schedule, with the remedy in the message."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fused_margin import _names, _validate


def criterion(value: Any, setting: str) -> nn.Module:
    """The one module in ``value`` that has the setting."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"criterion must be a loss of fused_margin, got {type(value).__name__}")
    found = [(one, settings) for one in value.modules() if (settings := _settings(one))]
    able = [module for module, settings in found if setting in settings]
    if len(able) == 1:
        return able[0]
    names = ", ".join(type(module).__name__ for module in able or [one for one, _ in found])
    if able:
        problem = f"{len(able)} losses have the setting {setting!r}: {names}; give each a schedule"
    elif found:
        every = [name for _, settings in found for name in settings]
        meant = _names.of_attribute(setting, every, {})
        problem = f"{names} has no setting {setting!r}, but {', '.join(every)}" + (
            f"; {setting!r} {meant}" if meant else ""
        )
    else:
        problem = f"this {type(value).__name__} contains no loss of fused_margin"
    raise ValueError(problem)


def _settings(module: nn.Module) -> list[str]:
    """What a schedule may move: a loss's settings, or the numbers of one as another package has it.

    These are attributes of `compat`'s modules, in the units that they have there.
    """
    kind = type(module)
    settings = getattr(kind, "settings", None)
    if isinstance(settings, dict):
        return list(settings)
    if not any(base.__module__.startswith("fused_margin.compat.") for base in kind.__mro__):
        return []
    numbers = [name for name, number in vars(module).items() if type(number) in (int, float)]
    return [name for name in numbers if name not in _FIXED]


def end(setting: str, value: Any) -> None:
    """Check a value between which and another one a setting moves, in any steps."""
    if setting in _INTEGERS:
        raise ValueError(
            f"{setting} is an integer, and can't move from one number to another in any steps;"
            f" assign it when it is to change, criterion.{setting} = ..."
        )
    if isinstance(value, torch.Tensor):
        _validate.floating_numbers(setting, value)
        return  # the loss looks at the numbers
    if not -math.inf < _validate._real(setting, value, "a number or a tensor") < math.inf:
        raise ValueError(f"{setting} must be finite, got {value}")


_INTEGERS = ("ignore_index", "memory_budget", "k_top")

# numbers of a module that are no settings
_FIXED = ("num_classes", "embedding_size", "sub_centers", "memory_budget")


def steps(first: Any, last: Any) -> tuple[int, int]:
    """Check the two steps between which a setting moves."""
    first, last = _validate.size("first_step", first, 0), _validate.size("last_step", last, 0)
    if last < first:
        raise ValueError(f"last_step must be >= first_step, got {last} and {first}")
    return first, last


def state(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check what `Schedule.state_dict` has made."""
    missing = [name for name in expected if name not in given]
    if missing:
        raise ValueError(f"the state of a schedule lacks {', '.join(missing)}; got {list(given)}")
    for name, words in (("kind", "a schedule called"), ("setting", "a schedule of")):
        if given[name] != expected[name]:
            raise ValueError(
                f"the state is of {words} {given[name]!r}, this one is of {expected[name]!r}"
            )
