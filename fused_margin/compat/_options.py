"""The keywords that the losses of `pml` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

Regularizer = Callable[[Tensor], Any]


class LossOptions(TypedDict, total=False):
    """What ``**options`` of a loss may be; classes there describe each."""

    weight_regularizer: Regularizer | None
    weight_reg_weight: float
    embedding_regularizer: Regularizer | None
    embedding_reg_weight: float
    reducer: Any
    weight_init_func: Callable[[Tensor], Any] | None
    distance: Any
    collect_stats: bool | None
    sub_centers: int
    backend: str
    memory_budget: int | None
