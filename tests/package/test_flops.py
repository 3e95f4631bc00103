"""What torch's tools see of the operators: flops and names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import CPU_BACKENDS, device_of, needs_triton
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin._cpu import sweep

N, C, D = 9, 41, 5


def _products(call: object) -> float:
    """Flops of ``call`` in products of N x C x D."""
    with FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return counter.get_total_flops() / (2 * N * C * D)


def _leaves(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(N, D, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(C, D, dtype=dtype, device=device, requires_grad=True)
    return x, w, torch.randint(C, (N,), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("cosines", "expected"), [(None, 3.0), (N * C, 3.0), (N * C - 1, 4.0), (0, 4.0)]
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cpu(backend: str, cosines: int | None, expected: float, dtype: torch.dtype) -> None:
    """What the forward keeps is not formed again; the budget is for ``cosines`` of them."""
    x, w, labels = _leaves(torch.device(backend), dtype)
    budget = None if cosines is None else cosines * dtype.itemsize

    def step() -> None:
        fmf.arcface(x, w, labels, memory_budget=budget).backward()

    assert _products(step) == expected
    assert _products(lambda: fmf.arcface(x, w, labels)) == 1.0
    assert _products(lambda: fmf.arcface(x.detach(), w, labels).backward()) == 2.0
    lse_scale = torch.tensor(9.0, requires_grad=True)
    assert _products(
        lambda: fmf.cosine_lse(x.detach(), w.detach(), labels, lse_scale)[0].sum().backward()
    ) == pytest.approx(2.0)


@pytest.mark.cpu_blocks
def test_cpu_that_keeps_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, 10)
    x, w, labels = _leaves(torch.device("cpu"))

    def step() -> None:
        fmf.arcface(x, w, labels, memory_budget=20 * N * 4).backward()

    assert _products(step) == pytest.approx(3.0 + 21 / 41, abs=1e-3)


@needs_triton
@pytest.mark.parametrize(
    ("strategy", "expected"), [("chunked", 4.0), ("fused", 5.0), ("kept", 3.0)]
)
def test_triton(strategy: str, expected: float) -> None:
    from fused_margin._triton import planning

    x, w, labels = _leaves(device_of("triton"))
    if strategy == "fused":
        torch.set_float32_matmul_precision("high")  # IEEE fp32 has no fused tiles
    try:
        with planning.override(strategy):
            products = _products(lambda: fmf.arcface(x, w, labels, backend="triton").backward())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert products == expected


@needs_triton
def test_triton_with_a_budget_that_does_not_suffice() -> None:
    """Nothing is kept, and the products are those of a call without a budget."""
    x, w, labels = _leaves(device_of("triton"))

    def products(budget: int | None) -> float:
        return _products(
            lambda: fmf.arcface(x, w, labels, backend="triton", memory_budget=budget).backward()
        )

    assert products(1) == products(None) > products(1 << 20) == 3.0


def test_regularizer() -> None:
    w = torch.randn(C, D)
    with FlopCounterMode(display=False) as counter:
        fm.regularizers.regular_face(w)
    assert counter.get_total_flops() == C * C * D


@pytest.mark.parametrize("first", ["fused_margin", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    second = {"fused_margin", "torch.utils.flop_counter"} - {first}
    code = f"""
import sys, torch
import {first}
if "{first}" == "fused_margin":
    assert "torch.utils.flop_counter" not in sys.modules
import {second.pop()}
import fused_margin, torch.utils.flop_counter
before = len(sys.meta_path)
import importlib
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    fused_margin.functional.fixed_adacos(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))
assert counter.get_total_flops() == 48, counter.get_total_flops()
assert not any(type(finder).__module__.startswith("fused_margin") for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_names_in_a_profile() -> None:
    x, w, labels = _leaves(torch.device("cpu"))
    with profile(acc_events=True) as seen:
        fmf.arcface(x, w, labels).backward()
    names = {event.key for event in seen.key_averages()}
    assert {"fused_margin::margin_ce", "fused_margin::cosine_lse_backward"} <= names
