"""What each loss and option costs over a plain loss: forward + backward on a CPU.

    python -m benchmarks.losses                        # N=256, C=100,000, D=512, fp32
    python -m benchmarks.losses --save                 # to benchmarks/results

Steps are interleaved in one process, all over the same embeddings, labels and, but for sub-centers,
the same class weights. "times" is the median of the ratios to the plain loss in the same round, in
which a drift of the machine cancels: to ArcFace, and for sub-centers to ArcFace over as many rows
of weights. Each loss's value and gradients for the first rows are compared with fp64 beforehand.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import fused_margin as fm
from benchmarks import cpu, harness
from fused_margin import negatives

SUB_CENTERS = 3
PLAIN, PLAIN_OF_CENTERS = "ArcFace", f"ArcFace, {SUB_CENTERS} C classes"
# Why it costs what it does.
TARGET = "changes the target's logit alone"
SWEEP = "asks more of each tile"
TWICE = "goes over the classes once more"
CENTERS = f"{SUB_CENTERS} rows of weights a class"
# Rows that are compared with fp64, and the largest relative error.
CHECKED_ROWS, TOLERANCE = 16, harness.TOLERANCES[torch.float32]


class Case(NamedTuple):
    """A loss or an option.

    Attributes:
        name: what the table calls it.
        kind: why it costs what it does.
        build: makes the criterion of C and D.
        call: what its forward is given for N rows, beside them and their labels.
        over: the case that it is compared with.
        centers: rows of weights for each class.
    """

    name: str
    kind: str
    build: Callable[[int, int], nn.Module]
    call: Callable[[int], dict[str, Any]] = lambda num_rows: {}
    over: str = PLAIN
    centers: int = 1


class _Shaped(fm.ArcFaceLoss):
    """ArcFace with the other classes' logits reshaped by a function of itself and a batch."""

    def __init__(self, *sizes: int, shape: Callable[..., negatives.Negatives]) -> None:
        super().__init__(*sizes)
        self.shape = shape

    def negatives(self, embeddings: torch.Tensor, labels: torch.Tensor) -> negatives.Negatives:
        """What ``shape`` makes of them."""
        return self.shape(self, embeddings, labels)


def _with(loss: type[nn.Module] = fm.ArcFaceLoss, **options: Any) -> Callable[..., nn.Module]:
    return lambda *sizes: loss(*sizes, **options)


def _learnt_scale(*sizes: int) -> nn.Module:
    return fm.ArcFaceLoss(*sizes, scale=nn.Parameter(torch.tensor(64.0)))


def _of_classes(option: str) -> Callable[[int, int], nn.Module]:
    def build(num_classes: int, dim: int) -> nn.Module:
        options: dict[str, Any] = {option: torch.linspace(0.3, 0.6, num_classes)}
        return fm.ArcFaceLoss(num_classes, dim, **options)

    return build


def _shaped(shape: Callable[..., negatives.Negatives]) -> Callable[..., nn.Module]:
    return lambda *sizes: _Shaped(*sizes, shape=shape)


def _sample_weight(num_rows: int) -> dict[str, Any]:
    return {"sample_weight": torch.linspace(0.5, 1.5, num_rows)}


def _of_centers(c: int, d: int) -> nn.Module:
    return fm.ArcFaceLoss(SUB_CENTERS * c, d)


CASES = (
    Case(PLAIN, TARGET, fm.ArcFaceLoss),
    Case("CosFace", TARGET, fm.CosFaceLoss),
    Case("Fixed AdaCos", TARGET, fm.FixedAdaCosLoss),
    Case("CombinedMargin", TARGET, _with(fm.CombinedMarginLoss, m2=0.3, m3=0.2)),
    Case("SphereFace", TARGET, fm.SphereFaceLoss),
    Case("AdaFace", TARGET, fm.AdaFaceLoss),
    Case("MagFace", TARGET, fm.MagFaceLoss),
    Case("ElasticFace", TARGET, fm.ElasticFaceLoss),
    Case("ElasticFace+", TARGET, _with(fm.ElasticFaceLoss, plus=True)),
    Case("easy margin", TARGET, _with(boundary="easy")),
    Case("margin per class", TARGET, _of_classes("margin")),
    Case("class_weight", TARGET, _of_classes("class_weight")),
    Case("sample_weight", TARGET, fm.ArcFaceLoss, _sample_weight),
    Case("focal_gamma", TARGET, _with(focal_gamma=2.0)),
    Case("learnt scale", TARGET, _learnt_scale),
    Case("label_smoothing", SWEEP, _with(label_smoothing=0.1)),
    Case("return_stats", SWEEP, fm.ArcFaceLoss, lambda num_rows: {"return_stats": True}),
    Case("negatives.filtered", SWEEP, _shaped(lambda *batch: negatives.filtered(0.4))),
    Case("CurricularFace", SWEEP, fm.CurricularFaceLoss),
    Case("MV-softmax", SWEEP, fm.MVSoftmaxLoss),
    Case("Circle softmax", SWEEP, fm.CircleSoftmaxLoss),
    Case("AdaCos", TWICE, fm.AdaCosLoss),
    Case(
        "inter_topk",
        TWICE,
        _shaped(lambda owner, x, labels: fm.functional.inter_topk(x, owner, labels)),
    ),
    Case(PLAIN_OF_CENTERS, CENTERS, _of_centers, over=PLAIN_OF_CENTERS, centers=SUB_CENTERS),
    Case(
        f"sub_centers={SUB_CENTERS}",
        CENTERS,
        _with(sub_centers=SUB_CENTERS),
        over=PLAIN_OF_CENTERS,
        centers=SUB_CENTERS,
    ),
)


class Step:
    """Forward and backward of a case."""

    def __init__(
        self, case: Case, x: torch.Tensor, weight: nn.Parameter, labels: torch.Tensor
    ) -> None:
        num_rows, dim = x.shape
        self.name, self.x, self.labels = case.name, x, labels
        self.criterion: Any = case.build(weight.shape[0] // case.centers, dim)
        self.criterion.weight = weight
        self.options = case.call(num_rows)

    def clear(self) -> None:
        """Forget the gradients."""
        self.x.grad = None
        self.criterion.zero_grad()

    def loss(self) -> torch.Tensor:
        """The forward."""
        result = self.criterion(self.x, self.labels, **self.options)
        return result[0] if isinstance(result, tuple) else result

    def step(self) -> None:
        """What is timed."""
        self.loss().backward()

    def results(self) -> dict[str, torch.Tensor]:
        """Loss, d_x and d_w, of the same random margins each time."""
        self.clear()
        torch.manual_seed(0)
        loss = self.loss()
        loss.backward()
        found = {"loss": loss.detach(), "d_x": self.x.grad, "d_w": self.criterion.weight.grad}
        self.clear()
        return found

    def in_fp64(self) -> Step:
        """The same on the reference, with tensors of its own."""
        exact = copy.copy(self)
        exact.x = self.x.detach().double().requires_grad_()
        exact.criterion = copy.deepcopy(self.criterion).double()
        exact.criterion.backend = "reference"
        return exact


def check(step: Step) -> dict[str, float]:
    """Compare with fp64.

    Returns:
        relative errors of loss, d_x and d_w.

    Raises:
        harness.WrongResultError: one is above the tolerance, or not a number.
    """
    expected = step.in_fp64().results()  # first: a step changes what some losses have counted
    found, errors = step.results(), {}
    for part, value in expected.items():
        errors[part] = harness.relative_error(found[part], value)
        if not errors[part] <= TOLERANCE:
            raise harness.WrongResultError(
                f"{step.name}: relative error {errors[part]:.2g} of {part}, above {TOLERANCE:g}"
            )
    return errors


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Check and time all cases.

    Raises:
        harness.WrongResultError: a loss is wrong.
    """
    num_rows, num_classes, dim = settings.n, settings.c, settings.d
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    weights = {
        centers: nn.Parameter(torch.randn(centers * num_classes, dim, generator=generator))
        for centers in (1, SUB_CENTERS)
    }
    # about 60 degrees from their classes
    noise = torch.randn(num_rows, dim, generator=generator)
    x = weights[1].detach()[labels] + 1.7 * noise
    x.requires_grad_()
    few = slice(CHECKED_ROWS)
    x_few = x.detach()[few].clone().requires_grad_()
    errors = {}
    for case in CASES:
        harness.progress(f"fp64: {case.name}")
        errors[case.name] = check(Step(case, x_few, weights[case.centers], labels[few]))
    steps = [Step(case, x, weights[case.centers], labels) for case in CASES]
    harness.progress(f"timing: {settings.rounds} rounds of {len(steps)} cases")
    samples = harness.interleave(steps, settings.rounds)
    by_name = {case.name: seconds for case, seconds in zip(CASES, samples, strict=True)}
    results = {}
    for case in CASES:
        seconds, plain = by_name[case.name], by_name[case.over]
        ratios = [one / other for one, other in zip(seconds, plain, strict=True)]
        results[case.name] = {
            "kind": case.kind,
            "over": case.over,
            "times": statistics.median(ratios),
            "relative_errors": errors[case.name],
            **harness.summary(seconds),
        }
    return {
        "benchmark": "losses, forward + backward, fp32",
        "shape": {"n": num_rows, "c": num_classes, "d": dim},
        "rounds": settings.rounds,
        "environment": harness.environment(),
        "results": results,
    }


def table(result: dict[str, Any]) -> str:
    """Format the result for people."""
    shape, environment = result["shape"], result["environment"]
    lines = [
        f"{result['benchmark']}: N={shape['n']}, C={shape['c']:,}, D={shape['d']}",
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        f"{'':24}{'median ms':>10}{'min ms':>10}{'times':>8}",
    ]
    kind = None
    for name, row in result["results"].items():
        if row["kind"] != kind:
            kind = row["kind"]
            lines.append(f"{kind}, over {row['over']}:")
        lines.append(
            f"  {name:22}{1e3 * row['median_s']:10.1f}{1e3 * row['min_s']:10.1f}{row['times']:8.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = harness.whole_number(1)
    parser.add_argument("--n", type=count, default=256, help="batch rows (%(default)s)")
    parser.add_argument(
        "--c", type=harness.whole_number(3), default=cpu.CLASSES, help="classes (%(default)s)"
    )
    parser.add_argument("--d", type=count, default=cpu.DIM, help="embedding size (%(default)s)")
    parser.add_argument("--rounds", type=count, default=9, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--threads", type=harness.thread_count, help="torch's threads (torch's own choice)"
    )
    harness.add_output_options(parser)
    settings = parser.parse_args(arguments)
    return harness.carry_out(settings, measure, table, lambda result: "losses")


if __name__ == "__main__":
    sys.exit(main())
