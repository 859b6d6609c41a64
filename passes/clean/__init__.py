"""Clean up a graph without changing what it computes."""
