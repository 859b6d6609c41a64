"""sparse-onnx: compile pruned ONNX models into smaller, faster ones that run on stock ONNX Runtime."""
