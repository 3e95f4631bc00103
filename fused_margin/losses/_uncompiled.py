"""What compiled functions call outside of their graphs; to import this imports Dynamo."""

from __future__ import annotations

from typing import Any

import torch


@torch.compiler.disable(
    reason="sampled classes are drawn outside of a graph, and are as many as a batch makes them:"
    " compile the model, and call the criterion on what it returns, or do without fullgraph=True"
)
def sampled_loss(criterion: Any, *given: Any) -> Any:
    """The loss of a criterion in a step over some of its classes."""
    return criterion._sampled_loss(*given)
