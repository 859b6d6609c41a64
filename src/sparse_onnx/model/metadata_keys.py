"""Keys of the metadata that this package writes into models."""

__all__ = ["FIXED_INPUTS_KEY", "LOWERED_KEY", "MODULE_KEY", "RESCALED_KEY", "STRUCTURE_KEY"]

MODULE_KEY = "sparse_onnx.module"
"""Of a node: the path of the framework's module that it came from."""

LOWERED_KEY = "sparse_onnx.lowered"
"""Of a node of ONNX Runtime's own operators: the lowering that put it there."""

RESCALED_KEY = "sparse_onnx.rescaled"
"""Of an initializer: its elements are scaled against those of the original, which what is around it makes up for."""

STRUCTURE_KEY = "sparse_onnx.mask_structure"
"""Of an initializer: the mask structure that a pruning pass gave it."""

FIXED_INPUTS_KEY = "sparse_onnx.fixed_inputs"
"""Of a model: the inputs of its original that are constants in it, by name, as JSON."""
