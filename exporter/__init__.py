"""PyTorch modules and Hugging Face checkpoints to ONNX."""

from __future__ import annotations

from sparse_onnx.exporter._pipeline import ExportResult
from sparse_onnx.exporter.huggingface import export_huggingface
from sparse_onnx.exporter.torch_module import export_torch

__all__ = ["ExportResult", "export_huggingface", "export_torch"]
