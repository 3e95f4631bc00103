"""Is it right on this device? Every check returns what it found or raises `WrongResultError`.

Values and gradients are judged by `relative_errors`, which goes through the classes block by block
in fp64 with plain PyTorch on the device itself, so that it fits any shape; it shares no code with
the package but the constants of its documented conventions.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_margin as fm
from benchmarks import roofline
from benchmarks.baselines import Contender, Problem, make_problem
from benchmarks.harness import ROOT, WrongResultError
from benchmarks.shapes import Shape

# Largest relative error (Euclidean norm) against fp64, by operand type of the products: two to four
# times the largest that careful eager code made on these problems, its TF32 products emulated.
TOLERANCES = {"bf16": 5e-2, "fp16": 6e-3, "tf32": 6e-3, "ieee": 1e-5, "fp64": 1e-13}
YARDSTICK_BYTES = 1 << 27  # of one (N, block) or (block, D) matrix in fp64

# N, C, D and reduction: odd and even in every dimension, one tile and several.
CASES = (
    (33, 257, 50, "none"),
    (256, 5_994, 192, "mean"),
    (19, 11, 37, "sum"),
    (33, 257, 130, "none"),
    (300, 1_000, 64, "mean"),
)
SMALL = (64, 5_003, 64)
TESTS = ("tests/package/test_gpu_exact.py", "tests/package/test_gpu.py")
PYTEST = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu and not slow", "-v"]


@dataclass(frozen=True)
class Mode:
    """Dtypes, and the settings of PyTorch under which they are used."""

    name: str
    dtypes: roofline.Dtypes
    autocast: torch.dtype | None
    precision: str  # torch.set_float32_matmul_precision

    def problem(self, num_rows: int, num_classes: int, dim: int, device: torch.device) -> Problem:
        """ArcFace on embeddings and weights in this mode's dtypes."""
        given = make_problem("arcface", num_rows, num_classes, dim, device=device)
        return replace(
            given,
            x=given.x.to(self.dtypes.x),
            w=given.w.to(self.dtypes.w),
            autocast_dtype=self.autocast,
        )


# The most important first.
MODE_NAMES = ("autocast-bf16", "fp32", "tf32", "bf16", "fp16", "bf16-weight", "autocast-fp16")
MODE_NAMES += ("fp64",)
MODES = {
    name: Mode(
        name,
        roofline.DTYPES[name],
        roofline.DTYPES[name].compute if name.startswith("autocast") else None,
        "high" if name == "tf32" else "highest",
    )
    for name in MODE_NAMES
}


def strategies(device: torch.device) -> tuple[str, ...]:
    """The strategies of the backend that the package takes on a device."""
    return roofline.GPU_STRATEGIES if device.type == "cuda" else ("cpu",)


def _tiles(mode: Mode, device: torch.device) -> Any:
    tiles = importlib.import_module("fused_margin._triton.tiles")
    return tiles.default(family(device), mode.dtypes.operand)


def offers(strategy: str, dim: int, mode: Mode, device: torch.device) -> bool:
    """Whether the package has a strategy for an embedding size and dtypes."""
    return strategy != "fused" or _tiles(mode, device).for_fused(dim) is not None


def chosen_strategy(shape: Shape, mode: Mode, device: torch.device) -> str:
    """The strategy that the package itself takes where it may keep nothing."""
    if device.type != "cuda":
        return "cpu"
    planning = importlib.import_module("fused_margin._triton.planning")
    sizes = (shape.num_rows, shape.num_classes, shape.dim)
    return planning.strategy_for(*sizes, _tiles(mode, device), kept_bytes=1, budget=0)


def family(device: torch.device) -> str:
    """The device's architecture family, by which the package chooses tiles and strategies."""
    tiles = importlib.import_module("fused_margin._triton.tiles")
    planning = importlib.import_module("fused_margin._triton.planning")
    return tiles.family(*planning.architecture(device))


@contextlib.contextmanager
def forced(strategy: str | None, mode: Mode) -> Iterator[None]:
    """Use a mode's precision and a strategy of a GPU; else the package chooses."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode.precision)
    try:
        if strategy in roofline.GPU_STRATEGIES:
            planning = importlib.import_module("fused_margin._triton.planning")
            with planning.override(strategy=strategy):
                yield
        else:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Ours(Contender):
    """This package with a strategy forced on it, forward and backward."""

    strategy: str | None = None
    mode: Mode = MODES["fp32"]
    change: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def forward(self) -> Tensor:
        with forced(None, self.mode), self.change():  # strategies are of the backward
            return super().forward()

    def step(self) -> Tensor:
        with forced(self.strategy, self.mode), self.change():
            return super().step()


def bind(
    problem: Problem,
    mode: Mode,
    strategy: str | None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Ours:
    """Bind ArcFace by its public function."""
    x, w = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.w))

    def compute_loss() -> Tensor:
        return fm.functional.arcface(
            x, w, problem.labels, problem.margin, problem.scale,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    return Ours(
        strategy or "fused_margin",
        compute_loss,
        (x, w),
        autocast=problem.autocast,
        strategy=strategy,
        mode=mode,
    )


# --- yardstick ------------------------------------------------------------------------------------


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    return rows / norm, norm


def _target_logit(u: Tensor, margin: float, scale: float) -> tuple[Tensor, Tensor]:
    """s psi(u) and psi'(u): cos(theta + m), and past pi cos(theta) - m sin(m)."""
    if margin == 0.0:
        return scale * u, torch.ones_like(u)
    clamped = u.clamp(-1.0, 1.0)
    sine = (1.0 - clamped * clamped).clamp_min(0.0).sqrt()
    inside = clamped * math.cos(margin) - sine * math.sin(margin)
    slope = math.cos(margin) + u * math.sin(margin) / (1.0 - u * u).clamp_min(1e-5).sqrt()
    is_past = u < -math.cos(margin)
    psi = torch.where(is_past, u - margin * math.sin(margin), inside)
    return scale * psi, torch.where(is_past, 1.0, slope)


class _Sums:
    """Squared differences and squared values of one part of the result."""

    def __init__(self) -> None:
        self.difference: Tensor | float = 0.0
        self.expected: Tensor | float = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        self.difference = self.difference + (actual.double() - expected).square().sum()
        self.expected = self.expected + expected.square().sum()

    def relative(self) -> float:
        difference, expected = float(self.difference), float(self.expected)
        return math.sqrt(difference / expected) if expected else math.sqrt(difference)


def relative_errors(
    problem: Problem, loss: Tensor, d_x: Tensor, d_w: Tensor, upstream: Tensor
) -> dict[str, float]:
    """Relative errors of a result against fp64.

    Args:
        problem: its labels all lie in [0, C).
        loss: (N,), or 0-d: their sum weighted by ``upstream``.
        d_x: (N, D). d_w: (C, D).
        upstream: gradient of each row's loss, (N,).

    Returns:
        errors of the loss, of d_x, and of the rows of d_w that are targets and that are not: the
        first are so much larger that they would hide the others.
    """
    scale, labels, num_classes = problem.scale, problem.labels, problem.w.shape[0]
    x, norm_x = _unit(problem.x.double())
    num_rows, dim = x.shape
    size = max(1, YARDSTICK_BYTES // (8 * max(num_rows, dim)))
    rows = torch.arange(num_rows, device=x.device)
    blocks = [(start, min(start + size, num_classes)) for start in range(0, num_classes, size)]

    def others(w: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, logits with the target's at -inf, and the rows whose target is here."""
        cosines = x @ w.t()
        here = (labels >= start) & (labels < stop)
        logits = scale * cosines
        logits[rows[here], labels[here] - start] = -math.inf
        return cosines, logits, here

    lse = x.new_full((num_rows,), -math.inf)
    for start, stop in blocks:
        _, logits, _ = others(_unit(problem.w[start:stop].double())[0], start, stop)
        lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
        del logits
    u = (x * _unit(problem.w[labels].double())[0]).sum(dim=1)
    target, slope = _target_logit(u, problem.margin, scale)
    expected_loss = -F.logsigmoid(target - lse)
    weight = upstream.double() * torch.sigmoid(lse - target) * scale

    parts = {name: _Sums() for name in ("loss", "d_x", "d_w of targets", "d_w of other classes")}
    parts["loss"].add(
        loss.detach(), expected_loss if loss.ndim else (expected_loss * upstream).sum()
    )
    is_target = torch.zeros(num_classes, dtype=torch.bool, device=x.device)
    is_target[labels] = True
    v = torch.zeros_like(x)
    for start, stop in blocks:
        w, norm_w = _unit(problem.w[start:stop].double())
        cosines, logits, here = others(w, start, stop)
        g = (logits - lse[:, None]).exp_() * weight[:, None]  # (N, block)
        g[rows[here], labels[here] - start] = -(weight * slope)[here]
        del logits
        v += g @ w
        expected = (g.t() @ x - (g * cosines).sum(dim=0)[:, None] * w) / norm_w
        is_here = is_target[start:stop]
        actual = d_w[start:stop]
        parts["d_w of targets"].add(actual[is_here], expected[is_here])
        parts["d_w of other classes"].add(actual[~is_here], expected[~is_here])
    parts["d_x"].add(d_x, (v - (v * x).sum(dim=1, keepdim=True) * x) / norm_x)
    return {name: sums.relative() for name, sums in parts.items()}


def judge(what: str, errors: dict[str, float], operand: str) -> dict[str, float]:
    """Return the errors.

    Raises:
        WrongResultError: one is above the operand type's tolerance, or not a number.
    """
    limit = TOLERANCES[operand]
    wrong = {part: error for part, error in errors.items() if not error <= limit}
    if wrong:
        found = ", ".join(f"{part} {error:.3g}" for part, error in wrong.items())
        raise WrongResultError(f"{what}: relative error above {limit:g}: {found}")
    return errors


def gate(problem: Problem, contender: Contender, operand: str) -> dict[str, float]:
    """Judge one step of a contender whose loss is the mean, and its forward alone.

    Raises:
        WrongResultError: it is wrong.
    """
    if contender.drops_margin:
        problem = problem.without_margin()
    num_rows = problem.x.shape[0]
    upstream = problem.x.new_full((num_rows,), 1.0 / num_rows, dtype=torch.float64)
    contender.clear()
    forward = contender.forward().detach()
    loss = contender.step().detach()
    errors = relative_errors(problem, loss, *contender.gradients(), upstream)
    contender.clear()
    difference = abs(float(forward) - float(loss)) / max(abs(float(loss)), 1e-300)
    return judge(contender.name, errors | {"forward alone": difference}, operand)


# --- checks ---------------------------------------------------------------------------------------


def _result(bound: Ours, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d_x and d_w of one step with the given gradient of the loss."""
    bound.clear()
    with forced(bound.strategy, bound.mode):
        with bound.autocast():
            loss = bound.compute_loss()
        loss.backward(upstream)
    result = (loss.detach(), *bound.gradients())
    bound.clear()
    return result


def _require_same(
    what: str, which: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> None:
    for name, got, wanted in zip(("loss", "d_x", "d_w"), actual, expected, strict=True):
        if not torch.equal(got, wanted):
            raise WrongResultError(f"{what}: {name} of {which} differs")


def check_case(
    mode: Mode, strategy: str, device: torch.device, case: tuple[int, int, int, str]
) -> dict[str, Any]:
    """Value and gradients on one of `CASES`.

    Raises:
        WrongResultError: they are wrong.
    """
    *sizes, reduction = case
    num_rows, num_classes, dim = sizes
    problem = mode.problem(num_rows, num_classes, dim, device)
    bound = bind(problem, mode, strategy, reduction)
    accumulate = mode.dtypes.accumulate
    upstream = torch.ones(num_rows, dtype=accumulate, device=device)
    if reduction == "none":
        upstream = torch.linspace(0.1, 2.0, num_rows, dtype=accumulate, device=device)
        result = _result(bound, upstream)
    else:
        result = _result(bound)
        upstream = upstream / num_rows if reduction == "mean" else upstream
    what = f"{strategy}, {mode.name}, {case}"
    return judge(what, relative_errors(problem, *result, upstream), mode.dtypes.operand)


def check_strides(mode: Mode, strategy: str, device: torch.device) -> dict[str, Any]:
    """Transposed x and W, and every second label of a longer tensor."""
    given = mode.problem(*SMALL, device)
    labels = given.labels.repeat_interleave(2)[::2]
    problem = replace(
        given, x=given.x.t().contiguous().t(), w=given.w.t().contiguous().t(), labels=labels
    )
    num_rows = SMALL[0]
    upstream = torch.full((num_rows,), 1.0 / num_rows, dtype=torch.float64, device=device)
    errors = relative_errors(problem, *_result(bind(problem, mode, strategy)), upstream)
    return judge(f"{strategy}, {mode.name}, strides", errors, mode.dtypes.operand)


def check_labels(mode: Mode, strategy: str, device: torch.device) -> dict[str, Any]:
    """A label out of range: on a GPU that row alone is NaN, on a CPU a ValueError."""
    problem = mode.problem(*SMALL, device)
    labels = problem.labels.clone()
    labels[2] = SMALL[1]
    bad = bind(replace(problem, labels=labels), mode, strategy, "none")
    upstream = torch.ones(SMALL[0], dtype=mode.dtypes.accumulate, device=device)
    if device.type != "cuda":
        try:
            _result(bad, upstream)
        except ValueError:
            return {"raises": "ValueError"}
        raise WrongResultError("a label out of range raised nothing on a CPU")
    loss, d_x, _ = _result(bad, upstream)
    good_loss, good_d_x, _ = _result(bind(problem, mode, strategy, "none"), upstream)
    is_good = torch.ones(SMALL[0], dtype=torch.bool, device=device)
    is_good[2] = False
    if not (bool(loss[2].isnan()) and bool(d_x[2].isnan().all())):
        raise WrongResultError("the row of a label out of range is not NaN")
    for name, actual, expected in (("loss", loss, good_loss), ("d_x", d_x, good_d_x)):
        if not torch.equal(actual[is_good], expected[is_good]):
            raise WrongResultError(f"a label out of range changed the {name} of other rows")
    return {"row": "NaN"}


def check_repeats(
    mode: Mode, strategy: str, device: torch.device, repeats: int = 10
) -> dict[str, Any]:
    """Equal to the bit, step for step.

    Raises:
        WrongResultError: a repeat differs.
    """
    bound = bind(mode.problem(*SMALL, device), mode, strategy)
    first = _result(bound)
    for repeat in range(repeats):
        _require_same(f"{strategy}, {mode.name}", f"repeat {repeat}", _result(bound), first)
    return {"repeats": repeats}


def capture(bound: Contender) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture one step of a contender; its gradients are then those of the last replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and allocates what is allocated once
            bound.clear()
            bound.step()
    torch.cuda.current_stream().wait_stream(side)
    bound.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = bound.step()
    return graph, loss.detach()


def check_graph(mode: Mode, strategy: str, device: torch.device) -> dict[str, Any]:
    """A captured forward and backward replays on new inputs with the bits of a plain call.

    Raises:
        WrongResultError: a replay differs.
    """
    problem = mode.problem(*SMALL, device)
    bound = bind(problem, mode, strategy)
    graph, loss = capture(bound)
    for replay in range(3):
        problem.x.normal_()  # shares its memory with the leaf
        problem.labels.random_(SMALL[1])
        graph.replay()
        torch.cuda.synchronize(device)
        expected = _result(bind(problem, mode, strategy))
        actual = (loss, *bound.gradients())
        _require_same(f"{strategy}, {mode.name}", f"graph replay {replay}", actual, expected)
    return {"replays": 3}


def run_tests(log: Path, timeout: float) -> dict[str, Any]:
    """Run `TESTS` in a process of its own, its output going to ``log``.

    Returns:
        how many tests passed, and whether there was time for all.

    Raises:
        WrongResultError: a test failed, or they could not be run.
    """
    exit_status = None
    # when the time is over, what is in the log by then counts
    with log.open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
        exit_status = subprocess.run(
            PYTEST, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
        ).returncode
    lines = log.read_text().splitlines()
    failed = [line.split(" ")[0] for line in lines if " FAILED" in line or " ERROR" in line]
    if failed or exit_status not in (0, None):
        what = ", ".join(failed[:3]) or f"exit status {exit_status}"
        raise WrongResultError(f"{len(failed)} tests failed: {what} (see {log.name})")
    passed = sum(" PASSED" in line for line in lines)
    return {"passed": passed, "had_time_for_all": exit_status == 0}
