"""Every error: its type, what it says was given, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from module_errors import (
    CRITERION,
    CRITERION_ON_META,
    IGNORED,
    LABELS,
    MODULE_ERRORS,
    NAN_IN_ROW_2,
    ON_META,
    SIX_CLASSES,
    W,
    X,
    call,
    fake,
)

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import metrics, tuning
from fused_margin.compat import pml

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # tensors
    "embeddings type": (call(x=[1.0]), TypeError, ("embeddings must be a tensor", "list")),
    "embeddings NumPy": (
        call(x=X.numpy()), TypeError, ("embeddings must be", "ndarray", "torch.as_tensor"),
    ),
    "embeddings tuple": (
        call(x=(X, X)), TypeError, ("got tuple", "tensor in it that holds the embeddings"),
    ),
    "embeddings dict": (
        call(x={"x": X}), TypeError, ("got dict", "tensor in it that holds the embeddings"),
    ),
    "embeddings module": (
        call(x=torch.nn.Linear(3, 6)), TypeError, ("got Linear", "pass what it returns"),
    ),
    "weight type": (call(w=None), TypeError, ("weight must be a tensor, got NoneType",)),
    "weight module": (
        call(w=CRITERION), TypeError, ("got ArcFaceLoss", "pass its weight, criterion.weight"),
    ),
    "labels type": (
        call(labels=[0, 1]), TypeError, ("labels must be a tensor", "list", "torch.as_tensor"),
    ),
    "labels NumPy": (
        call(labels=LABELS.numpy()), TypeError, ("class indices", "ndarray", "torch.as_tensor"),
    ),
    "labels names": (
        call(labels=("ann", "bob", "eve", "ann")), TypeError,
        ("class indices, got tuple", "number the class names from 0"),
    ),
    "labels list of tensors": (
        call(labels=list(LABELS)), TypeError, ("got list", "holds the labels", "torch.stack"),
    ),
    "labels none": (call(labels=None), TypeError, ("class indices, got NoneType",)),
    "module swapped": (
        lambda: CRITERION(LABELS, X), TypeError,
        ("embeddings and labels look swapped", "torch.int64", "criterion(embeddings, labels)"),
    ),
    "module swapped, column": (
        lambda: CRITERION(LABELS[:, None], X), TypeError, ("look swapped", "(4, 1)", "(4, 6)"),
    ),
    "module swapped, float labels": (
        lambda: CRITERION(LABELS.float(), X), TypeError, ("embeddings and labels look swapped",),
    ),
    "function swapped": (
        call(w=LABELS, labels=W), TypeError,
        ("weight and labels look swapped", "(embeddings, weight, labels)"),
    ),
    "embeddings after weight": (
        call(x=W, w=X), ValueError, ("shape (5,)", "(4,)", "embeddings come first, then weight"),
    ),
    "embeddings dtype": (
        call(x=X.long()), TypeError, ("embeddings must be fp16", "torch.int64", ".float()"),
    ),
    "images": (
        call(x=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), TypeError,
        ("torch.uint8", ".float()", "model's input, pass what the model returns"),
    ),
    "weight dtype": (
        call(w=W.long()), TypeError, ("weight must be fp16", "torch.int64; cast with .float()"),
    ),
    "weight complex": (
        call(w=W.to(torch.complex64)), TypeError, ("weight must be", "complex64", ".real"),
    ),
    "weight lower": (
        call(w=W.half()), TypeError,
        ("weight is torch.float16", "torch.float32", "fp64 or the", "criterion.float()"),
    ),
    "weight other half": (
        call(x=X.half(), w=W.bfloat16()), TypeError, ("torch.bfloat16", "torch.float16"),
    ),
    "sparse": (
        call(w=W.to_sparse()), TypeError,
        ("weight must be a dense", "torch.sparse_coo", ".to_dense()"),
    ),
    "embeddings shape": (
        call(x=X[0]), ValueError, ("embeddings", "(N, D)", "got (6,)", ".unsqueeze(0)"),
    ),
    "embeddings 0-d": (call(x=X[0, 0]), ValueError, ("(N, D), got ()",)),
    "embeddings (N, 1, D)": (
        call(x=X[:, None]), ValueError, ("(N, D), got (4, 1, 6)", ".flatten(1)"),
    ),
    "embeddings (N, D, 1, 1)": (
        call(x=X[:, :, None, None]), ValueError, ("(N, D), got (4, 6, 1, 1)", ".flatten(1)"),
    ),
    "embeddings (N, T, D)": (
        call(x=torch.zeros(4, 3, 6)), ValueError,
        ("got (4, 3, 6)", "pooling", ".flatten(1)", ".mean(1) of (N, T, D)"),
    ),
    "weight shape": (call(w=W[None]), ValueError, ("weight", "(C, D)", "(1, 5, 6)", ".squeeze(0)")),
    "weight of a convolution": (
        call(w=W[:, :, None, None]), ValueError, ("(C, D)", "(5, 6, 1, 1)", ".flatten(1)"),
    ),
    "weight of classes": (
        call(w=torch.ones(5)), ValueError, ("(C, D)", "(5,)", "per class", "F.cross_entropy"),
    ),
    "one class": (call(w=W[:1]), ValueError, ("C >= 2", "got 1")),
    "no columns": (call(x=X[:, :0], w=W[:, :0]), ValueError, ("D >= 1", "D = 0")),
    "different D": (
        call(x=X[:, :3]), ValueError, ("D = 3", "C, D = 5, 6", "embedding_size=3"),
    ),
    "module, sizes swapped": (
        lambda: fm.ArcFaceLoss(6, 5)(X, LABELS), ValueError,
        ("D = 6", "C, D = 6, 5", "num_classes=5, embedding_size=6", "weight.t()", "logits"),
    ),
    "weight transposed": (
        call(w=SIX_CLASSES), ValueError,
        ("D = 6", "C, D = 6, 5", "num_classes=5, embedding_size=6", "weight.t()", "logits"),
    ),
    "weight device": (
        call(w=W.to("meta")), ValueError,
        ("cpu", "weight on meta", "to_empty", "reset_parameters()"),
    ),
    "weight on a GPU": (
        call(w=fake("cuda", 5, 6)), ValueError,
        ("cpu", "on cuda:0", "criterion.to(embeddings.device)", "embeddings.to(weight.device)"),
    ),
    "labels device": (
        call(labels=LABELS.to("meta")), ValueError, ("labels are on meta", "cpu", ".to(embed"),
    ),
    "no kernels": (
        call(x=fake("xpu", 4, 6), w=fake("xpu", 5, 6), labels=fake("xpu", 4).long(), backend="cpu"),
        ValueError, ("backend='cpu'", "xpu", 'backend="reference"'),
    ),
    **{
        f"no numbers, {name}": (
            made, ValueError, ("on the meta device, where there are no numbers", ".to_empty("),
        )
        for name, made in {
            "reference": call(x=ON_META, w=ON_META, labels=LABELS.to("meta"), backend="reference"),
            "module": lambda: CRITERION_ON_META(ON_META, LABELS.to("meta")),
            "logits": lambda: CRITERION_ON_META.logits(ON_META),
            "metrics": lambda: metrics.predict(ON_META, CRITERION_ON_META),
            "compat": lambda: pml.SphereFaceLoss(5, 6).to("meta")(ON_META, LABELS.to("meta")),
        }.items()
    },
    "labels float": (call(labels=LABELS.float()), TypeError, ("integer", "float32", ".long()")),
    "labels bool": (call(labels=LABELS > 1), TypeError, ("integer", "torch.bool", ".long()")),
    "labels one-hot": (
        call(labels=torch.eye(5)[LABELS]), TypeError,
        ("torch.float32", "(4, 5)", "one-hot", ".argmax(1)", "sample_weight=torch.cat([lam,"),
    ),
    "labels one-hot, integer": (
        call(labels=torch.eye(5).long()[LABELS]), ValueError, ("(4,)", "(4, 5)", ".argmax(1)"),
    ),
    "labels one-hot, bool": (
        call(labels=torch.eye(5).bool()[LABELS]), TypeError, ("torch.bool", ".int().argmax(1)"),
    ),
    "labels shape": (
        call(labels=LABELS[:, None]), ValueError, ("shape (4,)", "(4, 1)", ".squeeze(1)"),
    ),
    "labels float, column": (
        call(labels=LABELS[:, None].float()), TypeError, ("(4, 1)", ".squeeze(1).long()"),
    ),
    "labels row": (call(labels=LABELS[None]), ValueError, ("(4,)", "(1, 4)", ".flatten()")),
    "label 0-d": (call(x=X[:1], labels=LABELS[0]), ValueError, ("(1,)", "got ()", ".flatten()")),
    "labels number": (call(labels=LABELS[:2]), ValueError, ("shape (4,)", "(2,)", "per row")),
    "label too large": (
        call(labels=LABELS + 2), ValueError,
        ("[0, 5)", "labels[1] is 6", "(1 such", "the ignored label, -100", "labels); remap"),
    ),
    "labels from 1": (
        call(labels=LABELS + 1), ValueError,
        ("[0, 5)", "labels[1] is 5", "pass labels - 1 if they start at 1", "remap"),
    ),
    "labels from 1, ignored": (
        call(labels=torch.tensor([-100, 5, 1, 2])), ValueError, ("labels[1] is 5", "labels - 1"),
    ),
    "label too large beside 0": (
        call(labels=torch.tensor([0, 5, 1, 2])), ValueError, ("labels[1] is 5", "labels); remap"),
    ),
    "label negative": (
        call(labels=LABELS - 1), ValueError,
        ("[0, 5)", "is -1", "pass labels.masked_fill(labels == -1, -100) to leave such", "remap"),
    ),
    "label negative, reference": (
        call(labels=LABELS - 1, backend="reference"), ValueError,
        ("labels[0] is -1", "pass labels.masked_fill(labels == -1, -100)", "remap"),
    ),
    "labels of several negative values": (
        call(labels=LABELS - 3), ValueError, ("labels[0] is -3", "(3 such labels); remap"),
    ),
    "label too large, tensor scale": (
        call(fmf.arcface, X, W, LABELS + 1, 0.5, torch.tensor(8.0)), ValueError,
        ("labels[1] is 5", "remap"),
    ),
    # options
    "reduction": (
        call(reduction="avg"), ValueError, ("reduction", "'avg'", "'mean', 'sum', 'none'"),
    ),
    "reduction None": (
        call(reduction=None), ValueError, ("reduction", "got None", "pass the string, 'none'"),
    ),
    "boundary": (call(boundary="hard"), ValueError, ("boundary", "'hard'", "'linear'")),
    "grad": (call(grad="ste"), ValueError, ("grad", "'ste'", "'straight_through'")),
    "backend": (call(backend="cuda"), ValueError, ("backend", "'cuda'", "'reference', 'cpu'")),
    "backend of cosine_lse": (
        call(fmf.cosine_lse, X, W, LABELS, 9.0, backend="x"), ValueError, ("backend", "'x'"),
    ),
    "ignore_index": (call(ignore_index=1.0), TypeError, ("ignore_index must be an int", "float")),
    "ignore_index bool": (call(ignore_index=True), TypeError, ("ignore_index", "bool True")),
    "ignore_index NumPy bool": (
        call(ignore_index=np.bool_(True)), TypeError, ("ignore_index must be an int", "bool"),
    ),
    "ignore_index bool tensor": (
        call(ignore_index=torch.tensor(True)), TypeError, ("ignore_index", "torch.bool"),
    ),
    "ignore_index None": (call(ignore_index=None), TypeError, ("ignore_index", "got None")),
    "ignore_index too large": (
        call(ignore_index=2**63), ValueError, ("ignore_index", "int64", "9223372036854775808"),
    ),
    "ignore_index too small": (
        call(ignore_index=-(2**63) - 1), ValueError,
        ("ignore_index", "int64", "got -9223372036854775809"),
    ),
    "ignore_index too large, tensor margin": (
        call(margin=torch.ones(4), ignore_index=2**63), ValueError, ("ignore_index", "int64"),
    ),
    "module ignore_index too large": (
        lambda: fm.CosFaceLoss(5, 6, ignore_index=2**63), ValueError, ("ignore_index", "int64"),
    ),
    "memory_budget": (
        call(memory_budget=1e9), TypeError,
        ("whole number of bytes or None, got float 1000000000.0", "int()"),
    ),
    "memory_budget text": (
        call(memory_budget="1GB"), TypeError, ("whole number", "str '1GB'", "1 << 30"),
    ),
    "memory_budget bool": (call(memory_budget=False), TypeError, ("whole number", "bool False")),
    "memory_budget negative": (call(memory_budget=-1), ValueError, (">= 0", "got -1", "None")),
    # scale
    "scale zero": (call(scale=0.0), ValueError, ("scale", "> 0", "got 0.0")),
    "scale negative": (call(scale=-2), ValueError, ("> 0", "got -2")),
    "scale nan": (call(scale=math.nan), ValueError, ("finite", "got nan")),
    "scale infinite": (call(scale=math.inf), ValueError, ("finite", "got inf")),
    "scale infinite in fp32": (call(scale=1e39), ValueError, ("finite in fp32", "got 1e+39")),
    "scale too large for a float": (call(scale=10**400), ValueError, ("finite", "got inf")),
    "scale type": (
        call(scale="64"), TypeError, ("scale must be a number or a 0-d", "str '64'", "float()"),
    ),
    "scale decimal": (call(scale=Decimal(64)), TypeError, ("got Decimal 64", "float()")),
    "scale bool": (call(scale=True), TypeError, ("scale must be a number", "bool True")),
    "scale NumPy bool": (call(scale=np.bool_(True)), TypeError, ("scale must be a number", "bool")),
    "scale None": (call(scale=None), TypeError, ("scale", "got None", "fixed_adacos_scale")),
    "scale list": (call(scale=[64.0]), TypeError, ("scale", "got list", "all rows share one")),
    "scale shape": (call(scale=torch.ones(4)), ValueError, ("0-d", "(4,)", "rows share one scale")),
    "scale (1,)": (call(scale=torch.ones(1)), ValueError, ("0-d", "(1,)", ".squeeze()")),
    "scale dtype": (
        call(scale=torch.tensor(3)), TypeError, ("floating", "torch.int64", ".float()"),
    ),
    "scale device": (
        call(scale=torch.tensor(3.0, device="meta")), ValueError, ("scale is on meta", "move"),
    ),
    "scale tensor not positive": (
        call(scale=torch.tensor(-3.0)), ValueError, ("> 0", "-3.0", "learnable scale positive"),
    ),
    "scale tensor infinite": (
        call(scale=torch.tensor(math.inf)), ValueError, ("finite", "got inf", "positive"),
    ),
    "scale tensor infinite in fp32": (
        call(scale=torch.tensor(1e39, dtype=torch.float64)), ValueError, ("finite", "got 1e+39"),
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
    "tensor scale of logits": (
        lambda: fmf.cosine_logits(X, W, torch.tensor(math.nan)), ValueError, ("finite", "got nan"),
    ),
    # margin
    "degrees": (
        call(margin=28.6), ValueError, ("radians", "got 28.6", "math.radians(28.6) = 0.4992"),
    ),
    "scale before margin": (
        call(fmf.arcface, X, W, LABELS, 64.0, 0.5), ValueError,
        ("got 64.0", "the scale comes after the margin"),
    ),
    "scale before cosine margin": (
        call(fmf.cosface, X, W, LABELS, 64.0, 0.35), ValueError,
        ("got 64.0", "the scale comes after the margin"),
    ),
    "tensor of degrees": (
        call(margin=torch.tensor([0.5, -28.6, 0.1, 0.2])), ValueError,
        ("radians", "got -28.6 in row 1", "torch.deg2rad(margin)"),
    ),
    "NaN before degrees": (
        call(margin=torch.tensor([0.5, 0.1, math.nan, 28.6])), ValueError,
        ("margin must be finite, got nan in row 2",),
    ),
    "degrees before NaN": (
        call(margin=torch.tensor([0.5, 28.6, math.nan, 0.1])), ValueError,
        ("got 28.6 in row 1", "torch.deg2rad(margin)"),
    ),
    "tensor of cosine margins": (
        call(fmf.cosface, margin=torch.full((4,), 35.0)), ValueError, ("offset", "35.0 in row 0"),
    ),
    "margin tensor nan": (
        call(margin=NAN_IN_ROW_2), ValueError, ("margin must be finite, got nan in row 2",),
    ),
    "margin tensor infinite": (
        call(margin=torch.tensor([0.5, -math.inf, 0.1, 0.2])), ValueError,
        ("margin must be finite, got -inf in row 1",),
    ),
    "cosine margin tensor nan": (
        call(fmf.cosface, margin=NAN_IN_ROW_2), ValueError, ("must be finite, got nan in row 2",),
    ),
    "cosine margin tensor infinite": (
        call(fmf.cosface, margin=torch.full((4,), math.inf)), ValueError, ("finite, got inf",),
    ),
    "margin nan beside an ignored row": (
        call(labels=IGNORED, margin=torch.full((4,), math.nan)), ValueError,
        ("margin must be finite, got nan in row 0",),
    ),
    "negative degrees": (call(margin=-28.6), ValueError, ("math.radians(-28.6)",)),
    "cosine margin": (
        call(fmf.cosface, margin=28.6), ValueError, ("offset of the cosine", "28.6", "0.35"),
    ),
    "margin nan": (call(margin=math.nan), ValueError, ("margin must be finite", "nan")),
    "margin infinite": (call(margin=-math.inf), ValueError, ("margin must be finite", "-inf")),
    "margin type": (
        call(margin="0.5"), TypeError, ("a number or an (N,) tensor", "str '0.5'", "float()"),
    ),
    "margin bool": (call(margin=True), TypeError, ("a number or an (N,) tensor", "bool True")),
    "margin None": (call(margin=None), TypeError, ("an (N,) tensor, got None", "0.0 is no margin")),
    "margin NumPy": (
        call(margin=np.ones(4)), TypeError, ("an (N,) tensor, got ndarray", "torch.as_tensor"),
    ),
    "margin shape": (
        call(margin=torch.ones(5)), ValueError, ("shape (4,)", "(5,)", "radians", "margin[labels]"),
    ),
    "margin 0-d": (
        call(margin=torch.tensor(0.5)), ValueError,
        ("(4,)", "got ()", "as a float, margin.item()", "margin.expand(4)"),
    ),
    "margin (1,)": (
        call(margin=torch.ones(1)), ValueError,
        ("(4,)", "got (1,)", "margin.item()", "margin.expand(4)"),
    ),
    "margin (N, 1)": (
        call(margin=torch.ones(4, 1)), ValueError, ("(4,)", "got (4, 1)", ".flatten()"),
    ),
    "cosine margin shape": (
        call(fmf.cosface, margin=torch.ones(5)), ValueError, ("one cosine offset per row", "(5,)"),
    ),
    "margin dtype": (
        call(margin=torch.ones(4, dtype=torch.int32)), TypeError,
        ("floating", "torch.int32", ".float()"),
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
    # tuning
    "tune sizes": (
        lambda: tuning.tune("512", 100, 8), TypeError, ("num_rows", "str '512'", "int()"),  # pyright: ignore[reportArgumentType]
    ),
    "tune one class": (lambda: tuning.tune(512, 1, 8), ValueError, ("num_classes", ">= 2")),
    "tune no columns": (lambda: tuning.tune(512, 100, 0), ValueError, ("embedding_size", ">= 1")),
    "tune dtype": (
        lambda: tuning.tune(512, 100, 8, dtype="bf16"), TypeError,  # pyright: ignore[reportArgumentType]
        ("dtype must be", "torch.bfloat16", "got 'bf16'"),
    ),
    # regularisers
    "regularizer None": (
        lambda: fm.regularizers.regular_face(None), TypeError, ("weight must be", "got NoneType"),  # pyright: ignore[reportArgumentType]
    ),
    "regularizer dtype": (
        lambda: fm.regularizers.center_invariant(W.to(torch.complex64)), TypeError,
        ("complex64", ".real"),
    ),
} | MODULE_ERRORS  # fmt: skip


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


def test_no_remedy_that_fails() -> None:
    """What the messages tell to call is a call that works."""
    for message, absent in (
        ("weight type", "as_tensor"), ("labels none", "as_tensor"), ("regularizer None", "as_t"),
        ("weight complex", ".float()"), ("labels float, column", ".argmax"),
        ("weight device", ".to(embeddings"), ("margin NumPy", "float()"), ("scale list", "float()"),
        ("module swapped", ".float()"), ("tensor of degrees", "math.radians"),
        ("scale NumPy bool", "float()"), ("memory_budget text", "int()"),
        ("num_classes float tensor", "built first"),
    ):  # fmt: skip
        made, kind, _ = ERRORS[message]
        with pytest.raises(kind) as caught:
            made()
        assert absent not in str(caught.value)
    assert torch.equal(torch.eye(5).bool()[LABELS].int().argmax(1), LABELS)
    for margin in (torch.tensor(0.5), torch.tensor([0.5])):
        torch.testing.assert_close(
            fmf.arcface(X, W, LABELS, margin.expand(4)), fmf.arcface(X, W, LABELS, margin.item())
        )
