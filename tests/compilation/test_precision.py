"""``--precision`` and ``--bits``: which modifier they add, what ships, and what rounded activations do, told apart."""

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.compilation import write
from sparse_onnx.compilation.recipe import Recipe
from sparse_onnx.compilation.recipe_flags import override
from sparse_onnx.compilation.recipe_reader import parse_recipe
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.quantize import layers
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.report.schema import check_report
from sparse_onnx.timing import forms
from sparse_onnx.timing.rounds import Ratio

K = 64


def only(recipe):
    (modifier,) = recipe.modifiers()
    return modifier


@pytest.mark.parametrize(
    ("flags", "method", "bits", "group_size"),
    [
        ({"bits": 4}, "hqq", 4, 64),
        ({"bits": 8}, "hqq", 8, 0),
        ({"bits": 3, "group_size": 32}, "hqq", 3, 32),
        ({"precision": "int4"}, "hqq", 4, 64),
        ({"precision": "int4", "bits": 8}, "hqq", 8, 0),
        ({"precision": "int4", "group_size": 128}, "hqq", 4, 128),
        ({"bits": 4, "calibration_data": "samples.npz"}, "auto", 4, 64),
    ],
)
def test_what_is_asked_for_becomes_a_modifier(flags, method, bits, group_size):
    found = only(override(Recipe(), **flags))
    assert isinstance(found, QuantizeWeights)
    assert (found.method, found.bits, found.group_size) == (method, bits, group_size)


@pytest.mark.parametrize(("features", "bits"), [({"avx512_vnni"}, 8), ({"avx2"}, 7)])
def test_int8_has_the_bits_whose_products_are_exact_here(monkeypatch, features, bits):
    monkeypatch.setattr(layers, "cpu_features", lambda: features)
    assert only(override(Recipe(), precision="int8")).bits == bits


def test_zeros_come_before_bits():
    found = override(Recipe(), method="magnitude", sparsity=0.5, bits=4)
    assert [modifier.name for modifier in found.modifiers()] == ["prune.magnitude", "quant.weight"]


def test_a_recipe_that_quantizes_is_left_so_but_for_its_options():
    text = "version: 1\nstages: [{name: q, modifiers: [quant.weight: {method: rtn, bits: 3, group_size: 0}]}]"
    found = only(override(parse_recipe(text), precision="int4"))
    assert (found.method, found.bits) == ("rtn", 3)
    found = only(override(parse_recipe(text), bits=2))
    assert (found.method, found.bits) == ("rtn", 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"precision": "int2"}, "precision must be float32, int8, int4, auto, not 'int2'"),
        ({"bits": 1}, "bits must be"),
        ({"bits": 9}, "bits must be"),
        ({"bits": 4, "group_size": 8}, "group_size must be"),
        ({"group_size": 64}, "nothing is quantized: give --bits or --precision"),
    ],
)
def test_what_cannot_be_is_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        override(Recipe(), **flags)


@pytest.fixture
def source(tmp_path):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {K}] X) => (float[batch, {K}] Y) {{ h = MatMul(X, A) r = Relu(h) Y = MatMul(r, B) }}"""
    )
    rng = np.random.default_rng(0)
    for name in "AB":
        weight = rng.standard_normal((K, K)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


@pytest.fixture
def integers_win(monkeypatch):
    """Of what is timed together, the last is ten times as fast as the first."""

    def together(models, _libraries, _feeds, *, rounds, **_options):
        return [[10.0 - 9.0 * (index == len(models) - 1)] * rounds for index in range(len(models))]

    monkeypatch.setattr(forms, "time_together", together)
    monkeypatch.setattr(forms.OtherLoad, "spared", lambda *_arguments: True)
    monkeypatch.setattr(write, "time_whole", lambda *_arguments: [Ratio(4.0, 1.0, 4.0, 3.9, 4.1)])


@pytest.mark.parametrize(("precision", "form"), [("int8", "int8-dynamic"), ("int4", "int4-nbits")])
def test_operators_on_integers_ship_where_they_are_allowed_and_fastest(
    source, tmp_path, integers_win, precision, form
):
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        precision=precision,
        input_shapes={"X": (8, K)},
        threads=1,
        timing_cache=False,
    )
    check_report(result.report)
    assert {row["decision"] for row in result.report["layers"]} == {form}
    checks = result.report["verification"]
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5, "of the compiler alone"
    assert checks["without_library"]["relative_error"] < 1e-5
    assert 1e-4 < checks["rounded_activations"]["relative_error"] < 0.03
    assert checks["against_original"]["relative_error"] > 1e-3
    assert result.report["summary"]["sparse_flops_fraction"] == 0
    assert [row["rounded"] for row in result.report["quantized"]] == [True, True]
    X = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    before, after = (
        sparse_onnx.InferenceSession(path).run(None, {"X": X})[0]
        for path in (source, result.folder / "model.onnx")
    )
    assert np.linalg.norm(after - before) < 0.3 * np.linalg.norm(before)


@pytest.mark.parametrize(("precision", "form"), [("int8", "int8-bitmap"), ("int4", "int4-bitmap")])
def test_integers_without_their_zeros_ship_where_they_are_fastest(
    source, tmp_path, integers_win, precision, form
):
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        precision=precision,
        method="magnitude",
        sparsity=0.5,
        keep_pruned=True,
        input_shapes={"X": (8, K)},
        threads=1,
        timing_cache=False,
    )
    check_report(result.report)
    assert {row["decision"] for row in result.report["layers"]} == {form}
    checks = result.report["verification"]
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5, "of the compiler alone"
    assert checks["without_library"]["relative_error"] < 1e-5
    assert 1e-4 < checks["rounded_activations"]["relative_error"] < 0.03
    assert result.report["summary"]["sparse_flops_fraction"] == 1


@pytest.mark.parametrize(
    ("precision", "structure", "word"),
    [
        ("int4", "unstructured", "Int4WithZeros"),
        ("int4", "4:16", "Int4Of16"),
        ("int8", "unstructured", "Int8"),
    ],
)
def test_linears_of_integers_that_share_their_input_ship_as_one(
    precision, structure, word, tmp_path, integers_win
):
    """The exact twin of merged operators, too, is what the compiler is held to."""
    body = """q = MatMul(X, Wq) k = MatMul(X, Wk) v = MatMul(X, Wv) qk = Mul(q, k) m = Mul(qk, v)
        g = MatMul(m, Wg) s = Sigmoid(g) a = Mul(g, s) u = MatMul(m, Wu) Y = Mul(a, u)"""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 128] X) => (float[n, 192] Y) {{ {body} }}"""
    )
    rng = np.random.default_rng(0)
    for name, n in {"Wq": 128, "Wk": 128, "Wv": 128, "Wg": 192, "Wu": 192}.items():
        array = rng.standard_normal((128, n)).astype(np.float32) / 8
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "model.onnx")
    result = sparse_onnx.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        precision=precision,
        method="magnitude",
        mask_structure=structure,
        **({"sparsity": 0.5} if structure == "unstructured" else {}),
        keep_pruned=True,
        input_shapes={"X": (1, 128)},
        threads=1,
        timing_cache=False,
    )
    check_report(result.report)
    made = [
        node.op_type for node in onnx.load(result.folder / "model.onnx", load_external_data=False).graph.node
    ]
    assert [op for op in made if op != "Mul"] == [f"SparseMatMul{word}Split3", f"SparseMatMul{word}SiluGate"]
    checks = result.report["verification"]
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5
    assert checks["without_library"]["relative_error"] < 1e-5
    assert 1e-4 < checks["rounded_activations"]["relative_error"] < 0.1
    assert {row["name"] for row in result.report["layers"]} == {"Wq", "Wk", "Wv", "Wg", "Wu"}


@pytest.mark.parametrize("options", [{"bits": 8}, {"precision": "float32", "bits": 4}])
def test_bits_alone_round_no_activation(source, tmp_path, integers_win, options):
    result = sparse_onnx.optimize(
        source, tmp_path / "out", **options, input_shapes={"X": (8, K)}, threads=1, timing_cache=False
    )
    assert {row["decision"] for row in result.report["layers"]} == {"dense"}
    assert "rounded_activations" not in result.report["verification"]
    assert result.report["summary"]["bytes_after"] < result.report["summary"]["bytes_before"]


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}])
def test_a_search_takes_no_bits(source, tmp_path, options):
    with pytest.raises(UsageError, match="a search chooses bits itself: give --precision int8, int4 or auto"):
        sparse_onnx.optimize(
            source, tmp_path / "out", method="magnitude", target_speedup=2.0, bits=4, **options
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "precision auto needs a goal to choose by: give --target-speedup, --target-size or --max-drop"),
        ({"method": "magnitude"}, "precision auto needs a goal"),
        ({"method": "magnitude", "sparsity": 0.5, "max_drop": 0.1}, "auto chooses zeros and bits itself"),
        ({"mask_structure": "2:4", "max_drop": 0.1}, "auto chooses zeros and bits itself"),
        (
            {"mask_structure": "1:4,2:4", "max_drop": 0.1},
            "mask_structure is for zeros, and no method makes any",
        ),
        ({"bits": 4, "max_drop": 0.1}, "auto chooses zeros and bits itself"),
        ({"dry_run": True, "max_drop": 0.1}, "a search measures"),
        ({"benchmark": False, "max_drop": 0.1}, "a search measures"),
    ],
)
def test_what_auto_cannot_do(source, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        sparse_onnx.optimize(source, tmp_path / "out", precision="auto", **options)
    assert not (tmp_path / "out").exists()


def test_without_timing_one_precision_is_for_all_layers(source, tmp_path):
    """As ever: what cannot be measured is not searched for."""
    result = sparse_onnx.optimize(
        source, tmp_path / "out", precision="int8", max_drop=0.5, benchmark=False, input_shapes={"X": (8, K)}
    )
    assert "search" not in result.report
    assert [row["bits"] for row in result.report["quantized"]] == [8, 8]


def test_layers_whose_inputs_stay_floats(source, tmp_path, integers_win):
    text = "version: 1\nstages: []\ntarget: {precision: int8, float_inputs: [A]}"
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        recipe=parse_recipe(text),
        input_shapes={"X": (8, K)},
        threads=1,
        timing_cache=False,
    )
    forms = {row["name"]: row["decision"] for row in result.report["layers"]}
    assert forms == {"A": "int8-nbits", "B": "int8-dynamic"}
    wrong = parse_recipe(text.replace("[A]", "[C]"))
    with pytest.raises(UsageError, match=r"target\.float_inputs: 'C' matches no weight"):
        sparse_onnx.optimize(source, tmp_path / "other", recipe=wrong, input_shapes={"X": (8, K)}, threads=1)
