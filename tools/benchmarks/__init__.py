"""Makers of benchmark models, and benchmarks."""
