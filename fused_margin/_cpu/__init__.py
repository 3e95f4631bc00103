"""CPU backend: one block for few classes, blocks of classes that stay in cache for many."""

from fused_margin._cpu.ahead import classes_per_block, held_classes
from fused_margin._cpu.backend import backward, forward, kept_bytes, kept_classes, runs_ahead
from fused_margin._cpu.memory import empty_cache
from fused_margin._cpu.products import has_bf16_products, product_dtype
from fused_margin._cpu.rows import Problem, Targets, chain, find_targets, losses, rounded

__all__ = [
    "Problem",
    "Targets",
    "backward",
    "chain",
    "classes_per_block",
    "empty_cache",
    "find_targets",
    "forward",
    "has_bf16_products",
    "held_classes",
    "kept_bytes",
    "kept_classes",
    "losses",
    "product_dtype",
    "rounded",
    "runs_ahead",
]
