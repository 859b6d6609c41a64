"""What rounding does to layers: weights and inputs, against NumPy and against models that were really rounded."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.rounding import added_by_bits, rounded_inputs
from sparse_onnx.analysis.sensitivity import Loss, measure_losses
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration import Options
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.passes.solvers.auto_quantizer import AutoQuantizer
from sparse_onnx.passes.solvers.grid import GridOptions
from sparse_onnx.passes.solvers.statistics import InputStatistics

MODEL = """<ir_version: 9, opset_import: ["" : 17]>
g (float[batch, 80] X) => (float[batch, 40] Y)
{ m = MatMul(X, A) r = Relu(m) Y = Gemm<transB = 1>(r, B, c) }"""

RNG = np.random.default_rng(0)
A = (RNG.standard_normal((80, 96)) / 9).astype(np.float32)
B = (RNG.standard_normal((96, 40)) / 9).astype(np.float32)
C = RNG.standard_normal(40).astype(np.float32)
X = (RNG.standard_normal((256, 80)) * np.linspace(0.2, 3, 80)).astype(np.float32)
HIDDEN = np.maximum(X @ A, 0)
GRAM = InputStatistics((X.T @ X).astype(np.float32), count=len(X))
GRIDS = {8: usual_grid(8), 4: usual_grid(4, 16), 3: usual_grid(3, 16)}


def model():
    proto = onnx.parser.parse_model(MODEL)
    for name, array in (("A", A), ("B", np.ascontiguousarray(B.T)), ("c", C)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def error(change, weight, inputs):
    """Root of the mean over output channels of the relative squared error."""
    return np.sqrt((((change @ weight) ** 2).sum(0) / ((inputs @ weight) ** 2).sum(0)).mean())


def as_bytes(x):
    """What ONNX's DynamicQuantizeLinear and back make of x."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def in_blocks(x, size):
    """A scale for every ``size`` inputs of a row, integers from -127 to 127."""
    found = x.copy()
    for first in range(0, x.shape[1], size):
        part = x[:, first : first + size]
        scale = np.abs(part).max(axis=1, keepdims=True) / 127
        found[:, first : first + size] = np.rint(part / np.where(scale > 0, scale, 1)) * scale
    return found


def test_rounded_inputs_change_the_product_as_in_numpy():
    source = model()
    weights = find_weights(source)[0]
    found = rounded_inputs(source, weights, [{"X": X}], [16, 32], threads=1)
    for name, weight, inputs in (("A", A, X), ("B", B, HIDDEN)):
        assert found[name].whole == pytest.approx(error(inputs - as_bytes(inputs), weight, inputs), rel=0.02)
        tokens = error(inputs - in_blocks(inputs, len(weight)), weight, inputs)
        assert found[name].tokens == pytest.approx(tokens, rel=0.02)
        for size in (16, 32):  # 80 inputs are no multiple of 32
            expected = error(inputs - in_blocks(inputs, size), weight, inputs)
            assert found[name].blocks[size] == pytest.approx(expected, rel=0.02)
        assert found[name].blocks[16] < min(found[name].blocks[32], found[name].whole)
    assert [node.op_type for node in source.graph] == ["MatMul", "Relu", "Gemm"], "the model stays as it is"


def test_several_batches_add_up_and_what_is_no_linear_is_left_out():
    source = model()
    weights = find_weights(source)[0]
    halves = [{"X": X[:128]}, {"X": X[128:]}]
    found = rounded_inputs(source, weights[:1], halves, [], threads=1)
    change = np.concatenate([half["X"] - as_bytes(half["X"]) for half in halves])
    assert set(found) == {"A"}
    assert found["A"].whole == pytest.approx(error(change, A, X), rel=0.02)
    assert found["A"].blocks == {}
    convolution = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[1, 3, 8, 8] X) => (float Y) { y = Conv(X, W) Y = ReduceSum<keepdims = 0>(y) }"""
    )
    convolution.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "W"))
    images = ir.from_proto(convolution)
    feeds = {"X": np.ones((1, 3, 8, 8), np.float32)}
    assert rounded_inputs(images, find_weights(images)[0], [feeds], [], threads=1) == {}


def test_bits_add_what_a_solve_loses():
    found = added_by_bits(A, GRAM, GRIDS, (0.5,))
    columns = np.unique(np.linspace(0, 95, 64).round().astype(int))
    for bits, grid in GRIDS.items():
        options = GridOptions(grid.bits, grid.group_size, grid.symmetric, "float16")
        solved = AutoQuantizer(grid=options, damping=0.01).solve(A[:, columns], GRAM).matrix()
        lost = np.sqrt(
            (((X @ (A[:, columns] - solved)) ** 2).sum(0) / ((X @ A[:, columns]) ** 2).sum(0)).mean()
        )
        assert found[bits][0] == pytest.approx(lost, rel=0.05)
    assert found[8][0] < found[4][0] < found[3][0]
    for bits in GRIDS:
        assert 0.5 * found[bits][0] < found[bits][1] < found[bits][0], "there is half as much to round"


@pytest.mark.parametrize(
    "statistics",
    [InputStatistics(GRAM.diagonal), InputStatistics((GRAM.gram[:48, :48], GRAM.gram[48:, 48:]))],
)
def test_grams_that_are_known_in_part_do(statistics):
    found = added_by_bits(A, statistics, {4: usual_grid(4, 16)}, (0.5,))
    assert 0 < found[4][0] < 1


def test_groups_that_are_wider_than_the_weight_and_scales_that_no_float16_holds():
    assert added_by_bits(A, GRAM, {4: usual_grid(4, 128)}, (0.5,)) == {}
    assert added_by_bits(A * np.float32(1e9), GRAM, {4: usual_grid(4)}, (0.5,)) == {}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    source = model()
    return measure_losses(
        source,
        find_weights(source)[0],
        Samples.of([{"X": X}], "test"),
        Options(mask=None, threads=1),
        sparsities=(0.5, 0.9),
        structures=("unstructured",),
        grids=GRIDS,
        blocks={4: 16},
        work=tmp_path_factory.mktemp("work"),
        progress=lambda _line: None,
    )


def output(a, b, x=X):
    return np.maximum(x @ a, 0) @ b + C


def test_the_expected_error_is_that_of_a_model_that_was_rounded(losses):
    reference = output(A, B)

    def relative(found):
        return np.linalg.norm(found - reference) / np.linalg.norm(reference)

    for bits, grid in GRIDS.items():
        options = GridOptions(grid.bits, grid.group_size, grid.symmetric, "float16")
        rounded = AutoQuantizer(grid=options, damping=0.01).solve(A, GRAM).matrix()
        assert losses["A"].error(Choice(bits=bits)) == pytest.approx(relative(output(rounded, B)), rel=0.2)
    dynamic = relative(output(A, B, as_bytes(X)))
    both = losses["A"].error(Choice(bits=8, activations=8)) ** 2 - losses["A"].error(Choice(bits=8)) ** 2
    assert np.sqrt(both) == pytest.approx(dynamic, rel=0.2)


def test_operators_that_round_tokens_have_their_error(tmp_path, losses):
    source = model()
    found = measure_losses(
        source,
        find_weights(source)[0],
        Samples.of([{"X": X}], "test"),
        Options(mask=None, threads=1),
        sparsities=(0.3,),
        structures=("unstructured",),
        grids={8: usual_grid(8)},
        by_token=("A",),
        work=tmp_path,
        progress=lambda _line: None,
    )
    assert found["A"].rounded == pytest.approx(error(X - in_blocks(X, 80), A, X), rel=0.02)
    assert found["B"].rounded == losses["B"].rounded


def test_what_was_not_measured_is_not_known(losses):
    for loss in losses.values():
        assert loss.error(Choice(bits=2)) is None
        assert loss.error(Choice(0.5, "2:4")) is None
        assert loss.error(Choice(0.7, bits=3)) > loss.error(Choice(0.7)) > 0
        assert loss.left(Choice(0.7)) == pytest.approx(2 / 3 * loss.error(Choice(0.7)))
        assert loss.left(Choice(bits=3)) == loss.error(Choice(bits=3))
    assert Loss(1.0, {"unstructured": (0.5,)}, {"unstructured": (0.1,)}).error(Choice(activations=8)) is None
