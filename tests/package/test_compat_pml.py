"""pytorch-metric-learning's classes on this package: equal to the peer's and to the formulas."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as peer_losses
from pytorch_metric_learning import regularizers as peer_regularizers

import fused_margin as fm
from fused_margin.compat import _dots, pml

Tensor = torch.Tensor
N, C, D = 23, 70, 12
UNNORMALISED = distances.DotProductSimilarity(normalize_embeddings=False)

# Each as its class is called, here and there
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcface": ("ArcFaceLoss", {}),
    "arcface-wide": ("ArcFaceLoss", {"margin": 80, "scale": 16}),
    "cosface": ("CosFaceLoss", {"margin": 0.5, "scale": 10}),
    "softmax": ("NormalizedSoftmaxLoss", {"temperature": 0.1}),
    "softmax-cosine": ("NormalizedSoftmaxLoss", {"distance": distances.CosineSimilarity()}),
    "softmax-norms": ("NormalizedSoftmaxLoss", {"distance": UNNORMALISED}),
    "large-margin": ("LargeMarginSoftmaxLoss", {}),
    "large-margin-3": ("LargeMarginSoftmaxLoss", {"margin": 3, "scale": 0.5}),
    "sphereface": ("SphereFaceLoss", {"margin": 4}),
    "subcenters": ("SubCenterArcFaceLoss", {"sub_centers": 3}),
    "subcenters-1": ("SubCenterArcFaceLoss", {"sub_centers": 1, "margin": 10}),
}
PAIRS = (torch.tensor([0, 1, 1, 5]), torch.tensor([2, 3, 3, 6]))
MINED = {"all": None, "pairs": (*PAIRS, *PAIRS), "triplets": (*PAIRS, PAIRS[0])}
MINED["nothing"] = tuple(torch.zeros(0, dtype=torch.int64) for _ in range(3))


def make(home: Any, name: str, **more: Any) -> Any:
    kind, options = CASES[name]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        # the peer's large margins warn so with NumPy 2
        warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
        return getattr(home, kind)(num_classes=C, embedding_size=D, **options, **more)


def batch(criterion: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows at all angles to their class's weight, of norms around 3."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(C, (N,), generator=generator)
    first = criterion.W.detach().t()[labels * (criterion.W.shape[1] // C)].to(dtype)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    x[:8] += 2 * first[:8]
    x[8:12] = 0.3 * x[8:12] - first[8:12]
    return x, labels


def results(criterion: Any, x: Tensor, labels: Tensor, **call: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = criterion(x, labels, **call)
    return [loss.detach(), *torch.autograd.grad(loss, (x, criterion.W))]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype is want.dtype
        assert float((got - want).detach().norm()) <= tolerance * float(want.detach().norm())


TOLERANCES = [(torch.float32, 2e-5), (torch.float64, 1e-12)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_peer(name: str, dtype: torch.dtype, tolerance: float) -> None:
    peer, ours = make(peer_losses, name), make(pml, name)
    torch.testing.assert_close(ours.W, peer.W, rtol=0, atol=0)  # the same seed
    x, labels = batch(peer, dtype)
    for mined in MINED.values():
        expected = results(peer, x, labels, indices_tuple=mined)
        assert_near(results(ours, x, labels, indices_tuple=mined), expected, tolerance)
    assert_near([ours.get_logits(x)], [peer.get_logits(x)], tolerance)
    assert getattr(ours, "margin", None) == getattr(peer, "margin", None)


def dense_losses(name: str, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The formulas of the papers on the whole (N, C) matrix, w (D, C K)."""
    kind, options = CASES[name]
    cosine = F.normalize(x) @ F.normalize(w, dim=0)
    cosine = cosine.unflatten(1, (C, -1)).amax(dim=2)
    norms = x.norm(dim=1, keepdim=True)
    factor: Any = options.get("scale", 64.0)
    if kind in ("LargeMarginSoftmaxLoss", "SphereFaceLoss"):
        factor = options.get("scale", 1.0) * norms
        factor = factor * w.norm(dim=0) if kind == "LargeMarginSoftmaxLoss" else factor
        m = options.get("margin", 4)
        theta = cosine.acos()
        k = (m * theta / math.pi).floor()
        target = (-1.0) ** k * (m * theta).cos() - 2 * k
    elif kind == "NormalizedSoftmaxLoss":
        target, factor = cosine, 1 / options.get("temperature", 0.05)
        factor = factor * norms if options.get("distance") is UNNORMALISED else factor
    elif kind == "CosFaceLoss":
        target = cosine - options["margin"]
    else:
        m = math.radians(options.get("margin", 28.6))
        theta = cosine.acos()
        target = torch.where(theta + m <= math.pi, (theta + m).cos(), cosine - m * math.sin(m))
    is_target = torch.arange(C)[None, :] == labels[:, None]
    return F.cross_entropy(torch.where(is_target, target, cosine) * factor, labels)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dots, "CPU_BYTES", 1)  # blocks of 64 classes: two of them
    criterion = make(pml, name).double()
    x, labels = batch(criterion, torch.float64)
    leaves = [x.clone().requires_grad_(), criterion.W.detach().clone().requires_grad_()]
    loss = dense_losses(name, leaves[0], leaves[1], labels)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    assert_near(results(criterion, x, labels), expected)


# --- regularisers and reducers --------------------------------------------------------------------

REGULARIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "centre": ("CenterInvariantRegularizer", {}),
    "regularface": ("RegularFaceRegularizer", {}),
    "lp": ("LpRegularizer", {"p": 1, "power": 2}),
    "zero-mean": ("ZeroMeanRegularizer", {}),
    "sparse": ("SparseCentersRegularizer", {"num_classes": 10, "centers_per_class": 3}),
}
REDUCERS: dict[str, Callable[[], Any]] = {
    "sum": reducers.SumReducer,
    "above": lambda: reducers.ThresholdReducer(low=0.5),
    "classes": lambda: reducers.ClassWeightedReducer(torch.linspace(0.1, 1.0, 3 * C)),
}


def regularizer(home: Any, name: str, **more: Any) -> Any:
    kind, options = REGULARIZERS[name]
    return getattr(home, kind)(**options, **more)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for reducer in (None, *REDUCERS.values()):
        outcomes = []
        for home in (pml, peer_regularizers):
            given = {} if reducer is None else {"reducer": reducer()}
            weight = torch.randn(30, D, dtype=dtype, generator=torch.Generator().manual_seed(1))
            weight.requires_grad_()
            value = regularizer(home, name, **given)(weight)
            outcomes.append([value.detach(), *torch.autograd.grad(value, weight)])
        assert_near(outcomes[0], outcomes[1], 4 * tolerance)


@pytest.mark.parametrize("reducer", [None, *REDUCERS])
@pytest.mark.parametrize("name", ["arcface", "subcenters"])
def test_losses_with_regularizers_and_reducers(name: str, reducer: str | None) -> None:
    x, labels = batch(make(pml, name).double(), torch.float64)
    outcomes = []
    for home, kinds in ((pml, pml), (peer_losses, peer_regularizers)):
        options: dict[str, Any] = {
            "weight_regularizer": regularizer(kinds, "regularface"),
            "weight_reg_weight": 0.3,
            "embedding_regularizer": regularizer(kinds, "lp"),
            "embedding_reg_weight": 0.01,
        }
        if reducer is not None:
            options["reducer"] = REDUCERS[reducer]()
        outcomes.append(results(make(home, name, **options).double(), x, labels))
    assert_near(outcomes[0], outcomes[1])


def test_reducers_that_take_everything() -> None:
    options = {"weight_regularizer": regularizer(pml, "centre")}
    x, labels = batch(make(pml, "cosface"), torch.float32)
    parts = make(pml, "cosface", reducer=reducers.DoNothingReducer(), **options)(x, labels)
    assert list(parts) == ["loss", "weight_reg_loss"]
    assert parts["loss"]["losses"].shape == (N,)
    both = reducers.MultipleReducers({"loss": reducers.SumReducer()})
    total = make(pml, "cosface", reducer=both, **options)(x, labels)
    expected = parts["loss"]["losses"].sum() + parts["weight_reg_loss"]["losses"]
    torch.testing.assert_close(total, expected)


# --- W --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arcface", "sphereface", "subcenters"])
def test_the_memory_of_w_is_that_of_whole_rows(name: str) -> None:
    """Through whatever makes or moves it, and so do the gradient and what optimisers keep."""
    criterion = make(pml, name)
    columns = criterion.W.shape[1]
    assert criterion.W.shape[0] == D
    assert list(criterion.state_dict()) == ["W"]
    x, labels = batch(criterion, torch.float32)
    optimizer = torch.optim.Adam(criterion.parameters())
    criterion(x, labels).backward()
    optimizer.step()
    moments = optimizer.state[criterion.W]
    kept = [criterion.W, criterion.W.grad, moments["exp_avg"], moments["exp_avg_sq"]]
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    made = [copy.deepcopy(criterion), make(pml, name).double(), make(pml, name).to("cpu")]
    made[2].load_state_dict(torch.load(file, weights_only=True))
    made += [make(pml, name).to("meta").to_empty(device="cpu")]
    for tensor in [*kept, *(module.W for module in made)]:
        assert tensor.shape == (D, columns)
        assert tensor.t().is_contiguous()
    torch.testing.assert_close(made[2].W, criterion.W, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_states_are_exchanged_with_the_peer(name: str) -> None:
    peer, ours = make(peer_losses, name), make(pml, name)
    torch.nn.init.uniform_(peer.W)
    ours.load_state_dict(peer.state_dict())
    assert ours.W.t().is_contiguous()
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.W, peer.W, rtol=0, atol=0)


def test_training_follows_the_peer() -> None:
    """Momentum and weight decay included, with the same learning rate."""
    trained = []
    for home in (peer_losses, pml):
        criterion = make(home, "arcface").double()
        x, labels = batch(criterion, torch.float64)
        optimizer = torch.optim.SGD(criterion.parameters(), 0.5, 0.9, weight_decay=5e-4)
        for _ in range(5):
            optimizer.zero_grad()
            criterion(x, labels).backward()
            optimizer.step()
        trained.append([criterion.W.detach()])
    assert_near(trained[0], trained[1])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "Adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3, **kw),
    "AdamW": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, amsgrad=True, **kw),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in OPTIMIZERS), ("SGD", {"foreach": True}), ("Adam", {"fused": True})
    ],
)  # fmt: skip
def test_optimizers_train_as_the_peer(name: str, options: dict[str, Any]) -> None:
    """With clipped gradients, through a checkpoint, a copy and a pickle of loss and optimiser."""
    trained = []
    for home in (peer_losses, pml):
        criterion = make(home, "cosface").double()
        x, labels = batch(criterion, torch.float64)
        optimizer = OPTIMIZERS[name](criterion.parameters(), **options)
        for step in range(4):
            optimizer.zero_grad()
            criterion(x, labels).backward()
            torch.nn.utils.clip_grad_norm_(criterion.parameters(), 1.0)
            optimizer.step()
            if step == 1 and home is pml:
                before = copy.deepcopy((criterion, optimizer))
                criterion, optimizer = pickle.loads(pickle.dumps(before))
                assert criterion.W.t().is_contiguous()
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = OPTIMIZERS[name](criterion.parameters(), **options)
                optimizer.load_state_dict(state)
        trained.append([criterion.W.detach()])
    assert_near(trained[1], trained[0], 1e-10)


@pytest.mark.parametrize(
    ("name", "lower"), [*((name, torch.float16) for name in CASES), ("arcface", torch.bfloat16)]
)
def test_a_loss_in_half_precision(name: str, lower: torch.dtype) -> None:
    """Takes half embeddings as they are, and others with more bits, which widen W as there."""
    criterion = make(pml, name).to(lower)
    x, labels = batch(make(pml, name), torch.float32)
    loss = criterion(x.to(lower), labels)
    loss.backward()
    assert criterion.W.dtype is criterion.W.grad.dtype is lower
    criterion.zero_grad()
    expected = make(pml, name)
    expected.W.data = criterion.W.data.float()
    assert_near([criterion(x, labels)], [expected(x, labels)], 1e-6)
    assert criterion.W.dtype is torch.float32
    assert criterion.W.t().is_contiguous()
    torch.testing.assert_close(loss, expected(x, labels), rtol=0.05, atol=0.05)


def test_weight_init_func() -> None:
    seen = []

    def fill(tensor: Tensor) -> None:
        seen.append(tuple(tensor.shape))
        torch.nn.init.constant_(tensor, 2.0)

    criterion = make(pml, "arcface", weight_init_func=fill)
    assert seen == [(D, C)]
    assert bool((criterion.W == 2.0).all())


@pytest.mark.parametrize("name", CASES)
def test_dtypes(name: str) -> None:
    """Half precision leaves W alone; fp64 widens it, as there, but never under autocast."""
    criterion = make(pml, name)
    x, labels = batch(criterion, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert criterion(x.to(dtype), labels).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(x, labels).dtype is torch.float32
    assert criterion.W.dtype is torch.float32
    assert criterion(x.double(), labels).dtype is torch.float64
    assert criterion.W.dtype is torch.float64
    assert criterion.W.t().is_contiguous()


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_on_the_weight_and_opposite(name: str, sign: float) -> None:
    criterion = make(pml, name)
    labels = torch.arange(N)
    x = sign * criterion.W.detach().t()[labels * (criterion.W.shape[1] // C)]
    for tensor in results(criterion, x, labels):
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("name", CASES)
def test_empty_and_ignored(name: str) -> None:
    criterion = make(pml, name)
    x, labels = batch(criterion, torch.float32)
    loss, _, d_w = results(criterion, x[:0], labels[:0])
    assert float(loss) == float(d_w.abs().max()) == 0.0
    ignored = labels.clone()
    ignored[::2] = -100
    spoilt = x.clone()
    spoilt[::2] = float("nan")
    loss, d_x, d_w = results(criterion, spoilt, ignored)
    kept, _, d_w_kept = results(criterion, x[1::2], labels[1::2])
    share = len(labels[1::2]) / N
    torch.testing.assert_close(loss, share * kept)
    torch.testing.assert_close(d_w, share * d_w_kept)
    assert float(d_x[::2].abs().max()) == 0.0


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 10])
def test_a_multiple_of_the_angle_never_rises(margin: int) -> None:
    """Its slope by the cosine is m² at both ends, and 0 where pieces meet."""
    theta = torch.linspace(0.0, math.pi, 2001, dtype=torch.float64)
    u = theta.cos().requires_grad_()
    value = pml.multiple_angle(u, margin)
    (slope,) = torch.autograd.grad(value.sum(), u)
    k = (margin * theta / math.pi).floor()
    expected = (-1.0) ** k * (margin * theta).cos() - 2 * k
    torch.testing.assert_close(value.detach(), expected)
    assert float(slope.min()) > -1e-9
    ends = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(pml.multiple_angle(ends, margin).sum(), ends)
    torch.testing.assert_close(slope, torch.full_like(slope, margin**2))


def test_outliers() -> None:
    ours = pml.SubCenterArcFaceLoss(5, D, sub_centers=3)
    peer = peer_losses.SubCenterArcFaceLoss(num_classes=5, embedding_size=D, sub_centers=3)
    peer.load_state_dict(ours.state_dict())
    x, labels = torch.randn(60, D), torch.randint(4, (60,))  # a class without rows
    (rows, centers), (expected, dominant) = (c.get_outliers(x, labels) for c in (ours, peer))
    assert rows.tolist() == expected.tolist()
    torch.testing.assert_close(centers[:, :4], dominant[:, :4])
    assert float(centers[:, 4].abs().max()) == 0.0


@pytest.mark.parametrize("keep_w", [False, True])
def test_gradcheck(keep_w: bool) -> None:
    """Twice differentiable, by the (N, C) matrix."""
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2])

    def call(x: Tensor, w: Tensor) -> Tensor:
        return _dots.losses(x, w, labels, lambda u: u - 0.1, 2.0, keep_x=True, keep_w=keep_w)

    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


@pytest.mark.parametrize("name", ["arcface", "subcenters", "sphereface"])
def test_compiled(name: str) -> None:
    criterion = make(pml, name)
    x, labels = batch(criterion, torch.float32)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    got = [compiled(x, labels).detach()]
    assert_near(got, results(criterion, x, labels)[:1], 1e-6)
    with pytest.raises(ValueError, match="labels must be in"):
        compiled(x, labels + C)


def test_opcheck() -> None:
    x, w = torch.randn(4, 3), torch.randn(6, 3)
    labels = torch.tensor([0, 5, -1, 2])
    for normalize in (False, True):
        arguments = (x.requires_grad_(), w.requires_grad_(), labels, normalize)
        torch.library.opcheck(torch.ops.fused_margin.dots_lse.default, arguments)


def test_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of N x C, or a copy of the weights, at most a block is made."""
    num_classes, dim, rows = 30_000, 16, 256
    monkeypatch.setattr(_dots, "CPU_BYTES", 1 << 21)
    x, labels = torch.randn(rows, dim), torch.randint(num_classes, (rows,))
    for criterion in (
        pml.SphereFaceLoss(num_classes, dim),
        pml.LargeMarginSoftmaxLoss(num_classes, dim),
    ):
        y = labels % (criterion.W.shape[1] // 2)
        with torch.profiler.profile(profile_memory=True) as profile:
            criterion(x, y).backward()
        peak = running = 0
        profiler: Any = profile.profiler
        for event in profiler.kineto_results.events():
            if event.name() == "[memory]":
                running += event.nbytes()
                peak = max(peak, running)
        # a few blocks of 2 MiB; N x C is 29 MiB
        assert 4 * num_classes * dim <= peak <= 4 * num_classes * dim + (12 << 20)


# --- errors ---------------------------------------------------------------------------------------

LP = distances.LpDistance()
X, Y = torch.randn(4, D), torch.arange(4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "labels missing": (lambda: pml.ArcFaceLoss(C, D)(X), ValueError, "needs labels"),
    "references": (
        lambda: pml.ArcFaceLoss(C, D)(X, Y, ref_emb=X.clone(), ref_labels=Y),
        ValueError, "DistributedDataParallel",
    ),
    "rows": (lambda: pml.ArcFaceLoss(C, D)(X, Y[:3]), ValueError, "one class index per row"),
    "distance": (lambda: pml.ArcFaceLoss(C, D, distance=LP), ValueError, "got LpDistance"),
    "distance of softmax": (
        lambda: pml.NormalizedSoftmaxLoss(C, D, distance=LP), ValueError, "DotProductSimilarity"
    ),
    "power": (
        lambda: pml.ArcFaceLoss(C, D, distance=distances.CosineSimilarity(power=2)),
        ValueError, "power=1",
    ),
    "statistics": (lambda: pml.CosFaceLoss(C, D, collect_stats=True), ValueError, "avg_angle"),
    "radians": (lambda: pml.ArcFaceLoss(C, D, margin=200), ValueError, "at most pi"),
    "multiple": (lambda: pml.SphereFaceLoss(C, D, margin=0), ValueError, "at least 1"),
    "text": (lambda: pml.SphereFaceLoss(C, D, margin="4"), TypeError, "must be an int"),  # pyright: ignore[reportArgumentType]
    "centres": (lambda: pml.SubCenterArcFaceLoss(C, D, sub_centers=0), ValueError, ">= 1, got 0"),
    "half a centre": (
        lambda: pml.SubCenterArcFaceLoss(C, D, sub_centers=1.5),  # pyright: ignore[reportArgumentType]
        TypeError, "must be an int",
    ),
    "one centre": (lambda: pml.SparseCentersRegularizer(C, 1), ValueError, "at least 2"),
    "centres of others": (
        lambda: pml.SparseCentersRegularizer(C, 2)(torch.randn(C, D)), ValueError, "140 rows"
    ),
    "reducer": (lambda: pml.ArcFaceLoss(C, D, reducer="mean"), TypeError, "reducers or None"),
    "mined": (lambda: pml.ArcFaceLoss(C, D)(X, Y, Y), TypeError, "what a miner returns"),
    "scale": (lambda: pml.CosFaceLoss(C, D, scale=0), ValueError, "> 0"),
    "temperature": (lambda: pml.NormalizedSoftmaxLoss(C, D, -1.0), ValueError, "> 0"),
    "meta": (lambda: pml.ArcFaceLoss(C, D).to("meta")(X, Y), ValueError, "reset_parameters"),
    "range": (lambda: pml.SphereFaceLoss(C, D)(X, Y + C), ValueError, "labels must be in"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_reference_embeddings_that_are_the_embeddings() -> None:
    criterion = pml.ArcFaceLoss(C, D)
    torch.testing.assert_close(criterion(X, Y, None, X, Y), criterion(X, Y))


def test_repr_has_units() -> None:
    assert "margin=0.4992 rad (28.6 degrees), scale=64" in repr(pml.ArcFaceLoss(C, D))
    assert "margin=0.35 (cosine)" in repr(pml.CosFaceLoss(C, D))
    assert "margin=4 (times theta)" in repr(pml.SphereFaceLoss(C, D))
    assert "num_classes=70, embedding_size=12" in repr(pml.SubCenterArcFaceLoss(C, D))


def test_backend_and_budget() -> None:
    x, labels = batch(make(pml, "arcface"), torch.float32)
    values = [
        make(pml, "arcface", **options)(x, labels).detach()
        for options in ({}, {"backend": "reference"}, {"memory_budget": 0})
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    native = fm.functional.arcface(x, make(pml, "arcface").W.t(), labels, math.radians(28.6), 64.0)
    torch.testing.assert_close(values[0], native.detach())
