r"""Optimisers for class weights: for gradients of a few rows, and for none at all.

`RowSparseSGD` and `RowSparseAdam` are for the gradients that sampled negatives leave. A step costs
what the rows in the gradient cost, in time and in memory traffic, whatever the number of classes.
It is **lazy**: a row that is not in the gradient stays as it is, with all its state. Momentum
doesn't move it, moments don't decay, weight decay doesn't shrink it: time stands still for it until
it is sampled again. With gradients of all rows at each step, these are `torch.optim.SGD` and
`torch.optim.Adam`.

`SGDInBackward` updates the weights while the backward makes their gradient, which takes no memory
then.

``load_state_dict()`` takes states of `torch.optim.SGD` and `torch.optim.Adam` (`torch.optim.AdamW`
without weight decay, `torch.optim.SparseAdam`), and these take ours. Settings that ours lack, as
``nesterov``, are refused where they are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from fused_margin import _states, _validate, _validate_states, _validate_updates
from fused_margin._in_backward import SGDInBackward

__all__ = ["RowSparseAdam", "RowSparseSGD", "SGDInBackward"]

Tensor = torch.Tensor

# Of sampled rows that a CPU updates at a time: they and their states stay in its cache.
BLOCK_BYTES = 1 << 20


def _updates_in_cache(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Rows(NamedTuple):
    """A gradient: rows of a parameter, or all of it where ``chosen`` is None.

    Attributes:
        chosen: (k,) int64, each row once. values: (k, ...).
    """

    chosen: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, grad: Any) -> _Rows:
        grad = grad._local_tensor if _validate.is_dtensor(grad) else grad
        if grad.layout is not torch.sparse_coo:
            return cls(None, grad)
        index, values = grad._indices()[0], grad._values()
        if not bool((index[1:] > index[:-1]).all()):  # of several backwards
            grad = grad.coalesce()
            index, values = grad.indices()[0], grad.values()
        return cls(index, values)

    def blocks(self) -> Iterator[_Rows]:
        """These rows, in parts where that is quicker; none if there are no rows."""
        if self.chosen is None or not _updates_in_cache(self.values):
            yield self
            return
        count = self.chosen.shape[0]
        bytes_per_row = self.values[:1].nbytes
        size = max(1, BLOCK_BYTES // max(1, bytes_per_row))
        for start in range(0, count, size):
            part = slice(start, start + size)
            yield _Rows(self.chosen[part], self.values[part])

    def taken(self, tensor: Tensor) -> Tensor:
        """These rows of another tensor, as a copy; all of it is no copy."""
        return tensor if self.chosen is None else tensor.index_select(0, self.chosen)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write them back."""
        if self.chosen is not None:
            tensor.index_copy_(0, self.chosen, rows)

    def add(self, tensor: Tensor, rows: Tensor, factor: float) -> None:
        """Add rows times a factor to these rows of another tensor."""
        if self.chosen is None:
            tensor.add_(rows, alpha=factor)
        elif _updates_in_cache(tensor):  # index_add_ takes longer there
            self.put(tensor, self.taken(tensor).add_(rows, alpha=factor))
        else:
            tensor.index_add_(0, self.chosen, rows.to(tensor.dtype), alpha=factor)


class _RowSparse(_states.Portable):
    """What both share: each parameter with a gradient, its rows, its settings."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient.

        Args:
            closure: evaluates the loss again, and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, _Rows.of(parameter.grad), group)
        return loss

    def _update(self, parameter: Any, grad: _Rows, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _local(self, parameter: Any, name: str) -> Tensor:
        """This rank's part of what is kept of a parameter."""
        value = self.state[parameter][name]
        _validate_states.fits(type(self).__name__, name, value, parameter)
        return _validate.local(value)


def _decayed(w: Tensor, grad: _Rows, weight_decay: float) -> Tensor:
    return grad.values.add(grad.taken(w), alpha=weight_decay) if weight_decay else grad.values


class RowSparseSGD(_RowSparse, _states.LikeSGD):
    r"""SGD with momentum and weight decay on the rows that have a gradient.

    .. math:: g \leftarrow g + \lambda w, \qquad v \leftarrow \mu v + g, \qquad
        w \leftarrow w - \eta\, v

    for these rows; the others' w and v stay.

    Args:
        params: parameters or groups. Sparse gradients (COO, of the first dimension), dense ones and
            those of DTensors that are sharded on it.
        lr: eta >= 0.
        momentum: mu.
        weight_decay: lambda.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        settings = {
            "lr": _validate.between("lr", lr, 0.0, _validate.LARGEST_SCALE),
            "momentum": _validate.between("momentum", momentum, 0.0, 1.0),
            "weight_decay": _validate.between(
                "weight_decay", weight_decay, 0.0, _validate.LARGEST_SCALE
            ),
        }
        super().__init__(params, settings)

    def _update(self, parameter: Any, grad: _Rows, group: dict[str, Any]) -> None:
        w, velocity = _validate.local(parameter), None
        if group["momentum"]:
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = self._local(parameter, "momentum_buffer")
        for rows in grad.blocks():
            d = _decayed(w, rows, group["weight_decay"])
            if velocity is not None:
                d = rows.taken(velocity).mul_(group["momentum"]).add_(d)
                rows.put(velocity, d)
            rows.add(w, d, -group["lr"])


class RowSparseAdam(_RowSparse, _states.LikeAdam):
    r"""Adam on the rows that have a gradient.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
        w \leftarrow w - \eta\,
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with g + lambda w for g. t counts the updates of each row, not the steps (as `torch.optim.\
SparseAdam` does, whose first update of a late row is too long): a row behaves as if nothing but its
    own updates had ever been. Of a state of torch's, t is the number of steps.

    Args:
        params: see `RowSparseSGD`.
        lr: eta >= 0.
        betas: beta_1 and beta_2, in [0, 1).
        eps: epsilon.
        weight_decay: lambda, as in `torch.optim.Adam`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        largest = _validate.LARGEST_SCALE
        settings = {
            "lr": _validate.between("lr", lr, 0.0, largest),
            "betas": _validate_updates.betas(betas),
            "eps": _validate.between("eps", eps, 0.0, 1.0),
            "weight_decay": _validate.between("weight_decay", weight_decay, 0.0, largest),
        }
        super().__init__(params, settings)

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.optim.Adam`: ``step``, the moments, and how many steps a row is ``behind``.

        Which stays as it is where torch's optimiser goes on, with updates of all rows.
        """
        packed = super().state_dict()
        packed["state"] = {key: _counted(value) for key, value in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, and of torch's Adam, AdamW and SparseAdam.

        Raises:
            ValueError: the state is of another kind of optimiser or of other sizes, or has settings
                that this one doesn't know.
        """
        super().load_state_dict(state_dict)
        for parameter, _, values in _states.kept(self, state_dict):
            state = self.state[parameter]
            state.pop("behind", None)
            step = state["step"] = _step_of(values)
            # not as torch has loaded it, in the parameter's dtype, in which 256 + 1 may be 256
            updates = values.get("updates")
            if updates is None:
                updates = _zero_counts(parameter)
                updates += float(step)
                if "behind" in values:
                    updates -= values["behind"].to(updates.device, torch.float32)
            state["updates"] = updates.to(parameter.device, torch.float32, copy=True)

    def _update(self, parameter: Any, grad: _Rows, group: dict[str, Any]) -> None:
        state, w = self.state[parameter], _validate.local(parameter)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["updates"] = _zero_counts(parameter)
        first, second, updates = (
            self._local(parameter, name) for name in ("exp_avg", "exp_avg_sq", "updates")
        )
        state["step"] = _step_of(state) + 1.0
        beta_1, beta_2 = group["betas"]
        for rows in grad.blocks():
            d = _decayed(w, rows, group["weight_decay"])
            count = rows.taken(updates).add_(1.0)  # (k, 1)
            mean = rows.taken(first).lerp_(d, 1.0 - beta_1)
            square = rows.taken(second).mul_(beta_2).addcmul_(d, d, value=1.0 - beta_2)
            for whole, part in ((updates, count), (first, mean), (second, square)):
                rows.put(whole, part)
            count = count.double()
            length = (group["lr"] / (1.0 - beta_1**count)).to(w.dtype)
            root = (1.0 - beta_2**count).sqrt().to(w.dtype)
            step = mean * length / (square.sqrt().div_(root).add_(group["eps"]))
            rows.add(w, step, -1.0)


def _zero_counts(parameter: Tensor) -> Tensor:
    """A count for each row, (C, 1) of (C, D)."""
    narrow = parameter.detach()
    for dim in range(1, parameter.ndim):
        narrow = narrow.narrow(dim, 0, 1)
    return torch.zeros_like(narrow, dtype=torch.float32)


def _step_of(state: dict[str, Any]) -> Tensor:
    """How many steps a state has seen; where it doesn't say, those of its most frequent row."""
    step = state.get("step")
    if step is None:
        updates = _validate.local(state["updates"])
        step = updates.max() if updates.numel() else 0.0
    return torch.tensor(float(step), dtype=torch.float32, device="cpu")


def _counted(state: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a parameter, with rows' updates told from those of the parameter."""
    if "updates" not in state:
        return state
    others = {name: value for name, value in state.items() if name != "updates"}
    step = _step_of(state)
    return {**others, "step": step, "behind": float(step) - state["updates"]}
