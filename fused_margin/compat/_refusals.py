"""Every ValueError and TypeError of `fused_margin.compat` and `fused_margin.convert`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from fused_margin import _validate, _validate_shards

CHECKPOINTS = (
    "W of pytorch-metric-learning (D, C) and pytorch-adacos (C, D), kernel of AdaFace,"
    " CurricularFace and ElasticFace (D, C), weight of all others (C, D)"
)


def peer_call(
    embeddings: torch.Tensor, labels: Any, ref_emb: Any, ref_labels: Any, name: str
) -> None:
    """Check the arguments of a call as pytorch-metric-learning does."""
    if labels is None:
        raise ValueError(
            f"{name} needs labels: call it as loss(embeddings, labels); without labels there is"
            " loss.get_logits(embeddings)"
        )
    if ref_emb is not None and (ref_emb is not embeddings or ref_labels is not labels):
        raise ValueError(
            f"{name} compares embeddings with class weights, so ref_emb and ref_labels have no"
            " place; leave them out (DistributedLossWrapper passes them: wrap the loss in"
            " torch's DistributedDataParallel instead)"
        )


def mixture(labels: Any) -> None:
    """Refuse a row of targets for each embedding, with what a loss without sample_weight can do."""
    if isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim == 2:
        if labels.shape[1] < 2:
            return
        raise TypeError(
            f"labels must be class indices, (N,), got {labels.dtype} of shape"
            f" {tuple(labels.shape)}; turn one-hot targets into indices with .argmax(1); a mixture"
            " (mixup, cutmix) of labels a and b, lam a number, is two losses, or one call of"
            " convert.from_pml(criterion), which takes sample_weight:"
            " lam * criterion(x, a) + (1 - lam) * criterion(x, b)"
        )


def of_peer(name: str) -> str:
    """The message about a name that `fused_margin.compat.pml` doesn't have."""
    message = f"module 'fused_margin.compat.pml' has no attribute {name!r}"
    if not name.endswith(("Loss", "Regularizer", "Memory", "Wrapper")):
        return message
    return (
        f"{message}, only losses and regularizers of class weights; import this one from"
        " pytorch_metric_learning, with which these combine"
    )


def indices_tuple(value: Any) -> None:
    """Check that it is what a miner returns."""
    is_tuple = isinstance(value, (tuple, list)) and len(value) in (3, 4)
    if not is_tuple or not all(isinstance(part, torch.Tensor) for part in value):
        raise TypeError(
            "indices_tuple must be what a miner returns, three tensors of indices (triplets) or"
            f" four (pairs); got {type(value).__name__}"
        )


def _kinds(value: Any) -> set[str]:
    return {kind.__name__ for kind in type(value).__mro__}


def distance(value: Any, allowed: tuple[str, ...], name: str) -> None:
    """Check a distance of pytorch-metric-learning's, which need not be installed here."""
    if value is None:
        return
    if not _kinds(value) & set(allowed) or "SNRDistance" in _kinds(value):
        raise ValueError(
            f"{name} is computed from {' or '.join(allowed)}, without making distances between all"
            f" rows and classes; got {type(value).__name__}. Leave distance out, or keep"
            " pytorch_metric_learning's own class for this one"
        )
    if (value.p, value.power) != (2, 1):
        raise ValueError(
            f"distance must have p=2 and power=1, got p={value.p} and power={value.power}; with"
            f" others keep pytorch_metric_learning's own {name}"
        )


def collect_stats(value: Any) -> None:
    """Refuse to collect avg_angle, which would need a synchronisation."""
    if value:
        raise ValueError(
            "collect_stats=True records avg_angle with a synchronisation in each step, which this"
            " class doesn't; leave it out, and take angles of loss.get_logits() where you log them"
        )


def degrees(value: Any) -> float:
    """Radians of a margin that is given in degrees."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return math.radians(_validate._real("margin", value, "a number, in degrees"))


def peer_margin(value: Any) -> int:
    """Check the integer margin of LargeMarginSoftmaxLoss and SphereFaceLoss."""
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__int__"):
        raise TypeError(f"margin must be an int, the multiple of the angle, got {value!r}")
    if int(value) < 1:
        raise ValueError(f"margin is a multiple of the angle, at least 1 (4 is usual); got {value}")
    return int(value)


def centers_per_class(num_classes: int, value: int, rows: int | None = None) -> None:
    """Check SparseCentersRegularizer's numbers, and the weights it is given."""
    if value < 2:
        raise ValueError(
            f"centers_per_class must be at least 2, got {value}: a single centre has none to be"
            " pulled to"
        )
    if rows is not None and rows != num_classes * value:
        raise ValueError(
            f"weights must have num_classes * centers_per_class = {num_classes * value} rows, got"
            f" {rows}"
        )


def reducer(value: Any) -> None:
    """Check that it is callable as pytorch-metric-learning's are."""
    if value is not None and not callable(value):
        raise TypeError(
            "reducer must be one of pytorch_metric_learning.reducers or None, the mean; got"
            f" {type(value).__name__}"
        )


# --- heads ----------------------------------------------------------------------------------------


def one_margin(value: Any) -> None:
    """Refuse margins per class where other classes' logits have a share of one."""
    if isinstance(value, torch.Tensor):
        raise ValueError(
            f"ls_eps spreads one margin over all classes, got {_validate._shown(value)}; set"
            " ls_eps=0.0, and for smoothed labels label_smoothing"
        )


# --- insightface ----------------------------------------------------------------------------------


def combined_margin(m1: Any, m2: Any, m3: Any) -> None:
    """Check that it is a combination whose numbers are insightface's own."""
    for name, value in (("m1", m1), ("m2", m2), ("m3", m3)):
        _validate.between(name, value, -math.inf, math.inf)
    if m3 > 0 and (m1, m2) != (1.0, 0.0):
        raise ValueError(
            f"insightface's CombinedMarginLoss ignores m1 and m2 where m3 > 0, and got"
            f" ({m1}, {m2}, {m3}); pass (1, 0, {m3}) for what it computes, CosFace. For"
            " cos(m1 theta + m2) - m3 there is fused_margin.CombinedMarginLoss"
        )
    if m3 <= 0 and (m1 != 1.0 or m3 != 0.0):
        raise ValueError(
            "insightface's CombinedMarginLoss raises unless it is ArcFace, (1, m2, 0), or CosFace,"
            f" (1, 0, m3) with m3 > 0; got ({m1}, {m2}, {m3}). For cos(m1 theta + m2) - m3 there"
            " is fused_margin.CombinedMarginLoss"
        )


def margin_loss(value: Any, allowed: tuple[type, ...]) -> None:
    """Check the margin of PartialFC_V2."""
    if not isinstance(value, allowed):
        raise TypeError(
            "margin_loss must be CombinedMarginLoss, ArcFace or CosFace of"
            f" fused_margin.compat.insightface, got {type(value).__module__}."
            f"{type(value).__name__}; import it from there, the arguments are the same"
        )


def sample_rate(value: float) -> float:
    """Refuse to sample classes."""
    if value != 1.0:
        raise ValueError(
            f"sample_rate={value} trains on a sample of the classes, which a loss of this package"
            f" does after fused_margin.sampling.sample_negatives(criterion, {value}), with"
            " fused_margin.optim.RowSparseSGD; pass 1.0 here, all classes"
        )
    return value


def ranks(number: int) -> None:
    """Refuse to split the classes over ranks."""
    if number > 1:
        raise ValueError(
            f"PartialFC_V2 splits the classes over {number} ranks in insightface; here it is for"
            " one process. On several ranks use fused_margin.ArcFaceLoss or CosFaceLoss with"
            " fused_margin.distributed.shard_classes(criterion), see README, Several processes"
        )


# --- convert --------------------------------------------------------------------------------------


def checkpoint(value: Any, name: str = "") -> None:
    """Check what was given as a checkpoint, or what the file ``name`` has held."""
    if isinstance(value, Mapping):
        return
    kind = type(value).__name__
    if name:
        alone = isinstance(value, torch.Tensor)
        raise TypeError(
            f"{name} must hold a mapping of names to tensors, as a state_dict, and holds"
            f" {'a' if alone else 'an object of type'} {kind}"
            + ("; load it with torch.load and pass {'weight': tensor}" if alone else "")
        )
    raise TypeError(
        f"a checkpoint must be a path or a mapping of names to tensors, as a state_dict; got {kind}"
    )


def file_there(path: Any) -> None:
    """Check that a path is that of a file."""
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"{path} is a folder, where the file of a checkpoint is expected. A folder of ranks'"
            " files is for convert.load_rank_files and merge_rank_files, one with a .metadata file"
            " for torch.distributed.checkpoint.load"
        )
    if not os.path.exists(path):
        raise FileNotFoundError(f"No such file: {path}, in the folder {os.getcwd()}")


def unsafe(path: Any, error: Exception) -> NoReturn:
    """A file that weights_only=True doesn't load."""
    raise ValueError(
        f"{path} holds objects besides tensors, numbers and containers, which may run code when"
        " loaded. If you trust it, load it yourself with torch.load(path, weights_only=False) and"
        " pass the mapping"
    ) from error


def sharded(path: Any) -> NoReturn:
    """A file of DTensors."""
    raise ValueError(
        f"{path} has the rows of one rank alone, as torch.save writes the state_dict() of sharded"
        f" classes; {_validate_shards.WHOLE}"
    )


def unreadable(path: Any, error: Exception) -> NoReturn:
    """A file that torch.load can't read."""
    is_safetensors = str(path).endswith(".safetensors")
    if is_safetensors:
        remedy = "load it with safetensors.torch.load_file(path) and pass the mapping"
    else:
        what = str(error).partition("\n")[0][:200]
        remedy = (
            "it is damaged or incomplete, or not written by torch.save, which said"
            f" {type(error).__name__}: {what}"
        )
    raise ValueError(f"{path} is no checkpoint that torch.load can read; {remedy}") from error


def no_candidate(found: list[str], wanted: str, name: str) -> NoReturn:
    """No tensor can be the class weights."""
    shown = ", ".join(found) if found else "none"
    raise ValueError(
        f"no class weights{wanted} among the matrices of {name}: {shown}. Known are"
        f" {CHECKPOINTS}; name another one with key="
    )


def several_candidates(found: list[str], name: str, *, has_sizes: bool) -> NoReturn:
    """Several tensors can be the class weights."""
    sizes = "" if has_sizes else ", or give num_classes and embedding_size"
    raise ValueError(
        f"several matrices of {name} can be the class weights: {', '.join(found)}; choose"
        f" with key={sizes}"
    )


def penalty(mp: float, margin: float, value: float) -> None:
    """Check the penalty that WeSpeaker makes of ``mp`` at a margin."""
    if value > 1.0:
        raise ValueError(
            f"mp = {mp:g} is for a margin of 0.2, as in WeSpeaker, and grows with it: at margin ="
            f" {margin:g} it is {value:.4g} radians, more than 1; give at most {0.2 / margin:.4g}"
        )


def layout_unknown(name: str, shape: tuple[int, ...], of: str) -> NoReturn:
    """A tensor whose rows may be classes or dimensions."""
    raise ValueError(
        f"{of}: {name} of shape {shape} can be a row per class, {shape[0]} classes"
        f" (pytorch-adacos), or a column per class, {shape[1]} classes (pytorch-metric-learning);"
        " pass layout='CD' or 'DC'"
        + ("" if shape[0] == shape[1] else ", or num_classes and embedding_size")
    )


def layout(value: Any) -> None:
    """Check a layout that is asked for."""
    if value not in (None, "CD", "DC"):
        raise ValueError(
            f"layout must be 'CD' (a row per class), 'DC' (a column per class) or None, got"
            f" {value!r}"
        )


def criterion(value: Any) -> NoReturn:
    """A module without class weights."""
    raise TypeError(
        "criterion must be a loss with class weights, weight (C, D) or W (D, C); got"
        f" {type(value).__name__}"
    )


def not_converted(value: Any, what: str, known: list[str]) -> NoReturn:
    """A loss without a counterpart, or with options that its counterpart lacks."""
    name = type(value).__name__
    if name in known:
        remedy = (
            "its class in fused_margin.compat.pml has the same arguments;"
            " convert.load_class_weights moves the weights"
        )
    else:
        remedy = f"fused_margin.compat.pml has {', '.join(known)}"
    raise ValueError(f"{name}{what}: {remedy}")


def converted(value: Any) -> NoReturn:
    """A loss of this package where one of pytorch-metric-learning is to be converted."""
    raise ValueError(
        f"this {type(value).__name__} is a loss of fused_margin already, with a weight (C, D);"
        " copy.deepcopy makes a copy of it"
    )


def optimizer_state(state: Any) -> None:
    """Check that it is what an optimiser's ``state_dict()`` returns."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        given = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            "state must be the state_dict() of an optimizer, with state and param_groups, got"
            f" {given}; of a checkpoint pass the part that is the optimizer's"
        )


def grow(name: str) -> NoReturn:
    """New classes for W, (D, C)."""
    raise ValueError(
        f"{name} has its classes in the columns of W and can't grow; convert.from_pml(loss) makes a"
        " loss that can, and convert.transpose_moments brings the optimizer's state along"
    )


def no_counterpart(value: Any, what: str = "") -> NoReturn:
    """A loss of this package that pytorch-metric-learning doesn't have."""
    raise ValueError(
        f"pytorch-metric-learning has no loss that computes what this {type(value).__name__}{what}"
        " does; to take the weights there, copy criterion.weight.t() into W, (D, C), of one of its"
        " losses"
    )


def no_peer(error: Exception) -> NoReturn:
    """pytorch-metric-learning isn't there."""
    raise ValueError(
        "to_pml makes an object of pytorch_metric_learning, which is not installed: run pip install"
        " pytorch-metric-learning, or save {'W': criterion.weight.t().contiguous()}"
    ) from error


def not_held(name: str) -> NoReturn:
    """An optimiser that lacks the class weights."""
    raise ValueError(
        f"the optimizer doesn't hold the class weights of this {name}; build it with"
        " [*model.parameters(), *criterion.parameters()], in the order of the one that was saved"
    )


def other_groups(saved: list[int], ours: list[int]) -> NoReturn:
    """States of optimisers that were built of other groups of parameters."""
    raise ValueError(
        f"the saved state has groups of {saved} parameters, the optimizer of {ours}; build it with"
        " the same parameters in the same order as the one that was saved"
    )


def moment(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> NoReturn:
    """A moment of another shape."""
    remedy = (
        "it has the weight's own layout, so load it without transposing"
        if given == wanted
        else "it belongs to another parameter, so build the optimizer with the parameters in the"
        " same order as the one that was saved; or the optimizer keeps something that has no"
        " transpose, and has to start anew for the class weights"
    )
    raise ValueError(
        f"the saved {name} of the class weights has shape {given}, where {wanted[::-1]} is to be"
        f" transposed to {wanted}; {remedy}"
    )


# --- files of each rank ---------------------------------------------------------------------------


RANK_FILES = "checkpoint_gpu_0.pt, softmax_fc_gpu_0.pt or rank_0_softmax_weight.pt"


def rank_files(value: Any) -> NoReturn:
    """Neither a folder nor files."""
    raise TypeError(
        f"files must be a folder or a list of one file for each rank, got {type(value).__name__}"
    )


def no_files() -> NoReturn:
    """An empty list."""
    raise ValueError("files is empty; give the files of all ranks, or their folder")


def rank_files_there(path: Any) -> None:
    """Check that a path is there."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"No such file or folder: {path}, in the folder {os.getcwd()}; give the folder in which"
            f" the run wrote {RANK_FILES}"
        )


def no_rank_files(folder: Any) -> NoReturn:
    """A folder of other files."""
    raise ValueError(
        f"{folder} has no file of a rank, as {RANK_FILES}; files of other names are given as a"
        " list, in the order of ranks"
    )


def mixed_rank_files(names: list[str]) -> NoReturn:
    """Files of several kinds."""
    raise ValueError(
        f"files of several kinds are there: {', '.join(names)}; give a list of those of one kind,"
        " and of one run"
    )


def missing_ranks(there: list[int], missing: list[int], twice: list[int], example: str) -> NoReturn:
    """Not one file for each rank."""
    what = [f"those of ranks {missing} are missing, {there} are there"] if missing else []
    what += [f"those of ranks {twice} are there more than once"] if twice else []
    raise ValueError(
        f"of files as {example} {' and '.join(what)}; bring the files of all ranks of one run into"
        " one folder, which each of several nodes may have written on its own disk"
    )


def rank_weight(name: str, weight: Any) -> None:
    """Check that a file has a matrix of class weights."""
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name} has no class weights: expected a matrix, or one named weight, alone or in"
            " state_dict_softmax_fc"
        )


def other_rows(
    name: str, rows: int, expected: int, num_classes: int, ranks: int, more: range
) -> NoReturn:
    """A file has not as many classes as its place among the ranks says.

    ``more``: the numbers of ranks with which it would, if files of the last ones are missing.
    """
    if more:
        several = f"{more[0]}" if len(more) == 1 else f"{more[0]} to {more[-1]}"
        first = ranks if more[0] == ranks + 1 else f"{ranks} to {more[0] - 1}"
        hint = (
            f"files of {ranks} ranks, 0 to {ranks - 1}, are there, and of {num_classes} classes it"
            f" would have as many in a run of {several} ranks: then those of the last are missing,"
            f" {'rank' if more[0] == ranks + 1 else 'ranks'} {first}"
            f"{' at least' if len(more) > 1 else ''}. Else"
        )
    else:
        hint = f"files of {ranks} ranks, 0 to {ranks - 1}, are there;"
    raise ValueError(
        f"{name} has {rows} classes, where its rank of {ranks} had {expected}: {hint}"
        " it is of a run with other classes, the files aren't in the"
        " order of ranks, or num_classes (of the criterion) is another than that of the run"
    )


def count(name: str, key: str, value: Any) -> Any:
    """Check an epoch or a number of steps, which not all files have."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is not None and not isinstance(value, (int, float)):
        raise ValueError(
            f"{name} is damaged, or not of arcface_torch: its {key} is of type"
            f" {type(value).__name__}, where a number is expected"
        )
    return value


def rank_optimizer(name: str, error: Exception) -> NoReturn:
    """A state of something else than an optimiser of torch."""
    raise ValueError(
        f"{name} has a state_optimizer that is no state_dict() of an optimizer, with state and"
        " param_groups; leave optimizer out to begin without"
    ) from error


def same_run(first: Any, other: Any) -> None:
    """Check that two files were written by one run at one time."""
    dtypes = first.weight.dtype, other.weight.dtype
    if first.facts != other.facts or dtypes[0] != dtypes[1]:
        raise ValueError(
            f"{first.name} and {other.name} are of different runs or times: (D, epoch, step,"
            f" updates) are {first.facts} and {other.facts}, dtypes {dtypes[0]} and {dtypes[1]};"
            " give those that were saved together"
        )


def same_rank_files(reports: list[Any], mine: int) -> Any:
    """Check that all ranks could read files of one run; what they say."""
    for rank, (_, error) in enumerate(reports):
        if error and rank != mine:
            raise ValueError(f"rank {rank} of the shards can't read its files: {error}")
    known = [facts for facts, _ in reports if tuple(facts[1:]) != (None, None, None)]
    found = known or [reports[mine][0]]
    counts = {facts[0] for facts, _ in reports}
    if len(counts) > 1 or any(facts != found[0] for facts in known):
        raise ValueError(
            "ranks see files of different runs, (files, epoch, step, updates) by rank:"
            f" {[tuple(facts) for facts, _ in reports]}; let them read one folder"
        )
    return found[0]


def rank_columns(name: str, weight: torch.Tensor, dim: int) -> None:
    """Check the embedding size of a file."""
    if weight.shape[1] != dim:
        raise ValueError(
            f"{name} has weights of D = {weight.shape[1]}, the criterion of {dim}; build it with"
            f" embedding_size={weight.shape[1]}"
        )


def rank_moment(name: str, moment: str, found: Mapping[str, Any], weight: torch.Tensor) -> None:
    """Check that a file has what the optimiser keeps, of every row."""
    value = found.get(moment)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        there = f"it has {', '.join(found)}" if found else "it has no state of an optimizer"
        raise ValueError(
            f"{name} has no {moment} of the class weights ({there}); leave optimizer out to begin"
            " without, or build the one that was trained with"
        )
    if value.shape != weight.shape:
        raise ValueError(
            f"{name} has {moment} of shape {tuple(value.shape)} for weights {tuple(weight.shape)}:"
            " that of the rows sampled last, as PartialFC kept it before PartialFC_V2; leave"
            " optimizer out to begin without"
        )


def no_moments(name: str) -> NoReturn:
    """An optimiser without momentum, or of another kind."""
    raise ValueError(
        f"this {name} keeps neither momentum, as SGD, nor two moments, as Adam without amsgrad, so"
        " that nothing can be loaded into it: leave optimizer out"
    )
