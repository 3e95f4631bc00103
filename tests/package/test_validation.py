"""Every error: its type, what it says was given, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import metrics, tuning
from fused_margin.compat import heads, insightface, pml

X, W = torch.randn(4, 6), torch.randn(5, 6)
LABELS = torch.tensor([0, 4, 2, 2])
SIX_CLASSES = torch.randn(6, 5)  # weight for embeddings of 6 columns, transposed
CRITERION = fm.ArcFaceLoss(5, 6)
IGNORED = torch.tensor([0, 4, -100, 2])
ON_META = X.to("meta")
CRITERION_ON_META = fm.ArcFaceLoss(5, 6, device="meta")
NAN_IN_ROW_2 = torch.tensor([0.5, 0.1, math.nan, 0.2])


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


def call_module(make: Any, given: Any, *, is_all: bool = False) -> Callable[[], Any]:
    """The same of a constructor, of sizes and a margin or of all its arguments."""
    return lambda: make(*given) if is_all else make(5, 6, given)


def fake(device: str, *shape: int) -> torch.Tensor:
    """A tensor on a device that need not exist."""
    with FakeTensorMode():
        return torch.empty(*shape, device=device)


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
    # modules
    "num_classes": (lambda: fm.ArcFaceLoss(1, 6), ValueError, ("num_classes", ">= 2", "got 1")),
    "fixed_adacos_scale type": (
        lambda: fmf.fixed_adacos_scale(10.5), TypeError, ("num_classes", "float 10.5", "int()"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes type": (
        lambda: fm.CosFaceLoss(2.0, 6), TypeError, ("num_classes", "float 2.0", "int()", "//"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes NumPy float": (
        lambda: fm.CosFaceLoss(np.float64(10.5), 6), TypeError, ("num_classes", "10.5", "int()"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes float tensor": (
        lambda: fm.CosFaceLoss(LABELS.float().max(), 6),  # pyright: ignore[reportArgumentType]
        TypeError, ("num_classes", "float32", "int()"),
    ),
    "num_classes text": (
        lambda: fm.CosFaceLoss("10", 6), TypeError, ("num_classes", "str '10'", "int()"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes names": (
        lambda: fm.CosFaceLoss(["ann", "bob"], 6), TypeError, ("got list", "len(num_classes)"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes bool": (lambda: fm.CosFaceLoss(True, 6), TypeError, ("num_classes", "bool True")),
    "num_classes NumPy bool": (
        lambda: fm.CosFaceLoss(np.bool_(True), 6), TypeError, ("num_classes", "bool"),  # pyright: ignore[reportArgumentType]
    ),
    "num_classes too large": (
        lambda: fm.CosFaceLoss(2**63, 6), ValueError,
        ("num_classes", "int64", "9223372036854775808"),
    ),
    "module called as a function": (
        lambda: fm.CosFaceLoss(X, LABELS), TypeError,  # pyright: ignore[reportArgumentType]
        ("num_classes", "shape (4, 6)", "built first", "criterion(embeddings, labels)"),
    ),
    "embedding_size": (
        lambda: fm.ArcFaceLoss(5, 0), ValueError, ("embedding_size", ">= 1", "got 0"),
    ),
    "module margin": (lambda: fm.ArcFaceLoss(5, 6, 28.6), ValueError, ("math.radians(28.6)",)),
    "module cosine margin": (lambda: fm.CosFaceLoss(5, 6, 35.0), ValueError, ("35.0", "0.35")),
    "module margin tensor": (
        lambda: fm.ArcFaceLoss(5, 6, torch.ones(4)), ValueError,
        ("margin must have shape (5,)", "one number per class", "(4,)"),
    ),
    **{
        f"module margins, {type(given).__name__} to {make.__name__}": (
            call_module(make, given), TypeError,
            ("margin must be a number, or a tensor of one for each class, (C,)",
             "torch.as_tensor(margin, dtype=torch.float32)"),
        )
        for make in (fm.ArcFaceLoss, fm.CosFaceLoss, fm.CurricularFaceLoss, fm.MVSoftmaxLoss)
        for given in ([0.1] * 5, np.full(5, 0.1))
    },
    **{
        f"module margins, {type(given).__name__} to {make.__name__} again": (
            call_module(make, given), TypeError,
            ("must be a number", "per class, a tensor (C,), there are ArcFaceLoss, CosFace"),
        )
        for make in (
            fm.SphereFaceLoss, fm.AdaFaceLoss, fm.MagFaceLoss, fm.CircleSoftmaxLoss,
            fm.CombinedMarginLoss, pml.ArcFaceLoss,
        )
        for given in ([0.1] * 5, torch.full((5,), 0.1))
    },
    "mean of margins, list": (
        lambda: fm.ElasticFaceLoss(5, 6, [0.1] * 5), TypeError, ("mean as a number, got list",),  # pyright: ignore[reportArgumentType]
    ),
    "margins per class, list": (
        call(margin=[0.1] * 5), TypeError, ("got list; pass margins per class as torch.as_tensor",),
    ),
    "insightface margin, list": (
        lambda: insightface.CombinedMarginLoss(64, 1.0, [0.1], 0.0),  # pyright: ignore[reportArgumentType]
        TypeError, ("m2 must be a number, got list",),
    ),
    "pml margin, text": (
        lambda: pml.ArcFaceLoss(5, 6, "28.6"),  # pyright: ignore[reportArgumentType]
        TypeError, ("margin must be a number, in degrees, got str '28.6'",),
    ),
    "pml temperature": (
        lambda: pml.NormalizedSoftmaxLoss(5, 6, 0), ValueError, ("temperature must be", "got 0.0"),
    ),
    "ls_eps and margins": (
        lambda: heads.ArcMarginProduct(6, 5, m=torch.full((5,), 0.1), ls_eps=0.1)(X, LABELS),  # pyright: ignore[reportArgumentType]
        ValueError, ("ls_eps spreads one margin", "Tensor of shape (5,)", "ls_eps=0.0"),
    ),
    # other packages' orders of arguments
    **{
        f"insightface's order, {arguments}": (
            call_module(make, arguments, is_all=True), TypeError,
            (f"{make.__name__} takes num_classes, embedding_size, ",
             f"got {arguments[0]} and {arguments[1]} for its numbers of classes and of columns; ",
             f"fused_margin.compat.insightface.{name}, for its PartialFC_V2"),
        )
        for make, name, arguments in (
            (fm.CombinedMarginLoss, "CombinedMarginLoss", (64, 1.0, 0.5, 0.0)),
            (fm.CombinedMarginLoss, "CombinedMarginLoss", (64, 1.0, 0.5, 0.0, 0.4)),
            (fm.CombinedMarginLoss, "CombinedMarginLoss", (64.0, 1, 0.5, 0.0, 0.4)),
            (fm.CombinedMarginLoss, "CombinedMarginLoss", (64, 1, 0, 0.4)),
            (fm.CombinedMarginLoss, "CombinedMarginLoss", (64, 1, 0.5, 0)),
            (fm.ArcFaceLoss, "ArcFace", (64.0, 0.5)),
            (fm.CosFaceLoss, "CosFace", (64, 0.4)),
        )
    },
    **{
        f"margin and scale as sizes, {make.__name__}": (
            call_module(make, (0.2, 30), is_all=True), TypeError,
            (f"{make.__name__} takes ", "in this order, got 0.2 and 30 for its numbers of cla"),
        )
        for make in (
            fm.MVSoftmaxLoss, fm.CircleSoftmaxLoss, fm.SphereFaceLoss, fm.ElasticFaceLoss,
            fm.AdaFaceLoss, fm.NormalizedSoftmaxLoss, fm.CurricularFaceLoss,
        )
    },
    **{
        f"{make.__name__}, more by position than it takes": (
            call_module(make, arguments, is_all=True), TypeError,
            ("were given; in order it takes num_classes, embedding_size, ", "all else by name"),
        )
        for make, arguments in (
            (fm.ArcFaceLoss, (6, 5, 30.0, 0.5, False, 0.0)),  # Kaggle's
            (fm.AdaFaceLoss, (6, 5, 0.4, 0.333, 64.0, 1.0)),  # AdaFace's own
            (fm.ElasticFaceLoss, (6, 5, 64.0, 0.5, 0.0125)),
            (pml.CosFaceLoss, (5, 6, 0.35, 64)),
        )
    },
    **{
        f"scale before margin, {make.__name__}": (
            call_module(make, (6, 5, *arguments), is_all=True), ValueError,
            (f"got {arguments[0]}", "the scale comes after"),
        )
        for make, arguments in (
            (fm.CombinedMarginLoss, (64.0, 1.0, 0.5, 0.0)), (fm.SphereFaceLoss, (30.0, 4)),
            (fm.MagFaceLoss, (64.0, 0.5)), (fm.CircleSoftmaxLoss, (256.0, 0.25)),
            (fm.ElasticFaceLoss, (64.0, 0.5)), (fm.CurricularFaceLoss, (64.0, 0.5)),
            (fm.MVSoftmaxLoss, (32.0, 0.35)), (fm.AdaFaceLoss, (64.0, 0.4)),
        )
    },
    "module of one column": (
        lambda: fm.ArcFaceLoss(64, 1)(X, LABELS), ValueError,
        ("C, D = 64, 1; build the loss with embedding_size=6; its sizes are its first two",),
    ),
    "module margin 0-d": (
        lambda: fm.ArcFaceLoss(5, 6, torch.tensor(0.5)), TypeError,
        ("margin must be a number, got Tensor", "float(margin)", "functional form"),
    ),
    "module margin Parameter": (
        lambda: fm.CosFaceLoss(5, 6, torch.nn.Parameter(torch.ones(5))), TypeError,
        ("margin must be a number, got Parameter", "float(margin)", "functional form"),
    ),
    "module margins in degrees": (
        lambda: fm.ArcFaceLoss(5, 6, torch.tensor([0.5, 28.6, 0.1, 0.2, 0.3])), ValueError,
        ("radians", "got 28.6 of class 1", "torch.deg2rad(margin)"),
    ),
    "module cosine margins": (
        lambda: fm.CosFaceLoss(5, 6, torch.full((5,), 35.0)), ValueError,
        ("offset of the cosine", "35.0 of class 0"),
    ),
    "module margins of integers": (
        lambda: fm.CosFaceLoss(5, 6, torch.ones(5, dtype=torch.int64)), TypeError,
        ("floating", "torch.int64", ".float()"),
    ),
    "module margin None": (
        lambda: fm.CosFaceLoss(5, 6, None), TypeError, ("got None", "0.0 is no margin"),  # pyright: ignore[reportArgumentType]
    ),
    "module scale": (lambda: fm.ArcFaceLoss(5, 6, scale=0), ValueError, ("scale", "> 0")),
    "module scale tensor": (
        lambda: fm.CosFaceLoss(5, 6, scale=torch.tensor(3.0)),  # pyright: ignore[reportArgumentType]
        TypeError, ("scale as a number, float(scale)", "nn.Parameter(torch.tensor(64.0))"),
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
        lambda: fm.CosFaceLoss(5, 6, dtype=torch.int32), TypeError,
        ("dtype must", "torch.float16", "torch.int32"),
    ),
    "module dtype text": (
        lambda: fm.CosFaceLoss(5, 6, dtype="half"), TypeError, ("torch.float16", "got 'half'"),  # pyright: ignore[reportArgumentType]
    ),
    "module half": (
        lambda: fm.ArcFaceLoss(5, 6).half()(X, LABELS), TypeError,
        ("weight is torch.float16", "torch.float32", "criterion.float()"),
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
