"""Parts of a model run with weights from outside: the right numbers, and no weight inside what ORT is given."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import RunError
from sparse_onnx.model import model_io
from sparse_onnx.passes.calibration.skeleton import PartSession, extract

_CHAIN = """<ir_version: 9, opset_import: ["" : 17]>
chain (float[n, 64] X) => (float[n, 64] Y) { a = MatMul(X, W) b = Add(a, bias) c = Relu(b) Y = MatMul(c, V) }"""


@pytest.fixture
def chain(from_text):
    rng = np.random.default_rng(9)
    arrays = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in ("W", "V")}
    return from_text(_CHAIN, bias=np.ones(64, np.float32), **arrays)


def _x(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(10).standard_normal((rows, 64)).astype(np.float32)


def test_all_values_of_a_model(chain, run):
    feeds = {"X": _x()}
    found = PartSession(chain, ["X"], ["a", "c", "Y"], feeds, threads=1).run(feeds)
    a = feeds["X"] @ chain.graph.initializers["W"].const_value.numpy()
    np.testing.assert_allclose(found["a"], a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["c"], np.maximum(a + 1, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["Y"], run(chain, feeds)["Y"], rtol=1e-5, atol=1e-5)


def test_a_part_takes_the_type_of_its_inputs_from_the_data(chain, run):
    c = np.maximum(_x(), 0)
    found = PartSession(chain, ["c"], ["Y"], {"c": c}, threads=1).run({"c": c, "unused": c})
    np.testing.assert_allclose(
        found["Y"], c @ chain.graph.initializers["V"].const_value.numpy(), rtol=1e-5, atol=1e-5
    )


def test_a_new_session_sees_a_new_weight(chain):
    feeds = {"X": _x()}
    chain.graph.initializers["W"].const_value = ir.tensor(np.zeros((64, 64), np.float32), name="W")
    assert (PartSession(chain, ["X"], ["a"], feeds, threads=1).run(feeds)["a"] == 0).all()


def test_weights_stay_outside_and_the_model_as_it_was(chain):
    before = {name: value.const_value for name, value in chain.graph.initializers.items()}
    content, outside = model_io.skeleton(chain)
    assert set(outside) == {"W", "V"}  # the bias is small and stays inside
    assert len(content) < 1500
    assert {name: value.const_value for name, value in chain.graph.initializers.items()} == before


def test_weights_in_a_file_are_mapped(chain, tmp_path):
    model = model_io.load_model(model_io.save_model(chain, tmp_path))
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    feeds = {"X": _x()}
    found = PartSession(model, ["X"], ["Y"], feeds, threads=1).run(feeds)
    expected = PartSession(chain, ["X"], ["Y"], feeds, threads=1).run(feeds)
    np.testing.assert_array_equal(found["Y"], expected["Y"])


@pytest.mark.parametrize(
    "dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.INT4]
)
def test_weights_of_every_type(from_text, dtype):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 21]>
        cast (float[n, 128] X) => (float[n, 64] Y) { w = Identity(W) Y = MatMul(X, w) }""",
        W=np.zeros((128, 64), np.float32),
    )
    w = np.arange(128 * 64).reshape(128, 64) % 7
    model.ir_version = 10
    value = model.graph.initializers["W"]
    value.const_value = ir.tensor(w.astype(dtype.numpy()), dtype=dtype, name="W")
    value.type = ir.TensorType(dtype)
    node = next(iter(model.graph))
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    model.graph.insert_after(node, cast)
    ir.convenience.replace_all_uses_with(node.outputs[0], cast.outputs[0])
    model.graph.remove(node, safe=True)
    cast.outputs[0].name = "w"
    feeds = {"X": np.random.default_rng(11).standard_normal((2, 128)).astype(np.float32)}
    found = PartSession(model, ["X"], ["Y"], feeds, threads=1).run(feeds)["Y"]
    np.testing.assert_allclose(found, feeds["X"] @ w.astype(np.float32), rtol=1e-4, atol=1e-3)


def test_weights_of_a_branch_stay_inside(from_text):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        branch (bool c, float[n, 64] X) => (float[n, 64] Y) {
          Y = If(c) <then_branch = t () => (float[n, 64] y) <float[64, 64] V> { y = MatMul(X, V) },
                     else_branch = e () => (float[n, 64] z) { z = MatMul(X, W) }> }""".replace(
            "<float[64, 64] V> ", ""
        ),
        W=np.eye(64, dtype=np.float32),
        V=np.eye(64, dtype=np.float32),
    )
    feeds = {"c": np.array(True), "X": _x()}
    inner = next(iter(model.graph)).attributes["then_branch"].as_graph()
    moved = model.graph.initializers.pop("V")
    inner.register_initializer(moved)
    moved.const_value = ir.tensor(np.eye(64, dtype=np.float32) * 2, name="V")
    _, outside = model_io.skeleton(model)
    assert set(outside) == {"W"}
    found = PartSession(model, ["c", "X"], ["Y"], feeds, threads=1).run(feeds)["Y"]
    np.testing.assert_allclose(found, 2 * feeds["X"], rtol=1e-6)


def test_inputs_that_do_not_fit_are_one_message(chain):
    session = PartSession(chain, ["X"], ["Y"], {"X": _x()}, threads=1)
    with pytest.raises(RunError, match=r"cannot be run with inputs X float32\[3, 63\]"):
        session.run({"X": _x()[:, :63]})


def test_extraction_takes_only_what_is_needed(chain):
    part = extract(chain, ["X"], ["a"])
    assert [node.op_type for node in part.graph] == ["MatMul"]
    assert set(part.graph.initializers) == {"W"}


def test_an_initializer_that_is_an_input_too_keeps_its_value(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        both (float[n, 64] X, float[64] bias) => (float[n, 64] Y)
        { a = Add(X, bias) b = MatMul(a, W) Y = MatMul(b, V) }""",
        bias=np.full(64, 2, np.float32),
        W=np.eye(64, dtype=np.float32),
        V=np.eye(64, dtype=np.float32),
    )
    for block in calibrator(model, {"X": np.ones((8, 64), np.float32)}).blocks():
        for (layer,) in block.statistics.values():
            np.testing.assert_allclose(layer.mean, 3)


def test_functions_of_the_model_go_along(from_text, calibrator):
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
        calls (float[n, 64] X) => (float[n, 64] Y) { a = MatMul(X, W) b = own.twice(a) Y = MatMul(b, V) }
        <domain: "own", opset_import: ["" : 17]> twice (x) => (y) { y = Add(x, x) }""",
        W=np.eye(64, dtype=np.float32),
        V=np.eye(64, dtype=np.float32),
    )
    statistics = calibrator(model, {"X": np.ones((8, 64), np.float32)}).oneshot()
    np.testing.assert_allclose(statistics["V"][0].mean, 2)
