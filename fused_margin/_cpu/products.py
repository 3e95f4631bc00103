"""Products of matrices: in which dtype, and by which of torch's routes."""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import torch

# Cosines are formed in units of log2(e), for exp2: torch's exp takes three times as long.
LOG2_E = 1.0 / math.log(2.0)


def _onednn(name: str) -> Any:
    """One of oneDNN's operators in torch, or None in a build without it (as for Apple's CPUs)."""
    return getattr(torch.ops.mkldnn, name, None)


def _asks(owner: Any, name: str) -> bool:
    """The answer of a private function of torch, False where there is none to ask."""
    question = getattr(owner, name, None)
    return question is not None and bool(question())


def product_dtype(compute_dtype: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """bf16 where asked for and the CPU has instructions for it, else the accumulation dtype.

    fp16 is computed in fp32, which is both exact for fp16 inputs and faster on today's CPUs.
    """
    if compute_dtype is torch.bfloat16 and accumulate is torch.float32 and has_bf16_products():
        return torch.bfloat16
    return accumulate


@functools.cache  # each product asks
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, and torch makes it do so."""
    if not _asks(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    # oneDNN's own answer is about hardware products, but for x86, where it emulates them
    return not capability.startswith("AVX") or _asks(torch.cpu, "_is_avx512_bf16_supported")


def _multiplies_fp32_by_onednn() -> bool:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    has_onednn = is_x86 and torch.backends.mkldnn.is_available()
    return has_onednn and _onednn("_linear_pointwise") is not None


MULTIPLIES_FP32_BY_ONEDNN = _multiplies_fp32_by_onednn()


def multiply_transposed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A b^T in ``out``, or in memory of its own.

    Args:
        a: (M, K). b: (N, K). out: (M, N), which may stay unwritten.
    """
    if MULTIPLIES_FP32_BY_ONEDNN and a.dtype is torch.float32 and out.numel() and a.numel():
        # IEEE fp32 as `mm`, which asks MKL: on AMD's CPUs 5 to 10 % slower
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t(), out=out)
