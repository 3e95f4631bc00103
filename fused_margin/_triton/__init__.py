"""Triton backend, loaded on first use; `launch` is its interface to the operators."""
