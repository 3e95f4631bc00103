"""Warnings that name the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("fused_margin", "torch")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest caller outside of this package and of torch, however deep it is called.

    ``skip_file_prefixes`` of `warnings.warn` does it from Python 3.12.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame.f_globals) in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(variables: dict[str, object]) -> str:
    return str(variables.get("__name__", "")).partition(".")[0]
