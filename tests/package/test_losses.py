"""Values: tiny losses, the published formulas, and the modules."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import BACKENDS, device_of
from torch import nn

import fused_margin as fm
import fused_margin.functional as fmf

# --- losses down to 1e-20 -------------------------------------------------------------------------


def _separated(num_classes: int, gap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings on their own class, a little off; classes at cosine about 1 - gap, in fp64."""
    generator = torch.Generator().manual_seed(int(1000 * gap))
    spread = torch.linalg.qr(
        torch.randn(num_classes + 1, num_classes + 1, dtype=torch.float64, generator=generator)
    ).Q
    w = math.sqrt(gap) * spread[:num_classes] + math.sqrt(1.0 - gap) * spread[num_classes]
    noise = torch.randn(w.shape, dtype=torch.float64, generator=generator)
    return w + 0.003 * noise, w, torch.arange(num_classes)


def _masked_lse_loss(
    x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, scale: float, margin: float
) -> torch.Tensor:
    """log(1 + exp(lse of the others - target logit)), every step in fp64."""
    x, w = x.double(), w.double()
    cosine = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).t()
    target = labels[:, None]
    others = (scale * cosine).scatter(1, target, -math.inf).logsumexp(dim=1)
    logit = scale * (cosine.gather(1, target)[:, 0] - margin)
    return torch.log1p((others - logit).exp())


@pytest.mark.parametrize("scale", [64.0, 128.0, 220.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_losses(backend: str, dtype: torch.dtype, scale: float) -> None:
    device, eps = device_of(backend), torch.finfo(dtype).eps
    smallest = math.inf
    for gap in (0.1, 0.3, 0.6, 0.9):
        x, w, labels = _separated(12, gap)
        x, w = x.to(dtype), w.to(dtype)
        for margin in (0.0, 0.2):
            expected = _masked_lse_loss(x, w, labels, scale, margin)
            arguments = (x.to(device), w.to(device), labels.to(device))
            options = {"scale": scale, "reduction": "none", "backend": backend}
            actual = [fmf.cosface(*arguments, margin=margin, **options)]
            if margin == 0.0:
                actual.append(fmf.normalized_softmax(*arguments, **options))
            normal = expected > torch.finfo(dtype).smallest_normal
            for loss in actual:
                relative = (loss.cpu().double() - expected).abs() / expected
                assert bool((relative <= 8 * scale * eps)[normal].all())
            smallest = min([smallest, *expected[normal].tolist()])
    assert smallest < 1e-20


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_tiny_loss_keeps_its_digits(backend: str) -> None:
    x, w, labels = _separated(12, 0.6)
    device, scale = device_of(backend), 90.0
    leaves = [part.to(device, torch.float32).requires_grad_() for part in (x, w)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    loss = fmf.cosface(
        leaves[0], leaves[1], labels.to(device), 0.0, scale, reduction="sum", backend=backend
    )
    expected = _masked_lse_loss(exact[0], exact[1], labels, scale, 0.0).sum()
    assert float(expected.detach()) < 1e-20
    got = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(expected, exact)
    for actual, precise in zip(got, want, strict=True):
        error = (actual.cpu().double() - precise).norm() / precise.norm()
        assert float(error) <= 8 * scale * torch.finfo(torch.float32).eps


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("boundary", ["linear", "continuous", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arcface_is_the_angle_plus_the_margin(backend: str, boundary: str, margin: float) -> None:
    """Two classes at right angles, so that the loss is log(1 + exp(s (sin - psi)))."""
    device, scale = device_of(backend), 8.0
    theta = torch.linspace(0.01, math.pi - 0.01, 50, dtype=torch.float64)
    x = torch.stack([theta.cos(), theta.sin()], dim=1)
    x = x.to(device).requires_grad_()
    w = torch.eye(2, dtype=torch.float64, device=device)
    labels = torch.zeros(50, dtype=torch.int64, device=device)
    loss = fmf.arcface(
        x, w, labels, margin, scale, boundary=boundary, reduction="none", backend=backend
    )
    inside, slope = (theta + margin).cos(), (theta + margin).sin() / theta.sin()
    past = {
        "linear": theta.cos() - margin * math.sin(margin),
        "continuous": theta.cos() - (1 + math.cos(math.pi - margin)),
        "none": inside,
    }[boundary]
    is_past = (theta + margin > math.pi) & (boundary != "none")
    psi = torch.where(is_past, past, inside)
    slope = torch.where(is_past, 1.0, slope)
    gap = scale * (theta.sin() - psi)
    torch.testing.assert_close(loss.cpu(), nn.functional.softplus(gap, threshold=700))
    # along theta: sigma s (cos theta - d psi), with d psi / d theta = -sin(theta) psi'(u)
    (d_x,) = torch.autograd.grad(loss.sum(), x)
    along = (d_x.cpu() * torch.stack([-theta.sin(), theta.cos()], dim=1)).sum(dim=1)
    expected = torch.sigmoid(gap) * scale * (theta.cos() + theta.sin() * slope)
    torch.testing.assert_close(along, expected)


def test_boundaries_at_pi() -> None:
    """`continuous` has no jump where theta + m = pi; `linear` jumps as its formula says."""
    margin, delta = 0.5, 1e-9
    theta = math.pi - margin
    angles = torch.tensor([theta - delta, theta + delta], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    w, labels = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    step = {}
    for boundary in ("linear", "continuous", "none"):
        loss = fmf.arcface(x, w, labels, margin, 1.0, boundary=boundary, reduction="none")
        step[boundary] = float((loss[1].expm1().log() - loss[0].expm1().log()).abs())
    assert step["continuous"] < 1e-7
    assert step["none"] < 1e-7
    linear = -1.0 - (math.cos(theta) - margin * math.sin(margin))
    assert step["linear"] == pytest.approx(abs(linear), rel=1e-6)


@pytest.mark.parametrize("num_classes", [3, 10, 1000])
def test_fixed_adacos_scale(num_classes: int) -> None:
    expected = math.sqrt(2) * math.log(num_classes - 1)
    criterion = fm.FixedAdaCosLoss(num_classes, 4)
    assert criterion.scale == pytest.approx(expected)
    x, labels = torch.randn(5, 4), torch.randint(num_classes, (5,))
    torch.testing.assert_close(
        criterion(x, labels), fmf.normalized_softmax(x, criterion.weight, labels, expected)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_margin_of_zero_is_normalized_softmax(backend: str) -> None:
    device = device_of(backend)
    x, w = torch.randn(6, 5, device=device), torch.randn(9, 5, device=device)
    labels = torch.randint(9, (6,), device=device)
    expected = fmf.normalized_softmax(x, w, labels, 30.0, backend=backend)
    torch.testing.assert_close(fmf.cosface(x, w, labels, 0.0, 30.0, backend=backend), expected)
    torch.testing.assert_close(fmf.arcface(x, w, labels, 0.0, 30.0, backend=backend), expected)


def test_any_margin_on_the_primitive() -> None:
    """What the documentation of `cosine_lse` says about margins of one's own."""
    x, w, labels = torch.randn(6, 5), torch.randn(9, 5), torch.randint(9, (6,))
    lse, u = fmf.cosine_lse(x, w, labels, 30.0)
    loss = -nn.functional.logsigmoid(30.0 * (u - 0.35) - lse)
    torch.testing.assert_close(loss, fmf.cosface(x, w, labels, 0.35, 30.0, reduction="none"))


# --- modules --------------------------------------------------------------------------------------

MODULES = {
    "arcface": (
        lambda **kw: fm.ArcFaceLoss(
            10, 6, 0.4, 32.0, boundary="none", grad="straight_through", **kw
        ),
        lambda x, w, y: fmf.arcface(x, w, y, 0.4, 32.0, boundary="none", grad="straight_through"),
        (
            "ArcFaceLoss(num_classes=10, embedding_size=6, margin=0.4, scale=32, boundary='none',"
            " grad='straight_through', reduction='mean', ignore_index=-100, backend='auto')"
        ),
    ),
    "cosface": (
        lambda **kw: fm.CosFaceLoss(10, 6, 0.2, 32.0, **kw),
        lambda x, w, y: fmf.cosface(x, w, y, 0.2, 32.0),
        (
            "CosFaceLoss(num_classes=10, embedding_size=6, margin=0.2, scale=32, reduction='mean',"
            " ignore_index=-100, backend='auto')"
        ),
    ),
    "fixed_adacos": (
        lambda **kw: fm.FixedAdaCosLoss(10, 6, **kw),
        fmf.fixed_adacos,
        (
            "FixedAdaCosLoss(num_classes=10, embedding_size=6, scale=3.10734, reduction='mean',"
            " ignore_index=-100, backend='auto')"
        ),
    ),
    "combined": (
        lambda **kw: fm.CombinedMarginLoss(10, 6, 1.1, 0.3, 0.2, 32.0, boundary="continuous", **kw),
        lambda x, w, y: fmf.combined_margin(x, w, y, 1.1, 0.3, 0.2, 32.0, boundary="continuous"),
        (
            "CombinedMarginLoss(num_classes=10, embedding_size=6, m1=1.1, m2=0.3, m3=0.2, scale=32,"
            " boundary='continuous', grad='exact', reduction='mean', ignore_index=-100,"
            " backend='auto')"
        ),
    ),
    "sphereface": (
        lambda **kw: fm.SphereFaceLoss(10, 6, 2.5, 12.0, **kw),
        lambda x, w, y: fmf.sphereface(x, w, y, 2.5, 12.0),
        (
            "SphereFaceLoss(num_classes=10, embedding_size=6, margin=2.5, scale=12,"
            " reduction='mean', ignore_index=-100, backend='auto')"
        ),
    ),
    "magface": (
        lambda **kw: fm.MagFaceLoss(10, 6, 0.3, 0.6, 12.0, lower_norm=1.0, upper_norm=4.0, **kw),
        lambda x, w, y: fmf.magface(x, w, y, 0.3, 0.6, 12.0, lower_norm=1.0, upper_norm=4.0),
        (
            "MagFaceLoss(num_classes=10, embedding_size=6, lower_margin=0.3, upper_margin=0.6,"
            " scale=12, lower_norm=1, upper_norm=4, regularizer=35, boundary='linear',"
            " reduction='mean', ignore_index=-100, backend='auto')"
        ),
    ),
    "normalized_softmax": (
        lambda **kw: fm.NormalizedSoftmaxLoss(10, 6, 12.0, **kw),
        lambda x, w, y: fmf.normalized_softmax(x, w, y, 12.0),
        (
            "NormalizedSoftmaxLoss(num_classes=10, embedding_size=6, scale=12, reduction='mean',"
            " ignore_index=-100, backend='auto')"
        ),
    ),
}
each_module = pytest.mark.parametrize("name", MODULES)


def _batch(rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6), torch.randint(10, (rows,))


@each_module
def test_module_is_its_function(name: str) -> None:
    make, function, _ = MODULES[name]
    criterion = make()
    for rows in (7, 3):  # a smaller last batch
        x, labels = _batch(rows)
        loss = criterion(x, labels)
        torch.testing.assert_close(loss, function(x, criterion.weight, labels), rtol=0, atol=0)
    loss.backward()
    assert criterion.weight.grad is not None


@each_module
def test_options_reach_the_function(name: str) -> None:
    make = MODULES[name][0]
    x, labels = _batch()
    labels[0] = 3
    criterion = make(reduction="none", ignore_index=3, backend="reference")
    loss = criterion(x, labels)
    assert loss.shape == (7,)
    assert (loss == 0).tolist() == (labels == 3).tolist()
    summed = make(reduction="sum", ignore_index=3, backend="cpu")
    summed.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(summed(x, labels), loss.sum())


@each_module
def test_weight_is_the_one_parameter(name: str) -> None:
    criterion = MODULES[name][0]()
    assert [key for key, _ in criterion.named_parameters()] == ["weight"]
    assert list(criterion.state_dict()) == ["weight"]
    assert isinstance(criterion.weight, nn.Parameter)
    assert criterion.weight.shape == (10, 6)
    assert criterion.weight.dtype is torch.float32
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    before = criterion.weight.detach().clone()
    criterion(*_batch()).backward()
    optimizer.step()
    assert not torch.equal(before, criterion.weight)


@each_module
def test_repr(name: str) -> None:
    make, _, expected = MODULES[name]
    assert repr(make()) == expected


@each_module
def test_copies(name: str) -> None:
    make = MODULES[name][0]
    criterion, (x, labels) = make(), _batch()
    expected = criterion(x, labels)
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    loaded = make()
    assert not torch.equal(loaded(x, labels), expected)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), loaded):
        assert copied.weight is not criterion.weight
        assert repr(copied) == repr(criterion)
        assert torch.equal(copied(x, labels), expected)


@pytest.mark.parametrize("value", [torch.ones(10), torch.ones(3, 2), torch.tensor(3)])
def test_adacos_has_one_scale(value: torch.Tensor) -> None:
    criterion = fm.AdaCosLoss(10, 6)
    with pytest.raises(ValueError, match="the scale of AdaCos is one floating number, got Tensor"):
        criterion.scale = value
    criterion.scale = torch.tensor(9.0)
    criterion.eval()(*_batch())


@pytest.mark.parametrize("value", [2, True, 1.0, None, torch.ones(3)])
def test_sub_centres_are_fixed(value: Any) -> None:
    criterion = fm.ArcFaceLoss(10, 6)
    with pytest.raises(AttributeError, match="sub_centers is 1 and can't be set to"):
        criterion.sub_centers = value
    criterion.sub_centers = 1


@each_module
def test_dtype_and_device(name: str) -> None:
    make = MODULES[name][0]
    assert make(dtype=torch.float64).weight.dtype is torch.float64
    criterion = make().to(torch.float64)
    x, labels = _batch()
    assert criterion(x.double(), labels).dtype is torch.float64
    assert make(device="cpu").weight.device.type == "cpu"
    meta = make(device="meta")
    assert meta.weight.is_meta
    materialised = meta.to_empty(device="cpu")
    materialised.reset_parameters()
    assert bool(materialised(x, labels).isfinite())


@each_module
def test_logits(name: str) -> None:
    criterion = MODULES[name][0]()
    x, _ = _batch()
    cosine = nn.functional.cosine_similarity(x[:, None], criterion.weight[None], dim=2)
    torch.testing.assert_close(criterion.logits(x), criterion.scale * cosine)
    assert criterion.logits(x.bfloat16()).dtype is torch.float32


def test_reset_parameters() -> None:
    criterion = fm.ArcFaceLoss(2000, 64)
    with torch.no_grad():
        criterion.weight.fill_(7.0)
    criterion.reset_parameters()
    assert float(criterion.weight.detach().mean()) == pytest.approx(0.0, abs=0.002)
    assert float(criterion.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(criterion.weight.detach().norm(dim=1).mean()) == pytest.approx(1.0, rel=0.02)


def test_half_precision_input_leaves_the_master_weight_alone() -> None:
    criterion = fm.ArcFaceLoss(10, 6)
    x, labels = _batch()
    loss = criterion(x.half(), labels)
    loss.backward()
    assert criterion.weight.dtype is torch.float32
    assert criterion.weight.grad is not None
    assert criterion.weight.grad.dtype is torch.float32


# --- one value for each fact ----------------------------------------------------------------------


def test_sizes_and_the_fixed_scale_follow_the_weight() -> None:
    """A weight of another size, as a checkpoint or a pruned set of classes brings it."""
    criterion = fm.FixedAdaCosLoss(10, 16)
    criterion.weight = torch.nn.Parameter(torch.randn(100, 8))
    scale = math.sqrt(2.0) * math.log(99)
    x, labels = torch.randn(4, 8), torch.randint(100, (4,))
    assert (criterion.num_classes, criterion.embedding_size) == (100, 8)
    assert criterion.scale == pytest.approx(scale)
    assert "num_classes=100, embedding_size=8, scale=6.49848" in repr(criterion)
    expected = fmf.normalized_softmax(x, criterion.weight, labels, scale)
    torch.testing.assert_close(criterion(x, labels), expected)
    torch.testing.assert_close(criterion.logits(x), fmf.cosine_logits(x, criterion.weight, scale))
    criterion.reset_parameters()
    assert criterion.weight.detach().std().item() == pytest.approx(8**-0.5, rel=0.2)
    with pytest.raises(AttributeError, match="NormalizedSoftmaxLoss"):
        criterion.scale = 3.0


@pytest.mark.parametrize("make", [fm.ArcFaceLoss, fm.CosFaceLoss, fm.NormalizedSoftmaxLoss])
def test_a_scale_may_be_set(make: Any) -> None:
    criterion = make(10, 16)
    criterion.scale = np.float32(30.0)
    assert type(criterion.scale) is float
    assert "scale=30" in repr(criterion)
    x, labels = torch.randn(4, 16), torch.randint(10, (4,))
    other = make(10, 16, scale=30.0)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(criterion(x, labels), other(x, labels))
    torch.testing.assert_close(criterion.logits(x), other.logits(x))
    with pytest.raises(ValueError, match="scale must be"):
        criterion.scale = -1.0


ASSIGNED: dict[str, tuple[Any, Any]] = {  # a value that does, and one that doesn't
    "margin": (0.2, 28.6),
    "scale": (16.0, -1.0),
    "boundary": ("continuous", "hard"),
    "grad": ("straight_through", "ste"),
    "reduction": ("sum", None),
    "ignore_index": (3, 1.5),
    "backend": ("reference", "gpu"),
    "memory_budget": (1 << 10, -1),
    "class_weight": (torch.linspace(0.1, 1.0, 10), -torch.ones(10)),
    "focal_gamma": (2.0, -1.0),
    "focal_alpha": (0.25, math.inf),
    "m1": (1.2, 0.0),
    "m2": (0.2, 28.6),
    "m3": (0.4, 35.0),
    "lower_margin": (0.2, 28.6),
    "upper_margin": (0.6, None),
    "lower_norm": (4.0, -1.0),
    "upper_norm": (50.0, 0.0),
    "regularizer": (20.0, -1.0),
}
SETTINGS = [
    (make, name)
    for make in (
        fm.ArcFaceLoss,
        fm.CosFaceLoss,
        fm.FixedAdaCosLoss,
        fm.NormalizedSoftmaxLoss,
        fm.CombinedMarginLoss,
        fm.MagFaceLoss,
    )
    for name in ASSIGNED
    if name in inspect.signature(make).parameters
]


@pytest.mark.parametrize(("make", "name"), SETTINGS)
def test_what_is_assigned_is_as_if_constructed(make: Any, name: str) -> None:
    value, wrong = ASSIGNED[name]
    criterion, other = make(10, 6), make(10, 6, **{name: value})
    other.load_state_dict(criterion.state_dict())
    setattr(criterion, name, value)
    assert repr(criterion) == repr(other)
    assert name in make.settings
    x, labels = _batch()
    labels[0] = 3
    expected = other(x, labels)
    assert torch.equal(criterion(x, labels), expected)
    assert torch.equal(copy.deepcopy(criterion)(x, labels), expected)
    with pytest.raises((TypeError, ValueError)) as constructed:
        make(10, 6, **{name: wrong})
    with pytest.raises(constructed.type) as assigned:
        setattr(criterion, name, wrong)
    assert str(assigned.value) == str(constructed.value)
    kept = getattr(criterion, name)
    assert torch.equal(kept, value) if isinstance(value, torch.Tensor) else kept == value
    assert list(criterion.state_dict()) == ["weight"]


@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0), nn.Parameter(torch.tensor(3.0))])
def test_a_derived_scale_cannot_be_set(value: Any) -> None:
    criterion = fm.FixedAdaCosLoss(10, 4)
    with pytest.raises(AttributeError, match=r"follows from .* use NormalizedSoftmaxLoss"):
        criterion.scale = value
    assert list(criterion.state_dict()) == ["weight"]
    assert criterion.scale == math.sqrt(2.0) * math.log(9)


# --- a margin of one's own ------------------------------------------------------------------------


class _Square(fm.MarginSoftmaxLoss):
    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> fmf.Psi:
        return lambda u: 2.0 * u * u.abs() - 1.0


class _ClassMargins(fm.MarginSoftmaxLoss):
    """A margin for each class, which is learnt, and an offset for all."""

    settings: ClassVar = {"offset": float, **fm.MarginSoftmaxLoss.settings}

    def __init__(
        self, num_classes: int, embedding_size: int, offset: float = 0.1, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, 30.0, **options)
        self.offset = offset
        self.margin = nn.Parameter(torch.linspace(0.1, 0.5, num_classes))

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> fmf.Psi:
        return fm.margins.additive(self.margin[labels.clamp_min(0)] + self.offset)


class _LearntScale(fm.MarginSoftmaxLoss):
    """A scale that is derived, and a margin that depends on the embedding's norm."""

    def __init__(self, num_classes: int, embedding_size: int, **options: Any) -> None:
        super().__init__(num_classes, embedding_size, None, **options)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    @property
    def scale(self) -> Any:
        return self.log_scale.exp()

    @scale.setter
    def scale(self, value: Any) -> None:
        raise AttributeError("learnt")

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> fmf.Psi:
        margin = 0.3 * embeddings.norm(dim=1).clamp_max(1.0)
        return fm.margins.angular(margin, "linear", "exact")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_implements_psi(backend: str) -> None:
    device = device_of(backend)
    x, labels = (part.to(device) for part in _batch())
    labels[2] = -100
    options: dict[str, Any] = {"backend": backend, "reduction": "sum", "memory_budget": 1 << 12}

    square = _Square(10, 6, scale=20.0, **options).to(device)
    expected = fmf.margin_softmax(
        x, square.weight, labels, lambda u: 2.0 * u * u.abs() - 1.0, 20.0, **options
    )
    assert torch.equal(square(x, labels), expected)

    classes = _ClassMargins(10, 6, **options).to(device)
    rows = classes.margin[labels.clamp_min(0)] + 0.1
    expected = fmf.cosface(x, classes.weight, labels, rows, 30.0, **options)
    parameters = list(classes.parameters())
    got = classes(x, labels)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
    )

    learnt = _LearntScale(10, 6, **options).to(device)
    rows = 0.3 * x.norm(dim=1).clamp_max(1.0)
    expected = fmf.arcface(x, learnt.weight, labels, rows, learnt.scale, **options)
    got, parameters = learnt(x, labels), list(learnt.parameters())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
    )


def test_a_subclass_has_repr_and_settings() -> None:
    assert repr(_Square(10, 6, memory_budget=5)) == (
        "_Square(num_classes=10, embedding_size=6, scale=64, reduction='mean', ignore_index=-100,"
        " backend='auto', memory_budget=5)"
    )
    criterion = _ClassMargins(10, 6)
    criterion.offset = np.float32(0.25)  # pyright: ignore[reportAttributeAccessIssue]
    assert type(criterion.offset) is float
    assert repr(criterion).startswith(
        "_ClassMargins(num_classes=10, embedding_size=6, offset=0.25, scale=30, reduction='mean'"
    )
    assert sorted(criterion.state_dict()) == ["margin", "weight"]
    loaded = pickle.loads(pickle.dumps(criterion))
    assert repr(loaded) == repr(criterion)
    with pytest.raises(ValueError, match="scale must be finite"):
        criterion.scale = 0.0


def test_a_subclass_that_is_not_complete() -> None:
    with pytest.raises(NotImplementedError, match=r"MarginSoftmaxLoss has no margin: .*psi\("):
        fm.MarginSoftmaxLoss(10, 6)(*_batch())
    with pytest.raises(TypeError, match=r"scale must be a number.* got None"):
        _Square(10, 6, None)
    with pytest.raises(AttributeError, match="learnt"):
        _LearntScale(10, 6).scale = 3.0
    x, labels = _batch()
    with pytest.raises(TypeError, match="look swapped"):  # before psi sees them
        _ClassMargins(10, 6)(labels, x)
