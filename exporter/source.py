"""Where a model comes from: a file, an output folder, a folder of onnxruntime-genai, or one of Hugging Face, which is
exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparse_onnx.model import model_io
from sparse_onnx.model.genai import decoder_file, genai_folder

__all__ = ["source_file"]


def source_file(source: Path, work: Path, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """The ONNX file that ``source`` is or, as an output folder or a GenAI folder, holds; or what the Hugging Face
    folder ``source`` was exported to, inside ``work``."""
    if source.is_dir() and genai_folder(source) is not None:
        return decoder_file(source)
    if (source / "config.json").is_file() or (source.is_dir() and not any(source.glob("*.onnx"))):
        from sparse_onnx.exporter import export_huggingface

        exported = work / "exported"
        exported.mkdir()
        model_io.save_model(export_huggingface(source, progress=progress).model, exported)
        return exported / "model.onnx"
    inside = source / "model.onnx"
    return inside if inside.is_file() else source
