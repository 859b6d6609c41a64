"""SparseConvDepthwise: contract, and inside ONNX Runtime with the library and on its function bodies."""

import numpy as np
import onnx
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
from sparse_onnx.sparse_ops.ops import sparse_conv as sc
from sparse_onnx.sparse_ops.ops import sparse_conv_depthwise as scd
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_conv import Window

NODE = "block.1/expand"
CHANNELS, OUTPUTS = 5, 22
LIMITS = (-0.5, 1.5)
RNG = np.random.default_rng(7)
BIAS = np.linspace(-1, 1, OUTPUTS, dtype=np.float32)
FILTER_BIAS = np.linspace(0.5, -0.5, OUTPUTS, dtype=np.float32)
POINTWISE, DEPTHWISE = Window((1, 1)), Window((3, 3), pads=(1, 1, 1, 1), group=OUTPUTS)


def pack(window):
    shape = (OUTPUTS, CHANNELS, *window.kernel_shape)
    rng = np.random.default_rng(1)
    dense = np.where(rng.random(shape) < 0.6, 0, rng.standard_normal(shape)).astype(np.float32)
    return CHUNKED_CSC.pack(sc.matrix_of(dense), chunk=16, block=8)


def filters_of(depthwise):
    shape = (OUTPUTS, *depthwise.kernel_shape)
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def model_of(
    op_type="SparseConvDepthwiseRelu",
    window=POINTWISE,
    depthwise=DEPTHWISE,
    *,
    opset=17,
    x_shape=("batch", CHANNELS, "height", "width"),
    arrays=None,
    attributes=None,
    with_body=True,
):
    packed = pack(window)
    filters = filters_of(depthwise).reshape(-1)
    stored = {
        **packed.arrays(),
        "bias": BIAS,
        "filters": filters,
        "filter_bias": FILTER_BIAS,
        **(arrays or {}),
    }
    wanted = {key: value for key, value in window.attributes().items() if key != "group"}
    wanted |= {scd.PREFIX + key: value for key, value in depthwise.attributes().items() if key != "group"}
    wanted |= {**packed.attributes(), "mask_structure": "unstructured"}
    if scd.OP_TYPES[op_type] == "clip":
        wanted["min"], wanted["max"] = LIMITS
    wanted |= attributes or {}
    node = onnx.helper.make_node(op_type, ["X", *stored], ["Y"], name=NODE, domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in wanted.items() if v is not None)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [info("X", onnx.TensorProto.FLOAT, x_shape)],
        [info("Y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[OP_TYPES[op_type].function_body(opset)] if with_body else [],
    )


def images(batch=2, height=9, width=10):
    return RNG.standard_normal((batch, CHANNELS, height, width)).astype(np.float32)


def expected(x, op_type="SparseConvDepthwiseRelu", window=POINTWISE, depthwise=DEPTHWISE):
    return scd.reference(
        x, pack(window), BIAS, window, filters_of(depthwise), FILTER_BIAS, depthwise, scd.OP_TYPES[op_type],
        limits=LIMITS,
    )  # fmt: skip


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op_type", scd.OP_TYPES)
def test_library_and_body_compute_the_reference(op_type, threads, open_session):
    x = images()
    for library in (True, False):
        (got,) = open_session(model_of(op_type), library=library, threads=threads).run(None, {"X": x})
        assert_close(got, expected(x, op_type))


@pytest.mark.parametrize("opset", [13, 14, 18, 20, 22, 26])
@pytest.mark.parametrize("op_type", scd.OP_TYPES)
def test_body_of_every_opset(op_type, opset, open_session):
    x = images()
    (got,) = open_session(model_of(op_type, opset=opset), library=False).run(None, {"X": x})
    assert_close(got, expected(x, op_type))


WINDOWS = {
    "stride of both": (Window((1, 1), strides=(2, 1)), Window((3, 3), strides=(1, 2), group=OUTPUTS)),
    "stem": (
        Window((3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        Window((3, 3), pads=(1, 1, 1, 1), group=OUTPUTS),
    ),
    "5x5, stride": (POINTWISE, Window((5, 5), strides=(2, 2), pads=(2, 2, 2, 2), group=OUTPUTS)),
    "uneven": (Window((2, 1), pads=(0, 0, 1, 0)), Window((3, 2), pads=(0, 1, 3, 0), group=OUTPUTS)),
    "dilation": (POINTWISE, Window((3, 3), dilations=(2, 3), pads=(2, 3, 2, 3), group=OUTPUTS)),
    "1x1": (POINTWISE, Window((1, 1), strides=(3, 3), group=OUTPUTS)),
}
ROWS = {
    "3": (Window((1,), (1,), (0, 0), (1,)), Window((3,), (1,), (1, 1), (1,), OUTPUTS)),
    "stem": (Window((3,), (2,), (1, 1), (1,)), Window((5,), (2,), (0, 3), (1,), OUTPUTS)),
    "dilation": (Window((1,), (2,), (0, 0), (1,)), Window((3,), (1,), (4, 2), (3,), OUTPUTS)),
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("op_type", scd.OP_TYPES)
@pytest.mark.parametrize("case", ROWS)
def test_one_axis(case, op_type, library, open_session):
    window, depthwise = ROWS[case]
    model = model_of(op_type, window, depthwise, x_shape=("batch", CHANNELS, "width"))
    for batch, width in ((3, 41), (1, 300)):
        x = RNG.standard_normal((batch, CHANNELS, width)).astype(np.float32)
        session = open_session(model, library=library)
        assert len(session.get_outputs()[0].shape) == 3
        (got,) = session.run(None, {"X": x})
        assert_close(got, expected(x, op_type, window=window, depthwise=depthwise))


def test_windows_of_different_axes_are_refused(open_session):
    wrong = {"depthwise_kernel_shape": [3], "depthwise_strides": [1], "depthwise_pads": [1, 1]}
    with pytest.raises(Exception, match=rf"node '{NODE}'.*differ in length"):
        open_session(model_of(attributes={**wrong, "depthwise_dilations": [1]}, with_body=False))


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, library, open_session):
    window, depthwise = WINDOWS[case]
    x = images(3, 11, 8)
    (got,) = open_session(model_of(window=window, depthwise=depthwise), library=library).run(None, {"X": x})
    assert_close(got, expected(x, window=window, depthwise=depthwise))


@pytest.mark.parametrize("size", [(0, 5, 5), (1, 1, 1), (5, 7, 7), (8, 14, 14), (1, 112, 96), (1, 3, 200)])
def test_sizes_and_batches(size, open_session):
    x = images(*size)
    (got,) = open_session(model_of()).run(None, {"X": x})
    assert_close(got, expected(x))


def test_output_shape_is_inferred(open_session):
    depthwise = Window((3, 3), strides=(2, 2), pads=(1, 1, 1, 1), group=OUTPUTS)
    session = open_session(model_of(depthwise=depthwise, x_shape=["batch", CHANNELS, 9, 12]))
    (output,) = session.get_outputs()
    assert output.shape == ["batch", OUTPUTS, 5, 6]


@pytest.mark.parametrize("shape", [(1, CHANNELS + 1, 5, 5), (1, CHANNELS, 5), ()])
def test_wrong_input_fails_that_run_only(shape, open_session):
    session = open_session(model_of(x_shape=None))
    with pytest.raises(Exception, match=rf"{NODE}.*input X has shape .*expected \[batch, {CHANNELS}, height"):
        session.run(None, {"X": np.ones(shape, np.float32)})
    x = images()
    assert_close(session.run(None, {"X": x})[0], expected(x))


def test_windows_that_do_not_fit_fail_that_run_only(open_session):
    depthwise = Window((5, 3), group=OUTPUTS)
    session = open_session(model_of(depthwise=depthwise))
    with pytest.raises(Exception, match=rf"{NODE}.*the windows do not fit"):
        session.run(None, {"X": images(1, 4, 9)})
    x = images(1, 5, 9)
    assert_close(session.run(None, {"X": x})[0], expected(x, depthwise=depthwise))


HOSTILE = {
    "depthwise window missing": ({"depthwise_kernel_shape": None}, {}, "depthwise_kernel_shape is missing"),
    "depthwise strides zero": ({"depthwise_strides": [0, 1]}, {}, r"depthwise_strides is \[0, 1\], expected 2"),
    "depthwise pads of two": ({"depthwise_pads": [1, 1]}, {}, "depthwise_pads is .* expected 4 numbers"),
    "window huge": ({"depthwise_kernel_shape": [2**24, 2**24]}, {}, "filters has 198 elements, expected"),
    "first window": ({"kernel_shape": [3, 1]}, {}, "K is 5, no multiple of the 3 elements"),
    "too few filters": ({}, {"filters": np.zeros(9, np.float32)}, "filters has 9 elements, expected 198"),
    "too little bias": ({}, {"filter_bias": np.zeros(3, np.float32)}, "filter_bias has 3 elements, expected 22"),
    "filters of another rank": ({}, {"filters": np.zeros((22, 9), np.float32)}, "filters has a wrong element"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_nodes_are_refused_by_name(case, open_session):
    attributes, arrays, message = HOSTILE[case]
    with pytest.raises(Exception, match=rf"node '{NODE}' \(SparseConvDepthwiseRelu\): .*{message}"):
        open_session(model_of(attributes=attributes, arrays=arrays, with_body=False))


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (None, 1.0)])
def test_limits_of_a_clip_are_checked(low, high, open_session):
    with pytest.raises(Exception, match=r"\(SparseConvDepthwiseClip\): attribute min is"):
        open_session(
            model_of("SparseConvDepthwiseClip", attributes={"min": low, "max": high}, with_body=False)
        )


def test_many_threads_agree_with_one(open_session):
    x = images(3, 40, 41)
    one, *others = [open_session(model_of(), threads=threads).run(None, {"X": x})[0] for threads in (1, 2, 4)]
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_not_a_number_passes_through(open_session):
    x = images()
    x[1, 2, 4, 5] = np.nan
    (got,) = open_session(model_of()).run(None, {"X": x})
    reached = sc.unpack_filters(pack(POINTWISE), POINTWISE)[:, 2, 0, 0] != 0
    np.testing.assert_array_equal(np.isnan(got[1, :, 3:6, 4:7]).all((1, 2)), reached)
    assert np.isnan(got).sum() == 9 * reached.sum()
