"""A small sparse model, computed by ONNX Runtime with the kernel library and without it, and by NumPy.

``python -m sparse_onnx.running.self_test`` prints one JSON line for each way; ``sparse-onnx doctor`` runs it like
that, so that a library that takes the process down is found out and reported. With ``--while-stdin-is-open`` the
process ends when its standard input does: whoever started it is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sparse_onnx.errors import SparseOnnxError
from sparse_onnx.model import model_io
from sparse_onnx.running.runtime import open_session
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import Packed
from sparse_onnx.sparse_ops.formats.registry import SPARSE_FORMAT
from sparse_onnx.sparse_ops.ops import sparse_matmul
from sparse_onnx.sparse_ops.ops.base import BIAS
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["MAX_ERROR", "self_test"]

MAX_ERROR = 1e-5
"""Largest relative error that passes: float32 sums of a few dozen products."""

_OPERATOR, _ROWS, _K, _N = "SparseMatMulGelu", 19, 131, 67


def self_test(*, library: bool) -> float:
    """The relative error of a sparse layer, run with the library or on standard operators, against NumPy.

    Raises HostError or UsageError if ONNX Runtime or the library cannot be used.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_K, _N)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.8] = 0
    bias = rng.standard_normal(_N).astype(np.float32)
    x = rng.standard_normal((_ROWS, _K)).astype(np.float32)
    packed = SPARSE_FORMAT.pack(weight)
    expected = sparse_matmul.reference(x, packed, bias, sparse_matmul.ACTIVATIONS[_OPERATOR])
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        path = model_io.save_model(ir.from_proto(_model(packed, bias)), Path(folder))
        session = open_session(path, threads=1, library=library)
        (got,) = session.run(None, {"X": x})
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _model(packed: Packed, bias: np.ndarray) -> onnx.ModelProto:
    op_type, arrays = SPARSE_FORMAT.op_type(_OPERATOR), {**packed.arrays(), BIAS: bias}
    node = onnx.helper.make_node(op_type, ["X", *arrays], ["Y"], domain=DOMAIN)
    attributes = {**packed.attributes(), "mask_structure": "unstructured"}
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    graph = onnx.helper.make_graph(
        [node],
        "self_test",
        [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["rows", _K])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["rows", _N])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = 20
    return onnx.helper.make_model(
        graph,
        ir_version=9,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        functions=[OP_TYPES[op_type].function_body(opset)],
    )


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _main() -> None:
    if "--while-stdin-is-open" in sys.argv[1:]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    for library in (False, True):
        line: dict[str, object] = {"library": library}
        try:
            line["relative_error"] = self_test(library=library)
        except SparseOnnxError as error:
            line["error"] = str(error)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _main()
