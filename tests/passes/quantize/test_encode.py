"""Writing integers into a graph: what is written is read as the same weight, and ONNX Runtime computes with it."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.bit_packing import UNPACK_DOMAIN
from sparse_onnx.model.encodings import Affine, Dense, Packed
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.quantize.encode import reason_against_dequantize, write_quantized
from sparse_onnx.passes.solvers import GridOptions, RtnQuantizer

RNG = np.random.default_rng(5)
K, N = 72, 12
BODIES = {
    "MatMul": ("float[B, 72] X", "float[B, 12] Y", "Y = MatMul(X, W)", (K, N), (5, K)),
    "Gemm": ("float[B, 72] X", "float[B, 12] Y", "Y = Gemm<transB = 1>(X, W)", (N, K), (5, K)),
    "Conv": (
        "float[B, 8, 6, 6] X",
        "float[B, 12, 6, 6] Y",
        "Y = Conv<pads = [1, 1, 1, 1]>(X, W)",
        (N, 8, 3, 3),
        (2, 8, 6, 6),
    ),
    "LSTM": (
        "float[S, B, 72] X",
        "float[S, 1, B, 3] Y",
        "Y, H, C = LSTM<hidden_size = 3>(X, W, R)",
        (1, N, K),
        (3, 2, K),
    ),
}


def build(from_text, kind, opset=17):
    x, y, body, shape, given = BODIES[kind]
    tensors = {"W": RNG.standard_normal(shape).astype(np.float32)}
    if kind == "LSTM":
        tensors["R"] = RNG.standard_normal((1, N, 3)).astype(np.float32)
    version = 10 if opset >= 21 else 8
    head = f'<ir_version: {version}, opset_import: ["" : {opset}]>'
    model = from_text(f"{head} g ({x}) => ({y}) {{ {body} }}", **tensors)
    return model, RNG.standard_normal(given).astype(np.float32)


def weight_of(model, encoded=False):
    return next(weight for weight in find_weights(model, encoded=encoded)[0] if weight.name == "W")


def quantized(weight, **options):
    return RtnQuantizer(grid=GridOptions(**options)).solve(np.array(weight.matrix()))


def outputs(model, x, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"X": x})[0]


def with_floats(model, matrix):
    """The model with ``matrix`` as its float weight."""
    copy = model.clone()
    weight = weight_of(copy)
    weight.value.const_value = ir.tensor(np.ascontiguousarray(weight.stored(matrix)), name="W")
    return copy


GRIDS = [
    {"bits": bits, "group_size": size, "symmetric": symmetric, "scale_type": scale}
    for (bits, size), (symmetric, scale) in itertools.zip_longest(
        itertools.product((2, 3, 4, 8), (0, 16, 32)),
        itertools.islice(itertools.cycle(itertools.product((True, False), ("float32", "float16"))), 12),
    )
]


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("options", GRIDS, ids=lambda options: "-".join(map(str, options.values())))
def test_unpacked_weights_are_read_and_run_as_they_were_written(from_text, kind, options):
    """Groups of 16 and 32 leave a last one of 8 of the 72 inputs."""
    model, x = build(from_text, kind)
    weight = weight_of(model)
    solution = quantized(weight, **options)
    dense = with_floats(model, solution.matrix())
    write_quantized(model, weight, solution)
    read = weight_of(model, encoded=True)
    assert isinstance(read.encoding, Packed)
    assert read.shape == (K, N)
    np.testing.assert_array_equal(read.matrix(), solution.matrix())
    np.testing.assert_array_equal(read.stored(solution.matrix()), read.tensor.numpy())
    np.testing.assert_array_equal(outputs(model, x), outputs(dense, x))


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("storage", ["unpack", "dequantize", "float"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv"])
def test_every_opset(from_text, kind, storage, opset):
    """With 8 bits for each channel, which all can do. Without its optimizations, since with them ONNX Runtime rounds
    activations, too, where it finds DequantizeLinear before a MatMul."""
    model, x = build(from_text, kind, opset)
    weight = weight_of(model)
    solution = quantized(weight, bits=8)
    dense = with_floats(model, solution.matrix())
    assert reason_against_dequantize(model, weight, solution) is None
    write_quantized(model, weight, solution, storage)
    kinds = {"unpack": Packed, "dequantize": Affine, "float": Dense}
    assert isinstance(weight_of(model, encoded=True).encoding, kinds[storage])
    np.testing.assert_array_equal(weight_of(model, encoded=True).matrix(), solution.matrix())
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    np.testing.assert_allclose(outputs(model, x, level), outputs(dense, x, level), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_dequantize_in_groups(from_text, kind, bits, symmetric):
    model, x = build(from_text, kind, opset=21)
    weight = weight_of(model)
    solution = quantized(weight, bits=bits, group_size=24, symmetric=symmetric)
    dense = with_floats(model, solution.matrix())
    assert reason_against_dequantize(model, weight, solution) is None
    write_quantized(model, weight, solution, "dequantize")
    read = weight_of(model, encoded=True)
    assert read.encoding.block_size == 24
    assert read.tensor.nbytes == K * N * bits // 8
    np.testing.assert_array_equal(read.matrix(), solution.matrix())
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    np.testing.assert_allclose(outputs(model, x, level), outputs(dense, x, level), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "opset", "options", "reason"),
    [
        ("MatMul", 17, {"bits": 4}, "4 bits need opset 21, the model has 17"),
        ("MatMul", 17, {"bits": 8, "group_size": 24}, "groups need opset 21"),
        ("MatMul", 21, {"bits": 3}, "3 bits have no type of their own"),
        ("MatMul", 21, {"bits": 2}, "2 bits have no type of their own"),
        ("Gemm", 21, {"bits": 8, "group_size": 32}, "72 inputs are no multiple of the group size 32"),
        ("Conv", 21, {"bits": 8, "group_size": 24}, "groups of a convolution do not lie along one axis"),
        ("LSTM", 21, {"bits": 8}, "LSTM or GRU"),
        ("MatMul", 21, {"bits": 8, "scale_type": "float16"}, "float16 scales would make float16 weights"),
    ],
)
def test_what_dequantize_cannot_hold(from_text, kind, opset, options, reason):
    model, _ = build(from_text, kind, opset)
    weight = weight_of(model)
    assert reason in reason_against_dequantize(model, weight, quantized(weight, **options))


def test_a_pruned_weight_stays_exactly_zero(from_text):
    model, _ = build(from_text, "MatMul")
    weight = weight_of(model)
    W = np.where(RNG.random((K, N)) < 0.6, 0, np.array(weight.matrix()) + np.float32(1)).astype(np.float32)
    solution = RtnQuantizer(grid=GridOptions(bits=3, group_size=16, symmetric=False)).solve(W)
    write_quantized(model, weight, solution)
    assert (weight_of(model, encoded=True).matrix()[W == 0] == 0).all()


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_layers_see_the_type_that_they_saw(from_text, kind):
    name = {np.float16: "float16", np.float64: "double"}[kind]
    model = from_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({name}[B, 72] X) => ({name}[B, 12] Y) {{ Y = MatMul(X, W) }}',
        W=RNG.standard_normal((K, N)).astype(kind),
    )
    weight = weight_of(model)
    solution = quantized(weight, bits=4, group_size=16)
    write_quantized(model, weight, solution)
    expected = solution.matrix().astype(kind)
    np.testing.assert_array_equal(weight_of(model, encoded=True).matrix(), expected.astype(np.float32))
    x = RNG.standard_normal((2, K)).astype(kind)
    found = outputs(model, x)
    assert found.dtype == kind
    np.testing.assert_allclose(
        found, x.astype(np.float64) @ expected, rtol=1e-2, atol=1e-1 if kind is np.float16 else 0
    )


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (5, 8), (4, 4), (3, 3), (2, 2)])
def test_the_file_is_as_large_as_the_bits(from_text, tmp_path, bits, expected):
    """And ONNX Runtime makes floats of them only when it loads the file."""
    model = from_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[B, 512] X) => (float[B, 256] Y) { Y = MatMul(X, W) }',
        W=RNG.standard_normal((512, 256)).astype(np.float32),
    )
    weight = weight_of(model)
    write_quantized(model, weight, quantized(weight, bits=bits, group_size=128, scale_type="float16"))
    model_io.save_model(model, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    packed = 512 * 256 * expected // 8 + 4 * 256 * 2
    assert packed <= size < packed + 12000
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "folded.onnx")
    assert [node.op_type for node in folded.graph.node] == ["MatMul"]


def test_a_weight_in_a_branch(from_text, run):
    model = from_text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[B, 72] X, bool C) => (float[B, 12] Y) {
           Y = If(C) <then_branch = t () => (float[B, 12] P) { P = MatMul(X, W) },
                      else_branch = e () => (float[B, 12] Q) { I = Neg(X) Q = MatMul(I, W) }> }""",
        W=RNG.standard_normal((K, N)).astype(np.float32),
    )
    weight = weight_of(model)
    solution = quantized(weight, bits=4, group_size=24)
    write_quantized(model, weight, solution)
    x = RNG.standard_normal((3, K)).astype(np.float32)
    expected = x.astype(np.float64) @ solution.matrix()
    for sign, chosen in ((1, True), (-1, False)):
        found = run(model, {"X": x, "C": np.array(chosen)})["Y"]
        np.testing.assert_allclose(found, sign * expected, rtol=1e-4, atol=1e-4)


# -- reading what others may have written ------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("rows", [64]),
        ("grid", [3, 16, -1]),
        ("grid", [5, 16]),
        ("grid", [0, 0, -1]),
        ("channels", [0]),
        ("channels", [72, 1]),
        ("to", 7),
    ],
)
def test_attributes_that_do_not_fit(from_text, attribute, value):
    model, _ = build(from_text, "MatMul")
    weight = weight_of(model)
    write_quantized(model, weight, quantized(weight, bits=4, group_size=16))
    (node,) = (node for node in model.graph if node.domain == UNPACK_DOMAIN)
    node.attributes[attribute] = (
        ir.AttrInt64s(attribute, value) if isinstance(value, list) else ir.AttrInt64(attribute, value)
    )
    found, declined = find_weights(model, encoded=True)
    assert not found
    assert [name for name, _ in declined] == ["W"]


def test_an_operator_that_does_not_exist(from_text):
    model, _ = build(from_text, "MatMul")
    weight = weight_of(model)
    write_quantized(model, weight, quantized(weight, bits=4))
    (node,) = (node for node in model.graph if node.domain == UNPACK_DOMAIN)
    node.op_type = "Unpack5"
    found, declined = find_weights(model, encoded=True)
    assert not found
    assert declined == [("W", "is unpacked by Unpack5 with attributes that it does not have")]


def test_who_does_not_ask_for_encoded_weights_gets_them_declined(from_text):
    model, _ = build(from_text, "Gemm")
    weight = weight_of(model)
    write_quantized(model, weight, quantized(weight, bits=4, group_size=32, symmetric=False))
    found, declined = find_weights(model)
    assert not found
    assert declined == [("W", "is quantized: 4 bits with a scale and a zero point for 32 inputs")]


def test_values_off_the_grid_are_refused(from_text):
    model, _ = build(from_text, "MatMul")
    weight = weight_of(model)
    solution = quantized(weight, bits=4, group_size=32)
    write_quantized(model, weight, solution)
    read = weight_of(model, encoded=True)
    with pytest.raises(UsageError, match=r"W: 864 of 864 values, .* are not on the grid of 4 bits"):
        read.stored(solution.matrix() + np.float32(1e-3))
    zeros = solution.matrix()
    zeros[::2] = 0
    read.value.const_value = ir.tensor(read.stored(zeros), name="W")
    np.testing.assert_array_equal(weight_of(model, encoded=True).matrix(), zeros)
