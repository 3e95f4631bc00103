"""What a strategy has to compute and to move for a shape, and the least time a device needs for it.

    python -m benchmarks.roofline --shape webface42m --device h100 --strategy chunked lent
    python -m benchmarks.roofline --n 256 --c 100000 --d 512 --device cpu --dtype fp32

A floor is the longer of two times, flops of matrix products over the device's rate for that operand
type, and bytes from and to device memory over its bandwidth. Exponentials, launches and everything
of size N or C with few bytes are free, so no implementation of the strategy reaches its floor.

**Flops.** One N x C x D product is 2NCD. The forward has one. The backward has two, and forms the
cosines again: once ("chunked"), in each of its two kernels ("fused"), or not at all ("kept"; "cpu"
but for the classes beyond its budget). Forward and backward: 8NCD, 10NCD, 6NCD, 6 to 8NCD. Eager
code needs 6NCD.

**Exponentials**, logarithms included: NC in the forward, and NC each time the cosines are formed
again. "kept" takes one exponential and one logarithm for each that it reads back.

**Bytes** counted in this package's strategies, with e_x, e_w, e_a, e_o, e_g the sizes of an element
of x, W, a sum, an operand of a product, and a stored G:

- W, e_w CD, once in the forward and once in the backward; once more for "fused", whose two kernels
  each sweep all of it. Other reads of the same rows (for other rows of the batch, the projection,
  the second product of a chunk) come soon after the first and are left to the caches.
- d_w, written once, e_w CD (it has W's dtype). Inverse norms of W: written, read, e_a C each.
- x, read once in each direction, e_x ND, and d_x written; further reads of x hit the caches.
- Partials of d_x, `partial_bytes`, written once and read once, except on a CPU. Adding to them
  after each chunk is left to the caches, and so is the chunk of G.
- "kept": an entry for each cosine in the dtype of G, e_g NC written by the forward and read by the
  backward.
  "cpu": e_o N for each class kept, likewise. On a CPU blocks of cosines stay in the cache.
- Rows: seven numbers of e_a a row written in the forward (loss, lse, u, d_lse, d_u, norm, label),
  and read in the backward.

**L2 bytes**, printed but in no floor: the chunk of G, written once and read by two products,
3 e_g NC; and the partials of d_x, read and written for each chunk. "fused" has no G.

**Bytes of careful eager code**, tensor by tensor: `_eager_bytes` lists every operation that runs;
each reads its arguments and writes its result once, however many passes its kernel makes. That
these are all is tested by recording the operations of `baselines.careful_loss`. At the size of
webface42m with bf16 products the N x C tensors alone are 207 GB, 48 ms on an H200; normalising W
and its derivative add 120 GB of C x D, 28 ms.

**Memory** is the peak above x, W, labels, d_x and d_w, by the count of what is allocated.

"lent" keeps an exponential for each cosine where d_w will be, e_g NC, if e_g N <= e_w D, else of
the first rows; both products read them, but for D > 512, whose G is made of them by chunks.

For Hopper GPUs a second table, of the package's own choice of strategy and of those that --strategy
names, predicts the time of each kernel, from its launches and its compiled code
(`benchmarks.predicted`). It takes Triton, and seconds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.harness import cpu_name, whole_number
from benchmarks.shapes import SHAPES, Shape
from fused_margin import _cpu, _ops, _validate
from fused_margin._cpu import single, sweep
from fused_margin._cpu.backend import LARGER_BLOCKS
from fused_margin._triton.tiles import LENT, rows_held

# The backward's chunk of G, and all its partials of d_x (`launch` and `operands` of the package).
CHUNK_BYTES = 64 << 20
PARTIAL_BYTES = 64 << 20
# Partials come from about two tiles of d_x for each multiprocessor of a large GPU.
PARTIAL_TILES, PARTIAL_TILE = 264, 128 * 128

STRATEGIES = ("eager", "cpu", *(GPU_STRATEGIES := ("chunked", "fused", "kept", "lent")))
SCALE = 64.0  # one whose exponentials need no shift


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of the embeddings and of W, and the operand type of the products.

    ``operand`` is one of "bf16", "fp16", "tf32", "ieee" (fp32 without a matrix unit) and "fp64".
    """

    x: torch.dtype
    w: torch.dtype
    operand: str

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of sums."""
        return torch.float64 if self.operand == "fp64" else torch.float32

    @property
    def compute(self) -> torch.dtype:
        """Dtype of an operand as it lies in memory."""
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes.get(self.operand, self.accumulate)


# What the products run in, as people choose it. "autocast-*": fp32 embeddings and W.
DTYPES = {
    "autocast-bf16": Dtypes(torch.float32, torch.float32, "bf16"),
    "bf16": Dtypes(torch.bfloat16, torch.float32, "bf16"),
    "bf16-weight": Dtypes(torch.bfloat16, torch.bfloat16, "bf16"),
    "autocast-fp16": Dtypes(torch.float32, torch.float32, "fp16"),
    "fp16": Dtypes(torch.float16, torch.float32, "fp16"),
    "tf32": Dtypes(torch.float32, torch.float32, "tf32"),
    "fp32": Dtypes(torch.float32, torch.float32, "ieee"),
    "fp64": Dtypes(torch.float64, torch.float64, "fp64"),
}


@dataclass(frozen=True)
class Work:
    """What one strategy does in one pass over one shape.

    Attributes:
        flops: of matrix products, by operand type.
        exponentials: how many are taken, and logarithms.
        bytes: from and to device memory.
        l2_bytes: of the scratch that is taken to stay in the L2 cache.
        memory: peak bytes above inputs and gradients.
    """

    flops: Mapping[str, float]
    exponentials: float
    bytes: float
    l2_bytes: float
    memory: float


@dataclass(frozen=True)
class Chip:
    """What `benchmarks.predicted` needs to know besides.

    Attributes:
        processors: multiprocessors. warps: of each, at most. clock: Hz.
        l2_rates: bytes/s between L2 and all multiprocessors, the least and the most expected.
        l2_bytes: size of the L2 cache.
    """

    processors: int
    warps: int
    clock: float
    l2_rates: tuple[float, float]
    l2_bytes: float


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    Attributes:
        name: what the table calls it.
        rates: flop/s of dense matrix products by operand type.
        bandwidth: bytes/s of device memory, reads and writes together.
        source: "published" or "measured", of every figure that `measured` doesn't name.
        measured: names of other figures that were measured: operand types, or "bandwidth".
        chip: None where times of kernels aren't predicted.
    """

    name: str
    rates: Mapping[str, float]
    bandwidth: float
    source: str
    measured: frozenset[str] = field(default_factory=frozenset)
    chip: Chip | None = None

    def source_of(self, figure: str) -> str:
        """Where the rate of an operand type, or the "bandwidth", comes from."""
        return "measured" if figure in self.measured else self.source

    def rate(self, operand: str) -> float:
        """flop/s for an operand type.

        Raises:
            ValueError: there is no figure for it.
        """
        if operand not in self.rates:
            raise ValueError(
                f"no rate of {operand} products is known for {self.name},"
                f" only of {', '.join(self.rates)}"
            )
        return self.rates[operand]


# From 5.5 to 8 TB/s is what others measured between L2 and the multiprocessors of an H100.
HOPPER = Chip(132, 64, 1.83e9, (5.5e12, 8.0e12), 50e6)
# Dense rates without sparsity. The published bandwidth of an H200 is 4.8 TB/s and its bf16 rate
# 989 TFLOP/s; a copy reached 4.3 and a large product 790, which are the more honest ceilings. Of an
# H100 the figures are those of benchmarks/results/nvidia-h100-gpu.json.
H200 = Device(
    "H200",
    {"bf16": 790e12, "fp16": 989e12, "tf32": 494e12, "ieee": 67e12, "fp64": 67e12},
    4.3e12,
    "published",
    frozenset({"bf16", "bandwidth"}),
    HOPPER,
)
H100 = Device(
    "H100 SXM",
    {"bf16": 842e12, "fp16": 882e12, "tf32": 458e12, "ieee": 51.5e12, "fp64": 58.2e12},
    2.98e12,
    "measured",
    chip=HOPPER,
)
A100 = Device(
    "A100 SXM 80GB",
    {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "ieee": 19.5e12, "fp64": 19.5e12},
    2.039e12,
    "published",
)
DEVICES = {"h200": H200, "h100": H100, "a100": A100}


def _work_eager(shape: Shape, dtypes: Dtypes, *, backward: bool) -> Work:
    rows_by_classes = shape.num_rows * shape.num_classes
    classes_by_dim = shape.num_classes * shape.dim
    rows_by_dim = shape.num_rows * shape.dim
    per_logit, per_weight = _eager_bytes(dtypes, backward=backward)
    product = 2.0 * rows_by_classes * shape.dim
    a, w, o = dtypes.accumulate.itemsize, dtypes.w.itemsize, dtypes.compute.itemsize
    # The worse of two moments, d_w not yet or no longer counted: the loss, with four N x C (cosines
    # kept by the gather, logits with margin, scaled logits, log-probabilities) and the normalised
    # W; the derivative of the normalisation, with five C x D, of which one is d_w.
    if backward:
        d_w = w * classes_by_dim
        at_loss = 4.0 * a * rows_by_classes + o * classes_by_dim
        memory = max(at_loss, 5.0 * w * classes_by_dim) - d_w
    else:  # logits with margin, scaled logits, log-probabilities; or W normalised, and cast
        normalised = float(w + (o if o != w else 0)) * classes_by_dim
        memory = max(3.0 * a * rows_by_classes + o * classes_by_dim, normalised)
    return Work(
        flops={dtypes.operand: product * (3 if backward else 1)},
        exponentials=float(rows_by_classes * (2 if backward else 1)),
        bytes=per_logit * rows_by_classes
        + per_weight * classes_by_dim
        + per_weight * rows_by_dim,  # x goes through the same operations as W
        l2_bytes=0.0,
        memory=memory,
    )


def _eager_bytes(dtypes: Dtypes, *, backward: bool) -> tuple[float, float]:
    """Bytes of `baselines.careful_loss` for each element of N x C, and of C x D.

    "read + written" for each operation that runs; what is expanded or gathered counts as nothing.
    """
    a, w, o = dtypes.accumulate.itemsize, dtypes.w.itemsize, dtypes.compute.itemsize
    casts_cosines, casts_weight = o != a, o != w
    per_logit = [
        0 + o,  # cosines, written by the product
        o + a if casts_cosines else 0,  # cast
        a + a,  # scatter: the target's logit into a copy
        a + a,  # times the scale
        a + a,  # log-softmax
    ]
    per_weight = [
        w + 0,  # norms
        w + w,  # w over its norm
        w + o if casts_weight else 0,  # cast
        o + 0,  # read by the product
    ]
    if backward:
        per_logit += [
            0 + a,  # derivative of the negative log-likelihood: zeros, and one entry a row
            2 * a + a,  # of log-softmax
            a + a,  # of the scale
            a + a,  # of the scatter: a copy with zeros at the targets
            0 + a,  # of the gather: zeros ...
            a + a,  # ... and a copy of them, to which one entry a row is added
            2 * a + a,  # the sum of the two
            a + o if casts_cosines else 0,  # cast
            o + o,  # read by both products
        ]
        per_weight += [
            o + o,  # the products: W is read, its gradient written
            o + w if casts_weight else 0,  # cast
            w + w,  # derivative of the quotient by w: gradient over norm
            w + w,  # by the norm: w over norm,
            w + w,  # over norm,
            w + w,  # negated gradient,
            2 * w + w,  # their product,
            w + 0,  # summed
            w + w,  # derivative of the norm: w over norm,
            w + w,  # zero where the norm is,
            w + w,  # times the norm's gradient
            2 * w + w,  # the sum of the two
        ]
    return float(sum(per_logit)), float(sum(per_weight))


def _row_bytes(shape: Shape, dtypes: Dtypes, *, backward: bool) -> float:
    """Bytes of what has size ND, N or C in this package's strategies."""
    a, rows = dtypes.accumulate.itemsize, shape.num_rows
    x = dtypes.x.itemsize * rows * shape.dim
    one_way = x + 7 * a * rows + a * shape.num_classes
    return float(2 * one_way + x if backward else one_way)  # d_x has the size of x


def partial_bytes(shape: Shape, dtypes: Dtypes) -> float:
    """Bytes of the partials of d_x: at least one, and enough of them to occupy a large GPU."""
    a = dtypes.accumulate.itemsize
    one = a * shape.num_rows * shape.dim
    return float(max(one, min(PARTIAL_BYTES, PARTIAL_TILES * PARTIAL_TILE * a)))


def lent_share(shape: Shape, dtypes: Dtypes) -> tuple[float, bool]:
    """Of the exponentials, what has room in d_w; whether tiles hold whole rows of it, as is."""
    if (lent := LENT.get(("sm_90", dtypes.operand))) is None:
        return 0.0, False
    itemsize = 4 if dtypes.operand == "fp16" else dtypes.compute.itemsize
    columns = dtypes.w.itemsize * shape.dim // itemsize
    share = rows_held(shape.num_rows, columns, lent.weight.n) / shape.num_rows
    is_direct = shape.dim <= lent.weight.d
    return (share if is_direct else float(share == 1.0)), is_direct


def _work_gpu(shape: Shape, dtypes: Dtypes, strategy: str, *, backward: bool) -> Work:
    num_rows, num_classes, dim = shape.num_rows, shape.num_classes, shape.dim
    logits, product = num_rows * num_classes, 2.0 * num_rows * num_classes * dim
    lent, is_direct = lent_share(shape, dtypes) if strategy == "lent" else (0.0, False)
    held, direct = 1.0 if strategy == "kept" else lent, lent if is_direct else 0.0
    weight = float(dtypes.w.itemsize * num_classes * dim)
    rows = _row_bytes(shape, dtypes, backward=backward)
    norms = dtypes.accumulate.itemsize * num_classes
    if not backward:
        # nothing is kept when no backward follows
        return Work({dtypes.operand: product}, float(logits), weight + rows, 0.0, float(norms))

    # fp16 lacks the exponents for probabilities: G is kept in fp32, and multiplied in TF32
    operand_g = "tf32" if dtypes.operand == "fp16" else dtypes.operand
    itemsize_g = 4 if dtypes.operand == "fp16" else dtypes.compute.itemsize
    # times they are formed, in all
    cosines = 3 if strategy == "fused" else 2 - held
    flops = {dtypes.operand: cosines * product}
    flops[operand_g] = flops.get(operand_g, 0.0) + 2.0 * product
    partials = partial_bytes(shape, dtypes)
    reads_of_weight = 3 if strategy == "fused" or direct else 2
    kept_bytes = float(itemsize_g * logits * held)
    chunk = l2_bytes = 0.0
    if strategy != "fused" and direct < 1.0:
        of_chunks = itemsize_g * logits * (1.0 - direct)
        chunk = float(min(CHUNK_BYTES, of_chunks))
        l2_bytes = 3.0 * of_chunks + 2.0 * partials * max(of_chunks / chunk - 1.0, 0.0)
    return Work(
        flops=flops,
        # for what is kept on top an exponential and a logarithm, besides the forward's
        exponentials=float((cosines + (2 if strategy == "kept" else lent > direct)) * logits),
        bytes=(reads_of_weight + 1) * weight
        + rows
        + 2.0 * partials
        + (3.0 if direct else 2.0) * kept_bytes,
        l2_bytes=l2_bytes,
        memory=norms + partials + chunk + (0.0 if lent else kept_bytes),
    )


def _work_cpu(shape: Shape, dtypes: Dtypes, budget: int, *, backward: bool) -> Work:
    num_rows, num_classes, dim = shape.num_rows, shape.num_classes, shape.dim
    logits, product = num_rows * num_classes, 2.0 * num_rows * num_classes * dim
    x = torch.empty(num_rows, dim, dtype=dtypes.x, device="meta")
    w = torch.empty(num_classes, dim, dtype=dtypes.w, device="meta")
    compute = _cpu.product_dtype(dtypes.compute, dtypes.accumulate)
    a, o = dtypes.accumulate.itemsize, compute.itemsize
    # tf32 does not exist on a CPU, and fp16 runs in fp32
    operand = "bf16" if compute is torch.bfloat16 else "fp64" if a == 8 else "ieee"
    is_single = single.fits(num_rows, num_classes, dim)
    num_bytes = int(_cpu.kept_bytes(x, w, budget))
    kept = _cpu.kept_classes(x, w, dtypes.compute, num_bytes) if backward else 0
    block = num_classes if is_single else sweep.block_size((num_rows, num_classes, dim), a)
    lent, labels = 0, torch.empty(num_rows, dtype=torch.int64, device="meta")
    rows = labels, _cpu.Targets(labels, None), None
    problem = _cpu.Problem(x, w, *rows, SCALE, dtypes.compute, dtypes.accumulate)
    if backward and _cpu.runs_ahead(problem, kept):
        if budget < 0:
            num_bytes = max(0, num_bytes - LARGER_BLOCKS)
        lent, kept = _cpu.held_classes(problem, num_bytes)
        block = _cpu.classes_per_block(problem)
    converts, in_place = compute is not dtypes.accumulate, dtypes.w is dtypes.accumulate
    of_cosines = block * num_rows * ((a + o) + (a if converts else 0))
    of_weight = block * dim * ((o if converts else 0) + (0 if in_place else a))
    if backward:
        of_weight *= 2  # likewise for its gradient
    weight = float(dtypes.w.itemsize * num_classes * dim)
    kept_bytes = float(kept * num_rows * (a if is_single else o))
    again = 1.0 - (kept + lent) / num_classes
    return Work(
        flops={operand: product * (3.0 + again if backward else 1.0)},
        exponentials=float(logits * (2 if backward else 1)),
        bytes=(3.0 if backward else 1.0) * weight
        + _row_bytes(shape, dtypes, backward=backward)
        + 2.0 * (kept_bytes + lent * num_rows * o),
        l2_bytes=0.0,
        memory=kept_bytes + of_cosines + of_weight + a * (num_classes + 6 * num_rows * dim),
    )


def work(
    shape: Shape,
    dtypes: Dtypes,
    strategy: str,
    *,
    backward: bool,
    memory_budget: int | None = None,
) -> Work:
    """Work of one pass.

    Args:
        shape: N, C and D.
        dtypes: of x, W and the products.
        strategy: one of `STRATEGIES`.
        backward: whether the backward, and what the forward keeps for it, is included.
        memory_budget: bytes that "cpu" may keep; None for its own rule.

    Raises:
        ValueError: no such strategy.
    """
    if strategy == "eager":
        return _work_eager(shape, dtypes, backward=backward)
    if strategy == "cpu":
        budget = _ops.DEFAULT_BUDGET if memory_budget is None else memory_budget
        return _work_cpu(shape, dtypes, budget, backward=backward)
    if strategy in GPU_STRATEGIES:
        return _work_gpu(shape, dtypes, strategy, backward=backward)
    raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")


def floor(work: Work, device: Device) -> float:
    """Seconds that the device needs at least: the longer of its products and its memory traffic."""
    products = sum(flops / device.rate(operand) for operand, flops in work.flops.items())
    return max(products, work.bytes / device.bandwidth)


def ideal(shape: Shape, operand: str, device: Device, multiple: int) -> float:
    """Seconds of ``multiple`` x NCD flops alone: 6 are the three products, 8 with cosines twice."""
    flops = float(multiple) * shape.num_rows * shape.num_classes * shape.dim
    return flops / device.rate(operand)


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit ``seconds``, at least three."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(once())
    return min(times)


def measure(device: torch.device, seconds: float = 0.3) -> Device:
    """Measure a device: `torch.mm` in each dtype, and a copy.

    Takes about five times ``seconds``. On a GPU the product is 8192 cubed and the copy 1 GiB, on a
    CPU 1024 cubed and 128 MiB.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    operands = {"bf16": torch.bfloat16, "ieee": torch.float32, "fp64": torch.float64}
    if on_gpu:
        operands |= {"fp16": torch.float16, "tf32": torch.float32}
    elif not _cpu.has_bf16_products():
        del operands["bf16"]
    rates = {}
    precision = torch.get_float32_matmul_precision()
    try:
        for operand, dtype in operands.items():
            torch.set_float32_matmul_precision("high" if operand == "tf32" else "highest")
            # fp64 products of a consumer GPU are 64 times slower
            side = size // 4 if dtype is torch.float64 and on_gpu else size
            left = torch.ones(side, side, dtype=dtype, device=device)
            out = torch.empty_like(left)

            def multiply(left: torch.Tensor = left, out: torch.Tensor = out) -> None:
                torch.mm(left, left, out=out)

            rates[operand] = 2.0 * side**3 / _best(multiply, device, seconds)
    finally:
        torch.set_float32_matmul_precision(precision)
    source = torch.ones((1 << 28) if on_gpu else (1 << 25), device=device)  # fp32
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device, seconds)
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    return Device(name, rates, 2.0 * 4 * source.numel() / copy, "measured")


def table(shape: Shape, dtypes: Dtypes, device: Device, strategies: Sequence[str]) -> str:
    """Format the work of the strategies and their floors for people."""
    figures = [f"{device.bandwidth / 1e12:.3g} TB/s ({device.source_of('bandwidth')})"]
    figures += [
        f"{operand} {rate / 1e12:.4g} TFLOP/s ({device.source_of(operand)})"
        for operand, rate in device.rates.items()
    ]
    sizes = f"N={shape.num_rows:,}, C={shape.num_classes:,}, D={shape.dim:,}"
    kinds = f"x {dtypes.x}, W {dtypes.w}, products {dtypes.operand}".replace("torch.", "")
    heads = (("GFLOP", 10), ("10^9 exp", 10), ("GB", 10), ("L2 GB", 10), ("floor ms", 11))
    lines = [
        f"{shape.name}: {sizes}; {kinds}",
        f"{device.name}: {', '.join(figures)}",
        " " * 28 + "".join(f"{head:>{width}}" for head, width in (*heads, ("extra MiB", 12))),
    ]
    for strategy in strategies:
        for backward in (False, True):
            one = work(shape, dtypes, strategy, backward=backward)
            label = f"{strategy}, {'forward+backward' if backward else 'forward'}"
            lines.append(
                f"{label:28}{sum(one.flops.values()) / 1e9:10,.1f}{one.exponentials / 1e9:10,.2f}"
                f"{one.bytes / 1e9:10,.2f}{one.l2_bytes / 1e9:10,.2f}"
                f"{1e3 * floor(one, device):11,.3f}{one.memory / 2**20:12,.1f}"
            )
    operand = next(iter(work(shape, dtypes, strategies[-1], backward=False).flops))
    lines.extend(
        f"{f'{multiple}NCD alone':28}{'':50}{1e3 * ideal(shape, operand, device, multiple):11,.3f}"
        for multiple in (6, 8)
    )
    return "\n".join(lines)


def _predictions(
    shape: Shape,
    dtypes: Dtypes,
    device: Device,
    strategies: Sequence[str] | None,
    pointers: bool,
) -> str:
    """The predicted times of the kernels, or why there are none."""
    if not _validate.has_triton():
        return f"no times of kernels without Triton: {_validate.get_triton()}"
    if _validate.INTERPRETED:
        return "no times of kernels while they are interpreted: unset TRITON_INTERPRET"
    predicted = importlib.import_module("benchmarks.predicted")
    predictor = predicted.Predictor(device, pointers=pointers)
    chosen = strategies or [predictor.choice(shape, dtypes)]
    tables = [predicted.table(predictor.step(shape, dtypes, name), device, name) for name in chosen]
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, help="a named shape (webface42m)")
    count, classes = whole_number(1), whole_number(2)
    parser.add_argument("--n", type=count, help="batch rows, with --c and --d, instead of --shape")
    parser.add_argument("--c", type=classes, help="classes")
    parser.add_argument("--d", type=count, help="embedding size")
    parser.add_argument(
        "--device",
        choices=(*DEVICES, "cpu"),
        default="h200",
        help="published figures, or this CPU, measured now (%(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="autocast-bf16", help="%(choices)s (%(default)s)"
    )
    parser.add_argument(
        "--strategy", nargs="+", choices=GPU_STRATEGIES, metavar="NAME",
        help="of %(choices)s: predict its kernels' times (the package's own choice)",
    )  # fmt: skip
    parser.add_argument(
        "--pointers", action="store_true", help="predict without tensor descriptors"
    )
    settings = parser.parse_args(arguments)
    sizes = (settings.n, settings.c, settings.d)
    if any(size is not None for size in sizes):
        if None in sizes or settings.shape is not None:
            parser.error("give --shape, or all of --n, --c and --d")
        shape = Shape("custom", *sizes, "command line")
    else:
        shape = SHAPES[settings.shape or "webface42m"]
    on_cpu = settings.device == "cpu"
    device = measure(torch.device("cpu")) if on_cpu else DEVICES[settings.device]
    strategies = ("eager", "cpu") if on_cpu else ("eager", *GPU_STRATEGIES)
    dtypes = DTYPES[settings.dtype]
    try:
        print(table(shape, dtypes, device, strategies))
        if device.chip is not None:
            print(f"\n{_predictions(shape, dtypes, device, settings.strategy, settings.pointers)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
