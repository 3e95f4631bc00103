"""What an error recommends is there: functions, attributes, and arguments of what was called."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_compat_heads
import test_names
import test_validation
import torch
from torch.distributed import device_mesh, fsdp
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint import state_dict as checkpoints

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import compat, metrics

PACKAGE = Path(fm.__file__).parent
HOLE = "\N{HORIZONTAL ELLIPSIS}"  # for what an f-string is filled with
# Of sources whose texts are no messages: schemas of operators, and a command's output
NO_MESSAGES = {"_schemas.py", "_weight_sweeps.py", "_compiled.py", "compat/_dots.py", "config.py"}

# --- every message, as it is written --------------------------------------------------------------


def text_of(node: ast.expr) -> str | None:
    """A string of the source, with holes; None of what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(HOLE if (text := text_of(part)) is None else text for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = text_of(node.left), text_of(node.right)
        return None if parts == (None, None) else "".join(part or HOLE for part in parts)
    return None


def strings(tree: ast.AST) -> Iterator[str]:
    """The outermost strings below a node, without docstrings."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        text = text_of(child) if isinstance(child, ast.expr) else None
        if text is None:
            yield from strings(child)
        elif " " in text.strip():
            yield text


MESSAGES = {
    source: list(strings(ast.parse(path.read_text())))
    for path in sorted(PACKAGE.rglob("*.py"))
    if (source := path.relative_to(PACKAGE).as_posix()) not in NO_MESSAGES
    and not source.startswith("_triton")
}
CRITERION = fm.sampling.sample_negatives(fm.ArcFaceLoss(6, 4), 0.5)
CRITERIA = [
    CRITERION, fm.AdaCosLoss(6, 4), fm.CosFaceLoss(6, 4, scale=torch.nn.Parameter(torch.ones(()))),
    *(getattr(fm, name)(6, 4) for name in fm.losses.__all__),
    types.SimpleNamespace(weight=dtensor.DTensor),
]  # fmt: skip
TENSORS = [torch.ones(()), dtensor.DTensor]
OPTIMIZER = torch.optim.SGD(CRITERION.parameters())
# What the first parts of names in messages may be
ROOTS: dict[str, list[Any]] = {
    "fused_margin": [fm], "fm": [fm], "torch": [torch], "nn": [torch.nn], "math": [math],
    "F": [torch.nn.functional], "warnings": [warnings], "optimizer": [OPTIMIZER],
    "model": [torch.nn.ModuleDict({"criterion": CRITERION})], "criterion": CRITERIA,
    "loss": [compat.pml.ArcFaceLoss(6, 4), *TENSORS], "group": [OPTIMIZER.param_groups[0]],
} | dict.fromkeys(
    ("margin", "weight", "scale", "class_weight", "labels", "embeddings", "log_scale"), TENSORS
) | {
    name: [importlib.import_module(f"fused_margin.{name}")]
    for name in (
        "functional", "metrics", "negatives", "margins", "convert", "sampling", "optim", "losses",
        "distributed", "regularizers", "schedules", "tuning", "compat", "plan",
    )
}  # fmt: skip
HOMES = [
    fm, *(one for found in ROOTS.values() for one in found if isinstance(one, types.ModuleType)),
    compat.heads, compat.insightface, CRITERION, OPTIMIZER, torch.optim, torch.nn.parallel,
    fsdp, device_mesh, dtensor, checkpoints, torch.Tensor,
    builtins,
]  # fmt: skip
NAME = rf"[A-Za-z_{HOLE}][\w{HOLE}]*"
INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
REFERENCE = re.compile(rf"(?<![\w.'\"/{HOLE}])({NAME}(?:\.{NAME})*)(\({INSIDE}\))?")
# What a text introduces itself, and mathematics
INTRODUCED = {"cos", "sin", "C", "accelerator", "ddp", "weights", "ln", "safetensors"}


def references(text: str) -> Iterator[tuple[str, str | None]]:
    """Dotted names and calls in a message, with what is between the parentheses of a call."""
    for found in REFERENCE.finditer(text):
        first = found[1].partition(".")[0]
        is_dotted = "." in found[1] and first in ROOTS
        if is_dotted or (found[2] and first not in INTRODUCED and HOLE not in first):
            yield found[1], found[2]


def resolved(path: str) -> Any:
    """What a dotted name in a message means, up to its first hole."""
    first, *rest = path.split(HOLE)[0].removesuffix(".").split(".")
    found = ROOTS.get(first) or [getattr(one, first) for one in HOMES if hasattr(one, first)]
    for name in rest:
        found = [getattr(one, name) for one in found if hasattr(one, name)]
    assert found, f"there is no {path}"
    return found[0].forward if isinstance(found[0], torch.nn.Module) else found[0]


def bind(function: Callable[..., Any], arguments: str) -> None:
    """Check that a call with so many arguments, and with these keywords, can be made."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a tensor, or one of torch's
    if re.search(r"^\W*self\b|\.\.\.$|^\s*$", arguments) or "*" in arguments:
        given: list[ast.expr] = []
        keywords = re.findall(r"(\w+)=", arguments)
    else:
        call = ast.parse(f"f({arguments.replace(HOLE, 'x')})", mode="eval").body
        assert isinstance(call, ast.Call)
        given, keywords = call.args, [keyword.arg for keyword in call.keywords]
    signature.bind_partial(*given, **dict.fromkeys(map(str, keywords)))


@pytest.mark.parametrize("source", [name for name, texts in MESSAGES.items() if texts])
def test_what_a_message_names_is_there(source: str) -> None:
    """Every dotted name, and every call with as many arguments and with these keywords."""
    for text in MESSAGES[source]:
        for path, call in references(text):
            found = resolved(path)
            if call is not None and HOLE not in path:
                bind(found, call[1:-1])


# --- what calls raise -----------------------------------------------------------------------------


def code_of(function: Any) -> types.CodeType | None:
    """Of a function without its decorators, which share theirs."""
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


PUBLIC: dict[types.CodeType | None, Any] = {}
for home in (*HOMES, compat.pml):
    if not isinstance(home, types.ModuleType) or not home.__name__.startswith("fused_margin"):
        continue
    for name in getattr(home, "__all__", ()):
        one = getattr(home, name)
        if isinstance(one, type):
            for kind in one.__mro__:
                for method in ("__init__", "forward", "logits", "grow"):
                    PUBLIC[code_of(vars(kind).get(method))] = method
        else:
            PUBLIC[code_of(one)] = one
del PUBLIC[None]


def called(error: BaseException) -> Callable[..., Any] | None:
    """The public function, constructor or method in which an error was raised, the outermost."""
    traceback = error.__traceback__
    while traceback is not None:
        code, seen = traceback.tb_frame.f_code, traceback.tb_frame.f_locals
        if code not in PUBLIC:  # one that was called with what it doesn't take has no frame
            code = code_of(seen.get("call") or seen.get("function"))
        found = PUBLIC.get(code)
        if isinstance(found, str):
            module = seen["self"] if "self" in seen else seen["args"][0]
            return type(module) if found == "__init__" else getattr(module, found)
        if found is not None:
            return found
        traceback = traceback.tb_next
    return None


WORDS_OF_A_CONSTRUCTOR = re.compile("[Bb]uild (it|the loss) with")


def check(error: Exception) -> None:
    """Every ``name=`` is an argument of what was called, of its class, or of a call in the text."""
    text = str(error)
    function = called(error)
    assert function is not None, text
    allowed = set(inspect.signature(function).parameters)
    owner: Any = getattr(function, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        allowed |= set(inspect.signature(type(owner)).parameters)
    if WORDS_OF_A_CONSTRUCTOR.search(text):
        allowed |= set(inspect.signature(fm.ArcFaceLoss).parameters)
    outside = REFERENCE.sub(lambda found: "" if found[2] else found[0], text)
    for name in re.findall(r"(?<![\w.])(\w+)=", outside):
        assert name in allowed, f"{function} takes no {name}: {text}"


WRONG = {f"validation, {name}": made for name, (made, _, _) in test_validation.ERRORS.items()}
WRONG |= {f"names, {name}": made for name, (made, _) in test_names.ERRORS.items()}
WRONG |= {f"heads, {name}": made for name, (made, _, _) in test_compat_heads.REFUSED.items()}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_that_is_recommended_is_taken(name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        WRONG[name]()
    check(caught.value)


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 5])
CENTERS = fm.ArcFaceLoss(3, 4, sub_centers=2)
# What is called with embeddings, a weight (6, 4) or the criterion, and labels
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(fmf, name)
        for name in fmf.__all__
        if list(inspect.signature(getattr(fmf, name)).parameters)[:3]
        == ["embeddings", "weight", "labels"]
    },
    "normalized_softmax": lambda x, w, y: fmf.normalized_softmax(x, w, y, 9.0),
    "margin_softmax": lambda x, w, y: fmf.margin_softmax(x, w, y, fm.margins.NO_MARGIN, 9.0),
    "cosine_lse": lambda x, w, y: fmf.cosine_lse(x, w, y, 9.0),
    "cosine_logits": lambda x, w, y: fmf.cosine_logits(x, w, 9.0),
    "adacos_scale": lambda x, w, y: fmf.adacos_scale(x, w, y, 9.0),
    "curricularface_t": lambda x, w, y: fmf.curricularface_t(x, w, y, 0.1),
    "predict": lambda x, w, y: metrics.predict(x, w),
    "evaluate": metrics.evaluate,
    "center_counts": metrics.center_counts,
    "outlier_angles": metrics.outlier_angles,
    "outliers": metrics.outliers,
}
MODULES: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(getattr(fm, name), 6, 4) for name in fm.losses.__all__},
    **{name: functools.partial(getattr(compat.heads, name), 4, 6) for name in compat.heads.__all__},
    **{
        f"pml.{name}": functools.partial(getattr(compat.pml, name), 6, 4)
        for name in compat.pml.__all__
        if name.endswith("Loss")
    },
    "PartialFC_V2": lambda: compat.insightface.PartialFC_V2(compat.insightface.ArcFace(), 4, 6),
}
del MODULES["MarginSoftmaxLoss"]


def of_module(make: Callable[[], Any]) -> Callable[..., Any]:
    """A loss as a function of the same arguments."""

    def call(x: Any, w: Any, y: Any) -> Any:
        criterion = make()
        if isinstance(w, torch.Tensor) and not w.is_floating_point():
            return fm.metrics.predict(x, w)  # has no weight to be given
        parameter = next(iter(criterion.parameters()))
        if isinstance(w, torch.Tensor) and w.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(w.dtype)
        return criterion(x, y)

    return call


ALL = FUNCTIONS | {name: of_module(make) for name, make in MODULES.items()}
W = torch.randn(6, 4)
GIVEN: dict[str, tuple[Any, Any, Any]] = {
    "a negative label": (X, W, Y - 1),
    "labels from 1": (X, W, Y + 1),
    "no indices": (X, W, torch.rand(3, 6)),
    "one-hot": (X, W, torch.eye(6).long()[Y]),
    "no tensor": (X, W, Y.tolist()),
    "labels of another number": (X, W, Y[:2]),
    "other columns": (torch.randn(3, 6), W, Y),
    "one row": (X[0], W, Y),
    "integers": (X.long(), W, Y),
    "a half weight": (X, W.half(), Y),
    "on no device": (X.to("meta"), W, Y),
    "a weight of sub-centres": (X, CENTERS.weight, Y % 3),
}


@pytest.mark.parametrize("name", ALL)
def test_an_argument_that_is_recommended_is_taken_everywhere(name: str) -> None:
    """The same mistakes, made with everything that takes such arguments."""
    raised = 0
    for x, w, y in GIVEN.values():
        try:
            ALL[name](x, w, y)
        except (TypeError, ValueError) as error:
            check(error)
            raised += 1
    assert raised > 4
