"""The regularisers: equal to their formulas and to pytorch-metric-learning, without C x C."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as peer_losses
from pytorch_metric_learning import regularizers as peers
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin import _weight_sweeps, regularizers

Tensor = torch.Tensor
Regularizer = Callable[[Tensor], Tensor]
FUNCTIONS: tuple[Regularizer, ...] = (regularizers.center_invariant, regularizers.regular_face)
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def eager_center_invariant(weight: Tensor) -> Tensor:
    squared_norms = weight.square().sum(dim=1)
    return ((squared_norms - squared_norms.mean()) ** 2 / 4).mean()


def eager_regular_face(weight: Tensor) -> Tensor:
    w_hat = F.normalize(weight, eps=1e-12)
    itself = torch.eye(len(weight), dtype=torch.bool, device=weight.device)
    return (w_hat @ w_hat.t()).masked_fill(itself, -math.inf).max(dim=1).values.mean()


EAGER: dict[Regularizer, Regularizer] = {
    regularizers.center_invariant: eager_center_invariant,
    regularizers.regular_face: eager_regular_face,
}


def _weight(num_classes: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose norms are spread over a factor of 10 or so."""
    scale = torch.randn(num_classes, 1, dtype=torch.float64).mul(0.7).exp()
    return (torch.randn(num_classes, dim, dtype=torch.float64) * scale).to(dtype)


def _value_and_gradient(function: Regularizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.detach().requires_grad_()
    value = function(weight)
    (gradient,) = torch.autograd.grad(value, weight)
    return value.detach(), gradient


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _small_blocks(monkeypatch: pytest.MonkeyPatch, side: int, num_bytes: int) -> None:
    monkeypatch.setattr(_weight_sweeps, "CPU_SIDE", side)
    monkeypatch.setattr(_weight_sweeps, "OTHER_SIDE", side)
    monkeypatch.setattr(_weight_sweeps, "BLOCK_BYTES", num_bytes)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (2, 3), (3, 2), (60, 16), (1500, 8)])
@every_function
def test_formula(function: Regularizer, num_classes: int, dim: int) -> None:
    weight = _weight(num_classes, dim)
    value, gradient = _value_and_gradient(function, weight)
    expected, expected_gradient = _value_and_gradient(EAGER[function], weight)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("num_classes", [2, 60, 300])
@pytest.mark.parametrize(
    ("module", "peer"),
    [
        (regularizers.CenterInvariant, peers.CenterInvariantRegularizer),
        (regularizers.RegularFace, peers.RegularFaceRegularizer),
    ],
)
def test_pytorch_metric_learning(
    module: type[torch.nn.Module], peer: type[torch.nn.Module], num_classes: int
) -> None:
    weight = _weight(num_classes, 16)
    value, gradient = _value_and_gradient(module(), weight)
    expected, expected_gradient = _value_and_gradient(peer(), weight)
    assert abs(float(value - expected)) <= 1e-10 * abs(float(expected))
    assert _relative(gradient, expected_gradient) <= 1e-10


def test_added_to_a_loss_as_in_pytorch_metric_learning() -> None:
    """With its weight of (D, C) and its factor of the regulariser."""
    peer = peer_losses.CosFaceLoss(
        30, 8, margin=0.35, scale=64,
        weight_regularizer=peers.RegularFaceRegularizer(), weight_reg_weight=0.3,
    )  # fmt: skip
    ours = fm.CosFaceLoss(30, 8, 0.35, 64.0, dtype=torch.float64)
    peer.W.data = ours.weight.detach().t().contiguous()
    x, labels = torch.randn(12, 8, dtype=torch.float64), torch.randint(30, (12,))
    expected = peer(x, labels)
    loss = ours(x, labels) + 0.3 * regularizers.RegularFace()(ours.weight)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)
    (peer_d_w,) = torch.autograd.grad(expected, peer.W)
    (d_w,) = torch.autograd.grad(loss, ours.weight)
    assert _relative(d_w, peer_d_w.t()) <= 1e-10


@every_function
def test_gradients_against_finite_differences(function: Regularizer) -> None:
    weight = _weight(7, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, weight)
    assert torch.autograd.gradgradcheck(function, weight)


@every_function
def test_both_gradients_agree(function: Regularizer) -> None:
    """The blocked one, and the one that can be differentiated again."""
    weight = _weight(40, 6).requires_grad_()
    (blocked,) = torch.autograd.grad(function(weight), weight)
    (plain,) = torch.autograd.grad(function(weight), weight, create_graph=True)
    torch.testing.assert_close(blocked, plain.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_function
def test_dtypes(function: Regularizer, dtype: torch.dtype) -> None:
    """The result is fp32, the gradient has the weight's dtype; both near those of fp64."""
    weight = _weight(300, 16, dtype)
    value, gradient = _value_and_gradient(function, weight)
    expected, expected_gradient = _value_and_gradient(EAGER[function], weight.double())
    assert value.dtype is torch.float32
    assert gradient.dtype is dtype
    assert _relative(value, expected) <= 1e-6
    assert _relative(gradient, expected_gradient) <= max(1e-6, torch.finfo(dtype).eps)


@every_function
def test_autocast_lowers_nothing(function: Regularizer) -> None:
    weight = _weight(200, 16, torch.float32)
    want = _value_and_gradient(function, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _value_and_gradient(function, weight)
    for actual, expected in zip(got, want, strict=True):
        assert torch.equal(actual, expected)


@every_function
def test_strides(function: Regularizer) -> None:
    weight = _weight(50, 8)
    want = _value_and_gradient(function, weight)
    wide = torch.full((50, 16), math.nan, dtype=torch.float64)
    wide[:, ::2] = weight
    for layout in (weight.t().contiguous().t(), wide[:, ::2]):
        assert not layout.is_contiguous()
        for actual, expected in zip(_value_and_gradient(function, layout), want, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_nearly_equal_norms_lose_no_digits() -> None:
    """Squared norms of 1e6 that differ by 1e-7 of themselves, about fp32's rounding."""
    weight = torch.full((8, 4), 500.0)
    weight[::2, 0] = torch.nextafter(weight[::2, 0], torch.tensor(math.inf))
    value, gradient = _value_and_gradient(regularizers.center_invariant, weight)
    expected, expected_gradient = _value_and_gradient(eager_center_invariant, weight.double())
    assert float(expected) > 0.0
    assert _relative(value, expected) <= 1e-6
    assert _relative(gradient, expected_gradient) <= 1e-6


def test_equal_norms_cost_nothing() -> None:
    weight = F.normalize(_weight(20, 5)) * 3.0
    value, gradient = _value_and_gradient(regularizers.center_invariant, weight)
    assert float(value) <= 1e-28
    assert float(gradient.abs().max()) <= 1e-14


# --- nearest classes ------------------------------------------------------------------------------


def _nearest(weight: Tensor) -> list[int]:
    return torch.ops.fused_margin.nearest_classes(weight).tolist()


@pytest.mark.parametrize("side", [1, 2, 3, 1024])
def test_of_equal_cosines_the_lowest_class_counts(
    monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """Rows of one nonzero, whose cosines are exact: 0 or 1."""
    _small_blocks(monkeypatch, side, 64)
    assert _nearest(torch.eye(6)) == [1, 0, 0, 0, 0, 0]
    assert _nearest(torch.eye(4)[[0, 1, 0, 1, 0, 2, 1]]) == [2, 3, 0, 1, 0, 0, 1]
    assert _nearest(torch.zeros(3, 2)) == [1, 0, 0]
    assert _nearest(-torch.tensor([[1.0], [-2.0], [3.0], [-0.5]])) == [2, 3, 0, 1]


def test_gradient_of_a_tie_goes_to_the_lowest_class() -> None:
    weight = 2.0 * torch.eye(4, dtype=torch.float64)
    value, gradient = _value_and_gradient(regularizers.regular_face, weight)
    assert float(value) == 0.0
    # pairs 0-1, 1-0, 2-0, 3-0; d cos(i, j) / d w_i is w_hat_j / 2, and the mean is over 4
    expected = torch.tensor(
        [[0, 2, 1, 1], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(gradient, expected / 8.0)


def test_one_class_nearest_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sources of one row's gradient than a block has rows."""
    _small_blocks(monkeypatch, 4, 3 * 8 * 31)  # 3 rows of 31
    weight = torch.cat([0.1 * torch.eye(30, dtype=torch.float64), torch.ones(1, 30).double()])
    weight = torch.cat([weight, torch.randn(31, 1, dtype=torch.float64) * 1e-3], dim=1)
    assert _nearest(weight)[:30] == [30] * 30
    _, gradient = _value_and_gradient(regularizers.regular_face, weight)
    _, expected = _value_and_gradient(eager_regular_face, weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("norm", [0.0, 5e-13], ids=["zero", "below the clamp"])
def test_a_row_below_the_clamp_of_norms(norm: float) -> None:
    """Its gradient is that of w / 1e-12, without projection; finite, the second one too."""
    weight = _weight(9, 5)
    weight[4] *= norm / weight[4].norm()
    value, gradient = _value_and_gradient(regularizers.regular_face, weight)
    expected, expected_gradient = _value_and_gradient(eager_regular_face, weight)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert float(gradient[4].norm()) > 1e9
    weight.requires_grad_()
    (plain,) = torch.autograd.grad(regularizers.regular_face(weight), weight, create_graph=True)
    torch.testing.assert_close(plain.detach(), gradient)
    (second,) = torch.autograd.grad(plain.square().sum(), weight)
    assert bool(second.isfinite().all())


def test_nan_is_not_hidden() -> None:
    weight = _weight(9, 5)
    weight[4, 2] = math.nan
    for function in FUNCTIONS:
        assert bool(function(weight).isnan())


# --- properties -----------------------------------------------------------------------------------

sizes = st.tuples(st.integers(2, 40), st.integers(2, 9), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_order_of_classes_does_not_matter(size: tuple[int, int, int]) -> None:
    num_classes, dim, seed = size
    torch.manual_seed(seed)
    weight, order = _weight(num_classes, dim), torch.randperm(num_classes)
    for function in FUNCTIONS:
        value, gradient = _value_and_gradient(function, weight)
        moved_value, moved_gradient = _value_and_gradient(function, weight[order])
        torch.testing.assert_close(moved_value, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(moved_gradient, gradient[order], rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_regular_face_ignores_norms(size: tuple[int, int, int]) -> None:
    """Rows scaled by f: the same value, and rows of the gradient, all tangential, scaled by 1/f."""
    num_classes, dim, seed = size
    torch.manual_seed(seed)
    weight = _weight(num_classes, dim)
    factors = torch.randn(num_classes, 1, dtype=torch.float64).exp()
    value, gradient = _value_and_gradient(regularizers.regular_face, weight)
    scaled_value, scaled_gradient = _value_and_gradient(regularizers.regular_face, weight * factors)
    torch.testing.assert_close(scaled_value, value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(scaled_gradient * factors, gradient, rtol=1e-8, atol=1e-12)
    radial = (gradient * weight).sum(dim=1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("side", [1, 7, 32, 99, 100])
@every_function
def test_block_sizes_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, function: Regularizer, side: int
) -> None:
    weight = _weight(100, 6)
    value, gradient = _value_and_gradient(function, weight)
    _small_blocks(monkeypatch, side, side * 6 * 8)
    blocked_value, blocked_gradient = _value_and_gradient(function, weight)
    torch.testing.assert_close(blocked_value, value, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(blocked_gradient, gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.usefixtures("poison")
@every_function
def test_all_outputs_are_written_and_deterministic(function: Regularizer) -> None:
    weight = _weight(3000, 8, torch.float32)
    first, second = (_value_and_gradient(function, weight) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other)


# --- memory ---------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """Bytes of every storage that an operator returns; kept alive, so that none is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return result

    def larger_than(self, num_bytes: int, *inputs: Tensor) -> list[int]:
        """Sizes above ``num_bytes``, but for the inputs' storages."""
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        sizes = (s.nbytes() for pointer, s in self.storages.items() if pointer not in known)
        return [size for size in sizes if size > num_bytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_c_times_c_and_one_of_c_times_d(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    num_classes, dim, side = 300, 64, 30
    _small_blocks(monkeypatch, side, side * dim * 4)
    weight, g = _weight(num_classes, dim, dtype), torch.ones(num_classes)
    block = side * dim * 8  # of fp64, in the squared norms
    d_w = num_classes * dim * dtype.itemsize
    assert 2 * block < d_w < num_classes**2
    with _Allocations() as forward:
        index = _weight_sweeps._nearest_classes(weight)
        _weight_sweeps._class_cosines(weight, index)
        _weight_sweeps._squared_norms(weight)
    assert len(forward.storages) > 10
    assert forward.larger_than(block, weight) == []
    with _Allocations() as backward:
        _weight_sweeps._class_cosines_backward(g, weight, index)
    assert backward.larger_than(block, weight) == [d_w]
    with _Allocations() as backward:
        _weight_sweeps._scaled_rows(weight, g)
    assert backward.larger_than(block, weight) == [d_w]


# --- modules, compiler, errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (regularizers.CenterInvariant, regularizers.center_invariant),
        (regularizers.RegularFace, regularizers.regular_face),
    ],
)
def test_modules(module: type[torch.nn.Module], function: Regularizer) -> None:
    regularizer = module()
    assert list(regularizer.parameters()) == []
    assert repr(regularizer) == f"{module.__name__}()"
    weight = _weight(10, 4)
    again = pickle.loads(pickle.dumps(regularizer))
    assert torch.equal(again(weight), function(weight))


def test_training_with_them() -> None:
    """RegularFace drives three classes apart in the plane, and CenterInvariant evens norms out."""
    criterion = fm.ArcFaceLoss(3, 2)
    criterion.weight.data = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.8, -0.9]]) * 2.0
    center_invariant, regular_face = regularizers.CenterInvariant(), regularizers.RegularFace()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (center_invariant(criterion.weight) + regular_face(criterion.weight)).backward()
        optimizer.step()
    weight = criterion.weight.detach()
    assert float(regular_face(weight)) == pytest.approx(-0.5, abs=0.05)
    assert float(center_invariant(weight)) < 0.01


@every_function
def test_compiles_without_graph_breaks(function: Regularizer) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_classes in (30, 41):
        weight = _weight(num_classes, 4)
        got, want = _value_and_gradient(compiled, weight), _value_and_gradient(function, weight)
        for actual, expected in zip(got, want, strict=True):
            torch.testing.assert_close(actual, expected)


def test_operators_are_registered_correctly() -> None:
    operators = torch.ops.fused_margin
    weight = _weight(9, 4, torch.float32).requires_grad_()
    index, g = operators.nearest_classes(weight.detach()), torch.randn(9)
    for operator, arguments in (
        (operators.nearest_classes, (weight.detach(),)),
        (operators.class_cosines, (weight, index)),
        (operators.class_cosines_backward, (g, weight.detach(), index)),
        (operators.squared_norms, (weight,)),
        (operators.scaled_rows, (weight.detach(), g)),
    ):
        torch.library.opcheck(operator, arguments)


@every_function
def test_meta_device(function: Regularizer) -> None:
    weight = torch.empty(5, 3, device="meta", requires_grad=True)
    value = function(weight)
    assert value.shape == ()
    assert value.dtype is torch.float32
    value.backward()
    assert weight.grad is not None
    assert weight.grad.shape == (5, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_function
def test_gpu(monkeypatch: pytest.MonkeyPatch, function: Regularizer, dtype: torch.dtype) -> None:
    """The CPU's value and gradient, and the same bits twice."""
    _small_blocks(monkeypatch, 64, 64 * 16 * 4)
    weight = _weight(300, 16, dtype)
    want = _value_and_gradient(function, weight)
    first, second = (_value_and_gradient(function, weight.cuda()) for _ in range(2))
    for actual, again, expected in zip(first, second, want, strict=True):
        assert torch.equal(actual, again)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(actual.dtype, 1e-2)
        assert _relative(actual.cpu(), expected) <= tolerance


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([[1.0]], TypeError, r"got list; torch\.as_tensor"),
        (fm.ArcFaceLoss(4, 2), TypeError, r"got ArcFaceLoss; pass its weight, criterion\.weight"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, r"torch\.int64; cast with \.float\(\)"),
        (torch.ones(4, 2, dtype=torch.complex64), TypeError, r"got torch\.complex64"),
        (torch.ones(4, 2).to_sparse(), TypeError, r"layout torch\.sparse_coo; use \.to_dense\(\)"),
        (torch.ones(4), ValueError, r"shape \(C, D\), a row per class, got \(4,\)"),
        (torch.ones(4, 2, 1), ValueError, r"shape \(C, D\), a row per class, got \(4, 2, 1\)"),
        (torch.ones(1, 8), ValueError, r"C >= 2 .* got 1 from shape \(1, 8\).*needs \.t\(\)"),
        (torch.ones(0, 8), ValueError, r"C >= 2 .* got 0 from shape \(0, 8\)"),
        (torch.ones(4, 0), ValueError, r"D >= 1 columns, got D = 0; check embedding_size"),
    ],
)
@every_function
def test_errors(function: Regularizer, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(weight)
