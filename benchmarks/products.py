"""The three matrix products by the quickest of torch's routes on a CPU, found by trying each.

`baselines.BareProducts` asks for whole products, with the batch's rows first. What any dense
implementation may do beside that: have classes first, ask oneDNN instead of the default (MKL, on
x86), and go through W in blocks of classes, so that a block of the N x C matrix is multiplied twice
while it is in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import Problem
from fused_margin._cpu.products import MULTIPLIES_FP32_BY_ONEDNN, multiply_transposed

BLOCKS = (1024, 2048, 4096, 8192)  # classes
SEARCH_REPEATS = 2  # of each route; the quicker one counts


class Route(NamedTuple):
    """One way through the three products.

    Attributes:
        block: classes at a time; 0 for all at once.
        classes_first: whether the N x C matrix has classes as rows.
        by_onednn: whether products of the form A B^T go to oneDNN by name.
    """

    block: int
    classes_first: bool
    by_onednn: bool

    def __str__(self) -> str:
        """In words, as "blocks of 2,048 classes, classes first, oneDNN"."""
        words = [f"blocks of {self.block:,} classes" if self.block else "whole"]
        words.append("classes first" if self.classes_first else "rows first")
        return ", ".join([*words, *(["oneDNN"] if self.by_onednn else [])])


def routes(problem: Problem) -> Iterator[Route]:
    """The routes that there are for a problem: oneDNN by name in fp32 on x86 alone."""
    has_onednn = MULTIPLIES_FP32_BY_ONEDNN and problem.product_dtype is torch.float32
    for block in (0, *(block for block in BLOCKS if block < problem.w.shape[0])):
        for classes_first in (False, True):
            yield Route(block, classes_first, False)
            if has_onednn and classes_first:
                yield Route(block, classes_first, True)


class RoutedProducts:
    """The three products by one route; W is cast and outputs are allocated outside of any timing.

    Attributes:
        cosines: x W^T, (N, C) or (C, N), or that of one block.
        d_w: cosines^T x, (C, D). d_x: cosines W, (N, D).
    """

    def __init__(self, problem: Problem, route: Route) -> None:
        self.x, self.w = (tensor.to(problem.product_dtype) for tensor in (problem.x, problem.w))
        self.x_t = self.x.t().contiguous()  # (D, N)
        self.route, self.name = route, f"three products, {route}"
        num_rows, num_classes = self.x.shape[0], self.w.shape[0]
        self.block = route.block or num_classes
        shape = (self.block, num_rows) if route.classes_first else (num_rows, self.block)
        self.cosines = self.x.new_zeros(shape)
        self.d_w, self.d_x = torch.zeros_like(self.w), torch.zeros_like(self.x)

    def clear(self) -> None:
        """Have nothing to drop."""

    def forward(self) -> None:
        """Compute x W^T, block by block."""
        for start in range(0, self.w.shape[0], self.block):
            self._cosines(self.w[start : start + self.block])

    def step(self) -> None:
        """Compute x W^T, its transpose times x, and it times W, block by block."""
        for start in range(0, self.w.shape[0], self.block):
            w, d_w = (matrix[start : start + self.block] for matrix in (self.w, self.d_w))
            cosines = self._cosines(w)  # (B, N)
            if self.route.by_onednn:
                d_w.copy_(multiply_transposed(cosines, self.x_t, d_w))
            else:
                torch.mm(cosines, self.x, out=d_w)
            torch.addmm(self.d_x, cosines.t(), w, beta=float(start > 0), out=self.d_x)

    def _cosines(self, w: Tensor) -> Tensor:
        """(B, N) for the weights (B, D) of a block, a view of the memory of the route's layout."""
        if self.route.by_onednn:
            return multiply_transposed(w, self.x, self.cosines[: w.shape[0]])
        if self.route.classes_first:
            return torch.mm(w, self.x.t(), out=self.cosines[: w.shape[0]])
        # of the last block, too, one piece of memory
        out = self.cosines.view(-1)[: w.shape[0] * self.x.shape[0]].view(self.x.shape[0], -1)
        return torch.mm(self.x, w.t(), out=out).t()


def search(problem: Problem) -> dict[str, float]:
    """Seconds of the three products by each route."""
    seconds = {}
    for route in routes(problem):
        products = RoutedProducts(problem, route)
        products.step()
        seconds[str(route)] = min(_time(products) for _ in range(SEARCH_REPEATS))
    return seconds


def quickest(problem: Problem) -> tuple[RoutedProducts, dict[str, float]]:
    """The products by the quickest route, and the seconds of each."""
    seconds = search(problem)
    best = min(routes(problem), key=lambda route: seconds[str(route)])
    return RoutedProducts(problem, best), seconds


def _time(products: RoutedProducts) -> float:
    start = time.perf_counter()
    products.step()
    return time.perf_counter() - start
