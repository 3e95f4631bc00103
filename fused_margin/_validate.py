"""Every ValueError and TypeError of the public functions, with the remedy in the message."""

from __future__ import annotations

import importlib.util
import math
import os

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")
REDUCTIONS = ("mean", "sum", "none")
BOUNDARIES = ("linear", "continuous", "none")
GRADS = ("exact", "straight_through")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip

# Read once: Triton decides at decoration time whether a kernel is interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def checks_labels_on_gpu() -> bool:
    """Whether FUSED_MARGIN_CHECK_LABELS=1 asks for a synchronising label check on a GPU."""
    return os.environ.get("FUSED_MARGIN_CHECK_LABELS", "0") == "1"


def tunes_on_demand() -> bool:
    """Whether FUSED_MARGIN_TUNE asks for tuning inside the first call."""
    return os.environ.get("FUSED_MARGIN_TUNE", "") not in ("", "0")


def has_triton() -> bool:
    """Whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Check that ``value`` is one of ``allowed``."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}; got {value!r}")
    return value


def _is_distributed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def tensors(embeddings: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """Check types, dtypes, shapes and devices of the three tensors of a loss."""
    matrices(embeddings, weight)
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor of class indices, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        remedy = "turn one-hot targets into indices with .argmax(1)" if labels.ndim == 2 else ""
        raise TypeError(
            f"labels must have an integer dtype, got {labels.dtype}; {remedy or 'use .long()'}"
        )
    if labels.ndim != 1 or labels.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"labels must have shape ({embeddings.shape[0]},), one class index per row of"
            f" embeddings, got {tuple(labels.shape)}"
            + ("; use .squeeze(1), or .argmax(1) for one-hot targets" if labels.ndim == 2 else "")
        )
    if labels.device != embeddings.device:
        raise ValueError(
            f"labels are on {labels.device}, embeddings on {embeddings.device};"
            " move the labels with .to(embeddings.device)"
        )


def matrices(embeddings: torch.Tensor, weight: torch.Tensor) -> None:
    """Check types, dtypes, shapes and devices of embeddings (N, D) and weight (C, D)."""
    for name, tensor in (("embeddings", embeddings), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(tensor).__name__}; torch.as_tensor converts"
                " arrays and lists"
            )
        if _is_distributed(tensor):
            raise TypeError(
                f"{name} is a DTensor, whose shards the kernels cannot address; pass a plain"
                " tensor (.full_tensor(), or keep the loss outside of the sharded module)"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}; cast with .float()"
            )
        if tensor.ndim != 2:
            shape = "(N, D)" if name == "embeddings" else "(C, D)"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if weight.shape[0] < 2:
        raise ValueError(f"weight must have C >= 2 rows (classes), got {weight.shape[0]}")
    if weight.shape[1] < 1:
        raise ValueError("embeddings and weight must have D >= 1 columns, got D = 0")
    if embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings have D = {embeddings.shape[1]} columns but weight has D ="
            f" {weight.shape[1]}; "
            + (
                "weight is (C, D), so pass its transpose, weight.t()"
                if weight.shape[0] == embeddings.shape[1]
                else f"build the loss with embedding_size={embeddings.shape[1]}"
            )
        )
    if weight.dtype not in (torch.float32, torch.float64, embeddings.dtype):
        raise TypeError(
            f"weight is {weight.dtype} but embeddings are {embeddings.dtype}; weight must be fp32,"
            " fp64 or the embeddings' dtype: keep the loss in fp32 with criterion.float()"
        )
    if embeddings.device != weight.device:
        raise ValueError(
            f"embeddings are on {embeddings.device}, weight on {weight.device}; move the loss"
            " with .to(embeddings.device)"
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
        raise ValueError(
            'tensors on a GPU need Triton, which is not installed; run "pip install triton", or'
            ' use backend="reference"'
        )
    return resolved


def scale(value: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """Check the scale: a number > 0, or a 0-d floating tensor on the embeddings' device."""
    if isinstance(value, torch.Tensor):
        if value.ndim != 0 or value.dtype not in FLOATS:
            raise ValueError(
                "a tensor scale must be 0-d and floating, got shape"
                f" {tuple(value.shape)} and {value.dtype}"
            )
        if value.device != device:
            raise ValueError(f"scale is on {value.device}, embeddings on {device}; move the scale")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scale must be a number or a 0-d tensor, got {type(value).__name__}")
    # plain comparisons: Dynamo can trace them on a symbolic float, and not math.isfinite
    if not 0 < value < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {value}")
    return float(value)


def positive_scale(value: float) -> float:
    """Check the value of a tensor scale, where reading it costs no synchronisation."""
    if not value > 0.0:
        raise ValueError(f"scale must be > 0, got {value}; keep a learnable scale positive")
    return value


def _margin(
    value: float | torch.Tensor, embeddings: torch.Tensor | None, unit: str
) -> float | torch.Tensor:
    if isinstance(value, torch.Tensor) and embeddings is not None:
        if value.dtype not in FLOATS:
            raise TypeError(f"a tensor margin must be floating, got {value.dtype}")
        if value.shape != embeddings.shape[:1]:
            raise ValueError(
                f"a tensor margin must have shape ({embeddings.shape[0]},), one {unit} per row,"
                f" got {tuple(value.shape)}; pass a single margin as a float"
            )
        if value.device != embeddings.device:
            raise ValueError(
                f"margin is on {value.device}, embeddings on {embeddings.device}; move the margin"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kinds = "a number" if embeddings is None else "a number or an (N,) tensor"
        raise TypeError(f"margin must be {kinds}, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"margin must be finite, got {value}")
    return float(value)


def _largest(margin: float | torch.Tensor) -> float:
    """The margin largest in magnitude; 0 where reading a tensor would cost a synchronisation."""
    if not isinstance(margin, torch.Tensor):
        return margin
    is_readable = margin.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_readable or margin.numel() == 0:
        return 0.0
    margin = margin.detach()
    return round(margin[margin.abs().argmax()].item(), 6)


def angular_margin(
    value: float | torch.Tensor, embeddings: torch.Tensor | None = None
) -> float | torch.Tensor:
    """Check ArcFace's margin, in radians; only a functional call may pass an (N,) tensor."""
    value = _margin(value, embeddings, "angle in radians")
    largest = _largest(value)
    if abs(largest) > math.pi:
        raise ValueError(
            f"margin is an angle in radians, at most pi; got {largest}. If that is in degrees,"
            f" pass math.radians({largest:g}) = {math.radians(largest):.4g}"
        )
    return value


def cosine_margin(
    value: float | torch.Tensor, embeddings: torch.Tensor | None = None
) -> float | torch.Tensor:
    """Check CosFace's margin, a cosine offset; only a functional call may pass an (N,) tensor."""
    value = _margin(value, embeddings, "cosine offset")
    largest = _largest(value)
    if abs(largest) > 2.0:
        raise ValueError(
            f"CosFace's margin is an offset of the cosine, at most 2; got {largest} (0.35 is usual)"
        )
    return value


def size(name: str, value: int, minimum: int) -> int:
    """Check a module's dimension."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    return value


def ignore_index(value: int) -> int:
    """Check that ignore_index is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    return value


def memory_budget(value: int | None) -> int | None:
    """Bytes, or None for the default."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"memory_budget must be a whole number of bytes or None, got {type(value).__name__}"
        )
    if value < 0:
        raise ValueError(
            f"memory_budget must be >= 0 bytes, got {value}; None stands for the default"
        )
    return min(value, 2**63 - 1)  # what the operator's schema holds


def fixed_adacos_classes(num_classes: int) -> int:
    """Check that sqrt(2) ln(C - 1) is positive."""
    if num_classes < 3:
        raise ValueError(
            f"Fixed AdaCos needs C >= 3 classes, got {num_classes}: its scale sqrt(2) * ln(C - 1)"
            " is 0 for C = 2, which gives no gradient; use NormalizedSoftmaxLoss with a scale of"
            " your choice"
        )
    return num_classes
