"""Which classes a rank holds, and criteria whose weight is made a DTensor of such shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fused_margin import _setup, _validate, _validate_shards
from fused_margin.distributed import _collectives

Criterion = TypeVar("Criterion", bound=nn.Module)

# Of class weights that are drawn with a seed of their own, whatever rank holds them.
DRAWN_TOGETHER = 1024


class ClassShard(NamedTuple):
    """The classes of this rank, of a weight (C, D) that is a DTensor sharded on them.

    Attributes:
        group: the process group over which classes are split. rank: this process in it.
        ranks: how many there are, R.
        start, stop: classes of this rank, [start, stop).
        replicas: groups over which the same shard is held several times.
    """

    group: Any
    rank: int
    ranks: int
    start: int
    stop: int
    replicas: tuple[Any, ...]

    @classmethod
    def of(cls, weight: Any) -> ClassShard:
        """Where this process stands among those that hold the weight."""
        _validate_shards.weight(weight)
        return cls.on(weight.device_mesh, weight.placements, weight.shape[0])

    @classmethod
    def on(cls, mesh: Any, placements: Any, num_classes: int) -> ClassShard:
        """The same, of a weight that needn't be there yet."""
        (dim,) = (index for index, placement in enumerate(placements) if placement.is_shard())
        rank, ranks = mesh.get_local_rank(dim), mesh.size(dim)
        start, stop = bounds(num_classes, rank, ranks)
        others = (index for index in range(mesh.ndim) if index != dim)
        replicas = tuple(mesh.get_group(index) for index in others if mesh.size(index) > 1)
        return cls(mesh.get_group(dim), rank, ranks, start, stop, replicas)

    def told(self, value: Any) -> tuple[list[Any], int]:
        """The objects of all ranks that hold shards or copies of them, and where this one's is.

        What can fail on one rank alone is told so, before the others wait for it in a collective.
        """
        values, mine = [value], 0
        for group in (self.group, *self.replicas):
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            mine += dist.get_rank(group) * len(values)
            values = [one for some in gathered for one in some]
        return values, mine


def holders(weight: Any) -> tuple[Any, ...]:
    """Groups of the ranks whose batches go together: those that hold a sharded weight, else all."""
    if weight is None or not _validate.is_class_sharded(weight):
        return (None,)
    shard = ClassShard.of(weight)
    return (shard.group, *shard.replicas)


def bounds(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """The classes of a rank, as `torch.chunk` and DTensor cut: the last may have fewer, or none."""
    size = math.ceil(num_classes / ranks)
    return min(rank * size, num_classes), min((rank + 1) * size, num_classes)


def shard_classes(criterion: Criterion, mesh: Any = None) -> Criterion:
    r"""Split the classes of a loss over the ranks of a mesh, in place.

    Its ``weight`` becomes a parameter that is a DTensor, ``Shard(0)``: each rank keeps its own rows
    of what it has; nothing is sent but the sizes, and, where shards have copies, the first one's
    rows to the others, as DDP does. As with FSDP2's ``fully_shard`` this comes before the
    optimiser is built. ``criterion(embeddings, labels)`` takes this rank's rows of the batch and
    returns their loss over the classes of all ranks. It is a collective: every rank makes the same
    calls, forward and backward, a rank without rows too (with embeddings (0, D)). Embeddings and
    numbers for each row are sent, nothing that grows with C.

    **A criterion too large for one process** is built on the meta device; nothing but the shard is
    ever made:

    ```python
    with torch.device("meta"):
        criterion = fm.ArcFaceLoss(num_classes=100_000_000, embedding_size=512)
    fm.distributed.shard_classes(criterion)
    criterion.to_empty(device="cuda")
    criterion.reset_parameters()  # the same weights on any number of ranks, for the same seed
    ```

    (Not those of a criterion that is built as a whole, which are drawn in one go.)

    **Gradients** are those of the *mean over ranks* of their losses, as DDP averages them. This
    rank's embeddings get the gradient of this rank's loss, which DDP or FSDP2 around the backbone
    averages; the class weights (and a learnt scale) get that of the mean, and need no wrapper:
    don't put the criterion into DDP or ``fully_shard`` too. With ``reduction="mean"`` and equally
    many rows that count on each rank, this is one process with the whole batch. Where batches are
    uneven it is not, as each rank's mean weighs the same; ``reduction="sum"`` with the loss times
    R / N, for N rows in all, is:

    ```python
    criterion.reduction = "sum"
    (criterion(embeddings, labels) * (num_ranks / num_rows_of_all)).backward()
    ```

    **Statistics**, as `AdaCosLoss` and `AdaFaceLoss` have, are those of all ranks. Learnt tensors
    of a `psi` of one's own get the gradients of their own rank's rows only: average them.

    **An optimiser** with ``foreach=True``, its default on GPUs, takes no list of both kinds of
    tensors: give the criterion a parameter group of its own, or an optimiser, which a GradScaler
    needs. `fused_margin.distributed` has a `clip_grad_norm_` for both together.

    Args:
        criterion: a loss of this package, or a subclass of `MarginSoftmaxLoss`; its buffers, as
            ``class_weight`` (C,), stay whole on each rank.
        mesh: a `DeviceMesh`, of one dimension, or of two or more of which the last splits the
            classes and the others hold copies, whose gradients are averaged at each backward. By
            default all ranks. Without a process group the criterion is left as it is: one process
            has all classes.

    Returns:
        The criterion.

    Raises:
        TypeError: it has no ``weight`` of its own, as pytorch-metric-learning's losses.
        ValueError: the weight is sharded already, in a wrapper or an optimiser, has other sizes on
            another rank, or this rank is not in the mesh.
    """
    _validate_shards.criterion(criterion)
    if mesh is None and not (dist.is_available() and dist.is_initialized()):
        return criterion
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    weight: Any = criterion.weight
    if mesh is None:
        kind = _device_type() if weight.is_meta else weight.device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("classes",))
    _validate_shards.mesh(mesh, weight)
    placements = [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(0)]
    shard = ClassShard.on(mesh, placements, weight.shape[0])
    optimizers = _setup.without_garbage(
        lambda: [type(one).__name__ for one, _ in _setup.holders(weight)]
    )
    facts = (tuple(weight.shape), _setup.wrapper_of(weight), next(iter(optimizers), None))
    sizes, wrappers, held_by = zip(*shard.told(facts)[0], strict=True)
    _validate_shards.same_sizes(sizes)
    _validate_shards.whole_classes(
        weight.shape[0], shard.ranks, getattr(criterion, "sub_centers", 1)
    )
    _validate_shards.first_of_all(type(criterion).__name__, wrappers, held_by)
    sharded = _distributed(weight.detach(), shard, mesh, placements)
    if not weight.is_meta:  # each rank may have drawn others
        for group in shard.replicas:
            dist.broadcast(sharded.to_local(), group=group, group_src=0)
    criterion.weight = nn.Parameter(sharded, requires_grad=weight.requires_grad)
    return criterion


def _device_type() -> str:
    """Where a weight on the meta device is going to be."""
    config = dist.get_backend_config()
    return "cuda" if torch.cuda.is_available() and "cuda:" in config else "cpu"


def _distributed(whole: torch.Tensor, shard: ClassShard, mesh: Any, placements: Any) -> Any:
    """This rank's rows of a tensor (C, D) that each rank has, as a DTensor."""
    from torch.distributed.tensor import DTensor

    rows = whole[shard.start : shard.stop].clone(memory_format=torch.contiguous_format)
    # whole itself may be anything but contiguous
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=whole.shape, stride=stride
    )


def like(tensor: Any, local: torch.Tensor, num_rows: int) -> torch.Tensor:
    """This rank's rows as a tensor of ``num_rows`` in all, sharded as ``tensor`` if that is."""
    if not _validate.is_dtensor(tensor):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((num_rows, *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


def grown(tensor: Any, weight: Any, old: int, added: int) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor with ``added`` rows of zeros after its ``old`` ones.

    Shards are cut anew: rows are sent to the ranks that hold them now, each once.

    Args:
        tensor: has a row for each of ``weight``, sharded or this rank's alone where that is.
        weight: of which the mesh counts, and not the size.
        old: rows of all ranks.
        added: how many more there will be.

    Returns:
        The rows, and which of all is the first.
    """
    local = _validate.local(tensor)
    if not _validate.is_dtensor(weight):
        return torch.cat([local, local.new_zeros(added, *local.shape[1:])]), 0
    shard = ClassShard.on(weight.device_mesh, weight.placements, old + added)
    before = [bounds(old, rank, shard.ranks) for rank in range(shard.ranks)]
    after = [bounds(old + added, rank, shard.ranks) for rank in range(shard.ranks)]
    sent = [_overlap(before[shard.rank], one) for one in after]
    kept = [_overlap(one, after[shard.rank]) for one in before]
    result = local.new_empty(shard.stop - shard.start, *local.shape[1:])
    _collectives.move(local, result[: sum(kept)], sent, kept, shard.group)
    result[sum(kept) :].zero_()
    return result, shard.start


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def fitted(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Class weights from a state, (C, D), of which each rank has all, or shards: as ``weight``."""
    if _validate.is_dtensor(weight):
        if not _validate.is_dtensor(value) and value.shape == weight.shape:
            like: Any = weight
            return _distributed(value, ClassShard.of(weight), like.device_mesh, like.placements)
    elif _validate.is_dtensor(value):
        _validate_shards.rows_of_all(value)
        sharded: Any = value
        return sharded.full_tensor()
    return value


@torch.no_grad()
def draw_normal(weight: Any, std: float) -> None:
    """Fill a sharded weight from normal(0, std^2), the same on any number of ranks.

    As long as the ranks have the same seed: the one number of torch's generator that this takes.
    Where there are copies of shards all take the first rank's, so that they are alike.
    """
    shard, seed = ClassShard.of(weight), int(torch.randint(1 << 62, ()))
    if shard.replicas:
        seed = shard.told(seed)[0][0]
    draw_rows(weight.to_local(), shard.start, std, seed)


def draw_rows(rows: torch.Tensor, start: int, std: float, seed: int) -> None:
    """Fill the weights of classes [start, start + len(rows)), which depend on the seed alone."""
    fill_rows(rows, start, drawing(rows, std, seed))


def drawing(rows: torch.Tensor, std: float, seed: int) -> Callable[[int], torch.Tensor]:
    """Blocks of rows like these from normal(0, std^2), for `fill_rows`; each till the next one."""
    generator = torch.Generator(rows.device)
    drawn = torch.empty(DRAWN_TOGETHER, rows.shape[1], device=rows.device, dtype=rows.dtype)

    def block(number: int) -> torch.Tensor:
        generator.manual_seed(seed + number)
        return drawn.normal_(std=std, generator=generator)

    return block


def fill_rows(rows: torch.Tensor, start: int, block: Callable[[int], torch.Tensor]) -> None:
    """Fill rows [start, start + len(rows)) of those of which ``block(i)`` has 1,024 from 1,024 i.

    Whole blocks are made on whatever rank, so that what is made of them has the same bits on each.
    """
    done = 0
    while done < rows.shape[0]:
        number, skipped = divmod(start + done, DRAWN_TOGETHER)
        some = rows[done : done + DRAWN_TOGETHER - skipped]
        some.copy_(block(number)[skipped : skipped + some.shape[0]])
        done += some.shape[0]
