"""`show_config`: the text to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from fused_margin import _cpu, _validate
from fused_margin._version import __version__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _ptxas_version(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(r"release \d+\.\d+, V([\d.]+)", done.stdout)
    return None if found is None else found[1]


def _assembler(name: str) -> str:
    """The version and place of NVIDIA's assembler that Triton runs, found as Triton finds it."""
    spec = importlib.util.find_spec("triton")  # which doesn't import it
    if spec is None or spec.origin is None:
        return "none: Triton is not installed"
    variable = f"TRITON_{name.upper().replace('-', '_')}_PATH"
    bundled = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)
    asked, note = os.environ.get(variable), ""
    if asked is not None:
        version = _ptxas_version(asked)
        if version is not None:
            return f"{name} {version}, {asked} ({variable})"
        note = f"; {variable}={asked} is not one"
    version = _ptxas_version(bundled)
    return f"{name} {version}, {bundled}{note}" if version else f"no {name} in Triton{note}"


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
    capability = torch.backends.cpu.get_cpu_capability()
    bf16 = "bf16 instructions" if _cpu.has_bf16_products() else "no bf16 instructions"
    build = torch.version.cuda or torch.version.hip or "none (CPU build)"
    precision = torch.backends.cuda.matmul.fp32_precision
    triton_use = "not installed"
    if _validate.has_triton():
        triton_use = "CPU tensors, interpreted" if _validate.INTERPRETED else "GPU tensors"
    on_gpu = "on" if _validate.checks_labels_on_gpu() else "off"
    rows = {
        "fused_margin": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA/ROCm {build}",
        "triton": _version("triton"),
        "assembler": _assembler("ptxas"),
        "from sm_100 on": _assembler("ptxas-blackwell"),
        "numpy": _version("numpy"),
        "cpu": f"{capability}, {bf16}, {torch.get_num_threads()} threads",
        "gpu": "; ".join(_devices()),
        "matmul precision": f"{precision} (fp32 products on a GPU: tf32 = TF32, else IEEE)",
        "backends": f"reference (any device), cpu (CPU tensors), triton ({triton_use})",
        "auto, cpu": _choice("cpu"),
        "auto, cuda": _choice("cuda") if torch.cuda.is_available() else "no device",
        "label check": f"{on_gpu} on a GPU (FUSED_MARGIN_CHECK_LABELS=1 turns it on)",
    }
    print("\n".join(f"{name:16} {value}" for name, value in rows.items()))
