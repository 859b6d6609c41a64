"""Structured pruning: whole units are removed and shapes shrink, so any runtime is faster without special kernels."""
