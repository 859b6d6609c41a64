"""One pass over the model: every layer's Gram, mean and count against float64 NumPy."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import DataError, HostError, UsageError
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.passes.calibration import Layout, Options
from sparse_onnx.passes.solvers.statistics import InputStatistics


def test_all_layers_of_an_encoder_without_its_padding(encoder, tokens, calibrator, assert_moments):
    statistics = calibrator(encoder.model, tokens).oneshot()
    rows = encoder.rows(tokens)
    assert set(statistics) == set(rows)
    for name, (layer,) in statistics.items():
        assert_moments(layer, rows[name])


def test_layers_with_one_input_share_their_statistics(encoder, tokens, calibrator):
    statistics = calibrator(encoder.model, tokens).oneshot()
    assert statistics["Wq0"] is statistics["Wk0"] is statistics["Wv0"]
    assert statistics["Wq0"] is not statistics["Wo0"]


def test_without_a_mask_padding_counts(encoder, tokens, calibrator, assert_moments):
    (layer,) = calibrator(encoder.model, tokens, mask=None).oneshot()["Wu1"]
    x = encoder.inputs(tokens)["Wu1"]
    assert_moments(layer, x.reshape(-1, x.shape[-1]))


def test_result_is_independent_of_the_batch_size(encoder, tokens, calibrator):
    runs = [calibrator(encoder.model, tokens, batch=batch).oneshot() for batch in (1, 5, 12)]
    for one, other in pairwise(runs):
        for name in one:
            a, b = one[name][0], other[name][0]
            assert a.count == b.count
            assert np.abs(a.gram - b.gram).max() <= 1e-6 * np.abs(a.gram).max()
            assert np.abs(a.mean - b.mean).max() <= 1e-6 * np.abs(a.mean).max()


def test_weights_outside_the_graph_are_seen_as_they_are_now(encoder, tokens, calibrator):
    tool = calibrator(encoder.model, tokens)
    before = tool.oneshot()["Wo0"][0].gram
    halved = encoder.weights["Wv0"] / 2
    encoder.model.graph.initializers["Wv0"].const_value = ir.tensor(halved, name="Wv0")
    after = tool.oneshot()["Wo0"][0].gram
    np.testing.assert_allclose(after, before / 4, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_shared_weight_sums_its_users(from_text, calibrator, assert_moments):
    rng = np.random.default_rng(2)
    w = rng.standard_normal((6, 6)).astype(np.float32)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        tied (float[n, 6] X) => (float[n, 6] Y) { a = MatMul(X, W) b = Relu(a) Y = MatMul(b, W) }""",
        W=w,
    )
    x = rng.standard_normal((40, 6)).astype(np.float32)
    (layer,) = calibrator(model, {"X": x}).oneshot()["W"]
    hidden = np.maximum(x.astype(np.float64) @ w, 0)
    assert_moments(layer, np.concatenate([x.astype(np.float64), hidden]))


def test_gemm_on_flattened_tokens_is_masked_too(from_text, calibrator, assert_moments):
    rng = np.random.default_rng(3)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        flat (float[b, s, 6] X, int64[b, s] attention_mask) => (float[n, 4] Y)
        { f = Reshape(X, shape) Y = Gemm<transB = 1>(f, W) }""",
        W=rng.standard_normal((4, 6)).astype(np.float32),
        shape=np.array([-1, 6]),
    )
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    mask = (np.arange(5) < np.array([5, 2, 1, 4])[:, None]).astype(np.int64)
    (layer,) = calibrator(model, {"X": x, "attention_mask": mask}, batch=2).oneshot()["W"]
    assert_moments(layer, x[mask != 0].astype(np.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-5), (np.float64, 1e-12)])
def test_other_precisions(from_text, calibrator, dtype, tolerance, assert_moments):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    x = (np.random.default_rng(4).standard_normal((300, 5)) * 200).astype(dtype)  # squares overflow float16
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        half ({kind}[n, 5] X) => ({kind}[n, 3] Y) {{ Y = MatMul(X, W) }}""",
        W=np.ones((5, 3), dtype),
    )
    (layer,) = calibrator(model, {"X": x}, batch=100).oneshot()["W"]
    assert_moments(layer, x.astype(np.float64), tolerance)


def test_weights_in_the_body_of_a_loop_are_listed(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        branch (bool c, float[n, 4] X) => (float[n, 4] Y) {
          A = MatMul(X, W)
          Y = If(c) <then_branch = t () => (float[n, 4] y) { y = MatMul(A, V) },
                     else_branch = e () => (float[n, 4] z) { z = Identity(A) }> }""",
        W=np.eye(4, dtype=np.float32),
        V=np.eye(4, dtype=np.float32),
    )
    said: list[str] = []
    data = [{"c": np.array(True), "X": np.ones((3, 4), np.float32)}]
    tool = calibrator(model, {}, samples=Samples.of(data, "test"), said=said)
    assert [name for name, _ in tool.declined] == ["V"]
    assert "If, Loop or Scan" in tool.declined[0][1]
    assert any("V: " in line and "without data" in line for line in said)
    assert set(tool.oneshot()) == {"W"}


def test_a_model_without_linears_gives_nothing(from_text, calibrator):
    model = from_text(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n, 4] X) => (float[n, 4] Y) { Y = Relu(X) }'
    )
    tool = calibrator(model, {"X": np.ones((2, 4), np.float32)})
    assert tool.oneshot() == {}
    assert list(tool.blocks()) == []


# -- memory


def _same(found: InputStatistics, expected: InputStatistics, layout: Layout) -> None:
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    scale = 1e-6 * np.abs(expected.gram).max()
    if layout is Layout.DIAGONAL:
        assert found.gram.ndim == 1
    np.testing.assert_allclose(found.diagonal, expected.diagonal, rtol=1e-6, atol=scale)
    if layout is Layout.FULL:
        np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-6, atol=scale)


def test_memory_is_announced_and_few_tokens_are_warned_of(encoder, tokens, calibrator):
    said: list[str] = []
    calibrator(encoder.model, tokens, said=said).oneshot()
    assert "memory about" in said[0]
    assert "3 batches, 8 inputs of layers" in said[0]
    count = int(tokens["attention_mask"].sum())
    warned = [line for line in said if "warning" in line]
    assert len(warned) == 8
    assert f"{count} tokens for the 16 channels of h0; 128 or more" in warned[0]


def test_enough_tokens_are_not_warned_of(from_text, calibrator):
    model = from_text(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n, 4] X) => (float[n, 4] Y) { Y = MatMul(X, W) }',
        W=np.eye(4, dtype=np.float32),
    )
    said: list[str] = []
    calibrator(model, {"X": np.ones((32, 4), np.float32)}, said=said).oneshot()
    assert not any("warning" in line for line in said)


@pytest.mark.parametrize(("budget", "several"), [(200_000, False), (40_000, True)])
def test_what_does_not_fit_at_once_takes_several_parts(encoder, tokens, calibrator, budget, several):
    said: list[str] = []
    expected = calibrator(encoder.model, tokens, batch=1).oneshot()
    found = calibrator(encoder.model, tokens, batch=1, said=said, memory_budget=budget).oneshot()
    assert any("calibration 2/" in line or "pass 2/" in line for line in said) == several
    for name in expected:
        _same(found[name][0], expected[name][0], Layout.FULL)


def _wide(from_text: Callable, width: int):
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        wide (float[n, {width}] X) => (float[n, 2] Y) {{ Y = MatMul(X, W) }}""",
        W=np.ones((width, 2), np.float32),
    )
    return model, {"X": np.random.default_rng(5).standard_normal((6, width)).astype(np.float32)}


@pytest.mark.parametrize(
    ("budget", "layout"), [(60 << 20, Layout.FULL), (30 << 20, Layout.BLOCKS), (1 << 20, Layout.DIAGONAL)]
)
def test_a_gram_that_does_not_fit_is_cut_down(from_text, calibrator, budget, layout):
    model, data = _wide(from_text, 2100)  # 35 MB in float64, and 18 MB for the product that is added
    said: list[str] = []
    (layer,) = calibrator(model, data, batch=2, memory_budget=budget, said=said).oneshot()["W"]
    x = data["X"].astype(np.float64)
    gram = x.T @ x
    cut = [line for line in said if "statistics instead" in line]
    if layout is Layout.FULL:
        assert not cut
        np.testing.assert_allclose(layer.gram, gram, atol=1e-5)
    elif layout is Layout.BLOCKS:
        assert "block-diagonal statistics instead" in cut[0]
        assert [len(block) for block in layer.gram] == [1024, 1024, 52]
        for start, block in zip((0, 1024, 2048), layer.gram, strict=True):
            end = start + len(block)
            np.testing.assert_allclose(block, gram[start:end, start:end], atol=1e-5)
    else:
        assert "diagonal statistics instead" in cut[0]
        np.testing.assert_allclose(layer.gram, gram.diagonal(), rtol=1e-6)


def test_a_diagonal_can_be_asked_for(encoder, tokens, calibrator):
    expected = calibrator(encoder.model, tokens).oneshot()
    said: list[str] = []
    found = calibrator(encoder.model, tokens, layout=Layout.DIAGONAL, said=said).oneshot()
    for name in expected:
        _same(found[name][0], expected[name][0], Layout.DIAGONAL)
    assert not any("warning" in line or "instead" in line for line in said)


def test_too_little_memory_is_one_message(from_text, calibrator):
    model, data = _wide(from_text, 2100)
    with pytest.raises(
        HostError, match=r"too little memory for X: .* smaller batches or a larger memory budget"
    ):
        calibrator(model, data, memory_budget=20_000).oneshot()


# -- bad input


def test_activations_that_overflow_are_named(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[n, 4] X) => (float[n, 4] Y) { e = Exp(X) Y = MatMul(e, W) }""",
        W=np.eye(4, dtype=np.float32),
    )
    with pytest.raises(DataError, match="the activations e hold NaN or Inf"):
        calibrator(model, {"X": np.full((8, 4), 200, np.float32)}).oneshot()


def test_nothing_but_padding_is_an_error(encoder, tokens, calibrator):
    tokens["attention_mask"][:] = 0
    with pytest.raises(DataError, match="no token reached h0"):
        calibrator(encoder.model, tokens).oneshot()


def test_a_mask_that_is_asked_for_must_be_there(encoder, tokens, calibrator):
    with pytest.raises(
        UsageError, match=r"mask 'padding' must be an integer input .* input_ids, attention_mask"
    ):
        calibrator(encoder.model, tokens, mask="padding")


def test_a_float_mask_is_not_used_and_that_is_said(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[b, s, 4] X, float[b, s] attention_mask) => (float[b, s, 4] Y) { Y = MatMul(X, W) }""",
        W=np.eye(4, dtype=np.float32),
    )
    data = {"X": np.ones((2, 5, 4), np.float32), "attention_mask": np.zeros((2, 5), np.float32)}
    said: list[str] = []
    (layer,) = calibrator(model, data, said=said).oneshot()["W"]
    assert layer.count == 10
    assert said[0] == "note: calibration: attention_mask is no integer input [B, S]: padding is not left out"


def test_shapes_follow_from_the_data(encoder, tokens):
    shapes = Shapes(encoder.model, inputs={name: array.shape for name, array in tokens.items()}).sizes()
    assert shapes["h0"] == (12, 9, 16)
    assert shapes["a1"] == (12, 9, 40)
    assert shapes["s0"] == (12, 9, 9)


@pytest.mark.parametrize("option", ["memory_budget", "threads", "checkpoint_batches"])
def test_options_out_of_range(option):
    with pytest.raises(UsageError, match=option):
        Options(**{option: 0})
