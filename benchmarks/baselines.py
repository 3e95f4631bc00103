"""What is measured: this package, eager and compiled rivals on the same data, the bare products.

`CONTENDERS` compute the loss with the exact gradient and, past theta + m = pi, the branch
cos(theta) - m sin(m), which are this package's defaults. `LOWER_BOUNDS` are cross-entropies without
a margin, given normalised inputs times the scale: less work than the loss, where it has a margin.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm
from fused_margin.functional import fixed_adacos_scale

LOSS_NAMES = {"arcface": "ArcFace", "fixed_adacos": "Fixed AdaCos"}
LOSSES = tuple(LOSS_NAMES)
ARCFACE_MARGIN = 0.5  # radians
ARCFACE_SCALE = 64.0
SEARCH_REPEATS = 2  # of each chunk size; the quicker one counts


class UnavailableError(ValueError):
    """A contender isn't installed, or doesn't take these tensors."""


@dataclass(frozen=True)
class Problem:
    """Data shared by all contenders, and the loss to compute on it.

    ``x`` (N, D) in fp32 or bf16, ``w`` (C, D) in fp32, ``labels`` (N,), on one device. ``margin``
    is in radians; 0 for Fixed AdaCos, which has none. ``autocast_dtype``: the loss is computed
    under torch.autocast in this dtype.
    """

    x: Tensor
    w: Tensor
    labels: Tensor
    loss: str
    margin: float
    scale: float
    autocast_dtype: torch.dtype | None = None

    def to(self, x_dtype: torch.dtype) -> Problem:
        """Return the same problem with embeddings rounded to ``x_dtype``; W and labels shared."""
        return replace(self, x=self.x.to(x_dtype))

    def under_autocast(self, dtype: torch.dtype = torch.bfloat16) -> Problem:
        """Return the same problem, to be computed under torch.autocast; all tensors shared."""
        return replace(self, autocast_dtype=dtype)

    def in_mode(self, mode: str) -> Problem:
        """Return this fp32 problem in one of `MODES`.

        Raises:
            ValueError: there is no such mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if mode == "autocast":
            return self.under_autocast()
        return self.to(torch.bfloat16) if mode == "bf16" else self

    def without_margin(self) -> Problem:
        """Return normalised softmax on the same data at the same scale; itself if it has no margin.

        Labels move on by one row. With their own, and no margin, every target's probability is so
        near to 1 that its distance from it, hence loss and gradients, would have no digits in fp32.
        """
        if not self.margin:
            return self
        return replace(self, loss="normalized_softmax", margin=0.0, labels=self.labels.roll(1))

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.x.device

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype that a dense implementation multiplies in."""
        return self.autocast_dtype or self.x.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Make the context that the loss is computed in; the backward is outside of it."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


# fp32; bf16 embeddings and fp32 W; fp32 embeddings and W under autocast in bf16
MODES = ("fp32", "bf16", "autocast")


def make_problem(
    loss: str,
    num_rows: int,
    num_classes: int,
    dim: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draw embeddings, weights of norm about 1, and labels, in fp32, on the device itself.

    Embeddings lie around the weight of their class, at cosines from about 0.4 to 0.98, so that some
    rows are easy and some are not: no part of the gradients vanishes or rules alone. Devices draw
    different numbers from one seed.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.empty(num_classes, dim, device=device)
    w.normal_(std=dim**-0.5, generator=generator)
    labels = torch.randint(num_classes, (num_rows,), generator=generator, device=device)
    noise = torch.empty(num_rows, dim, device=device)
    noise.normal_(std=dim**-0.5, generator=generator)
    x = w[labels] + torch.linspace(0.2, 2.0, num_rows, device=device)[:, None] * noise
    is_arcface = loss == "arcface"
    margin = ARCFACE_MARGIN if is_arcface else 0.0
    scale = ARCFACE_SCALE if is_arcface else fixed_adacos_scale(num_classes)
    return Problem(x, w, labels, loss, margin, scale)


@dataclass
class Contender:
    """One implementation bound to a problem.

    ``leaves`` are the tensors that receive gradients: embeddings (N, D), and weights (C, D), or
    (D, C) if ``is_transposed``. ``drops_margin``: the loss is computed without its margin, so that
    the time is a lower bound of what this implementation would need. ``details`` go into reports.
    """

    name: str
    compute_loss: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor]
    is_transposed: bool = False
    drops_margin: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    details: dict[str, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop the gradients, so that the next backward allocates them afresh."""
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> Tensor:
        """Loss only, without recording for backward."""
        with torch.no_grad(), self.autocast():
            return self.compute_loss()

    def step(self) -> Tensor:
        """Forward and backward; the gradients are left in the leaves."""
        with self.autocast():
            loss = self.compute_loss()
        loss.backward()
        return loss

    def gradients(self) -> tuple[Tensor, Tensor]:
        """d_x (N, D) and d_w (C, D) of the last step."""
        d_x, d_w = (leaf.grad for leaf in self.leaves)
        if d_x is None or d_w is None:
            raise RuntimeError(f"{self.name} left no gradient")
        return d_x, d_w.t() if self.is_transposed else d_w


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()


def ours(problem: Problem, backend: str = "auto") -> Contender:
    """Bind this package, by its public functions."""
    x, w = _leaves(problem)
    labels, margin, scale = problem.labels, problem.margin, problem.scale
    if problem.loss == "arcface":

        def compute_loss() -> Tensor:
            return fm.functional.arcface(x, w, labels, margin, scale, backend=backend)
    elif problem.loss == "fixed_adacos":

        def compute_loss() -> Tensor:
            return fm.functional.fixed_adacos(x, w, labels, backend=backend)
    else:

        def compute_loss() -> Tensor:
            return fm.functional.normalized_softmax(x, w, labels, scale, backend=backend)

    return Contender("fused_margin", compute_loss, (x, w), autocast=problem.autocast)


def careful_loss(x: Tensor, w: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Eager loss with trigonometry on the N gathered target cosines only.

    Args:
        x: (N, D). w: (C, D) fp32. labels: (N,).
        margin: radians, 0 for none. scale: s.

    Returns:
        0-d mean cross-entropy. With bf16 ``x`` the product is in bf16 and the rest in fp32.
    """
    x_hat = F.normalize(x.float()).to(x.dtype)
    w_hat = F.normalize(w).to(x.dtype)
    cosines = F.linear(x_hat, w_hat).float()  # (N, C)
    if margin:
        target = labels[:, None]
        u = cosines.gather(1, target)
        sine = (1.0 - u * u).clamp_min(1e-5).sqrt()
        shifted = u * math.cos(margin) - sine * math.sin(margin)
        past_pi = u < -math.cos(margin)
        psi = torch.where(past_pi, u - margin * math.sin(margin), shifted)
        cosines = cosines.scatter(1, target, psi)
    return F.cross_entropy(cosines * scale, labels)


def _bind_careful(
    problem: Problem, name: str, compute: Callable[..., Tensor] = careful_loss
) -> Contender:
    x, w = _leaves(problem)
    return Contender(
        name,
        lambda: compute(x, w, problem.labels, problem.margin, problem.scale),
        (x, w),
        autocast=problem.autocast,
    )


def careful(problem: Problem) -> Contender:
    """Bind `careful_loss` in eager mode."""
    return _bind_careful(problem, "careful eager")


def compiled(problem: Problem) -> Contender:
    """Bind `careful_loss` under torch.compile, for exactly this shape."""
    # Without the reset, the limit on recompilations of one function would end a series of shapes.
    torch.compiler.reset()
    compiled_loss = torch.compile(careful_loss, fullgraph=True, dynamic=False)
    return _bind_careful(problem, "torch.compile", compiled_loss)


def usual(problem: Problem) -> Contender:
    """Bind the loss of pytorch-metric-learning itself, whose weight is (D, C).

    Raises:
        UnavailableError: it isn't installed, or the problem isn't plain fp32; that package would
            recast its weight to the embeddings' dtype.
    """
    losses = _import("pytorch_metric_learning.losses")
    if problem.product_dtype is not torch.float32:
        raise UnavailableError(
            f"pytorch-metric-learning is compared in fp32, not {_in_words(problem)}"
        )
    num_classes, dim = problem.w.shape
    if problem.margin:
        margin = math.degrees(problem.margin)
        criterion = losses.ArcFaceLoss(num_classes, dim, margin=margin, scale=problem.scale)
    else:
        criterion = losses.NormalizedSoftmaxLoss(num_classes, dim, temperature=1.0 / problem.scale)
    criterion.W = torch.nn.Parameter(problem.w.t().contiguous())
    x = problem.x.detach().requires_grad_()
    return Contender(
        "pytorch-metric-learning",
        lambda: criterion(x, problem.labels),
        (x, criterion.W),
        is_transposed=True,
    )


# --- cross-entropies without a margin -------------------------------------------------------------


def _import(name: str) -> ModuleType:
    package = name.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise UnavailableError("not installed")
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, RuntimeError) as error:  # it does not suit torch or Triton
        raise UnavailableError(f"installed, but can't be imported: {error}") from error


def _in_words(problem: Problem) -> str:
    dtype = str(problem.product_dtype).removeprefix("torch.")
    return dtype if problem.autocast_dtype is None else f"autocast in {dtype}"


def _require_gpu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise UnavailableError(f"runs on GPUs only, not on {problem.device.type}")


def _without_margin(
    problem: Problem,
    name: str,
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor],
    **details: Any,
) -> Contender:
    """Bind a cross-entropy of s x_hat w_hat^T, given s x_hat (N, D), w_hat (C, D) and labels.

    Matrices come in the product dtype, cast by hand: what their code does under autocast differs.
    """
    drops_margin = problem.margin != 0.0
    problem = problem.without_margin()
    x, w = _leaves(problem)

    def compute_loss() -> Tensor:
        x_hat = (F.normalize(x.float()) * problem.scale).to(problem.product_dtype)
        w_hat = F.normalize(w).to(problem.product_dtype)
        return linear_cross_entropy(x_hat, w_hat, problem.labels)

    return Contender(name, compute_loss, (x, w), drops_margin=drops_margin, details=details)


def _torch_linear_cross_entropy() -> Callable[..., Tensor]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    return function


def lce(problem: Problem) -> Contender:
    """Bind torch's own linear_cross_entropy without options: it makes the (N, C) logits.

    Raises:
        UnavailableError: this torch has none.
    """
    function = _torch_linear_cross_entropy()
    return _without_margin(problem, "F.linear_cross_entropy", function)


def lce_chunked(problem: Problem, chunk: int | None = None) -> Contender:
    """Bind torch's own linear_cross_entropy, ``chunk`` rows at a time.

    Args:
        problem: the data.
        chunk: rows; None for the quickest, by `search_chunk`.

    Raises:
        UnavailableError: this torch has none.
    """
    function = _torch_linear_cross_entropy()
    details: dict[str, Any] = {}
    if chunk is None:
        details["search_s"] = search_chunk(problem)
        chunk = best_chunk(details["search_s"])
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    return _without_margin(
        problem,
        f"F.linear_cross_entropy, {chunk} rows a chunk",
        functools.partial(function, options=options),
        chunk_rows=chunk,
        **details,
    )


def lce_default(problem: Problem) -> Contender:
    """Bind torch's own linear_cross_entropy with the chunks that its options choose themselves.

    Raises:
        UnavailableError: this torch has none.
    """
    function = _torch_linear_cross_entropy()
    options = torch.nn.LinearCrossEntropyOptions()
    return _without_margin(
        problem,
        "F.linear_cross_entropy, its own chunks",
        functools.partial(function, options=options),
    )


def search_chunk(
    problem: Problem, candidates: Sequence[int] | None = None
) -> dict[int, float | None]:
    """Seconds that one step takes by rows in a chunk; None where the memory doesn't suffice.

    Args:
        problem: the data.
        candidates: rows; the powers of two down from N, five of them, if None.

    Raises:
        UnavailableError: this torch has no linear_cross_entropy.
    """
    if candidates is None:
        top = 1 << (problem.x.shape[0] - 1).bit_length()
        candidates = [top >> shift for shift in range(5) if top >> shift]
    seconds: dict[int, float | None] = {}
    for chunk in candidates:
        contender = lce_chunked(problem, chunk)
        try:
            seconds[chunk] = min(_time_step(contender, problem) for _ in range(SEARCH_REPEATS))
        except torch.OutOfMemoryError:
            seconds[chunk] = None
        contender.clear()
    return seconds


def best_chunk(seconds: dict[int, float | None]) -> int:
    """The quickest of `search_chunk`.

    Raises:
        UnavailableError: none of them fits.
    """
    measured = {chunk: value for chunk, value in seconds.items() if value is not None}
    if not measured:
        raise UnavailableError(f"no chunk size of {sorted(seconds)} fits the memory")
    return min(measured, key=lambda chunk: measured[chunk])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_step(contender: Contender, problem: Problem) -> float:
    contender.clear()
    synchronize(problem.device)
    start = time.perf_counter()
    contender.step()
    synchronize(problem.device)
    return time.perf_counter() - start


def _bind_cut_cross_entropy(problem: Problem, name: str, **arguments: Any) -> Contender:
    _require_gpu(problem)
    module = _import("cut_cross_entropy")
    if problem.product_dtype not in (torch.bfloat16, torch.float16):
        raise UnavailableError(f"takes bf16 and fp16, not {_in_words(problem)}")
    return _without_margin(
        problem,
        name,
        functools.partial(module.linear_cross_entropy, **arguments),
    )


def cce(problem: Problem) -> Contender:
    """Bind Cut Cross-Entropy as it comes: tiles with small probabilities are left out.

    Raises:
        UnavailableError: it isn't installed, or the tensors are on a CPU or in fp32.
    """
    return _bind_cut_cross_entropy(problem, "Cut Cross-Entropy")


def cce_exact(problem: Problem) -> Contender:
    """Bind Cut Cross-Entropy with every tile in the gradients.

    Raises:
        UnavailableError: it isn't installed, or the tensors are on a CPU or in fp32.
    """
    return _bind_cut_cross_entropy(problem, "Cut Cross-Entropy, unfiltered", filter_eps=None)


def _bind_liger(problem: Problem, name: str, **arguments: Any) -> Contender:
    _require_gpu(problem)
    module = _import("liger_kernel.transformers.functional")
    function = functools.partial(module.liger_fused_linear_cross_entropy, **arguments)
    return _without_margin(problem, name, function)


def liger(problem: Problem) -> Contender:
    """Bind Liger's fused linear cross-entropy as it comes: gradients add up in W's dtype.

    Raises:
        UnavailableError: it isn't installed, or the tensors are on a CPU.
    """
    return _bind_liger(problem, "Liger")


def liger_fp32(problem: Problem) -> Contender:
    """Bind Liger's fused linear cross-entropy with gradients of W that add up in fp32.

    Raises:
        UnavailableError: it isn't installed, or the tensors are on a CPU.
    """
    return _bind_liger(problem, "Liger, fp32 sums", accum_dtype=torch.float32)


def _mean_cross_entropy(x_hat: Tensor, w_hat: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_hat, w_hat).float(), labels)


def auto_chunked(problem: Problem) -> Contender:
    """Bind Inductor's auto-chunker: a cross-entropy of which it makes a few rows' logits at a time.

    It has no rule for the scatter of a target's margin.

    Raises:
        UnavailableError: this torch has none; on the first step, if it leaves the code whole.
    """
    config = importlib.import_module("torch._inductor.config")
    metrics = importlib.import_module("torch._inductor.metrics")
    if not hasattr(config, "auto_chunker"):
        raise UnavailableError(f"torch {torch.__version__} has no auto-chunker")
    torch.compiler.reset()
    # a graph from the cache would not say whether it was chunked
    options: dict[str, Any] = {"auto_chunker.enable": True, "fx_graph_cache": False}
    compiled_loss = torch.compile(
        _mean_cross_entropy, fullgraph=True, dynamic=False, options=options
    )
    before = metrics.num_auto_chunking

    def compute_loss(x_hat: Tensor, w_hat: Tensor, labels: Tensor) -> Tensor:
        loss = compiled_loss(x_hat, w_hat, labels)
        if torch.is_grad_enabled() and metrics.num_auto_chunking == before:
            raise UnavailableError("Inductor found nothing to chunk")
        return loss

    return _without_margin(problem, "Inductor, auto-chunked", compute_loss)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "ours": ours,
    "careful": careful,
    "compiled": compiled,
    "usual": usual,
}
LOWER_BOUNDS: dict[str, Callable[[Problem], Contender]] = {
    "lce": lce,
    "lce_default": lce_default,
    "lce_chunked": lce_chunked,
    "cce": cce,
    "cce_exact": cce_exact,
    "liger": liger,
    "liger_fp32": liger_fp32,
}
EVERYONE = {**CONTENDERS, **LOWER_BOUNDS}
# Timed on GPUs alone: compiling it takes a minute on a CPU.
ON_GPU: dict[str, Callable[[Problem], Contender]] = {"auto_chunked": auto_chunked}
# Those that hold (N, C) matrices, so that they fit where `memory.eager_bytes` does.
DENSE = frozenset({"careful", "compiled", "usual", "lce"})


def bind(problem: Problem, keys: Iterable[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Bind contenders of `EVERYONE` by key.

    Returns:
        those bound, and the reason for each that can't be.
    """
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for key in keys:
        try:
            contenders[key] = EVERYONE[key](problem)
        except UnavailableError as error:
            missing[key] = str(error)
    return contenders, missing


class BareProducts:
    """The three matrix products that any dense implementation does, and nothing else.

    They run in the problem's product dtype. W is cast to it and outputs are allocated once, outside
    of any timing.
    """

    name = "three torch.mm"

    def __init__(self, problem: Problem) -> None:
        self.x, self.w = (tensor.to(problem.product_dtype) for tensor in (problem.x, problem.w))
        self.cosines = self.x.new_zeros(self.x.shape[0], self.w.shape[0])  # (N, C)
        self.d_w = torch.zeros_like(self.w)
        self.d_x = torch.zeros_like(self.x)

    def clear(self) -> None:
        """Have nothing to drop."""

    def forward(self) -> None:
        """Compute x W^T (N, C)."""
        torch.mm(self.x, self.w.t(), out=self.cosines)

    def step(self) -> None:
        """Compute x W^T (N, C), its transpose times x (C, D), and it times W (N, D)."""
        self.forward()
        torch.mm(self.cosines.t(), self.x, out=self.d_w)
        torch.mm(self.cosines, self.w, out=self.d_x)
