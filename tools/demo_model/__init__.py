"""The model that ``sparse-onnx demo`` runs: a syntax highlighter for Python, byte by byte, trained and pruned."""
