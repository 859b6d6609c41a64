"""Tables of timings: written, read back, refused when damaged, and decided by."""

import json

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.patterns.layer import layer_kind
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.timing.choose import decide_by_table
from sparse_onnx.timing.curves import Curve, LayerCurves
from sparse_onnx.timing.table import TimingTable, read_table, write_table

MODEL = """<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 32] X) => (float[batch, 16] Y) { m = MatMul(X, A) r = Relu(m) Y = MatMul(r, B) }"""

PLAIN = ("sparse", "unstructured")
SHAPES = {"X": (8, 32), "r": (8, 32)}
CURVE = Curve((0.5, 0.9), (1.25, 0.5), (1.2, 0.45), (1.3, 0.55))


@pytest.fixture
def candidates():
    """A and B with 80 % zeros; only A has an activation."""
    proto = onnx.parser.parse_model(MODEL)
    for name, n in (("A", 32), ("B", 16)):
        weight = np.ones((32, n), np.float32)
        weight.reshape(-1)[: round(0.8 * weight.size)] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return find_candidates(ir.from_proto(proto))[0]


def table(candidate, curves):
    kind = layer_kind(candidate.layers[0], [SHAPES[v.name] for v in candidate.layers[0].inputs])
    return TimingTable({"cpu": "Test CPU", "threads": 3}, ((kind, LayerCurves(2.0, curves)),))


def test_a_table_comes_back_as_it_was(candidates, tmp_path):
    written = table(candidates[0], {PLAIN: CURVE, ("sparse", "2:4"): Curve((0.5,), (0.9,), (0.8,), (1.0,))})
    write_table(written, tmp_path / "table.json")
    read = read_table(tmp_path / "table.json")
    assert read == written
    assert read.machine == "Test CPU, 3 threads"
    layer = candidates[0].layers[0]
    assert read.find(layer, [(8, 32)]) == written.kinds[0][1]
    assert read.find(layer, [(9, 32)]) is None
    assert read.find(candidates[1].layers[0], [(8, 32)]) is None


def test_a_layer_of_the_same_kind_that_was_left_alone_hides_nothing(candidates):
    """An ignored head has the shape of others and no curves."""
    known = table(candidates[0], {PLAIN: CURVE})
    kind, _ = known.kinds[0]
    alone = LayerCurves(2.1, {})
    for kinds in ((*known.kinds, (kind, alone)), ((kind, alone), *known.kinds)):
        both = TimingTable(known.environment, kinds)
        assert both.find(candidates[0].layers[0], [(8, 32)]) == known.kinds[0][1]


def test_layers_are_decided_by_it_and_others_by_their_zeros(candidates):
    first, second = decide_by_table(candidates, table(candidates[0], {PLAIN: CURVE}), [SHAPES])
    time = 1.25 - 0.75 * 0.3 / 0.4  # between 50 and 90 %
    assert first.form == "sparse"
    assert first.times == {"dense": 2.0, "sparse": pytest.approx(2 * time, rel=1e-2)}
    assert first.reason.startswith(f"{1 / time:.2f}x dense")
    assert first.reason.endswith("by the timing table")
    assert second.form == "sparse"
    assert second.times == {}
    assert "not in the timing table" in second.reason


def test_what_is_slower_there_stays_dense(candidates):
    slow = Curve((0.5, 0.9), (2.0, 1.1), (2.0, 1.1), (2.0, 1.1))
    first, _ = decide_by_table(candidates, table(candidates[0], {PLAIN: slow}), [SHAPES])
    assert first.form == "dense"
    assert "below min_speedup 1.02" in first.reason
    close, _ = decide_by_table(candidates, table(candidates[0], {PLAIN: CURVE}), [SHAPES], min_speedup=5.0)
    assert close.form == "dense"


def test_another_pattern_is_not_guessed(candidates):
    candidates[0].weight.value.metadata_props[STRUCTURE_KEY] = "block:8x1"
    first, _ = decide_by_table(candidates, table(candidates[0], {PLAIN: CURVE}), [SHAPES])
    assert "not in the timing table" in first.reason


def test_the_worst_target_decides(candidates):
    known = table(candidates[0], {PLAIN: CURVE})
    other = {"X": (1, 32), "r": (1, 32)}
    first, _ = decide_by_table(candidates, known, [SHAPES, other])
    assert "not in the timing table" in first.reason  # it does not know the second


def test_without_a_table_zeros_decide(candidates):
    reasons = [decision.reason for decision in decide_by_table(candidates)]
    assert all(reason.startswith("not timed: 80") and reason.endswith("at least 65%") for reason in reasons)


DOCUMENT = {
    "format": "sparse-onnx timing table",
    "schema_version": 2,
    "environment": {"cpu": "x"},
    "kinds": [
        {
            "kind": {"operator": "SparseMatMul"},
            "dense_ms": 1.0,
            "curves": {
                "sparse": {"unstructured": {"sparsities": [0.5], "times": [0.9], "low": [0.8], "high": [1.0]}}
            },
        }
    ],
}


def damaged(*path, value):
    document = json.loads(json.dumps(DOCUMENT))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


POINT = ("kinds", 0, "curves", "sparse", "unstructured")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is no timing table"),
        (damaged("format", value="other"), "is no timing table"),
        (damaged("schema_version", value=3), "has schema_version 3"),
        (damaged("schema_version", value=1), "has schema_version 1; this version reads 2"),
        (damaged("kinds", value=None), "damaged"),
        (damaged("kinds", 0, "dense_ms", value=0), "positive"),
        (damaged("kinds", 0, "dense_ms", value="1"), "positive"),
        (damaged(*POINT, "times", value=[float("inf")]), "positive"),
        (damaged(*POINT, "times", value=[0.9, 0.8]), "as many"),
        (damaged(*POINT, "sparsities", value=[1.5]), r"\[0, 1\)"),
        (damaged(*POINT, "sparsities", value=[]), r"\[0, 1\)"),
        (damaged(*POINT, "high", value=None), "damaged"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, document, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message) as caught:
        read_table(path)
    assert "--save-table" in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_table(tmp_path / "none.json")
    (tmp_path / "text.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UsageError, match="is no timing table"):
        read_table(tmp_path / "text.json")
    with pytest.raises(HostError):
        write_table(TimingTable({}, ()), tmp_path / "no" / "folder.json")


def test_curves_of_few_bits_come_back_and_decide(candidates, tmp_path):
    once = Curve((0.0,), (0.25,), (0.2,), (0.3,))
    written = table(candidates[0], {PLAIN: CURVE, ("int4-nbits", "unstructured"): once})
    write_table(written, tmp_path / "table.json")
    read = read_table(tmp_path / "table.json")
    assert read == written
    few = ir.from_proto(onnx.parser.parse_model(MODEL.replace("32]", "64]")))
    for name, n in (("A", 32), ("B", 16)):
        weight = np.random.default_rng(0).standard_normal((64 if name == "A" else 32, n)).astype(np.float32)
        value = next(v for node in few.graph for v in node.inputs if v.name == name)
        value.const_value = ir.tensor(weight, name=name)
        few.graph.register_initializer(value)
    QuantizeWeights(bits=4, method="rtn", group_size=32)(few)
    first = find_candidates(few)[0][0]
    kind = layer_kind(first.layers[0], [(8, 64)])
    known = TimingTable(read.environment, ((kind, read.kinds[0][1]),))
    shapes = [{"X": (8, 64), "r": (8, 32)}]
    (allowed, _) = decide_by_table(find_candidates(few)[0], known, shapes, allowed={"int4-nbits"})
    assert (allowed.form, allowed.times["int4-nbits"]) == ("int4-nbits", pytest.approx(0.5))
    (kept, _) = decide_by_table(find_candidates(few)[0], known, shapes)
    assert kept.form == "dense", "it rounds activations, which nobody allowed"
    pruned = first.weight.value
    pruned.metadata_props[STRUCTURE_KEY] = "2:4"
    (again, _) = decide_by_table(find_candidates(few)[0], known, shapes, allowed={"int4-nbits"})
    assert again.form == "int4-nbits", "whose times do not depend on the pattern"
