"""Calls that raise, of constructors and modules: the type of the error, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

import fused_margin as fm
import fused_margin.functional as fmf
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


MODULE_ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
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
        ("(C,), that is not learnt; got Tensor of shape ()", "pass float(margin)"),
    ),
    "module margins in a column": (
        lambda: fm.ArcFaceLoss(5, 6, torch.ones(5, 1)), TypeError,
        ("got Tensor of shape (5, 1)", "pass margin.flatten()"),
    ),
    "module margin Parameter": (
        lambda: fm.CosFaceLoss(5, 6, torch.nn.Parameter(torch.ones(5))), TypeError,
        ("got Parameter of shape (5,)", "pass margin.detach()", "functional form"),
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
}  # fmt: skip
