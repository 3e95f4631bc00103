"""Criteria, batches and training of the tests of `SGDInBackward`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FUSED_BACKENDS, device_of

import fused_margin as fm

Tensor = torch.Tensor
CLASSES, DIM, ROWS = 70, 12, 9
STEPS, FEW_STEPS = 20, 3  # few in the interpreter
MOMENTUM: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
each_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several chunks of classes in the kernels, the last of them shorter."""
    if "triton" in request.node.name:
        from fused_margin._triton import launch

        monkeypatch.setattr(launch, "CHUNK_BYTES", 33 * 8 * 16)


def criterion_of(backend: str = "auto", kind: Any = fm.ArcFaceLoss, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "device": device_of(backend)} | options
    return kind(CLASSES, DIM, backend=backend, **options)


def batches(device: torch.device, dtype: torch.dtype, count: int = STEPS) -> Any:
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        rows = ROWS if step % 5 else ROWS - 2
        x = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        labels[1] = -100 if step % 3 else labels[0]
        yield x.to(device, dtype).requires_grad_(), labels.to(device)


def train(criterion: Any, optimizer: Any, count: int = STEPS, **call: Any) -> list[Tensor]:
    """Train; returns the weights and each step's gradient of the embeddings."""
    found = []
    dtype = criterion.weight.dtype
    for x, labels in batches(criterion.weight.device, dtype, count):
        loss = criterion(x, labels, **call)
        (loss if isinstance(loss, Tensor) else loss[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert x.grad is not None
        found.append(x.grad)
    return [criterion.weight.detach(), *found]


def loss_of_a_batch(criterion: Any) -> Tensor:
    x, labels = next(batches(criterion.weight.device, criterion.weight.dtype))
    return criterion(x, labels)


def has_gradient(criterion: Any) -> bool:
    return bool(criterion.weight.grad.abs().max() > 0)
