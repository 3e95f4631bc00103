"""AdaCos and AdaFace: what they keep from batch to batch."""

from __future__ import annotations

import copy
import io
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import device_of, in_blocks, needs_triton
from torch._dynamo.testing import CompileCounterWithBackend

import fused_margin as fm
import fused_margin.functional as fmf

Tensor = torch.Tensor
BACKENDS = ("reference", "cpu", pytest.param("triton", marks=needs_triton))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS, CLASSES, DIM = 9, 12, 5
LOSSES = {
    "AdaCosLoss": fm.AdaCosLoss,
    "AdaFaceLoss": fm.AdaFaceLoss,
    "CurricularFaceLoss": fm.CurricularFaceLoss,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def _batch(seed: int, rows: int = ROWS, *, ignore: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 5.0 * torch.randn(rows, DIM, generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    if ignore:
        labels[1::4] = -100
        x[1::4] = math.nan
    return x, labels


def _adacos_scale(x: Tensor, w: Tensor, labels: Tensor, scale: float) -> float:
    """The paper's formula, of the rows that count, row by row."""
    sums, angles = [], []
    for row, label in zip(x.double(), labels.tolist(), strict=True):
        if label == -100:
            continue
        cosines = F.cosine_similarity(row[None], w.double()).tolist()
        sums.append(sum(math.exp(scale * c) for k, c in enumerate(cosines) if k != label))
        angles.append(math.acos(cosines[label]))
    median = statistics.median_low(angles)
    return math.log(sum(sums) / len(sums)) / math.cos(min(math.pi / 4, median))


@each_loss
def test_statistics_are_in_fp32_or_fp64_whatever_the_default_dtype(name: str) -> None:
    """In bf16 a moving mean would stay where it is; those of fp64 weights are as exact as they."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        criteria = [LOSSES[name](CLASSES, DIM, dtype=dtype) for dtype in (None, torch.float64)]
    finally:
        torch.set_default_dtype(before)
    for criterion, dtype in zip(criteria, (torch.float32, torch.float64), strict=True):
        assert {part.dtype for part in criterion.state_dict().values()} == {dtype}


@each_backend
def test_adacos_follows_its_formula(backend: str) -> None:
    """Each loss has its own batch's scale; far from the classes, and near them, of even number."""
    device = device_of(backend)
    criterion = fm.AdaCosLoss(CLASSES, DIM, backend=backend).to(device)
    assert float(criterion.scale) == pytest.approx(math.sqrt(2) * math.log(CLASSES - 1))
    for seed, rows, nearness in ((0, 9, 0.0), (1, 8, 50.0), (2, 9, 2.0)):
        x, labels = _batch(seed, rows)
        w = criterion.weight.detach().cpu()
        x = x + nearness * w[labels.clamp_min(0)]
        expected = _adacos_scale(x, w, labels, float(criterion.scale))
        loss = criterion(x.to(device), labels.to(device))
        assert float(criterion.scale) == pytest.approx(expected, rel=1e-5)
        plain = fmf.normalized_softmax(
            x.to(device), criterion.weight, labels.to(device), float(criterion.scale),
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, plain)
        (got,) = torch.autograd.grad(loss, criterion.weight)
        torch.testing.assert_close(got, torch.autograd.grad(plain, criterion.weight)[0])


@each_backend
def test_adacos_at_scales_whose_exponentials_overflow(backend: str) -> None:
    x, w = torch.randn(4, DIM), torch.randn(CLASSES, DIM)
    labels = torch.tensor([0, 3, 5, 7])
    x_there, w_there, labels_there = (part.to(device_of(backend)) for part in (x, w, labels))
    cosines = F.normalize(x.double()) @ F.normalize(w.double()).t()
    others = (2e4 * cosines).scatter(1, labels[:, None], -math.inf)
    log_mean = others.flatten().logsumexp(0) - math.log(4)
    median = statistics.median_low(cosines.gather(1, labels[:, None])[:, 0].acos().tolist())
    expected = float(log_mean) / math.cos(min(math.pi / 4, median))
    got = fmf.adacos_scale(x_there, w_there, labels_there, 2e4, backend=backend)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_adacos_keeps_a_scale_that_works() -> None:
    """A batch whose B is below 1 would make it negative."""
    w = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    x, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert _adacos_scale(x, w, labels, 4.0) < 0
    assert float(fmf.adacos_scale(x, w, labels, 4.0)) == 4.0


def _adaface_statistics(x: Tensor, labels: Tensor, mean: float, std: float) -> tuple[float, float]:
    norms = x[labels != -100].double().norm(dim=1).clamp(1e-3, 100.0).tolist()
    mean = 0.99 * mean + 0.01 * statistics.mean(norms)
    return mean, 0.99 * std + 0.01 * statistics.stdev(norms)


@each_backend
def test_adaface_follows_its_formula(backend: str) -> None:
    device = device_of(backend)
    criterion = fm.AdaFaceLoss(CLASSES, DIM, backend=backend).to(device)
    mean, std = 20.0, 100.0
    for seed in range(3):
        x, labels = _batch(seed)
        x[0] *= 1e3  # beyond what counts
        mean, std = _adaface_statistics(x, labels, mean, std)
        loss = criterion(x.to(device), labels.to(device))
        assert float(criterion.norm_mean) == pytest.approx(mean, rel=1e-6)
        assert float(criterion.norm_std) == pytest.approx(std, rel=1e-6)
        expected = fmf.adaface(
            x.to(device), criterion.weight, labels.to(device), norm_mean=mean, norm_std=std,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)


def test_adaface_of_one_row() -> None:
    """Of which there is no deviation: what was known of it stays."""
    criterion = fm.AdaFaceLoss(CLASSES, DIM, momentum=0.5)
    x = torch.full((1, DIM), 4.0 / math.sqrt(DIM))
    assert bool(criterion(x, torch.tensor([3])).isfinite())
    assert (float(criterion.norm_mean), float(criterion.norm_std)) == (pytest.approx(12.0), 100.0)
    x, labels = x.repeat(3, 1), torch.tensor([3, -100, -100])
    criterion(x, labels)
    assert (float(criterion.norm_mean), float(criterion.norm_std)) == (pytest.approx(8.0), 100.0)
    criterion(x, torch.tensor([3, 3, 3]))
    assert (float(criterion.norm_mean), float(criterion.norm_std)) == (pytest.approx(6.0), 50.0)


def _mean_cosine(x: Tensor, w: Tensor, labels: Tensor) -> float:
    kept = labels != -100
    return float(F.cosine_similarity(x[kept].double(), w[labels[kept]].double()).mean())


@each_backend
def test_curricularface_follows_its_formula(backend: str) -> None:
    """t is updated before it is used, as in the authors' code."""
    device = device_of(backend)
    criterion = fm.CurricularFaceLoss(CLASSES, DIM, momentum=0.1, backend=backend).to(device)
    t = 0.0
    for seed in range(3):
        x, labels = _batch(seed)
        w = criterion.weight.detach().cpu()
        x = x + 3.0 * w[labels.clamp_min(0)]
        t = 0.9 * t + 0.1 * _mean_cosine(x, w, labels)
        loss = criterion(x.to(device), labels.to(device))
        assert float(criterion.t) == pytest.approx(t, rel=1e-5)
        expected = fmf.curricularface(
            x.to(device), criterion.weight, labels.to(device), t=float(criterion.t), backend=backend
        )
        torch.testing.assert_close(loss, expected)


def test_curricularface_takes_the_nearest_of_sub_centres() -> None:
    x, labels = _batch(0)
    w = torch.randn(2 * CLASSES, DIM)
    both = torch.stack(
        [F.normalize(x.nan_to_num()) @ F.normalize(part).t() for part in (w[::2], w[1::2])]
    )
    kept = labels != -100
    nearest = both.amax(dim=0)[kept].gather(1, labels[kept][:, None])
    found = fmf.curricularface_t(x, w, labels, 0.2, 0.5, sub_centers=2)
    torch.testing.assert_close(found, 0.1 + 0.5 * nearest.mean())
    criterion = fm.CurricularFaceLoss(CLASSES, DIM, momentum=0.5, sub_centers=2)
    criterion.weight.data.copy_(w)
    criterion(x, labels)
    torch.testing.assert_close(criterion.t, 0.5 * nearest.mean())


# --- what all have -------------------------------------------------------------------------------


def _state(criterion: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in criterion.named_buffers()}


@each_loss
@each_backend
def test_evaluation_leaves_them_alone(backend: str, name: str) -> None:
    criterion = LOSSES[name](CLASSES, DIM, backend=backend).to(device_of(backend))
    x, labels = (part.to(device_of(backend)) for part in _batch(0))
    before = _state(criterion)
    criterion.eval()
    criterion(x, labels)
    criterion.logits(x)
    assert _state(criterion) == before
    criterion.train()
    criterion(x, labels)
    assert all(not torch.equal(value, before[key]) for key, value in _state(criterion).items())


@each_loss
@pytest.mark.parametrize("rows", [0, 3])
@each_backend
def test_batches_without_rows(backend: str, rows: int, name: str) -> None:
    criterion = LOSSES[name](CLASSES, DIM, backend=backend).to(device_of(backend))
    before = _state(criterion)
    x = torch.full((rows, DIM), math.nan, device=device_of(backend), requires_grad=True)
    loss = criterion(x, torch.full((rows,), -100, device=x.device))
    assert float(loss.detach()) == 0.0
    for gradient in torch.autograd.grad(loss, (x, criterion.weight)):
        assert bool((gradient == 0).all())
    assert _state(criterion) == before


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Embeddings in it, or autocast: statistics are those of fp32 numbers all the same."""
    x, labels = _batch(0)
    x = x.to(dtype)
    found = []
    for embeddings, enabled in ((x.float(), False), (x, False), (x.float(), True)):
        torch.manual_seed(3)
        criterion = LOSSES[name](CLASSES, DIM, backend="reference")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            criterion(embeddings, labels).backward()
        found.append(_state(criterion))
        assert {value.dtype for value in found[-1].values()} == {torch.float32}
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("convert", ["bfloat16", "half"])
def test_statistics_of_a_module_in_half_precision(name: str, convert: str) -> None:
    """They stay in fp32, where a hundredth of a batch moves them; in fp64 they are widened."""
    criterion = LOSSES[name](CLASSES, DIM, backend="reference")
    narrow = getattr(copy.deepcopy(criterion), convert)()
    assert narrow.weight.itemsize == 2
    x, labels = _batch(0)
    before = _state(narrow)
    for _ in range(3):
        narrow(x.to(narrow.weight.dtype), labels)
    for key, value in _state(narrow).items():
        assert value.dtype is torch.float32
        assert not torch.equal(value, before[key])
    narrow.load_state_dict(criterion.state_dict())
    assert _state(narrow) == _state(criterion)
    assert {value.dtype for value in _state(criterion.double()).values()} == {torch.float64}


@each_loss
@each_backend
def test_two_forwards_before_a_backward(backend: str, name: str) -> None:
    """Gradient accumulation, in either order; and an evaluation in between."""
    criterion = LOSSES[name](CLASSES, DIM, backend=backend).to(device_of(backend))
    separate = copy.deepcopy(criterion)
    batches = [tuple(p.to(device_of(backend)) for p in _batch(seed)) for seed in (0, 1)]
    losses = [criterion(*batch) for batch in batches]
    criterion.eval()
    criterion(*batches[0])
    torch.stack(losses).sum().backward()
    for batch in batches:
        separate(*batch).backward()
    torch.testing.assert_close(criterion.weight.grad, separate.weight.grad)


@each_loss
def test_checkpoints(name: str) -> None:
    criterion = LOSSES[name](CLASSES, DIM)
    criterion(*_batch(0))
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {"weight", *_state(criterion)}
    x, labels = _batch(1)
    for assign in (False, True):
        buffer.seek(0)
        loaded = LOSSES[name](CLASSES, DIM)
        loaded.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        expected = copy.deepcopy(criterion)
        assert torch.equal(loaded(x, labels), expected(x, labels))
        assert _state(loaded) == _state(expected)
    meta = LOSSES[name](CLASSES, DIM, device="meta")
    repr(meta)
    real = meta.to_empty(device="cpu")
    real.reset_parameters()
    assert _state(real) == _state(LOSSES[name](CLASSES, DIM))


COMPILED = (
    "AdaCosLoss", "AdaFaceLoss", "MagFaceLoss", "ElasticFaceLoss", "SphereFaceLoss",
    pytest.param("CurricularFaceLoss", marks=in_blocks),
    pytest.param("CircleSoftmaxLoss", marks=in_blocks),
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_a_whole_step_compiles(name: str) -> None:
    """Once for a batch size and once for all others, statistics and parameters as without."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(DIM, DIM)
    options = {"sigma": 0.0, "plus": True} if name == "ElasticFaceLoss" else {}
    criterion = getattr(fm, name)(CLASSES, DIM, **options)
    counter = CompileCounterWithBackend("aot_eager")
    states = []
    for compiles in (False, True):
        net, loss = copy.deepcopy(model), copy.deepcopy(criterion)
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)

        def step(x: Tensor, labels: Tensor, net: Any = net, loss: Any = loss) -> Tensor:
            return loss(net(x), labels)

        call: Callable[..., Tensor] = step
        if compiles:
            call = torch.compile(step, backend=counter, fullgraph=True)
        for seed in range(4):
            x, labels = _batch(seed, ROWS + seed % 3, ignore=False)
            labels[1] = -100
            call(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append((_state(loss), dict(net.state_dict()), loss.weight.detach().clone()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@each_loss
@pytest.mark.parametrize("widen", ["double", "dtype"])
def test_statistics_in_fp64_are_updated_in_a_graph(name: str, widen: str) -> None:
    """Of a 0-d fp64 tensor on a CPU an update by `copy_` is lost there."""
    torch._dynamo.reset()
    options: Any = {"dtype": torch.float64} if widen == "dtype" else {}
    eager = LOSSES[name](CLASSES, DIM, **options).double()
    copied = copy.deepcopy(eager)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x, labels = _batch(seed)
        before = _state(eager)
        torch.testing.assert_close(compiled(x.double(), labels), eager(x.double(), labels))
        assert _state(eager) != before
        torch.testing.assert_close(_state(copied), _state(eager))


def test_repr_and_settings() -> None:
    criterion = fm.AdaCosLoss(CLASSES, DIM)
    assert "scale=Tensor(3.39114)" in repr(criterion)
    with pytest.raises(AttributeError, match=r"follows from the batches.*fill_\(scale\)"):
        criterion.scale = 3.0
    criterion.scale.fill_(5.0)
    criterion.eval()
    x, labels = _batch(0)
    torch.testing.assert_close(
        criterion(x, labels), fmf.normalized_softmax(x, criterion.weight, labels, 5.0)
    )
    with pytest.raises(ValueError, match="C >= 3"):
        fm.AdaCosLoss(2, DIM)
    adaface = fm.AdaFaceLoss(CLASSES, DIM)
    assert repr(adaface).startswith(
        "AdaFaceLoss(num_classes=12, embedding_size=5, margin=0.4, scale=64, h=0.333, momentum=0.01"
    )
    for setting, wrong in (("h", -1.0), ("momentum", 1.5), ("margin", 28.6)):
        with pytest.raises(ValueError, match=rf"{setting} must be in \[0, "):
            setattr(adaface, setting, wrong)


def test_magface_checks_its_norms() -> None:
    with pytest.raises(ValueError, match="lower_norm must be below upper_norm, got"):
        fm.MagFaceLoss(CLASSES, DIM, lower_norm=200.0)
    criterion = fm.MagFaceLoss(CLASSES, DIM)
    criterion.lower_norm = 200.0
    with pytest.raises(ValueError, match="lower_norm must be below"):
        criterion(*_batch(0))
    with pytest.raises(ValueError, match=r"upper_margin must be in .*radians"):
        criterion.upper_margin = 45.0
    with pytest.raises(ValueError, match="upper_norm must be finite in fp32 and > 0"):
        criterion.upper_norm = 0.0


@pytest.mark.parametrize("kind", [fm.AdaFaceLoss, fm.CurricularFaceLoss])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_out(value: float, kind: Any) -> None:
    """The batch's loss is lost, and no later one: a gradient scaler skips such a step."""
    criterion = kind(10, 8)
    other = copy.deepcopy(criterion)
    x, labels = torch.randn(6, 8), torch.randint(10, (6,))
    bad = x.clone()
    bad[2] = value
    criterion(bad, labels)
    other(x[[0, 1, 3, 4, 5]], labels[[0, 1, 3, 4, 5]])
    assert _state(criterion) == _state(other)
    assert all(bool(statistic.isfinite()) for statistic in _state(criterion).values())


@pytest.mark.parametrize("kind", LOSSES.values())
def test_a_batch_that_is_refused_changes_nothing(kind: Any) -> None:
    criterion = kind(10, 8)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    with pytest.raises(ValueError, match="labels must be in"):
        criterion(torch.randn(6, 8), torch.full((6,), 10))
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name])


def test_statistics_may_be_buffers_of_ones_own() -> None:
    """`update_statistics` is asked whether or not `initial_statistics` names any."""

    class Counting(fm.CosFaceLoss):
        seen = 0

        def update_statistics(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
            self.seen += 1

    criterion = Counting(10, 8)
    x, labels = torch.randn(6, 8), torch.randint(10, (6,))
    criterion(x, labels)
    criterion.eval()(x, labels)
    assert criterion.seen == 1
