"""How commands take models: an ``.onnx`` file, or an output folder of ``sparse-onnx optimize``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_file"]


def model_file(path: Path) -> Path:
    """The file that ``path`` means: ``model.onnx`` inside an output folder, else the path itself."""
    inside = path / "model.onnx"
    return inside if inside.is_file() else path
