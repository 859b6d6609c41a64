"""Sessions that open one after the other need no more memory than the first."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

PEAKS = """
import sys
from pathlib import Path
from sparse_onnx.running.heap import give_back_memory
from sparse_onnx.running.host import peak_rss_bytes
from sparse_onnx.running.runtime import open_session
for _ in range(6):
    session = open_session(Path(sys.argv[1]), threads=1, library=False)
    del session
    give_back_memory()
    print(peak_rss_bytes())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no such heap")
def test_the_peak_of_opening_does_not_creep(tmp_path: Path) -> None:
    size, layers = 2048, 6  # blocks of 16 MB: below what glibc puts apart once it has seen some of them go
    nodes = []
    for index in range(layers):
        weight = numpy_helper.from_array(np.full((size, size), index, np.float32), f"w{index}")
        nodes.append(helper.make_node("Constant", [], [f"w{index}"], value=weight))
        nodes.append(helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"]))
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    done = subprocess.run([sys.executable, "-c", PEAKS, path], capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    assert last - first < 0.1 * path.stat().st_size, done.stdout
