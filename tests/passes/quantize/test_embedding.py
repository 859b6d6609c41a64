"""quant.embedding: rows against float64, what ONNX Runtime keeps in memory, and tables that are left alone."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.bit_packing import unpack
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.embedding import QuantizeEmbeddings

RNG = np.random.default_rng(4)
V, D = 600, 32
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
IDS = RNG.integers(0, V, (2, 7))
BODY = "E = Gather(T, I) Y = MatMul(E, W)"


def build(from_text, body=BODY, table=TABLE, opset=17, y="float[B, S, 8] Y", **tensors):
    version = 10 if opset >= 21 else 8
    return from_text(
        f'<ir_version: {version}, opset_import: ["" : {opset}]> g (int64[B, S] I) => ({y}) {{ {body} }}',
        T=table,
        **{"W": RNG.standard_normal((D, 8)).astype(np.float32), **tensors},
    )


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize(
    ("bits", "group", "bound"), [(8, 0, 0.006), (8, 16, 0.005), (4, 0, 0.11), (4, 16, 0.09)]
)
def test_rows_are_near_the_tables(from_text, run, bits, group, bound, opset):
    table = TABLE.copy()
    table[3] = 0
    model = build(from_text, "Y = Gather(T, I)", table, opset, "float[B, S, 32] Y")
    del model.graph.initializers["W"]
    ids = np.concatenate([IDS, np.full((2, 1), 3)], axis=1)
    result = QuantizeEmbeddings(bits=bits, group_size=group)(model)
    found = run(model, {"I": ids})["Y"].astype(np.float64)
    error = np.linalg.norm(found - table[ids]) / np.linalg.norm(table[ids])
    assert bound / 3 < error < bound
    assert (found[:, -1] == 0).all()
    (layer,) = result.layers
    groups = D // (group or D)
    assert (layer.bits, layer.group_size, layer.nbytes) == (bits, group, V * (D * bits // 8 + 2 * groups))


def test_the_values_are_integers_times_scales(from_text, run):
    """The operators against float64 on what is stored."""
    model = build(from_text)
    W = model.graph.initializers["W"].const_value.numpy().astype(np.float64)
    QuantizeEmbeddings(bits=4, group_size=16, scale_type="float32")(model)
    packed, scale = (model.graph.initializers[name].const_value.numpy() for name in ("T", "T.scale"))
    integers = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float64) - 8
    rows = integers * np.repeat(scale, 16, axis=1)
    np.testing.assert_allclose(run(model, {"I": IDS})["Y"], rows[IDS] @ W, rtol=1e-4, atol=1e-4)


def test_negative_ids_count_from_the_end(from_text, run):
    model = build(from_text)
    expected = run(model, {"I": IDS - V})["Y"]
    QuantizeEmbeddings()(model)
    np.testing.assert_allclose(run(model, {"I": IDS - V})["Y"], expected, atol=0.1)
    np.testing.assert_array_equal(run(model, {"I": IDS - V})["Y"], run(model, {"I": IDS})["Y"])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_runtime_does_not_unpack_the_whole_table(from_text, tmp_path, bits):
    model = build(from_text)
    QuantizeEmbeddings(bits=bits)(model)
    model_io.save_model(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "folded.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "folded.onnx")
    assert folded.ByteSize() < V * D * bits // 8 + V * 2 + 12000 < V * D * 4
    assert (
        sum(path.stat().st_size for path in tmp_path.glob("model.onnx*")) < V * D * bits // 8 + V * 2 + 12000
    )


def test_half_precision(from_text, run):
    model = from_text(
        '<ir_version: 8, opset_import: ["" : 17]> g (int64[B, S] I) => (float16[B, S, 32] Y) { Y = Gather(T, I) }',
        T=TABLE.astype(np.float16),
    )
    QuantizeEmbeddings()(model)
    found = run(model, {"I": IDS})["Y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, TABLE[IDS], atol=0.03)


# -- a head that is tied to the table ----------------------------------------------------------------

TIED = "E = Gather(T, I) H = Transpose<perm = [1, 0]>(T) Y = MatMul(E, H)"
BY_GEMM = "E = Gather(T, I) S = Shape(I) F = Reshape(E, R) Y = Gemm<transB = 1>(F, T)"
FLAT = np.array([-1, D], np.int64)


def tied(from_text, body=TIED, opset=17, table=TABLE, **tensors):
    if body is TIED:
        return build(from_text, body, table, opset, f"float[B, S, {V}] Y")
    return build(from_text, body, table, opset, f"float[N, {V}] Y", R=FLAT, **tensors)


@pytest.mark.parametrize("opset", [13, 17, 23])
@pytest.mark.parametrize("body", [TIED, BY_GEMM])
@pytest.mark.parametrize(
    ("bits", "group", "bound"), [(8, 0, 0.02), (8, 16, 0.02), (4, 0, 0.25), (4, 16, 0.2)]
)
def test_a_tied_head_has_the_rows_of_the_table(from_text, run, body, bits, group, bound, opset):
    """Rows and head are those of the integers that are stored, once; against float64."""
    model = tied(from_text, body, opset)
    result = QuantizeEmbeddings(bits=bits, group_size=group)(model)
    packed, scale = (model.graph.initializers[name].const_value.numpy() for name in ("T", "T.scale"))
    groups = D // (group or D)
    assert packed.shape == (1, D * bits // 8, V)
    integers = unpack(packed, bits, D).astype(np.float64) - 2 ** (bits - 1)  # [D, V]
    rounded = (integers * np.repeat(scale[:, 0].astype(np.float64), D // groups, axis=0)).T
    np.testing.assert_allclose(rounded, TABLE, atol=np.abs(TABLE).max() * bound)
    expected = (rounded[IDS] @ rounded.T).reshape(run(model, {"I": IDS})["Y"].shape)
    np.testing.assert_allclose(run(model, {"I": IDS})["Y"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(run(model, {"I": IDS - V})["Y"], run(model, {"I": IDS})["Y"])
    (layer,) = result.layers
    assert (layer.bits, layer.group_size, layer.nbytes) == (bits, group, V * (D * bits // 8 + 2 * groups))
    assert not result.declined


def test_a_tied_table_is_stored_once(from_text, tmp_path):
    model = tied(from_text)
    QuantizeEmbeddings()(model)
    model_io.save_model(model, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("model.onnx*"))
    assert V * D < size < V * D + V * 2 + 12000 < 2 * V * D


def test_no_ids_and_one(from_text, run):
    model = tied(from_text)
    QuantizeEmbeddings()(model)
    assert run(model, {"I": np.zeros((2, 0), np.int64)})["Y"].shape == (2, 0, V)
    assert run(model, {"I": np.full((1, 1), 5)})["Y"].shape == (1, 1, V)


def test_a_tied_head_is_a_weight_for_forms_of_few_bits(from_text, run):
    """What is made of the head does not reach the rows that are looked up."""
    model = tied(from_text)
    QuantizeEmbeddings()(model)
    expected = run(model, {"I": IDS})["Y"]
    (weight,), _ = find_weights(model, encoded=True)
    assert (weight.name, weight.shape, weight.is_looked_up) == ("T", (D, V), True)
    (candidate,), declined = LowerDynamicInt8.find_candidates(model)
    assert not declined
    LowerDynamicInt8().put(model, [candidate], Packer(PassContext()), PassContext())
    assert "MatMulInteger" in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run(model, {"I": IDS})["Y"], expected, atol=0.05 * np.abs(expected).max())


def test_a_tied_head_is_not_pruned(from_text):
    """Its zeros would be those of the table."""
    model = tied(from_text)
    QuantizeEmbeddings()(model)
    result = Magnitude(sparsity=0.5)(model)
    assert not result.modified
    assert [place.place for place in result.declined] == ["T"]
    assert "tied to a table of embeddings" in result.declined[0].reason


def test_half_precision_of_a_tied_table(from_text, run):
    model = from_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (int64[B, S] I) => (float16[B, S, 600] Y) {{ {TIED} }}',
        T=TABLE.astype(np.float16),
    )
    expected = run(model, {"I": IDS})["Y"].astype(np.float32)
    QuantizeEmbeddings()(model)
    found = run(model, {"I": IDS})["Y"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


# -- what is left alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        (
            "E = Gather(T, I) Y = MatMul(Z, T)",
            {},
            "is also read by MatMul: what is tied to it would be rounded",
        ),
        ("E = Gather(T, I) Y = Gemm(Z, T)", {}, "is also read by Gemm"),
        ("E = Gather(T, I) H = Transpose<perm = [1, 0]>(T) Y = Mul(H, Q)", {}, "is also read by Transpose"),
        ("E = Gather(T, I) Y = Transpose<perm = [1, 0]>(T)", {}, "is also read by Transpose"),
        (BODY, {"ignore": ("T",)}, "listed in ignore"),
        (BODY, {"bits": 4, "group_size": 64}, "rows of 32 are no multiple of the group size 64"),
    ],
)
def test_a_table_that_is_left_alone(from_text, body, options, reason):
    y = "float[B, S, 8] Y" if body is BODY else "float[A, C] Y"
    extra = {name: np.ones((2, V), np.float32) for name in "Z" if name in body}
    extra |= {"Q": np.float32(2)} if "Q" in body else {}
    model = build(from_text, body, y=y, **extra)
    result = QuantizeEmbeddings(**options)(model)
    assert not result.modified
    (place,) = result.declined
    assert place.place == "T"
    assert reason in place.reason


def test_tables_that_are_none(from_text):
    """Too few rows, columns taken, ids that are constant, and no matrix."""
    model = build(from_text, table=TABLE[:200])
    (place,) = QuantizeEmbeddings()(model).declined
    assert "has 200 rows, fewer than 256" in place.reason
    assert QuantizeEmbeddings(targets=("T",))(model).layers
    for body, y in (
        ("Y = Gather<axis = 1>(T, I)", "float[600, B, S] Y"),
        ("K = Constant<value = int64[2] {1, 2}>() Y = Gather(T, K)", "float[2, 32] Y"),
    ):
        result = QuantizeEmbeddings()(build(from_text, body, y=y))
        assert not result.modified
        assert not result.declined


def test_nan(from_text):
    table = TABLE.copy()
    table[5, 5] = np.nan
    result = QuantizeEmbeddings()(build(from_text, table=table))
    assert [(place.place, place.reason) for place in result.declined] == [("T", "holds NaN or Inf")]


def test_a_scale_that_float16_does_not_have(from_text):
    model = build(from_text, table=TABLE * np.float32(1e8))
    before = ir.to_proto(model).SerializeToString()
    result = QuantizeEmbeddings()(model)
    assert "the largest float16 scale" in result.declined[0].reason
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"group_size": 8}, "group_size must be 16 to 256"),
        ({"scale_type": "double"}, "scale_type must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        QuantizeEmbeddings(**options)


def test_an_unknown_target(from_text):
    with pytest.raises(UsageError, match=r"'U' is no table of embeddings; those of the model are 'T'"):
        QuantizeEmbeddings(targets=("U",))(build(from_text))
