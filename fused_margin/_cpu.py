"""Class-blocked CPU backend: cosines exist for one block of classes at a time.

A block is class-major, (B, N): the product W_block x^T is faster that way round, and the sums over
classes run along the outer dimension. Elementwise work is in place on that block. Row quantities,
(N,), are combined in fp64. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
import platform
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fused_margin import margins
from fused_margin._numerics import CLAMPED_INVERSE_NORM, NORM_EPS, accumulation_dtype

# Bytes of one (B, N) block, and of B rows of W. Measured (docs/design.md): elementwise passes slow
# down once a block leaves the last-level cache, but with many rows products and the passes over B
# rows of W lose more below 2048 classes: a block may take up to four times as much for those.
BLOCK_BYTES = 2 << 20
WEIGHT_BLOCK_BYTES = 16 << 20
MIN_BLOCK, EFFICIENT_BLOCK, MAX_BLOCK = 128, 2048, 8192
# Bytes of products that the forward leaves for the backward, those of the first classes: this much,
# and more for each row of the batch above 256. The others are formed again, so that memory does not
# grow with N C.
KEPT_BYTES = 40 << 20
KEPT_ROWS, KEPT_BYTES_PER_FURTHER_ROW = 256, 224 << 10
# From this size on, kept products and d_w lie in memory that the next step uses again. The C
# library would give it back to the system, and touching 200 MB of new pages takes as long as half a
# product.
REUSED_BYTES = 4 << 20

# Cosines are formed in units of log2(e), for exp2: torch's exp takes three times as long.
LOG2_E = 1.0 / math.log(2.0)

HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def block_size(num_rows: int, num_classes: int, dim: int, itemsize: int) -> int:
    """Classes in a block, so that the block and its rows of W stay within their budgets."""
    size = BLOCK_BYTES // (itemsize * max(num_rows, 1))
    size = max(size, min(EFFICIENT_BLOCK, 4 * size))
    size = min(size, WEIGHT_BLOCK_BYTES // (itemsize * dim))
    return min(num_classes, max(MIN_BLOCK, min(MAX_BLOCK, size)))


def kept_classes(x: torch.Tensor, w: torch.Tensor, compute: torch.dtype, budget: int) -> int:
    """How many classes' products `forward` keeps: all, or whole blocks within ``budget`` bytes.

    A negative budget stands for the default.
    """
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    accumulate = accumulation_dtype(x, w)
    bytes_per_class = num_rows * product_dtype(compute, accumulate).itemsize
    if budget < 0:
        budget = KEPT_BYTES + max(0, num_rows - KEPT_ROWS) * KEPT_BYTES_PER_FURTHER_ROW
    if num_classes * bytes_per_class <= budget:
        return num_classes
    size = block_size(num_rows, num_classes, dim, accumulate.itemsize)
    return budget // (bytes_per_class * size) * size


def product_dtype(compute: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """bf16 where asked for and the CPU has instructions for it, else the accumulation dtype.

    fp16 is computed in fp32, which is both exact for fp16 inputs and faster on today's CPUs.
    """
    if compute is torch.bfloat16 and accumulate is torch.float32 and has_bf16_products():
        return torch.bfloat16
    return accumulate


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_instructions()


def _has_bf16_instructions() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities.startswith("AVX"):
        return torch.cpu._is_avx512_bf16_supported()
    return True  # elsewhere oneDNN's own answer is about hardware products


def _multiply_transposed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A b^T in ``out``, or in memory of its own.

    Args:
        a: (M, K). b: (N, K). out: (M, N), which may stay unwritten.
    """
    if HAS_ONEDNN and a.dtype is torch.float32 and out.numel() and a.numel():
        # IEEE fp32 as `mm`, which asks MKL: on AMD's CPUs 5 to 10 % slower
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t(), out=out)


class Lender:
    """Makes tensors in memory that outlives them, for the next tensor of about the same size.

    One piece of memory at most is put aside. It is lent again only after the last reference to a
    tensor's storage, that of a view included, is gone; whoever asks meanwhile gets a new piece.
    """

    def __init__(self) -> None:
        self.released: deque[np.ndarray] = deque(maxlen=1)

    def empty(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
        """torch.empty((num_rows, num_columns), dtype=dtype); large ones in lent memory."""
        size = num_rows * num_columns * dtype.itemsize
        if size < REUSED_BYTES:
            return torch.empty(num_rows, num_columns, dtype=dtype, device="cpu")
        try:
            memory = self.released.pop()
        except IndexError:
            memory = None
        if memory is None or not size <= memory.nbytes <= 2 * size:
            memory = None  # what doesn't fit goes before the new piece is made
            memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        lent = memory[:size]  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(lent, self.released.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(num_rows, num_columns)


_kept_memory, _gradient_memory = Lender(), Lender()


def empty_cache() -> None:
    """Give back to the system the memory that the CPU backend puts aside for the next step.

    That is at most the size of one gradient of the class weights and of the cosines kept for a
    backward. Tensors that are in use are not touched.
    """
    _kept_memory.released.clear()
    _gradient_memory.released.clear()


@dataclass
class Block:
    """One block of classes: rows ``start`` to ``stop`` of W."""

    start: int
    stop: int
    weight: torch.Tensor  # (B, D), accumulation dtype
    operand: torch.Tensor  # (B, D), product dtype
    inv_norm: torch.Tensor  # (B, 1)
    rows: torch.Tensor  # rows whose target lies in the block, (T,)
    targets: torch.Tensor  # their labels - start, (T,)
    product: torch.Tensor  # s log2(e) ||w|| cos, (B, N), accumulation dtype; not to be written to
    work: torch.Tensor  # (B, N), accumulation dtype, to be written to


class Sweep:
    """Iterates over the blocks of W, forming s log2(e) ||w|| cos in buffers that are reused."""

    def __init__(
        self,
        x_scaled: torch.Tensor,
        w: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        kept: torch.Tensor,
    ) -> None:
        """Prepare buffers.

        Args:
            x_scaled: s log2(e) x_hat, (N, D), accumulation dtype.
            w: (C, D), any floating dtype and strides.
            labels: (N,) int64; outside [0, C) means no target.
            dtype: the product dtype.
            kept: products of the first K classes, (K, N), that outlive the sweep.
        """
        num_rows, dim = x_scaled.shape
        self.w, self.dtype, self.accumulate = w, dtype, x_scaled.dtype
        self.operand = x_scaled.to(dtype)  # (N, D)
        self.size = block_size(num_rows, w.shape[0], dim, x_scaled.element_size())
        self.work = x_scaled.new_empty(self.size, num_rows)
        self.product = x_scaled.new_empty(self.size, num_rows, dtype=dtype)
        converts = dtype is not self.accumulate
        self.widened = torch.empty_like(self.work) if converts else None
        self.scratch = self.product if self.widened is None else self.widened
        self.kept = kept
        self.w_accumulate = (
            None if w.dtype is self.accumulate else x_scaled.new_empty(self.size, dim)
        )
        self.w_operand = x_scaled.new_empty(self.size, dim, dtype=dtype) if converts else None
        self.order = labels.argsort(stable=True)
        self.sorted_labels = labels[self.order]

    def blocks(self, inv_w: torch.Tensor, *, is_first: bool) -> Iterator[Block]:
        """Yield each block with its product.

        The first sweep fills ``inv_w`` (C,) and ``kept``; a later one reads them.
        """
        num_classes = self.w.shape[0]
        starts = torch.arange(0, num_classes + self.size, self.size, device="cpu")
        bounds = torch.searchsorted(self.sorted_labels, starts.clamp_max(num_classes)).tolist()
        for index, start in enumerate(range(0, num_classes, self.size)):
            stop = min(start + self.size, num_classes)
            length = stop - start
            weight = operand = self.w[start:stop]
            if self.w_accumulate is not None:
                weight = operand = self.w_accumulate[:length].copy_(weight)
            if is_first:
                norm = torch.linalg.vector_norm(weight, dim=1, out=inv_w[start:stop])
                norm.clamp_min_(NORM_EPS).reciprocal_()
            if self.w_operand is not None:
                same = self.w.dtype is self.dtype
                operand = self.w[start:stop] if same else self.w_operand[:length].copy_(weight)
            is_kept = stop <= self.kept.shape[0]
            product = self.kept[start:stop] if is_kept else self.product[:length]
            if is_first or not is_kept:
                formed = _multiply_transposed(operand, self.operand, out=product)
                if formed is not product:
                    product.copy_(formed)
                # two such blocks at once, this and the next, would cost more than the copy
                del formed
            if self.widened is not None:
                product = self.widened[:length].copy_(product)
            rows = self.order[bounds[index] : bounds[index + 1]]
            yield Block(
                start=start,
                stop=stop,
                weight=weight,
                operand=operand,
                inv_norm=inv_w[start:stop, None],
                rows=rows,
                targets=self.sorted_labels[bounds[index] : bounds[index + 1]] - start,
                product=product,
                work=self.work[:length],
            )

    def row_sums(self, block: Block, factors: torch.Tensor) -> torch.Tensor:
        """Sum over rows of work * product * factors, (B,); the product is lost unless kept."""
        length = block.stop - block.start
        scratch = self.scratch[:length]
        return torch.mul(block.work, block.product, out=scratch).mv(factors)


def _inverse_norms(x: torch.Tensor) -> torch.Tensor:
    """1 / max(||x_n||, eps), (N,)."""
    return torch.linalg.vector_norm(x, dim=1).clamp_min_(NORM_EPS).reciprocal_()


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    compute: torch.dtype,
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse and u (eq. 1, 2) in fp64, the inverse norms of x and W, and products for the backward.

    Args:
        x: (N, D). w: (C, D). labels: (N,) int64; outside [0, C) means no target.
        scale: s > 0. compute: the dtype asked for in products.
        budget: bytes to keep for a backward, negative for the default.

    Returns:
        lse (N,) fp64, u (N,) fp64, inv_x (N,), inv_w (C,) in the accumulation dtype, and the
        products of the first classes, (K, N), in the product dtype.
    """
    accumulate = accumulation_dtype(x, w)
    x = x.to(accumulate)
    inv_x = _inverse_norms(x)
    inv_w = x.new_empty(w.shape[0])
    dtype = product_dtype(compute, accumulate)
    kept = _kept_memory.empty(kept_classes(x, w, compute, budget), x.shape[0], dtype)
    sweep = Sweep(x * (inv_x * (scale * LOG2_E))[:, None], w, labels, dtype, kept)
    num_blocks = -(-w.shape[0] // sweep.size)
    # the sum, or its log, of each block
    partial = x.new_empty(num_blocks, x.shape[0], dtype=torch.float64)
    # |s cos| <= s up to rounding: exp needs no shift where e^s times C neither overflows nor
    # e^-s underflows.
    needs_shift = scale + math.log(w.shape[0]) > 0.95 * math.log(torch.finfo(accumulate).max)
    for index, block in enumerate(sweep.blocks(inv_w, is_first=True)):
        z = torch.mul(block.product, block.inv_norm, out=block.work)  # s log2(e) cos, (B, N)
        z[block.targets, block.rows] = -float("inf")
        if needs_shift:
            # The lower bound keeps a block that holds nothing but a row's target at exp(-inf).
            shift = z.amax(dim=0).clamp_min_(torch.finfo(accumulate).min)
            total = z.sub_(shift).exp2_().sum(dim=0).double()
            partial[index] = total.log_().add_(shift, alpha=1.0 / LOG2_E)
        else:
            partial[index] = z.exp2_().sum(dim=0)
    lse = partial.logsumexp(dim=0) if needs_shift else partial.sum(dim=0).log_()
    return lse, _target_cosine(x, w, labels, inv_x, inv_w), inv_x, inv_w, kept


def _target_rows(
    w: torch.Tensor, labels: torch.Tensor, inv_w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """w_hat of each row's target, (N, D), and whether the row has one, (N,)."""
    has_target = (labels >= 0) & (labels < w.shape[0])
    target = labels.where(has_target, 0)
    return w[target].to(inv_w.dtype) * inv_w[target, None], has_target


def _target_cosine(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    inv_x: torch.Tensor,
    inv_w: torch.Tensor,
) -> torch.Tensor:
    """u (N,) in fp64, a dot of its own: the margin amplifies the rounding of a bf16 product."""
    w_target, has_target = _target_rows(w, labels, inv_w)
    u = (x * inv_x[:, None] * w_target).sum(dim=1)
    return u.where(has_target, 0).double()


def backward(
    g_lse: torch.Tensor,
    g_u: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    compute: torch.dtype,
    lse: torch.Tensor,
    u: torch.Tensor,
    inv_x: torch.Tensor,
    inv_w: torch.Tensor,
    kept: torch.Tensor,
    *,
    need_x: bool,
    need_w: bool,
    need_scale: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Vector-Jacobian product of `forward` (eq. 7 to 9).

    Args:
        g_lse: gradient of lse, (N,). g_u: gradient of u, (N,). The rest as in `forward`.
        need_x: whether to return d_x; likewise need_w, need_scale.

    Returns:
        d_x (N, D) in x's dtype, d_w (C, D) in w's dtype, d_scale 0-d in fp64; None if not needed.
    """
    accumulate = inv_x.dtype
    x_dtype, x = x.dtype, x.to(accumulate)
    x_hat = x * inv_x[:, None]
    dtype = product_dtype(compute, accumulate)
    sweep = Sweep(x_hat * (scale * LOG2_E), w, labels, dtype, kept)
    converts = dtype is not accumulate
    a = (g_lse.double() * scale).to(accumulate)  # G_nk = a_n exp(s c_nk - lse_n) for k != y_n
    x_weighted = x_hat * a[:, None]  # (N, D)
    x_operand = x_weighted.to(dtype).t()  # (D, N)
    w_target, has_target = _target_rows(w, labels, inv_w)
    g_u = g_u.to(accumulate).where(has_target, 0)
    x_target = x_hat * g_u[:, None]  # the target's row of d_w_hat, (N, D)
    gu_u = g_u * u.to(accumulate)
    a_per_unit = a / (scale * LOG2_E)
    minus_lse = (lse * -LOG2_E).to(accumulate)[None, :]

    wants_v = need_x or need_scale
    # contiguous whatever x's strides, as the operator's fake promises
    v = x.new_zeros(x.shape) if wants_v else None
    v_product = x.new_empty(x.shape, dtype=dtype) if wants_v and converts else None
    d_w = _gradient_memory.empty(w.shape[0], w.shape[1], w.dtype) if need_w else None
    in_place = need_w and w.dtype is accumulate
    d_w_product = x.new_empty(sweep.size, x.shape[1], dtype=dtype) if need_w and converts else None
    d_w_block = None if not need_w or in_place else x.new_empty(sweep.size, x.shape[1])

    for block in sweep.blocks(inv_w, is_first=False):
        length = block.stop - block.start
        inv_norm = block.inv_norm
        p = torch.addcmul(minus_lse, block.product, inv_norm, out=block.work).exp2_()  # (B, N)
        p[block.targets, block.rows] = 0.0
        p.mul_(inv_norm)
        radial = None
        if need_w:
            radial = sweep.row_sums(block, a_per_unit).mul_(inv_norm[:, 0])  # sum_n G c / ||w||
            radial.index_add_(0, block.targets, gu_u[block.rows] * inv_norm[block.targets, 0])
            radial.mul_(inv_norm[:, 0]).masked_fill_(inv_norm[:, 0] >= CLAMPED_INVERSE_NORM, 0.0)
        if converts:
            p = sweep.product[:length].copy_(p)
        if v is not None:
            if v_product is not None:
                v.add_(torch.mm(p.t(), block.operand, out=v_product))
            else:
                v.addmm_(p.t(), block.operand)
        if d_w is not None and radial is not None:
            grad = d_w[block.start : block.stop] if d_w_block is None else d_w_block[:length]
            if d_w_product is None:
                tangent = _multiply_transposed(p, x_operand, out=grad)
            else:
                product = _multiply_transposed(p, x_operand, out=d_w_product[:length])
                tangent = grad.copy_(product)
            if len(block.rows):
                tangent.index_add_(0, block.targets, x_target[block.rows] * inv_norm[block.targets])
            # d_w_hat / ||w|| less its radial part (below the norm's clamp there is none)
            torch.addcmul(tangent, block.weight, radial[:, None], value=-1.0, out=grad)
            del tangent
            if d_w_block is not None:
                d_w[block.start : block.stop].copy_(grad)

    d_x = d_scale = None
    if v is not None:
        v.mul_(a[:, None]).addcmul_(w_target, g_u[:, None])
        radial = (v * x_hat).sum(dim=1, keepdim=True)  # sum_k G_nk c_nk
        if need_scale:
            d_scale = ((radial[:, 0].double() - g_u.double() * u.double()) / scale).sum()
        if need_x:
            radial.masked_fill_(inv_x[:, None] >= CLAMPED_INVERSE_NORM, 0.0)
            d_x = v.addcmul_(x_hat, radial, value=-1.0).mul_(inv_x[:, None]).to(x_dtype)
    return d_x, d_w, d_scale


def margin_forward(
    lse: torch.Tensor,
    u: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    margin: margins.Margin,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-row loss and its derivatives by lse and u (eq. 4, 6), fp64; and the count of rows.

    Args:
        lse: (N,). u: (N,). labels: (N,), ignored rows marked by ``ignore_index``.
        scale: s. margin: float coefficients.

    Returns:
        loss (N,), d_lse (N,), d_u (N,), all 0 on ignored rows; number of other rows, 0-d.
    """
    psi, slope = margins.value_and_slope(u, margin)
    gap = scale * psi - lse
    counted = labels != ignore_index
    sigma = torch.sigmoid(-gap).where(counted, 0)
    loss = (-F.logsigmoid(gap)).where(counted, 0)
    return loss, sigma, -sigma * scale * slope, counted.sum().double()
