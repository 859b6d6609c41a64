"""Attention inside ONNX Runtime, with the library and on the function bodies."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops import attention

B, H, D, DV = 2, 3, 20, 24
SQ, SK = 6, 10
SCALE = 0.3
NODE = "encoder/layer.3/attention"
LOWEST = np.finfo(np.float32).min
every_op = pytest.mark.parametrize("op_type", attention.OP_TYPES)
MASKED = [op_type for op_type, signature in attention.OP_TYPES.items() if signature.masked]
NAN_TO_ZERO = [op_type for op_type in MASKED if attention.OP_TYPES[op_type].nan_to_zero]
masked_ops = pytest.mark.parametrize("op_type", MASKED)
both_ways = pytest.mark.parametrize("library", [True, False])


def floats(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def feeds(op_type, sq, sk, *, batch=B, mask=None):
    """Inputs; ``mask`` is one, or its shape, by default [B, 1, Sq, Sk]."""
    signature = attention.OP_TYPES[op_type]
    q = (batch, H, sq, D) if signature.heads else (batch, sq, H * D)
    k = (batch, H, sk, D) if signature.split else (batch, sk, H * D)
    v = (batch, H, sk, DV) if signature.split else (batch, sk, H * DV)
    given = {"q": floats(*q), "k": floats(*k, seed=4), "v": floats(*v, seed=5)}
    if signature.masked:
        mask = (batch, 1, sq, sk) if mask is None else mask
        given["mask"] = floats(*mask, seed=6) if isinstance(mask, tuple) else mask
    return given


def model(op_type, *, shapes=None, opset=17, num_heads=H, scale=SCALE, with_body=True):
    """One node; ``shapes`` are those of the inputs by name (default: of unknown rank)."""
    signature, float32 = attention.OP_TYPES[op_type], onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(op_type, signature.inputs, ["Y"], name=NODE, domain=attention.DOMAIN)
    for name, value in (("num_heads", num_heads), ("scale", scale)):
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))
    known = shapes or {}
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info(name, float32, known.get(name)) for name in signature.inputs],
        [onnx.helper.make_tensor_value_info("Y", float32, None)],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(attention.DOMAIN, attention.VERSION),
        ],
        functions=[attention.function_body(op_type, opset)] if with_body else [],
    )


def expected(given, nan_to_zero=False):
    return attention.reference(
        given["q"],
        given["k"],
        given["v"],
        given.get("mask"),
        num_heads=H,
        scale=SCALE,
        nan_to_zero=nan_to_zero,
    )


def assert_close(got, want):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=4e-6)


@every_op
@both_ways
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 9), (2, 130), (5, 5), (9, 70), (70, 9), (130, 64)])
def test_computes_the_reference(op_type, library, sq, sk, open_session):
    given = feeds(op_type, sq, sk)
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], expected(given))


@every_op
@pytest.mark.parametrize("opset", range(13, 27))
def test_body_of_every_opset(op_type, opset, open_session):
    given = feeds(op_type, 5, 7)
    assert_close(
        open_session(model(op_type, opset=opset), library=False).run(None, given)[0], expected(given)
    )


MASK_SHAPES = [
    *itertools.product((B, 1), (H, 1), (SQ, 1), (SK, 1)),
    *itertools.product((H, 1), (SQ, 1), (SK, 1)),
    *itertools.product((SQ, 1), (SK, 1)),
    (SK,),
    (1,),
    (),
]


@masked_ops
@both_ways
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_broadcast(op_type, library, shape, open_session):
    given = feeds(op_type, SQ, SK, mask=shape)
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], expected(given))


@every_op
@both_ways
@pytest.mark.parametrize("single", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("sq", [2, 40])
def test_one_batch_serves_those_of_the_others(op_type, library, single, sq, open_session):
    given = feeds(op_type, sq, 9)
    for name in single:
        given[name] = given[name][1:]
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], expected(given))


@masked_ops
@both_ways
@pytest.mark.parametrize(
    ("sq", "shape"),
    [(SQ, (4, 1, 1, SK)), (1, (4, 1, SQ, SK)), (1, (SQ, SK)), (1, (H, SQ, 1)), (1, (1, 1, 70, SK))],
)
def test_a_mask_for_more_batches_or_queries_repeats_them(op_type, library, sq, shape, open_session):
    given = feeds(op_type, sq, SK, batch=1, mask=shape)
    want = expected(given)
    assert want.shape[:2] == np.broadcast_shapes((1, sq), (shape[0] if len(shape) == 4 else 1, shape[-2]))
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], want)


@masked_ops
@both_ways
@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (6, 10), (40, 130)])
def test_a_mask_for_more_keys_than_one_repeats_it(op_type, library, sq, sk, open_session):
    given = feeds(op_type, sq, sk)
    given["k"] = feeds(op_type, sq, 1)["k"]
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], expected(given))


@masked_ops
@both_ways
@pytest.mark.parametrize("fill", [LOWEST, -1e30, -np.inf])
def test_rows_without_a_key(op_type, library, fill, open_session):
    """The mean of all values where the scores vanish in the mask, NaN or 0 where they are -Inf."""
    mask = np.zeros((B, 1, SQ, SK), np.float32)
    mask[1, :, 2] = fill
    given = feeds(op_type, SQ, SK, mask=mask)
    got = open_session(model(op_type), library=library).run(None, given)[0]
    to_zero = op_type in NAN_TO_ZERO
    want = expected(given, to_zero)
    assert np.isnan(want[1, 2]).all() == (np.isinf(fill) and not to_zero)
    assert (want[1, 2] == 0).all() == (np.isinf(fill) and to_zero)
    assert_close(got, want)


def spoiled(op_type, kind, sq, sk):
    """Inputs with rows whose weights are NaN: row 0 of the first batch, or all rows."""
    mask = floats(B, 1, sq, sk, seed=7)
    given = feeds(op_type, sq, sk, mask=mask)
    signature = attention.OP_TYPES[op_type]
    match kind:
        case "all -Inf":
            mask[0, 0, 0] = -np.inf
        case "NaN in the mask":
            mask[0, 0, 0, sk // 2] = np.nan
        case "NaN and -Inf":
            mask[0, 0, 0] = -np.inf
            mask[0, 0, 0, -1] = np.nan
        case "+Inf in the mask":
            mask[0, 0, 0, sk // 2] = np.inf
        case "NaN in a query":
            given["q"][(0, 0, 0, 1) if signature.heads else (0, 0, 1)] = np.nan
        case "NaN in a key":
            given["k"][(0, 0, sk - 1, 1) if signature.split else (0, sk - 1, 1)] = np.nan
    return given


KINDS = ["all -Inf", "NaN in the mask", "NaN and -Inf", "+Inf in the mask", "NaN in a query", "NaN in a key"]


@pytest.mark.parametrize("op_type", NAN_TO_ZERO)
@both_ways
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sq", "sk"), [(1, 5), (2, 150), (40, 33), (40, 150)])
def test_weights_that_are_no_numbers_become_zeros(op_type, kind, library, sq, sk, open_session):
    given = spoiled(op_type, kind, sq, sk)
    want = expected(given, nan_to_zero=True)
    assert (want[0, 0, :DV] == 0).all()
    assert (want[1] != 0).all()
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], want)


@masked_ops
@both_ways
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sq", [2, 40])
def test_values_that_are_no_numbers_are_seen_by_weights_of_zero(
    op_type, library, special, kind, sq, open_session
):
    """0 times NaN or Inf is NaN, whether a key was masked or a weight was NaN."""
    given = spoiled(op_type, kind, sq, 70)
    given["v"][(0, 0, 3, 1) if attention.OP_TYPES[op_type].split else (0, 3, 1)] = special
    given["mask"][0, 0, -1, 3] = -np.inf
    with np.errstate(invalid="ignore"):
        want = expected(given, nan_to_zero=op_type in NAN_TO_ZERO)
    assert np.isnan(want[0, 0, 1])
    assert np.isnan(want[0, -1, 1])
    assert np.isnan(want[0, 0, DV - 1]) == (op_type not in NAN_TO_ZERO)
    assert_close(open_session(model(op_type), library=library).run(None, given)[0], want)


@every_op
@both_ways
def test_not_a_number_stays_in_its_head(op_type, library, open_session):
    given = feeds(op_type, SQ, SK)
    clean = expected(given)
    given["q"][(1, 0, 2, 0) if attention.OP_TYPES[op_type].heads else (1, 2, 0)] = np.nan
    got = open_session(model(op_type), library=library).run(None, given)[0]
    assert (got[1, 2, :DV] == 0).all() if op_type in NAN_TO_ZERO else np.isnan(got[1, 2, :DV]).all()
    got[1, 2, :DV] = clean[1, 2, :DV]
    assert_close(got, clean)


@every_op
@both_ways
@pytest.mark.parametrize("opset", [13, 15, 17, 26])
@pytest.mark.parametrize(
    ("batch", "sq", "sk"),
    [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)],
    ids=["batches", "queries", "keys", "all"],
)
def test_empty_inputs(op_type, library, opset, batch, sq, sk, open_session):
    session = open_session(model(op_type, opset=opset), library=library)
    got = session.run(None, feeds(op_type, sq, sk, batch=batch))[0]
    np.testing.assert_array_equal(got, np.zeros((batch, sq, H * DV), np.float32))


@every_op
@pytest.mark.parametrize("sq", [1, 200])
def test_threads_give_the_same_bytes(op_type, sq, open_session):
    given = feeds(op_type, sq, 200)
    one, two, four = (open_session(model(op_type), threads=n).run(None, given)[0] for n in (1, 2, 4))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, four)


@every_op
def test_the_node_is_ours_only_with_the_library(op_type, open_session, tmp_path):
    kept = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(model(op_type), library=library, options=options)
        nodes = onnx.load(tmp_path / f"{library}.onnx").graph.node
        kept[library] = [node.op_type for node in nodes if node.domain == attention.DOMAIN]
    assert kept == {True: [op_type], False: []}


@every_op
def test_the_runtime_fuses_the_body(op_type, open_session, tmp_path):
    """The scale goes into the product, as in a graph that was never fused."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    shapes = {name: array.shape for name, array in feeds(op_type, SQ, SK).items()}
    open_session(model(op_type, shapes=shapes), library=False, options=options)
    op_types = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert "FusedMatMul" in op_types
    assert not {"Mul", "Concat", "Constant"} & set(op_types)


@every_op
def test_output_shape_is_inferred(op_type, open_session):
    shapes = known_shapes(op_type)
    (output,) = open_session(model(op_type, shapes=shapes)).get_outputs()
    assert output.shape == ["batch", "tokens", H * DV]


def known_shapes(op_type, *, q="batch", k="batch", v="batch", mask=("batch", 1, 1, "keys"), tokens="tokens"):
    """Of all inputs, with these batches."""
    split, heads = attention.OP_TYPES[op_type].split, attention.OP_TYPES[op_type].heads
    return {
        "q": [q, H, tokens, D] if heads else [q, tokens, H * D],
        "k": [k, H, "keys", D] if split else [k, "keys", H * D],
        "v": [v, H, "keys", DV] if split else [v, "keys", H * DV],
        "mask": list(mask),
    }


@every_op
@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ({"q": 1}, "batch"),
        ({"q": 1, "k": 1}, "batch"),
        ({"k": 1, "v": 1}, "batch"),
        ({"q": 1, "k": 5}, 5),
        ({"k": "other"}, None),
        ({"q": 1, "v": "other"}, None),
        ({"q": 4, "k": "other"}, 4),
    ],
)
def test_what_a_batch_is_broadcast_to_is_inferred(op_type, batches, expected, open_session):
    shapes = known_shapes(op_type, **batches, mask=("tokens", "keys"))
    (output,) = open_session(model(op_type, shapes=shapes)).get_outputs()
    if expected is None:
        assert output.shape[0] not in ("batch", "other", 1, -1)
    else:
        assert output.shape[0] == expected
    assert output.shape[1:] == ["tokens", H * DV]


@masked_ops
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (("tokens", "keys"), ["batch", "tokens"]),
        (("keys",), ["batch", "tokens"]),
        (("batch", 1, "tokens", 1), ["batch", "tokens"]),
        (("others", 1, 1, "keys"), [None, "tokens"]),
        (("rows", "keys"), ["batch", None]),
        ((3, 1, 7, "keys"), [3, 7]),
    ],
)
def test_what_a_mask_repeats_is_inferred(op_type, mask, expected, open_session):
    (output,) = open_session(model(op_type, shapes=known_shapes(op_type, mask=mask))).get_outputs()
    found = [None if str(dim).startswith("sparse_onnx_unknown") else dim for dim in output.shape[:2]]
    assert found == expected


@masked_ops
def test_one_query_and_batch_that_a_mask_repeats_are_inferred(op_type, open_session):
    shapes = known_shapes(op_type, q=1, k=1, v=1, tokens=1, mask=("others", 1, "rows", "keys"))
    (output,) = open_session(model(op_type, shapes=shapes)).get_outputs()
    assert output.shape[:2] == ["others", "rows"]


@every_op
def test_unknown_channels_stay_unknown(op_type, open_session):
    shapes = known_shapes(op_type, tokens=7)
    shapes["q"][-1] = "channels"
    shapes["v"][-1] = "others"
    (output,) = open_session(model(op_type, shapes=shapes)).get_outputs()
    assert output.shape[:2] == ["batch", 7]
    assert not isinstance(output.shape[2], int)
    assert output.shape[2] != "channels"


@every_op
@pytest.mark.parametrize(
    ("attribute", "value"),
    [("num_heads", 0), ("num_heads", -1), ("num_heads", None), ("num_heads", 1.0)]
    + [("scale", value) for value in (float("nan"), float("inf"), None, 1)],
)
def test_wrong_attributes_are_refused_by_name(op_type, attribute, value, open_session):
    with pytest.raises(Exception, match=rf"node '{NODE}' \({op_type}\): attribute {attribute} is"):
        open_session(model(op_type, with_body=False, **{attribute: value}))


MERGED = "AttentionMasked"
WRONG = [
    (
        MERGED,
        "q",
        (B, SQ, H * D + 1),
        r"input q has shape \[2, 6, 61\], expected \[batch, sequence, channels\]",
    ),
    (MERGED, "q", (B, SQ), r"input q has shape \[2, 6\], expected"),
    (
        MERGED,
        "k",
        (B, H, SK, D),
        r"input k has shape \[2, 3, 10, 20\], expected \[batch, sequence, channels\]",
    ),
    (MERGED, "k", (B, SK, H * D + H), r"\[2, 6, 60\], \[2, 10, 63\] and \[2, 10, 72\], which do not fit"),
    (MERGED, "k", (B + 1, SK, H * D), "which do not fit"),
    (MERGED, "v", (B, SK + 1, H * DV), "which do not fit"),
    (MERGED, "v", (B + 1, SK, H * DV), "which do not fit"),
    (MERGED, "mask", (B, 1, SQ, SK + 1), r"mask has shape \[2, 1, 6, 11\], .* broadcast to \[2, 3, 6, 10\]"),
    (MERGED, "mask", (H + 1, SQ, SK), r"mask has shape \[4, 6, 10\], .* broadcast to \[2, 3, 6, 10\]"),
    (MERGED, "mask", (B + 1, 1, SQ, SK), r"mask has shape \[3, 1, 6, 10\], .* broadcast to \[2, 3, 6, 10\]"),
    (MERGED, "mask", (1, 1, 1, 1, 1), r"mask has shape \[1, 1, 1, 1, 1\], expected at most 4 axes"),
    (
        "AttentionSplit",
        "k",
        (B, SK, H * D),
        r"input k has shape \[2, 10, 60\], expected \[batch, 3, sequence",
    ),
    ("AttentionHeads", "q", (B, SQ, H * D), r"input q has shape \[2, 6, 60\], expected \[batch, 3, sequence"),
    ("AttentionSplit", "v", (B, H + 1, SK, DV), r"input v has shape \[2, 4, 10, 24\], expected \[batch, 3"),
]


@pytest.mark.parametrize(("op_type", "name", "shape", "message"), WRONG)
def test_wrong_shapes_are_refused_by_name(op_type, name, shape, message, open_session):
    session = open_session(model(op_type, with_body=False))
    with pytest.raises(Exception, match=message) as caught:
        session.run(None, feeds(op_type, SQ, SK) | {name: floats(*shape)})
    assert f"node '{NODE}' ({op_type})" in str(caught.value)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic", "avx1024"])
def test_the_forced_instruction_set_is_used_or_refused(isa, tmp_path, create_session):
    path = tmp_path / "model.onnx"
    path.write_bytes(model("Attention").SerializeToString())
    result = create_session(path, isa)
    where = f"node '{NODE}' (Attention): "
    if any(name.startswith(isa) for name in sparse_ops.info().kernels):
        assert result.returncode == 0, result.stderr
        assert f"{where}kernel {isa}" in result.stderr
    else:
        assert result.returncode != 0
        assert f"{where}SPARSE_ONNX_FORCE_ISA" in result.stderr
