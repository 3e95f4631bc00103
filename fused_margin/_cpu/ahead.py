"""Many classes and a gradient of W: the backward done ahead, as far as the forward can.

The memory that d_w will have holds, until then, the exponentials of the forward, and d_x is summed
while they are in the cache, but for factors of each row that are known only at the end. So the
backward has one product left, and no more memory is taken than without. With s log2(e) cos as z,

    Q_kn = 2^z_kn / ||w_k||, 0 at the targets,      v = Q^T W,      f_n = a_n 2^(-log2(e) lse_n)

and G_nk = f_n Q_kn ||w_k|| for k != y_n (eq. 7 of ``docs/math.md``). Where z is s log2(e) phi(cos),
Q has the slope of phi as a factor (eq. 20).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from fused_margin._arguments import TAKEN, Found, Gradients, Loan, Needs, Swept
from fused_margin._cpu.memory import gradient_memory, kept_memory
from fused_margin._cpu.others import Nearest
from fused_margin._cpu.products import LOG2_E, product_dtype
from fused_margin._cpu.rows import (
    Problem,
    RowGradients,
    Vectors,
    embeddings,
    measure,
    rounded,
    shrink_huge,
    target_cosines,
    view_of,
)
from fused_margin._cpu.sweep import (
    Block,
    EmbeddingsSum,
    Sweep,
    WeightGradient,
    block_size,
    embeddings_gradient,
    of_targets,
)
from fused_margin._numerics import largest_exponent, logit_range

# There are fewer passes over a block than in `sweep`, and larger ones pay.
EFFICIENT_BLOCK = 4096
# Factors of rows that are all below 2^LOW, or of which one is beyond 2^HIGH, get a power of 2 that
# they share, and that brings the largest to 1, or to 2^HIGH: a small one may belong to a large Q.
LOW, HIGH = -60, 115


def fits(problem: Problem, needs: Needs) -> bool:
    """Whether one shift serves all exponentials, a row may have any other class, and f is enough.

    It isn't for the sum of phi(c), nor for d_scale where phi is another function than c.
    """
    extras, num_classes = problem.extras, problem.w.shape[0]
    if extras.adds_in_sweep or (extras.reshapes and needs.scale):
        return False
    has_others = num_classes > extras.centers
    lowest = problem.scale * logit_range(extras.phi).lowest - common_shift(problem)
    return has_others and lowest > -largest_exponent(problem.accumulate)


def common_shift(problem: Problem) -> float:
    """What all logits are lowered by so that the sum of their exponentials doesn't overflow."""
    highest = problem.scale * logit_range(problem.extras.phi).highest
    return max(0.0, highest + math.log(problem.w.shape[0]) - largest_exponent(problem.accumulate))


def classes_per_block(problem: Problem) -> int:
    """Rows of W in a block."""
    centers = problem.extras.centers
    return block_size(problem.sizes, problem.accumulate.itemsize, centers, EFFICIENT_BLOCK)


def lent_classes(problem: Problem) -> int:
    """How many classes' exponentials the memory of d_w holds: all, or those of whole blocks."""
    num_rows, num_classes, dim = problem.sizes
    dtype = product_dtype(problem.compute_dtype, problem.accumulate)
    num_entries = num_classes * dim * problem.w.itemsize // dtype.itemsize
    if num_entries >= num_classes * num_rows:
        return num_classes
    size = classes_per_block(problem)
    return num_entries // (num_rows * size) * size


class Left(NamedTuple):
    """What a forward leaves beside the memory of d_w.

    Attributes:
        more: bytes with Q of further classes.
        v: (N, D); None where neither d_x nor d_scale will be asked for.
    """

    more: torch.Tensor
    v: torch.Tensor | None


class _Store:
    """Q of the first classes, (K, N), in the memory of d_w, (C, D), and of some more on top.

    In d_w they end where it ends if a row of it is as long as one of theirs or longer, and begin
    where it begins otherwise. Either way a row of d_w that is written lies over none still to be
    read but, maybe, one of its own block.
    """

    def __init__(self, problem: Problem, d_w: torch.Tensor, more: torch.Tensor) -> None:
        num_rows, num_classes, _ = problem.sizes
        dtype = product_dtype(problem.compute_dtype, problem.accumulate)
        self.num_lent = lent_classes(problem)
        bytes_per_class = num_rows * dtype.itemsize
        flat = d_w.view(-1).view(torch.uint8)
        self.begin = 0
        if self.num_lent == num_classes:
            self.begin = (
                (flat.numel() - num_classes * bytes_per_class) // dtype.itemsize * dtype.itemsize
            )
        self.lent = (
            flat[self.begin : self.begin + self.num_lent * bytes_per_class]
            .view(dtype)
            .view(-1, num_rows)
        )
        self.more = more.view(dtype).view(-1, num_rows)
        self.bytes_per_class, self.gradient_bytes = bytes_per_class, d_w.shape[1] * d_w.itemsize

    def of(self, block: Block) -> torch.Tensor | None:
        """Where Q of a block lies, (B, N); None if nowhere."""
        start, stop = block.start, block.stop
        if stop <= self.num_lent:
            return self.lent[start:stop]
        if self.num_lent <= start and stop - self.num_lent <= len(self.more):
            return self.more[start - self.num_lent : stop - self.num_lent]
        return None

    def is_overwritten(self, block: Block) -> bool:
        """Whether the block's rows of d_w lie over its own Q."""
        if block.stop > self.num_lent:
            return False
        begin, end = (self.begin + row * self.bytes_per_class for row in (block.start, block.stop))
        return begin < block.stop * self.gradient_bytes and block.start * self.gradient_bytes < end


def forward(
    problem: Problem, num_bytes: int, needs: Needs, num_outputs: int = 0
) -> tuple[Swept, Found, Loan]:
    """lse and u (eq. 1, 2), the memory of d_w with Q, and v where it is needed.

    Args:
        problem: what to sweep over.
        num_bytes: how many may be taken on top of d_w, for Q of classes that don't fit there.
        needs: which gradients will be asked for.
        num_outputs: bytes of ``kept`` in what is returned, which hold nothing.
    """
    x = measure(embeddings(problem))
    num_rows, num_classes, dim = problem.sizes
    inv_w = x.inverse.new_empty(num_classes)
    d_w = gradient_memory.empty(num_classes, dim, dtype=problem.w.dtype)
    more = _more(problem, num_bytes)
    store, sweep = _Store(problem, d_w, more), Sweep(problem, x.rows, classes_per_block(problem))
    of_x = EmbeddingsSum(sweep, x.rows) if needs.x or needs.scale else None
    total = torch.zeros(num_rows, dtype=torch.float64, device="cpu")
    nearest, shift = Nearest(problem, sweep.work), common_shift(problem)
    for block in sweep.blocks(inv_w, is_first=True):
        e, slopes = _exponentials(sweep, block, shift, nearest)
        total += e.sum(dim=0)
        q = _divided(sweep, block, e, slopes, store.of(block))
        if of_x is not None:
            of_x.add(block, q)
    u = target_cosines(x, problem.w, problem.targets)
    # as long as what is kept without a loan, for `torch.vmap`, which stacks outputs
    nothing = torch.empty(1, dtype=torch.uint8, device="cpu").expand(num_outputs)
    swept = Swept(total.log_().add_(shift), u, x.inverse, inv_w, nothing)
    return swept, nearest.result(), Loan(d_w, Left(more, None if of_x is None else of_x.v))


def held_classes(problem: Problem, num_bytes: int) -> tuple[int, int]:
    """Of how many classes d_w holds Q, and ``num_bytes`` that of the next: of whole blocks."""
    num_rows, num_classes, _ = problem.sizes
    itemsize = product_dtype(problem.compute_dtype, problem.accumulate).itemsize
    lent = lent_classes(problem)
    further, num_held = num_classes - lent, num_bytes // (num_rows * itemsize)
    if num_held < further:
        size = classes_per_block(problem)
        further = num_held // size * size
    return lent, further


def _more(problem: Problem, num_bytes: int) -> torch.Tensor:
    """Bytes for Q of the classes beyond those that d_w holds."""
    itemsize = product_dtype(problem.compute_dtype, problem.accumulate).itemsize
    _, further = held_classes(problem, num_bytes)
    return kept_memory.empty(further * problem.x.shape[0] * itemsize, dtype=torch.uint8)


def _exponentials(
    sweep: Sweep, block: Block, shift: float, nearest: Nearest | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """2^z, 0 where left out, (B, N), in the block's work, and the slopes of phi if not 1."""
    product = sweep.product[: block.stop - block.start]
    # what is formed in memory of its own is gone before anything else is formed
    z = torch.mul(
        sweep.widen(sweep.multiply(block, product)), block.weight.inverse[:, None], out=block.work
    )
    sweep.others.leave_out(z, block.targets, block.rows)
    if nearest is not None:
        nearest.look(z, block.start)
    slopes = sweep.others.shape(z, block.targets, block.rows)
    if shift:
        z.sub_(shift * LOG2_E)
    return z.exp2_(), slopes


def _buffer(sweep: Sweep, block: Block) -> torch.Tensor:
    """(B, N) in the product dtype: the block's work, if that has it."""
    if sweep.dtype is sweep.accumulate:
        return block.work
    return sweep.product[: block.stop - block.start]


def _divided(
    sweep: Sweep,
    block: Block,
    e: torch.Tensor,
    slopes: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Q of the block, (B, N) in the product dtype, where it is to lie, or in a buffer."""
    out = _buffer(sweep, block) if out is None else out
    if slopes is not None:
        e.mul_(slopes)
    return torch.mul(e, block.weight.inverse[:, None], out=out)


def backward(
    g: RowGradients, problem: Problem, swept: Swept, loan: Loan, needs: Needs
) -> Gradients:
    """Vector-Jacobian product of `forward` (eq. 7 to 9), over what that has left in the loan."""
    d_w, left = forward(problem, 0, needs)[2] if loan is TAKEN else loan
    x = shrink_huge(embeddings(problem), swept.inv_x)
    inv_x = x.inverse.double().numpy()
    of_target = rounded(g.u * inv_x, problem.accumulate)
    a, decay = g.lse * problem.scale * inv_x, np.exp(common_shift(problem) - swept.lse.numpy())
    if problem.extras.reshapes:  # where all other classes are left out
        decay[np.isinf(decay)] = 0.0
    store = _Store(problem, d_w, left.more)
    factors = a * decay, of_target, g.of_hat
    _write_weight_gradient(d_w, store, factors, x, problem, swept.inv_w)
    d_x = d_scale = None
    if left.v is not None:
        # one after the other: as a loss tends to 0 their product may leave what fp32 can hold
        v = left.v.mul_(rounded(decay, problem.accumulate)[:, None])
        v.mul_(rounded(a, problem.accumulate)[:, None])
        own = of_targets(of_target, problem, swept.inv_w)
        d_x, d_scale = embeddings_gradient(v, own, g, x, problem, swept, needs)
    return Gradients(d_x, d_w, d_scale)


def _shared_power(*factors: np.ndarray) -> float:
    """What factors of rows, and of their directions, are divided by to be within range."""
    largest = max(float(np.abs(one).max(initial=0.0)) for one in factors)
    _, exponent = math.frexp(largest)
    if not math.isfinite(largest) or LOW <= exponent <= HIGH:
        return 1.0
    return math.ldexp(1.0, exponent if exponent < LOW else exponent - HIGH)


def _write_weight_gradient(
    d_w: torch.Tensor, store: _Store,
    factors: tuple[np.ndarray, torch.Tensor, torch.Tensor | None], x: Vectors, problem: Problem,
    inv_w: torch.Tensor,
) -> None:  # fmt: skip
    """Write d_w, (C, D), over what is stored there.

    Args:
        d_w: where. store: of what is there.
        factors: f / ||x||, (N,) fp64; what `WeightGradient` takes as ``of_target`` and ``of_hat``.
        x: embeddings. problem, inv_w: as for `backward`.
    """
    factor, of_target, of_hat = factors
    power = _shared_power(factor, factor / x.inverse.double().numpy())
    sweep = Sweep(problem, x, classes_per_block(problem))
    scaled = rounded(factor / power, problem.accumulate)
    of_w = WeightGradient(sweep, d_w, x, scaled, of_target, of_hat)
    shift = common_shift(problem)
    for block in sweep.blocks(inv_w, is_first=False):
        q = store.of(block)
        if q is None:
            q = _divided(sweep, block, *_exponentials(sweep, block, shift))
        elif store.is_overwritten(block):
            q = _buffer(sweep, block).copy_(q)
        tangent = of_w.tangent(block, q)
        if power != 1.0:
            tangent.mul_(power)
        of_w.complete(block, tangent)
        inverse = block.weight.inverse
        dots = np.vecdot(view_of(tangent), view_of(block.weight.values))
        radial = torch.from_numpy(dots).mul_(inverse).mul_(inverse)
        of_w.write(block, tangent, radial)
        del tangent  # two at once, this and the next, would cost more memory
