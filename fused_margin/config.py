"""`show_config`: the text to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from fused_margin import _cpu, _validate
from fused_margin._version import __version__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["none"]
    return [
        f"cuda:{index} {torch.cuda.get_device_name(index)},"
        f" capability {'.'.join(map(str, torch.cuda.get_device_capability(index)))}"
        for index in range(torch.cuda.device_count())
    ]


def _choice(device: str) -> str:
    try:
        return _validate.backend("auto", torch.device(device))
    except ValueError as error:
        return f"error: {error}"


def show_config() -> None:
    """Print versions, devices, backends, and what each kind of call would use."""
    yes_no = {True: "yes", False: "no"}
    bf16 = "bf16 instructions" if _cpu.has_bf16_products() else "no bf16 instructions"
    build = torch.version.cuda or torch.version.hip or "none (CPU build)"
    triton_cpu = "interpreted" if _validate.INTERPRETED else "GPU tensors only"
    lines = [
        f"fused_margin     {__version__}",
        f"python           {platform.python_version()} on {platform.platform()}",
        f"torch            {torch.__version__}, CUDA/ROCm {build}",
        f"triton           {_version('triton')}",
        f"numpy            {_version('numpy')}",
        f"cpu              {torch.backends.cpu.get_cpu_capability()}, {bf16},"
        f" {torch.get_num_threads()} threads",
        f"gpu              {'; '.join(_devices())}",
        f"matmul precision {torch.get_float32_matmul_precision()}"
        " (fp32 products on a GPU: highest = IEEE, else TF32)",
        "backends         reference (any device), cpu (CPU tensors), triton"
        f" ({triton_cpu}; installed: {yes_no[_validate.has_triton()]})",
        f"auto, cpu        {_choice('cpu')}",
        f"auto, cuda       {_choice('cuda')}",
        f"label check      {yes_no[_validate.checks_labels_on_gpu()]} on a GPU"
        " (FUSED_MARGIN_CHECK_LABELS=1 turns it on)",
    ]
    print("\n".join(lines))
