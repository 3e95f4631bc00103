"""CPU backend: one block for few classes, blocks of classes that stay in cache for many."""

from fused_margin._cpu.ahead import classes_per_block, held_classes
from fused_margin._cpu.backend import kept_bytes, kept_classes, runs_ahead
from fused_margin._cpu.calls import backward, cosine_lse, margin_ce
from fused_margin._cpu.memory import empty_cache
from fused_margin._cpu.products import has_bf16_products, product_dtype
from fused_margin._cpu.rows import Problem, Targets, find_targets

__all__ = [
    "Problem",
    "Targets",
    "backward",
    "classes_per_block",
    "cosine_lse",
    "empty_cache",
    "find_targets",
    "has_bf16_products",
    "held_classes",
    "kept_bytes",
    "kept_classes",
    "margin_ce",
    "product_dtype",
    "runs_ahead",
]
