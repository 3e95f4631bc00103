"""The kernels that a call of the package launches on any architecture, without a device.

Calls are made with tensors that have no memory; the launches are recorded instead of run, with the
arguments that a GPU would get.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fused_margin import tuning
from fused_margin._arguments import Extras, Inputs, Needs, Slopes
from fused_margin._triton import launch, planning, tiles
from fused_margin._triton.arguments import NO_OTHERS
from fused_margin.margins import angular

KERNELS = tuple(name for name in vars(launch) if name.endswith("_kernel"))


class Operands(NamedTuple):
    """Dtypes of a call and of autocast, and whether fp32 products may run in TF32."""

    x: torch.dtype
    w: torch.dtype
    lowers: bool = True
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        """The dtype that is asked for in products."""
        return self.autocast or self.x


TYPES = {
    "bf16": Operands(torch.bfloat16, torch.float32),
    "fp16": Operands(torch.float16, torch.float32),
    "tf32": Operands(torch.float32, torch.float32),
    "ieee": Operands(torch.float32, torch.float32, lowers=False),
    "fp64": Operands(torch.float64, torch.float64),
    # fp32 embeddings under autocast, which reach the kernels as they are
    "autocast-bf16": Operands(torch.float32, torch.float32, autocast=torch.bfloat16),
    "autocast-fp16": Operands(torch.float32, torch.float32, autocast=torch.float16),
    # on request: embeddings and weight that differ
    "bf16+fp64": Operands(torch.bfloat16, torch.float64),
    "fp64+bf16": Operands(torch.float64, torch.bfloat16),
}
# Those that the package's tiles are for, from embeddings of every dtype.
REPORTED = (*tiles.OPERANDS, "autocast-bf16", "autocast-fp16")
# N and C of calls: with several chunks of the classes; with one, whose d_x takes no partials
MANY, ONE = (1024, 300_000), (1024, 256)
SHAPED_DIM = 512  # of calls that make more of other classes than exp(s c), and with centres of 3
LISTED = ("bf16",)  # operands of calls over a part of the classes
MULTIPROCESSORS = 132  # as an H100 has; no other code comes of it


@dataclass(frozen=True)
class Launch:
    """A kernel with what it was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def plan_for(
    target: GPUTarget,
    x: torch.dtype,
    w: torch.dtype,
    compute_dtype: torch.dtype,
    lowers: bool,
    is_described: bool = False,
) -> planning.Plan:
    """The plan of a call on an architecture."""
    device = planning.Device(tiles.family(target.backend, target.arch), True, MULTIPROCESSORS)
    accumulate = torch.float64 if torch.float64 in (x, w) else torch.float32
    return planning.plan_on(device, accumulate, compute_dtype, lowers, is_described)


class _Recorder:
    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*arguments: Any, **keywords: Any) -> None:
            self.found.append(Launch(self.kernel, grid, arguments, keywords))

        return record


@contextlib.contextmanager
def recorded(
    target: GPUTarget,
    lowers: bool = True,
    described: bool = True,
    instead: tiles.Tiles | None = None,
) -> Iterator[list[Launch]]:
    """Launches of the calls inside, as they are made for an architecture.

    Args:
        target: the architecture.
        lowers: whether fp32 products may run in TF32.
        described: whether tensor descriptors may be used.
        instead: tiles to use, not the default ones.
    """
    found: list[Launch] = []

    def plan(x: torch.Tensor, w: torch.Tensor, compute_dtype: torch.dtype) -> planning.Plan:
        is_described = described and planning.describable(x, w)
        chosen = plan_for(target, x.dtype, w.dtype, compute_dtype, lowers, is_described)
        return chosen if instead is None else replace(chosen, tiles=instead)

    def plain(x: torch.Tensor, w: torch.Tensor, compute_dtype: torch.dtype) -> planning.Plan:
        return plan_for(target, x.dtype, w.dtype, compute_dtype, lowers)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "plan", plan))
        for module in (launch, planning):
            stack.enter_context(mock.patch.object(module, "plain_plan", plain))
        for name in KERNELS:
            recorder = _Recorder(getattr(launch, name), found)
            stack.enter_context(mock.patch.object(launch, name, recorder))
        yield found


def step(num_rows: int, num_classes: int, dim: int, operands: Operands, budget: int = 0) -> None:
    """Forward and backward of ArcFace's mean loss, with tensors that have no memory."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels = empty(num_rows, dtype=torch.int64)
    x = empty(num_rows, dim, dtype=operands.x)
    w = empty(num_classes, dim, dtype=operands.w)
    inputs = Inputs(x, w, labels, 64.0, None, operands.compute)
    margin = angular(0.5, "linear", "exact")
    needs = Needs(True, True, False)
    losses, swept, loan = launch.margin_ce(inputs, margin, "mean", -100, budget, needs)
    grad = empty(dtype=losses.loss.dtype)
    slopes = Slopes(losses.slope_lse, losses.slope_u, grad, losses.num_counted)
    inputs = inputs._replace(labels=losses.targets)
    launch.backward(slopes, inputs, swept, needs, loan)


def shaped_step(
    num_rows: int, num_classes: int, dim: int, operands: Operands, centers: int
) -> None:
    """Forward and backward where other classes' logits are s phi(c), and all that can be asked."""
    meta = torch.device("meta")
    accumulate = torch.float64 if torch.float64 in (operands.x, operands.w) else torch.float32
    labels = torch.empty(num_rows, dtype=torch.int64, device=meta)
    x = torch.empty(num_rows, dim, dtype=operands.x, device=meta)
    w = torch.empty(num_classes // centers * centers, dim, dtype=operands.w, device=meta)
    of_rows = torch.empty(num_rows, dtype=accumulate, device=meta)
    phi = torch.empty(7, dtype=torch.float64, device=meta)
    extras = Extras(of_rows, phi, of_rows, None, centers, True)
    inputs = Inputs(x, w, labels, 64.0, None, operands.compute, extras)
    swept, found, _ = launch.cosine_lse(inputs, 0, None)
    slopes = Slopes(swept.lse, swept.u, None, None, found.total)
    launch.backward(slopes, inputs, swept, Needs(True, True, False))


def sampled_step(
    num_rows: int, num_classes: int, dim: int, operands: Operands, is_shaped: bool = False
) -> None:
    """Forward and backward over a part of the classes, by their list; of logits s phi(c) then."""
    meta = torch.device("meta")
    labels = torch.empty(num_rows, dtype=torch.int64, device=meta)
    x = torch.empty(num_rows, dim, dtype=operands.x, device=meta)
    w = torch.empty(num_classes, dim, dtype=operands.w, device=meta)
    extras = Extras(classes=torch.empty(num_classes, dtype=torch.int64, device=meta))
    if is_shaped:
        phi = torch.empty(7, dtype=torch.float64, device=meta)
        extras = extras._replace(threshold=torch.empty(num_rows, device=meta), phi=phi)
    inputs = Inputs(x, w, labels, 64.0, None, operands.compute, extras)
    needs = Needs(True, True, False)
    swept, _, loan = launch.cosine_lse(inputs, 0, needs)
    launch.backward(Slopes(swept.lse, swept.u, None, None), inputs, swept, needs, loan)


def variant(launched: Launch) -> str:
    """The kernel's name, and words for what makes it another kernel to the compiler."""
    given = dict(zip(launched.kernel.arg_names, launched.arguments, strict=False))
    name, words = launched.kernel.__name__, []
    if "kept" in given and given["kept"].entries is not None:
        kept = "kept" if name == "gradient_kernel" else "keeping"
        words.append("lent" if given["kept"].shifts is None else kept)
    chunk = given.get("chunk")
    if name in ("sweep_kernel", "gradient_kernel") and given["rows"].others is not NO_OTHERS:
        words.append("shaped" if launched.keywords["P"].CENTERS == 1 else "centres")
    if name == "gradient_kernel" and chunk is not None and chunk.row_radial is not None:
        words.append("only")
    if name == "embeddings_kernel" and given["partial_ptr"] is None:
        words.append("only")
    if name == "embeddings_kernel" and chunk is not None and chunk.radial is None:
        words.append("lent")
    if "beyond" in given and given["beyond"].ptr is not None:
        words.append("beyond")
    if given.get("x_desc") is not None:
        words.append("described")
    if given.get("w") is not None and given["w"].index is not None:
        words.append("listed")
    return ", ".join([name, *words])


def defaults(target: GPUTarget, operands: str, dim: int) -> dict[str, Launch]:
    """Every kernel for D = ``dim`` with the default tiles, by its name and variant."""
    x, w, lowers, _ = given = TYPES[operands]
    variants: dict[str, Launch] = {}
    for described in (False, True):
        with recorded(target, lowers, described) as found:
            with planning.override("chunked"):
                step(*MANY, dim, given)
                step(*ONE, dim, given)
            with planning.override("kept"):
                step(*MANY, dim, given)
            p = plan_for(target, x, w, given.compute, lowers)
            if p.lent is not None and dim > planning.FUSED_DIM:
                with planning.override("lent"):
                    step(max(64, dim // 2), MANY[1], dim, given)  # rows of d_w are long enough
                    step(3 * dim, MANY[1], dim, given)  # they are too short
            if dim == SHAPED_DIM:
                with planning.override("chunked"):
                    shaped_step(*MANY, dim, given, 1)
                    shaped_step(*MANY, dim, given, 3)
                    if operands in LISTED:
                        sampled_step(*MANY, dim, given)
                        sampled_step(*MANY, dim, given, is_shaped=True)
                if operands in LISTED and p.lent is not None:
                    with planning.override("lent"):
                        sampled_step(max(64, dim // 2), MANY[1], dim, given)
            if p.tiles.for_fused(dim) is not None:
                with planning.override("fused"):
                    step(*MANY, dim, given)
        for launched in found:
            variants.setdefault(variant(launched), launched)
    return variants


def candidates(
    target: GPUTarget, operands: str, dim: int
) -> Iterator[tuple[str, tiles.Tile, Launch]]:
    """What `fused_margin.tuning` tries for a large call: kernel, tile, and its launch."""
    given = TYPES[operands]
    described = (tiles.family(target.backend, target.arch), operands.split("-")[-1])
    is_described = described in tiles.DESCRIBED
    present = plan_for(target, given.x, given.w, given.compute, given.lowers, is_described)
    for kernel, tile in tuning.candidates(present.tiles, present.operands, *MANY, dim):
        instead = tuning.with_tile(present.tiles, kernel, tile, dim)
        name = "sweep_kernel" if kernel == "forward" else f"{kernel}_kernel"
        strategy = planning.override("fused" if kernel in tuning.FUSED else "chunked")
        with strategy, recorded(target, given.lowers, is_described, instead) as found:
            step(*MANY, dim, given)
        yield kernel, tile, next(one for one in found if one.kernel.__name__ == name)


def _bound(launched: Launch, target: GPUTarget) -> tuple[Any, Any, Any]:
    kernel, backend = launched.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launched.keywords | {"debug": False, "instrumentation_mode": ""}
    return bind(*launched.arguments, **keywords)


def key(launched: Launch, target: GPUTarget) -> str:
    """What the compiler tells apart: launches with the same key run the same code."""
    _, specialization, options = _bound(launched, target)
    return f"{launched.kernel.__name__} {specialization} {options}"


def source(launched: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What `triton.compile` takes."""
    kernel = launched.kernel
    bound, specialization, options = _bound(launched, target)
    _, signature, constants, attributes = kernel._pack_args(
        make_backend(target), options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options
