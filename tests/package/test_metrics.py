"""The nearest classes, and how targets stand, against all cosines in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers import problem

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import metrics
from fused_margin.functional import core

Tensor = torch.Tensor


@pytest.fixture(params=[1, 1 << 30], ids=["small blocks", "one block"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CPU_BYTES", request.param)
    monkeypatch.setattr(core, "LOGITS_BLOCK_BYTES", request.param)


def _given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, weights, labels, and all cosines of the two as they are rounded."""
    given = problem(23, 150, 9)
    x, w = given.x.to(dtype), given.w.to(dtype)
    x_hat, w_hat = (torch.nn.functional.normalize(part.double()) for part in (x, w))
    return x, w, given.labels, x_hat @ w_hat.t()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 7, 150])
def test_predict(dtype: torch.dtype, k: int) -> None:
    x, w, _, cosines = _given(dtype)
    found = metrics.predict(x, w, k)
    expected = cosines.topk(k, dim=1)
    assert found.classes.shape == (23, k)
    assert torch.equal(found.classes, expected.indices)
    torch.testing.assert_close(found.cosines.double(), expected.values, rtol=0, atol=1e-6)
    assert found.cosines.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_evaluate(dtype: torch.dtype) -> None:
    x, w, labels, cosines = _given(dtype)
    labels = labels.clone()
    labels[[3, 11]] = -100
    kept = labels != -100
    found = metrics.evaluate(x, w, labels)
    cosines, labels = cosines[kept], labels[kept]
    rows = torch.arange(len(labels))
    target = cosines[rows, labels]
    others = cosines.clone()
    others[rows, labels] = -2.0
    torch.testing.assert_close(found.target_cosine.double(), target, rtol=0, atol=1e-6)
    rank = (others > target[:, None]).sum(dim=1)
    assert torch.equal(found.rank, rank)
    assert torch.equal(found.hardest_class, others.argmax(dim=1))
    torch.testing.assert_close(found.hardest_cosine.double(), others.amax(dim=1), rtol=0, atol=1e-6)
    for k in (1, 5):
        expected = (cosines.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean()
        assert float(found.accuracy(k)) == pytest.approx(float(expected))


def test_equal_classes_are_not_nearer() -> None:
    """However their products are rounded."""
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    w = torch.randn(10, 33, generator=torch.Generator().manual_seed(1)).repeat(30, 1)
    labels = metrics.predict(x, w[:10]).classes[:, 0] + 10 * torch.arange(64).remainder(30)
    assert int(metrics.evaluate(x, w, labels).rank.sum()) == 0


def test_of_no_rows() -> None:
    x, w = torch.empty(0, 4), torch.randn(7, 4)
    assert metrics.predict(x, w, 3).classes.shape == (0, 3)
    found = metrics.evaluate(torch.randn(2, 4), w, torch.full((2,), -100))
    assert found.rank.shape == (0,)
    assert found.accuracy().isnan()


def test_in_training() -> None:
    """Of a weight that is learnt, under autocast: no gradients, no lower precision."""
    criterion = fm.ArcFaceLoss(150, 9)
    x, _, labels, _ = _given(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fm.metrics.evaluate(x, criterion.weight, labels)
    assert not found.target_cosine.requires_grad
    expected = fm.metrics.evaluate(x, criterion.weight.detach(), labels)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_logits(is_recorded: bool) -> None:
    x, w, _, cosines = _given(torch.float32)
    w.requires_grad_(is_recorded)
    logits = fmf.cosine_logits(x, w, 5.0)
    assert logits.requires_grad == is_recorded
    assert logits.is_contiguous()
    torch.testing.assert_close(logits.detach().double(), 5.0 * cosines, rtol=0, atol=1e-5)


def test_errors() -> None:
    x, w, labels, _ = _given(torch.float32)
    with pytest.raises(ValueError, match=r"k must be at most 150, the number of classes; got 151"):
        metrics.predict(x, w, 151)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        metrics.predict(x, w, 0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 150\)"):
        metrics.evaluate(x, w, labels + 150)
    with pytest.raises(ValueError, match="k must be >= 1"):
        metrics.evaluate(x, w, labels).accuracy(0)
