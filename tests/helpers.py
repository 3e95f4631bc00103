"""What the tests share: problems, losses, careful eager code, and tolerances made from its error.

Values and gradients are judged in a chain. Eager code written here, in fp64, is compared with the
`reference` backend; the `reference` backend in fp64 is then the yardstick for every backend and
dtype; and the error allowed is a small multiple of the error that the eager code makes in the same
dtypes, plus a few units in the last place (`assert_close`). Where the factors come from:
docs/math.md, "Tolerances of the tests".
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import fused_margin.functional as fmf

Tensor = torch.Tensor
ROOT = Path(__file__).resolve().parents[1]  # of the repository

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# Problems as small as the tests' go the shortest of the CPU backend's ways, unless told to take
# another: one block of classes, or several, without or with the backward done ahead.
in_one_block = pytest.mark.cpu_single
in_blocks = pytest.mark.cpu_blocks
ahead = pytest.mark.cpu_ahead
BACKENDS = (
    "reference",
    "cpu",
    pytest.param("cpu", marks=in_one_block, id="cpu-single"),
    pytest.param("cpu", marks=in_blocks, id="cpu-blocks"),
    pytest.param("cpu", marks=ahead, id="cpu-ahead"),
    pytest.param("triton", marks=needs_triton),
)
FUSED_BACKENDS = BACKENDS[1:]
# the ways that a sweep goes which makes more of other classes than exp(s c)
SHAPED_BACKENDS = (BACKENDS[0], *BACKENDS[3:])
CPU_BACKENDS = BACKENDS[1:5]


def device_of(backend: str) -> torch.device:
    """Where the tests put the tensors of ``backend``."""
    on_gpu = backend == "triton" and torch.cuda.is_available() and not INTERPRETED
    return torch.device("cuda" if on_gpu else "cpu")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory from `torch.empty` with NaN, so that an output never written shows.

    That is what PyTorch does by default while it is asked for deterministic algorithms.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# --- dtypes ---------------------------------------------------------------------------------------


class Mode(NamedTuple):
    """Dtypes of the embeddings and the weight, and autocast's if it is on."""

    name: str
    embeddings: torch.dtype
    weight: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype that sums, norms and results have."""
        is_double = torch.float64 in (self.embeddings, self.weight)
        return torch.float64 if is_double else torch.float32

    @property
    def multiplies_in_half(self) -> bool:
        """Whether products take fp16 or bf16."""
        is_double = self.accumulate is torch.float64
        return not is_double and (self.autocast or self.embeddings).itemsize == 2

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast if this mode has it on."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def __str__(self) -> str:
        return self.name


FP32 = Mode("fp32", torch.float32, torch.float32)
FP64 = Mode("fp64", torch.float64, torch.float64)
HALF_MODES = (
    Mode("fp16", torch.float16, torch.float16),
    Mode("bf16", torch.bfloat16, torch.bfloat16),
    Mode("fp16_master_fp32", torch.float16, torch.float32),
    Mode("bf16_master_fp32", torch.bfloat16, torch.float32),
    Mode("autocast_bf16", torch.float32, torch.float32, torch.bfloat16),
    Mode("autocast_fp16", torch.float32, torch.float32, torch.float16),
    Mode("autocast_bf16_of_bf16", torch.bfloat16, torch.float32, torch.bfloat16),
)
MIXED_MODES = (
    Mode("fp32_master_fp64", torch.float32, torch.float64),
    Mode("bf16_master_fp64", torch.bfloat16, torch.float64),
    Mode("fp64_master_fp32", torch.float64, torch.float32),
    Mode("autocast_bf16_of_fp64", torch.float64, torch.float64, torch.bfloat16),
)
MODES = (FP32, FP64, *HALF_MODES, *MIXED_MODES)


# --- losses ---------------------------------------------------------------------------------------


def _sine(u: Tensor) -> Tensor:
    """sqrt(1 - u^2), its derivative floored as documented: -u / sqrt(max(1 - u^2, 1e-5))."""
    value = (1.0 - u * u).clamp_min(0.0).sqrt()
    slope = -u / (1.0 - u * u).clamp_min(1e-5).sqrt()
    return value.detach() + slope.detach() * (u - u.detach())


def arcface_psi(margin: float, boundary: str, u: Tensor) -> Tensor:
    """cos(theta + margin), with what ``boundary`` says past theta + margin = pi."""
    inside = u * math.cos(margin) - _sine(u) * math.sin(margin)
    if boundary == "none":
        return inside
    past = {
        "linear": u - margin * math.sin(margin),
        "continuous": u - (1.0 + math.cos(math.pi - margin)),
    }[boundary]
    # past pi, strictly: at u = -cos(margin) both backends and this code take the first branch
    return torch.where(u < math.cos(math.pi - margin), past, inside)


@dataclass(frozen=True, eq=False)
class Loss:
    """A public loss with its hyperparameters, and its margin written independently."""

    name: str
    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    psi: Callable[[Tensor], Tensor]
    straight_through: bool = False

    def __str__(self) -> str:
        return self.name

    def scale(self, num_classes: int) -> float:
        """The scale that a call uses."""
        return self.arguments.get("scale", math.sqrt(2.0) * math.log(max(num_classes - 1, 1)))

    def __call__(
        self, embeddings: Tensor, weight: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        return self.function(embeddings, weight, labels, **self.arguments, **options)

    def with_arguments(self, **arguments: Any) -> Loss:
        """The same loss with other arguments; the margin's formula stays as it is."""
        return Loss(
            self.name, self.function, self.arguments | arguments, self.psi, self.straight_through
        )


def arcface(
    margin: float = 0.5, scale: float = 64.0, boundary: str = "linear", grad: str = "exact"
) -> Loss:
    return Loss(
        f"arcface-{boundary}" + ("" if grad == "exact" else f"-{grad}"),
        fmf.arcface,
        {"margin": margin, "scale": scale, "boundary": boundary, "grad": grad},
        lambda u: arcface_psi(margin, boundary, u),
        grad == "straight_through",
    )


def cosface(margin: float = 0.35, scale: float = 64.0) -> Loss:
    return Loss("cosface", fmf.cosface, {"margin": margin, "scale": scale}, lambda u: u - margin)


def normalized_softmax(scale: float = 20.0) -> Loss:
    return Loss("normalized_softmax", fmf.normalized_softmax, {"scale": scale}, lambda u: u)


FIXED_ADACOS = Loss("fixed_adacos", fmf.fixed_adacos, {}, lambda u: u)
ARCFACE = arcface()
COSFACE = cosface()
NORMALIZED_SOFTMAX = normalized_softmax()
LOSSES = (
    ARCFACE,
    arcface(boundary="continuous"),
    arcface(boundary="none"),
    arcface(grad="straight_through"),
    COSFACE,
    FIXED_ADACOS,
    NORMALIZED_SOFTMAX,
)


# --- careful eager code ---------------------------------------------------------------------------


def eager_cosines(embeddings: Tensor, weight: Tensor, *, casts_first: bool = False) -> Tensor:
    """Cosines, (N, C): rows normalised in fp32 (fp64), multiplied in the embeddings' dtype.

    Under autocast the product is in autocast's dtype. ``casts_first``: W goes into it before it is
    normalised, times a power of two that brings its norms near 1.
    """
    is_double = torch.float64 in (embeddings.dtype, weight.dtype)
    accumulate = torch.float64 if is_double else torch.float32
    compute = accumulate if is_double else embeddings.dtype
    x_hat = F.normalize(embeddings.to(accumulate), eps=1e-12).to(compute)
    w = weight.to(accumulate)
    norms = w.norm(dim=1).clamp_min(1e-12)
    if not casts_first:
        return F.linear(x_hat, (w / norms[:, None]).to(compute)).to(accumulate)
    factors = norms.detach().log2().floor().exp2()
    w = (w / factors[:, None]).to(compute)
    return F.linear(x_hat, w).to(accumulate) * (factors / norms)


def eager_loss(
    loss: Loss,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    casts_first: bool = False,
) -> Tensor:
    """``loss`` as careful users write it: gather the target, apply the margin, scatter, softmax."""
    cosine = eager_cosines(embeddings, weight, casts_first=casts_first)
    with torch.autocast(embeddings.device.type, enabled=False):
        labels = labels.long()
        index = labels.where(labels != ignore_index, 0)[:, None]
        u = cosine.gather(1, index)[:, 0]
        psi = loss.psi(u.detach().clamp(-1.0, 1.0) + (u - u.detach()))
        if loss.straight_through:
            psi = u + (psi - u).detach()
        logits = loss.scale(weight.shape[0]) * cosine.scatter(1, index, psi[:, None])
        return F.cross_entropy(logits, labels, reduction=reduction, ignore_index=ignore_index)


def eager_cosine_lse(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the other classes and target cosine, from all the cosines."""
    cosine = eager_cosines(embeddings, weight)
    with torch.autocast(embeddings.device.type, enabled=False):
        labels = labels.long()
        has_target = (labels >= 0) & (labels < weight.shape[0])
        index = labels.where(has_target, 0)[:, None]
        u = cosine.gather(1, index)[:, 0].where(has_target, 0)
        hidden = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, index, has_target[:, None])
        return (scale * cosine).masked_fill(hidden, -math.inf).logsumexp(dim=1), u


# --- problems -------------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    """The layout that tensors have by default."""
    return tensor.contiguous()


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one comparison; fp64 on the CPU, turned into a mode's dtypes on each use.

    ``layout_x`` and ``layout_w`` give an equal tensor with other strides.
    """

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    labels: Tensor  # (N,)
    upstream: Tensor  # (N,), the gradient of a loss that is not reduced
    layout_x: Layout = contiguous
    layout_w: Layout = contiguous

    def leaves(
        self, mode: Mode, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and weight rounded to ``mode``'s dtypes and then, if given, in ``dtype``."""
        x = self.x.to(mode.embeddings).to(dtype or mode.embeddings).to(device)
        w = self.w.to(mode.weight).to(dtype or mode.weight).to(device)
        x, w = self.layout_x(x), self.layout_w(w)
        return x.detach().requires_grad_(), w.detach().requires_grad_()


@functools.cache
def problem(num_rows: int, num_classes: int, dim: int, *, seed: int = 0) -> Problem:
    """Random rows pulled towards their class, so that losses are neither all large nor all 0.

    Norms of rows are spread over a factor of 100 or so: a norm applied twice, or not at all, shows.
    Not to be written to: tests share it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    w = normal(num_classes, dim)
    x = (normal(num_rows, dim) + w[labels]) * normal(num_rows, 1).exp()
    w = w * normal(num_classes, 1).exp() * dim**-0.5
    return Problem(x, w, labels, normal(num_rows).abs() + 0.1)


class Result(NamedTuple):
    """Value, (N,) or 0-d, and gradients."""

    value: Tensor
    d_x: Tensor
    d_w: Tensor


def evaluate(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    given: Problem,
    mode: Mode,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Result:
    """Value and gradients of ``call(embeddings, weight, labels)``, brought to fp64 on the CPU."""
    x, w = given.leaves(mode, device, dtype)
    with mode.context(device) if dtype is None else contextlib.nullcontext():
        value = call(x, w, given.labels.to(device))
    assert value.dtype is (dtype or mode.accumulate)
    value.backward(given.upstream.to(value) if value.ndim else None)
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype is x.dtype
    assert w.grad.dtype is w.dtype
    return Result(*(part.detach().cpu().double() for part in (value, x.grad, w.grad)))


def run(
    loss: Loss,
    given: Problem,
    mode: Mode,
    backend: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> Result:
    """`evaluate` a loss on ``backend``."""

    def call(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return loss(x, w, labels, backend=backend, **options)

    return evaluate(call, given, mode, device or device_of(backend), dtype)


@functools.lru_cache(maxsize=16)
def yardstick(loss: Loss, given: Problem, mode: Mode, **options: Any) -> Result:
    """The reference backend in fp64, on inputs rounded to ``mode``'s dtypes."""
    return run(loss, given, mode, "reference", dtype=torch.float64, **options)


@functools.lru_cache(maxsize=16)
def run_eager(
    loss: Loss, given: Problem, mode: Mode, *, device: torch.device | None = None, **options: Any
) -> Result:
    """`evaluate` the careful eager code in ``mode``'s own dtypes."""

    def call(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return eager_loss(loss, x, w, labels, **options)

    return evaluate(call, given, mode, device or torch.device("cpu"))


def check_no_rows(call: Callable[..., Tensor], x: Tensor, w: Tensor, labels: Tensor) -> None:
    """A mean of no row, of one, and of rows that are all ignored, whatever they hold."""
    for rows in (0, 1):
        loss = call(x[:rows], w, labels[:rows])
        assert bool(torch.stack(torch.autograd.grad(loss, (w,))).isfinite().all())
    broken = x.detach().clone()
    broken[0], broken[1] = math.nan, math.inf
    broken.requires_grad_()
    loss = call(broken, w, torch.full_like(labels, -100))
    assert loss == 0.0
    for gradient in torch.autograd.grad(loss, (broken, w)):
        assert bool((gradient == 0).all())


# --- tolerances -----------------------------------------------------------------------------------

# Derived in docs/math.md, "Tolerances of the tests", as are `sizes` and `error`.
FACTOR = 2.0  # times the error of the eager code: another order of sums
UNITS = 4.0  # units in the last place of a cosine: its eight roundings beside the sum


def _sensitivity(function: Callable[[Tensor], Tensor], u: Tensor, step: float) -> Tensor:
    """Largest |f(u +- step) - f(u)| / step, (N,); finite where a derivative is not."""
    here = function(u)
    moved = [function((u + sign * step).clamp(-1.0, 1.0)) for sign in (-1.0, 1.0)]
    return torch.stack([(there - here).abs() for there in moved]).amax(dim=0) / step


@functools.lru_cache(maxsize=16)
def sizes(
    loss: Loss, given: Problem, mode: Mode, *, reduction: str = "mean", ignore_index: int = -100
) -> Result:
    """What one unit of rounding in every cosine does to value and gradients, to first order.

    A cosine that is off by h moves the target logit by s psi'(u) h and the others by s h, so that
    with G the gradient by the cosines a row's loss moves by sigma s (1 + psi') h, and the terms
    of its gradients by G (1 + s (1 + psi')) h. Errors are measured in these units: rows whose
    gradients cancel, or which are a million times smaller than their neighbours, are judged alike.

    Returns:
        Units of the value, (N,) or 0-d, and of the rows of the gradients, (N, 1) and (C, 1).
    """
    x, w = (leaf.detach() for leaf in given.leaves(mode, dtype=torch.float64))
    scale = loss.scale(w.shape[0])
    step = 4.0 * torch.finfo(mode.accumulate).eps  # as `UNITS`
    counted = given.labels != ignore_index
    index = given.labels.where(counted, 0)
    cosine = eager_cosines(x, w)
    is_target = F.one_hot(index, w.shape[0]).bool()
    u = cosine[is_target].clamp(-1.0, 1.0)
    others = (scale * cosine).masked_fill(is_target, -math.inf)

    def slope(u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        (result,) = torch.autograd.grad(loss.psi(u).sum(), u)
        return torch.ones_like(u) if loss.straight_through else result

    value_steepness = _sensitivity(loss.psi, u, step)
    slope_steepness = _sensitivity(slope, u, step)
    gap = scale * loss.psi(u) - others.logsumexp(dim=1)
    sigma = torch.sigmoid(-gap)
    upstream = {
        "none": given.upstream,
        "sum": torch.ones_like(gap),
        "mean": torch.ones_like(gap) / max(int(counted.sum()), 1),
    }[reduction].where(counted, 0)

    per_row = scale * (1.0 + value_steepness)
    value = (-F.logsigmoid(gap) + sigma * per_row).where(counted, 0)
    terms = (upstream * scale * sigma)[:, None] * others.softmax(dim=1)
    target = upstream * scale * sigma * (slope(u).abs() * (1.0 + per_row) + slope_steepness)
    terms = torch.where(is_target, target[:, None], terms * (1.0 + per_row)[:, None])  # (N, C)
    norm_x = x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    norm_w = w.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Result(
        value if reduction == "none" else (value * upstream).sum(),
        terms.sum(dim=1, keepdim=True) / norm_x,
        terms.sum(dim=0)[:, None] / norm_w,
    )


def error(actual: Tensor, expected: Tensor, unit: Tensor, dtype: torch.dtype) -> float:
    """Largest error of a row in its ``unit``, less the rounding of the result to ``dtype``."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    info = torch.finfo(dtype)
    rounding = info.eps * expected.abs() + info.smallest_normal * info.eps
    excess = ((actual - expected).abs() - rounding).clamp_min(0.0)
    if expected.ndim == 2:
        excess = excess.norm(dim=1, keepdim=True)
    worst = float((excess / unit.clamp_min(torch.finfo(torch.float64).tiny)).max())
    return worst if math.isfinite(worst) else math.inf


def assert_close(
    actual: Result, expected: Result, eager: Sequence[Result], unit: Result, mode: Mode,
    chance: float = 0.0,
) -> None:  # fmt: skip
    """Check value and gradients: at most `FACTOR` times the eager error plus `UNITS`.

    ``eager``: one or more ways to write it. ``chance``: what the value may be off in any case, in
    its unit.
    """
    failures = []
    dtypes = (mode.accumulate, mode.embeddings, mode.weight)
    for name, got, want, careful, one, dtype in zip(
        Result._fields, actual, expected, zip(*eager, strict=True), unit, dtypes, strict=True
    ):
        floor = UNITS * torch.finfo(mode.accumulate).eps
        allowed = FACTOR * max(error(each, want, one, dtype) for each in careful) + floor
        if name == "value":
            allowed = max(allowed, chance)
        found = error(got, want, one, dtype)
        if not found <= allowed:
            failures.append(f"{name}: error {found:.3g}, allowed {allowed:.3g}")
    assert not failures, "; ".join(failures)


def _chance(loss: Loss, given: Problem, mode: Mode, unit: Tensor, options: dict[str, Any]) -> float:
    """Four standard errors of an eager mean or sum, in its unit: by luck its error may be none."""
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return 0.0
    rows = options | {"reduction": "none"}
    eager, exact = (f(loss, given, mode, **rows).value for f in (run_eager, yardstick))
    counted = int((given.labels != options.get("ignore_index", -100)).sum())
    count = max(counted, 1) if reduction == "mean" else 1
    return float(4.0 * (eager - exact).norm() / count / unit)


def check_loss(
    loss: Loss,
    given: Problem,
    mode: Mode,
    backend: str,
    *,
    device: torch.device | None = None,
    **options: Any,
) -> None:
    """Compare ``backend`` with the yardstick, judged by the eager error in the same dtypes."""
    with poisoned_memory():
        actual = run(loss, given, mode, backend, device=device, **options)
    unit = sizes(loss, given, mode, **options)
    eager = [run_eager(loss, given, mode, **options)]
    if mode.multiplies_in_half:  # in which it matters where W is rounded
        eager.append(run_eager(loss, given, mode, casts_first=True, **options))
    assert_close(
        actual,
        yardstick(loss, given, mode, **options),
        eager,
        unit,
        mode,
        _chance(loss, given, mode, unit.value, options),
    )
