"""Whether outputs are right, and how far they are from those of the dense model."""
