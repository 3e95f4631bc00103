"""CPU backend: one block for few classes, blocks of classes that stay in cache for many."""

from fused_margin._cpu.backend import backward, forward, kept_bytes, kept_classes
from fused_margin._cpu.memory import empty_cache
from fused_margin._cpu.products import has_bf16_products, product_dtype
from fused_margin._cpu.rows import Problem, Targets, chain, find_targets, losses, rounded

__all__ = [
    "Problem",
    "Targets",
    "backward",
    "chain",
    "empty_cache",
    "find_targets",
    "forward",
    "has_bf16_products",
    "kept_bytes",
    "kept_classes",
    "losses",
    "product_dtype",
    "rounded",
]
