"""The cost model: its figures against known ones, its byte counts against recorded operations."""

from __future__ import annotations

import importlib
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from helpers import HAS_TRITON, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import baselines, roofline, shapes
from fused_margin import _cpu, _ops
from fused_margin._cpu import backend


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each argument and result once, and the peak alive.

    Views move nothing; what is expanded has the bytes of its storage; an operation that picks or
    places one entry a row touches just those, besides what it copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
        name = function.overloadpacket.__name__
        for tensor in new:
            storage = tensor.untyped_storage()
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        if new or function._schema.is_mutable:
            if name not in ("gather", "nll_loss_forward", "nll_loss_backward", "new_zeros"):
                self.bytes += sum(_bytes(tensor) for tensor in given)
            self.bytes += sum(_bytes(tensor) for tensor in made)
        return result


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("sizes", [(64, 4000, 256), (256, 4000, 32)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eager_bytes_and_memory_are_those_of_its_operations(
    dtype: str, sizes: tuple[int, int, int], backward: bool
) -> None:
    given = baselines.make_problem("arcface", *sizes)
    problem = given.to(roofline.DTYPES[dtype].x)
    x, w = (tensor.detach().requires_grad_(backward) for tensor in (problem.x, problem.w))
    with Traffic() as traffic:
        loss = baselines.careful_loss(x, w, problem.labels, problem.margin, problem.scale)
        if backward:
            loss.backward()
    shape = shapes.Shape("test", *sizes, "test")
    work = roofline.work(shape, roofline.DTYPES[dtype], "eager", backward=backward)
    # what is left out has size N, C or ND, and x is cast once more
    assert traffic.bytes == pytest.approx(work.bytes, rel=0.03)
    gradients = sum(t.numel() * t.element_size() for t in (x, w)) if backward else 0
    assert traffic.peak - gradients == pytest.approx(work.memory, rel=0.05)


def test_figures_of_an_h200() -> None:
    """Floors computed by hand from 790 TFLOP/s and 4.3 TB/s."""
    million = shapes.Shape("million", 1024, 1_000_000, 512, "test")
    webface = shapes.SHAPES["webface42m"]
    for shape, multiple, milliseconds in (
        (million, 6, 4.1),
        (million, 8, 5.4),
        (webface, 6, 8.2),
        (webface, 8, 10.9),
    ):
        seconds = roofline.ideal(shape, "bf16", roofline.H200, multiple)
        assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.05)
    dtypes = roofline.DTYPES["autocast-bf16"]
    work = roofline.work(million, dtypes, "chunked", backward=True)
    # W read twice in fp32 and d_w written once, and little besides
    assert 1e3 * work.bytes / roofline.H200.bandwidth == pytest.approx(1.5, rel=0.06)
    assert work.bytes == pytest.approx(3 * 4 * 1_000_000 * 512, rel=0.02)
    assert roofline.floor(work, roofline.H200) == pytest.approx(
        roofline.ideal(million, "bf16", roofline.H200, 8)
    )
    kept = roofline.work(webface, dtypes, "kept", backward=True)
    assert 1e3 * roofline.floor(kept, roofline.H200) == pytest.approx(8.2, rel=0.01)


def test_careful_eager_at_webface42m() -> None:
    """Its N x C tensors alone take about 50 ms; normalising W adds more than half of that."""
    shape = shapes.SHAPES["webface42m"]
    dtypes = roofline.DTYPES["autocast-bf16"]
    per_logit, per_weight = roofline._eager_bytes(dtypes, backward=True)
    logits = per_logit * shape.num_rows * shape.num_classes / roofline.H200.bandwidth
    weight = per_weight * shape.num_classes * shape.dim / roofline.H200.bandwidth
    assert 1e3 * logits == pytest.approx(48.1, abs=0.1)
    assert 1e3 * weight == pytest.approx(28.0, abs=0.1)
    work = roofline.work(shape, dtypes, "eager", backward=True)
    assert roofline.floor(work, roofline.H200) == pytest.approx(logits + weight, rel=1e-3)


@pytest.mark.parametrize(
    ("strategy", "multiple", "exponentials", "weights"),
    [("eager", 6, 2, None), ("chunked", 8, 2, 3), ("fused", 10, 3, 4), ("kept", 6, 3, 3)],
)
def test_flops_exponentials_and_sweeps(
    strategy: str,
    multiple: int,
    exponentials: int,
    weights: int | None,
) -> None:
    shape = shapes.SHAPES["glint360k"]
    n, c, d = shape.num_rows, shape.num_classes, shape.dim
    work = roofline.work(shape, roofline.DTYPES["bf16-weight"], strategy, backward=True)
    assert work.flops == {"bf16": multiple * n * c * d}
    assert work.exponentials == exponentials * n * c
    if weights is not None:
        kept = 2 * 2 * n * c if strategy == "kept" else 0
        assert work.bytes - kept == pytest.approx(weights * 2 * c * d, rel=0.05)
    forward = roofline.work(shape, roofline.DTYPES["bf16-weight"], strategy, backward=False)
    assert forward.flops == {"bf16": 2 * n * c * d}
    assert forward.bytes < work.bytes


def test_fp16_multiplies_gradients_in_tf32() -> None:
    shape = shapes.SHAPES["llm"]
    ncd = shape.num_rows * shape.num_classes * shape.dim
    work = roofline.work(shape, roofline.DTYPES["fp16"], "chunked", backward=True)
    assert work.flops == {"fp16": 4 * ncd, "tf32": 4 * ncd}
    kept = roofline.work(shape, roofline.DTYPES["fp16"], "kept", backward=True)
    logits = shape.num_rows * shape.num_classes
    assert kept.memory == pytest.approx(work.memory + 4 * logits)  # exponentials in G's dtype, fp32
    rates = roofline.H100.rates
    assert roofline.floor(work, roofline.H100) == pytest.approx(
        4 * ncd / rates["fp16"] + 4 * ncd / rates["tf32"]
    )


def test_memory_does_not_grow_with_rows_by_classes() -> None:
    dtypes = roofline.DTYPES["autocast-bf16"]
    shape = shapes.SHAPES["ten_million"]
    logits = shape.num_rows * shape.num_classes
    for strategy in ("chunked", "fused"):
        work = roofline.work(shape, dtypes, strategy, backward=True)
        assert work.memory < 64e6 + 4 * shape.num_classes + 34e6
    assert roofline.work(shape, dtypes, "kept", backward=True).memory > 2 * logits
    assert roofline.work(shape, dtypes, "eager", backward=True).memory > 4 * logits


@pytest.mark.parametrize(
    ("dim", "lent"), [(512, 1.0), (64, 0.25)], ids=["d_w holds all", "d_w holds a part"]
)
def test_cpu_forms_again_what_it_does_not_hold(dim: int, lent: float) -> None:
    """Exponentials of all classes, or of whole blocks, lie where d_w will; some more on top."""
    dtypes = roofline.DTYPES["fp32"]
    shape = shapes.Shape("many", 256, 500_000, dim, "test")
    ncd = shape.num_rows * shape.num_classes * shape.dim
    work = roofline.work(shape, dtypes, "cpu", backward=True)
    nothing = roofline.work(shape, dtypes, "cpu", backward=True, memory_budget=0)
    block = 4096 / shape.num_classes
    assert nothing.flops["ieee"] == pytest.approx((8 - 2 * lent) * ncd, abs=2 * block * ncd)
    x, w = torch.empty(256, dim, device="meta"), torch.empty(500_000, dim, device="meta")
    num_bytes = int(_cpu.kept_bytes(x, w, _ops.DEFAULT_BUDGET)) - backend.LARGER_BLOCKS
    on_top = min(num_bytes / (1024 * 500_000), 1.0 - lent)
    saved = nothing.flops["ieee"] - work.flops["ieee"]
    assert saved == pytest.approx(2 * on_top * ncd, abs=2 * block * ncd)
    assert work.memory - nothing.memory == pytest.approx(on_top * 1024 * 500_000, abs=4096 * 1024)


def test_cpu_keeps_few_classes_on_top() -> None:
    dtypes, shape = roofline.DTYPES["fp32"], shapes.SHAPES["mnist"]
    work = roofline.work(shape, dtypes, "cpu", backward=True)
    nothing = roofline.work(shape, dtypes, "cpu", backward=True, memory_budget=0)
    assert work.memory - nothing.memory == 4 * shape.num_rows * shape.num_classes


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_scratch_is_that_of_the_kernels() -> None:
    launch = importlib.import_module("fused_margin._triton.launch")
    operands = importlib.import_module("fused_margin._triton.operands")
    assert roofline.CHUNK_BYTES == launch.CHUNK_BYTES
    assert roofline.PARTIAL_BYTES == operands.PARTIAL_BYTES


def test_sources_and_missing_figures() -> None:
    assert roofline.H200.source_of("bf16") == "measured"
    assert roofline.H200.source_of("fp16") == "published"
    assert roofline.H100.source_of("bandwidth") == "measured"
    assert roofline.A100.source_of("bandwidth") == "published"
    slow = roofline.Device("slow", {"bf16": 1e12}, 1e9, "published")
    work = roofline.work(shapes.SHAPES["sop"], roofline.DTYPES["fp32"], "chunked", backward=True)
    with pytest.raises(ValueError, match="no rate of ieee products is known for slow"):
        roofline.floor(work, slow)
    with pytest.raises(ValueError, match="strategy must be one of"):
        roofline.work(shapes.SHAPES["sop"], roofline.DTYPES["fp32"], "quick", backward=True)


def test_a_cpu_is_measured() -> None:
    device = roofline.measure(torch.device("cpu"), seconds=0.01)
    assert device.source_of("ieee") == "measured"
    assert ("bf16" in device.rates) == _cpu.has_bf16_products()
    assert 1e9 < device.rates["ieee"] < 1e14
    assert 1e8 < device.bandwidth < 1e13


def test_command() -> None:
    command = [sys.executable, "-m", "benchmarks.roofline"]
    done = subprocess.run(
        [*command, "--n", "1024", "--c", "1000000", "--d", "512", "--device", "h200"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line[:28].strip(): line.split() for line in done.stdout.splitlines()}
    assert float(rows["8NCD alone"][-1]) == pytest.approx(5.31, abs=0.01)
    assert float(rows["chunked, forward+backward"][-2]) == pytest.approx(5.31, abs=0.01)
    assert "4.3 TB/s (measured)" in done.stdout
    done = subprocess.run(
        [*command, "--n", "3"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "all of --n, --c and --d" in done.stderr
