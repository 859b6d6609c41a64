"""The graph, on disk and in memory: files, shapes, constants, weights, what nodes are."""
