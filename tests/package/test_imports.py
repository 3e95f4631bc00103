"""What importing costs, what is shipped, who imports whom, and the public signatures."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.resources
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_margin as fm
from fused_margin import _LAZY, _places
from fused_margin.functional import options
from fused_margin.losses import base

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


# From the bottom up; a folder counts as one. Each imports from its own layer and those below it.
LAYERS = (
    {"_version", "_arguments", "_names", "_numerics", "_warnings"},
    {"_transforms", "_remedies", "_compiled", "_uncompiled"},
    {"_validate"},
    {
        "_validate_margins",
        "_validate_settings",
        "_validate_schedules",
        "_validate_setup",
        "_validate_others",
        "_validate_shards",
        "_validate_updates",
        "_validate_growth",
        "_validate_states",
    },
    {"margins"},
    {"negatives"},
    {"_cpu", "_triton", "_reference", "_loans", "_total", "_updates"},
    {"_schemas"},
    {"_ops", "_weight_sweeps", "_centers"},
    {"_flops", "tuning", "_setup", "_collectives", "_growth", "_states", "distributed"},
    {
        "functional",
        "regularizers",
        "metrics",
        "config",
        "optim",
        "plan",
        "sampling",
        "_in_backward",
    },
    {"losses"},
    {"compat", "schedules"},
    {"convert", "_rank_files"},
    {"__init__", "_places"},
)


def _imports() -> dict[str, set[str]]:
    """What each module of the package imports, inside of functions too, as "folder.module"."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}".removeprefix("fused_margin.")
                    is_module = inner in modules or f"{inner}.__init__" in modules
                    found.add(f"{node.module}.{alias.name}" if is_module else str(node.module))
        inside = {found_name.removeprefix("fused_margin.") for found_name in found}
        graph[name] = {f"{n}.__init__" if f"{n}.__init__" in modules else n for n in inside}
    return graph


def test_layers() -> None:
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    graph = _imports()
    for module, imported in graph.items():
        for other in imported & set(graph):
            lower, upper = other.split(".")[0], module.split(".")[0]
            assert rank[lower] <= rank[upper], f"{module} imports {other}"


def test_no_circles() -> None:
    graph = _imports()
    inside = {module: imported & set(graph) for module, imported in graph.items()}
    graphlib.TopologicalSorter(inside).prepare()


def test_only_the_kernels_import_triton() -> None:
    for module, imported in _imports().items():
        if not module.startswith("_triton."):
            assert not {name for name in imported if name.split(".")[0] == "triton"}, module


def test_only_functional_imports_the_reference() -> None:
    """An oracle that shares code with what it judges proves nothing."""
    users = {module for module, imported in _imports().items() if "_reference" in imported}
    assert users == {"functional.core", "functional.sweeps"}


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
        for folder in (".", "_cpu", "compat", "distributed", "functional", "losses")
        for path in (PACKAGE / folder).glob("*.py")
        if not path.name.startswith("_validate") and path.name not in ("_refusals.py", "tuning.py")
    ],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
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
WEIGHTS = {"class_weight": None, "focal_gamma": None, "focal_alpha": None}
SHARED = {"reduction": "mean", "ignore_index": -100} | BACKEND | WEIGHTS
SHARED |= {"label_smoothing": 0.0, "sub_centers": 1}
OF_CALLS = {"sample_weight": None, "negatives": None, "return_stats": False}
OPTIONS = SHARED | OF_CALLS
COMMON = SHARED | {"device": None, "dtype": None}
SIZES = [("num_classes", REQUIRED), ("embedding_size", REQUIRED)]
TENSORS = [("embeddings", REQUIRED), ("weight", REQUIRED), ("labels", REQUIRED)]
ANGULAR = {"boundary": "linear", "grad": "exact"}
CONTINUED = {"boundary": "none", "grad": "exact"}
COMBINED = [("m1", 1.0), ("m2", 0.5), ("m3", 0.0), ("scale", 64.0)]
MAGFACE = [("lower_margin", 0.45), ("upper_margin", 0.8), ("scale", 64.0)]
MAGNITUDES = {
    "lower_norm": 10.0, "upper_norm": 110.0, "regularizer": 35.0, "boundary": "linear",
}  # fmt: skip
CURRICULAR = [("margin", 0.5), ("scale", 64.0)]
MISCLASSIFIED = [("margin", None), ("scale", 32.0)]
MV = {"kind": "cos", "t": 1.2, "boundary": "linear"}
ELASTIC = {"sigma": 0.05, "kind": "arc", "plus": False, "boundary": "none", "generator": None}
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
    fm.AdaCosLoss: (SIZES, COMMON),
    fm.AdaFaceLoss: (
        [*SIZES, ("margin", 0.4), ("scale", 64.0)],
        {"h": 0.333, "momentum": 0.01} | COMMON,
    ),
    fm.CombinedMarginLoss: ([*SIZES, *COMBINED], CONTINUED | COMMON),
    fm.CircleSoftmaxLoss: ([*SIZES, ("margin", 0.35), ("scale", 64.0)], COMMON),
    fm.CurricularFaceLoss: (
        [*SIZES, *CURRICULAR],
        {"momentum": 0.01, "boundary": "linear"} | COMMON,
    ),
    fm.ElasticFaceLoss: ([*SIZES, ("margin", None), ("scale", 64.0)], ELASTIC | COMMON),
    fm.MVSoftmaxLoss: ([*SIZES, *MISCLASSIFIED], MV | COMMON),
    fm.MagFaceLoss: ([*SIZES, *MAGFACE], MAGNITUDES | COMMON),
    fm.SphereFaceLoss: ([*SIZES, ("margin", 1.5), ("scale", 30.0)], COMMON),
    fm.functional.adacos_scale: (
        [*TENSORS, ("scale", REQUIRED)],
        {"ignore_index": -100, "backend": "auto", "sub_centers": 1},
    ),
    fm.functional.adaface: (
        [*TENSORS, ("margin", 0.4), ("scale", 64.0)],
        {"h": 0.333, "norm_mean": 20.0, "norm_std": 100.0} | OPTIONS,
    ),
    fm.functional.combined_margin: ([*TENSORS, *COMBINED], CONTINUED | OPTIONS),
    fm.functional.circle_softmax: ([*TENSORS, ("margin", 0.35), ("scale", 64.0)], OPTIONS),
    fm.functional.curricularface: (
        [*TENSORS, *CURRICULAR],
        {"t": 0.0, "boundary": "linear"} | OPTIONS,
    ),
    fm.functional.curricularface_t: (
        [*TENSORS, ("t", REQUIRED), ("momentum", 0.01)],
        {"ignore_index": -100, "sub_centers": 1},
    ),
    fm.functional.elasticface: ([*TENSORS, ("margin", None), ("scale", 64.0)], ELASTIC | OPTIONS),
    fm.functional.inter_topk: (
        [*TENSORS, ("k", 5), ("penalty", 0.06)],
        {"kind": "arc", "sub_centers": None},
    ),
    fm.functional.mv_softmax: ([*TENSORS, *MISCLASSIFIED], MV | OPTIONS),
    fm.functional.magface: ([*TENSORS, *MAGFACE], MAGNITUDES | OPTIONS),
    fm.functional.margin_softmax: (
        [*TENSORS, ("psi", REQUIRED), ("scale", REQUIRED)],
        OPTIONS,
    ),
    fm.functional.sphereface: ([*TENSORS, ("margin", 1.5), ("scale", 30.0)], OPTIONS),
    fm.check_setup: ([("criterion", REQUIRED), ("optimizer", None)], {"group": None}),
    fm.regularizers.center_invariant: ([("weight", REQUIRED)], {}),
    fm.regularizers.regular_face: ([("weight", REQUIRED)], {}),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function: Callable[..., Any]) -> None:
    assert _signature(function) == SIGNATURES[function]


def test_shared_options_have_one_list() -> None:
    """The types that checkers see, the fields with their defaults, and what a module may set."""
    fields = options.Options._field_defaults
    assert list(fields) == list(options.CallOptions.__annotations__)
    own = {"device": None, "dtype": None}
    assert fields | own == base.DEFAULTS | OF_CALLS
    assert base.DEFAULTS.keys() - own - {"sub_centers"} <= fm.MarginSoftmaxLoss.settings.keys()
    for criterion in (f for f in SIGNATURES if isinstance(f, type)):
        assert inspect.signature(criterion.__init__).parameters["self"] is not None
        assert len(inspect.signature(criterion).parameters) <= 20


@pytest.mark.parametrize("call", [f for f in SIGNATURES if f is not fm.check_setup])
def test_a_keyword_that_is_none_is_named(call: Callable[..., Any]) -> None:
    needed = [p for p in inspect.signature(call).parameters.values() if p.default is REQUIRED]
    given: dict[str, Any] = {"num_classes": 5, "embedding_size": 6, "scale": 9.0}
    given |= {"embeddings": torch.randn(2, 6), "weight": torch.randn(5, 6)}
    given |= {"labels": torch.tensor([1, 2]), "psi": fm.margins.NO_MARGIN, "t": 0.1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'reducton'"):
        call(**{p.name: given[p.name] for p in needed}, reducton="mean")


def test_an_unknown_keyword_names_what_was_called_and_what_it_takes() -> None:
    with pytest.raises(
        TypeError, match=r"^ArcFaceLoss got an .*did you mean 'margin'\? It takes n"
    ):
        fm.ArcFaceLoss(5, 6, marjin=0.3)  # pyright: ignore[reportCallIssue]
    words = (
        r"^cosface got an unexpected keyword argument 'sigma'; it takes embeddings, .*, negatives"
    )
    with pytest.raises(TypeError, match=words):
        fm.functional.cosface(torch.randn(2, 6), torch.randn(5, 6), torch.arange(2), sigma=1)  # pyright: ignore[reportCallIssue]


def test_a_subclass_shows_the_shared_options() -> None:
    class Own(fm.MarginSoftmaxLoss):
        def __init__(self, num_classes: int, size: int = 3, **options: Any) -> None:
            super().__init__(num_classes, size, **options)

    positional, keywords = _signature(Own)
    assert positional == [("num_classes", REQUIRED), ("size", 3)]
    assert keywords == COMMON

    class Fixed(fm.MarginSoftmaxLoss):
        def __init__(self, num_classes: int) -> None:
            super().__init__(num_classes, 3)

    assert _signature(Fixed) == ([("num_classes", REQUIRED)], {})


@pytest.mark.parametrize("criterion", [f for f in SIGNATURES if isinstance(f, type)])
def test_call_signature_of_modules(criterion: type[torch.nn.Module]) -> None:
    names = list(inspect.signature(criterion.forward).parameters)
    assert names == ["self", "embeddings", "labels", "sample_weight", "return_stats"]
    logits = inspect.getattr_static(criterion, "logits")
    assert list(inspect.signature(logits).parameters) == ["self", "embeddings"]


def test_exports() -> None:
    for name in fm.__all__:
        assert hasattr(fm, name)
    for name in fm.functional.__all__:
        assert callable(getattr(fm.functional, name))


# Files that are no place for names: commands, and what `fused_margin` itself has
NO_PLACES = {"plan", "config", "__init__", "compat.__init__"}
PUBLIC = {
    module.removesuffix(".__init__")
    for module in _imports()
    if not any(part.startswith("_") for part in module.removesuffix(".__init__").split("."))
    and module not in NO_PLACES
    and module.partition(".")[0] not in ("functional", "losses", "distributed")
} | {"functional", "losses", "distributed", "compat"}


def test_what_is_elsewhere_is_named() -> None:
    """Every public name that the package doesn't have at its top, and where it is."""
    assert set(_places.MODULES) == PUBLIC
    for module in _places.MODULES:
        public = importlib.import_module(f"fused_margin.{module}").__all__
        for name in public:
            path = f"fused_margin.{module}.{name}"
            for asked in (fm, fm.compat):
                if name in asked.__all__ or name in ("compat", *_LAZY):
                    getattr(asked, name)
                    continue
                with pytest.raises(
                    AttributeError, match=rf"has no attribute '{name}'; it is "
                ) as e:
                    getattr(asked, name)
                top = f"fused_margin.{name}"
                assert path in str(e.value) or (module == "losses" and top in str(e.value))
                for place in re.findall(r"fused_margin[\w.]+", str(e.value).partition("; ")[2]):
                    assert pkgutil.resolve_name(place) is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ArcFace", "it is fused_margin.ArcFaceLoss or fused_margin.compat.insightface.ArcFace"),
        ("grow", r"it is a method of losses, criterion.grow\(...\)"),
        ("logits", "a method of losses"),
        ("AMSoftmaxLoss", "it is fused_margin.CosFaceLoss"),
        ("AdditiveAngularMargin", "fused_margin.ArcFaceLoss, or .*heads.SpeechBrainAAM"),
        ("SubArcFace", r"fused_margin.ArcFaceLoss\(..., sub_centers=3\)"),
        ("plan", "it is a module: import fused_margin.plan"),
        ("sample_negative", "did you mean fused_margin.sampling.sample_negatives"),
        ("ArcfaceLoss", "did you mean fused_margin.ArcFaceLoss"),
        ("nothing", "has no attribute 'nothing'$"),
        ("__path_of_nothing__", "has no attribute '__path_of_nothing__'$"),
    ],
)
def test_other_names(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fm, name, raising=False)  # a module that another test has imported
    with pytest.raises(AttributeError, match=words):
        getattr(fm, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TripletMarginLoss", "import this one from pytorch_metric_learning"),
        ("CrossBatchMemory", "import this one from pytorch_metric_learning"),
        ("anything", "has no attribute 'anything'$"),
    ],
)
def test_names_of_pytorch_metric_learning(name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(fm.compat.pml, name)


def test_tools_that_ask_import_nothing() -> None:
    """Names with an underscore, by doctest, inspect, pickle; a module by `from ... import`."""
    code = """
import sys, fused_margin as fm
before = set(sys.modules)
print(hasattr(fm, "__wrapped__"), hasattr(fm, "_nothing"))
from fused_margin import plan
more = (name for name in set(sys.modules) - before if name.startswith("fused_margin."))
print(sorted(name for name in more if "_places" not in name))
"""
    assert _run(code).splitlines() == ["False False", "['fused_margin.plan']"]
