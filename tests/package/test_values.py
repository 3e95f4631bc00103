"""Numbers of every kind are taken, and values of tensors are looked at where they can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, device_of, needs_triton
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _validate

X, W = torch.randn(4, 6), torch.randn(5, 6)
LABELS = torch.tensor([0, 4, 2, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range_on_every_backend(backend: str) -> None:
    if device_of(backend).type != "cpu":
        pytest.skip("on a GPU a label out of range makes its row NaN (test_gpu.py)")
    for value in (5, -1, -100, 2**40):
        labels = torch.tensor([0, 1, value, 2])
        with pytest.raises(ValueError, match=rf"labels\[2\] is {value} "):
            fmf.arcface(X, W, labels, backend=backend, ignore_index=-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_scale_must_be_positive(backend: str) -> None:
    if device_of(backend).type != "cpu":
        pytest.skip("reading a scale on a GPU would synchronise")
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be finite in fp32 and > 0"):
            fmf.cosine_lse(X, W, LABELS, torch.tensor(value), backend=backend)


INTEGERS: dict[str, Callable[[int], Any]] = {
    "int": int, "np.int64": np.int64, "np.int32": np.int32, "np.ndarray": np.array,
    "tensor": torch.tensor, "tensor (1,)": lambda value: torch.tensor([value]),
}  # fmt: skip
REALS: dict[str, Callable[[float], Any]] = {
    "float": float, "int": int, "np.float64": np.float64, "np.float32": np.float32,
    "np.float16": np.float16, "np.int64": np.int64, "Fraction": Fraction,
}  # fmt: skip


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers(kind: str) -> None:
    """Whatever stands for an integer is one; what is kept is a plain int."""
    of = INTEGERS[kind]
    criterion = fm.FixedAdaCosLoss(
        of(5), of(6), ignore_index=of(-7), memory_budget=of(1 << 20), backend="cpu"
    )
    assert criterion.weight.shape == (5, 6)
    for value in (
        criterion.num_classes, criterion.embedding_size, criterion.ignore_index,
        criterion.memory_budget,
    ):  # fmt: skip
        assert type(value) is int
    labels = torch.tensor([0, 4, -7, 2])
    expected = fmf.fixed_adacos(X, criterion.weight, labels, ignore_index=-7)
    assert torch.equal(criterion(X, labels), expected)
    options = {"ignore_index": of(-7), "memory_budget": of(1 << 20)}
    assert torch.equal(fmf.fixed_adacos(X, criterion.weight, labels, **options), expected)
    fmf.cosine_lse(X, W, LABELS, 9.0, memory_budget=of(1 << 20))
    scale = fmf.fixed_adacos_scale(of(5))
    assert type(scale) is float
    assert scale == math.sqrt(2) * math.log(4)


@pytest.mark.parametrize("kind", REALS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reals(backend: str, kind: str) -> None:
    """Whatever stands for a real number is one; what is kept is a plain float."""
    of, device = REALS[kind], device_of(backend)
    for make in (fm.ArcFaceLoss, fm.CosFaceLoss):
        criterion = make(5, 6, of(1.0), of(32.0), backend=backend).to(device)
        assert type(criterion.margin) is float
        assert type(criterion.scale) is float
        x, labels = X.to(device), LABELS.to(device)
        expected = make(5, 6, 1.0, 32.0, backend=backend).to(device)
        expected.load_state_dict(criterion.state_dict())
        assert torch.equal(criterion(x, labels), expected(x, labels))
    w = W.to(device)
    assert torch.equal(
        fmf.arcface(x, w, labels, of(1.0), of(32.0), backend=backend),
        fmf.arcface(x, w, labels, 1.0, 32.0, backend=backend),
    )
    assert torch.equal(fmf.cosine_logits(x, w, of(32.0)), fmf.cosine_logits(x, w, 32.0))


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)
@pytest.mark.parametrize(
    ("backend", "function"),
    [
        ("reference", fmf.arcface), ("cpu", fmf.arcface), ("cpu", fmf.cosface),
        pytest.param("triton", fmf.arcface, marks=needs_triton),
    ],
)  # fmt: skip
def test_numbers_vary_under_compile(backend: str, function: Callable[..., torch.Tensor]) -> None:
    """Constants in the first graph, then symbols; checked without a graph break."""
    torch._dynamo.reset()
    x, w, labels = (part.to(device_of(backend)) for part in (X, W, LABELS))

    def loss(margin: float, scale: float, ignore_index: int, budget: int) -> torch.Tensor:
        return function(
            x, w, labels, margin, scale,
            ignore_index=ignore_index, memory_budget=budget, backend=backend,
        )  # fmt: skip

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for numbers in ((0.5, 64.0, -100, 5), (0.4, 32.0, -10, 100), (0.3, 16, -7, 9), (1, 8, -3, 0)):
        torch.testing.assert_close(compiled(*numbers), loss(*numbers))


def test_every_int64_is_an_ignore_index() -> None:
    for value in (-(2**63), 2**63 - 1):
        labels = torch.tensor([0, 4, value, 2])
        options: dict[str, Any]
        for options in ({}, {"margin": torch.full((4,), 0.5)}, {"backend": "reference"}):
            loss = fmf.arcface(X, W, labels, ignore_index=value, reduction="none", **options)
            assert loss[2] == 0


@pytest.mark.parametrize("function", [fmf.arcface, fmf.cosface])
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -28.6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_margins_of_ignored_rows_are_not_looked_at(
    backend: str, value: float, labels_dtype: torch.dtype, function: Callable[..., torch.Tensor]
) -> None:
    device = device_of(backend)
    labels = torch.tensor([0, 4, 200, 2], dtype=labels_dtype, device=device)
    parts = []
    for held in (value, 0.5):
        margin = torch.tensor([0.5, 0.1, held, 0.2], device=device).requires_grad_()
        inputs = X.to(device).requires_grad_(), W.to(device).requires_grad_(), margin
        x, w = (part.detach().requires_grad_() for part in inputs[:2])
        loss = function(x, w, labels, margin, ignore_index=200, backend=backend)
        parts.append((loss, *torch.autograd.grad(loss, (x, w, margin))))
    for got, expected in zip(*parts, strict=True):
        assert torch.equal(got, expected)
    assert parts[0][3][2] == 0


def test_uint8_labels_do_not_wrap_to_the_ignore_index() -> None:
    """156 is -100 modulo 256, but no ignored label."""
    w, labels = torch.randn(200, 6), torch.tensor([0, 4, 156, 2], dtype=torch.uint8)
    margin = torch.tensor([0.5, 0.1, math.nan, 0.2])
    with pytest.raises(ValueError, match="margin must be finite, got nan in row 2"):
        fmf.arcface(X, w, labels, margin)


@pytest.mark.parametrize("dtype", _validate.FLOATS, ids=str)
def test_pi_is_a_margin(dtype: torch.dtype) -> None:
    """In fp32, pi is a little above pi."""
    margin = torch.full((4,), math.pi, dtype=dtype)
    fmf.arcface(X, W, LABELS, margin)
    fmf.arcface(X, W, LABELS, margin[0].item())
    with pytest.raises(ValueError, match="at most pi"):
        fmf.arcface(X, W, LABELS, margin + 0.02)


def test_values_are_not_read_from_what_has_none() -> None:
    """vmap, make_fx and fake tensors."""
    scales = torch.tensor([2.0, 4.0])
    mapped = torch.vmap(lambda scale: fmf.cosine_logits(X, W, scale))(scales)
    assert torch.equal(mapped[1], fmf.cosine_logits(X, W, 4.0))

    def loss(scale: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        return fmf.arcface(X, W, LABELS, margin, scale, backend="cpu")

    margin = torch.full((4,), 0.5)
    traced = make_fx(lambda margin: loss(scales[1], margin))(margin)
    torch.testing.assert_close(traced(margin), loss(scales[1], margin))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(scales[1]), mode.from_tensor(margin)).shape == ()


@pytest.mark.parametrize(
    "make", [torch.tensor, lambda value: torch.nn.Parameter(torch.tensor(value))]
)
@pytest.mark.parametrize("name", ["scale", "margin"])
def test_a_module_has_no_tensor_for_a_number(
    name: str, make: Callable[[float], torch.Tensor]
) -> None:
    """But for a Parameter as the scale: elsewhere it would go past the check into the state."""
    if name == "scale" and isinstance(make(0.3), torch.nn.Parameter):
        assert list(fm.ArcFaceLoss(10, 4, scale=make(0.3)).state_dict()) == ["weight", "scale"]  # pyright: ignore[reportArgumentType]
        return
    remedy = "functional form" if name == "margin" else "Parameter"
    with pytest.raises(TypeError, match=rf"{name}.* number.*{remedy}"):
        fm.ArcFaceLoss(10, 4, **{name: make(0.3)})  # pyright: ignore[reportArgumentType]
    criterion = fm.ArcFaceLoss(10, 4)
    with pytest.raises(TypeError, match=rf"{name}.* number.*{remedy}"):
        setattr(criterion, name, make(0.3))
    setattr(criterion, name, 0.3)
    assert f"{name}=0.3" in repr(criterion)
    assert list(criterion.state_dict()) == ["weight"]
