"""Losses of layers: against models that were really pruned, in NumPy."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.sensitivity import Loss, measure_losses
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration import Options
from sparse_onnx.passes.solvers import SparseGPTSolver
from sparse_onnx.passes.solvers.statistics import InputStatistics

MODEL = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 48] X) => (float[batch, 40] Y) { m = MatMul(X, A) r = Relu(m) Y = MatMul(r, B) }"""

RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal(shape).astype(np.float32) / 7 for shape in ((48, 64), (64, 40)))
X = RNG.standard_normal((256, 48)).astype(np.float32) * np.linspace(0.2, 3, 48, dtype=np.float32)
HIDDEN = np.maximum(X @ A, 0)


def output(a, b):
    return np.maximum(X @ a, 0) @ b


def wanda(weight, inputs, sparsity):
    """The smallest |w| · ‖x‖ of the layer are zero."""
    score = np.abs(weight) * np.linalg.norm(inputs, axis=0)[:, None]
    pruned = weight.copy()
    pruned.reshape(-1)[np.argsort(score, axis=None)[: round(sparsity * score.size)]] = 0
    return pruned


def own_error(weight, pruned, inputs):
    """Root of the mean over output channels of the relative squared error."""
    lost = ((inputs @ (weight - pruned)) ** 2).sum(0) / ((inputs @ weight) ** 2).sum(0)
    return np.sqrt(lost.mean())


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    proto = onnx.parser.parse_model(MODEL)
    for name, array in (("A", A), ("B", B)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    weights = find_weights(model)[0]
    before = [weight.tensor for weight in weights]
    found = measure_losses(
        model,
        weights,
        Samples.of([{"X": X}], "test"),
        Options(mask=None, threads=1),
        sparsities=(0.5, 0.9),
        structures=("unstructured", "2:4", "block:8x1", "5:7"),
        work=tmp_path_factory.mktemp("work"),
        progress=lambda _line: None,
    )
    assert [weight.tensor for weight in weights] == before
    return found


def test_the_gain_is_what_the_whole_loses_for_what_the_layer_loses(losses):
    reference = output(A, B)
    for name, pruned, inputs, weight, got in (
        ("A", wanda(A, X, 0.7), X, A, lambda w: output(w, B)),
        ("B", wanda(B, HIDDEN, 0.7), HIDDEN, B, lambda w: output(A, w)),
    ):
        whole = np.linalg.norm(got(pruned) - reference) / np.linalg.norm(reference)
        assert losses[name].gain == pytest.approx(whole / own_error(weight, pruned, inputs), rel=1e-3)


def test_errors_are_those_of_the_method(losses):
    # All 64 and 40 outputs are looked at, each with the zeros that Wanda's ranking of the layer gives it.
    for name, weight, inputs in (("A", A, X), ("B", B, HIDDEN)):
        statistics = InputStatistics((inputs.T @ inputs).astype(np.float32), count=len(inputs))
        for share, error in zip((0.5, 0.9), losses[name].errors["unstructured"], strict=True):
            pruned = SparseGPTSolver().solve(weight, statistics, sparsity=share)
            assert error == pytest.approx(own_error(weight, pruned, inputs), rel=0.15)


def test_patterns_cost_more(losses):
    for loss in losses.values():
        assert set(loss.errors) == {"unstructured", "2:4", "block:8x1"}  # 48 and 64 are no multiples of 7
        assert loss.sparsities["2:4"] == (0.5,)
        assert loss.errors["2:4"][0] > loss.errors["unstructured"][0]
        for blocks, single in zip(loss.errors["block:8x1"], loss.errors["unstructured"], strict=True):
            assert blocks > single
        assert max(loss.errors["block:8x1"]) <= 1


def test_errors_are_read_off_lines_that_begin_at_nothing():
    loss = Loss(2.0, {"unstructured": (0.5, 0.9)}, {"unstructured": (0.1, 0.5)})
    found = [loss.error(Choice(share)) for share in (0.0, 0.25, 0.5, 0.7, 0.95)]
    assert found == pytest.approx([0, 0.1, 0.2, 0.6, 1.0])
