"""The ways in which the Triton backward may go, their choice, and how many launches they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    ARCFACE,
    COSFACE,
    FIXED_ADACOS,
    FP32,
    FP64,
    MODES,
    Loss,
    Mode,
    arcface,
    check_loss,
    problem,
    run,
)

import fused_margin.functional as fmf

launch = pytest.importorskip(
    "fused_margin._triton.launch", reason="Triton has no wheel for this platform"
)
from fused_margin._triton import configs  # noqa: E402  # after the check that Triton is there

pytestmark = pytest.mark.usefixtures("poison")
STRATEGIES = launch.STRATEGIES
NONE: dict[str, Any] = {"reduction": "none"}
# within and beyond one tile of rows, classes and dimensions, and within the fused tiles' D
SHAPES = ((7, 10, 3), (17, 41, 24), (33, 150, 40))


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    with launch.override(request.param):
        yield request.param


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(strategy: str, shape: tuple[int, int, int], mode: Mode) -> None:
    check_loss(ARCFACE, problem(*shape), mode, "triton", **NONE)


@pytest.mark.parametrize("loss", [COSFACE, FIXED_ADACOS, arcface(scale=220.0), arcface(scale=1.0)])
def test_losses_and_scales(strategy: str, loss: Loss) -> None:
    for mode in (FP64, FP32):
        check_loss(loss, problem(20, 70, 17), mode, "triton", reduction="mean")


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_only_what_is_needed(strategy: str, needs: tuple[bool, bool]) -> None:
    given = problem(20, 70, 17)

    def gradients(backend: str) -> list[torch.Tensor | None]:
        x = given.x.clone().requires_grad_(needs[0])
        w = given.w.clone().requires_grad_(needs[1])
        scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        fmf.arcface(x, w, given.labels, 0.4, scale, backend=backend).backward()
        return [x.grad, w.grad, scale.grad]

    for got, want in zip(gradients("triton"), gradients("reference"), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy_name", ["chunked", "kept"])
def test_several_chunks(monkeypatch: pytest.MonkeyPatch, strategy_name: str) -> None:
    monkeypatch.setattr(launch, "CHUNK_BYTES", 33 * 8 * 64)
    with launch.override(strategy_name):
        check_loss(ARCFACE, problem(33, 150, 40), FP64, "triton", **NONE)


def test_kept_blocks_may_differ_from_the_backward_s() -> None:
    base = configs.config("interpreter", "fp64")
    tile = dataclasses.replace(base.gradient, columns=16, rows=32)
    with launch.override("kept", dataclasses.replace(base, gradient=tile)):
        check_loss(ARCFACE, problem(33, 150, 40), FP64, "triton", **NONE)


def test_extreme_cosines(strategy: str) -> None:
    """exp(-lse) may overflow past the last class, and every kept exponential underflow."""
    x = torch.zeros(3, 20, dtype=torch.float64)
    x[:, 0] = 1.0
    w = torch.zeros(37, 20, dtype=torch.float64)
    w[:, 0] = -1.0
    w[5, 0] = 1.0
    labels = torch.tensor([5, 5, 3])
    for dtype in (torch.float64, torch.float32):
        results = []
        for backend in ("triton", "reference"):
            leaf_x, leaf_w = (t.clone().to(dtype).requires_grad_() for t in (x, w))
            loss = fmf.cosface(leaf_x, leaf_w, labels, 0.2, 220.0, backend=backend, reduction="sum")
            loss.backward()
            results.append([loss.detach(), leaf_x.grad, leaf_w.grad])
        for got, want in zip(*results, strict=True):
            assert got is not None
            assert bool(torch.isfinite(got).all())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_repeats_are_equal_to_the_bit(strategy: str) -> None:
    given = problem(33, 150, 40)
    for mode in (FP32, MODES[-1]):
        first = run(ARCFACE, given, mode, "triton", **NONE)
        for got, want in zip(run(ARCFACE, given, mode, "triton", **NONE), first, strict=True):
            assert torch.equal(got, want)


# --- which one ------------------------------------------------------------------------------------


def test_the_rule() -> None:
    def chosen(
        num_rows: int,
        num_classes: int,
        dim: int,
        operands: str = "bf16",
        kept: int = 1,
        budget: int = 0,
    ) -> str:
        config = configs.config("sm_90", operands)
        return launch.strategy_for(num_rows, num_classes, dim, config, kept, budget)

    assert chosen(512, 360_232, 512) == "chunked"
    assert chosen(512, 360_232, 64) == "fused"
    assert chosen(512, 360_232, 128) == "chunked"
    assert chosen(128, 10, 128) == "fused"
    assert chosen(16, 16, 512) == "chunked", "no fused tiles for this D"
    assert chosen(512, 360_232, 64, "ieee") == "chunked", "no fused tiles for this type"
    assert chosen(512, 360_232, 512, kept=100, budget=100) == "kept"
    assert chosen(512, 360_232, 512, kept=100, budget=99) == "chunked"


def test_a_strategy_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"strategy must be one of .*, got 'fast'"):
        launch.override("fast").__enter__()
    with launch.override("fused"), pytest.raises(ValueError, match="no fused tiles for D = 65"):
        run(ARCFACE, problem(3, 5, 65), FP32, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_budget(dtype: torch.dtype) -> None:
    """Everything within the budget is kept, and nothing if it doesn't fit."""
    given = problem(9, 41, 5)
    x, w = given.x.to(dtype), given.w.to(dtype).requires_grad_()
    blocks, size = launch.kept_shape(x, w, dtype, 1 << 30)
    needed = blocks * size
    assert needed == 2 * 9 * (32 + 1) * dtype.itemsize, "two blocks of 32 classes, and shifts"

    def kept_bytes(budget: int | None) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            fmf.arcface(x, w, given.labels, backend="triton", memory_budget=budget)
        return sum(t.numel() for t in saved if t.dtype is torch.uint8)

    assert kept_bytes(needed) == needed
    assert kept_bytes(needed - 1) == kept_bytes(0) == kept_bytes(None) == 0
    with torch.no_grad():
        assert kept_bytes(needed) == 0


# --- launches -------------------------------------------------------------------------------------

KERNELS = [name for name in vars(launch) if name.endswith("_kernel")]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, and of the eager operators that a GPU would run as kernels."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launch, name)

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Counted(name))
    zeros = torch.zeros

    def counted_zeros(*args: Any, **options: Any) -> torch.Tensor:
        names.append("memset")
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", counted_zeros)
    return names


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((128, 10, 40), ["fused_weight_kernel", "fused_embeddings_kernel", "finish_kernel"]),
        ((128, 10, 128), ["gradient_kernel", "weight_kernel", "embeddings_kernel"]),
        ((16, 16, 512), ["gradient_kernel", "weight_kernel", "embeddings_kernel"]),
    ],
)
def test_few_launches_at_small_c(
    launches: list[str], shape: tuple[int, int, int], kernels: list[str]
) -> None:
    """At most 2 launches forward and 3 backward, and no eager operator on N numbers."""
    num_rows, num_classes, dim = shape
    x = torch.randn(num_rows, dim, requires_grad=True)
    w = torch.randn(num_classes, dim, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))
    loss = fmf.arcface(x, w, labels, backend="triton")
    assert launches == ["memset", "forward_kernel"]
    launches.clear()
    torch.autograd.grad(loss, (x, w))
    assert launches == kernels
