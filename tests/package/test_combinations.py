"""Options together: sub-centres, smoothing, weights, focal factors, other classes, statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense_formulas as dense
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPED_BACKENDS, device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_other_classes import compare

import fused_margin.functional as fmf
from fused_margin import margins, metrics, negatives

pytestmark = pytest.mark.usefixtures("one_thread")

Tensor = torch.Tensor
SETTINGS = settings(max_examples=30, derandomize=True, deadline=None, database=None)
BACKENDS = SHAPED_BACKENDS[:3]  # interpreted, as many examples would take minutes


def _softmax(psi: Any, shape: Any = None) -> Callable[..., Any]:
    return lambda x, w, y, s, **kw: fmf.margin_softmax(x, w, y, psi, s, negatives=shape, **kw)


LOSSES: dict[str, tuple[Callable[..., Any], dense.Formula]] = {
    "arcface": (
        lambda x, w, y, s, **kw: fmf.arcface(x, w, y, 0.4, s, **kw), dense.Formula(dense.arc(0.4))
    ),
    "a psi": (_softmax(lambda u: u - 0.2), dense.Formula(dense.additive(0.2))),
    "curricularface": (
        lambda x, w, y, s, **kw: fmf.curricularface(x, w, y, 0.4, s, t=0.4, **kw),
        dense.curricular(0.4, 0.4),
    ),
    "mv_softmax": (
        lambda x, w, y, s, **kw: fmf.mv_softmax(x, w, y, 0.3, s, t=1.3, **kw),
        dense.misclassified(dense.additive(0.3), 1.3),
    ),
    "circle_softmax": (
        lambda x, w, y, s, **kw: fmf.circle_softmax(x, w, y, 0.25, s, **kw), dense.circle(0.25)
    ),
    "filtered": (
        _softmax(margins.additive(0.2), negatives.filtered(0.5, zero=True)),
        dense.filtered(dense.additive(0.2), 0.5, 0.0),
    ),
}  # fmt: skip


def _expected(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """What the options make of the logits, in plain PyTorch."""
    hard = F.cross_entropy(logits, labels, reduction="none")
    rows = F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=options["label_smoothing"]
    )
    if options["focal_gamma"] is not None:
        rows = rows * (-torch.expm1(-hard)) ** options["focal_gamma"]
    if options["focal_alpha"] is not None:
        rows = rows * options["focal_alpha"]
    weights = (labels != -100).to(rows.dtype)
    if options["class_weight"] is not None:
        weights = weights * options["class_weight"][labels.clamp_min(0)]
    if options["sample_weight"] is not None:
        weights = weights * options["sample_weight"]
    rows = rows * weights
    if options["reduction"] == "none":
        return rows
    total = weights.sum()
    count = total if options["reduction"] == "mean" and float(total.detach()) else 1.0
    return rows.sum() / count


def _check(data: st.DataObject, backend: str) -> None:
    device = device_of(backend)

    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    rows, classes, dim = (data.draw(st.integers(low, 9)) for low in (1, 2, 2))
    centers = draw(1, 1, 2, 3)
    call, formula = LOSSES[draw(*LOSSES)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x, w = numbers(rows, dim).requires_grad_(), numbers(classes * centers, dim).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    labels[torch.rand(rows, generator=generator) < draw(0.0, 0.4)] = -100
    scale: Any = draw(1.0, 16.0, 64.0, 400.0)
    weights = numbers(classes).abs() if draw(False, True) else None
    row_weights = numbers(rows).abs().requires_grad_() if draw(False, True) else None
    inputs = [x, w] if row_weights is None else [x, w, row_weights]
    if draw(False, True):
        scale = torch.tensor(scale, dtype=torch.float64, device=device, requires_grad=True)
        inputs.append(scale)
    options: dict[str, Any] = {
        "reduction": draw("mean", "sum", "none"),
        "label_smoothing": draw(0.0, 0.1, 0.7),
        "class_weight": weights,
        "sample_weight": row_weights,
        "focal_gamma": draw(None, 1.5),
        "focal_alpha": draw(None, 0.25),
    }
    logits = dense.logits(formula, x, w, labels, scale, centers)
    expected = _expected(logits, labels, options)
    asks = draw(False, True)
    loss = call(
        x, w, labels, scale, sub_centers=centers, backend=backend, return_stats=asks, **options
    )
    if asks:
        loss, stats = loss
        found = metrics.evaluate(x, w, labels, sub_centers=centers)
        assert torch.equal(stats.rank, found.rank)
        assert torch.equal(stats.hardest_class, found.hardest_class)
    compare(loss, expected, tuple(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_combinations(backend: str) -> None:
    """Value and gradients of whatever is drawn are those of dense code."""

    @SETTINGS
    @given(st.data())
    def on_examples(data: st.DataObject) -> None:
        _check(data, backend)

    on_examples()
