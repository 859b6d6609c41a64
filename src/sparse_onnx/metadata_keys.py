"""Keys of the metadata that this package writes into models."""

__all__ = ["MODULE_KEY", "STRUCTURE_KEY"]

MODULE_KEY = "sparse_onnx.module"
"""Of a node: the path of the framework's module that it came from."""

STRUCTURE_KEY = "sparse_onnx.mask_structure"
"""Of an initializer: the mask structure that a pruning pass gave it."""
