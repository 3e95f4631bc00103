"""Every ValueError and TypeError about a schedule, with the remedy in the message."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_margin import _names, _validate


def criterion(value: Any, setting: str) -> nn.Module:
    """The one module in ``value`` that has the setting."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"criterion must be a loss of fused_margin, got {type(value).__name__}")
    found: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, settings)
        for module in value.modules()
        if isinstance(settings := getattr(type(module), "settings", None), dict)
    ]
    able = [module for module, settings in found if setting in settings]
    if len(able) == 1:
        return able[0]
    names = ", ".join(type(module).__name__ for module in able or [one for one, _ in found])
    if able:
        problem = f"{len(able)} losses have the setting {setting!r}: {names}; give each a schedule"
    elif found:
        meant = _names.of_attribute(setting, found[0][1], {})
        problem = f"{names} has no setting {setting!r}, but {', '.join(found[0][1])}" + (
            f"; {setting!r} {meant}" if meant else ""
        )
    else:
        problem = f"this {type(value).__name__} contains no loss of fused_margin"
    raise ValueError(problem)


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
