"""Products that are exact, compared to the bit, over all kernels: on a GPU, and interpreted.

A row has K entries of 1 or -1 and else 0, K a power of 4, so that its norm is a power of 2 and its
cosines are integers over K. The scale is a power of 2 too, so large that exponentials are 1 or 0.
Then no sum is rounded, whatever its order, and a single wrong bit in an operand, as from a register
that an asynchronous product had not yet read, changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers import FP32, FP64, HALF_MODES, INTERPRETED, Mode, device_of, needs_triton

from fused_margin._arguments import Gradients, Inputs, Loan, Needs, Slopes, Swept

Tensor = torch.Tensor
pytestmark = needs_triton

TF32 = Mode("tf32", torch.float32, torch.float32)
INTERPRETED_MODES = (FP32, HALF_MODES[3], HALF_MODES[5])  # with bf16 and fp16 products, too
ON_TENSOR_CORES = (*HALF_MODES[2:5], TF32)


class Sizes(NamedTuple):
    """N, C, D and K."""

    n: int
    c: int
    d: int
    k: int


# Several steps and tiles in every dimension, even with the largest tiles; ends that don't fit.
SIZES = {
    "interpreted": Sizes(20, 37, 40, 16),
    "small": Sizes(300, 2_000, 512, 256),
    "narrow": Sizes(300, 2_000, 100, 64),  # where there are fused tiles
    "large": Sizes(1_000, 70_001, 512, 256),  # several chunks, and descriptors where they are used
}
CASES = [
    *(pytest.param("interpreted", mode, id=f"interpreted-{mode}") for mode in INTERPRETED_MODES),
    *(
        pytest.param(name, mode, marks=pytest.mark.gpu, id=f"{name}-{mode}")
        for name in ("large", "narrow", "small")
        for mode in (*ON_TENSOR_CORES, *((FP32, FP64, HALF_MODES[1]) if name == "small" else ()))
    ),
]
SEEDS = 1 if INTERPRETED else 3


@pytest.fixture(autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """TF32 where the mode is called so."""
    before = torch.get_float32_matmul_precision()
    mode = request.node.callspec.params["mode"]
    torch.set_float32_matmul_precision("high" if mode is TF32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Case(NamedTuple):
    """Integers in fp64 on the device, and what the kernels get."""

    x: Tensor  # (N, D)
    w: Tensor  # (C, D)
    cosines: Tensor  # (N, C)
    labels: Tensor  # (N,)
    inputs: Inputs


def _rows(count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(count, D): K signs a row, at random places."""
    signs = torch.randint(2, (count, sizes.d), generator=generator) * 2.0 - 1.0
    places = torch.rand(count, sizes.d, generator=generator).argsort(dim=1)
    return torch.where(places < sizes.k, signs, 0.0).double()


def _case(sizes: Sizes, mode: Mode, scale: float, seed: int = 0) -> Case:
    device = device_of("triton")
    generator = torch.Generator().manual_seed(seed)
    x, w = _rows(sizes.n, sizes, generator), _rows(sizes.c, sizes, generator)
    labels = torch.randint(sizes.c, (sizes.n,), generator=generator)
    x, w, labels = x.to(device), w.to(device), labels.to(device)
    inputs = Inputs(
        x.to(mode.embeddings), w.to(mode.weight), labels, scale, None,
        mode.autocast or mode.embeddings,
    )  # fmt: skip
    return Case(x, w, x @ w.t() / sizes.k, labels, inputs)


def _equal(actual: Tensor, expected: Tensor, what: str) -> None:
    expected = expected.to(actual.dtype)
    wrong = int((actual != expected).sum() + actual.isnan().sum())
    assert wrong == 0, f"{wrong} of {actual.numel()} elements of {what} differ"


def _check_norms(swept: Swept, sizes: Sizes) -> None:
    """What follows takes them for granted."""
    inverse = torch.full_like(swept.inv_x, 1.0 / math.sqrt(sizes.k))
    _equal(swept.inv_x, inverse, "1 / ||x||")
    _equal(swept.inv_w, inverse[:1].expand_as(swept.inv_w), "1 / ||w||")


def _without_targets(case: Case) -> Tensor:
    return case.cosines.scatter(1, case.labels[:, None], -math.inf)


def _descriptors(ways: str) -> bool | None:
    """Which override makes the kernels read by descriptors, as chosen on a GPU, or by pointers."""
    return False if ways == "pointers" else True if INTERPRETED else None


@pytest.mark.parametrize("ways", ["descriptors", "pointers"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_cosines_of_the_sweep(name: str, mode: Mode, ways: str) -> None:
    """At a large scale lse is the largest z; all cosines but the largest of a row add 0."""
    from fused_margin._triton import launch, planning

    sizes = SIZES[name]
    scale = 2.0**12 * sizes.k
    for seed in range(SEEDS):
        case = _case(sizes, mode, scale, seed)
        with planning.override(descriptors=_descriptors(ways)):
            swept, *_ = launch.cosine_lse(case.inputs, 0)
        _check_norms(swept, sizes)
        others = _without_targets(case)
        largest = others.amax(dim=1)
        ties = (others == largest[:, None]).sum(dim=1)
        # what log makes of the number of ties is not exact
        expected = torch.where(ties == 1, scale * largest, swept.lse)
        _equal(swept.lse, expected, "lse")
        error = (swept.lse - scale * largest - ties.double().log()).abs()
        assert float(error.max()) < 1e-6 * scale
        _equal(swept.u, case.cosines.gather(1, case.labels[:, None])[:, 0], "u")


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_cosines_that_are_kept(name: str, mode: Mode) -> None:
    """At a small scale the logarithm of each exponential is kept: each cosine shows."""
    from fused_margin._triton import launch, planning

    sizes, scale = SIZES[name], 0.25
    case = _case(sizes, mode, scale)
    with planning.override("kept"):
        swept, *_ = launch.cosine_lse(case.inputs, 0)
        plan = planning.plan(case.inputs.x, case.inputs.w, case.inputs.compute_dtype)
    kept, block = planning.kept_parts(swept.kept, sizes.n, plan)
    assert kept is not None
    assert kept.entries is not None
    assert kept.shifts is not None
    _check_norms(swept, sizes)
    z = scale * case.cosines
    classes = kept.entries.view(-1, kept.pitch)[: sizes.c, : sizes.n].t()  # (N, C)
    shifts = kept.shifts.view(-1, kept.pitch)[:, : sizes.n].t()  # (N, blocks)
    shifts = shifts.repeat_interleave(block, dim=1)[:, : sizes.c]
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter(1, case.labels[:, None], True)
    got = torch.where(is_target, 0.0, classes.double() + shifts.double())
    # the difference to the shift may take more digits than an entry has
    difference = z - shifts.double()
    entries = (difference - 2.0**-100).to(classes.dtype).double()
    expected = torch.where(is_target, 0.0, entries + shifts.double())
    _equal(got, expected, "what is kept")
    assert bool((difference[~is_target] <= 0.0).all())


def _backward_case(sizes: Sizes, mode: Mode, seed: int) -> tuple[Case, Slopes, Swept, Tensor]:
    """Slopes and an lse with which G times the scale is 1 above a threshold, else 0; and G."""
    from fused_margin._triton import launch

    scale = 2.0**12 * sizes.k
    case = _case(sizes, mode, scale, seed)
    swept, *_ = launch.cosine_lse(case.inputs, 0)
    _check_norms(swept, sizes)
    generator = torch.Generator().manual_seed(seed + 100)
    middle = torch.randint(-3, 4, (sizes.n,), generator=generator).double() + 0.5
    threshold = (middle / sizes.k).to(case.x.device)
    g_u = torch.randint(2, (sizes.n,), generator=generator).double().to(case.x.device) * 4.0 - 2.0
    accumulate = swept.inv_x.dtype
    slopes = Slopes(torch.full_like(swept.inv_x, 1.0 / scale), g_u.to(accumulate), None, None)
    g = (case.cosines > threshold[:, None]).double()
    g = g.scatter(1, case.labels[:, None], g_u[:, None])
    return case, slopes, swept._replace(lse=scale * threshold), g


def _check_gradients(got: Gradients, case: Case, g: Tensor, sizes: Sizes) -> None:
    norm = math.sqrt(sizes.k)
    radial = g * case.cosines
    d_w = (g.t() @ case.x / norm - radial.sum(dim=0)[:, None] * case.w / norm) / norm
    d_x = (g @ case.w / norm - radial.sum(dim=1)[:, None] * case.x / norm) / norm
    assert got.x is not None
    assert got.w is not None
    _equal(got.w, d_w, "d_w")
    _equal(got.x, d_x, "d_x")


def _check_backward(sizes: Sizes, mode: Mode, strategy: str, options: dict[str, Any]) -> None:
    from fused_margin._triton import launch, planning

    for seed in range(SEEDS):
        with planning.override(strategy, **options):
            case, slopes, swept, g = _backward_case(sizes, mode, seed)
            got = launch.backward(slopes, case.inputs, swept, Needs(True, True, False))
        _check_gradients(got, case, g, sizes)


@pytest.mark.parametrize("ways", ["descriptors", "pointers", "fused"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_products_of_the_backward(name: str, mode: Mode, ways: str) -> None:
    """Each cosine is in G, in the sums of G times the cosines, or in neither."""
    from fused_margin._triton import planning

    sizes = SIZES[name]
    if ways == "fused":
        inputs = _case(sizes, mode, 1.0).inputs
        plan = planning.plan(inputs.x, inputs.w, inputs.compute_dtype)
        if plan.tiles.for_fused(sizes.d) is None:
            pytest.skip("no fused tiles for D and this operand type")
        _check_backward(sizes, mode, "fused", {})
    else:
        _check_backward(sizes, mode, "chunked", {"descriptors": _descriptors(ways)})


@pytest.mark.parametrize("rows", ["all", "some"])
@pytest.mark.parametrize("ways", ["descriptors", "pointers"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_products_over_lent_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: Mode, ways: str, rows: str
) -> None:
    """Exponentials of 0 and 1, put where d_w will be or as if formed again, and an lse of 0."""
    from fused_margin._triton import launch, planning

    sizes = SIZES[name]
    if rows == "some":
        sizes = sizes._replace(n=3 * sizes.d)
    for seed in range(SEEDS):
        with planning.override("lent", descriptors=_descriptors(ways)):
            case, slopes, swept, g = _backward_case(sizes, mode, seed)
            plan = planning.plan(case.inputs.x, case.inputs.w, case.inputs.compute_dtype)
            num_lent = planning.lent_rows(case.inputs.x, case.inputs.w, plan)
            if plan.lent is None or num_lent == 0:
                pytest.skip("a row of d_w is too short, or no tile holds one")
            if (num_lent == sizes.n) != (rows == "all"):
                # which of the two cases a size is depends on the dtypes: it is the other's
                pytest.skip(f"a row of d_w has {num_lent} of {sizes.n} exponentials, not {rows}")
            others = (g.scatter(1, case.labels[:, None], 0.0) / math.sqrt(sizes.k)).t()
            d_w = torch.empty_like(case.inputs.w)
            q = d_w.view(plan.gradient)
            q.zero_()
            q[:, :num_lent] = others[:, :num_lent]

            def form_again(
                call: Any, left: Any, first: int, last: int,
                numbers: Tensor = others[:, num_lent:],
            ) -> None:  # fmt: skip
                left.q.zero_()
                left.q[: last - first, : left.num_rows] = numbers[first:last]

            monkeypatch.setattr(launch, "_sweep_again", form_again)
            swept = swept._replace(lse=torch.zeros_like(swept.lse))
            loan = Loan(d_w, launch.Left(q, plan.lent, num_lent))
            got = launch.backward(slopes, case.inputs, swept, Needs(True, True, False), loan)
        _check_gradients(got, case, g, sizes)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", [TF32, *HALF_MODES[:3]], ids=str)
def test_candidates_of_tiles(mode: Mode) -> None:
    """Every tile that tuning may choose and that the device can run."""
    from fused_margin import tuning
    from fused_margin._triton import planning

    for sizes in (SIZES["small"], SIZES["narrow"]):
        inputs = _case(sizes, mode, 1.0).inputs
        plan = planning.plan(inputs.x, inputs.w, inputs.compute_dtype)
        for kernel, tile in tuning.candidates(plan.tiles, plan.operands, *sizes[:3]):
            strategy = "fused" if kernel in tuning.FUSED else "chunked"
            trial = tuning.with_tile(plan.tiles, kernel, tile, sizes.d)
            try:
                _check_backward(sizes, mode, strategy, {"tiles": trial})
            except planning.FAILURES:  # it needs more than there is
                continue
