"""Every ValueError and TypeError of the public functions, with the remedy in the message."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import math
import numbers
import operator
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch

from fused_margin import _names, _remedies, _transforms
from fused_margin._compiled import is_dtensor, known

BACKENDS = ("auto", "reference", "cpu", "triton")
REDUCTIONS = ("mean", "sum", "none")
BOUNDARIES = ("linear", "continuous", "none", "easy")
GRADS = ("exact", "straight_through")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip

LARGEST_SCALE = torch.finfo(torch.float32).max  # a larger one is infinite in fp32

# Read once: Triton decides at decoration time whether a kernel is interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Searched for once: Dynamo of torch 2.11 and 2.12 can't trace the search inside a call.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def checks_labels_on_gpu() -> bool:
    """Whether FUSED_MARGIN_CHECK_LABELS=1 asks for a synchronising label check on a GPU."""
    return os.environ.get("FUSED_MARGIN_CHECK_LABELS", "0") == "1"


def tunes_on_demand() -> bool:
    """Whether FUSED_MARGIN_TUNE asks for tuning inside the first call."""
    return os.environ.get("FUSED_MARGIN_TUNE", "") not in ("", "0")


def has_triton() -> bool:
    """Whether Triton can be imported, without importing it."""
    return _HAS_TRITON


def get_triton() -> str:
    """How to get Triton where it is missing."""
    if torch.version.hip is not None:
        return "a ROCm build of torch brings its own: install torch again from the same index"
    if sys.platform != "linux":
        return "it has wheels for Linux only: use another system"
    return 'run: pip install "fused-margin[triton]"'


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Check that ``value`` is one of ``allowed``."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        remedy = "; pass the string, 'none'" if value is None and "none" in allowed else ""
        raise ValueError(f"{name} must be one of {options}; got {value!r}{remedy}")
    return value


# of one argument each, as a module checks what is assigned to it
reduction = functools.partial(choice, "reduction", allowed=REDUCTIONS)
boundary = functools.partial(choice, "boundary", allowed=BOUNDARIES)
grad = functools.partial(choice, "grad", allowed=GRADS)
backend_name = functools.partial(choice, "backend", allowed=BACKENDS)


def floating(name: str, value: torch.dtype) -> torch.dtype:
    """Check a dtype that is asked for."""
    if value not in FLOATS:
        options = ", ".join(map(str, FLOATS))
        raise TypeError(f"{name} must be one of {options}; got {value!r}")
    return value


def _shown(value: Any) -> str:
    """What was given: the type, and the value or the shape."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"{kind} of shape {known(value.shape)} and {value.dtype}"
    if isinstance(value, str):
        return f"{kind} {value!r}"
    return f"{kind} {known(value)}" if isinstance(value, numbers.Number) else kind


def _integer(name: str, value: Any, kinds: str = "an int", remedy: str = "") -> int:
    """``value`` as an int: anything that stands for one, as NumPy's and 0-d tensors, but a bool."""
    if type(value) is int:  # first, as Dynamo traces it on a symbolic int
        return value
    if not _is_bool(value):
        if hasattr(value, "__index__"):  # what index() raises torch 2.11 can't trace
            with contextlib.suppress(TypeError):
                return operator.index(value)
        if not remedy and (isinstance(value, str) or _is_real(value)):
            remedy = "; convert it with int()"
    raise TypeError(f"{name} must be {kinds}, got {_shown(value)}{remedy}")


def _real(name: str, value: Any, kinds: str, remedy: str = "") -> float:
    """``value`` as a float: any real number, as NumPy's, but a bool. inf if it is too large."""
    if type(value) is float:  # first, as Dynamo traces it on a symbolic float
        return value
    if type(value) is not int and not _is_real(value):
        if not (remedy or value is None or _is_bool(value)):
            remedy = _remedies.of_number(name, value)
        raise TypeError(f"{name} must be {kinds}, got {_shown(value)}{remedy}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_bool(value: Any) -> bool:
    """Whether ``value`` is a truth value: Python's, NumPy's or a tensor's."""
    if isinstance(value, (int, float)):  # first, as Dynamo traces it on a symbolic number
        return isinstance(value, bool)
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def local(tensor: Any) -> torch.Tensor:
    """The part of this rank of a DTensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def layout(tensor: Any) -> torch.layout:
    """Of a tensor, or of this rank's part of a DTensor, which may be sparse as itself can't say."""
    return tensor._local_tensor.layout if is_dtensor(tensor) else tensor.layout


def is_class_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor (C, D) of which ranks hold classes, or copies of these."""
    placements = tensor.placements if is_dtensor(tensor) else ()
    shards = [placement for placement in placements if not placement.is_replicate()]
    return len(shards) == 1 and type(shards[0]).__name__ == "Shard" and shards[0].dim == 0


def plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse a DTensor, whose shards the kernels can't address."""
    if not is_dtensor(tensor):
        return
    raise TypeError(
        f"{name} is a DTensor, and the kernels can't address shards of other ranks;"
        f" {_remedies.of_dtensor(name)}"
    )


def tensors(
    embeddings: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, min_classes: int = 2
) -> None:
    """Check types, dtypes, shapes and devices of the three tensors of a loss."""
    if isinstance(labels, torch.Tensor) and labels.dtype in FLOATS and labels.ndim == 2:
        _order(embeddings, weight, labels)
    matrices(embeddings, weight, min_classes)
    num_rows = embeddings.shape[0]
    _row_labels(labels, num_rows, weight.shape[0])
    if labels.device != embeddings.device:
        raise ValueError(
            f"labels are on {labels.device}, embeddings on {embeddings.device};"
            " move the labels with .to(embeddings.device)"
        )


def _row_labels(labels: Any, num_rows: int, num_classes: int) -> None:
    """Check labels (N,); the number of classes is for the advice alone."""
    _labels(labels)
    plain("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(
            f"labels must have an integer dtype, got {labels.dtype} of shape"
            f" {known(labels.shape)}; {_remedies.of_labels_dtype(labels)}"
        )
    if labels.ndim != 1 or labels.shape[0] != num_rows:
        raise ValueError(
            f"labels must have shape ({known(num_rows)},), one class index per row of embeddings,"
            f" got {known(labels.shape)}"
            f"{_remedies.of_labels_shape(labels, num_rows, num_classes)}"
        )


def both_tensors(embeddings: Any, labels: Any) -> None:
    """Check that they are tensors, before shapes are looked at."""
    _tensor("embeddings", embeddings)
    _labels(labels)


def _labels(value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (list, tuple)) and any(isinstance(name, str) for name in value):
            remedy = "; number the class names from 0, and pass a tensor of these numbers"
        else:
            remedy = _remedies.of_type("labels", value)
        raise TypeError(
            f"labels must be a tensor of class indices, got {type(value).__name__}{remedy}"
        )


def _order(embeddings: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """Find labels in another's place, where those given are a floating matrix."""
    for name, tensor in (("embeddings", embeddings), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor):
            continue
        is_column = tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] == 1)
        is_row_per_label = tensor is embeddings and tensor.shape[:1] == labels.shape[:1]
        if is_column and (tensor.dtype in INTEGERS or (tensor.ndim == 1 and is_row_per_label)):
            raise TypeError(
                f"{name} and labels look swapped: {name} has shape {known(tensor.shape)} and"
                f" {tensor.dtype}, labels {known(labels.shape)} and {labels.dtype}; the order is"
                " criterion(embeddings, labels), and (embeddings, weight, labels) for a function"
            )


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}{_remedies.of_type(name, value)}"
        )


def _dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense (strided) tensor, got layout {tensor.layout}; use .to_dense()"
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}"
            + _remedies.of_dtype(name, tensor)
        )


def _matrix(name: str, tensor: Any) -> None:
    _tensor(name, tensor)
    if name == "embeddings" or not is_class_sharded(tensor):
        plain(name, tensor)
    _dense(name, tensor)
    if tensor.ndim != 2:
        is_weight = name == "weight"
        remedy = _remedies.of_weight_shape if is_weight else _remedies.of_embeddings_shape
        raise ValueError(
            f"{name} must have shape {'(C, D)' if is_weight else '(N, D)'}, got"
            f" {known(tensor.shape)}{remedy(tensor.shape)}"
        )


def matrices(embeddings: torch.Tensor, weight: torch.Tensor, min_classes: int = 2) -> None:
    """Check types, dtypes, shapes and devices of embeddings (N, D) and weight (C, D).

    The weight may be a DTensor that is sharded on classes.
    """
    _matrix("embeddings", embeddings)
    _matrix("weight", weight)
    if weight.shape[0] < min_classes:
        raise ValueError(
            f"weight must have C >= {min_classes} rows (classes), got {known(weight.shape[0])}"
        )
    if weight.shape[1] < 1:
        raise ValueError("embeddings and weight must have D >= 1 columns, got D = 0")
    if embeddings.shape[1] != weight.shape[1]:
        (num_classes, dim), given = known(weight.shape), known(embeddings.shape[1])
        raise ValueError(
            f"embeddings have D = {given} columns but weight has C, D = {num_classes}, {dim};"
            f" {_remedies.of_columns(given, num_classes, dim)}"
        )
    if weight.dtype not in (torch.float32, torch.float64, embeddings.dtype):
        raise TypeError(
            f"weight is {weight.dtype} but embeddings are {embeddings.dtype}; weight must be fp32,"
            " fp64 or the embeddings' dtype: keep the loss in fp32 with criterion.float(), or"
            " weight.float() for a function"
        )
    if embeddings.device != weight.device:
        if weight.device.type == "meta":
            remedy = "criterion.to_empty(device=...) and criterion.reset_parameters() make it real"
        else:
            remedy = "move one, criterion.to(embeddings.device) or embeddings.to(weight.device)"
        raise ValueError(
            f"embeddings are on {embeddings.device}, weight on {weight.device}; {remedy}"
        )
    if embeddings.device.type == "meta":
        raise ValueError(
            "embeddings and weight are on the meta device, where there are no numbers to compute"
            " with; criterion.to_empty(device=...) and criterion.reset_parameters() make real"
            " weights, for embeddings of a model that is real too"
        )


def class_weights(weight: torch.Tensor) -> None:
    """Check the one argument of a regulariser, (C, D)."""
    _tensor("weight", weight)
    if is_dtensor(weight):
        raise TypeError(
            "weight is a DTensor, whose classes are on several ranks; a regulariser compares all of"
            " them: pass criterion.weight.full_tensor(), through which gradients reach the shards"
        )
    _dense("weight", weight)
    if weight.ndim != 2:
        raise ValueError(
            f"weight must have shape (C, D), a row per class, got {known(weight.shape)}"
        )
    if weight.shape[0] < 2:
        raise ValueError(
            f"weight must have C >= 2 rows (classes) to compare, got {known(weight.shape[0])} from"
            f" shape {known(weight.shape)}; a weight of shape (D, C) needs .t()"
        )
    if weight.shape[1] < 1:
        raise ValueError("weight must have D >= 1 columns, got D = 0; check embedding_size")


def label_range(labels: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Check values of labels (N,), int64; on a GPU that synchronises."""
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        value = int(labels[row])
        lowest, highest = labels[labels != ignore_index].aminmax()
        if lowest >= 1 and highest == num_classes:
            remedy = "pass labels - 1 if they start at 1, else "
        elif value < 0 and bool((labels[wrong] == value).all()):
            # of every call, as compat.pml takes no ignore_index
            left_out = f"labels.masked_fill(labels == {value}, {ignore_index})"
            remedy = f"pass {left_out} to leave such rows out, else "
        else:
            remedy = ""
        raise ValueError(
            f"labels must be in [0, {num_classes}) or the ignored label, {ignore_index}, but"
            f" labels[{row}] is {value} ({int(wrong.sum())} such labels);"
            f" {remedy}remap the labels or give the loss as many classes as there are"
        )


def backend(name: str, device: torch.device) -> str:
    """Resolve ``backend`` for tensors on ``device``; a request that can't be met raises."""
    choice("backend", name, BACKENDS)
    if name == "reference":
        return name
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"backend={name!r} has no kernels for device {device}; kernels exist for CPU and"
            ' CUDA/ROCm tensors, and backend="reference" runs on any device'
        )
    if name == "cpu" and device.type == "cuda":
        raise ValueError(
            f'backend="cpu" takes CPU tensors, got tensors on {device}; use backend="auto",'
            ' "triton" or "reference"'
        )
    if name == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            'backend="triton" got CPU tensors; move them to a GPU, or set TRITON_INTERPRET=1'
            ' before importing fused_margin to debug kernels on a CPU, or use backend="auto",'
            ' "cpu" or "reference"'
        )
    resolved = name if name != "auto" else ("triton" if device.type == "cuda" else "cpu")
    if resolved == "triton" and not has_triton():
        user = "tensors on a GPU need" if device.type == "cuda" else 'backend="triton" needs'
        raise ValueError(
            f'{user} Triton, which is not installed; {get_triton()}, or use backend="reference"'
        )
    return resolved


def scale(value: Any, device: torch.device) -> float | torch.Tensor:
    """Check the scale: a number > 0, or a 0-d floating tensor on the embeddings' device."""
    if isinstance(value, torch.Tensor):
        plain("scale", value)
        floating_numbers("scale", value)
        if value.ndim != 0:
            remedy = "use .squeeze()" if value.numel() == 1 else "all rows share one scale"
            raise ValueError(
                f"a tensor scale must be 0-d, got shape {known(value.shape)}; {remedy}"
            )
        if value.device != device:
            raise ValueError(f"scale is on {value.device}, embeddings on {device}; move the scale")
        if _transforms.is_readable(value):
            positive_scale(value.detach().item())
        return value
    return _scale_number(value)


def _scale_number(value: Any, kinds: str = "a number or a 0-d tensor") -> float:
    if value is None:
        remedy = "; functional.fixed_adacos_scale(num_classes) is a choice"
    else:
        remedy = "; all rows share one scale" if _remedies.holds_several(value) else ""
    number = _real("scale", value, kinds, remedy)
    # plain comparisons: Dynamo can trace them on a symbolic float, and not math.isfinite
    if not 0 < number <= LARGEST_SCALE:
        raise ValueError(f"scale must be finite in fp32 and > 0, got {known(number)}")
    return number


def positive_scale(value: float) -> float:
    """Check the value of a tensor scale, where reading it costs no synchronisation."""
    if not 0.0 < value <= LARGEST_SCALE:
        raise ValueError(
            f"scale must be finite in fp32 and > 0, got {value}; keep a learnable scale positive:"
            " a module's by criterion.scale.data.clamp_(min=1.0) after each step, or by a lower"
            " learning rate; a function's as log_scale.exp() is"
        )
    return value


def _no_tensor(name: str, value: Any, remedy: str = "") -> None:
    """Refuse a tensor as a module's number, where a parameter would become part of its state."""
    if isinstance(value, torch.Tensor):
        remedy = remedy or "; a tensor, for one that is learnable, goes to the functional form"
        raise TypeError(
            f"{name} must be a number, got {_shown(value)}; a module takes its {name} as a number,"
            f" float({name}){remedy}"
        )


def between(name: str, value: Any, lowest: float, highest: float, hint: str = "") -> float:
    """Check a number within bounds, which both belong to them."""
    number = _real(name, value, "a number")
    if not lowest <= number <= highest:
        raise ValueError(
            f"{name} must be in [{lowest:g}, {highest:g}], got {known(number)}"
            + (f"; {hint}" if hint else "")
        )
    return number


def optional(name: str, value: Any) -> float | None:
    """Check None or a number >= 0."""
    return None if value is None else between(name, value, 0.0, LARGEST_SCALE)


def positive(name: str, value: Any) -> float:
    """Check a number > 0 that is finite in fp32."""
    number = _real(name, value, "a number")
    if not 0 < number <= LARGEST_SCALE:
        raise ValueError(f"{name} must be finite in fp32 and > 0, got {known(number)}")
    return number


def increasing(lower: str, low: float, upper: str, high: float) -> None:
    """Check two numbers of which one bounds the other."""
    if not low < high:
        raise ValueError(
            f"{lower} must be below {upper}, got {lower}={known(low)}, {upper}={known(high)}"
        )


def ordered(lower: str, low: float, upper: str, high: float) -> None:
    """Check two numbers of which one is no more than the other."""
    if low > high:
        raise ValueError(
            f"{lower} must be at most {upper}, got {lower}={known(low)}, {upper}={known(high)}"
        )


def keywords(given: Collection[str], allowed: Collection[str], call: Callable[..., Any]) -> None:
    """Refuse a keyword that is no option of a loss, as Python does for an argument.

    ``call``: the function or class that was given it, whose arguments the message lists.
    """
    unknown = [name for name in given if name not in allowed]
    if unknown:
        meant = _names.hints(unknown, call)
        raise TypeError(
            f"{call.__name__} got an unexpected keyword argument {unknown[0]!r}"
            + (f"; {meant}{'' if meant.endswith('?') else '.'} It" if meant else "; it")
            + f" takes {', '.join(inspect.signature(call).parameters)}"
        )


def floating_numbers(name: str, value: torch.Tensor) -> torch.Tensor:
    """Check that a tensor is floating."""
    if value.dtype not in FLOATS:
        raise TypeError(
            f"a tensor {name} must be floating, got {value.dtype}" + _remedies.of_dtype(name, value)
        )
    return value


def numbers_per(name: str, value: Any, unit: str, count: Any, device: torch.device) -> torch.Tensor:
    """Check one floating number for each row, or for each class."""
    _tensor(name, value)
    plain(name, value)
    floating_numbers(name, value)
    if value.ndim != 1 or value.shape[0] != count:
        remedy = "; use .flatten()" if value.ndim != 1 and value.numel() == count else ""
        raise ValueError(
            f"{name} must have shape ({known(count)},), one number per {unit}, got"
            f" {known(value.shape)}{remedy}"
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, embeddings on {device}; move the {name}")
    return value


def size(name: str, value: int, minimum: int) -> int:
    """Check a dimension."""
    value = _integer(name, value, remedy=_remedies.of_size(name, value))
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}{_remedies.of_small_size(name)}")
    if value >= 2**63:
        raise ValueError(f"{name} must fit in int64, got {value}")
    return value


def at_most(name: str, value: int, limit: int, meaning: str = "") -> int:
    """Check an integer against what it can't exceed."""
    if value > limit:
        of_limit = f", {meaning};" if meaning else ","
        raise ValueError(f"{name} must be at most {limit}{of_limit} got {value}")
    return value


def ignore_index(value: int) -> int:
    """Check that ignore_index is an int of 64 bits, as labels are."""
    value = _integer("ignore_index", value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit in int64, as labels do, got {known(value)}")
    return value


def memory_budget(value: int | None) -> int | None:
    """Bytes, or None for the default."""
    if value is None:
        return None
    remedy = "; 1 GiB is 1 << 30" if isinstance(value, str) else ""
    value = _integer("memory_budget", value, "a whole number of bytes or None", remedy)
    if value < 0:
        raise ValueError(
            f"memory_budget must be >= 0 bytes, got {known(value)}; None stands for the default"
        )
    return min(value, 2**63 - 1)  # what the operator's schema holds


def flag(name: str, value: Any) -> bool:
    """Check True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return value


def smoothing(value: Any) -> float:
    """Check what label smoothing takes from the target: in [0, 1]."""
    return between("label_smoothing", value, 0.0, 1.0)


def negatives(value: Any) -> Any:
    """Check what becomes of other classes: None, or one of `fused_margin.negatives`."""
    if value is not None and not hasattr(value, "thresholds"):
        raise TypeError(
            "negatives must be one of fused_margin.negatives, as"
            f" fm.negatives.filtered(0.4), or None, got {_shown(value)}"
        )
    return value


def centers(num_rows: int, sub_centers: int) -> int:
    """The number of classes that so many rows of weights make."""
    if sub_centers == 1:
        return num_rows
    if num_rows % sub_centers or num_rows < 2 * sub_centers:
        raise ValueError(
            f"weight must have sub_centers = {sub_centers} rows for each of at least two classes,"
            f" one class after the other, got {known(num_rows)} rows"
        )
    return num_rows // sub_centers


def fixed_adacos_classes(num_classes: int, name: str = "Fixed AdaCos") -> int:
    """Check that sqrt(2) ln(C - 1) is positive."""
    num_classes = _integer("num_classes", num_classes)
    if num_classes < 3:
        raise ValueError(
            f"{name} needs C >= 3 classes, got {known(num_classes)}: its scale"
            " sqrt(2) * ln(C - 1) is 0 for C = 2, which gives no gradient; use"
            " NormalizedSoftmaxLoss with a scale of your choice"
        )
    return num_classes
