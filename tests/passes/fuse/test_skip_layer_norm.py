"""Fusing residual additions with normalizations: every form, the same answers, and what must not fire."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx.passes.fuse.skip_layer_norm import FuseSkipLayerNorm

C = 6
DOMAIN = "sparse_onnx"
FEEDS = {
    "X": np.random.default_rng(1).standard_normal((2, 3, C)).astype(np.float32),
    "R": np.random.default_rng(2).standard_normal((2, 3, C)).astype(np.float32),
    "P": np.random.default_rng(3).standard_normal((1, 3, C)).astype(np.float32),
    "T": np.random.default_rng(4).standard_normal((2, 1, C)).astype(np.float32),
}
VECTORS = {
    "gamma": np.linspace(0.5, 2, C, dtype=np.float32),
    "beta": np.linspace(-1, 1, C, dtype=np.float32),
    "bias": np.linspace(2, 1, C, dtype=np.float32),
    "wide": np.ones((1, C), np.float32),
    "one": np.ones(1, np.float32),
    "table": np.random.default_rng(5).standard_normal((3, C)).astype(np.float32),
    "last": np.array([-1], np.int64),
    "middle": np.array([1], np.int64),
}
SCALARS = """two = Constant<value = float {2.0}>() unit = Constant<value = float {1.0}>()
    small = Constant<value = float {1e-5}>()"""


def build(body, *, opset=17, inputs=f"float[B, S, {C}] X, float[B, S, {C}] R", outputs=f"float[B, S, {C}] Y"):
    imports = f'"" : {opset}, "com.microsoft" : 1'
    proto = onnx.parser.parse_model(
        f"<ir_version: {9 if opset < 21 else 10}, opset_import: [{imports}]> g ({inputs}) => ({outputs}) {{ {body} }}"
    )
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    taken = {value.name for value in proto.graph.input}
    for name in sorted(VECTORS.keys() & words - taken):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(VECTORS[name], name))
    return ir.from_proto(proto)


def feeds_of(model):
    return {value.name: FEEDS[value.name] for value in model.graph.inputs if value.name in FEEDS}


def run_unchecked(model, feeds):
    """For operators that ONNX Runtime knows and the ONNX checker does not."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def op_types(model):
    return sorted(node.op_type for node in model.graph if node.op_type != "Constant")


def assert_fused(model, run, *expected, rtol=1e-5):
    feeds = feeds_of(model)
    before = run(model, feeds)
    result = FuseSkipLayerNorm()(model)
    assert result.modified
    assert op_types(model) == sorted(expected)
    assert result.statistics == {
        "normalizations": sum(node.domain == DOMAIN for graph in model.graphs() for node in graph)
    }
    for node in model.graph:
        if node.domain == DOMAIN:
            assert node.op_identifier() in model.functions
    after = run(model, feeds)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=rtol, atol=1e-5)
    assert not FuseSkipLayerNorm()(model).modified


def reason_of(model):
    result = FuseSkipLayerNorm()(model)
    assert not result.modified
    assert result.statistics == {"normalizations": 0}
    (declined,) = result.declined
    return declined.reason


def mean(opset, what):
    return f"ReduceMean<axes = [-1]>({what})" if opset < 18 else f"ReduceMean({what}, last)"


def layer_steps(
    opset=17, square="Pow(d, two)", divide="n = Div(d, r)", end="g = Mul(n, gamma) Y = Add(g, beta)"
):
    return f"""{SCALARS} s = Add(X, R) m = {mean(opset, "s")} d = Sub(s, m) q = {square} v = {mean(opset, "q")}
        a = Add(v, small) r = Sqrt(a) {divide} {end}"""


def rms_steps(opset=17, square="Pow(s, two)", divide="n = Div(s, r)", end="Y = Mul(n, gamma)"):
    return f"""{SCALARS} s = Add(X, R) q = {square} v = {mean(opset, "q")}
        a = Add(v, small) r = Sqrt(a) {divide} {end}"""


LAYER, RMS = "SkipLayerNormalization", "SkipRMSNormalization"
NORM = "s = Add(X, R) Y = LayerNormalization(s, gamma, beta)"
FORMS = {
    "operator": (NORM, 17, LAYER),
    "operator, opset 13 (unchecked)": (NORM, 13, LAYER),
    "operator, opset 21": (NORM, 21, LAYER),
    "operator without beta": ("s = Add(X, R) Y = LayerNormalization<epsilon = 0.1>(s, gamma)", 17, LAYER),
    "operator, axis counted from the first": (
        "s = Add(X, R) Y = LayerNormalization<axis = 2>(s, gamma, beta)",
        17,
        LAYER,
    ),
    "RMS operator": ("s = Add(X, R) Y = RMSNormalization<epsilon = 0.1>(s, gamma)", 23, RMS),
    "simplified operator (unchecked)": ("s = Add(X, R) Y = SimplifiedLayerNormalization(s, gamma)", 17, RMS),
    "steps": (layer_steps(), 17, LAYER),
    "steps, opset 13": (layer_steps(), 13, LAYER),
    "steps, opset 18": (layer_steps(18), 18, LAYER),
    "steps, product": (layer_steps(square="Mul(d, d)"), 17, LAYER),
    "steps, reciprocal": (layer_steps(divide="i = Reciprocal(r) n = Mul(i, d)"), 17, LAYER),
    "steps, one over": (layer_steps(divide="i = Div(unit, r) n = Mul(d, i)"), 17, LAYER),
    "steps, other order": (layer_steps(end="g = Mul(gamma, n) Y = Add(beta, g)"), 17, LAYER),
    "steps without beta": (layer_steps(end="Y = Mul(n, gamma)"), 17, LAYER),
    "RMS steps": (rms_steps(), 17, RMS),
    "RMS steps, opset 13": (rms_steps(), 13, RMS),
    "RMS steps, opset 18": (rms_steps(18), 18, RMS),
    "RMS steps, reciprocal": (rms_steps(divide="i = Reciprocal(r) n = Mul(s, i)"), 17, RMS),
    "RMS steps, one over": (
        rms_steps(divide="i = Div(unit, r) n = Mul(i, s)", end="Y = Mul(gamma, n)"),
        17,
        RMS,
    ),
    "RMS steps, product": (rms_steps(square="Mul(s, s)"), 17, RMS),
    "contrib": ("Y = com.microsoft.SkipLayerNormalization(X, R, gamma, beta)", 17, LAYER),
    "contrib without beta": (
        "Y = com.microsoft.SkipLayerNormalization<epsilon = 0.1>(X, R, gamma)",
        17,
        LAYER,
    ),
    "contrib RMS": (
        "Y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.1>(X, R, gamma)",
        17,
        RMS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fused(form, run):
    body, opset, op_type = FORMS[form]
    assert_fused(build(body, opset=opset), run_unchecked if "unchecked" in form else run, op_type)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("contrib")])
def test_a_sum_that_is_used_further_on_becomes_an_output(form, run):
    body, opset, op_type = FORMS[form]
    model = build(
        f"{body} Z = Neg(s)",
        opset=opset,
        outputs=f"float[B, S, {C}] Y, float[B, S, {C}] Z, float[B, S, {C}] s",
    )
    assert_fused(model, run_unchecked if "unchecked" in form else run, f"{op_type}Sum", "Neg")


def test_a_sum_that_is_only_a_graph_output(run):
    model = build(NORM, outputs=f"float[B, S, {C}] s, float[B, S, {C}] Y")
    assert_fused(model, run, "SkipLayerNormalizationSum")
    assert [value.name for value in model.graph.outputs] == ["s", "Y"]


def test_the_sum_may_be_read_before_the_normalization(run):
    model = build("s = Add(X, R) t = Neg(s) u = LayerNormalization(s, gamma, beta) Y = Add(t, u)")
    assert_fused(model, run, "SkipLayerNormalizationSum", "Neg", "Add")


def test_a_chain_of_residuals(run):
    model = build(
        """s = Add(X, R) u = LayerNormalization(s, gamma, beta) f = Neg(u) t = Add(f, s)
           w = LayerNormalization(t, gamma, beta) h = Neg(w) x = Add(t, h) Y = LayerNormalization(x, gamma, beta)"""
    )
    assert_fused(
        model,
        run,
        "SkipLayerNormalizationSum",
        "Neg",
        "SkipLayerNormalizationSum",
        "Neg",
        "SkipLayerNormalization",
    )


def test_two_normalizations_of_one_sum(run):
    model = build(
        "s = Add(X, R) u = LayerNormalization(s, gamma, beta) w = LayerNormalization(s, bias, beta) Y = Mul(u, w)"
    )
    assert_fused(model, run, "SkipLayerNormalizationSum", "LayerNormalization", "Mul")


def test_the_contrib_sum_and_bias(run):
    model = build(
        "Y, m, i, s = com.microsoft.SkipLayerNormalization(X, R, gamma, beta, bias) Z = Neg(s)",
        outputs=f"float[B, S, {C}] Y, float[B, S, {C}] Z",
    )
    assert_fused(model, run, "Add", "SkipLayerNormalizationSum", "Neg")
    add = next(node for node in model.graph if node.op_type == "Add")
    assert [value.name for value in add.inputs] == ["X", "bias"]
    assert model.graph[1].inputs[1] is add.outputs[0]


def test_the_contrib_rms_sum_and_bias(run):
    body = "Y, m, i, s = com.microsoft.SkipSimplifiedLayerNormalization(X, R, gamma, bias) Z = Neg(s)"
    model = build(body, outputs=f"float[B, S, {C}] Y, float[B, S, {C}] Z")
    assert_fused(model, run, "Add", "SkipRMSNormalizationSum", "Neg")


@pytest.mark.parametrize(
    "inputs",
    [
        f"float[2, 3, {C}] X, float[2, 3, {C}] R",
        f"float[B, S, {C}] X, float[D, E, {C}] R",
        f"float[B, S, {C}] X, float[2, 3, {C}] R",
        "float[B, S, N] X, float[B, S, N] R",
        "float[B, S, N] X, float[B, S, M] R",
    ],
)
def test_shapes_that_may_be_equal(inputs, run):
    assert_fused(build(NORM, inputs=inputs), run, LAYER)


@pytest.mark.parametrize("operands", ["X, P", "P, X"])
@pytest.mark.parametrize("first", ["1, 3", "1, S", "1, L", "B, 3", "D, L"])
def test_positions_repeat_along_the_batch(operands, first, run):
    inputs = f"float[B, S, {C}] X, float[{first}, {C}] P"
    model = build(f"s = Add({operands}) Y = LayerNormalization(s, gamma, beta)", inputs=inputs)
    assert_fused(model, run, LAYER)


def test_a_table_of_positions(run):
    model = build("s = Add(X, table) Y = LayerNormalization(s, gamma, beta)", inputs=f"float[B, S, {C}] X")
    assert_fused(model, run, LAYER)


def test_values_of_unknown_shape(run):
    model = build("a = Neg(X) b = Neg(R) s = Add(a, b) Y = LayerNormalization(s, gamma, beta)")
    assert model.graph[0].outputs[0].shape is None
    assert_fused(model, run, "Neg", "Neg", LAYER)


def test_inside_a_subgraph(run):
    model = build(
        f"""c = Constant<value = bool {{1}}>()
        Y = If(c) <then_branch = t () => (float[B, S, {C}] y1) {{ s = Add(X, R) y1 = LayerNormalization(s, gamma) }},
                  else_branch = e () => (float[B, S, {C}] y2) {{ y2 = Sub(X, R) }}>"""
    )
    assert_fused(model, run, "If")


def test_missing_betas_share_one_tensor(run):
    model = build(
        "s = Add(X, R) u = LayerNormalization(s, gamma) t = Add(u, X) Y = LayerNormalization(t, gamma)"
    )
    assert_fused(model, run, LAYER, LAYER)
    assert sorted(model.graph.initializers) == ["gamma", "sparse_onnx.zeros.6"]


def test_names_and_metadata_stay(run):
    model = build("s = Add(X, R) u = LayerNormalization(s, gamma, beta) Y = Neg(u)")
    old = model.graph[1]
    old.name = "encoder/norm"
    old.metadata_props["sparse_onnx.module"] = "encoder.norm"
    old.outputs[0].metadata_props["kept"] = "yes"
    FuseSkipLayerNorm()(model)
    node = model.graph[0]
    assert (node.op_type, node.name, node.outputs[0].name) == (LAYER, "encoder/norm", "u")
    assert node.metadata_props["sparse_onnx.module"] == "encoder.norm"
    assert node.outputs[0].metadata_props["kept"] == "yes"


SILENT = {
    "no addition": "Y = LayerNormalization(X, gamma, beta)",
    "no normalization": "Y = Add(X, R)",
    "a difference": "s = Sub(X, R) Y = LayerNormalization(s, gamma, beta)",
    "a bias": "s = Add(X, bias) Y = LayerNormalization(s, gamma, beta)",
    "a bias, the other way round": "s = Add(bias, X) Y = LayerNormalization(s, gamma, beta)",
    "the square root of an addition": f"{SCALARS} s = Add(X, R) a = Abs(s) b = Add(a, small) Y = Sqrt(b)",
    "a mean of cubes": f"{SCALARS} three = Constant<value = float {{3.0}}>() s = Add(X, R) q = Pow(s, three) "
    "v = ReduceMean<axes = [-1]>(q) a = Add(v, small) r = Sqrt(a) n = Div(s, r) Y = Mul(n, gamma)",
    "a mean over another axis": rms_steps().replace("axes = [-1]", "axes = [1]"),
    "a sum of squares": rms_steps().replace("ReduceMean<axes = [-1]>(q)", "ReduceSum(q, last)"),
    "a mean that drops its axis": "s = Add(X, R) t = Mul(s, s) v = ReduceMean<axes = [-1], keepdims = 0>(t) "
    "u = ReduceMean<axes = [-1]>(t) w = Add(u, gamma) r = Sqrt(w) Y = Div(s, r)",
    "something else divided": rms_steps(divide="n = Div(X, r)"),
    "an epsilon that is no constant": rms_steps().replace("Add(v, small)", "Add(v, X)"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_is_no_residual_normalization_is_left_alone(case):
    result = FuseSkipLayerNorm()(build(SILENT[case]))
    assert not result.modified
    assert result.declined == ()


DECLINED = {
    "another axis": ("s = Add(X, R) Y = LayerNormalization<axis = 1>(s, wide)", "over the last axis"),
    "an axis of unknown meaning": (
        "a = com.microsoft.Whatever(X) s = Add(a, R) Y = LayerNormalization<axis = 2>(s, gamma, beta)",
        "over the last axis",
    ),
    "another type inside": (
        "s = Add(X, R) Y = LayerNormalization<stash_type = 16>(s, gamma, beta)",
        "another type",
    ),
    "the mean is used": (
        "s = Add(X, R) u, m = LayerNormalization(s, gamma, beta) Y = Add(u, m)",
        "mean or deviation",
    ),
    "gamma is computed": ("k = Neg(gamma) s = Add(X, R) Y = LayerNormalization(s, k, beta)", "gamma or beta"),
    "beta is computed": ("k = Neg(beta) s = Add(X, R) Y = LayerNormalization(s, gamma, k)", "gamma or beta"),
    "gamma has two axes": ("s = Add(X, R) Y = LayerNormalization(s, wide, beta)", "gamma or beta"),
    "gamma of one element": ("s = Add(X, R) Y = LayerNormalization(s, one)", "channels"),
    "no gamma": (rms_steps(end="Y = Neg(n)"), "no gamma"),
    "gamma of the steps is computed": (rms_steps(end="k = Neg(gamma) Y = Mul(n, k)"), "no gamma"),
    "a step is used elsewhere": (
        layer_steps(end="g = Mul(n, gamma) h = Add(g, beta) Y = Add(h, v)"),
        "elsewhere",
    ),
    "the deviation is used elsewhere": (
        layer_steps(end="g = Mul(n, gamma) h = Add(g, beta) Y = Add(h, d)"),
        "elsewhere",
    ),
    "contrib gives its mean": (
        "u, m = com.microsoft.SkipLayerNormalization(X, R, gamma, beta) Y = Add(u, m)",
        "mean or deviation",
    ),
    "contrib with a computed gamma": (
        "k = Neg(gamma) Y = com.microsoft.SkipLayerNormalization(X, R, k, beta)",
        "gamma, beta or bias",
    ),
    "beta of one element": ("s = Add(X, R) Y = LayerNormalization(s, gamma, one)", "different sizes"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_cannot_be_fused_is_declined_with_the_reason(case):
    body, reason = DECLINED[case]
    assert reason in reason_of(build(body))


@pytest.mark.parametrize(
    "inputs",
    [
        f"float[B, S, {C}] X, float[B, 1, {C}] R",
        f"float[B, 1, {C}] X, float[1, S, {C}] R",
        f"float[2, 3, {C}] X, float[2, 4, {C}] R",
        f"float[2, 3, {C}] X, float[4, 3, {C}] R",
        f"float[A, 2, 3, {C}] X, float[2, 1, {C}] R",
    ],
)
def test_other_broadcasts_are_declined(inputs):
    assert "which broadcast" in reason_of(build(NORM, inputs=inputs))


@pytest.mark.parametrize("last", [1, C + 1])
def test_channels_that_do_not_fit_are_declined(last):
    assert f"channels {last}" in reason_of(build(NORM, inputs=f"float[B, S, {C}] X, float[B, S, {last}] R"))


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_dtypes_are_declined(dtype):
    text = f"{dtype}[B, S, {C}]"
    proto_inputs = f"{text} X, {text} R"
    model = build(NORM, inputs=proto_inputs, outputs=f"{text} Y")
    assert "dtype" in reason_of(model)


def test_a_gamma_that_a_caller_may_replace_is_declined():
    model = build(NORM, inputs=f"float[B, S, {C}] X, float[B, S, {C}] R, float[{C}] gamma")
    assert "gamma or beta" in reason_of(model)


@pytest.mark.parametrize("opset", [12, 27])
def test_opsets_without_a_body_are_declined(opset):
    assert f"opset {opset}" in reason_of(build(NORM, opset=opset))


def test_taken_names_are_not_used_again(run):
    model = build("a = Neg(X) y = com.microsoft.SkipLayerNormalization(a, R, gamma, beta, bias) Y = Neg(y)")
    model.graph[0].outputs[0].name = "y.biased"
    assert_fused(model, run, "Neg", "Add", LAYER, "Neg")


def test_vectors_in_constant_nodes_behind_the_addition(run):
    numbers = ", ".join(f"{x}" for x in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0))
    vectors = "".join(f"{name} = Constant<value = float[{C}] {{{numbers}}}>() " for name in ("g1", "b1"))
    model = build(f"s = Add(X, R) {vectors} Y = LayerNormalization(s, g1, b1)")
    assert_fused(model, run, LAYER)
    assert [node.op_type for node in model.graph] == [LAYER]


@pytest.mark.parametrize("name", ["small", "two", "unit"])
@pytest.mark.parametrize("kind", ["layer", "RMS"])
def test_steps_with_a_number_that_adds_an_axis_stay(kind, name):
    steps = layer_steps if kind == "layer" else rms_steps
    divide = f"i = Div(unit, r) n = Mul({'d' if kind == 'layer' else 's'}, i)"
    body = steps(square=f"Pow({'d' if kind == 'layer' else 's'}, two)", divide=divide)
    number = {"small": "1e-5", "two": "2.0", "unit": "1.0"}[name]
    high = f"{name} = Constant<value = float[1, 1, 1, 1] {{{number}}}>()"
    old = next(part for part in SCALARS.replace("\n", " ").split(")") if f"{name} =" in part).strip() + ")"
    model = build(body.replace(old, high), outputs=f"float[O, B, S, {C}] Y")
    assert not FuseSkipLayerNorm()(model).modified


def test_an_axis_is_the_last_where_inference_knows_the_rank(run):
    model = build("a = Neg(X) c = Neg(a) s = Add(c, R) Y = LayerNormalization<axis = 2>(s, gamma, beta)")
    assert_fused(model, run, "Neg", "Neg", LAYER)
