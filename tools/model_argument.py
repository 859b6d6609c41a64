"""How commands take models: an ``.onnx`` file, an output folder of ``sparse-onnx optimize``, or a GenAI folder."""

from __future__ import annotations

from pathlib import Path

from sparse_onnx.model.genai import CONFIG, decoder_file

__all__ = ["model_file"]


def model_file(path: Path) -> Path:
    """The file that ``path`` means: the decoder of a GenAI folder, ``model.onnx`` inside an output folder, else the
    path itself."""
    if path.is_dir() and (path / CONFIG).is_file():
        return decoder_file(path)
    inside = path / "model.onnx"
    return inside if inside.is_file() else path
