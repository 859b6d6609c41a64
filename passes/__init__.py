"""Passes: changes of an ``onnx_ir.Model``, one subject a module, one folder a stage."""
