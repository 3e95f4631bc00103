"""The ways in which the Triton backward may go, their choice, and how many launches they take."""

from __future__ import annotations

import dataclasses
import itertools
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
    HALF_MODES,
    MODES,
    Loss,
    Mode,
    arcface,
    check_loss,
    device_of,
    problem,
    run,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fused_margin.functional as fmf
from fused_margin import _ops, _validate

launch = pytest.importorskip("fused_margin._triton.launch", reason="Triton is not installed")
from fused_margin._triton import operands, planning, tiles  # noqa: E402  # after the check that Triton is there

pytestmark = pytest.mark.usefixtures("poison")
STRATEGIES = planning.STRATEGIES
DEVICE = device_of("triton")
NONE: dict[str, Any] = {"reduction": "none"}
# within and beyond one tile of rows, classes and dimensions, and within the fused tiles' D
SHAPES = ((7, 10, 3), (17, 41, 24), (33, 150, 40))


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    with planning.override(request.param):
        yield request.param


def _skip_without_tiles(strategy: str, mode: Mode) -> None:
    x = torch.empty(1, 8, dtype=mode.embeddings, device=DEVICE)
    w = torch.empty(1, 8, dtype=mode.weight, device=DEVICE)
    chosen = planning.plan(x, w, mode.autocast or mode.embeddings).tiles
    if strategy == "fused" and chosen.for_fused(40) is None:
        pytest.skip("this device has no fused tiles for this operand type")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(strategy: str, shape: tuple[int, int, int], mode: Mode) -> None:
    _skip_without_tiles(strategy, mode)
    check_loss(ARCFACE, problem(*shape), mode, "triton", **NONE)


@pytest.mark.parametrize("loss", [COSFACE, FIXED_ADACOS, arcface(scale=220.0), arcface(scale=1.0)])
def test_losses_and_scales(strategy: str, loss: Loss) -> None:
    for mode in (FP64, FP32):
        _skip_without_tiles(strategy, mode)
        check_loss(loss, problem(20, 70, 17), mode, "triton", reduction="mean")


@pytest.mark.parametrize(
    "needs",
    [needs for needs in itertools.product((False, True), repeat=3) if any(needs)],
    ids=lambda needs: "".join(name for name, need in zip("xws", needs, strict=True) if need),
)
def test_only_what_is_needed(strategy: str, needs: tuple[bool, bool, bool]) -> None:
    """Of d_x, d_w and d_scale; 50 classes are one split of one chunk, so d_x is finished there."""
    _skip_without_tiles(strategy, FP64)
    given = problem(20, 50, 17)

    def gradients(backend: str) -> list[torch.Tensor | None]:
        device = DEVICE if backend == "triton" else torch.device("cpu")
        values = (given.x, given.w, torch.tensor(9.0, dtype=torch.float64))
        leaves = [
            value.to(device, copy=True).requires_grad_(need)
            for value, need in zip(values, needs, strict=True)
        ]
        x, w, scale = leaves
        labels = given.labels.to(device)
        fmf.arcface(x, w, labels, 0.4, scale, backend=backend).backward()
        return [None if leaf.grad is None else leaf.grad.cpu() for leaf in leaves]

    for got, want in zip(gradients("triton"), gradients("reference"), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy_name", ["chunked", "kept"])
def test_several_chunks(monkeypatch: pytest.MonkeyPatch, strategy_name: str) -> None:
    monkeypatch.setattr(launch, "CHUNK_BYTES", 33 * 8 * 64)
    with planning.override(strategy_name):
        check_loss(ARCFACE, problem(33, 150, 40), FP64, "triton", **NONE)


def test_kept_blocks_may_differ_from_the_backward_s() -> None:
    given = problem(33, 150, 40)
    base = planning.plan(given.x.to(DEVICE), given.w.to(DEVICE), torch.float64).tiles
    tile = dataclasses.replace(base.gradient, c=16, n=32)
    with planning.override("kept", dataclasses.replace(base, gradient=tile)):
        check_loss(ARCFACE, given, FP64, "triton", **NONE)


def test_extreme_cosines(strategy: str) -> None:
    """exp(-lse) may overflow past the last class, and every kept exponential underflow."""
    x = torch.zeros(3, 20, dtype=torch.float64)
    x[:, 0] = 1.0
    w = torch.zeros(37, 20, dtype=torch.float64)
    w[:, 0] = -1.0
    w[5, 0] = 1.0
    labels = torch.tensor([5, 5, 3])
    for dtype, mode in ((torch.float64, FP64), (torch.float32, FP32)):
        _skip_without_tiles(strategy, mode)
        results = []
        for backend in ("triton", "reference"):
            leaf_x, leaf_w = (t.to(DEVICE, dtype, copy=True).requires_grad_() for t in (x, w))
            loss = fmf.cosface(
                leaf_x, leaf_w, labels.to(DEVICE), 0.2, 220.0, backend=backend, reduction="sum"
            )
            loss.backward()
            results.append([loss.detach(), leaf_x.grad, leaf_w.grad])
        for got, want in zip(*results, strict=True):
            assert got is not None
            assert bool(torch.isfinite(got).all())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_repeats_are_equal_to_the_bit(strategy: str) -> None:
    given = problem(33, 150, 40)
    for mode in (FP32, MODES[-1]):
        _skip_without_tiles(strategy, mode)
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
        default = tiles.default("sm_90", operands)
        return planning.strategy_for(num_rows, num_classes, dim, default, kept, budget)

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
        planning.override("fast").__enter__()
    with planning.override("fused"), pytest.raises(ValueError, match="no fused tiles for D = 300"):
        run(ARCFACE, problem(3, 5, 300), FP32, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_budget(dtype: torch.dtype) -> None:
    """Everything within the budget is kept, and nothing if it doesn't fit."""
    given = problem(9, 41, 5)
    x, w = given.x.to(DEVICE, dtype), given.w.to(DEVICE, dtype, copy=True).requires_grad_()
    labels = given.labels.to(DEVICE)
    blocks, size = launch.kept_shape(x, w, dtype, 1 << 30)
    needed = blocks * size
    columns = 16  # 9 rows of the batch, up to a multiple of 16
    block = size // (columns * dtype.itemsize) - 1  # classes
    entries = -(-41 // block) * columns * (block + 1)  # with a row of shifts each
    assert needed == entries * dtype.itemsize

    def kept_bytes(budget: int | None) -> int:
        found = []
        kept_shape = launch.kept_shape

        def recording(*arguments: Any) -> tuple[int, int]:
            blocks, size = kept_shape(*arguments)
            found.append(0 if size == planning.NOTHING else blocks * size)
            return blocks, size

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "kept_shape", recording)
            fmf.arcface(x, w, labels, backend="triton", memory_budget=budget)
        (once,) = found
        return once

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
    if DEVICE.type == "cuda":
        pytest.skip("counted by the profiler in benchmarks.gpu")

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launch, name)

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)

            def launch_it(*args: Any, **options: Any) -> None:
                with _disable_current_modes():  # the interpreter's own copies are none of ours
                    self.kernel[grid](*args, **options)

            return launch_it

    for name in KERNELS:
        monkeypatch.setattr(launch, name, Counted(name))
    return names


class Operators(TorchDispatchMode):
    """Records the eager operators that would launch something on a GPU."""

    FREE = ("empty", "new_empty", "view", "detach", "expand", "as_strided", "alias", "slice")

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        inside = {"margin_ce": _ops._margin_ce_operator, "cosine_lse_backward": _ops._backward}
        if name.startswith("fused_margin."):
            with self:  # a mode is off inside of what it was called for
                return inside[name.removeprefix("fused_margin.")](*args)
        result = func(*args, **(kwargs or {}))
        is_free = name.removeprefix("aten.").startswith(self.FREE)
        if name.startswith("aten.") and not is_free and not (args and result is args[0]):
            self.names.append(name)
        return result


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((128, 10, 40), ["fused_weight_kernel", "fused_embeddings_kernel", "finish_kernel"]),
        ((128, 10, 128), ["gradient_kernel", "weight_kernel", "embeddings_kernel"]),
        ((16, 16, 512), ["gradient_kernel", "weight_kernel", "embeddings_kernel"]),
    ],
)
def test_few_launches_at_small_c(
    monkeypatch: pytest.MonkeyPatch,
    launches: list[str],
    shape: tuple[int, int, int],
    kernels: list[str],
) -> None:
    """At most 2 launches forward and 3 backward, and no eager operator on N numbers."""
    num_rows, num_classes, dim = shape
    x = torch.randn(num_rows, dim, requires_grad=True)
    w = torch.randn(num_classes, dim, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))
    # on a GPU labels are checked by the kernel
    monkeypatch.setattr(_validate, "label_range", lambda *arguments: None)
    with Operators(launches):
        loss = fmf.arcface(x, w, labels, backend="triton")
        forward = list(launches)
        launches.clear()
        torch.autograd.grad(loss, (x, w))
    assert forward == ["sweep_kernel", "rows_kernel"]
    # autograd's own gradient of the loss, 1, and nothing else beside the kernels
    assert launches == ["aten.ones_like", *kernels]


def test_wide_tiles_and_a_cast_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: tiles that are finished in quarters, and x cast before the sweep."""
    monkeypatch.setattr(operands, "LAUNCH_BOUND", 0)
    wide = dataclasses.replace(
        tiles.default("interpreter", "bf16"),
        forward=tiles.Tile(64, 64, 16, 1, 1),
        gradient=tiles.Tile(64, 32, 16, 1, 1),
        weight=tiles.Tile(16, 32, 64, 1, 1),
        embeddings=tiles.Tile(32, 16, 64, 1, 1),
    )
    for mode in (FP32, HALF_MODES[4]):
        for num_classes in (40, 150):  # one chunk and split, which writes d_x itself, and several
            with planning.override("chunked", wide):
                check_loss(
                    ARCFACE, problem(70, num_classes, 100), mode, "triton", device=DEVICE,
                    reduction="none",
                )  # fmt: skip


# --- tensor descriptors ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy_name", ["chunked", "kept"])
@pytest.mark.parametrize("mode", [FP32, FP64, *HALF_MODES], ids=str)
def test_descriptors(mode: Mode, strategy_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of x, W and G by descriptors, in several chunks, the last of them shorter."""
    monkeypatch.setattr(launch, "CHUNK_BYTES", 48 * 8 * 64)
    for shape in ((33, 150, 40), (7, 40, 24)):
        with planning.override(strategy_name, descriptors=True):
            check_loss(ARCFACE, problem(*shape), mode, "triton", **NONE)
            check_loss(FIXED_ADACOS, problem(*shape), mode, "triton", reduction="mean")


# NumPy, in which the interpreter casts; a GPU makes inf without a word
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("power", [-60, -30, -9, 14, 16, 60])
def test_fp16_products_take_rows_of_any_norm(power: int, described: bool) -> None:
    """Rows of W are cast as they are, unless fp16, from 2^-24 to 65504, wouldn't hold them."""
    given = problem(33, 150, 40)
    mode = next(mode for mode in HALF_MODES if mode.name == "autocast_fp16")
    w = given.w / given.w.norm(dim=1, keepdim=True)
    w[::7] *= 2.0**power
    with planning.override("chunked", descriptors=described):
        check_loss(ARCFACE, dataclasses.replace(given, w=w), mode, "triton", **NONE)


def test_descriptors_leave_out_ignored_rows() -> None:
    """Blocks are loaded without a mask, so x is 0 there before."""
    given = problem(33, 150, 40)
    labels = given.labels.clone()
    labels[4] = -100
    grads = []
    for backend in ("reference", "triton"):
        x = given.x.to(DEVICE, torch.float64, copy=True)
        x[4] = float("nan")
        w = given.w.to(DEVICE, torch.float64, copy=True).requires_grad_()
        x.requires_grad_()
        with planning.override("chunked", descriptors=True):
            loss = fmf.arcface(x, w, labels.to(DEVICE), backend=backend)
            grads.append(torch.autograd.grad(loss, (x, w)))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_what_descriptors_can_address() -> None:
    """W's rows are contiguous and start at multiples of 16 bytes; a call is large."""

    def described(x: torch.Tensor, w: torch.Tensor) -> bool:
        return planning.describable(x, w)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(1024, 512)
    assert described(x, empty(20_000, 512))
    assert described(x, empty(20_000, 520)[:, :512])
    assert described(x, empty(20_000, 504, dtype=torch.bfloat16))
    assert not described(x, empty(20_000, 510)), "2040 bytes"
    assert not described(x, empty(20_000, 516, dtype=torch.bfloat16)), "1032 bytes"
    assert not described(x, empty(512, 20_000).t()), "a column after the other"
    assert not described(x[:2], empty(20_000, 512)), "bound by its launches"
    memory = torch.empty(1024 * 516 + 1)
    assert memory.data_ptr() % 16 == 0
    assert described(empty(2000, 516), memory[:-1].view(1024, 516))
    assert not described(empty(2000, 516), memory[1:].view(1024, 516)), "starts 4 bytes later"


def test_what_is_kept_depends_on_no_comparison_of_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where descriptors depend on N: `torch.export` would bind the batch."""

    def compares(*tensors: torch.Tensor) -> bool:
        raise AssertionError("compares N")

    monkeypatch.setattr(planning, "describable", compares)
    monkeypatch.setattr(planning, "_device", lambda index: planning.Device("sm_90", True, 132))
    with FakeTensorMode():
        x = torch.empty(64, 512, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(20_000, 512, device="cuda")
        assert launch.kept_shape(x, w, torch.bfloat16, 1 << 30)[1] > planning.NOTHING
        with pytest.raises(AssertionError, match="compares N"):
            planning.plan(x, w, torch.bfloat16)
