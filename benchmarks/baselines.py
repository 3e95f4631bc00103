"""What is measured: this package, eager and compiled rivals on the same data, the bare products.

Every rival computes the loss with the exact gradient and, past theta + m = pi, the branch
cos(theta) - m sin(m), which are this package's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm
from fused_margin.functional import fixed_adacos_scale

LOSSES = ("arcface", "fixed_adacos")
ARCFACE_MARGIN = 0.5  # radians
ARCFACE_SCALE = 64.0


@dataclass(frozen=True)
class Problem:
    """Data shared by all contenders, and the loss to compute on it.

    ``x`` (N, D) in fp32 or bf16, ``w`` (C, D) in fp32, ``labels`` (N,). ``margin`` is in radians;
    0 for Fixed AdaCos, which has none.
    """

    x: Tensor
    w: Tensor
    labels: Tensor
    loss: str
    margin: float
    scale: float

    def to(self, x_dtype: torch.dtype) -> Problem:
        """Return the same problem with embeddings rounded to ``x_dtype``; W and labels shared."""
        return Problem(self.x.to(x_dtype), self.w, self.labels, self.loss, self.margin, self.scale)


def make_problem(loss: str, num_rows: int, num_classes: int, dim: int, seed: int = 0) -> Problem:
    """Draw embeddings, weights of norm about 1, and labels, in fp32 on the CPU.

    Embeddings lie around the weight of their class, at cosines from about 0.4 to 0.98, so that some
    rows are easy and some are not: no part of the gradients vanishes or rules alone.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    generator = torch.Generator().manual_seed(seed)
    w = torch.empty(num_classes, dim).normal_(std=dim**-0.5, generator=generator)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    noise = torch.empty(num_rows, dim).normal_(std=dim**-0.5, generator=generator)
    x = w[labels] + torch.linspace(0.2, 2.0, num_rows)[:, None] * noise
    is_arcface = loss == "arcface"
    margin = ARCFACE_MARGIN if is_arcface else 0.0
    scale = ARCFACE_SCALE if is_arcface else fixed_adacos_scale(num_classes)
    return Problem(x, w, labels, loss, margin, scale)


@dataclass
class Contender:
    """One implementation bound to a problem.

    ``leaves`` are the tensors that receive gradients: embeddings (N, D), and weights (C, D), or
    (D, C) if ``is_transposed``.
    """

    name: str
    compute_loss: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor]
    is_transposed: bool = False

    def clear(self) -> None:
        """Drop the gradients, so that the next backward allocates them afresh."""
        for leaf in self.leaves:
            leaf.grad = None

    def forward(self) -> Tensor:
        """Loss only, without recording for backward."""
        with torch.no_grad():
            return self.compute_loss()

    def step(self) -> Tensor:
        """Forward and backward; the gradients are left in the leaves."""
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
    if problem.loss == "arcface":
        margin, scale = problem.margin, problem.scale

        def compute_loss() -> Tensor:
            return fm.functional.arcface(x, w, problem.labels, margin, scale, backend=backend)
    else:

        def compute_loss() -> Tensor:
            return fm.functional.fixed_adacos(x, w, problem.labels, backend=backend)

    return Contender("fused_margin", compute_loss, (x, w))


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


def careful(problem: Problem) -> Contender:
    """Bind `careful_loss` in eager mode."""
    x, w = _leaves(problem)
    return Contender(
        "careful eager",
        lambda: careful_loss(x, w, problem.labels, problem.margin, problem.scale),
        (x, w),
    )


def compiled(problem: Problem) -> Contender:
    """Bind `careful_loss` under torch.compile, for exactly this shape."""
    # Without the reset, the limit on recompilations of one function would end a series of shapes.
    torch.compiler.reset()
    compiled_loss = torch.compile(careful_loss, fullgraph=True, dynamic=False)
    x, w = _leaves(problem)
    return Contender(
        "torch.compile",
        lambda: compiled_loss(x, w, problem.labels, problem.margin, problem.scale),
        (x, w),
    )


def usual(problem: Problem) -> Contender:
    """Bind the loss of pytorch-metric-learning itself, whose weight is (D, C).

    Raises:
        ValueError: embeddings are not fp32; that package would recast its weight to their dtype.
    """
    from pytorch_metric_learning import losses

    if problem.x.dtype is not torch.float32:
        raise ValueError(f"pytorch-metric-learning is compared in fp32, not {problem.x.dtype}")
    num_classes, dim = problem.w.shape
    if problem.loss == "arcface":
        arcface: Any = losses.ArcFaceLoss  # its scale is annotated int, and used as any number
        margin = math.degrees(problem.margin)
        criterion = arcface(num_classes, dim, margin=margin, scale=problem.scale)
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


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "ours": ours,
    "careful": careful,
    "compiled": compiled,
    "usual": usual,
}


class BareProducts:
    """The three matrix products that any dense implementation does, and nothing else.

    Outputs are allocated once, outside of any timing.
    """

    name = "three torch.mm"

    def __init__(self, problem: Problem) -> None:
        self.x, self.w = problem.x, problem.w
        self.cosines = self.x.new_zeros(self.x.shape[0], self.w.shape[0])  # (N, C)
        self.d_w = torch.zeros_like(self.w)
        self.d_x = torch.zeros_like(self.x)

    def clear(self) -> None:
        """Have nothing to drop."""

    def step(self) -> None:
        """Compute x W^T (N, C), its transpose times x (C, D), and it times W (N, D)."""
        torch.mm(self.x, self.w.t(), out=self.cosines)
        torch.mm(self.cosines.t(), self.x, out=self.d_w)
        torch.mm(self.cosines, self.w, out=self.d_x)
