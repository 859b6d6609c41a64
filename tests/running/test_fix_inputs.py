"""Inputs that become constants: what depends on them is computed, and branches not taken go."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.metadata_keys import FIXED_INPUTS_KEY
from sparse_onnx.running.fix_inputs import fix_inputs, fixed_values
from sparse_onnx.running.runtime import open_session, run_session

RATES = """
<ir_version: 9, opset_import: ["" : 17]>
voice (float[n, 4] x, int64 sr, bool[2] flags) => (float[n, m] y)
<int64 k = {16000}, int64 half = {8000}> {
  c = Equal(sr, k)
  y = If(c) <
    then_branch = yes () => (float[n, m] r) { t = MatMul(x, w) r = Relu(t) },
    else_branch = no () => (float[n, m] r) {
      d = Equal(sr, half)
      r = If(d) <
        then_branch = a () => (float[n, m] s) { t = MatMul(x, v) s = Neg(t) },
        else_branch = b () => (float[n, m] s) { t = MatMul(x, u) s = Abs(t) }
      >
    }
  >
}
"""


def load(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def rates() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in "wvu"}
    proto = onnx.parser.parse_model(RATES)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return ir.from_proto(proto)


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    folder.mkdir()
    path = model_io.save_model(model, folder)
    onnx.checker.check_model(str(path))
    return next(iter(run_session(open_session(path, threads=1, library=False), feeds).values()))


def operators(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph if node.op_type != "Identity")


@pytest.mark.parametrize(
    ("rate", "left"), [(16000, ["MatMul", "Relu"]), (8000, ["MatMul", "Neg"]), (1, ["Abs", "MatMul"])]
)
def test_branches_that_are_not_taken_go(tmp_path, rate, left):
    original, model = rates(), rates()
    assert fix_inputs(model, input_specs(model, {}, {"sr": rate}))
    assert [value.name for value in model.graph.inputs] == ["x", "flags"]
    assert operators(model) == left
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
    feeds |= {"sr": np.array(rate), "flags": np.ones(2, bool)}
    expected = run(original, tmp_path / "a", feeds)
    assert np.array_equal(run(model, tmp_path / "b", feeds), expected)
    assert [value.name for value in model.graph.outputs] == ["y"]
    used = [name for name, value in model.graph.initializers.items() if value.uses()]
    assert len(used) == 1  # nothing of the branches that went


def test_nothing_to_fix_changes_nothing():
    model = rates()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not fix_inputs(model, input_specs(model, {"sr": 8000}))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_result_says_what_was_fixed():
    model = rates()
    fix_inputs(model, input_specs(model, {}, {"sr": 8000, "flags": (True, False)}))
    assert json.loads(model.metadata_props[FIXED_INPUTS_KEY]) == {"sr": 8000, "flags": [True, False]}
    assert fixed_values(model) == {"sr": 8000, "flags": [True, False]}
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("text", ["", "no json", "[1]", "null"])
def test_metadata_of_others_is_no_trouble(text):
    model = rates()
    model.metadata_props[FIXED_INPUTS_KEY] = text
    assert fixed_values(model) == {}


def test_branches_that_share_names_and_return_outer_values(tmp_path):
    """Two Ifs whose branches use the same names; a branch that returns an initializer of its own, one that is an output
    of the graph, and one that passes a value of the graph on."""
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[n] x, bool p) => (float[n] y, float[n] z) {
      a = If(p) < then_branch = t1 () => (float[n] r) { s = Relu(x) r = Neg(s) },
                  else_branch = e1 () => (float[n] r) { r = Abs(x) } >
      q = Not(p)
      z = If(q) < then_branch = t2 () => (float[n] r) { r = Abs(a) },
                  else_branch = e2 () => (float[n] r) { s = Relu(a) r = Sub(s, x) } >
      y = Add(a, z)
    }
    """
    feeds = {"x": np.array([-1, 2, -3], np.float32)}
    for index, value in enumerate((True, False)):
        original, model = load(text), load(text)
        fix_inputs(model, input_specs(model, {}, {"p": value}))
        assert "If" not in operators(model)
        names = [v.name for node in model.graph for v in node.outputs]
        assert len(names) == len(set(names))
        expected = run(original, tmp_path / f"a{index}", {**feeds, "p": np.array(value)})
        assert np.array_equal(run(model, tmp_path / f"b{index}", feeds), expected)


def test_a_branch_in_a_loop_that_reads_a_fixed_input(tmp_path):
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[2] x, bool p, int64 times) => (float[2] y) <bool go = {1}> {
      y = Loop(times, go, x) <
        body = step (int64 i, bool on, float[2] h) => (bool still, float[2] next) {
          still = Identity(on)
          next = If(p) < then_branch = t () => (float[2] r) { r = Add(h, h) },
                         else_branch = e () => (float[2] r) { r = Neg(h) } >
        }
      >
    }
    """
    feeds = {"x": np.array([1, 2], np.float32), "times": np.array(3)}
    model = load(text)
    fix_inputs(model, input_specs(model, {}, {"p": True}))
    inner = [node.op_type for graph in model.graph.subgraphs() for node in graph]
    assert "If" not in inner
    assert run(model, tmp_path / "a", feeds).tolist() == [8, 16]


def test_what_is_random_or_too_large_is_left_to_the_run():
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[n] x, int64[1] size) => (float[n] y) {
      zeros = ConstantOfShape(size)
      noise = RandomNormalLike(zeros)
      some = ReduceSum(zeros)
      more = ReduceSum(noise)
      s = Add(some, more)
      y = Add(x, s)
    }
    """
    model = load(text)
    fix_inputs(model, input_specs(model, {}, {"size": 1 << 21}))
    assert operators(model) == ["Add", "Add", "ConstantOfShape", "RandomNormalLike", "ReduceSum"]


def test_an_input_that_is_an_output(tmp_path):
    model = load(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[2] x, int64 k) => (int64 y, float[2] z) '
        "{ y = Identity(k) z = Abs(x) }"
    )
    fix_inputs(model, input_specs(model, {}, {"k": 7}))
    assert run(model, tmp_path / "a", {"x": np.ones(2, np.float32)}) == 7


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"rate": 1}, "--fix-input names 'rate'; the inputs are x: float32"),
        ({"sr": 1.5}, "--fix-input sr=1.5: sr: int64.. takes an integer"),
        ({"sr": True}, "takes an integer"),
        ({"sr": 2**63}, "takes an integer|write a number"),
        ({"sr": (1, 2)}, r"is of shape \[2\], which does not fit sr: int64\[\]"),
        ({"flags": (True, False, True)}, r"is of shape \[3\]"),
        ({"flags": 2}, "takes true or false"),
        ({"x": 1.0}, "leaves its size open"),
        ({"x": ((1.0, 2.0), (3.0,))}, "all rows equally long"),
    ],
)
def test_values_that_do_not_fit(fixed, said):
    model = rates()
    with pytest.raises(UsageError, match=said):
        fix_inputs(model, input_specs(model, {}, fixed))


def test_one_number_fills_a_fixed_shape():
    model = rates()
    fix_inputs(model, input_specs(model, {}, {"flags": True}))
    constant = model.graph.initializers["flags"].const_value
    assert constant is not None
    assert constant.numpy().tolist() == [True, True]
