"""What importing costs, what is shipped, who imports whom, and the public signatures."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_margin as fm

PACKAGE = Path(fm.__file__).parent


def _run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


def test_importing_never_imports_triton() -> None:
    """Nor does using the package on a CPU, or asking it for its configuration."""
    code = """
import sys, torch
before = "triton" in sys.modules
import fused_margin as fm
fm.show_config()
criterion = fm.ArcFaceLoss(5, 4)
criterion(torch.randn(3, 4), torch.tensor([0, 1, 2])).backward()
loaded = [name for name in sys.modules if name.startswith("fused_margin._triton")]
print(before, "triton" in sys.modules, loaded)
"""
    assert _run(code).splitlines()[-1] == "False False []"


def test_cpu_tensors_on_triton_need_the_interpreter() -> None:
    """Without TRITON_INTERPRET=1 they are refused, before Triton is loaded."""
    code = """
import sys, torch, fused_margin as fm
try:
    fm.ArcFaceLoss(5, 4, backend="triton")(torch.randn(1, 4), torch.tensor([0]))
except ValueError as error:
    print("triton" in sys.modules, error)
"""
    answer = _run(code, TRITON_INTERPRET="0")
    assert answer.startswith("False ")
    assert "TRITON_INTERPRET=1" in answer


def test_typed() -> None:
    assert importlib.resources.files(fm).joinpath("py.typed").is_file()


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


BACKEND_FILES = sorted(
    [PACKAGE / name for name in ("_arguments.py", "_ops.py", "margins.py", "_numerics.py")]
    + [path for folder in ("_cpu", "_triton") for path in (PACKAGE / folder).glob("*.py")]
)


@pytest.mark.parametrize("path", BACKEND_FILES, ids=lambda path: path.name)
def test_no_backend_imports_the_reference(path: Path) -> None:
    assert not any("_reference" in name for name in _imports(path))


def test_layers() -> None:
    """losses -> functional -> operators; only the Triton backend imports Triton at its top."""
    assert any("_reference" in name for name in _imports(PACKAGE / "functional.py"))
    on_a_cpu = list((PACKAGE / "_cpu").glob("*.py"))
    for path in [*PACKAGE.glob("*.py"), *on_a_cpu]:
        assert not any(name.split(".")[0] == "triton" for name in _imports(path)), path.name
    names = ("_arguments.py", "_reference.py", "margins.py", "_numerics.py", "_validate.py")
    for path in [*(PACKAGE / name for name in names), *on_a_cpu]:
        upper = {"fused_margin.losses", "fused_margin.functional", "fused_margin._ops"}
        assert not upper & _imports(path)


def _raised(path: Path) -> set[str]:
    """Names of the exceptions that a module raises."""
    raised = (n.exc for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise))
    calls = (exc.func if isinstance(exc, ast.Call) else exc for exc in raised)
    return {called.id for called in calls if isinstance(called, ast.Name)}


# tuning and the kernels' planning raise about the machine and about tiles, not about arguments
@pytest.mark.parametrize(
    "path",
    [
        path
        for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "_cpu").glob("*.py")]
        if path.name not in ("_validate.py", "tuning.py")
    ],
    ids=lambda path: path.name,
)
def test_errors_of_arguments_live_in_one_place(path: Path) -> None:
    assert not {"ValueError", "TypeError"} & _raised(path)


def _signature(function: Callable[..., Any]) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Positional (name, default) in order, and keyword-only name -> default."""
    parameters = inspect.signature(function).parameters.values()
    positional, keywords = [], {}
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keywords[parameter.name] = parameter.default
        else:
            assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            positional.append((parameter.name, parameter.default))
    return positional, keywords


REQUIRED = inspect.Parameter.empty
BACKEND = {"backend": "auto", "memory_budget": None}
OPTIONS = {"reduction": "mean", "ignore_index": -100} | BACKEND
COMMON = OPTIONS | {"device": None, "dtype": None}
SIZES = [("num_classes", REQUIRED), ("embedding_size", REQUIRED)]
TENSORS = [("embeddings", REQUIRED), ("weight", REQUIRED), ("labels", REQUIRED)]
ANGULAR = {"boundary": "linear", "grad": "exact"}
SIGNATURES = {
    fm.MarginSoftmaxLoss: ([*SIZES, ("scale", 64.0)], COMMON),
    fm.ArcFaceLoss: ([*SIZES, ("margin", 0.5), ("scale", 64.0)], ANGULAR | COMMON),
    fm.CosFaceLoss: ([*SIZES, ("margin", 0.35), ("scale", 64.0)], COMMON),
    fm.FixedAdaCosLoss: (SIZES, COMMON),
    fm.NormalizedSoftmaxLoss: ([*SIZES, ("scale", 20.0)], COMMON),
    fm.functional.arcface: ([*TENSORS, ("margin", 0.5), ("scale", 64.0)], ANGULAR | OPTIONS),
    fm.functional.cosface: ([*TENSORS, ("margin", 0.35), ("scale", 64.0)], OPTIONS),
    fm.functional.fixed_adacos: (TENSORS, OPTIONS),
    fm.functional.normalized_softmax: ([*TENSORS, ("scale", REQUIRED)], OPTIONS),
    fm.functional.cosine_lse: ([*TENSORS, ("scale", REQUIRED)], BACKEND),
    fm.check_setup: ([("criterion", REQUIRED), ("optimizer", None)], {"group": None}),
    fm.regularizers.center_invariant: ([("weight", REQUIRED)], {}),
    fm.regularizers.regular_face: ([("weight", REQUIRED)], {}),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function: Callable[..., Any]) -> None:
    assert _signature(function) == SIGNATURES[function]


@pytest.mark.parametrize("criterion", [f for f in SIGNATURES if isinstance(f, type)])
def test_call_signature_of_modules(criterion: type[torch.nn.Module]) -> None:
    names = list(inspect.signature(criterion.forward).parameters)
    assert names == ["self", "embeddings", "labels"]
    logits = inspect.getattr_static(criterion, "logits")
    assert list(inspect.signature(logits).parameters) == ["self", "embeddings"]


def test_exports() -> None:
    for name in fm.__all__:
        assert hasattr(fm, name)
    for name in fm.functional.__all__:
        assert callable(getattr(fm.functional, name))
