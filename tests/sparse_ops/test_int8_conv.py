"""Convolutions of bytes: how their filters are stored, and inside ONNX Runtime, with the library and on the function
bodies, against sums in 64 bits, integer by integer."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.int8_quads import MAX_INPUTS
from sparse_onnx.sparse_ops.ops import int8_conv
from sparse_onnx.sparse_ops.ops.int8_conv import MAX_BIAS, ByteGrids
from sparse_onnx.sparse_ops.ops.sparse_conv import Window

both_ways = pytest.mark.parametrize("library", [True, False])

SAME = Window((3, 3), pads=(1, 1, 1, 1))
UNSIGNED = ByteGrids(0.02, 7, 0, 0.9, 3, 0, 255)
SIGNED = ByteGrids(0.03, -9, -128, 1.1, -20, -20, 100)


def integers(*shape, kept=0.4, seed=0, most=127):
    rng = np.random.default_rng(seed)
    found = rng.integers(-most, most + 1, shape).astype(np.int8)
    return np.where(rng.random(shape) < kept, found, np.int8(0))


def scales(N, seed=1):
    return np.random.default_rng(seed).uniform(0.01, 0.03, N).astype(np.float32)


def biases(N, seed=2):
    return np.random.default_rng(seed).integers(-3000, 3000, N).astype(np.int32)


def images(*shape, signed=False, seed=3):
    found = np.random.default_rng(seed).integers(0, 256, shape)
    return (found - 128).astype(np.int8) if signed else found.astype(np.uint8)


@pytest.fixture
def conv_model(layer_model):
    """The operator as a model; ``attributes`` replace its own."""

    def make(
        weight, bias, window, grids, channels, *, signed=False, x_shape=None, attributes=None, **options
    ):
        proto = layer_model(
            weight,
            bias,
            int8_conv.op_type_of(signed),
            x_shape=None,
            attributes={
                "mask_structure": None,
                **window.attributes(),
                "channels": channels,
                **grids.attributes(),
                **(attributes or {}),
            },
            **options,
        )
        byte = onnx.TensorProto.INT8 if grids.x_lowest else onnx.TensorProto.UINT8
        proto.graph.input[0].CopyFrom(
            onnx.helper.make_tensor_value_info("X", byte, [None] * 4 if x_shape is None else x_shape)
        )
        proto.graph.output[0].type.tensor_type.elem_type = (
            onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
        )
        return proto

    return make


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 11), st.integers(1, 3), st.integers(1, 3)),
    kept=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    group=st.sampled_from([1, 1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_packed_is_unpacked_exactly(shape, kept, group):
    filters = integers(shape[0] * group, *shape[1:], kept=kept)
    weight = int8_conv.pack(filters, scales(len(filters)), group)
    weight.validate()
    assert group == 1 or shape[0] % weight.block == 0
    window = Window(shape[2:], group=group)
    np.testing.assert_array_equal(int8_conv.filters_of(weight, shape[1], window), filters)


def test_a_quad_is_four_channels_at_one_place():
    filters = np.zeros((3, 8, 3, 3), np.int8)
    filters[1, 4:8, 1, 2] = [1, 2, 3, 4]
    weight = int8_conv.pack(filters, scales(3))
    assert [1, 2, 3, 4] in weight.values.reshape(-1, 4).tolist()
    assert np.any(weight.values.reshape(-1, 4), axis=1).sum() == 1


@pytest.mark.parametrize("group", [0, 2])
def test_groups_are_of_equal_size(group):
    with pytest.raises(ValueError, match="cannot be cut into"):
        int8_conv.pack(integers(3, 4, 1, 1), scales(3), group)


def test_too_many_inputs_are_refused():
    with pytest.raises(ValueError, match=f"at most {MAX_INPUTS} inputs"):
        int8_conv.pack(np.ones((1, MAX_INPUTS + 1, 1, 1), np.int8), scales(1))


WINDOWS = {
    "pointwise": (Window((1, 1)), 12, 20),
    "same": (SAME, 8, 9),
    "padded channels": (SAME, 5, 7),
    "stride": (Window((3, 3), (2, 2), (1, 1, 1, 1)), 6, 8),
    "pointwise stride": (Window((1, 1), (2, 2)), 9, 5),
    "dilated": (Window((3, 2), (1, 2), (2, 0, 1, 3), (2, 1)), 4, 5),
    "groups": (Window((3, 3), pads=(1, 1, 1, 1), group=2), 6, 8),
    "one axis": (Window((3,), (2,), (1, 2), (2,)), 8, 9),
}


@both_ways
@pytest.mark.parametrize("grids", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("signed", [False, True], ids=["to unsigned", "to signed"])
@pytest.mark.parametrize("name", WINDOWS)
def test_sessions_compute_what_the_contract_says(name, signed, grids, library, conv_model, open_session):
    window, channels, N = WINDOWS[name]
    low = -128 if signed else 0
    grids = dataclasses.replace(grids, y_scale=0.15, y_zero_point=low + 40, y_low=low + 40, y_high=low + 250)
    weight, bias = (
        int8_conv.pack(integers(N, channels, *window.kernel_shape), scales(N), window.group),
        biases(N),
    )
    axes = len(window.kernel_shape)
    proto = conv_model(weight, bias, window, grids, channels, signed=signed, x_shape=[None] * (2 + axes))
    session = open_session(proto, library=library)
    for batch, sizes in ((1, (9, 11)), (3, (7, 7)), (2, (17, 5))):
        x = images(batch, channels * window.group, *sizes[:axes], signed=grids.x_lowest < 0)
        (y,) = session.run(None, {"X": x})
        expected = int8_conv.reference(x, weight, bias, window, grids)
        assert y.dtype == (np.int8 if signed else np.uint8)
        np.testing.assert_array_equal(y, expected)
        assert np.unique(expected).size > 10  # neither limit is all there is


def qdq_model(filters, weight_scales, bias, window, grids, x_type):
    """The layer as quantizers write it."""
    N = len(filters)
    byte = np.int8 if grids.x_lowest else np.uint8
    constants = {
        "xs": np.float32(grids.x_scale), "xz": byte(grids.x_zero_point),
        "ys": np.float32(grids.y_scale), "yz": byte(grids.y_zero_point),
        "w": filters, "ws": weight_scales, "wz": np.zeros(N, np.int8),
        "b": bias, "bs": weight_scales * np.float32(grids.x_scale),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("DequantizeLinear", ["X", "xs", "xz"], ["x"]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["W"], axis=0),
        make("DequantizeLinear", ["b", "bs"], ["B"], axis=0),
        make("Conv", ["x", "W", "B"], ["h"], **window.attributes()),
        make("QuantizeLinear", ["h", "ys", "yz"], ["Y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes, "qdq",
        [onnx.helper.make_tensor_value_info("X", x_type, [None] * 4)],
        [onnx.helper.make_tensor_value_info("Y", x_type, None)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])


@pytest.mark.parametrize("name", ["pointwise", "same", "stride", "groups"])
@pytest.mark.parametrize("grids", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_the_numbers_are_those_of_the_runtime(name, grids, conv_model, open_session):
    """Of its own convolution of integers, ties included: scales are powers of two."""
    window, channels, N = WINDOWS[name]
    low = grids.x_lowest
    grids = dataclasses.replace(
        grids, x_scale=2**-6, y_scale=0.5, y_zero_point=low + 11, y_low=low, y_high=low + 255
    )
    filters, bias = integers(N, channels, *window.kernel_shape, kept=0.5, most=60), biases(N)
    of_weight = (2.0 ** np.random.default_rng(0).integers(-7, -3, N)).astype(np.float32)
    x_type = onnx.TensorProto.INT8 if low else onnx.TensorProto.UINT8
    x = images(2, channels * window.group, 10, 9, signed=low < 0)
    theirs = open_session(qdq_model(filters, of_weight, bias, window, grids, x_type), library=False)
    ours = open_session(
        conv_model(
            int8_conv.pack(filters, of_weight, window.group), bias, window, grids, channels, signed=low < 0
        )
    )
    np.testing.assert_array_equal(ours.run(None, {"X": x})[0], theirs.run(None, {"X": x})[0])


@both_ways
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_every_opset_gives_the_same(opset, library, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    session = open_session(conv_model(weight, bias, SAME, UNSIGNED, 8, opset=opset), library=library)
    x = images(1, 8, 9, 9)
    np.testing.assert_array_equal(
        session.run(None, {"X": x})[0], int8_conv.reference(x, weight, bias, SAME, UNSIGNED)
    )


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
def test_every_instruction_set_gives_the_same(isa, conv_model, run_forced):
    weight, bias = int8_conv.pack(integers(30, 13, 3, 3, most=127), scales(30)), biases(30)
    x = images(2, 13, 12, 11)
    (found,) = run_forced(conv_model(weight, bias, SAME, UNSIGNED, 13), {"X": x}, isa)
    np.testing.assert_array_equal(found, int8_conv.reference(x, weight, bias, SAME, UNSIGNED))


def test_threads_give_the_same_bytes(conv_model, open_session):
    weight, bias = int8_conv.pack(integers(130, 40, 3, 3), scales(130)), biases(130)
    proto, x = conv_model(weight, bias, SAME, UNSIGNED, 40), images(2, 40, 30, 30)
    one, two, four = (open_session(proto, threads=n).run(None, {"X": x})[0] for n in (1, 2, 4))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, four)


@both_ways
def test_the_largest_sums_are_exact(library, conv_model, open_session):
    """Bytes of 255 times integers of 127: pairs of products are more than 16 bits hold."""
    window = Window((1, 1))
    filters = np.full((2, MAX_INPUTS, 1, 1), 127, np.int8)
    filters[1] = -127
    weight = int8_conv.pack(filters, np.array([1e-7, 2e-7], np.float32))
    bias = np.array([MAX_BIAS, -MAX_BIAS], np.int32)
    grids = dataclasses.replace(UNSIGNED, x_zero_point=0, x_scale=1.0, y_scale=1.0, y_zero_point=128)
    x = np.full((1, MAX_INPUTS, 1, 2), 255, np.uint8)
    x[..., 1] = 3
    session = open_session(conv_model(weight, bias, window, grids, MAX_INPUTS), library=library)
    expected = int8_conv.reference(x, weight, bias, window, grids)
    np.testing.assert_array_equal(session.run(None, {"X": x})[0], expected)


def test_the_node_is_ours_only_with_the_library(conv_model, open_session, tmp_path):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    kept = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(conv_model(weight, bias, SAME, UNSIGNED, 8), library=library, options=options)
        kept[library] = [node.op_type for node in onnx.load(tmp_path / f"{library}.onnx").graph.node]
    assert kept[True] == ["SparseInt8Conv"]
    assert "ConvInteger" in kept[False]
    assert not {"ScatterND", "CumSum", "Transpose"} & set(kept[False])  # what makes the weight is folded


def test_output_shapes_are_inferred(conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    window = Window((3, 3), (2, 2), (1, 1, 1, 1))
    proto = conv_model(weight, bias, window, UNSIGNED, 8, x_shape=["batch", 8, 9, "width"])
    (output,) = open_session(proto).get_outputs()
    assert output.shape[:3] == ["batch", 9, 5]
    assert output.type == "tensor(uint8)"


@pytest.mark.parametrize("shape", [(1, 9, 5, 5), (1, 8, 5), (8, 5, 5)])
def test_wrong_shapes_are_refused_by_name(shape, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    proto = conv_model(weight, bias, SAME, UNSIGNED, 8, x_shape=[None] * len(shape), with_body=False)
    with pytest.raises(Exception, match=r"\(SparseInt8Conv\): input X has shape .*, expected \[batch, 8, "):
        open_session(proto).run(None, {"X": images(*shape)})


def test_a_window_that_does_not_fit_is_refused(conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    proto = conv_model(weight, bias, Window((3, 3)), UNSIGNED, 8, with_body=False)
    with pytest.raises(Exception, match="the window of kernel_shape does not fit"):
        open_session(proto).run(None, {"X": images(1, 8, 2, 2)})


def test_bytes_of_the_other_sign_are_refused(conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    proto = conv_model(weight, bias, SAME, UNSIGNED, 8, with_body=False)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT8
    with pytest.raises(Exception, match="input X is int8, unlike attribute x_lowest"):
        open_session(proto).run(None, {"X": images(1, 8, 5, 5, signed=True)})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"format": "newer"}, "attribute format is 'newer'"),
        ({"group": 0}, "attribute group is 0"),
        ({"group": 2}, "does not make 2 groups"),
        ({"channels": 0}, "attribute channels is 0"),
        ({"channels": 4}, "attribute K is 72, expected 9 taps of 4 channels"),
        ({"channels": 9}, "attribute K is 72, expected 9 taps of 9 channels"),
        ({"channels": 7}, "weights of channels that are not there"),
        ({"kernel_shape": (3, 2)}, "attribute K is 72, expected 6 taps"),
        ({"kernel_shape": (1 << 24, 1 << 24)}, "attribute K is 72"),
        ({"pads": (1, 1, 1)}, "attribute pads"),
        ({"K": 71}, "attribute K is 71"),
        ({"N": 10}, "elements, expected"),
        ({"chunk": 0}, "attribute chunk"),
        ({"block": 257}, "attribute block"),
        ({"x_lowest": 1}, "attribute x_lowest"),
        ({"x_zero_point": -1}, "attribute x_zero_point is -1, expected 0..255"),
        ({"y_zero_point": 256}, "attribute y_zero_point is 256"),
        ({"y_low": -1}, "attribute y_low is -1"),
        ({"y_low": 9, "y_high": 8}, "attribute y_high is 8, expected 9..255"),
        ({"x_scale": 0.0}, "no finite number above 0"),
        ({"y_scale": 0.0}, "no finite number above 0"),
        ({"y_scale": float("nan")}, "no finite number above 0"),
        ({"x_scale": -1.0}, "no finite number above 0"),
    ],
)
def test_wrong_attributes_are_refused(attributes, message, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3, kept=1.0), scales(9)), biases(9)
    proto = conv_model(weight, bias, SAME, UNSIGNED, 8, attributes=attributes, with_body=False)
    with pytest.raises(Exception, match=rf"\(SparseInt8Conv\): .*{message}"):
        open_session(proto)


@pytest.mark.parametrize("value", [MAX_BIAS + 1, -MAX_BIAS - 1, -(2**31)])
def test_a_bias_that_leaves_32_bits_is_refused(value, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    bias[4] = value
    proto = conv_model(weight, bias, SAME, UNSIGNED, 8, with_body=False)
    with pytest.raises(Exception, match=rf"bias\[4\] is {value}, expected at most {MAX_BIAS}"):
        open_session(proto)


@pytest.mark.parametrize("name", ["values", "offsets", "counts", "rows", "scales", "bias"])
def test_arrays_that_are_cut_are_refused(name, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    array = {**weight.arrays(), "bias": bias}[name][:-1]
    proto = conv_model(weight, bias, SAME, UNSIGNED, 8, arrays={name: array}, with_body=False)
    with pytest.raises(Exception, match=rf"\(SparseInt8Conv\): .*(?:{name}|values)"):
        open_session(proto)


@pytest.mark.parametrize("opset", [13, 18, 26])
@pytest.mark.parametrize("op_type", int8_conv.OP_TYPES)
def test_bodies_are_well_formed(op_type, opset):
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = {"": opset, DOMAIN: VERSION}
    body = int8_conv.function_body(op_type, opset)
    onnx.checker.check_function(body, context)
    made = [name for node in body.node for name in node.output]
    assert len(made) == len(set(made))  # the checker does not look


def test_the_reference_follows_from_the_formulas():
    """One position by hand: padding counts as the zero point."""
    filters = np.zeros((1, 1, 1, 3), np.int8)
    filters[0, 0, 0] = [2, -3, 4]
    window = Window((1, 3), pads=(0, 1, 0, 1))
    weight = int8_conv.pack(filters, np.array([0.5], np.float32))
    grids = ByteGrids(0.5, 10, 0, 0.25, 100, 0, 255)
    x = np.array([[[[13, 9]]]], np.uint8)
    sums = np.array([2 * 0 - 3 * 3 + 4 * -1, 2 * 3 - 3 * -1 + 4 * 0]) + 6
    expected = np.clip(sums * 0.5 * 0.5 / 0.25 + 100, 0, 255)
    found = int8_conv.reference(x, weight, np.array([6], np.int32), window, grids)
    np.testing.assert_array_equal(found.ravel(), expected)


@both_ways
def test_an_empty_batch(library, conv_model, open_session):
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    session = open_session(conv_model(weight, bias, SAME, UNSIGNED, 8), library=library)
    (y,) = session.run(None, {"X": images(0, 8, 5, 6)})
    assert (y.shape, y.dtype) == ((0, 9, 5, 6), np.uint8)


@both_ways
def test_all_that_is_seen_may_be_padding(library, conv_model, open_session):
    """Padding is the zero point: the bias is what is left."""
    weight, bias = int8_conv.pack(integers(9, 8, 3, 3), scales(9)), biases(9)
    window = Window((3, 3), (1, 1), (9, 9, 9, 9))
    session = open_session(conv_model(weight, bias, window, UNSIGNED, 8), library=library)
    x = images(1, 8, 2, 2)
    (y,) = session.run(None, {"X": x})
    np.testing.assert_array_equal(y, int8_conv.reference(x, weight, bias, window, UNSIGNED))
    assert np.unique(y[0, :, 0, 0]).size > 1
