"""Predictions: which outputs hold logits, divergences and perplexities by hand, and who is a causal language model."""

import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.verification import predictions
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.predictions import (
    Head,
    compare_predictions,
    confirm,
    find_heads,
    make_probe,
    unread,
)
from sparse_onnx.verification.verify import verify

INF, NAN = math.inf, math.nan


def logs(*rows):
    """Logits of given probabilities, each row moved by a constant of its own, which must not matter."""
    with np.errstate(divide="ignore"):
        return (np.log(np.array(rows, np.float64)) + np.arange(len(rows))[:, None]).astype(np.float32)


def one(reference, candidate, head=None, **inputs):
    head = head or Head("Y")
    results = compare_predictions([head], [{"Y": reference}], [{"Y": candidate}], [inputs])
    return results[0] if results else None


def test_divergence_by_hand():
    found = one(logs([0.5, 0.5], [0.25, 0.75]), logs([0.25, 0.75], [0.25, 0.75]))
    assert found.kl_divergence == pytest.approx(0.5 * math.log(4 / 3) / 2, rel=1e-5)
    assert (found.output, found.rows) == ("Y", 2)
    assert found.reference_perplexity is None
    assert found.candidate_perplexity is None


def test_divergence_is_that_of_the_reference_from_the_candidate():
    p, q = [0.9, 0.1], [0.5, 0.5]
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert one(logs(p), logs(q)).kl_divergence == pytest.approx(expected, rel=1e-5)
    assert one(logs(q), logs(p)).kl_divergence != pytest.approx(expected, rel=1e-2)


def test_top1_is_the_share_of_rows_with_the_same_first_choice():
    reference = logs([0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9])
    candidate = logs([0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8])
    assert one(reference, candidate).top1_agreement == 0.75


def test_equal_logits():
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    found = one(logits, logits.copy())
    assert (found.kl_divergence, found.top1_agreement) == (0, 1)


def test_classes_that_both_rule_out_are_no_difference():
    assert one(logs([0.5, 0.5, 0]), logs([0.5, 0.5, 0])).kl_divergence == 0
    assert one(logs([0.5, 0.5]), logs([1, 0])).kl_divergence == INF


@pytest.mark.parametrize("value", [NAN, INF])
def test_values_that_are_no_logits_are_infinitely_far(value):
    broken = np.array([[1.0, value]], np.float32)
    assert one(logs([0.5, 0.5]), broken).kl_divergence == INF


def test_large_logits_do_not_overflow():
    found = one(np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]]))
    assert found.kl_divergence == pytest.approx(1000)


def test_perplexity_by_hand():
    """Position 0 predicts token 1, position 1 token 0; the last position predicts nothing that is known."""
    head = Head("Y", "input_ids")
    ids = np.array([[0, 1, 0]])
    first = logs([0.5, 0.5], [0.25, 0.75], [0.5, 0.5])[None]
    second = logs([0.2, 0.8], [0.1, 0.9], [0.5, 0.5])[None]
    found = one(first, second, head, input_ids=ids)
    assert found.tokens == 2
    assert found.reference_perplexity == pytest.approx((0.5 * 0.25) ** -0.5, rel=1e-5)
    assert found.candidate_perplexity == pytest.approx((0.8 * 0.1) ** -0.5, rel=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_left_out_on_either_side(left):
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 1, 5, 6))
    ids = rng.integers(0, 6, (1, 5))
    kept = slice(2, 5) if left else slice(0, 3)
    mask = np.zeros((1, 5), np.int64)
    mask[:, kept] = 1
    junk = np.where(mask[..., None], 0, NAN)
    head = Head("Y", "input_ids", "attention_mask")
    found = one(first + junk, second, head, input_ids=ids, attention_mask=mask)
    expected = one(first[:, kept], second[:, kept], head, input_ids=ids[:, kept])
    assert found == expected
    assert (found.rows, found.tokens) == (3, 2)


def test_mask_that_covers_a_cache_too():
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, 1, 3, 4))
    ids, mask = rng.integers(0, 4, (1, 3)), np.array([[0, 0, 1, 1, 0]])
    found = one(first, second, Head("Y", "ids", "mask"), ids=ids, mask=mask)
    assert (found.rows, found.tokens) == (2, 1)


def test_tokens_beyond_the_classes_are_not_counted():
    logits = np.zeros((1, 3, 4), np.float32)
    found = one(logits, logits, Head("Y", "ids"), ids=np.array([[0, 9, 3]]))
    assert found.tokens == 1
    assert found.reference_perplexity == pytest.approx(4)


def test_batches_and_pieces_do_not_matter(monkeypatch):
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 6, 5, 4)).astype(np.float32)
    ids = rng.integers(0, 4, (6, 5))
    head = Head("Y", "ids")
    whole = one(first, second, head, ids=ids)
    cuts = [slice(0, 1), slice(1, 6)]
    parts = [[{name: x[c]} for c in cuts] for name, x in (("Y", first), ("Y", second), ("ids", ids))]
    monkeypatch.setattr(predictions, "_PIECE", 9)
    (found,) = compare_predictions([head], *parts)
    assert (found.rows, found.tokens, found.top1_agreement) == (30, 24, whole.top1_agreement)
    for name in ("kl_divergence", "reference_perplexity", "candidate_perplexity"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name))


@pytest.mark.parametrize(
    "values", [np.ones((2, 3), np.int64), np.float32(1), np.ones(3, np.float32), np.ones((3, 1), np.float32)]
)
def test_what_is_no_distribution_is_passed_over(values):
    assert one(np.asarray(values), np.asarray(values)) is None


def test_nothing_but_padding():
    logits = np.ones((1, 2, 3), np.float32)
    assert one(logits, logits, Head("Y", None, "mask"), mask=np.zeros((1, 2), np.int64)) is None


def test_as_json():
    found = compare(
        [{"Y": logs([0.5, 0.5])}], [{"Y": logs([1.0, 1e-30]) - [[0, INF]]}], [Head("Y")], [{}]
    ).to_dict()
    assert found["predictions"][0]["kl_divergence"] is None
    assert found["predictions"][0]["rows"] == 1
    assert compare([{"Y": np.ones((2, 2))}], [{"Y": np.ones((2, 2))}]).to_dict()["predictions"] == []


# -- which outputs hold logits ------------------------------------------------------------------------------------


def heads_of(inputs, outputs, body, **arrays):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return find_heads(ir.from_proto(proto))


IDS = "int64[b, s] input_ids"
TABLE = np.ones((11, 4), np.float32)


def test_by_name():
    found = heads_of(
        "float[b, 8] X",
        "float[b, 8] logits, float[b, 8] start_logits",
        "logits = Relu(X) start_logits = Neg(X)",
    )
    assert found == (Head("logits"), Head("start_logits"))


def test_language_model_by_name():
    found = heads_of(
        f"{IDS}, int64[b, s] attention_mask",
        "float[b, s, 4] logits",
        "logits = Gather(T, input_ids)",
        T=TABLE,
    )
    assert found == (Head("logits", "input_ids", "attention_mask"),)


def test_language_model_by_its_vocabulary():
    body = "e = Gather(T, words) Y = MatMul(e, U)"
    found = heads_of("int64[b, s] words", "float[b, s, 11] Y", body, T=TABLE, U=TABLE.T.copy())
    assert found == (Head("Y", "words"),)


def test_tokens_are_those_of_the_decoder():
    inputs = f"{IDS}, int64[b, s] attention_mask, int64[b, t] decoder_input_ids"
    found = heads_of(inputs, "float[b, t, 4] logits", "logits = Gather(T, decoder_input_ids)", T=TABLE)
    assert found == (Head("logits", "decoder_input_ids"),)


@pytest.mark.parametrize(
    ("inputs", "outputs", "body"),
    [
        (IDS, "float[b, s, 4] last_hidden_state", "last_hidden_state = Gather(T, input_ids)"),
        (IDS, "int64[b, s] logits", "logits = Neg(input_ids)"),
        ("float[b] X", "float[b] logits", "logits = Relu(X)"),
        ("float X", "float logits", "logits = Relu(X)"),
        ("float[b, 1] X", "float[b, 1] logits", "logits = Relu(X)"),
        ("float[b, s, 11] X", "float[b, s, 11] Y", "Y = Relu(X)"),
        ("int64[b, s] position_ids", "float[b, s, 11] Y", "e = Gather(T, position_ids) Y = MatMul(e, U)"),
        ("int64[b, s] token_type_ids", "float[b, s, 11] Y", "e = Gather(T, token_type_ids) Y = MatMul(e, U)"),
    ],
)
def test_no_logits(inputs, outputs, body):
    arrays = {name: value for name, value in (("T", TABLE), ("U", TABLE.T.copy())) if name in body}
    assert heads_of(inputs, outputs, body, **arrays) == ()


# -- causality ----------------------------------------------------------------------------------------------------


def causal_outputs(feeds):
    ids = feeds["ids"].astype(np.float64)
    return {"Y": np.cumsum(ids, axis=1)[..., None] * np.array([1.0, -1.0, 0.5])}


def bidirectional_outputs(feeds):
    ids = feeds["ids"].astype(np.float64)
    return {"Y": (ids + ids.mean(axis=1, keepdims=True))[..., None] * np.array([1.0, -1.0, 0.5])}


@pytest.mark.parametrize(("run", "causal"), [(causal_outputs, True), (bidirectional_outputs, False)])
def test_models_are_asked_whether_they_are_causal(run, causal):
    feeds = {"ids": np.random.default_rng(0).integers(0, 9, (3, 6))}
    head = Head("Y", "ids")
    probe = make_probe([head], feeds)
    assert np.count_nonzero(probe.feeds["ids"] != feeds["ids"]) == 1
    assert confirm([head], probe, run(feeds), run(probe.feeds)) == ((head if causal else unread(head)),)


def test_token_that_is_changed_is_no_padding():
    feeds = {"ids": np.zeros((2, 4), np.int64), "mask": np.array([[1, 0, 0, 0], [1, 1, 1, 0]])}
    probe = make_probe([Head("Y", "ids", "mask")], feeds)
    assert (probe.row, probe.position) == (1, 2)
    assert probe.feeds["ids"][1].tolist() == [0, 0, 1, 0]
    assert not feeds["ids"].any()


@pytest.mark.parametrize(
    ("head", "ids", "mask"),
    [
        (Head("Y"), np.ones((1, 4), np.int64), np.ones((1, 4))),
        (Head("Y", "ids"), np.ones((3, 1), np.int64), np.ones((3, 1))),
        (Head("Y", "ids"), np.ones((0, 4), np.int64), np.ones((0, 4))),
        (Head("Y", "ids", "mask"), np.ones((1, 4), np.int64), np.array([[0, 0, 0, 1]])),
        (Head("Y", "ids", "mask"), np.ones((1, 4), np.int64), np.ones((1, 2))),
    ],
)
def test_nothing_to_ask(head, ids, mask):
    assert make_probe([head], {"ids": ids, "mask": mask}) is None
    assert confirm([head], None, {}, {}) == (unread(head),)


# -- the road through verify --------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
E, U = (RNG.standard_normal(shape).astype(np.float32) for shape in ((11, 8), (8, 11)))
STEPS = {
    "causal": "z = Constant<value = int64 {1}>() c = CumSum(e, z) logits = MatMul(c, U)",
    "masked": "a = Constant<value = int64[1] {1}>() m = ReduceMean(e, a) c = Add(e, m) logits = MatMul(c, U)",
}


def language_model(folder, kind, scale=1.0):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]> g (int64[b, s] input_ids) => (float[b, s, 11] logits)
        {{ e = Gather(E, input_ids) {STEPS[kind]} }}"""
    )
    arrays = {"E": E, "U": U * np.float32(scale)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    path = folder / f"{kind}-{scale}.onnx"
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("real", [True, False])
def test_verify(tmp_path, kind, real):
    first, second = (language_model(tmp_path, kind, scale) for scale in (1.0, 0.5))
    ids = RNG.integers(0, 11, (3, 6))
    np.savez(tmp_path / "text.npz", input_ids=ids)
    result = verify(first, second, data=tmp_path / "text.npz" if real else None)
    assert result.batches == (1 if real else 2)
    (found,) = result.against_original["without_library"].predictions
    assert found.output == "logits"
    assert found.kl_divergence > 0
    assert found.top1_agreement == 1
    document = result.to_dict()["against_original"]["without_library"]["predictions"][0]
    assert document["kl_divergence"] == found.kl_divergence
    if not real or kind == "masked":
        assert found.reference_perplexity is None
        assert document["candidate_perplexity"] is None
        return
    logits = np.cumsum(E[ids].astype(np.float64), axis=1) @ U
    for factor, perplexity in ((1, found.reference_perplexity), (0.5, found.candidate_perplexity)):
        p = np.exp(factor * logits) / np.exp(factor * logits).sum(-1, keepdims=True)
        chosen = np.take_along_axis(p[:, :-1], ids[:, 1:, None], -1)
        assert perplexity == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-4)
    assert found.tokens == 3 * 5


def test_verify_of_an_encoder_says_nothing_of_predictions(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[b, s, 8] X) => (float[b, s, 8] Y) { Y = Relu(X) }'
    )
    onnx.save(proto, tmp_path / "encoder.onnx")
    result = verify(tmp_path / "encoder.onnx", tmp_path / "encoder.onnx")
    assert result.against_original["without_library"].predictions == ()
