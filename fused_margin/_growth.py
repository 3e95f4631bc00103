"""New classes for a loss in training: rows of its weight, of the optimiser's state, of settings.

Parameters keep their identity (`torch.utils.swap_tensors`), so that optimisers, schedulers and
whoever else holds them go on. Everything that may be refused is refused before anything changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_margin import (
    _setup,
    _states,
    _validate,
    _validate_growth,
    _validate_setup,
    _validate_shards,
)
from fused_margin._numerics import sum_dtype
from fused_margin.distributed import _shards, _sweep
from fused_margin.distributed._shards import ClassShard

Tensor = torch.Tensor
Optimizers = list[torch.optim.Optimizer]
Names = frozenset[tuple[int, str]]  # of what the optimiser of a number keeps


class Asked(NamedTuple):
    """What `MarginSoftmaxLoss.grow` is asked, as it was given.

    Attributes:
        draws_normal: whether the loss draws its weight from normal(0, 1/D).
    """

    num_new: int
    optimizer: Any
    weight: Tensor | None
    of_new_classes: Mapping[str, Any]
    draws_normal: bool


class _Sizes(NamedTuple):
    """Of classes, each of which has ``sub_centers`` rows of the weight."""

    old: int
    added: int
    sub_centers: int

    def of(self, tensor: Tensor) -> tuple[int, int]:
        """Rows of a tensor with one or K for each class: how many there are, how many come."""
        rows = tensor.shape[0]
        return rows, self.added * rows // self.old


class _Report(NamedTuple):
    """What one rank of the shards tells the others: what it is asked, or why it can't.

    Attributes:
        norms: of its rows of the weight: the sum of the norms' logarithms, and of how many.
        sparse: what optimisers keep of the weight as sparse tensors; not so where no row is.
    """

    asked: Any
    norms: tuple[float, int]
    sparse: Names
    seed: int
    error: str


class _Plan(NamedTuple):
    """What changes beside the weight: parameters, and what is assigned, by name."""

    sizes: _Sizes
    optimizers: Optimizers
    parameters: dict[str, tuple[nn.Parameter, Tensor]]
    assigned: dict[str, Tensor]
    norms: tuple[float, int]
    sparse: Names
    asked: Any


@torch.no_grad()
def grow(criterion: Any, given: Asked) -> range:
    """See `MarginSoftmaxLoss.grow`."""
    present: Any = criterion.weight
    shard = ClassShard.of(present) if _validate.is_class_sharded(present) else None
    seed = int(torch.randint(1 << 62, ()))
    plan = error = None
    try:
        plan = _planned(criterion, given)
    except (TypeError, ValueError) as found:
        error = found
    if plan is None:
        reports = [_Report(None, (0.0, 0), frozenset(), seed, str(error))]
    else:
        reports = [_Report(plan.asked, plan.norms, plan.sparse, seed, "")]
    if shard is not None:
        reports, mine = shard.told(reports[0])
        if error is None:
            _validate_growth.agreed(reports, mine)
    if plan is None:
        assert error is not None
        raise error
    norm = _usual_norm([report.norms for report in reports])
    statistics = _at_their_start(criterion)
    sizes, optimizers = plan.sizes, plan.optimizers
    rows = _grown_rows(present, sizes, given.weight, norm, reports[0].seed)
    sparse = frozenset[tuple[int, str]]().union(*(report.sparse for report in reports))
    _exchange(present, rows, sizes.of(present)[1], optimizers, sparse)
    del rows
    for parameter, values in plan.parameters.values():
        _exchange(parameter, torch.cat([parameter, values]), values.shape[0], optimizers)
    for name, value in plan.assigned.items():
        owner, _, leaf = name.rpartition(".")
        setattr(criterion.get_submodule(owner), leaf, value)
    for name in statistics:
        getattr(criterion, name).fill_(criterion.initial_statistics()[name])
    return range(sizes.old, sizes.old + sizes.added)


def _planned(criterion: Any, given: Asked) -> _Plan:
    """Check everything, and make what is small."""
    kind, present = type(criterion).__name__, criterion.weight
    num_new = _validate.size("num_new", given.num_new, 1)
    sizes = _Sizes(criterion.num_classes, num_new, criterion.sub_centers)
    optimizers = _validate_setup.optimizers(given.optimizer)
    _validate_growth.not_wrapped(kind, _setup.wrapper_of(present))
    _validate_growth.parameter("weight", present)
    _validate_growth.held(kind, optimizers, present)
    if _validate.is_class_sharded(present):
        rows, ranks = sum(sizes.of(present)), ClassShard.of(present).ranks
        _validate_shards.whole_classes(rows, ranks, sizes.sub_centers)
    size = (sizes.added * sizes.sub_centers, criterion.embedding_size)
    if given.weight is not None:
        _validate_growth.rows(given.weight, size)
    elif not given.draws_normal:
        _validate_growth.own_draw(kind, size)
    found = _per_class(criterion)
    counts = {name: sizes.of(tensor)[1] for name, tensor in found.items()}
    _validate_growth.names(kind, given.of_new_classes, found, counts)
    parameters, assigned = {}, {}
    for name, value in given.of_new_classes.items():
        if value is None:
            continue
        before = found[name]
        values = _validate_growth.values(name, value, before, counts[name])
        if isinstance(before, nn.Parameter):
            _validate_growth.parameter(name, before)
            parameters[name] = before, values
        else:
            whole = torch.cat([before, values])
            assigned[name] = criterion.settings.get(name, lambda value: value)(whole)
    for parameter in (present, *(each for each, _ in parameters.values())):
        _validate_growth.given_all(_left_out(optimizers, parameter), num_new)
    states = [
        [(name, tuple(value.shape)) for name, value in _rows_of_state(one, parameter)]
        for one in optimizers
        for parameter in (present, *(each for each, _ in parameters.values()))
    ]
    made = {name: new for name, (_, new) in parameters.items()}
    tensors = {"weight": given.weight, **assigned, **made}
    sums = {name: _setup._checksum(tensor) for name, tensor in tensors.items()}
    norms = _log_norms(_validate.local(present))
    sparse = frozenset(
        (number, name)
        for number, one in enumerate(optimizers)
        for name, value in _rows_of_state(one, present)
        if _validate.layout(value) is not torch.strided
    )
    asked = sizes.added, sums, states
    return _Plan(sizes, optimizers, parameters, assigned, norms, sparse, asked)


def _log_norms(rows: Tensor) -> tuple[float, int]:
    """The sum of the logarithms of the norms of rows (R, D), and of how many: not those of 0."""
    total, count = 0.0, 0
    for some in rows.split(_shards.DRAWN_TOGETHER):
        largest = some.abs().amax(dim=1)
        _validate_growth.weights_so_far(largest)
        there = some[largest > 0]
        total += float(sum(one.log().sum() for one in _norms(there)))
        count += there.shape[0]
    return total, count


def _norms(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of rows (R, D) that aren't 0, as two factors (R, 1) without overflow."""
    rows = rows.to(sum_dtype(rows))
    largest = rows.abs().amax(dim=1, keepdim=True)
    return largest, torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True)


def _usual_norm(told: list[tuple[float, int]]) -> float:
    """The geometric mean of all norms, of what ranks have told.

    Gradients go as 1 / norm, so that it is the logarithms that count. Rounded to 24 bits, which are
    the same in whatever order ranks have added.
    """
    sums, counts = zip(*told, strict=True)
    _validate_growth.some_norm(sum(counts))
    mantissa, exponent = math.frexp(math.exp(math.fsum(sums) / sum(counts)))
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _left_out(optimizers: Optimizers, parameter: Any) -> list[str]:
    """Kinds of the optimisers that aren't given, and keep something of a parameter's rows."""

    def search() -> list[str]:
        return [
            type(one).__name__
            for one, _ in _setup.holders(parameter)
            if not any(one.state is given.state for given in optimizers)  # or it wraps a given one
            and _rows_of_state(one, parameter)
        ]

    return _setup.without_garbage(search)


def _per_class(criterion: Any) -> dict[str, Tensor]:
    """Its tensors beside the weight with a row for each class, or for each row of the weight."""
    counts = (criterion.num_classes, criterion.weight.shape[0])
    named = dict(criterion.named_buffers(remove_duplicate=False))
    named |= dict(criterion.named_parameters(remove_duplicate=False))
    named |= {name: one for name, one in vars(criterion).items() if isinstance(one, Tensor)}
    return {
        name: tensor
        for name, tensor in named.items()
        if name != "weight" and tensor.ndim and tensor.shape[0] in counts
    }


def _rows_of_state(optimizer: torch.optim.Optimizer, parameter: Any) -> list[tuple[str, Tensor]]:
    """What an optimiser keeps of each row of a parameter, by name."""
    is_sharded = _validate.is_dtensor(parameter)
    here = _validate.local(parameter).shape[0]
    found = []
    for name, value in sorted(optimizer.state.get(parameter, {}).items()):
        if not isinstance(value, torch.Tensor):
            is_fixed = isinstance(value, (bool, int, float, str, type(None)))
        elif _validate.is_dtensor(value) and is_sharded:
            like: Any = value
            has_rows = value.shape[:1] == parameter.shape[:1]
            if has_rows and like.placements == parameter.placements:
                found.append((name, value))
                continue
            is_fixed = not has_rows and _is_of_all_rows(value)
        else:
            if value.shape[:1] == (here,):
                found.append((name, value))
                continue
            is_fixed = _is_of_all_rows(value)
        if not is_fixed:
            _validate_growth.state(name, value)
    return found


def _is_of_all_rows(value: Tensor) -> bool:
    """Whether a state has one number, or one for each column, as Adafactor's."""
    return value.numel() == 1 or value.shape[0] == 1


def _at_their_start(criterion: Any) -> list[str]:
    """Statistics that no batch has changed yet: AdaCos's scale then follows the classes."""
    return [
        name
        for name, value in criterion.initial_statistics().items()
        if bool(getattr(criterion, name).float() == torch.tensor(value, dtype=torch.float32))
    ]


def _grown_rows(
    parameter: Any, sizes: _Sizes, given: Tensor | None, norm: float, seed: int
) -> Tensor:
    """This rank's weights, new ones of this norm, given or drawn, alike on any number of ranks."""
    old, added = sizes.of(parameter)
    local, first = _shards.grown(parameter, parameter, old, added)
    rows, skipped = local[max(0, old - first) :], max(0, first - old)
    if given is None:
        block = _shards.drawing(rows, local.shape[1] ** -0.5, seed)
    else:
        block = _blocks_of(given)
    _shards.fill_rows(rows, skipped, lambda number: _of_norm(block(number), norm))
    return local


def _blocks_of(given: Tensor) -> Callable[[int], Tensor]:
    blocks = given.split(_shards.DRAWN_TOGETHER)
    return lambda number: blocks[number]


def _of_norm(rows: Tensor, norm: float) -> Tensor:
    """Rows (R, D) in their directions, with another norm."""
    largest, rest = _norms(rows)
    return rows / largest * (norm / rest)


def _exchange(
    parameter: Any, local: Tensor, added: int, optimizers: Optimizers, sparse: Names = frozenset()
) -> None:
    """Give a parameter other contents, and more rows to what optimisers keep of it."""
    names = [[name for name, _ in _rows_of_state(one, parameter)] for one in optimizers]
    old = parameter.shape[0]
    new: Any = nn.Parameter(_shards.like(parameter, local, old + added), parameter.requires_grad)
    vars(new).update(vars(parameter))  # what others have set
    torch.utils.swap_tensors(parameter, new)
    del new, local
    for number, optimizer in enumerate(optimizers):
        for name in names[number]:  # one after the other, so that one is there twice at a time
            state: Any = optimizer.state[parameter]  # which makes one where there is none
            value = _states.dense(state.pop(name))
            more, first = _shards.grown(value, parameter, old, added)
            more[max(0, old - first) :] = _states.first_value(optimizer, parameter, name)
            # of torch's SGD with sampled classes; the gradient of no row is dense
            if (number, name) in sparse and more.shape[0]:
                state[name] = _sweep.like_grad(more.to_sparse(1), parameter)
            else:
                state[name] = _shards.like(value, more, old + added)
            del value, more
