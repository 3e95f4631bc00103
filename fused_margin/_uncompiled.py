"""What compiled functions call outside of their graphs; to import this imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="a loss over sampled classes, whose number varies, or over classes that are split over"
    " ranks, which wait for each other, runs outside of graphs: compile the model, and call the"
    " criterion on what it returns, or do without fullgraph=True"
)
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside of the graph."""
    return function(*args, **kwargs)
