"""Regularisers of the class weights, to be added to any loss; the sweeps are in `_weight_sweeps`.

```python
regularizer = fm.regularizers.RegularFace()
loss = criterion(embeddings, labels) + 0.01 * regularizer(criterion.weight)
```
"""

from __future__ import annotations

import torch
from torch import nn

from fused_margin import _centers, _compiled, _validate, _validate_others, _weight_sweeps
from fused_margin._numerics import accumulation_dtype

__all__ = ["CenterInvariant", "RegularFace", "center_invariant", "regular_face"]


@_compiled.raising()
def center_invariant(weight: torch.Tensor) -> torch.Tensor:
    r"""Pull the norms of all class weights towards each other.

    .. math:: \frac1C \sum_k \tfrac14 \left( \lVert w_k \rVert^2
              - \frac1C \sum_j \lVert w_j \rVert^2 \right)^2

    A quarter of the variance of the squared norms (eq. 11, 12): 0 where they are equal. Every class
    counts, not only those of the batch, as in pytorch-metric-learning.

    Args:
        weight: class weights (C, D), fp16, bf16, fp32 or fp64, any strides; C >= 2.

    Returns:
        0-d loss, fp64 for an fp64 weight and else fp32. Differentiable any number of times, in
        forward mode and by `torch.func` too.

    Raises:
        TypeError: ``weight`` is no dense floating tensor.
        ValueError: its shape is not (C, D) with C >= 2 and D >= 1.

    Numerics:
        Squared norms and their deviations from the mean are fp64 on CPU and CUDA/ROCm devices, so
        that nearly equal norms lose no digits.

    Memory:
        O(C) and one (C, D), the gradient; a few (C, D) for second derivatives, in forward mode and
        under `torch.func`.

    References:
        Wu, Liu, Li, Fu, "Deep Face Recognition with Center Invariant Loss", 2017.
    """
    _validate.class_weights(weight)
    squared_norms = _weight_sweeps.squared_norms(weight)  # (C,)
    deviations = squared_norms - squared_norms.mean()
    return (deviations.square().mean() / 4.0).to(accumulation_dtype(weight, weight))


@_compiled.raising()
def regular_face(weight: torch.Tensor) -> torch.Tensor:
    r"""Push each class weight away from the one nearest to it by angle.

    .. math:: \frac1C \sum_k \max_{j \ne k}
              \frac{w_k \cdot w_j}{\lVert w_k \rVert\, \lVert w_j \rVert}

    The gradient goes through both classes of each pair and through both norms. Of classes that are
    equally near, the one with the lowest index is taken. Norms are clamped at 1e-12; a zero row has
    cosine 0 to every other.

    Args:
        weight: class weights (C, D), fp16, bf16, fp32 or fp64, any strides; C >= 2.

    Returns:
        0-d loss, fp64 for an fp64 weight and else fp32. Differentiable any number of times, in
        forward mode and by `torch.func` too, where no two classes are equally near.

    Raises:
        TypeError: ``weight`` is no dense floating tensor.
        ValueError: its shape is not (C, D) with C >= 2 and D >= 1, or it is that of a loss with
            sub-centres, which would be pushed away from their own class.

    Numerics:
        All of it is in fp32 (fp64), under autocast too. The class taken is the nearest up to the
        rounding of the search, which ``torch.set_float32_matmul_precision`` may lower to TF32 on a
        GPU; its cosine and the gradient are fp32 all the same.

    Memory and time:
        O(C), the cosines of two blocks of classes (4 MiB on a CPU, 64 MiB elsewhere) and one
        (C, D), the gradient; a few (C, D) for second derivatives, in forward mode and under
        `torch.func`. The search takes C²D flops, as much as forward and backward of the
        loss itself at C = 8N, and more for more classes.

    References:
        Zhao, Xu, Cheng, "RegularFace: Deep Face Recognition via Exclusive Regularization", CVPR
        2019.
    """
    _validate.class_weights(weight)
    _validate_others.one_center(_centers.declared(weight))
    return _weight_sweeps.nearest_cosines(weight).mean()


class CenterInvariant(nn.Module):
    """`center_invariant` as a module; it has no parameters."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Loss of class weights (C, D): 0-d."""
        return center_invariant(weight)


class RegularFace(nn.Module):
    """`regular_face` as a module; it has no parameters."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Loss of class weights (C, D): 0-d."""
        return regular_face(weight)
