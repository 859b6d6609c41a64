"""The usual grids: their options, and bytes by arithmetic against what the pass writes."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.passes.quantize.weight import QuantizeWeights


@pytest.mark.parametrize(
    ("bits", "given", "expected"),
    [
        (8, None, (8, 0, True)),
        (7, None, (7, 0, True)),
        (4, None, (4, 64, False)),
        (3, None, (3, 64, False)),
        (2, 32, (2, 32, False)),
        (8, 128, (8, 128, True)),
        (4, 0, (4, 0, False)),
    ],
)
def test_few_bits_have_groups_and_zero_points(bits, given, expected):
    assert usual_grid(bits, given) == expected


@pytest.mark.parametrize("bits", [8, 7, 4, 3, 2])
@pytest.mark.parametrize("group_size", [None, 0, 32, 48])
@pytest.mark.parametrize("shape", [(128, 24), (130, 7), (64, 1)])
def test_bytes_are_those_that_the_pass_writes(bits, group_size, shape):
    inputs, outputs = shape
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {inputs}] X) => (float[batch, {outputs}] Y) {{ Y = MatMul(X, W) }}"""
    )
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    grid = usual_grid(bits, group_size)
    done = QuantizeWeights(method="rtn", **grid._asdict())(ir.from_proto(proto))
    assert grid.nbytes(shape) == done.statistics["bytes"]
