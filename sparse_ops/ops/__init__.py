"""The operators of the kernel library: one contract a file."""
