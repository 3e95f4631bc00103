r"""Sampled negatives: a step over the classes of the batch and a random part of the others.

`sample_negatives` gives a loss a sampler. While it trains, the softmax of each step then runs over
the positives, the classes of the whole batch (of all ranks), and a random subset of the others, so
that a step costs the rate of a full one. The gradient of the class weights is sparse: it has the
rows that were taken, which `fused_margin.optim.RowSparseSGD` and `RowSparseAdam` update alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fused_margin import _setup, _validate, _validate_shards
from fused_margin._arguments import rows_of
from fused_margin._numerics import mixed
from fused_margin.distributed import ClassShard

__all__ = ["NegativeSampler", "sample_negatives"]

Tensor = torch.Tensor
Criterion = TypeVar("Criterion", bound=nn.Module)

NOT_TAKEN = -1  # label of a row whose class isn't here


class NegativeSampler(nn.Module):
    r"""Which classes take part in a step.

    Of C classes (of a shard: its own) those with a row in the batch, and a random subset of the
    others that fills up to C times the rate, rounded down; none if there are as many positives. A
    rate of 0 is the positives alone (or one class, where a shard has none); at 1 nothing is
    sampled. Subsets depend on the seed, the step and the shard alone: the buffer ``step``, part of
    ``state_dict()``, counts the training forwards, so that a run that is resumed, on as many ranks,
    goes on with the same ones. A checkpoint of a criterion without sampler loads and leaves the
    step as it is, and one with loads into a criterion without. As part of what activation
    checkpointing runs twice the second forward would take other classes, and raises. A function
    that `torch.compile` compiles has a graph break at a sampled loss, which runs as it is;
    ``fullgraph=True`` refuses it. On a GPU a step synchronises, to know how many classes it has.

    Args:
        rate: of the classes, in [0, 1]; may be assigned between any two steps, so that the last
            epochs train with all classes: ``criterion.sampler.rate = 1.0``. The gradient of the
            class weights is dense then, which `torch.optim.SparseAdam` doesn't take, nor
            `torch.optim.SGD` whose momentum comes from sampled steps: the first such forward
            raises, with the remedy.
        seed: of the subsets, >= 0.
    """

    step: Tensor

    def __init__(self, rate: float, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.rate = rate

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, but the rate and the seed are checked."""
        if name == "rate":
            value = _validate.between("rate", value, 0.0, 1.0)
        if name == "seed":
            value = _validate.size("seed", value, 0)
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As for any module, but a checkpoint of a criterion without sampler leaves the step."""
        state_dict.setdefault(f"{prefix}step", self.step)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def reset_parameters(self) -> None:
        """Begin with the first step again."""
        self.step.zero_()

    def begin(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """`choose` of the next step; None if all classes take part."""
        if self.rate >= 1.0:
            self.step += 1
            return None
        step = int(self.step)
        self.step += 1
        return functools.partial(self.choose, step=step)

    def choose(
        self, labels: Tensor, num_classes: int, first: int = 0, *, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The classes that take part, and labels as places among them.

        Args:
            labels: (N,) int64, less ``first``; outside [0, C) for no target.
            num_classes: C, of the classes from ``first`` on.
            first: the first class of a shard.
            step: number of the step.

        Returns:
            (k,) int64, ascending, and (N,), -1 for no target.
        """
        index = self.draw(labels, num_classes, first, step)
        is_inside = (labels >= 0) & (labels < num_classes)
        place = torch.searchsorted(index, labels.clamp(0, num_classes - 1))
        return index, place.masked_fill(~is_inside, NOT_TAKEN)

    @torch.no_grad()
    def draw(self, labels: Tensor, num_classes: int, first: int, step: int) -> Tensor:
        """Classes that take part, (k,) int64 in ascending order; at least one."""
        positives = labels[(labels >= 0) & (labels < num_classes)].unique()
        count = max(int(self.rate * num_classes), positives.shape[0], 1)
        generator = torch.Generator(labels.device)
        generator.manual_seed(mixed(self.seed, step, first))
        taken = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
        taken[positives] = True
        missing = count - positives.shape[0]
        if missing:
            # of a permutation of all, as many as suffice whichever of them are positives
            order = torch.randperm(num_classes, generator=generator, device=labels.device)
            others = order[:count]
            taken[others[~taken[others]][:missing]] = True
        return taken.nonzero()[:, 0]

    def extra_repr(self) -> str:
        """Rate and seed."""
        return f"rate={self.rate:g}, seed={self.seed}"


def taken_rows(weight: Tensor, index: Tensor) -> Tensor:
    """A copy of rows (k, D) of a matrix, whose gradient is sparse."""
    return _TakenRows.apply(weight, index)


class _TakenRows(torch.autograd.Function):
    """Rows of a matrix, whose gradient is sparse."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return weight.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (index,) = ctx.saved_tensors
        return rows_of(grad_outputs[0], index, ctx.shape), None


def sample_negatives(criterion: Criterion, rate: float = 0.1, seed: int = 0) -> Criterion:
    """Give a loss a `NegativeSampler`, before or after `shard_classes`, in place.

    In training mode its softmax then runs over a part of the classes, which makes the loss smaller
    than the full one: it is not corrected for. AdaCos adapts its scale by all classes still, in a
    sweep over all of them. Of shards the backward itself adds to ``weight.grad``:
    `torch.autograd.grad` doesn't return that gradient, and hooks of the weight aren't given it.

    Args:
        criterion: a loss of this package, or a subclass of `MarginSoftmaxLoss`.
        rate: see `NegativeSampler`.
        seed: see `NegativeSampler`.

    Returns:
        The criterion, with ``criterion.sampler``.

    Raises:
        TypeError: it is no loss of this package.
        ValueError: the rate is below 1, and the loss has sub-centres or smooths labels, is in DDP
            or FSDP2, or is sharded over a mesh that holds copies.
    """
    _validate_shards.sampled(criterion)
    sampled: Any = criterion
    sampler = NegativeSampler(rate, seed)
    if sampler.rate < 1.0:
        _validate_shards.asked_of_a_sample(
            sampled.sub_centers, bool(sampled.label_smoothing), has_stats=False
        )
        if _validate.is_class_sharded(sampled.weight):
            _validate_shards.no_copies(ClassShard.of(sampled.weight).replicas)
        wrapper = _setup.wrapper_of(sampled.weight)
        if wrapper is not None:
            _validate_shards.sampled_in(wrapper)
    sampled.sampler = sampler
    return criterion
