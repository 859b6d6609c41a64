"""Weights of few bits that operators of ours have stored: read, counted and inspected as what they are."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.model import model_io
from sparse_onnx.model.level_weights import level_weight, node_weights
from sparse_onnx.model.work import Work
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.sparse_ops.formats.base import FormatError

WIDTH, HIDDEN = 128, 192
LLAMA = """
    q = MatMul(X, Wq) k = MatMul(X, Wk) v = MatMul(X, Wv) qk = Mul(q, k) m = Mul(qk, v)
    o = MatMul(m, Wo) x = Add(X, o)
    g = MatMul(x, Wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, Wu) p = Mul(a, u) d = MatMul(p, Wd)
    Y = Add(x, d)"""
FORMS = ["int4-bitmap", "int4-of-16", "int8-bitmap"]


@pytest.fixture
def block(from_text):
    """A gated block, all linears in one form."""

    def block(form):
        rng = np.random.default_rng(0)
        shapes = {f"W{name}": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {"Wg": (WIDTH, HIDDEN), "Wu": (WIDTH, HIDDEN), "Wd": (HIDDEN, WIDTH)}
        model = from_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[1, 1, {WIDTH}] X) => (float[1, 1, {WIDTH}] Y) {{ {LLAMA} }}""",
            **{name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()},
        )
        common.ShapeInferencePass()(model)
        Magnitude(mask_structure="4:16")(model)
        QuantizeWeights(method="rtn", bits=int(form[3]), group_size=64)(model)
        candidates, _ = find_candidates(model)
        chosen = [(one, own) for one in candidates for own in one.forms if own.name == form]
        assert len(chosen) == len(shapes)
        context = PassContext()
        lowered, declined = lower_layers(model, chosen, Packer(context), context)
        assert declined == ()
        return lowered

    return block


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_a_decoder_is_four_products(form, block, tmp_path):
    lowered = block(form)
    ours = [node.op_type for node in lowered.graph if node.domain]
    word = {"int4-bitmap": "Int4", "int4-of-16": "Int4Of16", "int8-bitmap": "Int8"}[form]
    assert ours == [f"SparseMatMul{word}{behind}" for behind in ("Split3", "", "SiluGate", "")]
    work = Work(lowered)
    assert work.unknown() >= {"m", "x", "p"}, "a run shows their shapes"
    shown = {value.name: tuple(value.shape) for node in lowered.graph for value in node.outputs}
    work = work.count(shown)
    assert all(part.sparse for part in work)
    assert sum(part.products for part in work) == 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN
    assert {part.weight for part in work} == {"Wq+Wk+Wv", "Wo", "Wg+Wu", "Wd"}
    document = inspect_model(model_io.save_model(lowered, tmp_path, name="model"), metrics=True)
    assert document["untouched"] == []
    rows = {row["name"]: row for row in document["weights"]}
    assert {name: row["shape"] for name, row in rows.items()} == {
        "Wq+Wk+Wv": [WIDTH, 3 * WIDTH],
        "Wo": [WIDTH, WIDTH],
        "Wg+Wu": [WIDTH, 2 * HIDDEN],
        "Wd": [HIDDEN, WIDTH],
    }
    for node in lowered.graph:
        for weight in node_weights(node):
            row = rows[weight.name]
            assert row["state"] == "sparse"
            assert row["reason"] == ""
            assert row["dtype"] == f"{form[3]} bits by 64"
            assert row["bytes"] == weight.packed().nbytes
            assert row["zeros"] == np.count_nonzero(weight.unpack() == 0) >= 0.75 * row["size"]
            assert row["metrics"] is not None
    assert all(row["known"] for row in document["custom_operators"])


@pytest.mark.parametrize("damage", ["sizes", "format", "missing", "type", "short"])
def test_a_damaged_weight_is_said_to_be_damaged(damage, block, tmp_path):
    lowered = block("int4-bitmap")
    node = next(node for node in lowered.graph if node.op_type == "SparseMatMulInt4")
    weight = level_weight(node)
    values = weight.parts[1]
    if damage == "sizes":
        node.attributes.add(ir.AttrInt64("N", 0))
    elif damage == "format":
        node.attributes.add(ir.AttrString("format", "newer"))
    elif damage == "missing":
        node.replace_input_with(2, node.inputs[0])
    elif damage == "type":
        values.const_value = ir.tensor(np.zeros(values.const_value.size, np.int8), name=values.name)
    else:
        values.const_value = ir.tensor(values.const_value.numpy()[1:].copy(), name=values.name)
    with pytest.raises(FormatError):
        weight.unpack()
    document = inspect_model(model_io.save_model(lowered, tmp_path, name="model"))
    reasons = {row["name"]: row["reason"] for row in document["weights"]}
    assert reasons[weight.name].startswith("the stored weight is damaged: ")
    assert sum(map(bool, reasons.values())) == 1


def test_other_operators_have_none(from_text):
    model = from_text(
        '<ir_version: 10, opset_import: ["" : 21, "other" : 1]> g (float[2] X) => (float[2] Y) '
        "{ h = Neg(X) Y = other.SparseMatMulInt4(h) }"
    )
    assert [level_weight(node) for node in model.graph] == [None, None]
