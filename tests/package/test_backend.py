"""Which backend is taken, and what each refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import FUSED_BACKENDS, device_of

import fused_margin.functional as fmf
from fused_margin import _validate, tuning

X, W = torch.randn(4, 6), torch.randn(5, 6)
LABELS = torch.tensor([0, 4, 2, 2])


def test_tuning_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda:1' but torch\.cuda\.is_available\(\) is f"):
        tuning.tune(512, 100, 8, device="cuda:1")


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    device = device_of(backend)
    x, w, labels = (part.to(device) for part in (X, W, LABELS))
    x = x.detach().requires_grad_()
    scale = torch.tensor(9.0, device=device, requires_grad=True)
    for loss in (
        fmf.arcface(x, w, labels, backend=backend),
        fmf.arcface(x, w, labels, scale=scale, backend=backend),
        fmf.cosine_lse(x, w, labels, 9.0, backend=backend)[0].sum(),
    ):
        (d_x,) = torch.autograd.grad(loss, x, create_graph=True)
        assert d_x.requires_grad
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            d_x.square().sum().backward()


def test_cpu_backend_refuses_gpu_tensors() -> None:
    with pytest.raises(ValueError, match=r'backend="cpu" takes CPU tensors, got .* on cuda:1'):
        _validate.backend("cpu", torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("platform", "hip", "remedy"),
    [
        ("linux", None, 'run: pip install "fused-margin[triton]"'),
        ("linux", "7.1", "a ROCm build of torch brings its own: install torch again"),
        ("win32", None, "wheels for Linux only"),
    ],
)
def test_without_triton(
    monkeypatch: pytest.MonkeyPatch, platform: str, hip: str | None, remedy: str
) -> None:
    """A second Triton must not be laid over ROCm's, and elsewhere the extra has the version."""
    monkeypatch.setattr(_validate, "has_triton", lambda: False)
    monkeypatch.setattr(_validate.sys, "platform", platform)
    monkeypatch.setattr(torch.version, "hip", hip)
    for name in ("auto", "triton"):
        with pytest.raises(ValueError, match=r'^tensors on a GPU.*or use backend="reference"') as e:
            _validate.backend(name, torch.device("cuda"))
        assert remedy in str(e.value)
    assert _validate.backend("reference", torch.device("cuda")) == "reference"
    monkeypatch.setattr(_validate, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r'^backend="triton" needs Triton, which is not installed'):
        _validate.backend("triton", torch.device("cpu"))


def test_triton_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in each call: torch 2.11's Dynamo can't trace the search."""

    def refuse(name: str) -> None:
        raise AssertionError(f"searched for {name}")

    expected = _validate.has_triton()
    monkeypatch.setattr("importlib.util.find_spec", refuse)
    assert _validate.has_triton() is expected


def test_triton_refuses_cpu_tensors_when_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"CPU tensors.*TRITON_INTERPRET=1"):
        fmf.arcface(X, W, LABELS, backend="triton")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cpu", "cpu"), ("cpu", "cpu", "cpu"), ("auto", "cuda", "triton"),
        ("triton", "cuda", "triton"), ("reference", "cuda", "reference"),
        ("reference", "meta", "reference"),
    ],
)  # fmt: skip
def test_resolution(monkeypatch: pytest.MonkeyPatch, name: str, device: str, expected: str) -> None:
    monkeypatch.setattr(_validate, "has_triton", lambda: True)
    assert _validate.backend(name, torch.device(device)) == expected
