"""Sparse linears that are one operator, on the whole road: compiled, run, inspected and timed as what they are."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

import sparse_onnx
from sparse_onnx import sparse_ops
from sparse_onnx.analysis.inspection import inspect_model
from sparse_onnx.compilation import write
from sparse_onnx.compilation.report_rows import kernel_names
from sparse_onnx.errors import ModelFileError
from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing import choose, joined, layers
from sparse_onnx.timing.choose import Decision
from sparse_onnx.timing.layers import time_sparse_layers
from sparse_onnx.timing.rounds import Ratio

WIDTH, HIDDEN, HEADS = 128, 256, 4

ATTENTION = f"""
    {{q}} {{k}} {{v}}
    heads = Constant<value = int64[4] {{{{0, 0, {HEADS}, {WIDTH // HEADS}}}}}>()
    flat = Constant<value = int64[3] {{{{0, 0, {WIDTH}}}}}>()
    scale = Constant<value = float {{{{{(WIDTH // HEADS) ** -0.5}}}}}>()
    qr = Reshape(q, heads) qh = Transpose<perm = [0, 2, 1, 3]>(qr)
    kr = Reshape(k, heads) kh = Transpose<perm = [0, 2, 3, 1]>(kr)
    vr = Reshape(v, heads) vh = Transpose<perm = [0, 2, 1, 3]>(vr)
    scores = MatMul(qh, kh) scaled = Mul(scores, scale) shares = Softmax<axis = -1>(scaled)
    mixed = MatMul(shares, vh) turned = Transpose<perm = [0, 2, 1, 3]>(mixed) joined = Reshape(turned, flat)
    o = MatMul(joined, Wo) x = Add(X, o)"""

BERT = (
    ATTENTION.format(
        q="q_ = MatMul(X, Wq) q = Add(q_, bq)",
        k="k_ = MatMul(X, Wk) k = Add(k_, bk)",
        v="v_ = MatMul(X, Wv) v = Add(v_, bv)",
    )
    + """ n = LayerNormalization(x, gamma, beta) h = MatMul(n, Wu) i = Add(h, bu) a = Gelu(i) d = MatMul(a, Wd)
    Y = Add(n, d)"""
)
LLAMA = (
    ATTENTION.format(q="q = MatMul(X, Wq)", k="k = MatMul(X, Wk)", v="v = MatMul(X, Wv)")
    + """ g = MatMul(x, Wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(x, Wu) m = Mul(a, u) d = MatMul(m, Wd)
    Y = Add(x, d)"""
)
MODELS = {
    "bert": (BERT, {"SparseMatMulSplit3": 1, "SparseMatMul": 1, "SparseFeedForwardGelu": 1}),
    "llama": (LLAMA, {"SparseMatMulSplit3": 1, "SparseMatMul": 1, "SparseFeedForwardSiluGate": 1}),
}
SHAPE = (2, 16, WIDTH)
X = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """A model file with 90 % zeros, and how often each sparse operator must be in the compiled one."""
    body, expected = MODELS[request.param]
    rng = np.random.default_rng(0)
    shape = ", ".join(map(str, SHAPE[1:]))
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        block (float[batch, {shape}] X) => (float[batch, {shape}] Y) {{ {body} }}"""
    )
    for name in sorted({name for node in proto.graph.node for name in node.input}):
        if name[0] == "W":
            k, n = HIDDEN if name == "Wd" else WIDTH, HIDDEN if name in ("Wg", "Wu") else WIDTH
            array = rng.standard_normal((k, n)).astype(np.float32) * np.float32(k**-0.5)
            array[rng.random(array.shape) < 0.9] = 0
        elif name in ("bq", "bk", "bv", "bu", "gamma", "beta"):
            array = rng.standard_normal(HIDDEN if name == "bu" else WIDTH).astype(np.float32)
        else:
            continue
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx", expected


@pytest.fixture
def compiled(case, tmp_path):
    result = sparse_onnx.optimize(case[0], tmp_path / "out", input_shapes={"X": SHAPE}, benchmark=False)
    assert result.exit_code == 0
    return result


def test_compiled_model_is_merged_and_equal_with_and_without_the_library(case, compiled):
    source, expected = case
    path = compiled.folder / "model.onnx"
    op_types = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert {op_type: op_types.count(op_type) for op_type in expected} == expected
    want = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).run(None, {"X": X})[0]
    (fast,) = sparse_onnx.InferenceSession(path).run(None, {"X": X})
    (portable,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"X": X})
    for got in (fast, portable):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_report_has_every_linear_and_inspection_every_operator(compiled):
    rows = compiled.report["layers"]
    assert {row["name"] for row in rows if row["decision"] == "sparse"} >= {
        "Wq",
        "Wk",
        "Wv",
        "Wo",
        "Wu",
        "Wd",
    }
    kernels = {row["kernel"] for row in rows if row["decision"] == "sparse"}
    assert kernels <= set(sparse_ops.info().kernels), "merged or not, the kernel is known"
    (attention,) = compiled.report["untouched"]  # queries by keys, and probabilities by values
    assert (attention["op_type"], attention["count"]) == ("MatMul", 2)
    rest = 1 - compiled.report["summary"]["sparse_flops_fraction"]
    assert 0 < attention["share"] == pytest.approx(rest)
    document = inspect_model(compiled.folder / "model.onnx")
    stored = {row["name"]: row for row in document["weights"] if row["state"] == "sparse"}
    assert stored["Wq+Wk+Wv"]["shape"] == [WIDTH, 3 * WIDTH]
    assert stored["Wd"]["shape"] == [HIDDEN, WIDTH]
    assert stored["Wd"]["op_type"].startswith("SparseFeedForward")
    assert all(row["zeros"] == pytest.approx(0.9 * row["size"], rel=0.03) for row in stored.values())
    assert sum(row["size"] for row in stored.values()) == sum(
        row["shape"][0] * row["shape"][1] for row in rows
    )
    assert document["total"]["sparsity"] == pytest.approx(0.9, abs=0.02)
    assert all(row["run_by"] == "the kernel library" for row in document["custom_operators"] if row["known"])
    assert {"SparseMatMulSplit3"} <= {row["op_type"] for row in document["custom_operators"] if row["known"]}


NAMES = [f"encoder.0.attention.{name}.weight" for name in ("query", "key", "value")]


def test_kernels_are_told_by_the_names_of_the_linears_whatever_those_are():
    """What the names have in common ends in front of ``query.weight``."""
    rng = np.random.default_rng(1)
    nodes = [onnx.helper.make_node("MatMul", ["X", name], [f"Y{i}"]) for i, name in enumerate(NAMES)]
    weights = [np.where(rng.random((WIDTH, WIDTH)) < 0.1, 1, 0).astype(np.float32) for _ in NAMES]
    made = [onnx.helper.make_tensor_value_info(f"Y{i}", 1, SHAPE) for i in range(3)]
    tensors = [onnx.numpy_helper.from_array(w, name) for w, name in zip(weights, NAMES, strict=True)]
    given = [onnx.helper.make_tensor_value_info("X", 1, SHAPE)]
    graph = onnx.helper.make_graph(nodes, "g", given, made, tensors)
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9))
    LowerSparseMatMul(min_sparsity=0.0)(model)
    alone = kernel_names(model, {"X": SHAPE})
    assert sorted(alone) == sorted(NAMES)
    MergeLinears()(model)
    assert [node.op_type for node in model.graph] == ["SparseMatMulSplit3"]
    assert set(kernel_names(model, {"X": SHAPE})) == set(NAMES)
    assert set(kernel_names(model, {"X": SHAPE}).values()) <= set(sparse_ops.info().kernels)
    assert kernel_names(model, {}) == {}


def test_verification_reads_every_stored_weight(case, compiled):
    (source, expected), path = case, compiled.folder / "model.onnx"
    found = sparse_onnx.verify(source, path, input_shapes={"X": SHAPE}, layers=True)
    assert found.passed
    assert found.against_pruned_dense["with_library"].relative_error < 1e-6
    (fused,) = (op_type for op_type in expected if op_type.startswith("SparseFeedForward"))
    assert fused in {layer.op_type for layer in found.trace.layers}
    proto = onnx.load(path)
    (offsets,) = (tensor for tensor in proto.graph.initializer if tensor.name == "Wd.offsets")
    array = onnx.numpy_helper.to_array(offsets).copy()
    array[0] = 255
    offsets.CopyFrom(onnx.numpy_helper.from_array(array, offsets.name))
    onnx.save(proto, path)
    with pytest.raises(
        ModelFileError, match="its stored weight is damaged: an offset reaches past its chunk"
    ):
        sparse_onnx.verify(source, path, input_shapes={"X": SHAPE})


def test_layers_are_timed_with_all_their_outputs(compiled, tmp_path, monkeypatch):
    timed, real = {}, layers.time_pair

    def time_pair(models, libraries, feeds, *, threads, work):
        (node,) = models[0].graph
        timed[node.op_type] = (len(node.outputs), [value.name for value in models[0].graph.outputs])
        return real(models, libraries, feeds, threads=threads, work=work, rounds=2, seconds=0)

    monkeypatch.setattr(layers, "time_pair", time_pair)
    model = model_io.load_model(compiled.folder / "model.onnx")
    found = time_sparse_layers(model, {"X": X}, Workbench(1, tmp_path, 1 << 30))
    assert timed["SparseMatMulSplit3"][0] == len(timed["SparseMatMulSplit3"][1]) == 3
    shapes = {row.op_type: row.weight_shapes for row in found}
    assert shapes.pop("SparseMatMulSplit3") == ((WIDTH, 3 * WIDTH),)
    assert shapes.pop("SparseMatMul") == ((WIDTH, WIDTH),)
    assert set(shapes.values()) <= {
        ((WIDTH, HIDDEN), (HIDDEN, WIDTH)),
        ((WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)),
    }
    assert all(row.sparsity == pytest.approx(0.9, abs=0.02) for row in found)


def test_layers_given_up_leave_smaller_merges(case, tmp_path, monkeypatch):
    """The whole model is slower at first: half of the layers go, and what is left is merged anew."""
    tried = []

    def slower_at_first(optimized, *_others):
        if optimized not in tried:
            tried.append(optimized)
        median = 0.5 if len(tried) == 1 else 1.5
        return [Ratio(1.0, 1 / median, median, median, median)]

    def all_sparse(_model, candidates, *_arguments, **_options):
        return [
            Decision(c, "sparse", "", {"dense": 2.0 + i, "sparse": 1.0})
            for i, c in enumerate(reversed(candidates))
        ]

    monkeypatch.setattr(write, "time_whole", slower_at_first)
    monkeypatch.setattr(choose, "decide", all_sparse)
    source, _ = case
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes={"X": SHAPE}, threads=1)
    assert len(tried) == 2
    left = sum(row["decision"] == "sparse" for row in result.report["layers"])
    assert left == len(result.report["layers"]) // 2
    nodes = onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node
    linears = {"SparseMatMulSplit2": 2, "SparseMatMulSplit3": 3, "SparseMatMulSiluGate": 2}
    linears |= {"SparseFeedForwardGelu": 2, "SparseFeedForwardSilu": 2, "SparseFeedForwardSiluGate": 3}
    sparse = [
        node.op_type for node in nodes if node.op_type.startswith(("SparseMatMul", "SparseFeedForward"))
    ]
    assert sum(linears.get(op_type, 1) for op_type in sparse) == left
    want = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).run(None, {"X": X})[0]
    (got,) = sparse_onnx.InferenceSession(tmp_path / "out/model.onnx").run(None, {"X": X})
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(("speedup", "together"), [(1.2, True), (0.5, False)])
def test_linears_of_bytes_are_together_unless_that_is_slower(speedup, together, case, tmp_path, monkeypatch):
    source, expected = case

    def all_bytes(_model, candidates, *_arguments, **_options):
        known = [(c, "int8-quads" in {form.name for form in c.forms}) for c in candidates]
        return [
            Decision(c, "int8-quads" if able else "dense", "", {"dense": 2.0, "int8-quads": 1.0})
            for c, able in known
        ]

    monkeypatch.setattr(write, "time_whole", lambda *_: [Ratio(1.5, 1.0, 1.5, 1.5, 1.5)])
    monkeypatch.setattr(choose, "decide", all_bytes)
    monkeypatch.setattr(joined, "time_pair", lambda *_, **__: Ratio(speedup, 1.0, speedup, speedup, speedup))
    options = {"input_shapes": {"X": SHAPE}, "threads": 1, "precision": "int8", "timing_cache": False}
    result = sparse_onnx.optimize(source, tmp_path / "out", **options)
    assert result.exit_code == 0
    path = tmp_path / "out/model.onnx"
    op_types = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    wanted = {op_type.replace("Sparse", "SparseInt8"): count for op_type, count in expected.items()}
    assert ({op_type: op_types.count(op_type) for op_type in wanted} == wanted) == together
    slower = [place for place in result.report["declined"] if "slower as one operator" in place["reason"]]
    assert bool(slower) != together
    (fast,) = sparse_onnx.InferenceSession(path).run(None, {"X": X})
    (portable,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"X": X})
    assert np.linalg.norm(fast - portable) <= 1e-3 * np.linalg.norm(portable)


def test_what_is_not_merged_is_declined_once(tmp_path):
    """100 of 128 outputs of a block, beside one that fills two."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, 64] X) => (float[batch, 256] A, float[batch, 100] B) { A = MatMul(X, V) B = MatMul(X, W) }"""
    )
    for name in "VW":
        array = rng.standard_normal((64, 256 if name == "V" else 100)).astype(np.float32)
        array[rng.random(array.shape) < 0.9] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "in.onnx")
    report = sparse_onnx.optimize(tmp_path / "in.onnx", tmp_path / "out", benchmark=False).report
    reasons = [place["reason"] for place in report["declined"] if place["pass_name"] == "lower.merge-linears"]
    assert reasons == ["is stored differently from the other linears of its input"] * 2
