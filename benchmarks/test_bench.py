"""pytest-benchmark cases on the named shapes that fit a CPU: `make bench`.

Cases of one group do the same work. pytest-benchmark times one case after another, so that drift of
the machine is in the comparison; ratios worth quoting come from ``python -m benchmarks.cpu``, which
interleaves.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.baselines import CONTENDERS, LOSSES, Contender, Problem, make_problem
from benchmarks.harness import Gate
from benchmarks.shapes import CPU_SHAPES, SHAPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBLEMS = [
    pytest.param((shape, loss, dtype), id=f"{shape}-{loss}-{dtype}")
    for shape in CPU_SHAPES
    for loss in LOSSES
    for dtype in DTYPES
]
LARGE = 10**9  # N x C x D above which a step takes a good part of a second


@pytest.fixture(scope="module", params=PROBLEMS)
def gated(request: pytest.FixtureRequest) -> tuple[Problem, Gate]:
    """Build the problem and its fp64 yardstick, once for all contenders."""
    shape_name, loss, dtype = request.param
    shape = SHAPES[shape_name]
    problem = make_problem(loss, shape.num_rows, shape.num_classes, shape.dim).to(DTYPES[dtype])
    return problem, Gate(problem)


@pytest.fixture(params=CONTENDERS)
def contender(gated: tuple[Problem, Gate], request: pytest.FixtureRequest) -> Contender:
    """Bind a contender and let it through the gate; a wrong result fails and reports no time."""
    problem, gate = gated
    if request.param == "usual" and problem.x.dtype is not torch.float32:
        pytest.skip("pytorch-metric-learning recasts its weight to the embeddings' dtype")
    bound = CONTENDERS[request.param](problem)
    gate.check(bound)
    return bound


@pytest.mark.parametrize("work", ["forward", "step"], ids=["forward", "forward+backward"])
def test_speed(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    gated: tuple[Problem, Gate],
    contender: Contender,
    work: str,
) -> None:
    problem, _ = gated
    num_rows, dim = problem.x.shape
    is_large = num_rows * problem.w.shape[0] * dim > LARGE
    benchmark.group = f"{request.node.callspec.params['gated']} {work}"
    loss = benchmark.pedantic(
        getattr(contender, work),
        setup=contender.clear,
        rounds=5 if is_large else 25,
        warmup_rounds=1,
    )
    assert torch.isfinite(loss)
