"""The classes of other packages, with their names, arguments, units and state, on this package's.

- `fused_margin.compat.pml`: pytorch-metric-learning's losses and regularisers.
- `fused_margin.compat.insightface`: the margins and `PartialFC_V2` of insightface's arcface_torch.
- `fused_margin.compat.heads`: the layers of Kaggle, WeSpeaker and SpeechBrain, returning the loss.

None of these packages is imported. ``docs/migration.md`` has the lines to change in each.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_margin.compat import heads as heads
    from fused_margin.compat import insightface as insightface
    from fused_margin.compat import pml as pml

__all__ = ["heads", "insightface", "pml"]


def __getattr__(name: str) -> Any:
    """One of the modules above, imported where it is first asked for; of others where they are."""
    if name in __all__:
        return importlib.import_module(f"fused_margin.compat.{name}")
    places = importlib.import_module("fused_margin._places")
    raise AttributeError(
        f"module 'fused_margin.compat' has no attribute {name!r}{places.whereabouts(name)}"
    )
