"""Benchmarks of fused_margin: named shapes, rivals, and runs whose results can be committed."""
