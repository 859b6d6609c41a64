"""Linears of int8 with inputs that are rounded already, inside ONNX Runtime: with the library and on the function
bodies."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.int8_quads import pack_dense, pack_quads
from sparse_onnx.sparse_ops.ops import q_matmul
from sparse_onnx.sparse_ops.ops.q_matmul import Grids
from sparse_onnx.sparse_ops.ops.sparse_matmul import OP_TYPES as ACTIVATIONS

K, N = 77, 45
RNG = np.random.default_rng(5)
BIAS = RNG.normal(size=N).astype(np.float32)
SCALES = RNG.uniform(0.001, 0.01, N).astype(np.float32)
STEP = np.float32(0.02)
GRIDS = {"none": (0.0, 0, 0), "unsigned": (0.0625, -120, 135), "signed": (0.25, -123, 132)}
both_ways = pytest.mark.parametrize("library", [True, False])
both_formats = pytest.mark.parametrize("pack", [pack_quads, pack_dense])
both_types = pytest.mark.parametrize(
    ("dtype", "zero"), [(np.uint8, 131), (np.int8, -7), (np.uint8, 0), (np.int8, -128), (np.int8, 127)]
)


def integers(K=K, N=N, kept=0.3, seed=0):
    rng = np.random.default_rng(seed)
    found = rng.integers(-128, 128, (K, N)).astype(np.int8)
    return np.where(rng.random((K, N)) < kept, found, np.int8(0))


def tokens(*shape, dtype=np.uint8, seed=2):
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape).astype(dtype)


@pytest.fixture
def layer(layer_model):
    def layer(weight, dtype=np.uint8, zero=0, *, activation="none", grid="none", bias=BIAS, **options):
        scale, low, high = GRIDS[grid]
        grids = Grids(int(np.iinfo(dtype).min), scale, low, high)
        return layer_model(
            weight,
            bias,
            q_matmul.op_type_of(ACTIVATIONS[activation], weight.dense),
            x_type=options.pop("x_type", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
            attributes={**grids.attributes(), **options.pop("attributes", {})},
            arrays={"x_scale": np.array(STEP), "x_zero_point": np.array(zero, dtype)}
            | options.pop("arrays", {}),
            **options,
        )

    return layer


def expected(x, zero, weight, *, activation="none", grid="none", bias=BIAS, scale=STEP):
    grids = Grids(int(np.iinfo(x.dtype).min), *GRIDS[grid])
    return q_matmul.reference(x, np.array(scale), np.array(zero), weight, bias, grids, activation)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=3e-6 * np.abs(wanted).max(initial=0))


@both_ways
@both_formats
@both_types
def test_sessions_compute_what_the_contract_says(dtype, zero, pack, library, layer, open_session):
    weight = pack(integers(), SCALES)
    session = open_session(layer(weight, dtype, zero, x_shape=None), library=library)
    for shape in ((1, K), (2, 9, K), (130, K), (K,), (0, K)):
        x = tokens(*shape, dtype=dtype)
        (y,) = session.run(None, {"X": x})
        assert y.shape == (*shape[:-1], N)
        if x.size:
            assert_close(y, expected(x, zero, weight))


@both_ways
@both_formats
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, pack, library, layer, open_session):
    weight = pack(integers(), SCALES)
    session = open_session(layer(weight, zero=128, activation=activation), library=library)
    x = tokens(9, K)
    assert_close(session.run(None, {"X": x})[0], expected(x, 128, weight, activation=activation))


@both_ways
@both_formats
@pytest.mark.parametrize("grid", ["unsigned", "signed"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_products_lie_on_their_grid(activation, grid, pack, library, layer, open_session):
    """With scales that are powers of two all is exact, halves included: they go to the even side."""
    weight = pack(integers(), np.full(N, 2**-7, np.float32))
    proto = layer(
        weight, zero=128, activation=activation, grid=grid, arrays={"x_scale": np.array([2**-3], np.float32)}
    )
    x = tokens(40, K)
    x[0] = 128
    wanted = expected(x, 128, weight, activation=activation, grid=grid, scale=np.float32(2**-3))
    found = open_session(proto, library=library).run(None, {"X": x})[0]
    assert_close(found, wanted)
    if activation == "none":
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
        steps = (found - BIAS) / GRIDS[grid][0]
        assert {np.rint(steps).min(), np.rint(steps).max()} == {*GRIDS[grid][1:]}


@both_ways
@both_formats
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_every_opset_gives_the_same(opset, pack, library, layer, open_session):
    weight = pack(integers(), SCALES)
    session = open_session(layer(weight, np.int8, 3, activation="relu", opset=opset), library=library)
    x = tokens(6, K, dtype=np.int8)
    assert_close(session.run(None, {"X": x})[0], expected(x, 3, weight, activation="relu"))


@both_ways
@both_formats
def test_sums_are_exact_where_pairs_of_products_saturate(pack, library, layer, open_session):
    V = np.full((4096, 8), 127, np.int8)
    V[:, 1] = -128
    V[::2, 2] = -127
    weight, bias = pack(V, np.ones(8, np.float32)), np.zeros(8, np.float32)
    proto = layer(weight, zero=0, bias=bias, arrays={"x_scale": np.float32(1)})
    x = np.full((2, 4096), 255, np.uint8)
    x[1, ::3] = 1
    found = open_session(proto, library=library).run(None, {"X": x})[0]
    np.testing.assert_array_equal(found, (x.astype(np.int64) @ V).astype(np.float32))


@both_ways
@both_formats
@both_types
def test_scale_and_zero_point_may_be_computed_in_every_run(dtype, zero, pack, library, layer, open_session):
    weight = pack(integers(), SCALES)
    session = open_session(layer(weight, dtype, 1, inputs=("x_scale", "x_zero_point")), library=library)
    x = tokens(20, K, dtype=dtype)
    for scale, point in ((STEP, zero), (np.float32(3), np.iinfo(dtype).max)):
        feeds = {"X": x, "x_scale": np.array(scale), "x_zero_point": np.array(point, dtype)}
        assert_close(session.run(None, feeds)[0], expected(x, point, weight, scale=scale))


@both_formats
@pytest.mark.parametrize("grid", ["none", "unsigned"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic"])
def test_every_instruction_set_gives_the_same(isa, grid, pack, layer, open_session, run_forced):
    weight, x = pack(integers(512, 64, 0.6), np.full(64, 2**-7, np.float32)), tokens(37, 512, dtype=np.int8)
    bias = np.zeros(64, np.float32)
    proto = layer(weight, np.int8, -3, grid=grid, bias=bias, arrays={"x_scale": np.float32(0.125)})
    (found,) = run_forced(proto, {"X": x}, isa)
    np.testing.assert_array_equal(found, open_session(proto).run(None, {"X": x})[0])
    wanted = expected(x, -3, weight, grid=grid, bias=bias, scale=np.float32(0.125))
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@both_formats
def test_threads_give_the_same_bytes(pack, layer, open_session):
    weight = pack(integers(300, 260), np.full(260, 0.003, np.float32))
    proto = layer(weight, zero=99, grid="signed", activation="silu", bias=np.ones(260, np.float32))
    x = tokens(300, 300)
    one, two, four = (open_session(proto, threads=n).run(None, {"X": x})[0] for n in (1, 2, 4))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, four)


@both_formats
def test_the_node_is_ours_only_with_the_library(pack, layer, open_session, tmp_path):
    weight = pack(integers(), SCALES)
    kept = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(layer(weight, np.int8), library=library, options=options)
        kept[library] = [node.op_type for node in onnx.load(tmp_path / f"{library}.onnx").graph.node]
    assert kept[True] == [q_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)]
    assert "MatMulInteger" in kept[False]
    assert not {"ScatterND", "CumSum", "Transpose"} & {*kept[False]}  # what makes the weight is folded


@both_formats
@pytest.mark.parametrize("x", [["batch", "tokens", K], [4, K], [K]])
def test_output_shapes_are_inferred(x, pack, layer, open_session):
    session = open_session(layer(pack(integers(), SCALES), x_shape=x))
    assert session.get_outputs()[0].shape == [*x[:-1], N]


@both_formats
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"x_lowest": -1}, "attribute x_lowest is neither 0 nor -128"),
        ({"x_lowest": None}, "x_lowest"),
        ({"h_scale": -0.5}, "attribute h_scale is neither 0 nor"),
        ({"h_scale": 1e-31}, "attribute h_scale is neither 0 nor"),
        ({"h_scale": float("nan")}, "attribute h_scale is neither 0 nor"),
        ({"h_scale": float("inf")}, "attribute h_scale is neither 0 nor"),
        ({"h_low": -65536}, "attribute h_low is -65536, expected -65535..65535"),
        ({"h_low": 3, "h_high": 2}, r"attribute h_high is 2, expected 3\.\.65535"),
        ({"h_high": 2**62}, "attribute h_high is"),
        ({"format": "newer"}, "attribute format is 'newer'"),
        ({"K": K + 8}, ""),
    ],
)
def test_wrong_attributes_are_refused(attributes, message, pack, layer, open_session):
    weight = pack(integers(), SCALES)
    op_type = q_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    proto = layer(weight, attributes=attributes, x_shape=None, with_body=False)
    with pytest.raises(Exception, match=rf"\({op_type}\): .*{message}"):
        open_session(proto)


@both_formats
def test_damaged_weights_are_refused(pack, layer, open_session):
    weight = dataclasses.replace(pack(integers(), SCALES), scales=SCALES[:-1])
    with pytest.raises(Exception, match="scales has 44 elements"):
        open_session(layer(weight, with_body=False))


@both_formats
@pytest.mark.parametrize(
    ("x", "feeds", "message"),
    [
        (tokens(3, K - 1), {}, rf"input X has shape .*, expected \[..., {K}\]"),
        (tokens(3, K)[0, 0], {}, "input X has shape"),
        (tokens(3, K, dtype=np.int8), {}, "must both be uint8, as x_lowest says"),
        (tokens(3, K).astype(np.float32), {}, "input X is neither int8 nor uint8"),
        (tokens(3, K).astype(np.uint16), {}, "input X is neither int8 nor uint8"),
        (tokens(3, K), {"x_zero_point": np.int8(0)}, "must both be uint8, as x_lowest says"),
        (tokens(3, K), {"x_zero_point": np.float32(0)}, "input x_zero_point is neither int8 nor uint8"),
        (tokens(3, K), {"x_zero_point": np.zeros(K, np.uint8)}, "must have one element each"),
        (tokens(3, K), {"x_scale": np.zeros(2, np.float32)}, "must have one element each"),
        (tokens(3, K), {"x_scale": np.zeros(0, np.float32)}, "must have one element each"),
    ],
)
def test_wrong_inputs_are_refused_by_name(x, feeds, message, pack, layer, open_session):
    weight = pack(integers(), SCALES)
    given = {"x_scale": np.array(STEP), "x_zero_point": np.array(0, np.uint8)} | feeds
    proto = layer(
        weight,
        arrays=given,
        inputs=tuple(given),
        x_shape=None,
        x_type=onnx.helper.np_dtype_to_tensor_dtype(x.dtype),
        with_body=False,
    )
    op_type = q_matmul.op_type_of(ACTIVATIONS["none"], weight.dense)
    with pytest.raises(Exception, match=rf"\({op_type}\): .*{message}"):
        open_session(proto).run(None, {"X": np.asarray(x), **{k: np.asarray(v) for k, v in given.items()}})


@pytest.mark.parametrize("opset", [13, 18, 26])
@pytest.mark.parametrize("op_type", q_matmul.OP_TYPES)
def test_bodies_are_well_formed(op_type, opset):
    body = q_matmul.function_body(op_type, opset)
    assert body.domain == DOMAIN
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = {"": opset, DOMAIN: VERSION}
    onnx.checker.check_function(body, context)


def test_the_reference_follows_from_the_formulas():
    """One token by hand: (191 - 100) · 2 - (40 - 100) · 3 = 362 steps of 0.25, then to 4 steps of 20 and the bias."""
    weight = pack_dense(np.array([[2], [-3]], np.int8), np.array([0.5], np.float32))
    x, zero, scale = np.array([[191, 40]], np.uint8), np.array(100, np.uint8), np.float32(0.5)
    on_grid = q_matmul.reference(x, scale, zero, weight, np.ones(1), Grids(0, 20.0, -7, 7))
    plain = q_matmul.reference(x, scale, zero, weight, np.ones(1), Grids())
    assert (plain.item(), on_grid.item()) == (91.5, 101.0)
