"""Layers timed alone: which ones, at which shapes, against what. The times themselves are not judged."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.model.probe import shapes_in, uses_library, with_shape_outputs
from sparse_onnx.model.stored_weights import sparse_nodes, sparsity_of
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing import layers
from sparse_onnx.timing.layers import time_pair, time_sparse_layers
from sparse_onnx.timing.rounds import Ratio

CHAIN = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, sequence, 32] X) => (float[batch, sequence, 16] Y)
{ a = MatMul(X, A) b = Relu(a) c = MatMul(b, B) d = MatMul(c, C) r = Relu(d) Y = MatMul(r, D) }"""


def chain(sparsity=0.8):
    """A and B are equal in shape and sparsity, but one has an activation; B and C are equal."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(CHAIN)
    for name, n in (("A", 32), ("B", 32), ("C", 32), ("D", 16)):
        weight = rng.standard_normal((32, n)).astype(np.float32)
        weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return ir.from_proto(proto)


def lowered(*layers):
    model = chain()
    LowerSparseMatMul(layers=layers)(model)
    return model


FEEDS = {"X": np.ones((2, 3, 32), np.float32)}


def test_sparse_nodes_of_a_model():
    assert sparse_nodes(chain()) == []
    assert not uses_library(chain())
    model = lowered("A", "C")
    assert [node.op_type for node in sparse_nodes(model)] == ["SparseMatMulRelu", "SparseMatMulRelu"]
    assert uses_library(model)


def test_sparsity_is_that_of_the_weight():
    (node,) = sparse_nodes(lowered("D"))
    weight = next(
        value for name, value in chain().graph.initializers.items() if name == "D"
    ).const_value.numpy()
    assert sparsity_of(node) == pytest.approx((weight == 0).mean(), abs=0.02)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("budget", [1 << 30, 2000])
def test_shapes_of_values(tmp_path, library, budget):
    model = lowered("A")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    probe = with_shape_outputs(model, {"X", "c", "Y"})
    with open_runner(probe, Workbench(1, tmp_path, budget), library=library) as runner:
        assert runner.whole == (budget > 10**6)
        own, shapes = shapes_in(runner.run(FEEDS))
    assert shapes == {"X": (2, 3, 32), "c": (2, 3, 32), "Y": (2, 3, 16)}
    assert {name: value.shape for name, value in own.items()} == {"Y": (2, 3, 16)}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("start", ["sparse_onnx.shape:", "sparse_onnx.shape_:", "sparse_onnx.shape.own:"])
def test_shapes_of_values_in_a_model_with_names_like_ours(tmp_path, start):
    model = chain()
    values = {value.name: value for node in model.graph for value in node.outputs}
    values["Y"].name, values["c"].name = f"{start}c", f"{start}Y"
    probe = with_shape_outputs(model, {"X", f"{start}c", f"{start}Y"})
    with open_runner(probe, Workbench(1, tmp_path, 1 << 30), library=False) as runner:
        own, shapes = shapes_in(runner.run(FEEDS))
    assert shapes == {"X": (2, 3, 32), f"{start}c": (2, 3, 16), f"{start}Y": (2, 3, 32)}
    assert {name: value.shape for name, value in own.items()} == {f"{start}c": (2, 3, 16)}


def test_pair_is_timed_and_nothing_left(tmp_path):
    found = time_pair(
        [chain(), lowered("A")], [False, True], FEEDS, threads=1, work=tmp_path, rounds=5, seconds=0
    )
    assert found.first_ms > 0
    assert found.second_ms > 0
    assert found.low <= found.median <= found.high
    assert list(tmp_path.iterdir()) == []


def test_every_sparse_layer_once_and_equal_ones_share_a_measurement(tmp_path, monkeypatch):
    calls = []

    def timed(models, libraries, feeds, *, threads, work):
        (name,) = feeds
        inputs = [[value.name for value in model.graph.inputs] for model in models]
        assert inputs == [[name], [name]]
        calls.append((models[0].graph[0].op_type, feeds[name].shape, tuple(libraries), threads))
        return Ratio(2.0, 1.0, 2.0 + len(calls), 1.5, 2.5)

    monkeypatch.setattr(layers, "time_pair", timed)
    lines = []
    found = time_sparse_layers(
        lowered("A", "B", "C", "D"), FEEDS, Workbench(1, tmp_path, 1 << 30, lines.append)
    )
    assert calls == [
        ("SparseMatMulRelu", (2, 3, 32), (False, True), 1),
        ("SparseMatMul", (2, 3, 32), (False, True), 1),
        ("SparseMatMul", (2, 3, 32), (False, True), 1),
    ]
    assert [row.weight_shapes for row in found] == [((32, 32),)] * 3 + [((32, 16),)]
    assert [row.times.median for row in found] == [3.0, 4.0, 3.0, 5.0]
    assert [row.x_shape for row in found] == [(2, 3, 32)] * 4
    assert [row.rows for row in found] == [6] * 4
    assert {row.kernel for row in found} <= set(sparse_ops.info().kernels)
    assert len(lines) == 3


def test_real_measurement_of_a_layer(tmp_path):
    (found,) = time_sparse_layers(lowered("D"), FEEDS, Workbench(1, tmp_path, 1 << 30))
    assert (found.op_type, found.weight_shapes, found.x_shape) == ("SparseMatMul", ((32, 16),), (2, 3, 32))
    assert min(found.times.first_ms, found.times.second_ms, found.times.low) > 0
    assert list(tmp_path.iterdir()) == []


def test_an_operator_with_two_weights(tmp_path):
    model = lowered("C", "D")
    alone = [sparsity_of(node) for node in sparse_nodes(model)]
    FuseFeedForward()(model)
    (found,) = time_sparse_layers(model, FEEDS, Workbench(1, tmp_path, 1 << 30))
    assert (found.op_type, found.x_shape) == ("SparseFeedForwardRelu", (2, 3, 32))
    assert found.weight_shapes == ((32, 32), (32, 16))
    assert found.sparsity == pytest.approx((2 * alone[0] + alone[1]) / 3)
    assert found.rows == 6
    assert found.kernel in sparse_ops.info().kernels
    assert min(found.times.first_ms, found.times.second_ms) > 0
