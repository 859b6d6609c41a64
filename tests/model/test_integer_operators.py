"""Weights of operators on integers: read as the runtime computes with them, written back exactly, or left alone."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.encodings import Affine
from sparse_onnx.model.integer_operators import Unscaled, input_grid
from sparse_onnx.model.weights import find_weights
from sparse_onnx.model.work import Work

RNG = np.random.default_rng(11)
K, N, ROWS = 24, 10, 6
HEAD = '<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>'
X_SCALE, X_ZERO = np.float32(0.05), np.uint8(120)
QX = f"uint8[{ROWS}, {K}] x"


def integers(dtype, *shape):
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def scales(*shape):
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def linear(op, dtype, each, transposed=False):
    """(inputs, output, body, tensors) of one operator and a weight ``q`` with one scale or one for ``each`` output."""
    zero = integers(dtype, N) if each else np.array(3, dtype)
    scale = scales(N) if each else np.float32(0.03)
    tensors = {"q": integers(dtype, *((N, K) if transposed else (K, N))), "z": zero, "xz": X_ZERO}
    known = {"s": scale, "xs": X_SCALE}
    match op:
        case "QLinearMatMul":
            tensors |= known | {"ys": np.float32(0.5), "yz": np.uint8(128)}
            return QX, f"uint8[{ROWS}, {N}] Y", "Y = QLinearMatMul(x, xs, xz, q, s, z, ys, yz)", tensors
        case "QGemm":
            tensors |= known
            turned = "<transB = 1>" if transposed else ""
            return (
                QX,
                f"float[{ROWS}, {N}] Y",
                f"Y = com.microsoft.QGemm{turned}(x, xs, xz, q, s, z)",
                tensors,
            )
        case "MatMulIntegerToFloat":
            tensors |= known
            body = "Y = com.microsoft.MatMulIntegerToFloat(x, q, xs, s, xz, z)"
            return QX, f"float[{ROWS}, {N}] Y", body, tensors
        case "MatMulInteger, folded":
            del tensors["xz"]
            tensors |= {
                "xs": X_SCALE,
                "xz": X_ZERO,
                "f": (X_SCALE * scale).astype(np.float32),
                "b": integers(np.int8, N).astype(np.int32),
            }
            body = """x = QuantizeLinear(X, xs, xz) i = MatMulInteger(x, q, xz, z) j = Add(i, b) c = Cast<to = 1>(j)
                Y = Mul(c, f)"""
            return f"float[{ROWS}, {K}] X", f"float[{ROWS}, {N}] Y", body, tensors
        case "MatMulInteger, dynamic":
            del tensors["xz"]
            tensors["s"] = scale
            body = """x, xs, xz = DynamicQuantizeLinear(X) i = MatMulInteger(x, q, xz, z) c = Cast<to = 1>(i)
                f = Mul(xs, s) Y = Mul(c, f)"""
            return f"float[{ROWS}, {K}] X", f"float[{ROWS}, {N}] Y", body, tensors
        case "MatMulInteger, one by one":
            del tensors["xz"]
            tensors["s"] = scale
            body = """x, xs, xz = DynamicQuantizeLinear(X) i = MatMulInteger(x, q, xz, z) c = Cast<to = 1>(i)
                d = Mul(c, s) Y = Mul(d, xs)"""
            return f"float[{ROWS}, {K}] X", f"float[{ROWS}, {N}] Y", body, tensors
        case "DynamicQuantizeMatMul":
            del tensors["xz"]
            tensors["s"] = scale
            body = "Y = com.microsoft.DynamicQuantizeMatMul(X, q, s, z)"
            return f"float[{ROWS}, {K}] X", f"float[{ROWS}, {N}] Y", body, tensors
    raise AssertionError(op)


OPERATORS = (
    "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger, folded", "MatMulInteger, dynamic",
    "MatMulInteger, one by one", "DynamicQuantizeMatMul",
)  # fmt: skip


def build(from_text, case):
    inputs, outputs, body, tensors = case
    return from_text(f"{HEAD} g ({inputs}) => ({outputs}) {{ {body} }}", **tensors)


def feeds(model):
    (value,) = model.graph.inputs
    rng = np.random.default_rng(5)
    shape = tuple(value.shape)
    if value.dtype == ir.DataType.UINT8:
        return {value.name: rng.integers(0, 256, shape).astype(np.uint8)}
    return {value.name: rng.standard_normal(shape).astype(np.float32)}


def only(model):
    (weight,), declined = find_weights(model, encoded=True)
    assert not declined
    return weight


def values(array, scale, zero, axis):
    """(array - zero) · scale with the parameters along ``axis``, float64."""
    shape = [-1 if index == axis else 1 for index in range(array.ndim)]
    steps = array.astype(np.float64) - np.reshape(np.asarray(zero, np.float64), shape)
    return steps * np.reshape(np.asarray(scale, np.float64), shape)


def expected(op, fed, W, bias=0.0):
    """What the operator gives for a weight W [K, N], float64, and how exact that is."""
    ((_, x),) = fed.items()
    if x.dtype == np.uint8:
        x = (x.astype(np.float64) - X_ZERO) * np.float64(X_SCALE)
    elif op == "MatMulInteger, folded":
        x = (np.clip(np.rint(x / X_SCALE) + X_ZERO, 0, 255) - X_ZERO) * np.float64(X_SCALE)
    else:
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = np.float32(high - low) / np.float32(255)
        zero = np.rint(np.clip(0 - low / scale, 0, 255))
        x = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * np.float64(scale)
    y = x @ W + bias
    if op == "QLinearMatMul":
        return np.clip(np.rint(y / 0.5) + 128, 0, 255), 1.0
    return y, 1e-4 * np.abs(y).max()


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale an output"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("op", OPERATORS)
def test_linears_on_integers(from_text, run, op, dtype, each):
    """K, N and values are right, they are what the runtime multiplies by, and half of them can become zeros."""
    case = linear(op, dtype, each)
    tensors = case[3]
    model = build(from_text, case)
    weight = only(model)
    assert (weight.name, weight.shape, weight.size, weight.layer) == (
        "q", (K, N), K * N, "Gemm" if op == "QGemm" else "MatMul",
    )  # fmt: skip
    scale = tensors["s"] if "s" in tensors else tensors["f"] / X_SCALE
    exact = values(tensors["q"], scale, tensors["z"], 1)
    np.testing.assert_allclose(weight.matrix(), exact, rtol=1e-6)
    bias = tensors["b"] * np.float64(X_SCALE) * scale if "b" in tensors else 0.0
    wanted, tolerance = expected(op, feeds(model), exact, bias)
    np.testing.assert_allclose(run(model, feeds(model))["Y"], wanted, atol=tolerance)
    np.testing.assert_array_equal(weight.stored(weight.matrix()), tensors["q"])

    keep = np.random.default_rng(3).random((K, N)) < 0.5
    stored = weight.stored(np.where(keep, weight.matrix(), np.float32(0)))
    np.testing.assert_array_equal(stored, np.where(keep, tensors["q"], np.broadcast_to(tensors["z"], (K, N))))
    weight.value.const_value = ir.tensor(stored, name="q")
    wanted, tolerance = expected(op, feeds(model), np.where(keep, exact, 0), bias)
    np.testing.assert_allclose(run(model, feeds(model))["Y"], wanted, atol=tolerance)


def test_a_transposed_gemm(from_text, run):
    case = linear("QGemm", np.int8, each=True, transposed=True)
    model = build(from_text, case)
    weight = only(model)
    assert weight.shape == (K, N)
    exact = values(case[3]["q"], case[3]["s"], case[3]["z"], 0).T
    np.testing.assert_allclose(weight.matrix(), exact, rtol=1e-6)
    wanted, tolerance = expected("QGemm", feeds(model), exact)
    np.testing.assert_allclose(run(model, feeds(model))["Y"], wanted, atol=tolerance)


def conv(op, dtype, each, group=1):
    """A convolution 4 -> 6 channels, 3x3."""
    M, C = 6, 4 // group
    zero = np.zeros(M, dtype) if each else np.array(0 if op == "QLinearConv" else 2, dtype)
    scale = scales(M) if each else np.float32(0.03)
    tensors = {"q": integers(dtype, M, C, 3, 3), "z": zero, "xs": X_SCALE, "xz": X_ZERO}
    if op == "QLinearConv":
        tensors |= {"s": scale, "ys": np.float32(0.5), "yz": np.uint8(128)}
        body = f"Y = QLinearConv<group = {group}>(x, xs, xz, q, s, z, ys, yz)"
        return "uint8[2, 4, 7, 7] x", "uint8[2, 6, 5, 5] Y", body, tensors
    tensors["f"] = (X_SCALE * scale).reshape((1, M, 1, 1) if each else ()).astype(np.float32)
    if each:
        tensors["z"] = np.array(0, dtype)
    body = f"""x = QuantizeLinear(X, xs, xz) i = ConvInteger<group = {group}>(x, q, xz, z) c = Cast<to = 1>(i)
        Y = Mul(c, f)"""
    return "float[2, 4, 7, 7] X", "float[2, 6, 5, 5] Y", body, tensors


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale an output"])
@pytest.mark.parametrize(
    ("op", "dtype"), [("QLinearConv", np.int8), ("QLinearConv", np.uint8), ("ConvInteger", np.uint8)]
)
def test_convolutions_on_integers(from_text, run, op, dtype, each, group):
    case = conv(op, dtype, each, group)
    tensors = case[3]
    model = build(from_text, case)
    weight = only(model)
    assert (weight.shape, weight.layer, weight.dims) == ((36 // group, 6), "Conv", (6, 4 // group, 3, 3))
    scale = tensors["s"] if op == "QLinearConv" else tensors["f"].reshape(-1) / X_SCALE
    zero = np.broadcast_to(tensors["z"], (6,)) if np.size(tensors["z"]) > 1 else tensors["z"]
    np.testing.assert_allclose(
        weight.matrix(), values(tensors["q"], scale, zero, 0).reshape(6, -1).T, rtol=1e-6
    )
    twin = from_text(
        f"""{HEAD} g ({case[0]}) => (float[2, 6, 5, 5] Y) {{
        {"" if op == "QLinearConv" else "x = QuantizeLinear(X, xs, xz)"}
        d = DequantizeLinear(x, xs, xz) Y = Conv<group = {group}>(d, w) }}""",
        xs=X_SCALE,
        xz=X_ZERO,
        w=np.ascontiguousarray(weight.matrix().T).reshape(tensors["q"].shape),
    )
    wanted, got = run(twin, feeds(model))["Y"], run(model, feeds(model))["Y"]
    if op == "QLinearConv":
        wanted, tolerance = np.clip(np.rint(wanted / 0.5) + 128, 0, 255), 1.0
    else:
        tolerance = 1e-4 * np.abs(wanted).max()
    np.testing.assert_allclose(got.astype(np.float32), wanted, atol=tolerance)


BY_HAND = {
    "a scale": ("m = Mul(f, s)", {"s": np.float32(0.1)}),
    "a scale an output": ("m = Mul(f, s)", {"s": scales(N)}),
    "a scale an input": ("m = Mul(s, f)", {"s": scales(K, 1)}),
    "a zero point": ("d = Sub(f, z) m = Mul(d, s)", {"s": scales(1, N), "z": np.float32(5)}),
    "zero points": ("d = Sub(f, z) m = Mul(d, s)", {"s": scales(1, N), "z": (np.arange(N) % 8).astype(np.float32)}),
    "zero points of integers": (
        "g = Cast<to = 1>(z) d = Sub(f, g) m = Mul(d, s)", {"s": scales(N), "z": np.full(N, 4, np.int8)},
    ),
    "no scale": ("m = Identity(f)", {}),
    "only a zero point": ("m = Sub(f, z)", {"z": np.float32(3)}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.int4])
@pytest.mark.parametrize("case", BY_HAND)
def test_integers_that_are_cast(from_text, run, case, dtype):
    body, tensors = BY_HAND[case]
    q = RNG.integers(-8, 8, (K, N)).astype(dtype)
    tensors = tensors | {"q": q}
    opset = HEAD.replace("17", "21").replace("9", "10")
    model = from_text(
        f"{opset} g (float[3, {K}] X) => (float[3, {N}] Y) {{ f = Cast<to = 1>(q) {body} Y = MatMul(X, m) }}",
        **tensors,
    )
    weight = only(model)
    assert isinstance(weight.encoding, Affine)
    x = np.eye(K, dtype=np.float32)[:3]
    np.testing.assert_array_equal(run(model, {"X": x})["Y"], weight.matrix()[:3])
    np.testing.assert_array_equal(weight.stored(weight.matrix()), q)
    pruned = np.where(
        np.abs(weight.matrix()) < np.median(np.abs(weight.matrix())), np.float32(0), weight.matrix()
    )
    weight.value.const_value = ir.tensor(weight.stored(pruned), name="q")
    np.testing.assert_array_equal(run(model, {"X": x})["Y"], pruned[:3])


BOTH = "f = Cast<to = 1>(q) d = Sub(f, z) m = Mul(d, s)"


@pytest.mark.parametrize(
    ("body", "tensors", "reason"),
    [
        (BOTH, {"z": np.float32(0.5), "s": scales(N)}, "no numbers of INT8"),
        (BOTH, {"z": np.float32(300), "s": scales(N)}, "no numbers of INT8"),
        (BOTH, {"z": np.zeros((K, 1), np.float32), "s": scales(N)}, "along one axis"),
        ("f = Cast<to = 1>(q) m = Mul(f, s)", {"s": scales(K, N)}, "does not fit (24, 10)"),
        ("f = Cast<to = 1>(q) m = Mul(f, s) v = Neg(f)", {"s": scales(N)}, "also read elsewhere"),
        ("f = Cast<to = 1>(q) m = Mul(f, s) v = Neg(q)", {"s": scales(N)}, "also read elsewhere"),
    ],
)  # fmt: skip
def test_casts_that_cannot_be_read(from_text, body, tensors, reason):
    model = from_text(
        f"{HEAD} g (float[3, {K}] X) => (float[3, {N}] Y) {{ {body} Y = MatMul(X, m) }}",
        q=integers(np.int8, K, N),
        **tensors,
    )
    weights, ((name, why),) = find_weights(model, encoded=True)
    assert not weights
    assert name == "q"
    assert reason in why


def test_integers_behind_other_operators_are_no_weight(from_text):
    model = from_text(
        f"{HEAD} g (float[3, {K}] X) => (float[3, {N}] Y) {{ f = Cast<to = 1>(q) e = Exp(f) Y = MatMul(X, e) }}",
        q=integers(np.int8, K, N),
    )
    assert find_weights(model, encoded=True) == ([], [])


def test_a_scale_that_is_not_found_is_said(from_text):
    body = "i = MatMulInteger(x, q, xz, z) Y = Cast<to = 1>(i)"
    q = integers(np.int8, K, N)
    model = from_text(f"{HEAD} g ({QX}) => (float[{ROWS}, {N}] Y) {{ {body} }}", q=q, z=np.int8(7), xz=X_ZERO)
    weight = only(model)
    assert isinstance(weight.encoding, Unscaled)
    assert str(weight.encoding) == "INT8 with a scale that is not known"
    np.testing.assert_array_equal(weight.matrix(), q.astype(np.float32) - 7)
    assert input_grid(weight.nodes[0]).scale is None


LEFT = {
    "another user": ("n = Neg(q) o = Cast<to = 1>(n)", {}, "also used by Neg"),
    "another grid": (
        "o = com.microsoft.MatMulIntegerToFloat(x, q, xs, t, xz)",
        {"t": scales(N)},
        "shared by layers that read its integers on different grids",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_integers_that_others_read_too(from_text, case):
    extra, tensors, reason = LEFT[case]
    inputs, output, body, own = linear("MatMulIntegerToFloat", np.int8, each=True)
    model = build(from_text, (inputs, output, f"{body} {extra}", own | tensors))
    assert find_weights(model, encoded=True) == ([], [("q", reason)])


def test_layers_may_share_integers_on_one_grid(from_text):
    inputs, _, body, own = linear("MatMulIntegerToFloat", np.int8, each=True)
    again = body.replace("Y =", "P =")
    model = build(from_text, (inputs, f"float[{ROWS}, {N}] Y, float[{ROWS}, {N}] P", f"{body} {again}", own))
    assert len(only(model).nodes) == 2


@pytest.mark.parametrize(
    ("changed", "inputs", "reason"),
    [
        ("s", f"{QX}, float s", "has a scale that is no constant"),
        ("z", f"{QX}, int8 z", "has a zero point that is no constant"),
        ("q", f"{QX}, int8[{K}, {N}] q", None),
    ],
)
def test_what_is_given_in_every_run(from_text, changed, inputs, reason):
    _, output, body, own = linear("QLinearMatMul", np.int8, each=False)
    del own[changed]
    weights, declined = find_weights(build(from_text, (inputs, output, body, own)), encoded=True)
    assert not weights
    assert declined == ([] if reason is None else [("q", reason)])


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("s", scales(N - 1), f"has scales FLOAT of shape ({N - 1},) for {N} outputs"),
        ("s", scales(N, 1), f"has scales FLOAT of shape ({N}, 1) for {N} outputs"),
        ("z", integers(np.int8, K), f"has zero points of shape ({K},) for {N} outputs"),
        ("z", np.uint8(3), "has dtype INT8 and a zero point of UINT8"),
        ("q", integers(np.int8, K), "has rank 1"),
    ],
)
def test_hostile_sizes_are_left_alone(from_text, name, array, reason):
    inputs, output, body, own = linear("QLinearMatMul", np.int8, each=False)
    model = build(from_text, (inputs, output, body, own))
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    assert find_weights(model, encoded=True) == ([], [("q", reason)])


def test_a_constant_activation_is_no_weight(from_text):
    """The integers on the left are the input of the layer, whatever they are."""
    _, output, body, own = linear("QLinearMatMul", np.int8, each=False)
    del own["q"]
    own["x"] = integers(np.uint8, ROWS, K)
    model = build(from_text, (f"int8[{K}, {N}] q", output, body, own))
    assert find_weights(model, encoded=True) == ([], [])


def test_callers_that_take_floats_do_not_meet_them(from_text):
    model = build(from_text, linear("QLinearMatMul", np.int8, each=True))
    assert find_weights(model) == ([], [])
    assert find_weights(model, ("Conv",), encoded=True) == ([], [])


@pytest.mark.parametrize("case", ["a scale", "a zero point", "zero points of integers", "no scale"])
def test_the_work_of_integers_that_are_cast(from_text, case):
    body, tensors = BY_HAND[case]
    model = from_text(
        f"{HEAD} g (float[3, {K}] X) => (float[3, {N}] Y) {{ f = Cast<to = 1>(q) {body} Y = MatMul(X, m) }}",
        q=integers(np.int8, K, N),
        **tensors,
    )
    (work,) = Work(model).count()
    assert (work.op_type, work.weight, work.products) == ("MatMul", "q", 3 * K * N)
    assert work.reason.startswith("its weight is computed in every run, by ")


@pytest.mark.parametrize("op", OPERATORS)
def test_the_work_of_operators_on_integers(from_text, op):
    (work,) = Work(build(from_text, linear(op, np.uint8, each=True))).count()
    assert (work.weight, work.products) == ("q", ROWS * K * N)


@pytest.mark.parametrize(("op", "group"), [("QLinearConv", 1), ("QLinearConv", 2), ("ConvInteger", 1)])
def test_the_work_of_convolutions_on_integers(from_text, op, group):
    (work,) = Work(build(from_text, conv(op, np.uint8, False, group))).count()
    assert (work.weight, work.products) == ("q", 2 * 25 * 6 * 36 // group)


@pytest.mark.parametrize("op", ["Mul(t, s)", "Mul(s, t)", "Sub(t, s)", "Sub(s, t)"])
def test_scaled_activations_are_no_weight(from_text, op):
    model = from_text(
        f"{HEAD} g (float[3, {K}] X) => (float[3, 3] Y) {{ t = Transpose(X) m = {op} Y = MatMul(X, m) }}",
        s=np.float32(0.1),
    )
    (work,) = Work(model).count()
    assert (work.weight, work.reason) == ("", "multiplies computed values: there is no weight")
