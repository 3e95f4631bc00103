"""SGD that updates class weights while the backward makes their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fused_margin import _setup, _states, _updates, _validate, _validate_updates
from fused_margin._arguments import Slopes, Update
from fused_margin._numerics import mixed

Tensor = torch.Tensor

# Numbers that a CPU rounds in one go: what it makes of them, 22 bytes each, stays in its cache.
_ROUNDED_AT_A_TIME = 1 << 16


class SGDInBackward(_states.LikeSGD):
    r"""SGD with momentum whose updates happen in the backward, a block of classes at a time.

    .. math:: g \leftarrow g + \lambda w, \qquad v \leftarrow \mu v + g, \qquad
        w \leftarrow w - \eta\, v

    as `torch.optim.SGD` has it (its bits too, for the same gradient), but the gradient of the class
    weights, C x D, never exists: each block of its rows is used up while it is in a buffer. A step
    looks as with any optimiser, and schedulers of the learning rate work:

    ```python
    of_model = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    of_classes = fm.optim.SGDInBackward([criterion.weight], lr=0.1, momentum=0.9)

    criterion(model(x), y).backward()  # has updated criterion.weight
    of_model.step()
    of_classes.step()  # notes that the step is over
    of_model.zero_grad()
    ```

    **Memory** of a step is less by a gradient, 4 C D bytes in fp32; what takes its place is a
    buffer of one block. Nor can the gradient's memory hold what the forward has found, so that the
    backward forms cosines again: 8 N C D flops a step where it was 6, less what ``memory_budget``
    keeps.

    **bf16 weights**, ``criterion.bfloat16()``, are rounded stochastically, up or down with the
    probabilities that make it right on average, where rounding to nearest would lose each update
    below 1/256 of a weight. So is the momentum, which has the weights' dtype. Sums are fp32. The
    random bits depend on ``seed`` and the number of the update (and, of shards, on the rank), both
    of which ``state_dict()`` goes on with. It is a state of `torch.optim.SGD` too, and of
    `RowSparseSGD`, and theirs are taken, but not those of Nesterov's momentum or dampening.

    **It can't be used** where a gradient has to be seen as a whole before it is applied:

    - accumulation: a second backward before ``step()`` or ``zero_grad()`` raises, before anything
      is changed;
    - two losses over the same weights, or one of `fused_margin.regularizers` beside the loss, in
      one backward: it raises, before anything is changed. Mixup goes in one call, of 2N rows. Of
      another function of the weights beside the loss the error comes, by nature, from the midst of
      the backward, from here or from PyTorch ("modified by an inplace operation"): load the last
      checkpoint;
    - hooks of ``criterion.weight``, which would be given no gradient: the backward raises;
    - clipping, other optimisers, or whatever reads ``criterion.weight.grad``: in its place is a
      tensor of which each use raises;
    - ``backend="reference"``, `torch.compile` of the loss, `torch.func`, sampled negatives, a
      regulariser alone: a gradient is made as a whole then, and ``step()`` raises. So it is of a
      criterion in eval mode, whose backward updates nothing;
    - data-parallel ranks that each hold all class weights, or copies of shards. Shards of one mesh
      dimension, `fused_margin.distributed.shard_classes`, are updated each by its rank.

    An error in the midst of a backward, as running out of memory, leaves some classes updated and
    some not: load the last checkpoint. `torch.autograd.grad` updates nothing. Of two made of the
    same weights the later one updates, and a step of the other raises.

    Args:
        params: class weights of losses of this package, fp32, fp64 or bf16, or groups of them. A
            learnt scale needs another optimiser.
        lr: eta, as it is when a backward comes to the weights.
        momentum: mu in [0, 1].
        weight_decay: lambda.
        seed: of stochastic rounding, >= 0.
        grad_scaler: the `torch.amp.GradScaler` by which losses are scaled, if they are. Gradients
            are divided by its scale, and a batch whose loss has a gradient that isn't finite
            updates nothing, as ``grad_scaler.step`` of other optimisers. Call this one's own
            ``step()``. It doesn't travel in copies and pickles; where one is in use that wasn't
            given, a backward or `check_setup` raises. A scaler's ``update()`` asks for a step of
            another optimiser: where class weights alone are trained, leave scaling out.

    Raises:
        TypeError: something else than class weights.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.0,
        weight_decay: float = 0.0, *, seed: int = 0, grad_scaler: Any = None,
    ) -> None:  # fmt: skip
        largest = _validate.LARGEST_SCALE
        settings = {
            "lr": _validate.between("lr", lr, 0.0, largest),
            "momentum": _validate.between("momentum", momentum, 0.0, 1.0),
            "weight_decay": _validate.between("weight_decay", weight_decay, 0.0, largest),
            "seed": _validate.size("seed", seed, 0),
        }
        self.grad_scaler = _validate_updates.grad_scaler(grad_scaler)
        _validate_updates.parameters(params)
        super().__init__(params, settings)
        self._begin_to_update()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or from a pickle, which a GradScaler doesn't travel in."""
        super().__setstate__(state)
        self.grad_scaler = None
        self._begin_to_update()

    def _begin_to_update(self) -> None:
        self._is_replaced, self._backwards = False, 0
        _updates.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`, of class weights."""
        super().add_param_group(param_group)
        for parameter in param_group["params"]:
            _validate_updates.parameter(parameter)
            if not parameter.is_meta:
                self._prepare(parameter, param_group)

    def _prepare(self, parameter: Any, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, which begins with zeros, where the parameter is."""
        state = self.state[parameter]
        if "step" not in state:  # nor is it in a state of torch's SGD
            state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
        velocity = state.get("momentum_buffer")
        if velocity is not None:
            state["momentum_buffer"] = velocity.to(parameter.device, parameter.dtype)
        elif group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(parameter.detach())
        return state

    def updated(self) -> Iterator[Tensor]:
        """The class weights, as the operators look for them."""
        for group in self.param_groups:
            yield from group["params"]

    def release(self) -> None:
        """Update no longer: gradients are made and kept again, for another optimiser."""
        _updates.remove(self)
        self._forget()

    def replace(self) -> None:
        """Update no longer, for another optimiser like this; a step raises from now on."""
        self.release()
        self._is_replaced = True

    def check_scaler(self) -> None:
        """Raise where losses are scaled by a GradScaler that wasn't given."""
        if self.grad_scaler is None:
            found = _setup.living([torch.amp.GradScaler])
            # one that has scaled a loss has made its scale
            used = [one for one in found if one.is_enabled() and one._scale is not None]
            _validate_updates.no_other_scaler(len(used))

    def _forget(self) -> None:
        """Take away what is in place of the gradients that were used up."""
        for parameter in self.updated():
            if isinstance(parameter.grad, _updates.Spent):
                parameter.grad = None

    @torch.no_grad()
    def begin(self, parameter: Tensor, slopes: Slopes) -> Update:
        """What updates the rows of one parameter in a backward that has come to it."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        _validate_updates.one_process(parameter, ranks)
        (group,) = (
            group for group in self.param_groups if any(p is parameter for p in group["params"])
        )
        self._backwards += 1
        if self._backwards & (self._backwards - 1) == 0:  # a search of all Python objects
            self.check_scaler()
        if self.grad_scaler is not None and not _are_finite(slopes):
            return _updates.nothing
        state = self._prepare(parameter, group)
        state["step"] += 1
        rank = dist.get_rank() if ranks > 1 else 0
        velocity = state.get("momentum_buffer") if group["momentum"] else None
        weights = _Weights(
            _validate.local(parameter),
            None if velocity is None else _validate.local(velocity),
            group["lr"], group["momentum"], group["weight_decay"],
            1.0 if self.grad_scaler is None else 1.0 / self.grad_scaler.get_scale(),
        )  # fmt: skip
        if parameter.dtype is torch.bfloat16:
            seed = mixed(group["seed"], int(state["step"]), rank)
            return _Rounding(weights, seed).update
        return weights.update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step whose backward has updated the weights.

        Args:
            closure: evaluates the loss, and its backward, and returns it.

        Raises:
            RuntimeError: the weights have a gradient as a whole, which nothing has applied, or
                another SGDInBackward was made of them.
        """
        _validate_updates.not_replaced(self._is_replaced)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._forget()
        for parameter in self.updated():
            grad = parameter.grad
            _validate_updates.nothing_left(None if grad is None else _validate.local(grad))
        return loss


def _are_finite(slopes: Slopes) -> bool:
    """Whether a loss's gradient is, of every row; synchronises with a GPU."""
    found = [slope.isfinite().all() for slope in slopes if slope is not None]
    return bool(torch.stack(found).all())


class _Weights(NamedTuple):
    """What an update of rows of W takes: (C, D) tensors, and numbers.

    Attributes:
        w: the weights. velocity: their momentum, if there is any.
        lr, momentum, weight_decay: as of `SGDInBackward`. factor: of the gradient.
    """

    w: Tensor
    velocity: Tensor | None
    lr: float
    momentum: float
    weight_decay: float
    factor: float

    @torch.no_grad()
    def update(self, start: int, grad: Tensor) -> None:
        """Of rows from ``start`` on, for their gradient (B, D), which is overwritten."""
        self.advance(*self.rows(start, len(grad)), grad)

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Rows of the weights and of their momentum, in the same memory."""
        here = slice(start, start + count)
        return self.w[here], None if self.velocity is None else self.velocity[here]

    def advance(self, w: Tensor, velocity: Tensor | None, grad: Tensor) -> None:
        """The update of w and its velocity, in place, all (B, D) of one dtype."""
        if self.factor != 1.0:
            grad.mul_(self.factor)
        if self.weight_decay:
            grad.add_(w, alpha=self.weight_decay)
        if velocity is not None:
            grad = velocity.mul_(self.momentum).add_(grad)
        w.add_(grad, alpha=-self.lr)


class _Rounding:
    """The same of bf16 weights and velocities, which are rounded stochastically."""

    def __init__(self, weights: _Weights, seed: int) -> None:
        self.weights = weights
        device = weights.w.device
        self.on_cpu = np.random.Generator(np.random.SFC64(seed))
        self.elsewhere = None if device.type == "cpu" else torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def update(self, start: int, grad: Tensor) -> None:
        """As `_Weights.update`, in fp32 until the end, of a few rows at a time."""
        at_a_time = max(1, _ROUNDED_AT_A_TIME // grad.shape[1]) if grad.is_cpu else len(grad)
        for piece in grad.split(at_a_time):
            self._update(start, piece)
            start += len(piece)

    def _update(self, start: int, grad: Tensor) -> None:
        low, low_velocity = self.weights.rows(start, len(grad))
        w = low.float()
        velocity = None if low_velocity is None else low_velocity.float()
        self.weights.advance(w, velocity, grad)
        low.copy_(self.rounded(w))
        if low_velocity is not None and velocity is not None:
            low_velocity.copy_(self.rounded(velocity))

    def rounded(self, values: Tensor) -> Tensor:
        """fp32 values as those of bf16 beside them, one or the other at random, in place.

        A number of 16 bits, all equally likely, is added to the bits that bf16 lacks: what carries
        is as likely as they are large. What isn't finite stays as it is.
        """
        bits = values.view(torch.int32)
        if self.elsewhere is None:
            drawn = self.on_cpu.integers(0, 1 << 16, values.shape, dtype=np.uint16)
            noise = torch.from_numpy(drawn.astype(np.int32))
        else:
            noise = torch.randint(
                1 << 16, values.shape, generator=self.elsewhere, dtype=torch.int32,
                device=values.device,
            )  # fmt: skip
        noise.masked_fill_(~values.isfinite(), 0)
        bits.add_(noise).bitwise_and_(-(1 << 16))
        return values
