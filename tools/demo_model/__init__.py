"""The model that ``sparse-onnx demo`` runs: a pruned syntax highlighter for Python, byte by byte."""
