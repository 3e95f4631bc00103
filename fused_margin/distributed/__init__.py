"""Classes split over the ranks of `torch.distributed`, as shards of a DTensor.

`shard_classes` makes them; the loss is then called as before, with this rank's rows. What is sent
grows with the rows and not with the classes, and `count_traffic` counts it.
"""

from fused_margin.distributed._clipping import clip_grad_norm_
from fused_margin.distributed._collectives import bytes_per_step, count_traffic
from fused_margin.distributed._shards import ClassShard, shard_classes

__all__ = ["ClassShard", "bytes_per_step", "clip_grad_norm_", "count_traffic", "shard_classes"]
