"""Nodes in any order are read as in topological order; a circle is refused in words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_onnx
from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.errors import ModelFileError
from sparse_onnx.model.check import scopes
from sparse_onnx.model.model_io import load_model, save_model
from sparse_onnx.model.node_order import sort_nodes

TEXT = """
<ir_version: 9, opset_import: ["" : 20, "local" : 1]>
main (float[2, 3] x, bool c) => (float[2, 3] y)
{
    a = Relu (x)
    b = Neg (a)
    d = If (c) <
        then_branch = then () => (float[2, 3] t) { s = Abs (b) r = Add (s, a) t = Exp (r) },
        else_branch = otherwise () => (float[2, 3] e) { e = Identity (b) }
    >
    f = local.Twice (d)
    g = Add (f, b)
    y = Sub (g, a)
}
<domain: "local", opset_import: ["" : 20]>
Twice (p) => (q) { r = Add (p, p) s = Relu (r) q = Neg (s) }
"""
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def shuffled(seed: int, *, functions: bool = True) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(TEXT)
    shuffle = random.Random(seed).shuffle
    for scope in list(scopes(model)):
        if isinstance(scope, onnx.FunctionProto) and not functions:
            continue
        nodes = list(scope.node)
        shuffle(nodes)
        del scope.node[:]
        scope.node.extend(nodes)
    return model


def outputs(model: onnx.ModelProto, choice: bool) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": X, "c": np.array(choice)})[0]
    return result


def names(model: onnx.ModelProto) -> list[list[str]]:
    return [[node.output[0] for node in scope.node] for scope in scopes(model)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_any_order_is_sorted(seed: int) -> None:
    model = shuffled(seed)
    sort_nodes(model, Path("m.onnx"))
    onnx.checker.check_model(model)
    for choice in (False, True):
        wanted = outputs(onnx.parser.parse_model(TEXT), choice)
        np.testing.assert_array_equal(outputs(model, choice), wanted)


def test_sound_order_stays() -> None:
    model = onnx.parser.parse_model(TEXT)
    before = model.SerializeToString(deterministic=True)
    sort_nodes(model, Path("m.onnx"))
    assert model.SerializeToString(deterministic=True) == before


def test_nodes_move_no_further_than_they_must() -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 20]>
        main (float[2] x) => (float[2] z) { y = Neg (b) z = Add (y, b) a = Exp (x) b = Relu (x) }""")
    sort_nodes(model, Path("m.onnx"))
    assert names(model) == [["a", "b", "y", "z"]]


@pytest.mark.parametrize(
    "body",
    [
        "y = Add (x, y)",
        "a = Neg (b) b = Exp (a) y = Add (a, x)",
        "z = Add (y, y) a = Neg (y) y = Add (a, x)",
        "y = If (c) <then_branch = t () => (float[2] p) { p = Neg (y) }, "
        "else_branch = e () => (float[2] q) { q = Exp (x) }>",
        "y = If (c) <then_branch = t () => (float[2] p) { r = Neg (p) p = Exp (r) }, "
        "else_branch = e () => (float[2] q) { q = Exp (x) }>",
    ],
)
def test_a_circle_is_refused_in_words(tmp_path: Path, body: str) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> main (float[2] x, bool c) => (float[2] y) {{ {body} }}'
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ModelFileError, match=r"m\.onnx: node .*: needs '.', which is computed from its own output"
    ):
        load_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("seed", range(4))
def test_every_command_reads_them(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "m.onnx"
    model = shuffled(seed, functions=False)  # in functions ONNX Runtime itself wants them sorted
    path.write_bytes(model.SerializeToString())
    saved = onnx.load(save_model(load_model(path), tmp_path / "saved"))
    np.testing.assert_array_equal(outputs(saved, True), outputs(onnx.parser.parse_model(TEXT), True))
    assert inspect_model(path)["operators"]["ai.onnx::If"] == 1
    result = sparse_onnx.optimize(path, tmp_path / "out", benchmark=False, threads=1)
    assert sparse_onnx.verify(path, result.folder / "model.onnx", threads=1).passed
