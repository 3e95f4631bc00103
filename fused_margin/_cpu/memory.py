"""Memory that the next step uses again."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch

# From this size on, kept products and d_w lie in memory that the next step uses again. The C
# library would give it back to the system, and touching 200 MB of new pages takes as long as half a
# product.
REUSED_BYTES = 256 << 10


class Lender:
    """Makes tensors in memory that outlives them, for the next tensor of about the same size.

    One piece of memory at most is put aside. It is lent again only after the last reference to a
    tensor's storage, that of a view included, is gone; whoever asks meanwhile gets a new piece.
    """

    def __init__(self) -> None:
        self.released: deque[np.ndarray] = deque(maxlen=1)

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """torch.empty(shape, dtype=dtype); large ones in lent memory."""
        size = math.prod(shape) * dtype.itemsize
        if size < REUSED_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        try:
            memory = self.released.pop()
        except IndexError:
            memory = None
        if memory is None or not size <= memory.nbytes <= 2 * size:
            memory = None  # what doesn't fit goes before the new piece is made
            memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        lent = memory[:size]  # an object of its own, which lives as long as the tensor's storage
        weakref.finalize(lent, self.released.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


kept_memory, gradient_memory, work_memory = Lender(), Lender(), Lender()


def empty_cache() -> None:
    """Give back to the system the memory that the CPU backend puts aside for the next step.

    That is at most the size of one gradient of the class weights, of the cosines kept for a
    backward, and of the cosines of a block. Tensors that are in use are not touched.
    """
    kept_memory.released.clear()
    gradient_memory.released.clear()
    work_memory.released.clear()
