"""`torch.func` and forward mode: right with the reference and the regularisers, refused elsewhere.

Expected values come from backward passes of `torch.autograd`, which test_gradcheck.py compares with
finite differences, or from loops over samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, FUSED_BACKENDS, device_of
from torch import func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import margins, regularizers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PyTorch's own: when it first loads its decompositions for forward mode, and of the graph that
    # `linearize` makes of any function
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

Tensor = torch.Tensor
Call = Callable[..., Tensor]  # of x (N, D), w (C, D), margin (N,), scale 0-d; 0-d
Transform = Callable[[Call, tuple[Tensor, ...]], Any]

CLASSES, DIM = 5, 3
LABELS = torch.tensor([4, 0, 2, 1, 3])
ROWS = len(LABELS)


def _inputs(device: torch.device) -> tuple[Tensor, ...]:
    """Embeddings, weight, margins and scale, fp64.

    The first row lies along its class, the second opposite to it, the third within the floor of the
    sine, the fourth past theta + m = pi.
    """
    x = torch.randn(ROWS, DIM, dtype=torch.float64)
    w = torch.randn(CLASSES, DIM, dtype=torch.float64)
    w[4] = torch.tensor([0.0, 2.0, 0.0])
    w[0] = torch.tensor([0.0, 0.0, -3.0])
    x[0] = torch.tensor([0.0, 5.0, 0.0])
    x[1] = torch.tensor([0.0, 0.0, 0.7])
    x[2] = w[2] + 1e-3 * w[2].norm() * torch.linalg.cross(w[2], x[2]).sign()
    x[3] = 0.1 * x[3] / x[3].norm() - w[1] / w[1].norm()
    margin = torch.tensor([0.3, 0.4, 0.5, 0.6, -0.2], dtype=torch.float64)
    return tuple(t.to(device) for t in (x, w, margin, torch.tensor(7.0, dtype=torch.float64)))


def test_the_rows_are_where_they_should_be() -> None:
    x, w, *_ = _inputs(torch.device("cpu"))
    _, u = fmf.cosine_lse(x, w, LABELS, 7.0, backend="reference")
    assert u[:2].tolist() == [1.0, -1.0]
    assert 0.0 < float(1.0 - u[2] ** 2) < margins.SINE_SQUARED_FLOOR
    assert float(u[3].acos()) + 0.5 > math.pi


# --- the losses -----------------------------------------------------------------------------------


def _arcface(
    x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, *, labels: Tensor = LABELS, **kw: Any
) -> Tensor:
    return fmf.arcface(x, w, labels.to(x.device), 0.5, 7.0, reduction="sum", **kw)


def _arcface_tensors(
    x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, *, labels: Tensor = LABELS, **kw: Any
) -> Tensor:
    return fmf.arcface(x, w, labels.to(x.device), margin, scale, **kw)


def _cosface(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    labels = LABELS.to(x.device)
    return fmf.cosface(x, w, labels, 0.35, 7.0, reduction="none", **kw).square().sum()


def _cosface_tensors(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    return fmf.cosface(x, w, LABELS.to(x.device), margin, scale, **kw)


def _fixed_adacos(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    labels = LABELS.to(x.device).masked_fill(LABELS.to(x.device) == 2, -100)
    return fmf.fixed_adacos(x, w, labels, **kw)


def _normalized_softmax(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    return fmf.normalized_softmax(x, w, LABELS.to(x.device), 7.0, **kw)


def _learned_scale(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    return fmf.normalized_softmax(x, w, LABELS.to(x.device), scale, **kw)


def _cosine_lse(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    labels = LABELS.to(x.device).masked_fill(LABELS.to(x.device) == 2, -1)
    lse, u = fmf.cosine_lse(x, w, labels, scale, **kw)
    return ((lse + 2.0 * u) * lse).sum()


def _own_margin(x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    lse, u = fmf.cosine_lse(x, w, LABELS.to(x.device), scale, **kw)
    psi = u * margin.cos() - margins.sine(u) * margin.sin()
    return -torch.nn.functional.logsigmoid(scale * psi - lse).sum()


def _cosine_logits(
    x: Tensor, w: Tensor, margin: Tensor, scale: Tensor, *, backend: str = "reference"
) -> Tensor:
    return fmf.cosine_logits(x, w, scale).square().sum()


LOSSES: dict[str, Call] = {
    **{
        f"arcface-{boundary}-{grad}": functools.partial(_arcface, boundary=boundary, grad=grad)
        for boundary in ("linear", "continuous", "none")
        for grad in ("exact", "straight_through")
    },
    **{
        f"arcface-{boundary}-tensors": functools.partial(_arcface_tensors, boundary=boundary)
        for boundary in ("linear", "continuous", "none")
    },
    "cosface": _cosface,
    "cosface-tensors": _cosface_tensors,
    "fixed_adacos": _fixed_adacos,
    "normalized_softmax": _normalized_softmax,
    "normalized_softmax-tensor": _learned_scale,
    "cosine_lse": _cosine_lse,
    "own-margin": _own_margin,
}
# one for each way into the operators: both of them, and tensors of one's own
FEW = ("arcface-linear-exact", "cosface", "arcface-linear-tensors", "cosine_lse", "own-margin")

every_loss = pytest.mark.parametrize("name", LOSSES)
few_losses = pytest.mark.parametrize("name", FEW)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)


# --- transforms -----------------------------------------------------------------------------------


def _tangents(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Some direction, the same each time."""
    return tuple(
        (1.7 * torch.arange(t.numel(), dtype=t.dtype, device=t.device) + 1.0).sin().view(t.shape)
        for t in inputs
    )


def _all(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def _vjp(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    value, pull_back = func.vjp(f, *inputs)[:2]
    return pull_back(torch.ones_like(value))


def _dual(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, _tangents(inputs))
        tangent = forward_ad.unpack_dual(f(*duals)).tangent
        assert tangent is not None
        return tangent


def _linearize(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    return func.linearize(f, *inputs)[1](*_tangents(inputs))


def _jvp(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    return func.jvp(f, inputs, _tangents(inputs))[1]


def _jvp_of_grad(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    return func.jvp(func.grad(f, _all(inputs)), inputs, _tangents(inputs))[1]


def _grad_of_jvp(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    def tangent(*given: Tensor) -> Tensor:
        return _jvp(f, given)

    return func.grad(tangent, _all(inputs))(*inputs)


def _dual_of_backward(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, leaves, _tangents(inputs))
        grads = _backward(f(*duals), leaves)
        unpacked = (forward_ad.unpack_dual(grad).tangent for grad in grads)
        return tuple(
            torch.zeros_like(leaf) if tangent is None else tangent
            for tangent, leaf in zip(unpacked, leaves, strict=True)
        )


def _old_jacobian(f: Call, inputs: tuple[Tensor, ...]) -> Any:
    return torch.autograd.functional.jacobian(
        f, inputs, vectorize=True, strategy="forward-mode", strict=False
    )


def _backward(value: Tensor, leaves: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, materialize_grads=True, **options)


def expected_gradient(f: Call, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    return _backward(f(*leaves), leaves)


def expected_product(f: Call, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The Hessian times the tangents, by two backward passes."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    first = _backward(f(*leaves), leaves, create_graph=True)
    dots = [(one * other).sum() for one, other in zip(first, _tangents(inputs), strict=True)]
    return _backward(torch.stack(dots).sum(), leaves)


def expected_hessian(f: Call, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    return torch.autograd.functional.hessian(f, inputs)


def expected_tangent(f: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    pairs = zip(expected_gradient(f, inputs), _tangents(inputs), strict=True)
    return torch.stack([(one * other).sum() for one, other in pairs]).sum()


# What to compute, and the same by backward passes.
DERIVATIVES: dict[str, tuple[Transform, Transform]] = {
    "grad": (lambda f, inputs: func.grad(f, _all(inputs))(*inputs), expected_gradient),
    "grad_and_value": (
        lambda f, inputs: func.grad_and_value(f, _all(inputs))(*inputs),
        lambda f, inputs: (expected_gradient(f, inputs), f(*inputs)),
    ),
    "vjp": (_vjp, expected_gradient),
    "jacrev": (lambda f, inputs: func.jacrev(f, _all(inputs))(*inputs), expected_gradient),
    "jacfwd": (lambda f, inputs: func.jacfwd(f, _all(inputs))(*inputs), expected_gradient),
    "forward-mode jacobian": (_old_jacobian, expected_gradient),
    "jvp": (_jvp, expected_tangent),
    "linearize": (_linearize, expected_tangent),
    "dual": (_dual, expected_tangent),
    "hessian": (lambda f, inputs: func.hessian(f, _all(inputs))(*inputs), expected_hessian),
    "jacfwd of jacfwd": (
        lambda f, inputs: func.jacfwd(func.jacfwd(f, _all(inputs)), _all(inputs))(*inputs),
        expected_hessian,
    ),
    "jvp of grad": (_jvp_of_grad, expected_product),
    "grad of jvp": (_grad_of_jvp, expected_product),
    "dual of backward": (_dual_of_backward, expected_product),
}


def assert_close(actual: Any, expected: Any) -> None:
    """Each tensor within 1e-9 of its largest entry, whatever contains it."""
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.shape == other.shape
        allowed = 1e-9 * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0.0, atol=allowed)


@pytest.mark.parametrize("transform", DERIVATIVES)
@pytest.mark.parametrize("name", [*LOSSES, "cosine_logits"])
def test_reference(name: str, transform: str) -> None:
    call = functools.partial(
        (LOSSES | {"cosine_logits": _cosine_logits})[name], backend="reference"
    )
    inputs = _inputs(torch.device("cpu"))
    compute, expected = DERIVATIVES[transform]
    assert_close(compute(call, inputs), expected(call, inputs))


@few_losses
@pytest.mark.parametrize("transform", DERIVATIVES)
@each_fused_backend
def test_other_backends_name_the_reference(backend: str, transform: str, name: str) -> None:
    call = functools.partial(LOSSES[name], backend=backend)
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        DERIVATIVES[transform][0](call, _inputs(device_of(backend)))


@each_fused_backend
def test_a_tangent_of_the_incoming_gradient_is_not_lost(backend: str) -> None:
    x, w, _, _ = _inputs(device_of(backend))
    x.requires_grad_()
    loss = fmf.cosface(x, w, LABELS.to(x.device), backend=backend)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            torch.autograd.grad(loss, x, incoming)


@each_fused_backend
def test_compiled_transforms_name_the_reference(backend: str) -> None:
    torch._dynamo.reset()
    inputs = _inputs(device_of(backend))
    call = functools.partial(_cosface, backend=backend)
    with pytest.raises(Exception, match='use backend="reference"'):
        torch.compile(func.grad(call), backend="aot_eager", fullgraph=True)(*inputs)


def test_compiled_transform_of_the_reference() -> None:
    torch._dynamo.reset()
    inputs = _inputs(torch.device("cpu"))
    call = functools.partial(_arcface, backend="reference")
    compiled = torch.compile(func.grad(call, (0, 1)), backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), expected_gradient(call, inputs)[:2])


def test_gradients_per_sample_of_a_module() -> None:
    """The usual use: vmap of grad of a module's functional call, one row in each."""
    criterion = fm.ArcFaceLoss(CLASSES, DIM, scale=7.0, backend="reference", dtype=torch.float64)
    x, labels = _inputs(torch.device("cpu"))[0], LABELS
    parameters = {name: p.detach() for name, p in criterion.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return func.functional_call(criterion, parameters, (row[None], label[None]))

    actual = func.vmap(func.grad(loss), (None, 0, 0))(parameters, x, labels)["weight"]
    for row, label, grad in zip(x, labels, actual, strict=True):
        (expected,) = torch.autograd.grad(criterion(row[None], label[None]), criterion.weight)
        assert_close(grad, expected)


# --- vmap -----------------------------------------------------------------------------------------


def _batches(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Three of each."""
    return tuple(torch.stack([t, 1.1 * t, t + 0.1]) for t in inputs)


@few_losses
@pytest.mark.parametrize(
    "batched", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=lambda which: "".join(map(str, which))
)
@each_backend
def test_vmap(backend: str, batched: tuple[int, ...], name: str) -> None:
    """On every backend, over any of the arguments; with gradients from outside."""
    call = functools.partial(LOSSES[name], backend=backend)
    inputs = _inputs(device_of(backend))
    batches = tuple(t.requires_grad_() for t in _batches(inputs))
    arguments = tuple(
        batches[i] if i in batched else inputs[i].requires_grad_() for i in _all(inputs)
    )
    in_dims = tuple(0 if i in batched else None for i in _all(inputs))
    actual = func.vmap(call, in_dims)(*arguments)
    samples = [
        tuple(a[k] if i in batched else a for i, a in enumerate(arguments)) for k in (0, 1, 2)
    ]
    expected = torch.stack([call(*sample) for sample in samples])
    assert_close(actual.broadcast_to(3), expected)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=expected.device)
    assert_close(
        _backward((actual * weights).sum(), arguments),
        _backward((expected * weights).sum(), arguments),
    )


@pytest.mark.parametrize("name", ["arcface", "arcface-tensors"])
@each_backend
def test_vmap_over_labels(backend: str, name: str) -> None:
    call = {"arcface": _arcface, "arcface-tensors": _arcface_tensors}[name]
    inputs = _inputs(device_of(backend))
    labels = torch.stack([LABELS, LABELS.flip(0)])
    actual = func.vmap(lambda y: call(*inputs, labels=y, backend=backend))(labels)
    expected = [call(*inputs, labels=y, backend=backend) for y in labels]
    assert_close(actual, torch.stack(expected))


@every_loss
def test_vmap_of_grad(name: str) -> None:
    call = functools.partial(LOSSES[name], backend="reference")
    inputs = _inputs(torch.device("cpu"))
    batches = _batches(inputs)
    actual = func.vmap(func.grad(call, _all(inputs)))(*batches)
    samples = [expected_gradient(call, sample) for sample in zip(*batches, strict=True)]
    assert_close(actual, tuple(torch.stack(grads) for grads in zip(*samples, strict=True)))


@few_losses
@each_fused_backend
def test_vmap_of_grad_names_the_reference(backend: str, name: str) -> None:
    call = functools.partial(LOSSES[name], backend=backend)
    batches = _batches(_inputs(device_of(backend)))
    per_sample = func.vmap(func.grad(call))
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        per_sample(*batches)
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        func.grad(lambda *given: func.vmap(call)(*given).sum())(*batches)


@few_losses
@each_backend
def test_batched_backward(backend: str, name: str) -> None:
    """`is_grads_batched`, the vmap that `torch.autograd` itself uses."""
    leaves = tuple(t.requires_grad_() for t in _inputs(device_of(backend)))
    value = LOSSES[name](*leaves, backend=backend)
    grads = _backward(value, leaves, retain_graph=True)
    used = [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if bool(grad.any())]
    factors = torch.tensor([1.0, -2.0], dtype=value.dtype, device=value.device)
    both = torch.autograd.grad(value, [leaf for leaf, _ in used], factors, is_grads_batched=True)
    assert_close(both, tuple(torch.stack([grad, -2.0 * grad]) for _, grad in used))


@few_losses
@each_backend
def test_functionalize_and_make_fx(backend: str, name: str) -> None:
    call = functools.partial(LOSSES[name], backend=backend)
    inputs = _inputs(device_of(backend))
    expected = call(*inputs)
    assert_close(func.functionalize(call)(*inputs), expected)
    if backend == "reference" or name in ("arcface-linear-exact", "cosface"):
        # the operators read a tensor scale, which a recording can't
        assert_close(make_fx(call)(*inputs)(*inputs), expected)


def test_a_margin_in_degrees_is_still_refused_in_reverse_and_forward_mode() -> None:
    x, w, margin, scale = _inputs(torch.device("cpu"))

    def call(margin: Tensor) -> Tensor:
        return _arcface_tensors(x, w, margin, scale, backend="reference")

    for transform in (
        lambda: func.grad(call)(100.0 * margin),
        lambda: func.jvp(call, (100.0 * margin,), (margin,)),
    ):
        with pytest.raises(ValueError, match=r"margin is an angle in radians, at most pi; got"):
            transform()


# --- regularisers ---------------------------------------------------------------------------------

every_regularizer = pytest.mark.parametrize(
    "function",
    [regularizers.center_invariant, regularizers.regular_face],
    ids=lambda function: function.__name__,
)


def _weight() -> Tensor:
    return torch.randn(7, 4, dtype=torch.float64) * torch.linspace(0.5, 3.0, 7)[:, None].double()


@every_regularizer
@pytest.mark.parametrize("transform", DERIVATIVES)
def test_regularizers(transform: str, function: Call) -> None:
    compute, expected = DERIVATIVES[transform]
    inputs = (_weight(),)
    assert_close(compute(function, inputs), expected(function, inputs))


@every_regularizer
def test_vmap_of_regularizers(function: Call) -> None:
    weights = torch.stack([_weight(), _weight(), _weight()])
    assert_close(func.vmap(function)(weights), torch.stack([function(w) for w in weights]))
    assert_close(
        func.vmap(func.grad(function))(weights),
        torch.stack([expected_gradient(function, (w,))[0] for w in weights]),
    )
    assert_close(
        func.grad(lambda weights: func.vmap(function)(weights).sum())(weights),
        torch.stack([expected_gradient(function, (w,))[0] for w in weights]),
    )
    assert_close(func.functionalize(function)(weights[0]), function(weights[0]))


@every_regularizer
def test_compiled_transforms_of_regularizers(function: Call) -> None:
    torch._dynamo.reset()
    inputs = (_weight(),)
    for name in ("grad", "jvp"):
        compute, expected = DERIVATIVES[name]
        compiled = torch.compile(
            functools.partial(compute, function), backend="aot_eager", fullgraph=True
        )
        assert_close(compiled(inputs), expected(function, inputs))


@every_regularizer
def test_a_tangent_of_the_incoming_gradient_reaches_the_weight(function: Call) -> None:
    weight = _weight().requires_grad_()
    value = function(weight)
    (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 3.0))
        (dual,) = torch.autograd.grad(value, weight, incoming)
        assert_close(forward_ad.unpack_dual(dual), (gradient, 3.0 * gradient))
