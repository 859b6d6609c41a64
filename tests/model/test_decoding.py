"""Weights that nodes decode: read as ONNX Runtime computes them, written back exactly, or left alone with a reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.model.encodings import Affine, Palette
from sparse_onnx.model.weights import find_weights
from sparse_onnx.model.work import Work, left_alone, untouched
from sparse_onnx.passes.quantize.weight import QuantizeWeights

RNG = np.random.default_rng(7)
K, N = 12, 5
LINEAR = f"(float[3, {K}] X) => (float[3, {N}] Y)"

# name: (inputs and outputs, the layers of w, its shape)
LAYERS = {
    "MatMul": (LINEAR, "Y = MatMul(X, w)", (K, N)),
    "Gemm": (LINEAR, "Y = Gemm(X, w)", (K, N)),
    "Gemm, transposed": (LINEAR, "Y = Gemm<transB = 1>(X, w)", (N, K)),
    "two linears": (LINEAR, "A = MatMul(X, w) B = Gemm(X, w) Y = Add(A, B)", (K, N)),
    "Conv": ("(float[1, 3, 5, 5] X) => (float[1, 5, 4, 4] Y)", "Y = Conv(X, w)", (5, 3, 2, 2)),
    "Conv of groups": ("(float[1, 6, 5] X) => (float[1, 4, 4] Y)", "Y = Conv<group = 2>(X, w)", (4, 3, 2)),
    "GRU": (
        "(float[4, 2, 3] X) => (float[4, 1, 2, 2] Y)",
        "R = ConstantOfShape<value = float[1] {0.5}>(r) Y = GRU<hidden_size = 2>(X, w, R)",
        (1, 6, 3),
    ),
    "bodies": (
        f"(float[3, {K}] X, bool c) => (float[3, {N}] Y)",
        f"""Y = If(c) <then_branch = t () => (float[3, {N}] P) {{ P = MatMul(X, w) }},
                       else_branch = e () => (float[3, {N}] Q) {{ Q = Gemm(X, w) }}>""",
        (K, N),
    ),
}


def model_of(from_text, layer, decode, opset=21, **tensors):
    """A model with a layer whose weight w is made by the nodes ``decode``; with none it is an initializer."""
    border, body, _ = LAYERS[layer]
    if layer == "GRU":
        tensors["r"] = np.array([1, 6, 2], np.int64)
    head = f'<ir_version: {9 if opset < 21 else 10 if opset < 23 else 11}, opset_import: ["" : {opset}]>'
    return from_text(f"{head} g {border} {{ {decode} {body} }}", **tensors)


def feeds(model):
    rng = np.random.default_rng(2)
    return {
        value.name: np.array(True)
        if value.dtype == ir.DataType.BOOL
        else rng.standard_normal(tuple(value.shape)).astype(np.float32)
        for value in model.graph.inputs
    }


def found(model, name="q"):
    weights, declined = find_weights(model, encoded=True)
    assert not declined
    return next(weight for weight in weights if weight.name == name)


def integers(dtype, shape):
    """The values of ``dtype`` in turn, mixed."""
    low, high = ml_dtypes.iinfo(dtype).min, ml_dtypes.iinfo(dtype).max
    numbers = np.resize(np.linspace(low, high, 256).round().astype(np.int32), int(np.prod(shape)))
    return RNG.permutation(numbers).reshape(shape).astype(dtype)


def scales(*shape, dtype=np.float32):
    return RNG.uniform(0.01, 0.2, shape).astype(dtype)


def check(from_text, run, layer, model):
    """What the weight says is what the runtime computes, and what it stores stands for what it was given."""
    weight = found(model)

    def dense_twin(matrix):
        shape = LAYERS[layer][2]
        twin = model_of(from_text, layer, "", w=np.zeros(shape, np.float32))
        dense = found(twin, "w")
        assert dense.shape == weight.shape
        dense.value.const_value = ir.tensor(dense.stored(matrix), name="w")
        return run(twin, feeds(twin))["Y"]

    matrix = weight.matrix()
    assert matrix.dtype == np.float32
    assert matrix.shape == weight.shape
    np.testing.assert_array_equal(run(model, feeds(model))["Y"], dense_twin(matrix))
    before = weight.tensor.numpy()
    again = weight.stored(matrix)
    assert (again.dtype, again.shape, again.tobytes()) == (before.dtype, before.shape, before.tobytes())
    pruned = np.where(np.random.default_rng(3).random(matrix.shape) < 0.5, np.float32(0), matrix)
    weight.value.const_value = ir.tensor(weight.stored(pruned), name="q")
    np.testing.assert_array_equal(found(model).matrix(), pruned)
    np.testing.assert_array_equal(run(model, feeds(model))["Y"], dense_twin(pruned))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4, np.int16, np.uint16])
@pytest.mark.parametrize(("axis", "zero"), [(None, False), (None, True), (0, True), (1, False), (-1, True)])
def test_dequantized_weights(from_text, run, layer, dtype, axis, zero):
    shape = LAYERS[layer][2]
    parameters = () if axis is None else (shape[axis],)
    attribute = "" if axis is None else f"<axis = {axis}>"
    tensors = {"q": integers(dtype, shape), "s": scales(*parameters)}
    if zero:
        tensors["z"] = integers(dtype, parameters)
    decode = f"w = DequantizeLinear{attribute}(q, s{', z' if zero else ''})"
    model = model_of(from_text, layer, decode, **tensors)
    encoding = found(model).encoding
    assert isinstance(encoding, Affine)
    assert encoding.axis == (None if axis is None else axis % len(shape) if shape[axis] > 1 else None)
    assert encoding.block_size == 0
    assert (encoding.zero_point is not None) == zero
    check(from_text, run, layer, model)


@pytest.mark.parametrize("layer", ["MatMul", "Gemm, transposed", "Conv"])
@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.uint4])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 12, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_in_blocks(from_text, run, layer, dtype, block_size, axis):
    """Also in blocks that do not divide the axis: the last one is shorter."""
    shape = list(LAYERS[layer][2])
    q = integers(dtype, shape)
    shape[axis] = -(-shape[axis] // block_size)
    model = model_of(
        from_text,
        layer,
        f"w = DequantizeLinear<axis = {axis}, block_size = {block_size}>(q, s, z)",
        q=q,
        s=scales(*shape),
        z=integers(dtype, shape),
    )
    assert found(model).encoding.block_size == block_size
    check(from_text, run, layer, model)


@pytest.mark.parametrize("opset", [10, 13, 17, 19, 21, 23])
@pytest.mark.parametrize("parameters", [(), (1,)])
def test_one_scale_in_every_opset(from_text, run, opset, parameters):
    tensors = {"q": integers(np.uint8, (K, N)), "s": scales(*parameters), "z": integers(np.uint8, parameters)}
    model = model_of(from_text, "MatMul", "w = DequantizeLinear(q, s, z)", opset, **tensors)
    check(from_text, run, "MatMul", model)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4])
@pytest.mark.parametrize("opset", [21, 23])
def test_half_precision_scales(from_text, run, dtype, opset):
    """Their values are rounded to half precision, too, unless another type is asked for."""
    tensors = {"q": integers(dtype, (K, N)), "s": scales(N, dtype=np.float16), "z": integers(dtype, (N,))}
    decode = "h = DequantizeLinear(q, s, z) w = Cast<to = 1>(h)"
    model = model_of(from_text, "MatMul", decode, opset, **tensors)
    halves = found(model).matrix()
    np.testing.assert_array_equal(halves, halves.astype(np.float16))
    check(from_text, run, "MatMul", model)
    if opset >= 23:
        model = model_of(
            from_text, "MatMul", "w = DequantizeLinear<output_dtype = 1>(q, s, z)", 23, **tensors
        )
        assert (found(model).matrix() != halves).any()
        check(from_text, run, "MatMul", model)


@pytest.mark.skipif(not hasattr(ir.DataType, "INT2"), reason="this onnx_ir has no integers of 2 bits")
@pytest.mark.parametrize("kind", ["int2", "uint2"])
def test_two_bits(from_text, run, kind):
    dtype = getattr(ml_dtypes, kind)
    tensors = {"q": integers(dtype, (K, N)), "s": scales(3, N), "z": integers(dtype, (3, N))}
    decode = "w = DequantizeLinear<axis = 0, block_size = 5>(q, s, z)"
    check(from_text, run, "MatMul", model_of(from_text, "MatMul", decode, 25, **tensors))


MOVES = {
    "Transpose": ("w = Transpose<perm = [1, 0]>(d)", (N, K), {}),
    "Transpose, default order": ("w = Transpose(d)", (N, K), {}),
    "Identity": ("w = Identity(d)", (K, N), {}),
    "Reshape": ("w = Reshape(d, t)", (3, 4, N), {"t": [-1, N]}),
    "Reshape with a copied size": ("w = Reshape(d, t)", (K, N, 1), {"t": [0, -1]}),
    "groups of 4 inputs": (
        "e = Reshape(d, t) w = Transpose<perm = [1, 0]>(e)",
        (N * 3, 4),
        {"t": [N, K]},
    ),
    "inner order": (
        "e = Transpose<perm = [1, 2, 0]>(d) w = Reshape(e, t)",
        (N, 3, 4),
        {"t": [K, N]},
    ),
    "Squeeze": ("w = Squeeze(d, t)", (1, K, N), {"t": [0]}),
    "Squeeze all": ("w = Squeeze(d)", (K, 1, N), {}),
    "Unsqueeze": ("e = Unsqueeze(d, t) w = Squeeze(e, t)", (K, N), {"t": [-2]}),
    "Flatten": ("w = Flatten<axis = 2>(d)", (3, 4, N), {}),
    "Cast": ("e = Cast<to = 11>(d) w = Cast<to = 1>(e)", (K, N), {}),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("axis", [None, 0])
def test_elements_that_are_moved_behind_their_decoder(from_text, run, move, axis):
    text, shape, constants = MOVES[move]
    parameters = () if axis is None else (shape[0],)
    tensors = {name: np.array(numbers, np.int64) for name, numbers in constants.items()}
    tensors |= {"q": integers(np.int8, shape), "s": scales(*parameters), "z": integers(np.int8, parameters)}
    decode = f"d = DequantizeLinear{'' if axis is None else '<axis = 0>'}(q, s, z) {text}"
    check(from_text, run, "MatMul", model_of(from_text, "MatMul", decode, **tensors))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_palettes(from_text, run, layer, dtype):
    """Gather takes indices of 32 and 64 bits; fewer are widened first."""
    codebook = np.sort(RNG.standard_normal(16)).astype(np.float32)
    codebook[7] = 0
    q = RNG.integers(-16 if np.iinfo(dtype).min else 0, 16, LAYERS[layer][2]).astype(dtype)
    decode = "w = Gather(book, q)" if q.itemsize > 1 else "i = Cast<to = 6>(q) w = Gather(book, i)"
    model = model_of(from_text, layer, decode, 17, q=q, book=codebook)
    assert isinstance(found(model).encoding, Palette)
    check(from_text, run, layer, model)


def test_a_palette_of_half_precision_behind_a_transpose(from_text, run):
    codebook = np.array([0, 0.1, -0.3, 2], np.float16)
    q = RNG.integers(0, 4, (N, K)).astype(ml_dtypes.uint4)
    decode = "i = Cast<to = 7>(q) h = Gather(book, i) f = Cast<to = 1>(h) w = Transpose(f)"
    check(from_text, run, "MatMul", model_of(from_text, "MatMul", decode, q=q, book=codebook))


@pytest.mark.parametrize("layer", ["MatMul", "Gemm, transposed", "Conv"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, ml_dtypes.int4])
@pytest.mark.parametrize("axis", [None, 0])
def test_floats_that_are_rounded_in_every_run(from_text, run, layer, dtype, axis):
    """Training with quantization leaves them, and ONNX Runtime's quantizer with AddQDQPairToWeight."""
    shape = LAYERS[layer][2]
    parameters = () if axis is None else (shape[0],)
    ends = "<axis = 0>" if axis is not None else ""
    model = model_of(
        from_text,
        layer,
        f"i = QuantizeLinear{ends}(q, s, z) w = DequantizeLinear{ends}(i, t, z)",
        q=(RNG.standard_normal(shape) * 3).astype(np.float32),
        s=(scale := scales(*parameters)),
        t=scale,
        z=np.zeros(parameters, dtype),
    )
    assert found(model).encoding.rounded
    check(from_text, run, layer, model)


# What ONNX Runtime's own quantizers write.


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A convolution and two linears of float32."""
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[2, 3, 8, 8] X) => (float[2, 5] Y) {
            c = Conv(X, k, kb) r = Relu(c) f = Flatten(r) m = MatMul(f, w) n = Relu(m)
            Y = Gemm<transB = 1>(n, g, gb) }"""
    )
    rng = np.random.default_rng(0)
    shapes = {"k": (4, 3, 3, 3), "kb": (4,), "w": (144, 7), "g": (5, 7), "gb": (5,)}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("network") / "model.onnx"
    onnx.save(proto, path)
    return path


def quantized(network, folder, **options):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(
                [{"X": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}]
            )

        def get_next(self):
            return next(self.batches, None)

    quantize_static(network, folder / "q.onnx", Reader(), quant_format=QuantFormat.QDQ, **options)
    return ir.load(folder / "q.onnx")


STATIC = {
    "int8 per channel": ({"per_channel": True}, ["g_quantized", "k_quantized", "w_quantized"]),
    "int8 per tensor": ({}, ["g_quantized", "k_quantized", "w_quantized"]),
    "uint8, asymmetric": (
        {"weight_type": "QUInt8", "activation_type": "QUInt8", "extra_options": {"WeightSymmetric": False}},
        ["g_quantized", "k_quantized", "w_quantized"],
    ),
    "int4 per channel": (
        {"per_channel": True, "weight_type": "QInt4", "activation_type": "QInt16"},
        ["g_quantized", "k_quantized", "w_quantized"],
    ),
    "pairs at weights": (
        {"weight_type": "QUInt8", "activation_type": "QUInt8", "extra_options": {"AddQDQPairToWeight": True}},
        ["g", "k", "w"],
    ),
}


@pytest.mark.parametrize("case", STATIC)
def test_static_quantization_of_onnx_runtime(network, tmp_path, run, case):
    from onnxruntime.quantization import QuantType

    options, names = STATIC[case]
    options = {key: QuantType[value] if key.endswith("_type") else value for key, value in options.items()}
    model = quantized(network, tmp_path, **options)
    weights, declined = find_weights(model, encoded=True)
    assert not declined
    assert sorted(weight.name for weight in weights) == names
    before = run(model, feeds(model))["Y"]
    values = {name: run_value(model, run, name) for name in ("k", "w", "g")}
    expected = {"k": values["k"].reshape(4, 27).T, "w": values["w"], "g": values["g"].T}
    for weight in weights:
        name = weight.name.removesuffix("_quantized")
        np.testing.assert_array_equal(weight.matrix(), expected[name])
        weight.value.const_value = ir.tensor(weight.stored(weight.matrix()), name=weight.name)
    np.testing.assert_array_equal(run(model, feeds(model))["Y"], before)


def run_value(model, run, name):
    """What the runtime computes for a weight of the network."""
    copy = model.clone()
    value = next(
        node.outputs[0] for node in copy.graph if node.outputs[0].name == f"{name}_DequantizeLinear_Output"
    )
    size = {"k": (4, 3, 3, 3), "w": (144, 7), "g": (5, 7)}[name]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(size)
    copy.graph.outputs.append(value)
    return run(copy, feeds(copy))[value.name]


def test_blocks_of_onnx_runtime(network, tmp_path, run):
    """144 inputs in blocks of 32: the last one has 16."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(network), block_size=32, is_symmetric=False, quant_format=QuantFormat.QDQ
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    model = ir.load(tmp_path / "q.onnx")
    weight = next(weight for weight in find_weights(model, encoded=True)[0] if weight.shape == (144, 7))
    assert (weight.encoding.block_size, weight.encoding.dtype.name) == (32, "UINT4")
    dense = ir.load(network)
    next(w for w in find_weights(dense)[0] if w.name == "w").value.const_value = ir.tensor(
        np.ascontiguousarray(weight.matrix()), name="w"
    )
    np.testing.assert_array_equal(run(model, feeds(model))["Y"], run(dense, feeds(dense))["Y"])


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantization_of_onnx_runtime(network, tmp_path, per_channel):
    from onnxruntime.quantization import quantize_dynamic

    kinds = ["MatMul", "Gemm"]
    quantize_dynamic(network, tmp_path / "q.onnx", per_channel=per_channel, op_types_to_quantize=kinds)
    model = ir.load(tmp_path / "q.onnx")
    assert "MatMulInteger" in {node.op_type for node in model.graph}
    assert [weight.name for weight in find_weights(model)[0]] == ["k"]
    weights, declined = find_weights(model, encoded=True)
    assert not declined
    assert sorted(weight.name for weight in weights) == ["g_Transposed_quantized", "k", "w_quantized"]
    before = {weight.name: weight.matrix() for weight in find_weights(ir.load(network))[0]}
    for weight in weights:
        if weight.name != "k":
            steps = np.max(weight.encoding.scale.numpy())
            dense = before[weight.name[0]]
            np.testing.assert_allclose(weight.matrix(), dense, atol=1.01 * steps)


# What is left alone.

Q, S, Z = integers(np.int8, (K, N)), scales(), np.int8(3)
DQ = "w = DequantizeLinear(q, s, z)"
LEFT = {
    "integers of 32 bits": (
        "w = DequantizeLinear(q, s)",
        {"q": Q.astype(np.int32), "s": S},
        "has dtype INT32, which is no type of quantized weights",
    ),
    "floats of 8 bits": (
        "w = DequantizeLinear(q, s)",
        {"q": Q.astype(ml_dtypes.float8_e4m3fn), "s": S},
        "has dtype FLOAT8E4M3FN, which is no type of quantized weights",
    ),
    "a computed scale": (
        "t = Abs(s) w = DequantizeLinear(q, t)",
        {"q": Q, "s": S},
        "is computed in every run, by DequantizeLinear with a scale that is no constant",
    ),
    "a computed zero point": (
        "t = Identity(z) w = DequantizeLinear(q, s, t)",
        {"q": Q, "s": S, "z": Z},
        "with a zero point that is no constant",
    ),
    "shared": (
        "w = DequantizeLinear(q, s) v = DequantizeLinear(q, t) U = Gemm(X, v)",
        {"q": Q, "s": S, "t": S * 2},
        "is decoded for layers and also read elsewhere: by DequantizeLinear and DequantizeLinear",
    ),
    "read elsewhere": (
        "w = DequantizeLinear(q, s) v = Cast<to = 6>(q)",
        {"q": Q, "s": S},
        "also read elsewhere: by Cast and DequantizeLinear",
    ),
    "its values are read elsewhere": (
        "w = DequantizeLinear(q, s) v = Relu(w)",
        {"q": Q, "s": S},
        "also used by Relu",
    ),
    "its values are moved for others": (
        "d = DequantizeLinear(q, s) w = Identity(d) v = Relu(d)",
        {"q": Q, "s": S},
        "also read elsewhere: by Identity and Relu",
    ),
    "its values are seen both ways": (
        "w = DequantizeLinear(q, s) v = Gemm<transB = 1>(T, w)",
        {"q": Q, "s": S, "T": np.ones((2, N), np.float32)},
        "shared by linears that see it transposed and not",
    ),
    "rounded on two grids": (
        "i = QuantizeLinear(q, s, z) w = DequantizeLinear(i, t, z)",
        {"q": Q.astype(np.float32), "s": S, "t": S * 2, "z": Z},
        "is quantized in every run on another grid than it is dequantized",
    ),
    "rounded halves": (
        "i = QuantizeLinear(q, s, z) d = DequantizeLinear(i, s, z) w = Cast<to = 1>(d)",
        {"q": Q.astype(np.float16), "s": np.float16(0.5), "z": Z},
        "is quantized in every run from FLOAT16 with FLOAT16",
    ),
    "rounded to halves": (
        "h = DequantizeLinear(q, s) i = Cast<to = 10>(h) w = Cast<to = 1>(i)",
        {"q": Q, "s": S},
        "is rounded by a Cast from FLOAT to FLOAT16",
    ),
    "an empty weight": (
        "w = DequantizeLinear(q, s)",
        {"q": Q[:0], "s": S},
        "is empty",
    ),
    "three axes": (
        "w = DequantizeLinear(q, s)",
        {"q": Q[None], "s": S},
        "has rank 3, not 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_read_is_left_alone_with_a_reason(from_text, case):
    decode, tensors, reason = LEFT[case]
    model = any_linear(from_text, decode, **tensors)
    weights, declined = find_weights(model, encoded=True)
    assert not weights
    assert [name for name, _ in declined] == ["q"]
    assert reason in declined[0][1]


def any_linear(from_text, decode, inputs="float[B, C] X", outputs="float[B, D] Y", opset=21, **tensors):
    head = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {decode} Y = MatMul(X, w) }}", **tensors)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (f"float[B, C] X, int8[{K}, {N}] q", "float[B, D] Y", "is also a graph input, so a caller may replace it"),
        ("float[B, C] X", f"float[B, D] Y, int8[{K}, {N}] q", "is also a graph output"),
        ("float[B, C] X", f"float[B, D] Y, float[{K}, {N}] w", "is decoded for layers and also an output"),
        ("float[B, C] X, float s", "float[B, D] Y", "with a scale that is no constant"),
        ("float[B, C] X, int8 z", "float[B, D] Y", "with a zero point that is no constant"),
    ],
)  # fmt: skip
def test_weights_at_the_border_of_the_graph_are_left_alone(from_text, inputs, outputs, reason):
    model = any_linear(from_text, DQ, inputs, outputs, q=Q, s=S, z=Z)
    weights, declined = find_weights(model, encoded=True)
    assert not weights
    (place,) = declined
    assert place[0] == "q"
    assert reason in place[1]


HOSTILE = {
    "too few scales": ("<axis = 0>", {"s": scales(K - 1)}, f"has scales of shape ({K - 1},), which does not fit"),
    "axis": ("<axis = 2>", {"s": scales(N)}, "along axis 2"),
    "negative axis": ("<axis = -3>", {"s": scales(N)}, "along axis -3"),
    "scales of two axes": ("", {"s": scales(1, 1)}, "has scales of shape (1, 1), which does not fit"),
    "too few blocks": ("<axis = 0, block_size = 5>", {"s": scales(2, N)}, "along axis 0 in blocks of 5"),
    "too many blocks": ("<axis = 0, block_size = 5>", {"s": scales(4, N)}, "along axis 0 in blocks of 5"),
    "negative blocks": ("<axis = 0, block_size = -4>", {"s": scales(3, N)}, "along axis 0 in blocks of -4"),
    "blocks of one scale": ("<axis = 0, block_size = 4>", {"s": scales()}, "along axis 0 in blocks of 4"),
    "other zero points": ("<axis = 0>", {"s": scales(K), "z": np.zeros(N, np.int8)}, "zero points of shape (5,)"),
    "one zero point": ("<axis = 0>", {"s": scales(K), "z": np.int8(0)}, "and zero points of shape ()"),
    "zero points of another type": ("", {"s": S, "z": np.uint8(0)}, "has dtype INT8 and a zero point of UINT8"),
    "one number for blocks": ("<axis = 0, block_size = 12>", {"s": scales(1)}, "in blocks of 12"),
    "double scales": ("", {"s": np.float64(1)}, "has scales of DOUBLE"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_scales_are_left_alone_with_a_reason(case):
    """Models that ONNX Runtime refuses to run, and that need not pass the checker."""
    attribute, tensors, reason = HOSTILE[case]
    z = ", z" if "z" in tensors else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[B, C] X) => (float[B, D] Y) {{
            w = DequantizeLinear{attribute}(q, s{z}) Y = MatMul(X, w) }}"""
    )
    for name, array in (tensors | {"q": Q}).items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    weights, declined = find_weights(ir.from_proto(proto), encoded=True)
    assert not weights
    assert [name for name, _ in declined] == ["q"]
    assert reason in declined[0][1]


@pytest.mark.parametrize(
    "move",
    [
        "w = Transpose<perm = [0, 0]>(d)",
        "w = Transpose<perm = [0, 1, 2]>(d)",
        "w = Reshape(d, t)",
        "w = Squeeze(d, t)",
        "w = Unsqueeze(d, u)",
        "w = Reshape(d, u)",
        "w = Cast<to = 99>(d)",
        "w = Flatten<axis = 3>(d)",
        "w = Reshape(d, nan)",
        "w = Reshape(d)",
        "e = Shape(X) w = Reshape(d, e)",
    ],
)
def test_hostile_moves_are_left_alone_with_a_reason(move):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[B, C] X) => (float[B, D] Y) {{
            d = DequantizeLinear(q, s) {move} Y = MatMul(X, w) }}"""
    )
    tensors = {
        "q": Q,
        "s": S,
        "t": np.array([7, -1]),
        "u": np.array([0, 0, 0, -1, -1]),
        "nan": np.float32([np.nan]),
    }
    for name, array in tensors.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    weights, declined = find_weights(ir.from_proto(proto), encoded=True)
    assert not weights
    assert [name for name, _ in declined] == ["q"]


@st.composite
def strange_nodes(draw):
    """A DequantizeLinear of any attributes and parameters, and moves of its result, most of which fit nothing."""
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 4)] * 2), npst.array_shapes(max_dims=3, max_side=4)))
    size = draw(st.sampled_from([0, 0, 1, 2, 3, -1]))
    axis = draw(st.integers(-4, 3))
    scale = draw(st.one_of(st.just(()), st.just((1,)), npst.array_shapes(max_dims=3, max_side=4)))
    if size > 0 and draw(st.booleans()) and -len(shape) <= axis < len(shape):
        blocks = list(shape)
        blocks[axis] = -(-shape[axis] // size)
        scale = tuple(blocks)
    elif draw(st.booleans()) and -len(shape) <= axis < len(shape):
        scale = (shape[axis],)
    numbers = st.lists(st.integers(-1, 4), min_size=1, max_size=3)
    fitting = [("Transpose", [1, 0]), ("Reshape", [-1, 2]), ("Reshape", [0, -1]), ("Flatten", [1])]
    fitting += [("Unsqueeze", [0]), ("Squeeze", [0]), ("Transpose", [0, 2, 1])]
    any_move = st.tuples(st.sampled_from(sorted({op_type for op_type, _ in fitting})), numbers)
    moves = draw(st.lists(st.one_of(st.sampled_from(fitting), any_move), max_size=3))
    zero_point = draw(st.sampled_from([None, scale, scale, ()]))
    return shape, size, axis, scale, zero_point, moves


@given(strange_nodes())
@settings(max_examples=150)
def test_strange_nodes_are_read_as_the_runtime_does_or_left_alone(case):
    shape, size, axis, scale, zero, moves = case
    rng = np.random.default_rng(0)
    tensors = {"q": rng.integers(-128, 128, shape).astype(np.int8), "s": rng.random(scale).astype(np.float32)}
    if zero is not None:
        tensors["z"] = rng.integers(-128, 128, zero).astype(np.int8)
    block = f", block_size = {size}" if size else ""
    text, last = f"v0 = DequantizeLinear<axis = {axis}{block}>(q, s{', z' * (zero is not None)})", "v0"
    for index, (op_type, numbers) in enumerate(moves):
        made = f"v{index + 1}"
        if op_type == "Transpose":
            text += f" {made} = Transpose<perm = {numbers}>({last})"
        elif op_type == "Flatten":
            text += f" {made} = Flatten<axis = {numbers[0]}>({last})"
        else:
            tensors[f"n{index}"] = np.array(numbers, np.int64)
            text += f" {made} = {op_type}({last}, n{index})"
        last = made
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[B, C] X) => (float[B, D] Y, float V) {{
            {text} Y = MatMul(X, {last}) V = Identity({last}) }}"""
    )
    del proto.graph.output[1]
    for name, array in tensors.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    alone = onnx.ModelProto()
    alone.CopyFrom(proto)
    del proto.graph.node[-1]  # which reads the weight, too
    weights, declined = find_weights(ir.from_proto(proto), encoded=True)
    assert len(weights) + len(declined) == 1
    if weights:
        matrix = weights[0].matrix()
        assert matrix.shape == weights[0].shape
        del alone.graph.node[-2], alone.graph.output[:]
        alone.graph.output.append(onnx.ValueInfoProto(name="V"))
        alone.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(alone.SerializeToString(), options, ["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"X": np.ones((1, 1), np.float32)})[0], matrix)


NOTHING = {
    "activations": (
        "j = QuantizeLinear(X, s, z) w = DequantizeLinear(j, s, z) t = Transpose(w) Y = MatMul(X, t)",
        {"s": S, "z": Z},
    ),
    "a bias": ("b = DequantizeLinear(q, s) Y = Gemm(X, T, b)", {"q": Q[0].astype(np.int32), "s": S}),
    "a left operand": ("w = DequantizeLinear(q, s) t = Transpose(X) Y = MatMul(w, t)", {"q": Q.T, "s": S}),
    "a table": ("w = DequantizeLinear(q, s) e = Gather(w, i) Y = MatMul(X, T)", {"q": Q, "s": S}),
    "rows of an activation": ("r = Gather(X, i) t = Transpose(r) Y = MatMul(X, t)", {}),
    "rows of a table": ("r = Gather(T, i) t = Transpose(r) Y = MatMul(V, t)", {"V": np.ones((2, N), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_no_encoded_weight_is_not_listed(from_text, case):
    body, tensors = NOTHING[case]
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    tensors = {"T": np.ones((K, N), np.float32), "i": np.array([[0, 2]])[0], **tensors}
    model = from_text(f"{head} g (float[B, {K}] X) => (float[A, D] Y) {{ {body} }}", **tensors)
    for encoded in (True, False):
        weights, declined = find_weights(model, encoded=encoded)
        assert {weight.name for weight in weights} <= {"T"}
        assert {name for name, _ in declined} <= {"T"}


# What callers see that take floats only.

CALLERS = {
    "integers": (
        "d = DequantizeLinear<axis = 0>(q, s) w = Transpose(d)",
        {"q": Q.T, "s": scales(N)},
        "is quantized: INT8 with a scale for each index of axis 0",
        "Transpose",
    ),
    "blocks": (
        "w = DequantizeLinear<axis = 0, block_size = 5>(q, s)",
        {"q": Q.astype(ml_dtypes.int4), "s": scales(3, N)},
        "is quantized: INT4 with a scale for 5 elements along axis 0",
        "DequantizeLinear",
    ),
    "palette": (
        "i = Cast<to = 6>(q) w = Gather(book, i)",
        {"q": (Q % 4).astype(np.uint8), "book": np.arange(4, dtype=np.float32)},
        "is quantized: indices into a codebook of 4 values",
        "Gather",
    ),
    "rounded": (
        "i = QuantizeLinear(q, s, z) w = DequantizeLinear(i, s, z)",
        {"q": Q.astype(np.float32), "s": S, "z": Z},
        "is quantized: floats rounded to INT8 in every run, with one scale",
        "DequantizeLinear",
    ),
}


@pytest.mark.parametrize("case", CALLERS)
def test_callers_that_take_floats_decline_with_the_encoding(from_text, case):
    decode, tensors, reason, last = CALLERS[case]
    model = model_of(from_text, "MatMul", decode, **tensors)
    before = ir.to_proto(model).SerializeToString()
    assert find_weights(model) == ([], [("q", reason)])
    result = QuantizeWeights(method="rtn", group_size=0)(model)
    assert not result.modified
    assert [(place.place, place.reason) for place in result.declined] == [("q", reason)]
    (work,) = Work(model).count()
    assert (work.weight, work.products) == ("q", 3 * K * N)
    (row,) = untouched([work], set(), dict(find_weights(model)[1]))
    assert (row.op_type, row.share, row.reason) == ("MatMul", 1.0, reason)
    assert left_alone(model, ()) == [("q", f"its weight is computed in every run, by {last}")]
    assert ir.to_proto(model).SerializeToString() == before


def test_only_layers_of_the_types_asked_for(from_text):
    model = model_of(from_text, "MatMul", DQ, q=Q, s=S, z=Z)
    assert find_weights(model, ("Conv",), encoded=True) == ([], [])
    assert find_weights(model, ("Gemm",)) == ([], [])


def test_an_index_outside_of_the_codebook_names_the_weight(from_text):
    q = np.full((K, N), 9, np.int64)
    model = model_of(from_text, "MatMul", "w = Gather(book, q)", q=q, book=np.zeros(4, np.float32))
    with pytest.raises(ModelFileError, match=r"^q: index 9 lies outside of its codebook of 4 values"):
        found(model).matrix()


def test_values_off_the_grid_name_the_weight(from_text):
    model = model_of(from_text, "MatMul", DQ, q=Q, s=S, z=Z)
    weight = found(model)
    with pytest.raises(UsageError, match=rf"^q: {K * N} of {K * N} values, .* are not on the grid of INT8"):
        weight.stored(weight.matrix() + S / 3)


def test_values_that_are_not_finite_are_seen(from_text):
    model = model_of(from_text, "MatMul", DQ, q=Q, s=np.float32(np.nan), z=Z)
    assert not found(model).is_finite()
    decode = "i = QuantizeLinear(q, s, z) w = DequantizeLinear(i, s, z)"
    floats = Q.astype(np.float32)
    floats[3, 2] = np.nan
    weight = found(model_of(from_text, "MatMul", decode, q=floats, s=S, z=Z))
    assert not weight.is_finite()
    assert np.isnan(weight.matrix()[3, 2])


def test_files_are_let_go(tmp_path, from_text):
    shape = (40, N)
    model = any_linear(
        from_text,
        "w = DequantizeLinear<axis = 0, block_size = 8>(q, s, z)",
        q=integers(np.int8, shape),
        s=scales(5, N),
        z=integers(np.int8, (5, N)),
    )
    ir.save(model, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0)
    weight = found(ir.load(tmp_path / "model.onnx"))
    weight.matrix()
    tensors = [weight.tensor, weight.encoding.scale, weight.encoding.zero_point]
    assert all(tensor.raw is not None for tensor in tensors)
    weight.release()
    assert all(tensor.raw is None for tensor in tensors)
