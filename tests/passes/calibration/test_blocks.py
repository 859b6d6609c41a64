"""Block by block: statistics behind what is pruned already."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration import Cutter


def _pruned(name: str, array: np.ndarray) -> np.ndarray:
    """A deterministic half of the weights is zero."""
    keep = np.random.default_rng(sum(name.encode())).random(array.shape) < 0.5
    return array * keep.astype(np.float32)


def _solve(block) -> None:
    for weight in block.weights:
        weight.value.const_value = ir.tensor(_pruned(weight.name, weight.matrix()), name=weight.name)


def test_an_encoder_is_cut_at_its_residual_stream(encoder):
    weights, _ = find_weights(encoder.model)
    blocks = Cutter(encoder.model, weights).blocks()
    assert [[weight.name for weight in block.weights] for block in blocks] == [
        ["Wq0", "Wk0", "Wv0", "Wo0"],
        ["Wu0", "Wd0"],
        ["Wq1", "Wk1", "Wv1", "Wo1"],
        ["Wu1", "Wd1"],
    ]
    assert blocks[1].inputs == ("n0",)
    assert set(blocks[2].inputs) == {"h1", "bias"}
    assert blocks[-1].outputs == ()


def test_blocks_are_put_together_while_they_fit(encoder):
    weights, _ = find_weights(encoder.model)
    cutter = Cutter(encoder.model, weights)
    pairs = cutter.blocks(lambda block: len(block.weights) <= 6)
    assert [len(block.weights) for block in pairs] == [6, 6]
    assert [len(block.weights) for block in cutter.blocks(lambda _block: True)] == [12]


def test_no_cut_between_the_users_of_one_weight(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        tied (float[n, 4] X) => (float[n, 4] Y)
        { a = MatMul(X, W) b = MatMul(a, V) c = MatMul(b, W) Y = MatMul(c, U) }""",
        **{name: np.eye(4, dtype=np.float32) for name in "WVU"},
    )
    weights, _ = find_weights(model)
    blocks = Cutter(model, weights).blocks()
    assert [sorted(weight.name for weight in block.weights) for block in blocks] == [["V", "W"], ["U"]]


def test_many_layers_under_a_skip_connection_are_cut_at_two_values(from_text):
    layers = "".join(f"x{i + 1} = MatMul(x{i}, W{i}) " for i in range(20))
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        skip (float[n, 4] X) => (float[n, 4] Y)
        {{ x0 = MatMul(X, V) {layers} s = Add(x0, x20) Y = MatMul(s, U) }}""",
        V=np.eye(4, dtype=np.float32),
        U=np.eye(4, dtype=np.float32),
        **{f"W{i}": np.eye(4, dtype=np.float32) for i in range(20)},
    )
    weights, _ = find_weights(model)
    blocks = Cutter(model, weights).blocks()
    assert len(blocks) > 2
    assert set(blocks[-2].inputs) == {"x0", "x19"}
    assert blocks[-1].inputs == ("s",)


def test_statistics_are_those_of_a_model_whose_weights_were_replaced(
    encoder, tokens, calibrator, assert_moments
):
    now = dict(encoder.weights)
    for block in calibrator(encoder.model, tokens).blocks():
        rows = encoder.rows(tokens, now)
        for weight in block.weights:
            (layer,) = block.statistics[weight.name]
            assert_moments(layer, rows[weight.name])
            now[weight.name] = _pruned(weight.name, now[weight.name])
        _solve(block)
    assert block.index == block.total - 1 == 3


def test_a_bias_that_is_added_to_a_layer_reaches_the_next_block(encoder, tokens, calibrator, assert_moments):
    blocks = calibrator(encoder.model, tokens).blocks()
    next(blocks)
    graph = encoder.model.graph
    up = next(node for node in graph if node.outputs[0].name == "o0")
    old = up.outputs[0]
    shift = ir.Value(
        name="shift", const_value=ir.tensor(np.linspace(-1, 1, 16, dtype=np.float32), name="shift")
    )
    graph.register_initializer(shift)
    add = ir.node("Add", [old, shift])
    old.name, add.outputs[0].name = "o0.unshifted", "o0"
    ir.convenience.replace_all_uses_with(old, add.outputs[0])
    add.replace_input_with(0, old)
    graph.insert_after(up, add)
    (layer,) = next(blocks).statistics["Wu0"]
    x = encoder.rows(tokens)["Wu0"]
    with pytest.raises(AssertionError):
        assert_moments(layer, x, 1e-4)
    shifted = calibrator(encoder.model, tokens).oneshot()["Wu0"][0]
    np.testing.assert_allclose(layer.gram, shifted.gram, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_takes_several_passes_a_block(encoder, tokens, calibrator):
    runs = []
    for budget in (None, 28_000):
        said: list[str] = []
        tool = calibrator(encoder.model, tokens, batch=1, memory_budget=budget, said=said)
        runs.append({k: v for block in tool.blocks() for k, v in _copied(block).items()})
    assert any("pass 2/" in line for line in said)
    for name, gram in runs[0].items():
        np.testing.assert_allclose(runs[1][name], gram, rtol=1e-6, atol=1e-6 * np.abs(gram).max())


def _copied(block) -> dict[str, np.ndarray]:
    return {name: np.array(layer.gram) for name, (layer,) in block.statistics.items()}


def test_a_model_that_cannot_be_cut_is_one_block_and_says_so(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        wide (float[n, 4] X) => (float[n, 4] Y) { a = MatMul(X, W) b = MatMul(X, V) Y = Mul(a, b) }""",
        W=np.eye(4, dtype=np.float32),
        V=np.eye(4, dtype=np.float32),
    )
    said: list[str] = []
    blocks = list(calibrator(model, {"X": np.ones((40, 4), np.float32)}, said=said).blocks())
    assert len(blocks) == 1
    assert "all of it is one block" in said[0]


def test_scratch_files_are_gone_afterwards(encoder, tokens, calibrator, tmp_path):
    for block in calibrator(encoder.model, tokens, memory_budget=200_000, batch=1).blocks():
        assert block.weights
    blocks = calibrator(encoder.model, tokens).blocks()
    next(blocks)
    blocks.close()  # given up
    assert list(tmp_path.iterdir()) == []
