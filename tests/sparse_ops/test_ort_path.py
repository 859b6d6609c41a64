"""Paths of any bytes reach ONNX Runtime, in any locale."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.sparse_ops import native_path

ODD = os.fsdecode(b"Mod\xe8le")  # Latin-1
NAMES = ["plain", "Mod\u00e8le \u6a21\u578b", ODD]


def write(folder: Path, name: str) -> Path:
    """x + w, with w in a file of its own."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512])],
        [numpy_helper.from_array(np.arange(512, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(exist_ok=True)
    onnx.save(
        model, str(folder / "first.onnx"), save_as_external_data=True, location="w.data", size_threshold=0
    )
    return (folder / "first.onnx").rename(folder / f"{name}.onnx")


@pytest.mark.parametrize("folder", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_opens_it(tmp_path: Path, folder: str, name: str) -> None:
    path = write(tmp_path / "writable", name)
    path = path.parent.rename(tmp_path / folder) / path.name
    with native_path(path) as native:
        native.encode("utf-8")
        session = ort.InferenceSession(native, providers=["CPUExecutionProvider"])
        links = Path(native).parent
    x = np.ones(512, np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.arange(512) + x)
    assert (links == path.parent) or not links.exists()
    again = sparse_onnx.InferenceSession(path).run(None, {"x": x})[0]
    np.testing.assert_array_equal(again, np.arange(512) + x)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_can_be_written_to(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with native_path(tmp_path / name) as native:
        Path(native, "written").write_text("x")
    assert (tmp_path / name / "written").read_text() == "x"
