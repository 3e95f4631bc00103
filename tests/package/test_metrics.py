"""The nearest classes, and how targets stand, against all cosines in fp64."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import problem
from torch._dynamo.testing import CompileCounterWithBackend

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import compat, metrics
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


def test_batches_of_any_size_compile_twice() -> None:
    """Blocks are as many for any N: `torch.export` binds none, either."""
    given = problem(40, 150, 9)
    w, counter = given.w.float(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(metrics.predict, backend=counter, fullgraph=True)
    for num_rows in range(4, 20):
        x = given.x[:num_rows].float()
        torch.testing.assert_close(compiled(x, w, 3), metrics.predict(x, w, 3))
    assert counter.frame_count <= 2

    class InterTopK(fm.ArcFaceLoss):
        def negatives(self, embeddings: Tensor, labels: Tensor) -> fm.negatives.Negatives:
            return fmf.inter_topk(embeddings, self, labels)

    batch = {0: torch.export.Dim("N", min=2)}
    whole = given.x.float(), given.labels
    criterion = InterTopK(150, 9)
    program = torch.export.export(criterion, whole, dynamic_shapes=(batch, batch))
    some = tuple(part[:7] for part in whole)
    torch.testing.assert_close(program.module()(*some), criterion(*some))


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
    of_all = metrics.evaluate(x, w, labels)
    assert torch.equal(of_all.is_counted, kept)
    assert of_all.rank[~kept].tolist() == of_all.hardest_class[~kept].tolist() == [-1, -1]
    for cosine in (of_all.target_cosine, of_all.hardest_cosine):
        assert torch.equal(cosine.isnan(), ~kept)
    found = metrics.Evaluation(*(part[kept] for part in of_all))
    torch.testing.assert_close(of_all.target_cosine.nanmean(), found.target_cosine.mean())
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
        assert torch.equal(of_all.accuracy(k), found.accuracy(k))


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
    assert found.rank.tolist() == [-1, -1]
    assert found.accuracy().isnan()
    assert metrics.evaluate(x, w, torch.empty(0, dtype=torch.int32)).rank.shape == (0,)


def test_more_nearest_than_classes() -> None:
    """A share counts all of them; what has a column for each refuses."""
    x, w, labels = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 2, 1, -100, 0])
    x[4] = math.nan
    criterion = fm.NormalizedSoftmaxLoss(3, 4)
    for found in (
        metrics.evaluate(x, w, labels), criterion(x, labels, return_stats=True)[1]
    ):  # fmt: skip
        for k in (3, 4, 100):
            assert float(found.accuracy(k)) == 0.75  # of NaN no class is nearest
    with pytest.raises(ValueError, match="k must be at most 3, the number of classes; got 4"):
        metrics.predict(x, w, 4)


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


CLASSES, DIM, CENTERS = 20, 9, 3


def _criterion(**options: Any) -> fm.ArcFaceLoss:
    return fm.ArcFaceLoss(CLASSES, DIM, sub_centers=CENTERS, **options)


def _rows(ignored: int = -100) -> tuple[Tensor, Tensor]:
    given = problem(23, CLASSES, DIM)
    labels = given.labels.clone()
    labels[[3, 11]] = ignored
    return given.x.float(), labels


# What is called with embeddings, criterion or weight, and labels; with weights alone it takes K.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "predict": lambda x, w, y, **kw: metrics.predict(x, w, 3, **kw),
    "evaluate": metrics.evaluate,
    "center_counts": metrics.center_counts,
    "outlier_angles": metrics.outlier_angles,
    "outliers": lambda x, w, y, **kw: metrics.outliers(x, w, y, angle=0.0, **kw),
    "inter_topk": lambda x, w, y, **kw: fmf.inter_topk(x, w, y, **kw)._replace(phi=()),
}


def _parts(found: Any) -> list[Tensor]:
    """The tensors, with a number that stands for NaN, an ignored row's."""
    parts = [found] if isinstance(found, Tensor) else found
    return [one.nan_to_num(9.0) for one in parts if len(one)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [fm.ArcFaceLoss, compat.pml.SubCenterArcFaceLoss, fm.CosFaceLoss])
def test_a_criterion_knows_its_sub_centres(name: str, kind: Any) -> None:
    centers = 1 if kind is fm.CosFaceLoss else CENTERS
    criterion: Any = kind(CLASSES, DIM, sub_centers=centers)
    weight: Any = criterion.weight if hasattr(criterion, "weight") else criterion.W.t()
    x, labels = _rows()
    found = FUNCTIONS[name](x, criterion, labels)
    expected = FUNCTIONS[name](x, weight.detach().clone(), labels, sub_centers=centers)
    for actual, wanted in zip(_parts(found), _parts(expected), strict=True):
        assert torch.equal(actual, wanted)
    with pytest.raises(ValueError, match=rf"sub_centers is {centers} of this criterion, got 2"):
        FUNCTIONS[name](x, criterion, labels, sub_centers=2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_weight_of_sub_centres_is_noticed(name: str) -> None:
    """Of the parameter, of what shares its memory, and of a criterion that was copied."""
    x, labels = _rows()
    buffer = io.BytesIO()
    torch.save(_criterion(), buffer)
    buffer.seek(0)
    first = _criterion()
    alive = [
        first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)),
        torch.load(buffer, weights_only=False), _criterion().double().float(),
        _criterion(device="meta").to_empty(device="cpu"),
    ]  # fmt: skip
    weights = [one.weight for one in alive]
    for weight in [*weights, first.weight.detach(), first.weight.data]:
        with pytest.raises(ValueError, match=r"sub_centers=3, 3 rows .* pass the criterion"):
            FUNCTIONS[name](x, weight, labels)
        FUNCTIONS[name](x, weight, labels, sub_centers=CENTERS)
    each = FUNCTIONS[name](x, first.weight, labels, sub_centers=1)
    copied = FUNCTIONS[name](x, first.weight.detach().clone(), labels)
    for actual, wanted in zip(_parts(each), _parts(copied), strict=True):
        assert torch.equal(actual, wanted)


def test_a_criterion_knows_its_ignored_label() -> None:
    criterion = _criterion(ignore_index=7)
    x, labels = _rows(7)
    found = metrics.evaluate(x, criterion, labels)
    assert torch.equal(found.is_counted, labels != 7)
    everything = metrics.evaluate(x, criterion, labels, ignore_index=-100)
    assert bool(everything.is_counted.all())
    counts = metrics.center_counts(x, criterion, labels)
    assert int(counts.sum()) == int(found.is_counted.sum())
    assert int(counts[7].sum()) == 0


def test_a_module_that_is_no_criterion() -> None:
    x, labels = _rows()
    for module in (torch.nn.Linear(DIM, CLASSES), torch.nn.Sequential(_criterion())):
        with pytest.raises(
            TypeError, match=r"a criterion must be a loss .* got (Linear|Sequential);"
        ):
            metrics.predict(x, module)
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        metrics.evaluate(x, None, labels)  # pyright: ignore[reportArgumentType]


def test_outliers() -> None:
    """Row, class and angle, farthest first, row by row."""
    criterion, (x, labels) = _criterion(), _rows()
    x[5] = math.nan
    centers = metrics.dominant_centers(metrics.center_counts(x, criterion, labels))
    angles = metrics.outlier_angles(x, criterion.weight, labels, centers)
    assert torch.equal(
        metrics.outlier_angles(x, criterion, labels).nan_to_num(9.0), angles.nan_to_num(9.0)
    )
    expected = sorted(
        (-angle, row)
        for row, angle in enumerate(angles.tolist())
        if labels[row] != -100 and not math.isnan(angle)
    )
    found = metrics.outliers(x, criterion, labels, angle=0.0)
    assert found.rows.tolist() == [5, *(row for _, row in expected)]
    assert found.classes.tolist() == [int(labels[row]) for row in found.rows.tolist()]
    assert torch.equal(found.angles[1:], angles[found.rows[1:]])
    limit = -expected[6][0]
    assert len(metrics.outliers(x, criterion, labels, angle=limit).rows) == 7
    for options in ({}, {"sub_centers": CENTERS}):
        given = metrics.outliers(x, criterion.weight, labels, centers, angle=0.0, **options)
        assert torch.equal(given.rows, found.rows)
    with pytest.raises(ValueError, match=r"20 entries, one per class, .* 60 rows, .* 2 for each"):
        metrics.outlier_angles(x, criterion.weight, labels, centers, sub_centers=2)
    assert metrics.outliers(x[:0], criterion, labels[:0]).rows.shape == (0,)
    equal = metrics.outliers(x[:1].repeat(4, 1), criterion, labels[:1].repeat(4), angle=0.0)
    assert equal.rows.tolist() == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"angle must be in \[0, 3.14159\], got 75.0; it is in rad"
    ):
        metrics.outliers(x, criterion, labels, angle=75)


def test_outliers_without_sub_centres() -> None:
    criterion, (x, labels) = fm.CosFaceLoss(CLASSES, DIM), _rows()
    found = metrics.outliers(x, criterion, labels, angle=0.0)
    own = criterion.weight.detach()[found.classes]
    expected = torch.nn.functional.cosine_similarity(x[found.rows], own).acos()
    torch.testing.assert_close(found.angles, expected)
