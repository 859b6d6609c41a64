"""Sparse weights of few bits in operators of ours: the same weights, activations rounded; what is left, and why."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.document import SPARSE_FORMS
from sparse_onnx.model import model_io
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import find_weights
from sparse_onnx.model.work import Work
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.lower.sparse_integers import LowerPositions, LowerSparseIntegers
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.running.runtime import open_session

RNG = np.random.default_rng(4)
K, N = 192, 40
X = RNG.standard_normal((2, 3, K)).astype(np.float32)
W = RNG.standard_normal((K, N)).astype(np.float32)
BIAS = RNG.standard_normal(N).astype(np.float32)
TEXT = "h = MatMul(X, W) b = Add(h, bias) Y = Relu(b)"


@pytest.fixture
def model(from_text):
    def model(structure="unstructured", share=0.5, opset=21, **options):
        found = from_text(
            f"""<ir_version: 10, opset_import: ["" : {opset}]>
            g (float[2, 3, {K}] X) => (float[2, 3, {N}] Y) {{ {TEXT} }}""",
            W=W,
            bias=BIAS,
        )
        if structure != "dense":
            given = {"sparsity": share} if structure == "unstructured" else {}
            Magnitude(mask_structure=structure, **given)(found)
        QuantizeWeights(**{"method": "rtn", "bits": 4, "group_size": 64, **options})(found)
        return found

    return model


def outputs(model, folder, *, library, x=X):
    path = model_io.save_model(model, folder, name="model")
    return open_session(path, threads=1, library=library).run(None, {"X": x})[0]


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def op_types(model):
    return [node.op_type for node in model.graph]


CASES = [
    (LowerSparseIntegers, {}, "SparseMatMulInt4"),
    (LowerSparseIntegers, {"share": 0.8, "group_size": 16}, "SparseMatMulInt4"),
    (LowerSparseIntegers, {"group_size": 48}, "SparseMatMulInt4"),
    (LowerSparseIntegers, {"symmetric": False}, "SparseMatMulInt4WithZeros"),
    (LowerSparseIntegers, {"symmetric": False, "group_size": 0}, "SparseMatMulInt4WithZeros"),
    (LowerSparseIntegers, {"group_size": 0}, "SparseMatMulInt4"),
    (LowerSparseIntegers, {"structure": "2:4", "group_size": 128}, "SparseMatMulInt4"),
    (LowerSparseIntegers, {"bits": 8, "group_size": 0}, "SparseMatMulInt8"),
    (LowerSparseIntegers, {"bits": 8, "group_size": 32}, "SparseMatMulInt8"),
    (LowerPositions, {"structure": "4:16"}, "SparseMatMulInt4Of16"),
    (LowerPositions, {"structure": "6:16", "group_size": 128}, "SparseMatMulInt4Of16"),
    (LowerPositions, {"structure": "5:16", "group_size": 0}, "SparseMatMulInt4Of16"),
    (LowerPositions, {"structure": "2:4"}, "SparseMatMulInt4Of16"),
    (LowerPositions, {"structure": "1:8"}, "SparseMatMulInt4Of16"),
    (LowerPositions, {"structure": "4:16", "symmetric": False}, "SparseMatMulInt4Of16WithZeros"),
    (
        LowerPositions,
        {"structure": "2:4", "symmetric": False, "group_size": 0},
        "SparseMatMulInt4Of16WithZeros",
    ),
]


@pytest.mark.parametrize(("lowering", "options", "op_type"), CASES, ids=str)
def test_the_weight_keeps_its_numbers_and_activations_are_rounded(
    lowering, options, op_type, model, tmp_path
):
    before = model(**options)
    expected = outputs(before, tmp_path / "before", library=False)
    lowered = before.clone()
    assert lowering()(lowered).modified
    op_type += "Relu"
    assert op_types(lowered) == [op_type]
    assert [(domain, name) for domain, name, _ in lowered.functions] == [("sparse_onnx", op_type)]
    with_library = outputs(lowered, tmp_path / "with", library=True)
    without = outputs(lowered, tmp_path / "without", library=False)
    assert distance(with_library, without) < 2e-6
    assert 0 < distance(with_library, expected) < 0.02
    assert Work(lowered).count()[0].products == 6 * K * N
    twin = exact_twin(lowered)
    assert distance(outputs(twin, tmp_path / "twin", library=True), expected) < 2e-6
    assert op_type in op_types(lowered), "the twin is a copy"


@pytest.mark.parametrize("opset", [13, 17, 18, 22])
def test_bodies_are_of_the_operator_set_of_the_model(opset, model, tmp_path):
    lowered = model(opset=opset)
    LowerSparseIntegers()(lowered)
    found = (outputs(lowered, tmp_path / str(library), library=library) for library in (True, False))
    assert distance(*found) < 2e-6


@pytest.mark.parametrize(
    ("lowering", "options", "reason"),
    [
        (LowerSparseIntegers, {"bits": 3}, "has 3 bits"),
        (LowerSparseIntegers, {"bits": 8, "symmetric": False}, "has zero points"),
        (LowerSparseIntegers, {"group_size": 17}, "groups of 17"),
        (LowerSparseIntegers, {"group_size": 24}, "groups of 24"),
        (LowerSparseIntegers, {"scale_type": "float32"}, "scales that are no float16"),
        (LowerPositions, {"structure": "4:16", "bits": 8}, "has 8 bits"),
        (LowerPositions, {"structure": "4:16", "group_size": 32}, "groups of 32"),
        (LowerPositions, {"structure": "4:16", "scale_type": "float32"}, "scales that are no float16"),
        (LowerPositions, {"structure": "9:16"}, "no 8 or fewer of 16"),
        (LowerPositions, {"structure": "3:4"}, "no 8 or fewer of 16"),
        (LowerPositions, {"structure": "2:6"}, "no 8 or fewer of 16"),
        (LowerPositions, {}, "no 8 or fewer of 16"),
    ],
)
def test_what_the_layout_cannot_hold_is_left(lowering, options, reason, model):
    before = model(**options)
    text = ir.to_proto(before).SerializeToString()
    result = lowering()(before)
    assert not result.modified
    assert reason in result.declined[0].reason
    assert ir.to_proto(before).SerializeToString() == text


def test_a_pattern_that_the_zeros_do_not_obey_is_not_believed(model):
    """A file may say anything of its weights."""
    found = model("dense")
    (weight,) = find_weights(found, encoded=True)[0]
    weight.value.metadata_props[STRUCTURE_KEY] = "4:16"
    result = LowerPositions()(found)
    assert not result.modified
    assert "although its pattern says 4" in result.declined[0].reason


def test_floats_are_no_candidates(from_text):
    text = f"g (float[2, {K}] X) => (float[2, {N}] Y) {{ Y = MatMul(X, W) }}"
    plain = from_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}', W=W)
    for lowering in (LowerSparseIntegers, LowerPositions):
        assert lowering.find_candidates(plain) == ([], [])


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ({}, {"sparse", "int4-nbits", "int4-bitmap"}),
        ({"structure": "4:16"}, {"sparse", "int4-nbits", "int4-bitmap", "int4-of-16"}),
        (
            {"bits": 8, "group_size": 0},
            {"sparse", "int8-nbits", "int8-dynamic", "int8-token", "int8-quads", "int8-bitmap"},
        ),
    ],
)
def test_all_forms_of_a_weight_are_candidates_together(options, forms, model):
    ((candidate,), _) = find_candidates(model(**options))
    assert {form.name for form in candidate.forms} == forms
    assert [form.name for form in candidate.allowed_forms()] == ["sparse"], "the others round activations"
    assert {form.name for form in candidate.forms if form.least_zeros} == forms & {*SPARSE_FORMS}


@pytest.mark.parametrize(("share", "refused"), [(0.1, True), (0.2, True), (0.3, False), (0.9, False)])
def test_few_zeros_are_not_worth_timing(share, refused, model):
    ((candidate,), _) = find_candidates(model(share=share))
    (form,) = (form for form in candidate.forms if form.name == "int4-bitmap")
    assert bool(candidate.refusal(form)) == refused


@pytest.mark.parametrize(
    ("lowering", "options"),
    [
        (LowerSparseIntegers, {"share": 0.7}),
        (LowerSparseIntegers, {"bits": 8, "share": 0.7}),
        (LowerPositions, {"structure": "4:16"}),
    ],
)
def test_the_expected_bytes_are_those_that_are_stored(lowering, options, model):
    ((candidate,), _) = lowering.find_candidates(model(**options))
    (form,) = candidate.forms
    structure = options.get("structure", "unstructured")
    expected = form.expected_nbytes((K, N), candidate.sparsity, structure, candidate.parts[0].outputs)
    lowered = model(**options)
    lowering()(lowered)
    names = ("masks", "values")
    stored = sum(
        value.const_value.nbytes
        for name, value in lowered.graph.initializers.items()
        if name.rpartition(".")[2] in names
    )
    assert expected <= stored <= 1.25 * expected, "outputs are filled up to 16"


def test_it_is_smaller_than_all_integers(model):
    sizes = {}
    for lowering in (LowerMatMulNBits, LowerSparseIntegers, LowerPositions):
        lowered = model("4:16")
        lowering()(lowered)
        sizes[lowering] = sum(value.const_value.nbytes for value in lowered.graph.initializers.values())
    assert sizes[LowerPositions] < 0.75 * sizes[LowerMatMulNBits]
    assert sizes[LowerSparseIntegers] < 0.75 * sizes[LowerMatMulNBits]


def test_operators_that_the_model_has_already_are_left(model):
    lowered = model()
    LowerSparseIntegers()(lowered)
    before = ir.to_proto(lowered).SerializeToString()
    for lowering in (LowerSparseIntegers, LowerPositions):
        assert not lowering()(lowered).modified
    assert find_candidates(lowered)[0] == []
    assert ir.to_proto(lowered).SerializeToString() == before


@pytest.mark.parametrize("lowering", [LowerSparseIntegers, LowerPositions])
@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("Y = Gemm(X, W, bias)", ""),
        ("h = MatMul(X, W) Y = Add(bias, h)", ""),
        ("h = MatMul(X, W) Y = Relu(h)", "Relu"),
        ("h = Gemm(X, W, bias) Y = Gelu(h)", "Gelu"),
        ('h = Gemm(X, W, bias) Y = Gelu<approximate = "tanh">(h)', "GeluTanh"),
        ("h = MatMul(X, W) b = Add(h, bias) s = Sigmoid(b) Y = Mul(b, s)", "Silu"),
    ],
)
def test_bias_and_activation_are_computed_along(lowering, text, step, from_text, tmp_path):
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[6, {K}] X) => (float[6, {N}] Y) {{ {text} }}""",
        W=W,
        bias=BIAS,
    )
    Magnitude(mask_structure="4:16")(model)
    QuantizeWeights(method="rtn", bits=4, group_size=64)(model)
    expected = outputs(model, tmp_path / "before", library=False, x=X.reshape(6, K))
    assert lowering()(model).modified
    (found,) = op_types(model)
    assert found in (f"SparseMatMulInt4{step}", f"SparseMatMulInt4Of16{step}")
    assert len(model.functions) == 1
    for library in (True, False):
        found = outputs(model, tmp_path / str(library), library=library, x=X.reshape(6, K))
        assert 0 < distance(found, expected) < 0.03
    twin = outputs(exact_twin(model), tmp_path / "twin", library=True, x=X.reshape(6, K))
    assert distance(twin, expected) < 2e-6


@pytest.mark.parametrize(
    "text", ["h = MatMul(X, W) Y = Tanh(h)", "h = MatMul(X, W) b = Add(h, R) Y = Relu(b)"]
)
def test_what_the_operator_cannot_compute_stays_behind_it(text, from_text):
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[6, {K}] X, float[6, {N}] R) => (float[6, {N}] Y) {{ {text} }}""",
        W=W,
    )
    QuantizeWeights(method="rtn", bits=4, group_size=64)(model)
    assert LowerSparseIntegers()(model).modified
    assert op_types(model)[0] == "SparseMatMulInt4"
    assert len(op_types(model)) > 1


def test_layers_without_a_bias_share_zeros(from_text):
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[6, {K}] X) => (float[6, {N}] Y, float[6, {N}] Z, float[6, {N}] U, float[{N}] n)
        {{ h = MatMul(X, W) Y = Add(h, bias) Z = MatMul(X, V) n = Neg(bias) U = MatMul(X, T) }}""",
        W=W,
        V=W[::-1].copy(),
        T=2 * W,
        bias=BIAS,
    )
    QuantizeWeights(method="rtn", bits=4, group_size=64)(model)
    LowerSparseIntegers()(model)
    assert sorted(op_types(model)) == ["Neg", *["SparseMatMulInt4"] * 3]
    biases = {node.inputs[-1].name for node in model.graph if node.op_type != "Neg"}
    assert biases == {"bias", f"sparse_onnx.zeros.{N}"}
