"""The norm of gradients of which some are sharded and some are not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from fused_margin import _validate, _validate_shards
from fused_margin.distributed._sweep import like_grad


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[torch.nn.Parameter] | torch.nn.Parameter,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` over sharded and other parameters together.

    torch's own takes either DTensors or plain tensors, and no sparse ones, as those of sampled
    classes. A collective of the shards' meshes: every
    rank gives the same parameters.

    Args:
        parameters: of the model and the criterion.
        max_norm: what the norm of all gradients together is made, if it is more.
        norm_type: which norm, > 0; inf for the largest element.
        error_if_nonfinite: raise where it is NaN or infinite.

    Returns:
        The norm before, 0-d, the same on all ranks.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm_type = _validate_shards.norm_type(norm_type)
    by_mesh: dict[Any, list[torch.Tensor]] = {}  # a norm over the ranks of each, or of this one
    for parameter in given:
        if parameter.grad is not None:
            by_mesh.setdefault(_groups(parameter.grad), []).append(_numbers(parameter))
    if not by_mesh:
        return torch.tensor(0.0)
    norms = []
    for groups, grads in by_mesh.items():
        some = [grad for grad in grads if grad.numel()]  # of a rank without classes
        norm = grads[0].new_zeros(())
        norm = torch.nn.utils.get_total_norm(some, norm_type) if some else norm
        for group in groups:
            norm = _over_ranks(norm, norm_type, group)
        norms.append(norm)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, so they can't"
            " be clipped; leave error_if_nonfinite=False to go on"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (grad for grads in by_mesh.values() for grad in grads):
        grad.mul_(factor.to(grad.device))
    return total


def _groups(grad: Any) -> tuple[Any, ...]:
    """The process groups over which a gradient is split."""
    if not _validate.is_dtensor(grad):
        return ()
    mesh, placements = grad.device_mesh, grad.placements
    return tuple(mesh.get_group(dim) for dim, one in enumerate(placements) if one.is_shard())


def _numbers(parameter: Any) -> torch.Tensor:
    """This rank's numbers of its gradient, in the same memory; of a sparse one its values."""
    grad = parameter.grad
    local = grad._local_tensor if _validate.is_dtensor(grad) else grad
    if local.layout is not torch.sparse_coo:
        return local
    if not local.is_coalesced():  # of several backwards, which may have the same rows
        local = local.coalesce()
        parameter.grad = like_grad(local, parameter)
    return local._values()


def _over_ranks(norm: torch.Tensor, norm_type: float, group: Any) -> torch.Tensor:
    """The norm of what all ranks of the group have."""
    if math.isinf(norm_type):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    powers = norm.double() ** norm_type
    dist.all_reduce(powers, group=group)
    return (powers ** (1.0 / norm_type)).to(norm.dtype)
