"""Linears of 8 bits as our products of integers: the same weights, tokens rounded one by one, bias and activation
inside; what is left."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.model import model_io
from sparse_onnx.model.weights import find_weights
from sparse_onnx.model.work import Work
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.int8_matmul import LowerInt8MatMul, LowerSparseInt8MatMul
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.dynamic import Dynamic
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.running.runtime import open_session
from sparse_onnx.sparse_ops.formats.int8_quads import MAX_INPUTS

RNG = np.random.default_rng(2)
K, N = 96, 40
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
X[0, 1] *= 10
BODIES = {
    "Int8MatMul": "Y = MatMul(X, W)",
    "Int8MatMulGelu": "h = MatMul(X, W) b = Add(h, bias) Y = Gelu(b)",
    "Int8MatMulRelu": "r = Reshape(X, rows) g = Gemm<transB = 1>(r, T, bias) a = Relu(g) Y = Reshape(a, back)",
}
TENSORS = {
    "W": RNG.standard_normal((K, N)).astype(np.float32),
    "bias": RNG.standard_normal(N).astype(np.float32),
    "rows": np.array([10, K], np.int64),
    "back": np.array([2, 5, N], np.int64),
}
TENSORS["T"] = np.ascontiguousarray(TENSORS["W"].T)
LOWERINGS = (LowerInt8MatMul, LowerSparseInt8MatMul)
every_lowering = pytest.mark.parametrize("lowering", LOWERINGS)


@pytest.fixture
def model(from_text):
    def model(body="Int8MatMul", zeros=0.0, structure="unstructured", **options):
        text = BODIES[body]
        found = from_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[2, 5, {K}] X) => (float[2, 5, {N}] Y) {{ {text} }}""",
            **{name: array for name, array in TENSORS.items() if f"{name})" in text or f"{name}," in text},
        )
        if zeros:
            Magnitude(sparsity=zeros, mask_structure=structure)(found)
        if options:
            QuantizeWeights(**{"method": "rtn", "group_size": 0, **options})(found)
        return found

    return model


def outputs(model, tmp_path, *, library=False):
    path = model_io.save_model(model, tmp_path, name="model")
    return open_session(path, threads=1, library=library).run(None, {"X": X})[0]


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@every_lowering
@pytest.mark.parametrize("storage", ["unpack", "dequantize"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("body", BODIES)
def test_the_weight_is_the_same_and_tokens_are_rounded(model, tmp_path, body, bits, storage, lowering):
    lowered = model(body, 0.6, "block:1x4", bits=bits, storage=storage)
    (weight,) = find_weights(lowered, encoded=True)[0]
    floats, matrix = model(body), np.array(weight.matrix())
    for name, array in (("W", matrix), ("T", matrix.T)):
        if (value := floats.graph.initializers.get(name)) is not None:
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    expected = outputs(floats, tmp_path)
    assert lowering()(lowered).modified
    word = "" if lowering is LowerInt8MatMul else "Sparse"
    kept = [node.op_type for node in lowered.graph if node.op_type not in ("Reshape", "Constant")]
    assert kept == [word + body]
    assert [(domain, name) for domain, name, _ in lowered.functions] == [("sparse_onnx", word + body)]
    twin = exact_twin(lowered)
    assert distance(outputs(twin, tmp_path), expected) < 1e-6
    with_library, without = (outputs(lowered, tmp_path, library=library) for library in (True, False))
    assert distance(with_library, without) < 1e-6
    assert 1e-4 < distance(with_library, expected) < 0.03


def test_both_forms_compute_the_same(model, tmp_path):
    found = []
    for lowering in LOWERINGS:
        lowered = model("Int8MatMulGelu", 0.5, bits=8)
        lowering()(lowered)
        found.append(outputs(lowered, tmp_path, library=True))
    np.testing.assert_array_equal(*found)


def test_it_loses_what_rounding_by_token_loses(model, tmp_path):
    """``quant.dynamic`` does the same with operators of ONNX Runtime; one scale for all tokens loses more."""
    expected = outputs(model(), tmp_path)
    losses = []
    for lowering in (LowerInt8MatMul, LowerDynamicInt8):
        weights = model(bits=8)
        lowering()(weights)
        losses.append(distance(outputs(weights, tmp_path, library=True), expected))
    other = model()
    Dynamic(weight_bits=8)(other)
    assert losses[0] == pytest.approx(distance(outputs(other, tmp_path), expected), rel=0.1)
    assert losses[0] < 0.8 * losses[1]


@every_lowering
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4}, "has 4 bits, not 8"),
        ({"bits": 8, "group_size": 32}, "more than one scale"),
        ({"bits": 8, "symmetric": False}, "zero points"),
    ],
)
def test_what_it_cannot_hold_is_left(model, lowering, options, reason):
    before = model(**options)
    text = ir.to_proto(before).SerializeToString()
    result = lowering()(before)
    assert not result.modified
    assert reason in result.declined[0].reason
    assert ir.to_proto(before).SerializeToString() == text


def test_too_many_inputs_are_left(from_text):
    wide = from_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, {MAX_INPUTS + 1}] X) => (float[1, 1] Y) {{ D = DequantizeLinear(q, s) Y = MatMul(X, D) }}""",
        q=np.ones((MAX_INPUTS + 1, 1), np.int8),
        s=np.float32(1),
    )
    result = LowerInt8MatMul()(wide)
    assert not result.modified
    assert "sums are exact up to" in result.declined[0].reason


@every_lowering
def test_floats_are_no_candidates(model, lowering):
    assert lowering.find_candidates(model()) == ([], [])


def test_the_second_time_there_is_nothing_left(model):
    lowered = model(bits=8)
    LowerInt8MatMul()(lowered)
    assert find_candidates(lowered)[0] == []
    assert not LowerInt8MatMul()(lowered).modified


@pytest.mark.parametrize(
    ("zeros", "structure", "refused"),
    [
        (0.2, "unstructured", "too few"),
        (0.5, "unstructured", "larger"),
        (0.75, "unstructured", ""),
        (0.5, "block:1x4", ""),
        (0.5, "2:4", "larger"),
    ],
)
def test_zeros_are_skipped_only_where_that_is_no_larger(model, zeros, structure, refused):
    (candidate,) = find_candidates(model(zeros=zeros, structure=structure, bits=8))[0]
    forms = {form.name: form for form in candidate.forms}
    assert {"int8-token", "int8-quads"} <= {*forms}
    assert not candidate.refusal(forms["int8-token"])
    reason = candidate.refusal(forms["int8-quads"])
    assert refused in reason
    assert bool(reason) == bool(refused)
    assert not {"int8-token", "int8-quads"} & {form.name for form in candidate.allowed_forms()}


@pytest.mark.parametrize(("zeros", "structure"), [(0.5, "block:1x4"), (0.9, "unstructured")])
def test_the_size_is_known_without_packing(model, zeros, structure):
    before = model(zeros=zeros, structure=structure, bits=8)
    (candidate,) = LowerSparseInt8MatMul.find_candidates(before)[0]
    (form,) = candidate.forms
    expected = form.expected_nbytes((K, N), candidate.sparsity, structure, candidate.parts[0].outputs)
    LowerSparseInt8MatMul()(before)
    (node,) = before.graph
    stored = sum(value.const_value.nbytes for value in node.inputs[1:-1])
    assert stored == pytest.approx(expected, rel=0.1)


@every_lowering
def test_its_work_is_counted(model, lowering):
    before = model("Int8MatMulGelu", bits=8)
    (weight,) = find_weights(before, encoded=True)[0]
    lowering()(before)
    (found,) = Work(before).count()
    assert found.products == 10 * K * N
    assert found.weight == f"{weight.name}.values"
    assert found.reason == "is a product of integers already"
