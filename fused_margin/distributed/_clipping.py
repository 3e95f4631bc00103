"""The norm of gradients of which some are sharded and some are not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fused_margin import _validate


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[torch.nn.Parameter] | torch.nn.Parameter,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` over sharded and other parameters together.

    torch's own takes either DTensors or plain tensors. A collective of the shards' meshes: every
    rank gives the same parameters.

    Args:
        parameters: of the model and the criterion.
        max_norm: what the norm of all gradients together is made, if it is more.
        norm_type: which norm.
        error_if_nonfinite: raise where it is NaN or infinite.

    Returns:
        The norm before, 0-d, the same on all ranks.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    by_mesh: dict[Any, list[Any]] = {}  # torch's norm takes the gradients of one mesh, or of none
    for parameter in given:
        if parameter.grad is not None:
            mesh = getattr(parameter.grad, "device_mesh", None)
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    if not by_mesh:
        return torch.tensor(0.0)
    norms = []
    for grads in by_mesh.values():
        norm: Any = torch.nn.utils.get_total_norm(grads, norm_type)
        norms.append(norm.full_tensor() if _validate.is_dtensor(norm) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, so they can't"
            " be clipped; leave error_if_nonfinite=False to go on"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (grad for grads in by_mesh.values() for grad in grads):
        (grad.to_local() if _validate.is_dtensor(grad) else grad).mul_(factor)
    return total
