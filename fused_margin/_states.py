"""States of optimisers of class weights, which torch's own take, and the other way round.

What torch's can do and ours can't is refused by name, where a state or a group asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim import Optimizer

from fused_margin import _validate, _validate_states
from fused_margin.distributed import _shards

Tensor = torch.Tensor


class Family(NamedTuple):
    """Optimisers that keep the same of a parameter.

    Attributes:
        members: torch's and ours, for messages.
        mark: a setting which the groups of all of them have.
        kept: what they may keep of a parameter.
        lacking: torch's settings that ours don't know, with what they are then, and the setting
            without which they do nothing.
    """

    members: str
    mark: str
    kept: frozenset[str]
    lacking: Mapping[str, tuple[float, str | None]]

    def set_in(self, group: Mapping[str, Any]) -> list[str]:
        """Of what ours lack, what a group of parameters asks for."""
        return [
            f"{name}={group[name]}"
            for name, (_, needed) in self.lacking.items()
            if group.get(name) and (needed is None or group.get(needed))
        ]

    def neutral(self) -> dict[str, float]:
        """Of what ours lack, what does nothing."""
        return {name: value for name, (value, _) in self.lacking.items()}


SGD = Family(
    "torch.optim.SGD, RowSparseSGD and SGDInBackward",
    "momentum",
    frozenset({"momentum_buffer", "step"}),
    {
        "dampening": (0.0, "momentum"),
        "nesterov": (False, "momentum"),
        "maximize": (False, None),
        "differentiable": (False, None),
    },
)
ADAM = Family(
    "torch.optim.Adam, AdamW, SparseAdam and RowSparseAdam",
    "betas",
    frozenset({"step", "exp_avg", "exp_avg_sq", "updates", "behind"}),
    {
        "amsgrad": (False, None),
        "maximize": (False, None),
        "differentiable": (False, None),
        "decoupled_weight_decay": (False, "weight_decay"),
    },
)


class Portable(Optimizer):
    """An optimiser whose states those of a family take."""

    family: ClassVar[Family]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; what torch's alone can do is refused."""
        asked = self.family.set_in({**self.defaults, **param_group})
        _validate_states.lacking(type(self).__name__, asked)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; torch's optimiser of this kind takes it too."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group.update({**self.family.neutral(), **group})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, of torch's optimisers of this kind too.

        Raises:
            ValueError: the state is of another kind of optimiser or of other sizes, or has settings
                that this one doesn't know.
        """
        super().load_state_dict(_fitted(self, state_dict))


class LikeSGD(Portable):
    """An optimiser whose states `torch.optim.SGD` takes."""

    family = SGD


class LikeAdam(Portable):
    """An optimiser whose states `torch.optim.Adam` takes."""

    family = ADAM


def kept(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Each parameter of which a state has something, its key there, and that."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    for group, saved in groups:
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            if key in state_dict["state"]:
                yield parameter, key, state_dict["state"][key]


def _fitted(optimizer: Portable, given: dict[str, Any]) -> dict[str, Any]:
    """A state as this optimiser has its own; sizes of groups that differ are left to torch."""
    kind, family = type(optimizer).__name__, optimizer.family
    groups, saved = optimizer.param_groups, given["param_groups"]
    if [len(one["params"]) for one in groups] != [len(one["params"]) for one in saved]:
        return given
    for one in saved:
        _validate_states.family(kind, family.members, family.mark in one, [])
        _validate_states.lacking(kind, family.set_in(one))
    states = dict(given["state"])
    for parameter, key, values in kept(optimizer, given):
        unknown = sorted(values.keys() - family.kept)
        _validate_states.family(kind, family.members, not unknown, unknown)
        there = {name: value for name, value in values.items() if value is not None}
        for name, value in there.items():
            _validate_states.fits(kind, name, value, parameter)
        states[key] = {
            name: dense(value) if isinstance(value, Tensor) else value
            for name, value in there.items()
        }
    own = [{name: one[name] for name in optimizer.defaults} for one in groups]
    merged = [{**a, **b, **family.neutral()} for a, b in zip(own, saved, strict=True)]
    return {**given, "state": states, "param_groups": merged}


def dense(value: Any) -> Any:
    """A tensor, or a DTensor whose part here is sparse, as torch's SGD keeps of sampled classes."""
    if _validate.layout(value) is torch.strided:
        return value
    if _validate.is_dtensor(value):
        return _shards.like(value, value._local_tensor.to_dense(), value.shape[0])
    return value.to_dense()


def first_value(optimizer: Optimizer, parameter: Any, name: str) -> float:
    """What an optimiser's state of a row, ``name``, is before the first update: 0 but for a few."""
    setting = _BEGINS_WITH.get((type(optimizer).__name__, name))
    if setting is None:
        return 0.0
    groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return float(groups[0].get(setting, 0.0)) if groups else 0.0


# The settings of torch's optimisers that some of their state begins with.
_BEGINS_WITH = {("Adagrad", "sum"): "initial_accumulator_value", ("Rprop", "step_size"): "lr"}
