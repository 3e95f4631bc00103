"""Files that insightface's arcface_torch writes for each rank, as one weight or as shards of it.

Of C classes rank r of R had C // R, and one more if r < C % R, one rank after the other. Files are
mapped and not read (unless they are of the format before torch 1.6), so that of those that overlap
a shard only its rows come into memory.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_margin import _validate
from fused_margin.compat import _refusals
from fused_margin.distributed._shards import ClassShard
from fused_margin.optim import RowSparseAdam, RowSparseSGD, SGDInBackward

Tensor = torch.Tensor
Checkpoint = str | os.PathLike[str] | Mapping[str, Any]
# How torch says that a readable file holds what weights_only=True refuses
_UNSAFE = re.compile(r"Unsupported (global|class)|GLOBAL|not an allowed global")
# What torch.load raises of bytes that are no checkpoint, or not all of one
_UNREADABLE = (
    pickle.UnpicklingError, struct.error, zipfile.BadZipFile, EOFError, OSError, RuntimeError,
    LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError,
    MemoryError,
)  # fmt: skip
# Names of files, by version from the newest, with the number of the rank
NAMES = (
    r"checkpoint_gpu_(\d+)\.pt",
    r"softmax_fc_gpu_(\d+)\.pt",
    r"rank_(\d+)_softmax_weight\.pt",
)
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class RankFiles(NamedTuple):
    """What was in the files beside the class weights.

    Attributes:
        ranks: how many files there are. epoch, global_step: None where they don't say.
        state: names of what went into the optimiser's state.
    """

    ranks: int
    epoch: int | None
    global_step: int | None
    state: tuple[str, ...]


class _Part(NamedTuple):
    """One file: rows [start, stop) of the whole, of which rows ``first`` to ``last`` are wanted."""

    name: str
    start: int
    first: int
    last: int
    weight: Tensor
    moments: dict[str, Any]
    epoch: Any
    global_step: Any

    @property
    def facts(self) -> tuple[Any, ...]:
        """What files of one run have in common: columns, epoch, steps, updates by Adam."""
        step = self.moments.get("step")
        return (
            self.weight.shape[1],
            self.epoch,
            self.global_step,
            None if step is None else float(step),
        )

    def rows(self, tensor: Tensor) -> Tensor:
        """Those wanted, of a tensor with a row for each of the file."""
        return tensor[self.first - self.start : self.last - self.start]


def loaded(checkpoint: Any, *, mapped: bool = False) -> Any:
    """What a file holds, loaded with ``weights_only=True``; anything else as it is."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        return checkpoint
    _refusals.file_there(checkpoint)
    try:
        mapped = mapped and zipfile.is_zipfile(checkpoint)
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:  # which names the file
        raise
    except _UNREADABLE as error:
        if "torch.distributed.tensor" in str(error):
            _refusals.sharded(checkpoint)
        if _UNSAFE.search(str(error)):
            _refusals.unsafe(checkpoint, error)
        _refusals.unreadable(checkpoint, error)


def ordered(files: Any) -> list[Any]:
    """The files by rank: those of a folder, or those given, in that order if no name has a rank."""
    if isinstance(files, (str, os.PathLike)):
        folder = Path(files)
        _refusals.rank_files_there(folder)
        given: list[Any] = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        given = [path for path in given if not folder.is_dir() or _numbered(path)]
        if not given:
            _refusals.no_rank_files(folder)
    elif isinstance(files, Iterable) and not isinstance(files, (Mapping, torch.Tensor)):
        given = list(files)
        if not given:
            _refusals.no_files()
    else:
        _refusals.rank_files(files)
    numbered = [_numbered(one) for one in given]
    if not any(numbered):
        return given
    kinds = {found[0] if found else None for found in numbered}
    if len(kinds) > 1:
        _refusals.mixed_rank_files([_name(one, index) for index, one in enumerate(given)])
    by_rank = [found[1] for found in numbered if found]
    missing = sorted(set(range(max(by_rank) + 1)) - set(by_rank))
    twice = sorted({rank for rank in by_rank if by_rank.count(rank) > 1})
    if missing or twice:
        _refusals.missing_ranks(sorted(set(by_rank)), missing, twice, str(given[0]))
    return [one for _, one in sorted(zip(by_rank, given, strict=True), key=lambda pair: pair[0])]


def _numbered(file: Any) -> tuple[str, int] | None:
    """The kind of name, and the rank in it."""
    if not isinstance(file, (str, os.PathLike)):
        return None
    for pattern in NAMES:
        found = re.fullmatch(pattern, Path(file).name)
        if found:
            return pattern, int(found[1])
    return None


def _name(file: Any, index: int) -> str:
    return str(file) if isinstance(file, (str, os.PathLike)) else f"number {index} of those given"


def cut(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """The classes of a rank, as insightface cuts them."""
    size, more = divmod(num_classes, ranks)
    start = rank * size + min(rank, more)
    return start, start + size + int(rank < more)


def parts(
    given: Sequence[Any], num_classes: int, bounds: tuple[int, int], wants_moments: bool = False
) -> list[_Part]:
    """Of `ordered` files those that overlap some classes, checked against each other."""
    found: list[_Part] = []
    for rank, file in enumerate(given):
        start, stop = cut(num_classes, rank, len(given))
        first, last = max(start, bounds[0]), min(stop, bounds[1])
        if first < last:
            name = _name(file, rank)
            part = _part(file, name, (start, stop), (first, last), wants_moments)
            rows = part.weight.shape[0]
            if rows != stop - start:
                more = ranks_of(num_classes, rank, rows, len(given))
                _refusals.other_rows(name, rows, stop - start, num_classes, len(given), more)
            found.append(part)
    for part in found:
        _refusals.same_run(found[0], part)
    return found


def ranks_of(num_classes: int, rank: int, rows: int, least: int) -> range:
    """How many ranks, more than ``least``, a run can have had in which this one had ``rows``.

    Rank r of R has (C - 1 - r) // R + 1 classes.
    """
    others = num_classes - 1 - rank
    if rows < 1 or others < 0:
        return range(0)
    highest = others // (rows - 1) if rows > 1 else num_classes
    return range(max(least, others // rows) + 1, highest + 1)


def _part(
    file: Any, name: str, whole: tuple[int, int], wanted: tuple[int, int], wants_moments: bool
) -> _Part:
    value = loaded(file, mapped=True)
    moments: dict[str, Any] = {}
    if isinstance(value, torch.Tensor):
        weight: Any = value
        beside = Path(name.replace("_softmax_weight", "_softmax_weight_mom"))
        if wants_moments and str(beside) != name and beside.is_file():
            moments["momentum_buffer"] = loaded(beside, mapped=True)
        value = {}
    else:
        _refusals.checkpoint(value, name)
        weights = value.get("state_dict_softmax_fc", value)
        weight = weights.get("weight") if isinstance(weights, Mapping) else None
        if wants_moments:
            moments = _moments(name, value.get("state_optimizer"))
    _refusals.rank_weight(name, weight)
    epoch, step = (_refusals.count(name, key, value.get(key)) for key in ("epoch", "global_step"))
    return _Part(name, whole[0], *wanted, weight, moments, epoch, step)


def _moments(name: str, optimizer: Any) -> dict[str, Any]:
    """What a saved optimiser kept of its last parameter, which the class weights are there."""
    if optimizer is None:
        return {}
    try:
        numbers = optimizer["param_groups"][-1]["params"] if optimizer["param_groups"] else []
        found = dict(optimizer["state"].get(numbers[-1], {})) if numbers else {}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        _refusals.rank_optimizer(name, error)
    if "step" in found:
        found["step"] = _refusals.count(name, "step", found["step"])
    return found


def merged(files: Any, num_classes: int) -> Tensor:
    """See `convert.merge_rank_files`."""
    num_classes = _validate.size("num_classes", num_classes, 2)
    found = parts(ordered(files), num_classes, (0, num_classes))
    whole = found[0].weight.new_empty(num_classes, found[0].weight.shape[1])
    for part in found:
        whole[part.first : part.last] = part.rows(part.weight)
    return whole


class _Facts(NamedTuple):
    """What all ranks have to find alike: how many files, and of which moment of a run."""

    ranks: int
    epoch: Any
    global_step: Any
    updates: Any


@torch.no_grad()
def load(
    parameter: Any, is_transposed: bool, files: Any, optimizer: torch.optim.Optimizer | None
) -> RankFiles:
    """See `convert.load_rank_files`.

    Args:
        parameter: weight (C, D), sharded or not; or W (D, C).
        is_transposed: whether it is W.
        files: see `ordered`.
        optimizer: one that holds the parameter, or None.
    """
    num_classes, dim = parameter.shape[::-1] if is_transposed else parameter.shape
    shard = ClassShard.of(parameter) if _validate.is_class_sharded(parameter) else None
    start, stop = (0, num_classes) if shard is None else (shard.start, shard.stop)
    found: list[_Part] = []
    facts = error = None
    wanted: tuple[str, ...] = ()
    try:
        wanted = _wanted(optimizer, parameter)
        given = ordered(files)
        found = parts(given, num_classes, (start, stop), bool(wanted))
        for part in found:
            _refusals.rank_columns(part.name, part.weight, dim)
            for name in wanted:
                _refusals.rank_moment(part.name, name, part.moments, part.weight)
        told = (part.facts[1:] for part in found[:1])
        facts = _Facts(len(given), *next(told, (None, None, None)))
    except Exception as raised:  # noqa: BLE001 - raised when the other ranks have been told
        error = raised
    if shard is not None:
        reports, mine = shard.told((facts, "" if error is None else str(error) or repr(error)))
        if error is None:
            facts = _refusals.same_rank_files(reports, mine)
    if facts is None:
        assert error is not None
        raise error

    def fill(whole: Any, of: Callable[[_Part], Tensor]) -> None:
        local = _validate.local(whole)
        rows = local.t() if is_transposed else local
        for part in found:
            rows[part.first - start : part.last - start] = part.rows(of(part))

    fill(parameter.detach(), lambda part: part.weight)
    if optimizer is not None:
        state: dict[str, Any] = {}
        for name in wanted:
            state[name] = torch.zeros_like(parameter, requires_grad=False)
            fill(state[name], _of(name))
        if "exp_avg" in wanted:
            state |= _updates(optimizer, parameter, float(facts.updates))
        if isinstance(optimizer, SGDInBackward):
            state["step"] = torch.zeros((), dtype=torch.int64)  # of its own updates: none yet
        optimizer.state[parameter] = state
    return RankFiles(facts.ranks, facts.epoch, facts.global_step, wanted)


def _of(name: str) -> Callable[[_Part], Tensor]:
    return lambda part: part.moments[name]


def _group(optimizer: torch.optim.Optimizer, parameter: Any) -> dict[str, Any]:
    """The group that has the parameter; {} if none has."""
    groups = optimizer.param_groups
    return next((g for g in groups if any(parameter is one for one in g["params"])), {})


def _wanted(optimizer: torch.optim.Optimizer | None, parameter: Any) -> tuple[str, ...]:
    """What an optimiser of this kind keeps of each row, as the files have it."""
    if optimizer is None:
        return ()
    group = _group(optimizer, parameter)
    if not group:
        _refusals.not_held("criterion")
    kinds = (torch.optim.SGD, RowSparseSGD, SGDInBackward)
    is_sgd = isinstance(optimizer, kinds) and group["momentum"]
    is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, RowSparseAdam))
    if not is_sgd and not (is_adam and not group.get("amsgrad")):
        _refusals.no_moments(type(optimizer).__name__)
    return MOMENTS[:1] if is_sgd else MOMENTS[1:]


def _updates(optimizer: Any, parameter: Any, count: float) -> dict[str, Any]:
    """How often Adam has updated the weights, as the optimiser counts it."""
    if isinstance(optimizer, RowSparseAdam):
        updates = torch.zeros_like(parameter[..., :1], dtype=torch.float32, requires_grad=False)
        return {"updates": updates.fill_(count)}
    group = _group(optimizer, parameter)
    is_there = group.get("capturable") or group.get("fused")
    device = parameter.device if is_there else torch.device("cpu")
    return {"step": torch.tensor(count, dtype=torch.float32, device=device)}
