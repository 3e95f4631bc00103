"""Class weights and optimiser states from checkpoints of other packages, and back.

```python
from fused_margin import convert

convert.load_class_weights(criterion, "checkpoint.pt")  # pytorch-metric-learning's, insightface's…
```

Files are loaded with ``weights_only=True``. Learning rates: the gradient of class weights goes as
1/||w||, so that one found with another initialisation belongs to its norms; docs/migration.md names
the line that draws them likewise.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from fused_margin import _rank_files, _validate
from fused_margin._rank_files import Checkpoint, RankFiles
from fused_margin.compat import _refusals, pml
from fused_margin.distributed import _shards
from fused_margin.losses import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss, NormalizedSoftmaxLoss
from fused_margin.losses.base import DEFAULTS

__all__ = [
    "RankFiles",
    "Source",
    "class_weights",
    "from_pml",
    "load_class_weights",
    "load_rank_files",
    "merge_rank_files",
    "to_pml",
    "transpose_moments",
]

# By the last part of a key, what the rows of a matrix are: classes, dimensions, or either.
LAYOUTS = {"weight": "CD", "kernel": "DC", "W": None}
# Parts of a checkpoint whose matrices are no weights
OPTIMIZERS = ("optimizer", "optim", "scheduler")


class Source(NamedTuple):
    """Which matrix of a checkpoint the class weights were.

    Attributes:
        key: where it was, ``key=`` of the next call. layout: how it lay, ``"CD"`` or ``"DC"``.
    """

    key: str
    layout: str


def class_weights(
    checkpoint: Checkpoint,
    num_classes: int | None = None,
    embedding_size: int | None = None,
    *,
    key: str | None = None,
    layout: str | None = None,
) -> torch.Tensor:
    """The class weights of a checkpoint, by key and shape.

    Known are ``W`` of pytorch-metric-learning (D, C) and of pytorch-adacos (C, D), ``kernel`` of
    AdaFace, CurricularFace and ElasticFace (D, C), and ``weight`` of all others (C, D), under any
    prefix and in nested mappings. If sizes are given, a matrix of that shape or its transpose is
    looked for: first of these names and layouts, then any. Where a size isn't given, ``W`` and
    ``kernel`` come before ``weight``, which linear layers have too.

    Args:
        checkpoint: a path, or what was loaded from it.
        num_classes: C, if known (C K for sub-centres).
        embedding_size: D, if known.
        key: the matrix's key, or its end; keys of nested mappings are joined by dots. The whole key
            of a file serves for a part of it too.
        layout: ``"CD"`` (a row per class), ``"DC"`` (a column per class), or None, by key and
            shape.

    Returns:
        (C, D), contiguous, as it was saved otherwise.

    Raises:
        TypeError: no mapping.
        ValueError: no matrix fits, several do (they are listed), or its layout can't be known; a
            file that is damaged, or that ``weights_only=True`` refuses.
        OSError: there is no such file, or it is a folder.
    """
    return _find(checkpoint, (num_classes, embedding_size), key, layout)[1].contiguous()


def _find(
    checkpoint: Checkpoint,
    sizes: tuple[int | None, int | None],
    key: str | None,
    layout: str | None,
) -> tuple[Source, torch.Tensor]:
    """The class weights, (C, D), and where they were."""
    _refusals.layout(layout)
    of = _named(checkpoint)
    name, matrix = _chosen(_matrices(_loaded(checkpoint)), sizes, key, layout, of)
    if _validate.is_dtensor(matrix) and isinstance(checkpoint, (str, os.PathLike)):
        _refusals.sharded(checkpoint)
    source = Source(name, _layout(name, matrix, sizes, layout, of))
    return source, (matrix.t() if source.layout == "DC" else matrix).detach()


def load_class_weights(
    criterion: nn.Module,
    checkpoint: Checkpoint,
    *,
    key: str | None = None,
    layout: str | None = None,
) -> Source:
    """Copy the class weights of a checkpoint into a loss, see `class_weights`.

    Args:
        criterion: a loss of this package, or of `fused_margin.compat`.
        checkpoint: a path, or what was loaded from it.
        key: the matrix's key, or its end.
        layout: ``"CD"``, ``"DC"`` or None.

    Returns:
        Which matrix it was, and how it lay.
    """
    rows = _rows(criterion)
    source, matrix = _find(checkpoint, (rows.shape[0], rows.shape[1]), key, layout)
    with torch.no_grad():
        rows.copy_(_shards.fitted(matrix, rows))
    return source


def merge_rank_files(files: Any, num_classes: int) -> torch.Tensor:
    """The class weights of insightface's arcface_torch, which writes a file for each rank.

    Known are ``checkpoint_gpu_{rank}.pt`` and the older ``softmax_fc_gpu_{rank}.pt`` and
    ``rank_{rank}_softmax_weight.pt``. Rank r of R had C // R classes, and one more if r < C % R.

    Args:
        files: their folder; or paths, in any order; or what was loaded from each, or paths of other
            names, in the order of ranks.
        num_classes: C of all ranks, without which the last one's absence wouldn't show.

    Returns:
        (C, D), in their dtype, on the CPU.

    Raises:
        ValueError: a rank's file is missing, twice there, or damaged; they are of different runs:
            other numbers of classes, columns, epochs or steps; ``weights_only=True`` refuses one.
        OSError: there is no such folder or file.
    """
    return _rank_files.merged(files, num_classes)


def load_rank_files(
    criterion: nn.Module, files: Any, optimizer: torch.optim.Optimizer | None = None
) -> RankFiles:
    """Copy class weights out of insightface's files of each rank into a loss, sharded or not.

    The number of ranks then has nothing to do with that now. Of a sharded criterion
    (`distributed.shard_classes`) each rank reads the files that overlap its shard, and it is a
    collective: where one can't, all raise.

    Args:
        criterion: a loss of this package, or of `fused_margin.compat`.
        files: see `merge_rank_files`; every rank sees all their names.
        optimizer: holds the class weights, and gets their momentum (or Adam's moments) too: torch's
            SGD, Adam or AdamW, or any of `fused_margin.optim`, `SGDInBackward` included. Theirs is
            of the same gradient, that of the mean over the rows of all ranks.

    Returns:
        How many files there were, their epoch and step, and what went into the optimiser's state.

    Raises:
        ValueError: see `merge_rank_files`; or the files have no such state, or of sampled rows only
            (before `PartialFC_V2`).
    """
    parameter = _parameter(criterion)
    is_transposed = not isinstance(getattr(criterion, "weight", None), nn.Parameter)
    return _rank_files.load(parameter, is_transposed, files, optimizer)


def _parameter(criterion: nn.Module) -> nn.Parameter:
    """Its class weights, as it has them."""
    for name in ("weight", "W"):
        parameter = getattr(criterion, name, None)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == 2:
            return parameter
    return _refusals.criterion(criterion)


def _rows(criterion: nn.Module) -> torch.Tensor:
    """Its class weights as (C, D), in place."""
    parameter = _parameter(criterion).detach()
    return (
        parameter
        if isinstance(getattr(criterion, "weight", None), nn.Parameter)
        else (parameter.t())
    )


def _loaded(checkpoint: Checkpoint) -> Mapping[str, Any]:
    is_file = isinstance(checkpoint, (str, os.PathLike))
    name = _named(checkpoint) if is_file else ""
    checkpoint = _rank_files.loaded(checkpoint)
    _refusals.checkpoint(checkpoint, name)
    return checkpoint  # pyright: ignore[reportReturnType]


def _named(checkpoint: Checkpoint) -> str:
    """What errors call it."""
    return str(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else "the checkpoint"


def _matrices(checkpoint: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Its floating matrices by their keys, but for those of optimisers."""
    found: dict[str, torch.Tensor] = {}
    for key, value in checkpoint.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            if value.ndim == 2 and value.is_floating_point():
                found[name] = value
        elif isinstance(value, Mapping) and not any(part in str(key) for part in OPTIMIZERS):
            found |= _matrices(value, f"{name}.")
    return found


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _described(found: dict[str, torch.Tensor]) -> list[str]:
    return [f"{name} {tuple(matrix.shape)}" for name, matrix in found.items()]


def _fits(matrix: torch.Tensor, sizes: tuple[int | None, int | None], layout: str | None) -> bool:
    shapes = {"CD": tuple(matrix.shape), "DC": tuple(matrix.shape)[::-1]}
    return any(
        all(size in (None, given) for size, given in zip(sizes, shape, strict=True))
        for name, shape in shapes.items()
        if layout in (None, name)
    )


def _chosen(
    found: dict[str, torch.Tensor],
    sizes: tuple[int | None, int | None],
    key: str | None,
    layout: str | None,
    of: str,
) -> tuple[str, torch.Tensor]:
    """The one matrix that can be the class weights."""
    wanted = "" if sizes == (None, None) else f" with C = {sizes[0]}, D = {sizes[1]}"
    named = found
    if key is not None:
        exact = {name: found[name] for name in found if name == key}
        ending = {name: m for name, m in found.items() if name.endswith(f".{key}")}
        # the whole key, as of the file, where a part of it was given
        named = exact or ending or {n: m for n, m in found.items() if key.endswith(f".{n}")}
        wanted = f" named {key}{wanted}"
    fitting = {name: m for name, m in named.items() if _fits(m, sizes, layout)}
    as_named = {
        name: m
        for name, m in fitting.items()
        if _last(name) in LAYOUTS and _fits(m, sizes, layout or LAYOUTS[_last(name)])
    }
    if None in sizes:  # linear layers may fit too
        as_named = {n: m for n, m in as_named.items() if _last(n) != "weight"} or as_named
    is_told = key is not None or sizes != (None, None)
    candidates = as_named or (fitting if is_told else {})
    if not is_told and any(_last(n) == "weight" for n in candidates):
        candidates = found  # a checkpoint with other matrices doesn't tell whose weight it is
    if not candidates:
        _refusals.no_candidate(_described(found), wanted, of)
    if len(candidates) > 1:
        _refusals.several_candidates(_described(candidates), of, has_sizes=None not in sizes)
    return next(iter(candidates.items()))


def _layout(
    name: str,
    matrix: torch.Tensor,
    sizes: tuple[int | None, int | None],
    layout: str | None,
    of: str,
) -> str:
    """Whether its rows are classes, "CD", or dimensions, "DC"."""
    if layout is not None:
        return layout
    by_shape = [one for one in ("CD", "DC") if _fits(matrix, sizes, one)]
    if len(by_shape) == 1:
        return by_shape[0]
    by_name = LAYOUTS.get(_last(name))
    if by_name is None:
        _refusals.layout_unknown(name, tuple(matrix.shape), of)
    return by_name


# --- pytorch-metric-learning's objects ------------------------------------------------------------


def _kind(value: Any) -> str:
    return type(value).__name__


def _not_converted(peer: Any, what: str) -> NoReturn:
    losses = [name for name in pml.__all__ if name.endswith("Loss")]
    _refusals.not_converted(peer, what, losses)


def from_pml(peer: Any, **options: Any) -> MarginSoftmaxLoss:
    """This package's loss for one of pytorch-metric-learning's, with a copy of its weights.

    Args:
        peer: its ArcFaceLoss, SubCenterArcFaceLoss, CosFaceLoss or NormalizedSoftmaxLoss, or that
            of `fused_margin.compat.pml`, with none of its other options.
        options: ``backend``, ``memory_budget``, ``ignore_index`` or ``reduction`` of ours.

    Returns:
        The same loss and gradients; ``weight`` (C, D) has W's dtype and device.

    Raises:
        ValueError: another class, or one with a regulariser, a reducer or a distance that isn't the
            default; `fused_margin.compat.pml` has those.
    """
    classes = {
        "ArcFaceLoss": lambda: (ArcFaceLoss, {"margin": float(peer.margin)}),
        "SubCenterArcFaceLoss": lambda: (
            ArcFaceLoss,
            {"margin": float(peer.margin), "sub_centers": int(peer.sub_centers)},
        ),
        "CosFaceLoss": lambda: (CosFaceLoss, {"margin": float(peer.margin)}),
        "NormalizedSoftmaxLoss": lambda: (NormalizedSoftmaxLoss, {}),
    }
    if isinstance(peer, MarginSoftmaxLoss):
        _refusals.converted(peer)
    if _kind(peer) not in classes:
        _not_converted(peer, " has no counterpart with an exact value")
    for name in ("weight_regularizer", "embedding_regularizer"):
        if getattr(peer, name, None) is not None:
            _not_converted(peer, f" with {name}")
    if _kind(getattr(peer, "reducer", None)) not in ("NoneType", "MeanReducer"):
        _not_converted(peer, f" with the reducer {_kind(peer.reducer)}")
    distance = getattr(peer, "distance", None)
    if distance is not None and not (distance.normalize_embeddings and distance.power == 1):
        _not_converted(peer, " with embeddings that are not normalised")
    make, arguments = classes[_kind(peer)]()
    scale = 1.0 / peer.temperature if _kind(peer) == "NormalizedSoftmaxLoss" else float(peer.scale)
    w = _parameter(peer)  # (D, C K)
    criterion = make(
        w.shape[1] // arguments.get("sub_centers", 1),
        w.shape[0],
        scale=scale,
        device=w.device,
        dtype=w.dtype,
        **arguments,
        **options,
    )
    with torch.no_grad():
        criterion.weight.copy_(w.t())
    return criterion


def to_pml(criterion: MarginSoftmaxLoss) -> nn.Module:
    """pytorch-metric-learning's loss for one of this package, with a copy of its weights.

    Args:
        criterion: ArcFaceLoss with ``boundary="linear"`` and ``grad="exact"``, which may have
            sub-centres, CosFaceLoss, FixedAdaCosLoss or NormalizedSoftmaxLoss, with
            ``reduction="mean"``.

    Returns:
        An object of pytorch_metric_learning.losses; its W is (D, C), a margin in degrees.

    Raises:
        ValueError: another class or option, or pytorch-metric-learning isn't installed.
    """
    kind, arguments = _kind(criterion), {}
    if kind not in ("ArcFaceLoss", "CosFaceLoss", "FixedAdaCosLoss", "NormalizedSoftmaxLoss"):
        _refusals.no_counterpart(criterion)
    has_counterpart = {"sub_centers"} if kind == "ArcFaceLoss" else set()
    for name in DEFAULTS.keys() - {"backend", "memory_budget", "device", "dtype"} - has_counterpart:
        value = getattr(criterion, name)
        if value is not DEFAULTS[name] and value != DEFAULTS[name]:
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            _refusals.no_counterpart(criterion, f" with {name}={shown}")
    for name in ("margin", "scale"):
        if isinstance(getattr(criterion, name, None), torch.Tensor):
            _refusals.no_counterpart(criterion, f" with a tensor as {name}")
    if isinstance(criterion, ArcFaceLoss):
        if (criterion.boundary, criterion.grad) != ("linear", "exact"):
            _refusals.no_counterpart(
                criterion, f" with boundary={criterion.boundary!r}, grad={criterion.grad!r}"
            )
        arguments = {"margin": math.degrees(criterion.margin), "scale": criterion.scale}
        if criterion.sub_centers > 1:
            kind = "SubCenterArcFaceLoss"
            arguments["sub_centers"] = criterion.sub_centers
    elif isinstance(criterion, CosFaceLoss):
        arguments = {"margin": criterion.margin, "scale": criterion.scale}
    else:
        kind, arguments = "NormalizedSoftmaxLoss", {"temperature": 1.0 / criterion.scale}
    try:
        peers = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError as error:
        _refusals.no_peer(error)
    peer = getattr(peers, kind)(
        num_classes=criterion.num_classes, embedding_size=criterion.embedding_size, **arguments
    )
    peer.W.data = criterion.weight.detach().t().contiguous()
    return peer


def transpose_moments(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, criterion: nn.Module
) -> dict[str, Any]:
    """An optimiser's saved state, with what it keeps of the class weights transposed.

    Moments of W (D, C) load into an optimiser of a weight (C, D) without a word, and the first step
    fails. Those of other parameters are left as they are. It works both ways.

    ```python
    optimizer.load_state_dict(convert.transpose_moments(saved, optimizer, criterion))
    ```

    Args:
        state: the ``state_dict()`` of the other optimiser; not changed.
        optimizer: the one that shall load it, built of the same parameters in the same order, the
            class weights being ``criterion``'s.
        criterion: the loss whose class weights are stored the other way round now.

    Returns:
        A state for ``optimizer.load_state_dict``.

    Raises:
        ValueError: the groups differ, ``optimizer`` lacks the class weights, or a moment has a
            shape that is neither the transpose nor one of two factors of it, as Adafactor's.
    """
    weight = _parameter(criterion)
    _refusals.optimizer_state(state)
    saved = [group["params"] for group in state["param_groups"]]
    ours = [group["params"] for group in optimizer.param_groups]
    if [len(group) for group in saved] != [len(group) for group in ours]:
        _refusals.other_groups([len(group) for group in saved], [len(group) for group in ours])
    numbers = {
        id(parameter): number
        for group, parameters in zip(saved, ours, strict=True)
        for number, parameter in zip(group, parameters, strict=True)
    }
    if id(weight) not in numbers:
        _refusals.not_held(_kind(criterion))
    number, wanted = numbers[id(weight)], tuple(weight.shape)
    result = {"state": dict(state["state"]), "param_groups": copy.deepcopy(state["param_groups"])}
    saved_moments = result["state"].get(number, {})
    if saved_moments:
        result["state"][number] = dict(
            _transposed(name, value, saved_moments, wanted) for name, value in saved_moments.items()
        )
    return result


def _transposed(
    name: str, value: Any, moments: Mapping[str, Any], wanted: tuple[int, ...]
) -> tuple[str, Any]:
    """A moment of W under its name, as one of W's transpose, of shape ``wanted``."""
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return name, value  # the number of steps
    if tuple(value.shape) == wanted[::-1]:
        return name, value.t().contiguous()
    # of a factored one, as Adafactor's, rows are columns now: (D, 1) or (D,), and (1, C) or (C,)
    other = re.sub("row|col", lambda part: {"row": "col", "col": "row"}[part[0]], name)
    length = wanted[1] if "row" in name else wanted[0]
    if other == name or other not in moments or value.numel() != length:
        _refusals.moment(name, tuple(value.shape), wanted)
    return other, value.t().contiguous() if value.ndim == 2 else value
