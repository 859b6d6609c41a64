"""SparseConv's contract: packing filters, the reference, and the operator's body in standard ops."""

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, block_size
from sparse_onnx.sparse_ops.ops import sparse_conv as sc
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_conv import Window

RNG = np.random.default_rng(3)

WINDOWS = {
    "1x1": (Window((1, 1)), (5, 8)),
    "3x3": (Window((3, 3), pads=(1, 1, 1, 1)), (4, 6)),
    "stride": (Window((3, 3), strides=(2, 3), pads=(1, 1, 1, 1)), (4, 6)),
    "stride of 1x1": (Window((1, 1), strides=(2, 2)), (4, 6)),
    "dilation": (Window((3, 2), dilations=(2, 3), pads=(2, 1, 0, 3)), (4, 6)),
    "uneven": (Window((1, 4), pads=(0, 3, 0, 1)), (3, 2)),
    "groups": (Window((3, 3), pads=(1, 1, 1, 1), group=3), (6, 9)),
    "groups, 1x1": (Window((1, 1), group=2), (6, 10)),
    "depthwise": (Window((3, 3), group=4), (4, 8)),
    "one axis": (Window((5,), (2,), (1, 3), (2,)), (4, 6)),
    "one axis, groups": (Window((3,), (1,), (0, 0), (1,), group=2), (6, 10)),
}
every_window = pytest.mark.parametrize("case", WINDOWS)


def filters_of(window: Window, channels: int, outputs: int) -> np.ndarray:
    shape = (outputs, channels // window.group, *window.kernel_shape)
    return np.where(RNG.random(shape) < 0.6, 0, RNG.standard_normal(shape)).astype(np.float32)


def onnx_conv(x, filters, bias, window):
    """What ONNX Runtime's own Conv computes."""
    attributes = {name: value for name, value in window.attributes().items() if name != "kernel_shape"}
    node = onnx.helper.make_node("Conv", ["X", "W", "B"], ["Y"], **attributes)
    info = onnx.helper.make_tensor_value_info
    inputs = {"X": x, "W": filters, "B": bias}
    graph = onnx.helper.make_graph(
        [node],
        "conv",
        [info(name, onnx.TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [info("Y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 17)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@every_window
def test_filters_survive_packing(case):
    window, (channels, outputs) = WINDOWS[case]
    filters = filters_of(window, channels, outputs)
    packed = CHUNKED_CSC.pack(sc.matrix_of(filters), sc.outputs_of(len(filters), window.group), block=4)
    assert (filters[0].size, outputs) == (packed.K, packed.N)
    np.testing.assert_array_equal(sc.unpack_filters(packed, window), filters)
    if window.group > 1:
        assert outputs // window.group % packed.block == 0


@every_window
def test_reference_is_the_convolution_of_the_standard(case):
    window, (channels, outputs) = WINDOWS[case]
    filters = filters_of(window, channels, outputs)
    sizes = (9, 10)[-len(window.kernel_shape) :]
    x = RNG.standard_normal((2, channels, *sizes)).astype(np.float32)
    bias = RNG.standard_normal(outputs).astype(np.float32)
    got = sc.reference(
        x, CHUNKED_CSC.pack(sc.matrix_of(filters), sc.outputs_of(len(filters), window.group)), bias, window
    )
    expected = onnx_conv(x, filters, bias, window)
    assert got.shape == (2, outputs, *window.output_size(*sizes)) == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "limits", "expected"),
    [
        ("none", (0, 0), [-4, -1, 0, 1, 4]),
        ("relu", (0, 0), [0, 0, 0, 1, 4]),
        ("clip", (-1.5, 2), [-1.5, -1, 0, 1, 2]),
        ("silu", (0, 0), [-4 / (1 + np.e**4), -1 / (1 + np.e), 0, np.e / (1 + np.e), 4 / (1 + np.e**-4)]),
        ("hard_swish", (0, 0), [0, -1 / 3, 0, 2 / 3, 4]),
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_activations_of_the_reference(activation, limits, expected, residual):
    packed = CHUNKED_CSC.pack(sc.matrix_of(np.ones((1, 1, 1, 1), np.float32)), sc.outputs_of(1))
    h = np.array([-4, -1, 0, 1, 4], np.float32).reshape(1, 1, 1, 5)
    x, r = (h - 1, np.ones_like(h)) if residual else (h, None)
    got = sc.reference(
        x, packed, np.zeros(1, np.float32), Window((1, 1)), activation, residual=r, limits=limits
    )
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("N", "group", "block"), [(64, 1, 64), (6, 2, 3), (130, 1, 64), (256, 2, 64), (202, 2, 1), (12, 12, 1)]
)
def test_block_never_straddles_groups(N, group, block):
    assert block_size(N, sc.outputs_of(N, group)) == block


def test_output_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 output channels cannot be cut into 2 groups"):
        sc.outputs_of(5, 2)


@pytest.mark.parametrize(
    "attributes",
    [((3,),), ((3, 3, 3), (1, 1, 1), (0,) * 6, (1, 1, 1)), ((3, 3), (1,)), ((3,), (1,), (0,), (1,))],
)
def test_windows_of_other_axes_are_no_windows(attributes):
    with pytest.raises(ValueError, match="one axis or two"):
        Window(*attributes)


def test_window_that_does_not_fit():
    assert Window((3, 3)).output_size(2, 3) == (0, 1)
    assert Window((3, 3), dilations=(2, 1)).output_size(4, 4) == (0, 2)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 21, 22, 26])
@pytest.mark.parametrize("op_type", sc.OP_TYPES)
def test_body_is_a_valid_function(op_type, opset):
    body = OP_TYPES[op_type].function_body(opset)
    activation, residual = sc.OP_TYPES[op_type]
    assert body.name == op_type == sc.operator_name(activation, residual)
    assert body.domain == DOMAIN
    assert ("R" in body.input) == residual == op_type.startswith("SparseConvAdd")
    assert ("min" in body.attribute) == (activation == "clip")
    assert {node.domain for node in body.node} == {""}
