"""What to do instead: the clauses that end the messages of `_validate`; "" if nothing is known."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sized
from typing import Any

import torch


def of_type(name: str, value: Any) -> str:
    """What to pass in place of ``value``, which is no tensor."""
    if value is None:
        return ""
    if isinstance(value, torch.nn.Module):
        is_weight = name == "weight"
        return f"; pass {'its weight, criterion.weight' if is_weight else 'what it returns'}"
    if isinstance(value, Mapping):
        return f"; pass the tensor in it that holds the {name}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, torch.Tensor) for one in value):
        return f"; pass the tensor in it that holds the {name}, or torch.stack them if all do"
    return "; torch.as_tensor converts arrays and lists"


def of_dtype(name: str, tensor: torch.Tensor) -> str:
    """How ``tensor``, whose dtype is refused, becomes floating."""
    if tensor.is_complex():
        return "; take .real, .imag or .abs()"
    is_input = name == "embeddings" and not tensor.is_floating_point()
    return "; cast with .float()" + (
        ", or if this is the model's input, pass what the model returns" if is_input else ""
    )


def of_labels_dtype(labels: torch.Tensor) -> str:
    """How labels of another dtype become class indices."""
    if labels.ndim != 2:
        return "use .long()"
    if labels.shape[1] == 1:
        return "use .squeeze(1).long()"
    if labels.dtype == torch.bool:
        return "turn one-hot targets into indices with .int().argmax(1)"
    return (
        "turn one-hot targets into indices with .argmax(1); a mixture (mixup, cutmix) of labels a"
        " and b, lam of shape (N,), is one call: criterion(torch.cat([x, x]), torch.cat([a, b]),"
        " sample_weight=torch.cat([lam, 1 - lam]))"
    )


def of_labels_shape(labels: torch.Tensor, num_rows: int, num_classes: int) -> str:
    """How labels become one class index for each of ``num_rows`` rows."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return "; use .squeeze(1)"
    if labels.numel() == num_rows:
        return "; use .flatten()"
    if labels.ndim == 2 and labels.shape[0] == num_rows:
        return "; turn one-hot targets into indices with .argmax(1)"
    if labels.shape == (num_classes,):
        return "; there is one per row of weight: embeddings come first, then weight"
    return ""


def of_embeddings_shape(shape: torch.Size) -> str:
    """How embeddings of another shape become (N, D)."""
    if len(shape) == 1:
        return "; a single embedding needs .unsqueeze(0)"
    if len(shape) < 3:
        return ""
    if math.prod(shape[1:]) == max(shape[1:]):
        return "; use .flatten(1)"
    return (
        "; make one vector of each row, with .flatten(1), or by pooling: .mean(1) of (N, T, D),"
        " .mean((2, 3)) of (N, D, H, W)"
    )


def of_weight_shape(shape: torch.Size) -> str:
    """How a weight of another shape becomes (C, D)."""
    if len(shape) == 1:
        return "; it holds a vector per class, not a factor per class as in F.cross_entropy"
    if len(shape) >= 3 and math.prod(shape[1:]) == shape[1]:
        return "; use .flatten(1)"
    return "; use .squeeze(0)" if len(shape) == 3 and shape[0] == 1 else ""


def of_columns(num_columns: int, num_classes: int, dim: int) -> str:
    """How embeddings of another number of columns and a weight (C, D) become two that match."""
    if num_classes == num_columns:
        return (
            f"if the sizes of a module were swapped, build it with num_classes={dim},"
            f" embedding_size={num_classes} by name (in compat out_features and in_features, or"
            " out_neurons and input_size); a function takes weight as (C, D), so pass weight.t();"
            " and if the embeddings are logits, pass what the model's last layer is given"
        )
    return f"build the loss with embedding_size={num_columns}" + (
        "; its sizes are its first two arguments, (num_classes, embedding_size)" if dim == 1 else ""
    )


def of_margin_shape(margin: torch.Tensor, num_rows: int) -> str:
    """How a tensor becomes one margin for each of ``num_rows`` rows."""
    if margin.numel() == 1 and margin.ndim < 2:
        return (
            "; pass a single margin as a float, margin.item(), or if it is learnt,"
            f" margin.expand({num_rows})"
        )
    if margin.numel() == num_rows:
        return "; use .flatten()"
    return "; pass margins per class as margin[labels]" if margin.ndim == 1 else ""


def of_margins(margins: Sized, num_rows: int) -> str:
    """How a list or an array becomes one margin for each of ``num_rows`` rows."""
    if len(margins) == num_rows:
        return "; torch.as_tensor converts arrays and lists"
    return "; pass margins per class as torch.as_tensor(margin)[labels]"


def of_number(name: str, value: Any) -> str:
    """How ``value``, which is no number, becomes one."""
    if not holds_several(value) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return "; convert it with float()"
    if "margin" in name or name in ("m1", "m2", "m3"):
        return (
            "; for margins per class, a tensor (C,), there are ArcFaceLoss, CosFaceLoss,"
            " CurricularFaceLoss and MVSoftmaxLoss"
        )
    return ""


def of_dtensor(name: str) -> str:
    """What to pass in place of a DTensor."""
    if name == "weight":
        return (
            "losses, logits, metrics.predict and metrics.evaluate take one that is sharded on"
            " classes, Shard(0) over one dimension of its mesh, as"
            " fused_margin.distributed.shard_classes(criterion) makes it; all else takes"
            " weight.full_tensor()"
        )
    if name == "scale":
        return "pass scale.full_tensor()"
    return f"pass this rank's rows, {name}.to_local() if rows are sharded, else .full_tensor()"


def holds_several(value: Any) -> bool:
    """Whether ``value`` is an array or a list, where one number is asked for."""
    return isinstance(value, Sized) and not isinstance(value, str)


def of_size(name: str, value: Any) -> str:
    """How ``value``, which is no int, becomes a number of classes or columns."""
    if value is None:
        return of_small_size(name)
    if isinstance(value, torch.Tensor):
        if value.ndim == 0:
            return "; convert it with int()"
        return (
            "; a loss is built first, criterion = ArcFaceLoss(num_classes, embedding_size), and"
            " then called, criterion(embeddings, labels)"
        )
    if holds_several(value):
        return f"; pass how many there are, len({name})"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return "; convert it with int(), or divide by //"
    return ""


def of_small_size(name: str) -> str:
    """What stands for no option at all, where a number is too small."""
    return "; 1 is one row of weights for each class" if name == "sub_centers" else ""


def of_other_classes(kind: str, given: int, present: int, sub_centers: int) -> list[str]:
    """What to do with a checkpoint that has other rows of weights; nothing if it hasn't."""
    if given == present:
        return []
    said = f"the checkpoint has weights of {given} rows, this {kind} of {present}: "
    count = given // sub_centers
    if given % sub_centers:
        return [said + f"it has other sub-centres than {sub_centers}; build the loss with the same"]
    if given < present:
        more = (present - given) // sub_centers
        remedy = f", load it, and add the others with criterion.grow({more}, optimizer)"
    else:
        remedy = ", as it had when it was saved"
        more = given // present
        if sub_centers == 1 and given == more * present:
            remedy += f", or sub_centers={more} if it has {more} rows for each class"
    return [f"{said}build the loss with num_classes={count}{remedy}"]


def of_transposed(name: str, given: Any, weight: torch.Tensor) -> list[str]:
    """What to do with a checkpoint whose class weights lie the other way; nothing of others."""
    if not isinstance(given, torch.Tensor) or given.shape == weight.shape:
        return []
    return [_of_layout(name, given)] if given.shape == weight.shape[::-1] else []


def of_another_name(name: str, state: Mapping[str, Any], weight: torch.Tensor) -> str:
    """What to do with a checkpoint whose class weights have another name; "" of others."""
    sizes = sorted(weight.shape)
    fitting = [
        key
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim == 2 and sorted(value.shape) == sizes
    ]
    is_known = name in state or len(fitting) != 1
    return "" if is_known else "\n\t" + _of_layout(fitting[0], state[fitting[0]])


def _of_layout(key: str, given: torch.Tensor) -> str:
    return (
        f"{key} {tuple(given.shape)} has the size of the class weights: take them with"
        " fused_margin.convert.load_class_weights(criterion, state)"
    )


def of_forgotten(criterion: str, names: list[str]) -> str:
    """The message about parameters that no optimiser holds."""
    return (
        f"the optimizer doesn't hold {', '.join(names)} of this {criterion}, which would"
        " never be trained: build it with [*model.parameters(), *criterion.parameters()], and"
        " after fully_shard() or shard_classes(), which replace the parameters"
    )


def of_shared(criterion: str, names: list[str]) -> str:
    """The message about parameters that several optimisers hold."""
    return (
        f"two optimizers hold {', '.join(names)} of this {criterion}, so that each step is made"
        " twice, with learning rates and moments of their own; leave criterion.parameters() out of"
        " one of them"
    )


def of_weight_decay(criterion: str, name: str, decay: float) -> str:
    """The message about weight decay of weights whose norms the loss doesn't know."""
    return (
        f"the optimizer has a weight decay of {decay:g} for {name} of this {criterion}, whose loss"
        " doesn't depend on the norms of its rows: decay shrinks them, and the gradient goes as"
        " 1/norm, so it only raises the learning rate, most of all that of rare classes. Leave it"
        ' out, [{"params": model.parameters()}, {"params": criterion.parameters(),'
        ' "weight_decay": 0.0}], or, if it is meant as in recipes of SGD with 5e-4, ignore'
        " fused_margin.WeightDecayWarning with warnings.filterwarnings"
    )
