"""Replace nodes by operators of the kernel library."""
