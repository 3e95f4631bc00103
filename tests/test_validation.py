"""Every error: its type, what it says was given, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, FUSED_BACKENDS, device_of

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _validate

X, W = torch.randn(4, 6), torch.randn(5, 6)
LABELS = torch.tensor([0, 4, 2, 2])


def call(
    function: Callable[..., Any] = fmf.arcface,
    x: Any = X,
    w: Any = W,
    labels: Any = LABELS,
    *arguments: Any,
    **options: Any,
) -> Callable[[], Any]:
    """A call that is made later."""
    return lambda: function(x, w, labels, *arguments, **options)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # tensors
    "embeddings type": (call(x=[1.0]), TypeError, ("embeddings must be a tensor", "list")),
    "weight type": (call(w=None), TypeError, ("weight must be a tensor", "NoneType")),
    "labels type": (call(labels=[0, 1]), TypeError, ("labels must be a tensor", "list")),
    "embeddings dtype": (
        call(x=X.long()), TypeError, ("embeddings must be fp16", "torch.int64", ".float()"),
    ),
    "weight dtype": (
        call(w=W.to(torch.complex64)), TypeError, ("weight must be", "complex64", ".float()"),
    ),
    "weight lower": (
        call(w=W.half()), TypeError, ("weight is torch.float16", "torch.float32", "fp64 or the"),
    ),
    "weight other half": (
        call(x=X.half(), w=W.bfloat16()), TypeError, ("torch.bfloat16", "torch.float16"),
    ),
    "sparse": (call(w=W.to_sparse()), TypeError, ("weight must be a dense", "torch.sparse_coo")),
    "embeddings shape": (call(x=X[0]), ValueError, ("embeddings", "(N, D)", "(6,)")),
    "weight shape": (call(w=W[None]), ValueError, ("weight", "(C, D)", "(1, 5, 6)")),
    "one class": (call(w=W[:1]), ValueError, ("C >= 2", "got 1")),
    "no columns": (call(x=X[:, :0], w=W[:, :0]), ValueError, ("D >= 1", "D = 0")),
    "different D": (
        call(x=X[:, :3]), ValueError, ("D = 3", "D = 6", "embedding_size=3"),
    ),
    "weight device": (call(w=W.to("meta")), ValueError, ("cpu", "weight on meta", ".to(embed")),
    "labels device": (
        call(labels=LABELS.to("meta")), ValueError, ("labels are on meta", "cpu", ".to(embed"),
    ),
    "no kernels": (
        call(x=X.to("meta"), w=W.to("meta"), labels=LABELS.to("meta"), backend="cpu"),
        ValueError, ("backend='cpu'", "meta", 'backend="reference"'),
    ),
    "labels float": (call(labels=LABELS.float()), TypeError, ("integer", "float32", ".long()")),
    "labels bool": (call(labels=LABELS > 1), TypeError, ("integer", "torch.bool", ".long()")),
    "labels one-hot": (
        call(labels=torch.eye(5)[LABELS]), TypeError, ("torch.float32", "one-hot", ".argmax(1)"),
    ),
    "labels shape": (call(labels=LABELS[:, None]), ValueError, ("shape (4,)", "(4, 1)", "squeeze")),
    "labels number": (call(labels=LABELS[:2]), ValueError, ("shape (4,)", "(2,)", "per row")),
    "label too large": (
        call(labels=LABELS + 1), ValueError,
        ("[0, 5)", "labels[1] is 5", "(1 such", "ignore_index=-100", "remap"),
    ),
    "label negative": (
        call(labels=LABELS - 1), ValueError, ("[0, 5)", "labels[0] is -1", "remap"),
    ),
    "label negative, reference": (
        call(labels=LABELS - 1, backend="reference"), ValueError, ("labels[0] is -1", "remap"),
    ),
    "label too large, tensor scale": (
        call(fmf.arcface, X, W, LABELS + 1, 0.5, torch.tensor(8.0)), ValueError,
        ("labels[1] is 5", "remap"),
    ),
    # options
    "reduction": (
        call(reduction="avg"), ValueError, ("reduction", "'avg'", "'mean', 'sum', 'none'"),
    ),
    "boundary": (call(boundary="easy"), ValueError, ("boundary", "'easy'", "'linear'")),
    "grad": (call(grad="ste"), ValueError, ("grad", "'ste'", "'straight_through'")),
    "backend": (call(backend="cuda"), ValueError, ("backend", "'cuda'", "'reference', 'cpu'")),
    "backend of cosine_lse": (
        call(fmf.cosine_lse, X, W, LABELS, 9.0, backend="x"), ValueError, ("backend", "'x'"),
    ),
    "ignore_index": (call(ignore_index=1.0), TypeError, ("ignore_index must be an int", "float")),
    "ignore_index bool": (call(ignore_index=True), TypeError, ("ignore_index", "bool")),
    # scale
    "scale zero": (call(scale=0.0), ValueError, ("scale", "> 0", "got 0.0")),
    "scale negative": (call(scale=-2), ValueError, ("> 0", "got -2")),
    "scale nan": (call(scale=math.nan), ValueError, ("finite", "got nan")),
    "scale infinite": (call(scale=math.inf), ValueError, ("finite", "got inf")),
    "scale type": (call(scale="64"), TypeError, ("scale must be a number or a 0-d", "str")),
    "scale bool": (call(scale=True), TypeError, ("scale must be a number", "bool")),
    "scale shape": (call(scale=torch.ones(4)), ValueError, ("0-d", "(4,)")),
    "scale dtype": (call(scale=torch.tensor(3)), ValueError, ("floating", "torch.int64")),
    "scale device": (
        call(scale=torch.tensor(3.0, device="meta")), ValueError, ("scale is on meta", "move"),
    ),
    "scale tensor not positive": (
        call(scale=torch.tensor(-3.0)), ValueError, ("> 0", "-3.0", "learnable scale positive"),
    ),
    "scale of cosine_lse": (
        call(fmf.cosine_lse, X, W, LABELS, -1.0), ValueError, ("scale", "> 0", "-1.0"),
    ),
    "scale of normalized_softmax": (
        call(fmf.normalized_softmax, X, W, LABELS, 0.0), ValueError, ("scale", "> 0"),
    ),
    "scale of logits": (
        lambda: fmf.cosine_logits(X, W, 0.0), ValueError, ("scale", "> 0"),
    ),
    # margin
    "degrees": (
        call(margin=28.6), ValueError, ("radians", "got 28.6", "math.radians(28.6) = 0.4992"),
    ),
    "tensor of degrees": (
        call(margin=torch.tensor([0.5, -28.6, 0.1, 0.2])), ValueError,
        ("radians", "got -28.6", "math.radians(-28.6)"),
    ),
    "tensor of cosine margins": (
        call(fmf.cosface, margin=torch.full((4,), 35.0)), ValueError, ("offset", "35.0"),
    ),
    "negative degrees": (call(margin=-28.6), ValueError, ("math.radians(-28.6)",)),
    "cosine margin": (
        call(fmf.cosface, margin=28.6), ValueError, ("offset of the cosine", "28.6", "0.35"),
    ),
    "margin nan": (call(margin=math.nan), ValueError, ("margin must be finite", "nan")),
    "margin type": (call(margin="0.5"), TypeError, ("a number or an (N,) tensor", "str")),
    "margin bool": (call(margin=True), TypeError, ("a number or an (N,) tensor", "bool")),
    "margin shape": (
        call(margin=torch.ones(5)), ValueError, ("shape (4,)", "(5,)", "radians", "as a float"),
    ),
    "margin 0-d": (call(margin=torch.tensor(0.5)), ValueError, ("(4,)", "()", "as a float")),
    "cosine margin shape": (
        call(fmf.cosface, margin=torch.ones(5)), ValueError, ("one cosine offset per row", "(5,)"),
    ),
    "margin dtype": (
        call(margin=torch.ones(4, dtype=torch.int32)), TypeError, ("floating", "torch.int32"),
    ),
    "margin device": (
        call(margin=torch.ones(4, device="meta")), ValueError, ("margin is on meta", "move"),
    ),
    # Fixed AdaCos
    "fixed_adacos C = 2": (
        call(fmf.fixed_adacos, X, W[:2], LABELS % 2), ValueError,
        ("C >= 3", "got 2", "NormalizedSoftmaxLoss"),
    ),
    "FixedAdaCosLoss C = 2": (
        lambda: fm.FixedAdaCosLoss(2, 6), ValueError, ("C >= 3", "got 2", "NormalizedSoftmaxLoss"),
    ),
    # modules
    "num_classes": (lambda: fm.ArcFaceLoss(1, 6), ValueError, ("num_classes", ">= 2", "got 1")),
    "num_classes type": (lambda: fm.CosFaceLoss(2.0, 6), TypeError, ("num_classes", "float")),  # pyright: ignore[reportArgumentType]
    "num_classes bool": (lambda: fm.CosFaceLoss(True, 6), TypeError, ("num_classes", "bool")),
    "embedding_size": (
        lambda: fm.ArcFaceLoss(5, 0), ValueError, ("embedding_size", ">= 1", "got 0"),
    ),
    "module margin": (lambda: fm.ArcFaceLoss(5, 6, 28.6), ValueError, ("math.radians(28.6)",)),
    "module cosine margin": (lambda: fm.CosFaceLoss(5, 6, 35.0), ValueError, ("35.0", "0.35")),
    "module margin tensor": (
        lambda: fm.ArcFaceLoss(5, 6, torch.ones(4)),  # pyright: ignore[reportArgumentType]
        TypeError, ("margin must be a number, got Tensor",),
    ),
    "module scale": (lambda: fm.ArcFaceLoss(5, 6, scale=0), ValueError, ("scale", "> 0")),
    "module scale tensor": (
        lambda: fm.CosFaceLoss(5, 6, scale=torch.tensor(3.0)),  # pyright: ignore[reportArgumentType]
        TypeError, ("scale as a number", "functional form"),
    ),
    "module reduction": (
        lambda: fm.CosFaceLoss(5, 6, reduction="x"), ValueError, ("'x'", "'mean'"),
    ),
    "module backend": (
        lambda: fm.CosFaceLoss(5, 6, backend="gpu"), ValueError, ("'gpu'", "'auto'"),
    ),
    "module boundary": (
        lambda: fm.ArcFaceLoss(5, 6, boundary="x"), ValueError, ("boundary", "'x'"),
    ),
    "module grad": (lambda: fm.ArcFaceLoss(5, 6, grad="x"), ValueError, ("grad", "'x'")),
    "module ignore_index": (
        lambda: fm.CosFaceLoss(5, 6, ignore_index=0.5), TypeError, ("ignore_index", "float"),  # pyright: ignore[reportArgumentType]
    ),
    "module dtype": (
        lambda: fm.CosFaceLoss(5, 6, dtype=torch.int32), TypeError, ("dtype must", "torch.int32"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    made, kind, fragments = ERRORS[name]
    with pytest.raises(kind) as caught:
        made()
    assert type(caught.value) is kind
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (fmf.arcface, ()), (fmf.cosface, ()), (fmf.fixed_adacos, ()),
        (fmf.normalized_softmax, (9.0,)), (fmf.cosine_lse, (9.0,)),
    ],
)  # fmt: skip
def test_every_function_checks_its_tensors(
    function: Callable[..., Any], arguments: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="embedding_size=3"):
        function(X[:, :3], W, LABELS, *arguments)
    with pytest.raises(TypeError, match="integer dtype"):
        function(X, W, LABELS.float(), *arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        function(X, W, LABELS, *arguments, backend="none")


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
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale must be > 0"):
            fmf.cosine_lse(X, W, LABELS, torch.tensor(value), backend=backend)


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


def test_gpu_tensors_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validate, "has_triton", lambda: False)
    for name in ("auto", "triton"):
        with pytest.raises(ValueError, match=r'"pip install triton".*backend="reference"'):
            _validate.backend(name, torch.device("cuda"))
    assert _validate.backend("reference", torch.device("cuda")) == "reference"


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
