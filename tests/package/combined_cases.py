"""The table of what combines with what in README.md: its cells, and what makes one of them true."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from helpers import HAS_TRITON, INTERPRETED, ROOT
from torch import nn

import fused_margin as fm
from fused_margin.sampling import sample_negatives

Tensor = torch.Tensor
ROWS, CLASSES, DIM = 12, 9, 6
FP64 = torch.float64
# all that runs on a CPU: what is drawn on a GPU would be other numbers
FUSED = ("cpu", "triton") if HAS_TRITON and INTERPRETED else ("cpu",)


class OwnPsi(fm.MarginSoftmaxLoss):
    """A margin of one's own."""

    def psi(self, embeddings: Tensor, labels: Tensor) -> Any:
        return lambda u: 2 * u * u.abs() - 1


class Filtered(fm.CosFaceLoss):
    """Other classes are left out."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> Any:
        return fm.negatives.filtered(0.4)


class FilteredToZero(fm.CosFaceLoss):
    """They get the logit 0."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> Any:
        return fm.negatives.filtered(0.4, zero=True)


class InterTopK(fm.CosFaceLoss):
    """A penalty for the nearest of them."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> Any:
        return fm.functional.inter_topk(embeddings, self, labels, 2, 0.1, kind="cos")


KINDS: dict[str, type[fm.MarginSoftmaxLoss]] = {
    **{f"`{name}`": getattr(fm, name) for name in fm.losses.__all__ if name != "MarginSoftmaxLoss"},
    "a `psi` of your own": OwnPsi,
    "`negatives.filtered`": Filtered,
    "`filtered(zero=True)`": FilteredToZero,
    "`inter_topk`": InterTopK,
}


def built(kind: type[fm.MarginSoftmaxLoss], **options: Any) -> Any:
    """A criterion in fp64, with the same weights at each call, of a scale that shows everything."""
    has_scale = kind not in (fm.FixedAdaCosLoss, fm.AdaCosLoss)
    given: dict[str, Any] = {"dtype": FP64, **({"scale": 8.0} if has_scale else {}), **options}
    criterion = kind(CLASSES, DIM, **given)
    with torch.no_grad():
        criterion.weight.normal_(generator=torch.Generator().manual_seed(1))
    return criterion


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, DIM, generator=generator, dtype=FP64) * 12.0
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def outcome(criterion: Any, call: Any = None, **keywords: Any) -> dict[str, Tensor]:
    """The loss, all gradients and statistics, of the same draws at each call."""
    torch.manual_seed(3)
    x, labels = batch()
    x.requires_grad_()
    loss = (criterion if call is None else call)(x, labels, **keywords)
    loss, stats = loss if isinstance(loss, tuple) else (loss, None)
    loss.sum().backward()
    assert x.grad is not None
    found = {"loss": loss.detach(), "d_x": x.grad}
    for name, parameter in criterion.named_parameters():
        grad = parameter.grad
        found[name] = grad.to_dense() if grad.layout is not torch.strided else grad
    for name, value in {} if stats is None else stats._asdict().items():
        found[name] = value.double()
    assert all(bool(part.isfinite().all()) for part in found.values())
    return found


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def with_option(
    options: dict[str, Any], keywords: dict[str, Any], kind: type[fm.MarginSoftmaxLoss]
) -> None:
    """It gives what the reference backend gives, which isn't what there is without it."""
    made = [
        built(kind, **{k: v() if callable(v) else v for k, v in options.items()}, backend=backend)
        for backend in ("reference", *FUSED)
    ]
    expected, *others = (outcome(criterion, **keywords) for criterion in made)
    for found in others:
        check_equal(found, expected)
    plain = outcome(built(kind))
    assert expected.keys() != plain.keys() or not torch.equal(expected["loss"], plain["loss"])


def sampled(kind: type[fm.MarginSoftmaxLoss]) -> None:
    """At a rate of 1 nothing changes; below, the weights' gradient has the rows taken."""
    whole = outcome(built(kind))
    check_equal(_without_steps(outcome(sample_negatives(built(kind), 1.0))), whole)
    made = [sample_negatives(built(kind, backend=backend), 0.6) for backend in FUSED]
    expected = outcome(sample_negatives(built(kind, backend="reference"), 0.6))
    for criterion in made:
        check_equal(outcome(criterion), expected)
        assert criterion.weight.grad.layout is torch.sparse_coo


def _without_steps(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if "sampler" not in name}


def compiled(kind: type[fm.MarginSoftmaxLoss]) -> None:
    """The same numbers from one graph without breaks, twice, as buffers may move."""
    torch._dynamo.reset()
    eager, traced = built(kind), built(kind)
    call = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        eager.zero_grad()
        traced.zero_grad()
        check_equal(outcome(traced, call), outcome(eager))


def transformed(kind: type[fm.MarginSoftmaxLoss]) -> None:
    """`torch.func.grad` of the reference backend is autograd's gradient.

    Statistics that are updated have to be arguments of what is transformed.
    """
    x, labels = batch()
    criterion = built(kind, backend="reference")
    buffers = {name: value.clone() for name, value in criterion.named_buffers()}
    expected = outcome(criterion)

    def loss(weight: Tensor, x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(criterion, {"weight": weight, **buffers}, (x, labels))

    d_w, d_x = torch.func.grad(loss, (0, 1))(criterion.weight.detach(), x, buffers)
    torch.testing.assert_close(d_w, expected["weight"])
    torch.testing.assert_close(d_x, expected["d_x"])


def _learnt() -> nn.Parameter:
    return nn.Parameter(torch.tensor(9.0, dtype=FP64))


def _weights(count: int) -> Tensor:
    return torch.linspace(0.1, 2.0, count, dtype=FP64)


Check = Callable[[type[fm.MarginSoftmaxLoss]], None]
# What makes a cell true, by the head of its column; that of shards needs several processes.
COLUMNS: dict[str, Check] = {
    "`label_smoothing`": functools.partial(with_option, {"label_smoothing": 0.2}, {}),
    "`class_weight`": functools.partial(with_option, {"class_weight": _weights(CLASSES)}, {}),
    "`sample_weight`": functools.partial(with_option, {}, {"sample_weight": _weights(ROWS)}),
    "focal": functools.partial(with_option, {"focal_gamma": 2.0, "focal_alpha": 0.5}, {}),
    "`sub_centers`": functools.partial(with_option, {"sub_centers": 2}, {}),
    "`return_stats`": functools.partial(with_option, {}, {"return_stats": True}),
    "learnt scale": functools.partial(with_option, {"scale": _learnt}, {}),
    "sampled": sampled,
    "`torch.compile`": compiled,
    "`torch.func`": transformed,
}
SHARDED = "sharded"
MEANING = {"✓": True, "–": False}


def cells() -> list[tuple[str, str, bool]]:
    """Loss, option and whether they go together, of every cell of the table in README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| combines with \|(?:.*\n\|)+.*$", text, re.MULTILINE)
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return [
        (row[0], column, MEANING[cell])
        for row in rows
        for column, cell in zip(head[1:], row[1:], strict=True)
    ]
