"""The same losses and gradients as pytorch-metric-learning, on the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import BACKENDS, device_of
from pytorch_metric_learning import losses as peers

import fused_margin as fm

ROWS, CLASSES, DIM = 24, 60, 16
PAIRS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[str], torch.nn.Module]]] = {
    "arcface": (
        lambda: peers.ArcFaceLoss(CLASSES, DIM),  # its margin, 28.6, is in degrees
        lambda backend: fm.ArcFaceLoss(CLASSES, DIM, math.radians(28.6), 64.0, backend=backend),
    ),
    "arcface-large": (
        lambda: peers.ArcFaceLoss(CLASSES, DIM, margin=80, scale=16),
        lambda backend: fm.ArcFaceLoss(CLASSES, DIM, math.radians(80), 16.0, backend=backend),
    ),
    "cosface": (
        lambda: peers.CosFaceLoss(CLASSES, DIM),
        lambda backend: fm.CosFaceLoss(CLASSES, DIM, backend=backend),
    ),
    "normalized_softmax": (
        lambda: peers.NormalizedSoftmaxLoss(CLASSES, DIM, temperature=0.05),
        lambda backend: fm.NormalizedSoftmaxLoss(CLASSES, DIM, 20.0, backend=backend),
    ),
}


def _value_and_gradients(
    criterion: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    loss = criterion(x, labels)
    d_x, d_w = torch.autograd.grad(loss, (x, weight))
    return loss.detach().cpu(), d_x.cpu(), d_w.cpu()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_metric_learning(
    backend: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    make_peer, make_ours = PAIRS[name]
    peer, ours = make_peer(), make_ours(backend).to(device_of(backend))
    labels = torch.randint(CLASSES, (ROWS,))
    weight = torch.randn(CLASSES, DIM, dtype=dtype)
    x = torch.randn(ROWS, DIM, dtype=dtype) + 0.7 * weight[labels]
    x[:4] = torch.randn(4, DIM, dtype=dtype) - weight[labels[:4]]  # past theta + m = pi, some
    assert isinstance(peer.W, torch.nn.Parameter)
    peer.W.data = weight.t().contiguous()  # (D, C)
    assert isinstance(ours.weight, torch.nn.Parameter)
    ours.weight.data = weight.to(device_of(backend))

    expected, peer_d_x, peer_d_w = _value_and_gradients(peer, x, labels, peer.W)
    device = device_of(backend)
    actual, d_x, d_w = _value_and_gradients(ours, x.to(device), labels.to(device), ours.weight)
    assert actual.dtype is dtype
    assert float((actual - expected).abs()) <= tolerance * float(expected)
    assert float((d_x - peer_d_x).norm()) <= tolerance * float(peer_d_x.norm())
    assert float((d_w - peer_d_w.t()).norm()) <= tolerance * float(peer_d_w.norm())
