"""Give weights fewer values."""
