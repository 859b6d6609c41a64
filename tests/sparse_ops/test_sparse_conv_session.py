"""SparseConv inside ONNX Runtime, with the library and on its function bodies."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, PackedWeight
from sparse_onnx.sparse_ops.ops import sparse_conv as sc
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES
from sparse_onnx.sparse_ops.ops.sparse_conv import Window

NODE = "stage.2/conv"
CHANNELS, OUTPUTS = 6, 20
WINDOW = Window((3, 3), pads=(1, 1, 1, 1))
LIMITS = (-0.5, 1.5)
RNG = np.random.default_rng(5)
BIAS = np.linspace(-2, 2, OUTPUTS, dtype=np.float32)


def filters_of(window: Window, channels: int = CHANNELS) -> np.ndarray:
    shape = (OUTPUTS, channels // window.group, *window.kernel_shape)
    rng = np.random.default_rng(1)
    return np.where(rng.random(shape) < 0.7, 0, rng.standard_normal(shape)).astype(np.float32)


def pack(window: Window, channels: int = CHANNELS) -> PackedWeight:
    filters = filters_of(window, channels)
    outputs = sc.outputs_of(len(filters), window.group)
    return CHUNKED_CSC.pack(sc.matrix_of(filters), outputs, chunk=16, block=8)


def model_of(
    window=WINDOW,
    op_type="SparseConv",
    *,
    channels=CHANNELS,
    opset=17,
    x_shape=("batch", CHANNELS, "height", "width"),
    r_shape=None,
    arrays=None,
    attributes=None,
    with_body=True,
):
    """One layer, node name NODE. ``arrays`` and ``attributes`` replace those that belong there (None: left out)."""
    packed = pack(window, channels)
    activation, residual = sc.OP_TYPES[op_type]
    stored = {**packed.arrays(), "bias": BIAS, **(arrays or {})}
    wanted = {**window.attributes(), **packed.attributes(), "mask_structure": "unstructured"}
    if activation == "clip":
        wanted["min"], wanted["max"] = LIMITS
    wanted |= attributes or {}
    names = ["X", *stored, *(["R"] if residual else [])]
    node = onnx.helper.make_node(op_type, names, ["Y"], name=NODE, domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in wanted.items() if v is not None)
    info = onnx.helper.make_tensor_value_info
    inputs = [info("X", onnx.TensorProto.FLOAT, x_shape)]
    if residual:
        inputs.append(info("R", onnx.TensorProto.FLOAT, r_shape))
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        inputs,
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


def expected(x, window=WINDOW, op_type="SparseConv", residual=None, channels=CHANNELS):
    return sc.reference(
        x, pack(window, channels), BIAS, window, sc.OP_TYPES[op_type][0], residual=residual, limits=LIMITS
    )


def feeds_of(x, op_type, window=WINDOW):
    feeds = {"X": x}
    if sc.OP_TYPES[op_type][1]:
        shape = (len(x), OUTPUTS, *window.output_size(*x.shape[2:]))
        feeds["R"] = RNG.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op_type", sc.OP_TYPES)
def test_library_and_body_compute_the_reference(op_type, threads, open_session):
    model = model_of(op_type=op_type)
    feeds = feeds_of(images(), op_type)
    want = expected(feeds["X"], op_type=op_type, residual=feeds.get("R"))
    for library in (True, False):
        (got,) = open_session(model, library=library, threads=threads).run(None, feeds)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("opset", [13, 14, 18, 20, 22, 26])
@pytest.mark.parametrize("op_type", ["SparseConvHardSwish", "SparseConvAddClip", "SparseConvAddSilu"])
def test_body_of_every_opset(op_type, opset, open_session):
    feeds = feeds_of(images(), op_type)
    (got,) = open_session(model_of(op_type=op_type, opset=opset), library=False).run(None, feeds)
    want = expected(feeds["X"], op_type=op_type, residual=feeds.get("R"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)


WINDOWS = {
    "1x1": Window((1, 1)),
    "1x1, stride": Window((1, 1), strides=(2, 3)),
    "5x3, uneven pads": Window((5, 3), pads=(0, 1, 3, 2)),
    "dilation": Window((3, 3), dilations=(2, 3), pads=(2, 3, 2, 3)),
    "groups": Window((3, 3), pads=(1, 1, 1, 1), group=2),
    "stride and groups": Window((3, 3), strides=(2, 2), pads=(1, 1, 1, 1), group=2),
}


def row(kernel, stride=1, pads=(0, 0), dilation=1, group=1):
    """A window of one axis."""
    return Window((kernel,), (stride,), pads, (dilation,), group)


ROWS = {
    "1": row(1),
    "1, stride": row(1, 3),
    "5, uneven pads": row(5, pads=(0, 3)),
    "longer than the input, but for its pads": row(41, pads=(20, 20)),
    "dilation": row(3, pads=(4, 2), dilation=3),
    "groups": row(3, pads=(1, 1), group=2),
    "stride and groups": row(4, 2, (1, 2), group=2),
}


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    "op_type", ["SparseConv", "SparseConvRelu", "SparseConvAddClip", "SparseConvAddSilu"]
)
@pytest.mark.parametrize("case", ROWS)
def test_one_axis(case, op_type, library, open_session):
    window = ROWS[case]
    for batch, width in ((2, 37), (1, 200), (0, 37)):
        feeds = feeds_of(RNG.standard_normal((batch, CHANNELS, width)).astype(np.float32), op_type, window)
        model = model_of(
            window, op_type, x_shape=("batch", CHANNELS, "width"), r_shape=("batch", OUTPUTS, None)
        )
        want = expected(feeds["X"], window, op_type, feeds.get("R"))
        for threads in (1, 2):
            (got,) = open_session(model, library=library, threads=threads).run(None, feeds)
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


def test_one_axis_is_an_image_of_one_row(open_session):
    """To the last bit."""
    window = row(5, 2, (2, 1))
    x = RNG.standard_normal((3, CHANNELS, 90)).astype(np.float32)
    (got,) = open_session(model_of(window, x_shape=("batch", CHANNELS, "width"))).run(None, {"X": x})
    image = Window((1, 5), (1, 2), (0, 2, 0, 1))
    (want,) = open_session(model_of(image)).run(None, {"X": x[:, :, None]})
    np.testing.assert_array_equal(got, want[:, :, 0])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "neon"])
def test_one_axis_on_every_instruction_set(isa, run_forced):
    window = row(5, 2, (2, 1))
    x = RNG.standard_normal((3, CHANNELS, 90)).astype(np.float32)
    (got,) = run_forced(model_of(window, x_shape=("batch", CHANNELS, "width")), {"X": x}, isa)
    np.testing.assert_allclose(got, expected(x, window), rtol=1e-5, atol=5e-5)


def test_output_shape_of_one_axis_is_inferred(open_session):
    session = open_session(model_of(row(5, 2, (2, 1)), x_shape=("batch", CHANNELS, 90)))
    assert session.get_outputs()[0].shape == ["batch", OUTPUTS, 45]


def test_depthwise_of_one_axis(open_session):
    window = row(3, pads=(1, 1), group=OUTPUTS)
    x = RNG.standard_normal((2, OUTPUTS, 53)).astype(np.float32)
    model = model_of(window, channels=OUTPUTS, x_shape=("batch", OUTPUTS, "width"))
    for library in (True, False):
        (got,) = open_session(model, library=library).run(None, {"X": x})
        np.testing.assert_allclose(got, expected(x, window, channels=OUTPUTS), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("shape", [(1, CHANNELS, 5, 5), (1, CHANNELS), (1, CHANNELS + 1, 9)])
def test_wrong_input_of_one_axis_fails_that_run_only(shape, open_session):
    session = open_session(model_of(row(3), x_shape=None, with_body=False))
    with pytest.raises(Exception, match=rf"{NODE}.*expected \[batch, {CHANNELS}, width\]"):
        session.run(None, {"X": np.ones(shape, np.float32)})
    with pytest.raises(Exception, match=rf"{NODE}.*window of kernel_shape does not fit"):
        session.run(None, {"X": np.ones((1, CHANNELS, 2), np.float32)})
    x = RNG.standard_normal((1, CHANNELS, 9)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"X": x})[0], expected(x, row(3)), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kernel_shape": [3, 1]}, r"attribute strides is \[1\], expected 2 numbers"),
        ({"pads": [1, 1, 1, 1]}, "attribute pads is .* expected 2 numbers from 0"),
        ({"strides": [0]}, r"attribute strides is \[0\], expected 1 number from 1"),
        ({"kernel_shape": [1, 1, 1]}, r"attribute kernel_shape is \[1, 1, 1\], expected 2 numbers"),
        ({"kernel_shape": [4]}, "K is 18, no multiple of the 4"),
    ],
)
def test_hostile_attributes_of_one_axis(attributes, message, open_session):
    with pytest.raises(Exception, match=rf"node '{NODE}' \(SparseConv\): .*{message}"):
        open_session(
            model_of(row(3), x_shape=("batch", CHANNELS, "width"), attributes=attributes, with_body=False)
        )


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, library, open_session):
    window, x = WINDOWS[case], images(3, 7, 8)
    (got,) = open_session(model_of(window), library=library).run(None, {"X": x})
    np.testing.assert_allclose(got, expected(x, window), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("op_type", ["SparseConvClip", "SparseConvAddHardSwish"])
def test_depthwise(op_type, strides, open_session):
    window = Window((3, 3), strides=strides, pads=(1, 1, 1, 1), group=OUTPUTS)
    x = RNG.standard_normal((2, OUTPUTS, 15, 14)).astype(np.float32)
    feeds = feeds_of(x, op_type, window)
    model = model_of(window, op_type, channels=OUTPUTS, x_shape=("batch", OUTPUTS, "height", "width"))
    want = expected(x, window, op_type, feeds.get("R"), channels=OUTPUTS)
    for library in (True, False):
        (got,) = open_session(model, library=library, threads=2).run(None, feeds)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("size", [(0, 5, 5), (1, 1, 1), (5, 7, 7), (8, 14, 14), (1, 56, 3), (1, 3, 200)])
def test_sizes_and_batches(size, open_session):
    x = images(*size)
    (got,) = open_session(model_of()).run(None, {"X": x})
    np.testing.assert_allclose(got, expected(x), rtol=1e-5, atol=3e-5)


def test_body_is_folded_to_one_convolution(open_session, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "body.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    open_session(model_of(), library=False, options=options)
    op_types = [node.op_type for node in onnx.load(tmp_path / "body.onnx").graph.node]
    assert op_types in (["Conv"], ["Conv", "Identity"])


@pytest.mark.parametrize(
    ("x_shape", "shape"),
    [
        (["batch", CHANNELS, 9, 10], ["batch", OUTPUTS, 5, 5]),
        ([4, CHANNELS, 8, 1], [4, OUTPUTS, 4, 1]),
        (["batch", "channels", 7, 7], ["batch", OUTPUTS, 4, 4]),
    ],
)
def test_output_shape_is_inferred(x_shape, shape, open_session):
    window = dataclasses.replace(WINDOW, strides=(2, 2))
    (output,) = open_session(model_of(window, x_shape=x_shape)).get_outputs()
    assert output.shape == shape


def test_unknown_sizes_stay_unknown_and_apart(open_session):
    (output,) = open_session(model_of()).get_outputs()
    batch, channels, height, width = output.shape
    assert (batch, channels) == ("batch", OUTPUTS)
    assert isinstance(height, str)
    assert isinstance(width, str)
    assert len({batch, height, width, "height", "width"}) == 5


@pytest.mark.parametrize(
    "shape", [(1, CHANNELS + 1, 5, 5), (1, CHANNELS, 5), (CHANNELS, 5, 5), (1, 1, CHANNELS, 5, 5), ()]
)
def test_wrong_input_fails_that_run_only(shape, open_session):
    session = open_session(model_of(x_shape=None))
    with pytest.raises(Exception, match=rf"{NODE}.*input X has shape .*expected \[batch, {CHANNELS}, height"):
        session.run(None, {"X": np.ones(shape, np.float32)})
    x = images()
    np.testing.assert_allclose(session.run(None, {"X": x})[0], expected(x), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    "shape", [(1, OUTPUTS, 5, 4), (1, OUTPUTS, 1, 1), (OUTPUTS, 5, 5), (2, OUTPUTS, 5, 5)]
)
def test_residual_of_another_shape_fails(shape, open_session):
    session = open_session(model_of(op_type="SparseConvAdd"))
    feeds = {"X": images(1, 5, 5), "R": np.ones(shape, np.float32)}
    with pytest.raises(Exception, match=rf"{NODE}.*input R has shape .*expected \[1, {OUTPUTS}, 5, 5\]"):
        session.run(None, feeds)


def test_window_that_does_not_fit_fails_that_run_only(open_session):
    session = open_session(model_of(Window((5, 3))))
    with pytest.raises(Exception, match=rf"{NODE}.*window of kernel_shape does not fit"):
        session.run(None, {"X": images(1, 4, 9)})
    x = images(1, 5, 9)
    np.testing.assert_allclose(
        session.run(None, {"X": x})[0], expected(x, Window((5, 3))), rtol=1e-5, atol=3e-5
    )


def test_not_a_number_passes_through(open_session):
    x = images()
    x[1, 2, 4, 5] = np.nan
    for op_type in (
        "SparseConv",
        "SparseConvRelu",
        "SparseConvClip",
        "SparseConvSilu",
        "SparseConvHardSwish",
    ):
        (got,) = open_session(model_of(op_type=op_type)).run(None, {"X": x})
        seen = (filters_of(WINDOW)[:, 2] != 0)[:, ::-1, ::-1]
        np.testing.assert_array_equal(np.isnan(got[1, :, 3:6, 4:7]), seen)
        assert not np.isnan(got[0]).any()


HOSTILE = {
    "kernel_shape missing": ({"kernel_shape": None}, "attribute kernel_shape is missing"),
    "kernel_shape of one axis": (
        {"kernel_shape": [9]},
        r"attribute strides is \[1, 1\], expected 1 number from 1",
    ),
    "kernel_shape zero": ({"kernel_shape": [0, 9]}, "attribute kernel_shape is"),
    "kernel_shape that does not divide K": ({"kernel_shape": [5, 5]}, "K is 54, no multiple of the 25"),
    "kernel_shape huge": ({"kernel_shape": [2**62, 2]}, "attribute kernel_shape is"),
    "strides zero": ({"strides": [1, 0]}, r"attribute strides is \[1, 0\], expected 2 numbers from 1"),
    "strides negative": ({"strides": [-1, 1]}, "attribute strides is"),
    "pads of two": ({"pads": [1, 1]}, "attribute pads is .* expected 4 numbers from 0"),
    "pads negative": ({"pads": [1, -1, 1, 1]}, "attribute pads is"),
    "pads huge": ({"pads": [2**40, 0, 0, 0]}, "attribute pads is"),
    "dilations missing": ({"dilations": None}, "attribute dilations is missing"),
    "dilations zero": ({"dilations": [0, 1]}, "attribute dilations is"),
    "a long list": ({"pads": [0] * 100}, "attribute pads is missing or no list of at most 16"),
    "group zero": ({"group": 0}, "attribute group is 0, expected at least 1"),
    "group missing": ({"group": None}, "attribute group is missing"),
    "group that does not divide": ({"group": 3}, "attribute N is 20, which does not make 3 groups"),
    "group inside a block": ({"group": 4}, "attribute N is 20, which does not make 4 groups of whole blocks"),
    "K of another weight": ({"K": 9}, "counts has"),
    "another format": ({"format": "bitmap"}, "attribute format is 'bitmap'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_attributes_are_refused_by_name(case, open_session):
    attributes, message = HOSTILE[case]
    with pytest.raises(Exception, match=rf"node '{NODE}' \(SparseConv\): .*{message}"):
        open_session(model_of(attributes=attributes, with_body=False))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"min": None}, "attribute min is missing"),
        ({"max": None}, "attribute max is missing"),
        ({"min": 2.0}, "attribute min is not at most attribute max"),
        ({"max": float("nan")}, "attribute min is not at most attribute max"),
    ],
)
def test_limits_of_a_clip_are_checked(attributes, message, open_session):
    with pytest.raises(Exception, match=rf"node '{NODE}' \(SparseConvClip\): {message}"):
        open_session(model_of(op_type="SparseConvClip", attributes=attributes, with_body=False))


def test_hostile_tensors_are_refused_by_name(open_session):
    offsets = pack(WINDOW).offsets.copy()
    offsets[0] = 200
    with pytest.raises(Exception, match=rf"node '{NODE}' \(SparseConv\): offsets of block 0, chunk 0"):
        open_session(model_of(arrays={"offsets": offsets}, with_body=False))


def test_many_threads_agree_with_one(open_session):
    x = images(4, 30, 30)
    one, *others = [open_session(model_of(), threads=threads).run(None, {"X": x})[0] for threads in (1, 2, 4)]
    for other in others:
        np.testing.assert_array_equal(one, other)
