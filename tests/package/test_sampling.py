"""Sampled negatives, and the optimisers for their sparse gradients, whole and sharded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import device_of, needs_triton
from torch.utils.checkpoint import checkpoint
from two_processes import Pair

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _ops, _setup, optim
from fused_margin._arguments import Extras
from fused_margin._numerics import accumulation_dtype
from fused_margin.distributed import ClassShard
from fused_margin.distributed._shards import bounds
from fused_margin.optim import RowSparseAdam, RowSparseSGD
from fused_margin.sampling import NegativeSampler, sample_negatives

CLASSES, DIM, RATE = 40, 6, 0.3
FP64 = torch.float64
Tensor = torch.Tensor


def _problem(seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    criterion = fm.ArcFaceLoss(CLASSES, DIM, scale=8.0, dtype=torch.float64)
    with torch.no_grad():
        criterion.weight.normal_(generator=generator)
    x = torch.randn(12, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (12,), generator=generator)
    labels[3] = -100
    return criterion, x, labels


def _expected(weight: Tensor, index: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss, d_x and the dense d_w of a softmax over some classes."""
    x, weight = (one.detach().clone().requires_grad_() for one in (x, weight))
    place = torch.full((CLASSES,), -1)
    place[index] = torch.arange(len(index))
    inside = torch.where(labels >= 0, place[labels.clamp_min(0)], -100)
    loss = fmf.arcface(x, weight[index], inside, 0.5, 8.0)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize(
    "backend", ["cpu", "reference", pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("rate", [0.0, 0.1, RATE, 0.999])
def test_the_softmax_is_over_the_classes_taken(rate: float, backend: str) -> None:
    criterion, x, labels = _problem()
    device = device_of(backend)
    criterion, x, labels = criterion.to(device), x.to(device), labels.to(device)
    criterion.backend = backend
    sample_negatives(criterion, rate, seed=5)
    targets = labels.masked_fill(labels < 0, -1)
    index = NegativeSampler(rate, 5).draw(targets, CLASSES, 0, 0)
    positives = set(labels[labels >= 0].tolist())
    assert positives <= set(index.tolist())
    assert len(index) == max(int(rate * CLASSES), len(positives))
    x.requires_grad_()
    loss = criterion(x, labels)
    loss.backward()
    grad = criterion.weight.grad
    assert grad.layout is torch.sparse_coo
    assert grad._nnz() == len(index)
    expected = _expected(criterion.weight, index, x, labels)
    for found, one in zip((loss, x.grad, grad.to_dense()), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_shaped", [False, True])
@pytest.mark.parametrize("strategy", ["chunked", "fused", "kept", "lent"])
def test_kernels_take_the_list_of_classes(
    strategy: str, is_shaped: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what they make of a copy of these rows, for whatever strides of the weight."""
    from fused_margin._triton import launch, planning

    device = device_of("triton")
    monkeypatch.setattr(launch, "CHUNK_BYTES", 33 * 8 * 64)
    generator = torch.Generator().manual_seed(3)
    for num_rows, num_classes, dim, count in ((33, 150, 40, 70), (7, 90, 24, 17), (5, 40, 8, 2)):
        index = torch.randperm(num_classes, generator=generator)[:count].sort().values.to(device)
        labels = torch.randint(-1, count, (num_rows,), generator=generator).to(device)
        x = torch.randn(num_rows, dim, generator=generator).to(device, dtype)
        w = torch.randn(dim, num_classes, generator=generator).to(device, dtype).t()
        slopes = torch.linspace(-1.0, 2.0, num_rows, dtype=torch.float64, device=device)
        shape = Extras()
        if is_shaped:
            threshold = torch.linspace(-0.2, 0.4, num_rows, dtype=accumulation_dtype(x, w))
            phi = torch.tensor([0.0, 0.3, 1.0, 0.3, 2.0, 1.0], dtype=torch.float64)
            shape = Extras(threshold.to(device), phi.to(device))
        found = []
        for is_list in (True, False):
            leaves = [one.detach().clone().requires_grad_() for one in (x, w)]
            rows, extras = leaves[1], shape._replace(classes=index)
            if not is_list:
                rows, extras = leaves[1][index], shape
            with planning.override(strategy):
                lse, u, _ = _ops.cosine_lse(
                    leaves[0], rows, labels, 9.0, dtype, "triton", None, extras
                )
                (lse * slopes + u).sum().backward()
            d_w = leaves[1].grad
            assert d_w is not None
            assert d_w.layout is (torch.sparse_coo if is_list else torch.strided)
            found.append((lse.detach(), u.detach(), leaves[0].grad, d_w.to_dense()))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


class Filtered(fm.ArcFaceLoss):
    """ArcFace that leaves out what is as near as that, and takes the nearest for nearer."""

    def negatives(self, embeddings: Tensor, labels: Tensor) -> fm.negatives.Negatives:
        return fm.negatives.filtered(0.2)


OTHERS: dict[str, Callable[[], fm.losses.MarginSoftmaxLoss]] = {
    "curricular": lambda: fm.CurricularFaceLoss(CLASSES, DIM, scale=8.0, dtype=FP64),
    "misclassified": lambda: fm.MVSoftmaxLoss(CLASSES, DIM, scale=8.0, dtype=FP64),
    "circle": lambda: fm.CircleSoftmaxLoss(CLASSES, DIM, scale=8.0, dtype=FP64),
    "filtered": lambda: Filtered(CLASSES, DIM, scale=8.0, dtype=FP64),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_other_classes_of_a_sample(backend: str, name: str) -> None:
    """Loss and gradients as the reference backend's, of the same classes."""
    x, labels = _problem()[1:]
    torch.manual_seed(2)
    criterion = OTHERS[name]()
    found = []
    for one in ("reference", backend):
        device = device_of(one)
        trained = sample_negatives(copy.deepcopy(criterion).to(device), 0.4, seed=5)
        trained.backend = one
        leaf = x.detach().to(device).requires_grad_()
        loss = trained(leaf, labels.to(device))
        loss.backward()
        grad: Any = trained.weight.grad
        assert grad.layout is torch.sparse_coo
        assert leaf.grad is not None
        found.append([part.cpu() for part in (loss.detach(), leaf.grad, grad.to_dense())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("budget", [-1, 1 << 20])
def test_opcheck_of_a_list_of_classes(budget: int) -> None:
    device = device_of("triton")
    x, w = torch.randn(7, 12, device=device), torch.randn(11, 12, device=device)
    labels = torch.arange(-1, 6, device=device)
    numbers = torch.tensor([9.0], dtype=torch.float64)
    extras = Extras(classes=torch.arange(0, len(w), 2, device=x.device))
    checked = ("test_schema", "test_faketensor")
    arguments = (x, w, labels, numbers, None, *extras, torch.float32, "triton", budget)
    torch.library.opcheck(torch.ops.fused_margin.cosine_lse.default, arguments, test_utils=checked)
    lse, u, inv_x, inv_w, kept, *_ = torch.ops.fused_margin.cosine_lse(*arguments)
    assert len(inv_w) == (len(w) + 1) // 2
    backward = (
        torch.randn_like(lse), torch.randn_like(u), None, None, None, x, w, labels, numbers, None,
        *extras, torch.float32, "triton", lse, u, inv_x, inv_w, kept, None, True, True, False,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fused_margin.cosine_lse_backward.default, backward, test_utils=checked
    )


def test_full_softmax_at_rate_one_and_in_evaluation() -> None:
    criterion, x, labels = _problem()
    expected = criterion(x, labels)
    sample_negatives(criterion, RATE)
    assert criterion(x, labels) < expected
    criterion.sampler.rate = 1.0
    loss = criterion(x, labels)
    assert loss == expected
    loss.backward()
    assert criterion.weight.grad.layout is torch.strided
    criterion.sampler.rate = RATE
    assert criterion.eval()(x, labels) == expected


def test_steps_differ_and_come_again_after_a_restart() -> None:
    criterion, x, labels = _problem()
    sample_negatives(criterion, RATE, seed=3)
    losses = [criterion(x, labels).item() for _ in range(6)]
    assert len(set(losses)) == 6
    other, x, labels = _problem()
    sample_negatives(other, RATE, seed=3)
    assert [other(x, labels).item() for _ in range(3)] == losses[:3]
    state = other.state_dict()
    assert state["sampler.step"] == 3
    resumed, x, labels = _problem()
    sample_negatives(resumed, RATE, seed=3)
    resumed.load_state_dict(state)
    assert [resumed(x, labels).item() for _ in range(3)] == losses[3:]
    resumed.reset_parameters()
    assert resumed.sampler.step == 0
    sample_negatives(resumed, RATE, seed=4)
    resumed.load_state_dict({**state, "sampler.step": torch.tensor(0)})
    assert [resumed(x, labels).item() for _ in range(3)] != losses[:3]


def test_every_class_is_taken_as_often() -> None:
    sampler, counts = NegativeSampler(RATE), torch.zeros(CLASSES)
    labels = torch.tensor([4, 4, -1])
    for step in range(2000):
        counts[sampler.draw(labels, CLASSES, 0, step)] += 1
    assert counts[4] == 2000
    others = counts[torch.arange(CLASSES) != 4]
    share = (int(RATE * CLASSES) - 1) / (CLASSES - 1)
    # six standard deviations of a binomial count
    assert (others - 2000 * share).abs().max() < 6 * (2000 * share * (1 - share)) ** 0.5


def test_no_class_but_the_target() -> None:
    """A row whose target is the only class taken has a loss of 0; no row at all likewise."""
    criterion, x, labels = _problem()
    sample_negatives(criterion, 0.0)
    for rows in (slice(0, 1), slice(0, 0), slice(3, 4)):
        loss = criterion(x[rows], labels[rows])
        loss.backward()
        assert loss == 0.0
        assert not criterion.weight.grad.to_dense().any()


def test_refusals() -> None:
    with pytest.raises(TypeError, match="criterion must be a loss of fused_margin, got Linear"):
        sample_negatives(torch.nn.Linear(2, 3))
    criterion, _, _ = _problem()
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        sample_negatives(criterion, 1.5)
    sample_negatives(criterion)
    with pytest.raises(ValueError, match="rate must be in"):
        criterion.sampler.rate = -1.0
    with pytest.raises(ValueError, match="lr must be in"):
        RowSparseSGD(criterion.parameters(), lr=-1.0)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"sub_centers": 2}])
def test_what_a_sample_has_not_is_refused_at_once(options: dict[str, Any]) -> None:
    """Or at the forward, where it is set later; at a rate of 1 nothing is left out."""
    (name,) = options
    criterion: Any = fm.ArcFaceLoss(CLASSES, DIM, **options)
    with pytest.raises(ValueError, match=f"{name} can't be had with sampled negatives"):
        sample_negatives(criterion, RATE)
    assert criterion.sampler is None
    sampled: Any = sample_negatives(criterion, 1.0)
    x, labels = torch.randn(4, DIM), torch.arange(4)
    criterion(x, labels)
    sampled.sampler.rate = RATE
    with pytest.raises(ValueError, match=f"{name} can't be had with sampled negatives"):
        criterion(x, labels)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_activation_checkpointing(is_reentrant: bool) -> None:
    """The second forward would take other classes, or change statistics again: neither does."""
    x, labels = torch.randn(12, DIM, requires_grad=True), torch.arange(12)
    for criterion, what in (
        (sample_negatives(fm.ArcFaceLoss(CLASSES, DIM), RATE), "classes"),
        (fm.AdaCosLoss(CLASSES, DIM), "statistics"),
    ):
        run: Any = functools.partial(checkpoint, use_reentrant=is_reentrant)
        loss = run(criterion, x, labels)
        state = copy.deepcopy(criterion.state_dict())
        match = f"second forward would have other {what} than the first: call it outside"
        with pytest.raises(RuntimeError, match=match):
            loss.backward()
        for name, value in criterion.state_dict().items():
            assert torch.equal(value, state[name])
        model = torch.nn.Linear(DIM, DIM)
        criterion(run(model, x), labels).backward()
        assert model.weight.grad is not None
        run(criterion.eval(), x, labels).backward()


def test_compiled() -> None:
    """As it is, outside of graphs; of all classes in one graph."""
    torch._dynamo.reset()
    criterion, x, labels = _problem()
    sample_negatives(criterion, RATE)
    other = copy.deepcopy(criterion)
    call = torch.compile(criterion, backend="aot_eager")
    whole = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for rate, compiled in ((RATE, call), (1.0, whole), (RATE, call)):
        criterion.sampler.rate = other.sampler.rate = rate
        for _ in range(2):
            found, expected = compiled(x, labels), other(x, labels)
            found.backward()
            expected.backward()
            assert found == expected
        assert criterion.sampler.step == other.sampler.step
        for one in (criterion, other):
            one.weight.grad = one.weight.grad.to_dense()
        torch.testing.assert_close(criterion.weight.grad, other.weight.grad)
    dynamo: Any = torch._dynamo
    dynamo.reset()
    with pytest.raises(dynamo.exc.Unsupported, match="compile the model, and call the"):
        whole(x, labels)
    torch._dynamo.reset()
    criterion, x, labels = _problem()
    adam = torch.optim.Adam(criterion.parameters())
    with pytest.raises(ValueError, match="Adam with these settings doesn't take the sparse"):
        torch.compile(sample_negatives(criterion, RATE), backend="aot_eager")(x, labels)
    assert adam.param_groups


def test_from_the_meta_device_as_from_the_constructor() -> None:
    """The same weights for the same seed; those of shards are drawn by blocks, and others."""
    for num_classes in (3, 3000):
        torch.manual_seed(1)
        expected = fm.AdaCosLoss(num_classes, DIM)
        with torch.device("meta"):
            criterion = sample_negatives(fm.AdaCosLoss(num_classes, DIM), RATE)
        criterion.to_empty(device="cpu")
        torch.manual_seed(1)
        criterion.reset_parameters()
        assert torch.equal(criterion.weight, expected.weight)
        assert criterion.scale == expected.scale


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (
        lambda p: RowSparseSGD(p, 0.1, 0.9, 0.01),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    ),
    "sgd without momentum": (lambda p: RowSparseSGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "adam": (
        lambda p: RowSparseAdam(p, 0.1, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    ),
}


def _gradients(is_sparse: bool, index: Tensor, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(steps, len(index), DIM, generator=generator, dtype=torch.float64)
    if not is_sparse:
        return list(values)
    shape = (CLASSES, DIM)
    return [
        torch.sparse_coo_tensor(index[None], one, shape, check_invariants=True) for one in values
    ]


@pytest.fixture(params=["whole", "parts", "as GPUs do"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are updated together; three at a time, the last part not full; without copies of W."""
    if request.param == "parts":
        monkeypatch.setattr(optim, "BLOCK_BYTES", 3 * DIM * 8 + 1)
    elif request.param == "as GPUs do":
        monkeypatch.setattr(optim, "_updates_in_cache", lambda tensor: False)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_all_rows_they_are_torchs(name: str, is_sparse: bool) -> None:
    criterion, _, _ = _problem()
    other = copy.deepcopy(criterion)
    ours, theirs = OPTIMIZERS[name]
    ours, theirs = ours(criterion.parameters()), theirs(other.parameters())
    for grad in _gradients(is_sparse, torch.arange(CLASSES), 5):
        criterion.weight.grad, other.weight.grad = grad, grad.to_dense()
        ours.step()
        theirs.step()
    torch.testing.assert_close(criterion.weight, other.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_without_a_gradient_stand_still(name: str) -> None:
    """Each row is where torch's optimiser leaves it after the steps in which it was sampled."""
    criterion, _, _ = _problem()
    before = criterion.weight.detach().clone()
    ours, theirs = OPTIMIZERS[name]
    optimizer = ours(criterion.parameters())
    often, seldom = torch.tensor([2, 7, 30]), torch.tensor([7, 11])
    plan = [often, seldom, often, often, seldom]
    grads = [_gradients(True, index, step + 1)[step] for step, index in enumerate(plan)]
    for grad in grads:
        criterion.weight.grad = grad
        optimizer.step()
    moved = (criterion.weight != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == [2, 7, 11, 30]
    for row in moved:
        alone = torch.nn.Parameter(before[row].clone())
        optimizer = theirs([alone])
        for grad in grads:
            if row in grad._indices()[0]:
                alone.grad = grad.to_dense()[row]
                optimizer.step()
        torch.testing.assert_close(criterion.weight[row], alone, rtol=1e-12, atol=1e-12)


def test_several_backwards_add_up() -> None:
    criterion, x, labels = _problem()
    other = copy.deepcopy(criterion)
    optimizer = RowSparseSGD(sample_negatives(criterion, RATE).parameters(), 1.0)
    index = [NegativeSampler(RATE).draw(labels.clamp_min(-1), CLASSES, 0, step) for step in (0, 1)]
    expected = sum(_expected(other.weight, one, x, labels)[2] for one in index)
    for _ in range(2):
        criterion(x, labels).backward()
    optimizer.step()
    torch.testing.assert_close(criterion.weight, other.weight - expected, rtol=1e-10, atol=1e-10)


def sharded(rate: float) -> list[float]:
    """Loss, gradient and a step over sampled classes of all shards, beside all of them at once."""
    plain, x, labels = _problem()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    _setup._calls[plain] = _setup._DECIDED
    criterion = sample_negatives(fm.distributed.shard_classes(copy.deepcopy(plain)), rate, seed=2)
    rows = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
    sampler, taken = NegativeSampler(rate, 2), []
    for one in range(ranks):
        start, stop = bounds(CLASSES, one, ranks)
        targets = torch.where(labels >= 0, labels, -1) - start
        taken.append(start + sampler.draw(targets, stop - start, start, 0))
    loss, d_x, d_w = _expected(plain.weight, torch.cat(taken), x[rows], labels[rows])
    dist.all_reduce(d_w)
    d_w /= ranks
    mine = x[rows].clone().requires_grad_()
    optimizer = RowSparseSGD(criterion.parameters(), 0.5, 0.9)
    found = criterion(mine, labels[rows])
    found.backward()
    weight: Any = criterion.weight
    assert isinstance(weight.grad, DTensor)
    shard = ClassShard.of(weight)
    here = weight.grad._local_tensor
    assert here.layout is torch.sparse_coo
    assert here._nnz() == len(taken[rank])
    optimizer.step()
    buffer: Any = optimizer.state[weight]["momentum_buffer"]
    assert isinstance(buffer, DTensor)
    assert mine.grad is not None
    part = slice(shard.start, shard.stop)
    pairs = [
        (found, loss),
        (mine.grad.clone(), d_x),
        (here.to_dense(), d_w[part]),
        (weight.to_local().detach().clone(), plain.weight[part] - 0.5 * d_w[part]),
    ]
    criterion.sampler.rate = 1.0  # and on with all classes
    optimizer.zero_grad()
    criterion(mine, labels[rows]).backward()
    optimizer.step()
    assert weight.grad.layout is torch.strided
    return [float((a - b).detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_shards_sample_their_own_classes(ranks: Pair, rate: float) -> None:
    for differences in ranks.run(sharded, rate):
        assert max(differences) < 1e-11
