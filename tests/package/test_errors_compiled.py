"""Errors of arguments under `torch.compile(fullgraph=True)`: the same type, with the same text."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from test_validation import ERRORS, LABELS, W, X

import fused_margin as fm
import fused_margin.functional as fmf

# What Dynamo can't give to a function, and values of tensors, which only running code could read.
NOT_COMPILED = {
    "sparse", "ignore_index NumPy bool", "scale NumPy bool", "scale decimal",
    "scale too large for a float", "tensor of degrees", "NaN before degrees", "degrees before NaN",
    "tensor of cosine margins", "margin tensor nan", "margin tensor infinite",
    "cosine margin tensor nan", "cosine margin tensor infinite", "margin nan beside an ignored row",
}  # fmt: skip
COMPILED = [
    name for name, (made, *_) in ERRORS.items()
    if made.__qualname__.startswith("call.") and name not in NOT_COMPILED
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_errors_survive_compile(name: str) -> None:
    """Type and text, though under fullgraph=True nothing may leave the graph."""
    made, kind, fragments = ERRORS[name]
    with pytest.raises(kind) as caught:
        torch.compile(made, backend="eager", fullgraph=True)()
    assert type(caught.value) is kind
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)
@pytest.mark.parametrize(
    "compiler",
    [
        "eager",
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                shutil.which("g++") is None and shutil.which("c++") is None,
                reason="Inductor needs a C++ compiler",
            ),
        ),
    ],
)
def test_errors_of_symbolic_numbers_and_shapes(compiler: str) -> None:
    """What has varied is a symbol of the graph; a message shows the number. All goes on after."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()

    def loss(margin: float, scale: float, budget: int, ignore_index: int, rows: int) -> Any:
        return fmf.arcface(
            x, w, LABELS[:rows], margin, scale, memory_budget=budget, ignore_index=ignore_index
        )

    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    usual = (0.5, 64.0, 1000, -100, 4)
    for values in (usual, (0.4, 32.0, 2000, -10, 4), (0.3, 30.0, 3000, -20, 4)):
        torch.testing.assert_close(compiled(*values), loss(*values))
    wrong = [
        (4.0, 64.0, 1000, -100, 4), (0.5, 64.0, 1000, -100, 3), (4.5, 64.0, 1000, -100, 4),
        (0.5, -3.0, 1000, -100, 4), (0.5, 64.0, -5, -100, 4),
    ]  # fmt: skip
    # each is a graph of its own: the slow compilers get a number, a shape and another number
    for values in wrong if compiler == "eager" else wrong[:3]:
        with pytest.raises(ValueError) as expected:  # noqa: PT011 - compared below
            loss(*values)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            compiled(*values)
        assert str(caught.value) == str(expected.value)
        compiled(*usual).backward()


def test_errors_of_a_module_survive_compile() -> None:
    compiled = torch.compile(fm.FixedAdaCosLoss(5, 6), backend="eager", fullgraph=True)
    with pytest.raises(TypeError, match="look swapped"):
        compiled(LABELS, X)
    with pytest.raises(ValueError, match=r"embedding_size=3"):
        compiled(X[:, :3], LABELS)
    regularize = torch.compile(fm.regularizers.RegularFace(), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"C >= 2 rows \(classes\) to compare, got 1 from"):
        regularize(W[:1])


def test_errors_of_an_export_are_those_of_the_export() -> None:
    """Not of the exported program, long after."""
    with pytest.raises(Exception, match="look swapped"):
        torch.export.export(fm.FixedAdaCosLoss(5, 6), (LABELS, X), strict=True)
    with pytest.raises(TypeError, match="look swapped"):
        torch.export.export(fm.FixedAdaCosLoss(5, 6), (LABELS, X), strict=False)
