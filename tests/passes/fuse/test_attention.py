"""Fusion of attention: every way that exporters write it, what must stay, and equality with the unfused graph."""

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.clean.cleanup import Unused
from sparse_onnx.passes.fuse.attention import FuseAttention
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.ops import attention

FUSE = FuseAttention()
H, D = 4, 16
E = H * D
MIN = np.finfo(np.float32).min

# Three operands [B, S, E] or [B, T, E] to heads, and the result back; `%` marks what the cases put between.
SPLIT_Q = "q4 = Reshape(q, split) Q = Transpose<perm = [0, 2, 1, 3]>(q4)"
SPLIT_K = "k4 = Reshape(k, split) K = Transpose<perm = [0, 2, 3, 1]>(k4)"
SPLIT_V = "v4 = Reshape(v, split) V = Transpose<perm = [0, 2, 1, 3]>(v4)"
SPLITS = f"{SPLIT_Q} {SPLIT_K} {SPLIT_V}"
MERGE = "c = MatMul(P, V) r = Transpose<perm = [0, 2, 1, 3]>(c) Y = Reshape(r, merge)"
SCORES = "s = MatMul(Q, K) S = Mul(s, scale)"
SOFTMAX = "P = Softmax<axis = -1>(S)"
PLAIN = f"{SPLITS} {SCORES} {SOFTMAX} {MERGE}"
INPUTS = f"float[B, S, {E}] q, float[B, T, {E}] k, float[B, T, {E}] v"
CONSTANTS = {
    "split": np.array([0, 0, H, D]),
    "merge": np.array([0, 0, E]),
    "rows": np.array([-1, E]),
    "scale": np.float32(0.25),
    "half": np.float32(0.5),
    "four": np.float32(4.0),
    "one": np.float32(1.0),
    "zero": np.float32(0.0),
    "lowest": np.float32(MIN),
    "infinity": np.float32(-np.inf),
    "weak": np.float32(-10000.0),
    "last": np.array([-1]),
    "end": np.array([np.iinfo(np.int64).max]),
    "matrices": np.array([-1, 9, D]),
    "back": np.array([-1, H, D, 9]),
    "inferred_heads": np.array([0, 0, -1, D]),
    "inferred_rows": np.array([0, -1, H, D]),
    "axis2": np.array([2]),
    "repeats": np.array([1, 1, 2, 1, 1]),
    "regroup": np.array([0, H, -1, D]),
    "two_heads": np.array([0, 0, 2, D]),
    "swapped": np.array([9, -1, H, D]),
    "yes": np.ones((1, 1, 1, 1), bool),
    "ones2": np.array([1, 1, 1, 1]),
}


def build(
    from_text, body, *, inputs=INPUTS, outputs=f"float[B, S, {E}] Y", opset=17, functions="", **tensors
):
    """Only the constants that ``body`` names are added."""
    head = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1, "local" : 1]>'
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in {**CONSTANTS, **tensors}.items() if name in words}
    return from_text(f"{head} g ({inputs}) => ({outputs}) {{ {body} }} {functions}", **used)


def feeds(model, b, s, t, *, past=0, seed=0, special=None):
    """Strong scores, so that a wrong mask or scale shows. ``special`` gives the content of an input by name."""
    rng = np.random.default_rng(seed)
    symbols = {"B": b, "S": s, "T": t, "P": past, "PT": past + t}
    result = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else symbols[dim.value] for dim in value.shape]
        if special and value.name in special:
            result[value.name] = special[value.name](rng, shape)
        elif value.dtype == ir.DataType.BOOL:
            result[value.name] = rng.random(shape) > 0.3
        else:
            result[value.name] = np.asarray(2 * rng.standard_normal(shape), value.dtype.numpy())
    return result


def counted(model):
    """Nodes by operator; those of every fused type count as Attention."""
    counts = {}
    for node in model.graph:
        op_type = "Attention" if is_fused(node) else node.op_type
        counts[op_type] = counts.get(op_type, 0) + 1
    return counts


def is_fused(node):
    return node.domain == DOMAIN and node.op_type in attention.OP_TYPES


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    sparse_ops.register(options)
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])


def assert_same(before, after):
    assert list(before) == list(after)
    for name, array in before.items():
        assert after[name].shape == array.shape
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


SIZES = [(1, 7), (3, 5), (2, 1), (3, 17)]


def check_fused(model, run, *, count=1, cross=True, past=0, special=None, sizes=SIZES):
    """Fuse, compare on several sizes, and see that nothing of the old form is left."""
    keys = [(b, s, t) for b, s in sizes for t in ((s, s + 4) if cross else (s,))]
    given = [feeds(model, *size, past=past, seed=i, special=special) for i, size in enumerate(keys)]
    expected = [run(model, feed) for feed in given]
    border = [(value.name, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]
    result = FUSE(model)
    assert result.modified
    assert result.statistics == {"found": count, "fused": count}
    assert result.declined == ()
    assert not Unused()(model).modified
    ops = counted(model)
    assert ops["Attention"] == count
    assert "Softmax" not in ops
    assert border == [(value.name, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]
    assert {name for _, name, _ in model.functions} >= {
        node.op_type for node in model.graph if is_fused(node)
    }
    with_library = session(model)
    for feed, outputs in zip(given, expected, strict=True):
        assert_same(outputs, run(model, feed))
        assert_same(outputs, dict(zip(outputs, with_library.run(None, feed), strict=True)))
    assert not FUSE(model).modified
    return ops


def check_left(model, reason):
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = FUSE(model)
    assert not result.modified
    assert [place.reason for place in result.declined] == ([reason] if reason else [])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def fused(model):
    return next(node for node in model.graph if is_fused(node))


# -- projections, scales, layouts --------------------------------------------------------------------------

SCALES = {
    "multiplied": (PLAIN, 0.25),
    "divided": (PLAIN.replace("Mul(s, scale)", "Div(s, four)"), 0.25),
    "constant first": (PLAIN.replace("Mul(s, scale)", "Mul(scale, s)"), 0.25),
    "none": (PLAIN.replace("S = Mul(s, scale)", "").replace("(S)", "(s)"), 1.0),
    "on the queries": (f"{SPLITS} Qs = Mul(Q, scale) S = MatMul(Qs, K) {SOFTMAX} {MERGE}", 0.25),
    "on both": (f"{SPLITS} Qs = Mul(Q, half) Ks = Mul(K, half) S = MatMul(Qs, Ks) {SOFTMAX} {MERGE}", 0.25),
    "on all three": (
        f"{SPLITS} Qs = Mul(Q, half) Ks = Div(K, four) s = MatMul(Qs, Ks) S = Mul(s, half) {SOFTMAX} {MERGE}",
        0.0625,
    ),
    "on the keys, before they are transposed": (
        f"""{SPLIT_Q} {SPLIT_V} k4 = Reshape(k, split) k5 = Transpose<perm = [0, 2, 1, 3]>(k4) k6 = Mul(k5, scale)
            K = Transpose<perm = [0, 1, 3, 2]>(k6) S = MatMul(Q, K) {SOFTMAX} {MERGE}""",
        0.25,
    ),
    "from the head size": (
        f"""{SPLITS} shape = Shape(Q) dim = Slice(shape, last, end) number = Cast<to = 1>(dim)
            root = Sqrt(number) inverse = Div(one, root) each = Sqrt(inverse)
            Qs = Mul(Q, each) Ks = Mul(K, each) S = MatMul(Qs, Ks) {SOFTMAX} {MERGE}""",
        0.25,
    ),
    "from a gathered head size": (
        f"""{SPLITS} shape = Shape(Q) dim = Gather(shape, last) number = Cast<to = 1>(dim) root = Sqrt(number)
            s = MatMul(Q, K) S = Div(s, root) {SOFTMAX} {MERGE}""",
        0.25,
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_scale(from_text, run, case):
    body, scale = SCALES[case]
    model = build(from_text, body)
    ops = check_fused(model, run)
    assert ops == {"Attention": 1}
    node = fused(model)
    assert node.op_type == "Attention"
    assert node.attributes.get_int("num_heads") == H
    assert node.attributes.get_float("scale") == pytest.approx(scale, rel=1e-6)
    assert [value.name for value in node.inputs] == ["q", "k", "v"]
    assert not model.graph.initializers


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 21, 23, 26])
def test_all_opsets(from_text, run, opset):
    model = build(from_text, PLAIN, opset=opset)
    check_fused(model, run)
    assert model.opset_imports[DOMAIN] == VERSION


LAYOUTS = {
    "keys transposed twice": PLAIN.replace(
        SPLIT_K,
        "k4 = Reshape(k, split) k5 = Transpose<perm = [0, 2, 1, 3]>(k4) K = Transpose<perm = [0, 1, 3, 2]>(k5)",
    ),
    "heads inferred": PLAIN.replace("split)", "inferred_heads)"),
    "rows inferred": PLAIN.replace("split)", "inferred_rows)"),
    "softmax on axis 3": PLAIN.replace("axis = -1", "axis = 3"),
    "default axis": PLAIN.replace("<axis = -1>", ""),
    "identities and casts": PLAIN.replace(
        SOFTMAX, "i = Identity(S) f = Cast<to = 1>(i) p = Softmax(f) j = Cast<to = 1>(p) P = Identity(j)"
    ),
    "shape of the product": PLAIN.replace(
        MERGE,
        """c = MatMul(P, V) shape = Shape(c) d = Reshape(c, shape) r = Transpose<perm = [0, 2, 1, 3]>(d)
           Y = Reshape(r, merge)""",
    ),
    "NaN to zero": PLAIN.replace(SOFTMAX, "p = Softmax(S) n = IsNaN(p) P = Where(n, zero, p)"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(from_text, run, case):
    assert check_fused(build(from_text, LAYOUTS[case]), run) == {"Attention": 1}


def test_keys_transposed_as_matrices(from_text, run):
    keys = """k4 = Reshape(k, split) k5 = Transpose<perm = [0, 2, 1, 3]>(k4) k6 = Reshape(k5, matrices)
               k7 = Transpose<perm = [0, 2, 1]>(k6) K = Reshape(k7, back)"""
    inputs = INPUTS.replace("T", "9")
    model = build(from_text, PLAIN.replace(SPLIT_K, keys), inputs=inputs)
    assert check_fused(model, run) == {"Attention": 1}


def test_heads_merged_into_rows(from_text, run):
    model = build(
        from_text, PLAIN.replace("Y = Reshape(r, merge)", "Y = Reshape(r, rows)"), outputs="float[N, 64] Y"
    )
    ops = check_fused(model, run)
    assert ops == {"Attention": 1, "Reshape": 2}


def test_values_of_another_size(from_text, run):
    body = PLAIN.replace("Reshape(v, split)", "Reshape(v, wide)").replace("merge)", "wide_merge)")
    model = build(
        from_text,
        body,
        inputs=INPUTS.replace("64] v", "96] v"),
        outputs="float[B, S, 96] Y",
        wide=np.array([0, 0, H, 24]),
        wide_merge=np.array([0, 0, 96]),
    )
    check_fused(model, run)


def test_one_batch_of_keys_for_all_queries(from_text, run):
    inputs = INPUTS.replace("[B, T", "[1, T")
    assert check_fused(build(from_text, PLAIN, inputs=inputs), run) == {"Attention": 1}


def test_projections_of_any_kind(from_text, run):
    """A function with a body, as lowered linears are, and a Gemm of rows with a Split."""
    rng = np.random.default_rng(3)
    body = f"""q = local.linear(x, w, b) x2 = Reshape(x, rows) g = Gemm(x2, w2, b2) shape = Shape(x)
               two = Slice(shape, start, stop) target = Concat<axis = 0>(two, twice) kv = Reshape(g, target)
               k, v = Split<axis = 2>(kv, sizes) {PLAIN}"""
    model = build(
        from_text,
        body,
        inputs=f"float[B, S, {E}] x",
        functions="""<domain: "local", opset_import: ["" : 17]>
                     linear (a, w, b) => (c) { m = MatMul(a, w) c = Add(m, b) }""",
        w=rng.standard_normal((E, E)).astype(np.float32) / 8,
        w2=rng.standard_normal((E, 2 * E)).astype(np.float32) / 8,
        b=rng.standard_normal(E).astype(np.float32),
        b2=rng.standard_normal(2 * E).astype(np.float32),
        start=np.array([0]),
        stop=np.array([2]),
        twice=np.array([2 * E]),
        sizes=np.array([E, E]),
    )
    ops = check_fused(model, run, cross=False)
    assert ops["linear"] == ops["Gemm"] == ops["Split"] == 1
    assert "Transpose" not in ops


def test_shapes_computed_in_the_graph(from_text, run):
    """As the legacy exporter writes it: every Reshape has its own target, made from Shape and Gather."""

    def target(name, source, *tail):
        dims = f"""{name}s = Shape({source}) {name}0 = Gather({name}s, first) {name}1 = Gather({name}s, second)
                   {name}b = Unsqueeze({name}0, front) {name}n = Unsqueeze({name}1, front)"""
        return f"{dims} {name} = Concat<axis = 0>({name}b, {name}n, {', '.join(tail)})"

    body = " ".join(target(f"t{x}", x, "minus", "size") for x in "qkv") + PLAIN
    for x in "qkv":
        body = body.replace(f"Reshape({x}, split)", f"Reshape({x}, t{x})")
    body = body.replace("Y = Reshape(r, merge)", target("to", "r", "minus") + " Y = Reshape(r, to)")
    tensors = {"first": np.array(0), "second": np.array(1), "front": np.array([0]), "minus": np.array([-1])}
    model = build(from_text, body, size=np.array([D]), **tensors)
    assert check_fused(model, run) == {"Attention": 1}


# -- masks -------------------------------------------------------------------------------------------------


def padding(fill, *, whole_rows):
    """An additive mask; the last batch keeps no key at all if ``whole_rows``."""

    def make(rng, shape):
        mask = np.where(rng.random(shape) < 0.4, fill, 0).astype(np.float32)
        mask[..., 0] = 0
        if whole_rows:
            mask[-1] = fill
        return mask

    return make


MASKED = PLAIN.replace(SOFTMAX, "M = Add(S, mask) P = Softmax(M)")
MASK_SHAPES = [
    *itertools.product(("B", "1"), (str(H), "1"), ("S", "1"), "T"),
    ("S", "T"),
    ("1", "T"),
    ("T",),
    ("1", "S", "T"),
    ("B", "1", "S", "1"),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=",".join)
@pytest.mark.parametrize("fill", [-3.5, MIN, -np.inf])
def test_additive_mask(from_text, run, shape, fill):
    model = build(from_text, MASKED, inputs=f"{INPUTS}, float[{', '.join(shape)}] mask")
    whole_rows = shape[-1] == "T" and np.isfinite(fill)
    ops = check_fused(model, run, special={"mask": padding(fill, whole_rows=whole_rows)})
    assert ops == {"Attention": 1}
    assert fused(model).op_type == "AttentionMasked"
    assert [value.name for value in fused(model).inputs] == ["q", "k", "v", "mask"]


def test_a_mask_that_is_a_product_too_is_told_from_the_scores(from_text, run):
    """A search from the mask's side would reach another MatMul, just at the end of its reach."""
    steps = " ".join(f"a{i + 1} = Identity(a{i})" for i in range(10))
    body = f"{SPLITS} a0 = MatMul(e, h) {steps} s = MatMul(Q, K) m = Add(a10, s) S = Identity(m) {SOFTMAX} {MERGE}"
    check_fused(build(from_text, body, inputs=f"{INPUTS}, float[S, 8] e, float[8, T] h"), run)


def test_an_expanded_mask_goes_in_as_it_was(from_text, run):
    body = MASKED.replace("M = Add(S, mask)", "whole = Shape(S) full = Expand(mask, whole) M = Add(S, full)")
    model = build(from_text, body, inputs=f"{INPUTS}, float[B, 1, 1, T] mask")
    assert check_fused(model, run, special={"mask": padding(MIN, whole_rows=True)}) == {"Attention": 1}


def test_rows_of_minus_infinity_stay_nan(from_text, run):
    model = build(from_text, MASKED, inputs=f"{INPUTS}, float[B, 1, 1, T] mask")
    ops = check_fused(model, run, special={"mask": padding(-np.inf, whole_rows=True)})
    assert ops["Attention"] == 1
    given = feeds(model, 2, 3, 3, special={"mask": padding(-np.inf, whole_rows=True)})
    assert np.isnan(run(model, given)["Y"][-1]).all()


NAN_TO_ZERO = MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsNaN(p) P = Where(n, zero, p)")


@pytest.mark.parametrize("fill", [MIN, -np.inf])
@pytest.mark.parametrize("steps", ["", "i = Identity(p)", "i = Cast<to = 1>(p)"])
def test_fully_masked_rows_that_are_set_to_zero(from_text, run, fill, steps):
    body = NAN_TO_ZERO.replace(
        "n = IsNaN(p) P = Where(n, zero, p)", f"{steps} n = IsNaN(i) P = Where(n, zero, i)"
    )
    model = build(from_text, body if steps else NAN_TO_ZERO, inputs=f"{INPUTS}, float[B, 1, S, T] mask")
    whole_rows = {"mask": padding(fill, whole_rows=True)}
    given = feeds(model, 2, 3, 5, special=whole_rows)
    assert (run(model, given)["Y"][-1] == 0).all() == np.isinf(fill)
    assert check_fused(model, run, special=whole_rows) == {"Attention": 1}
    assert fused(model).op_type == "AttentionMaskedNanToZero"


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 26])
@pytest.mark.parametrize("fill", ["lowest", "infinity"])
@pytest.mark.parametrize("mask", ["mask = Where(keep, zero, {}) M = Add(S, mask)", "M = Where(keep, S, {})"])
def test_conditions_that_leave_no_key(from_text, run, opset, fill, mask):
    body = NAN_TO_ZERO.replace("M = Add(S, mask)", mask.format(fill))
    model = build(from_text, body, inputs=f"{INPUTS}, bool[B, 1, S, T] keep", opset=opset)
    whole = {"keep": lambda rng, shape: (rng.random(shape) > 0.4) & (np.arange(shape[2]) > 0)[:, None]}
    assert check_fused(model, run, special=whole) == {"Attention": 1, "Where": 1}
    assert fused(model).op_type == "AttentionMaskedNanToZero"


def test_two_masks_that_leave_no_key_together(from_text, run):
    body = NAN_TO_ZERO.replace("M = Add(S, mask)", "m = Add(S, mask) M = Add(m, second)")
    model = build(from_text, body, inputs=f"{INPUTS}, float[B, 1, S, T] mask, float[S, T] second")
    lowest = padding(MIN, whole_rows=True)
    assert check_fused(model, run, special={"mask": lowest, "second": lowest}) == {"Attention": 1, "Add": 1}


def test_a_mask_that_keeps_everything_takes_the_test_for_nan_with_it(from_text, run):
    body = NAN_TO_ZERO.replace("M = Add(S, mask)", "mask = Where(yes, zero, infinity) M = Add(S, mask)")
    model = build(from_text, body)
    assert check_fused(model, run) == {"Attention": 1}
    assert fused(model).op_type == "Attention"


@pytest.mark.parametrize("fill", ["lowest", "infinity"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("s", [2, 9])
def test_data_that_is_no_number_gives_what_it_gave(from_text, run, fill, place, s):
    """NaN in a query or key makes weights of 0, in a value it stays."""
    body = NAN_TO_ZERO.replace("M = Add(S, mask)", f"mask = Where(keep, zero, {fill}) M = Add(S, mask)")
    model = build(from_text, body, inputs=f"{INPUTS}, bool[B, 1, S, T] keep")
    given = feeds(model, 2, s, 7)
    given["keep"][..., 0] = True
    given["keep"][0, 0, 0] = False
    given[place][1, 1, 3] = np.nan
    expected = run(model, given)
    assert np.isnan(expected["Y"]).any() == (place == "v")
    assert FUSE(model).statistics == {"found": 1, "fused": 1}
    assert_same(expected, run(model, given))
    assert_same(expected, dict(zip(expected, session(model).run(None, given), strict=True)))


CONDITIONS = {
    "kept first": "M = Where(keep, S, lowest)",
    "kept second": "M = Where(keep, lowest, S)",
    "minus infinity": "M = Where(keep, S, infinity)",
    "and added": "m = Where(keep, S, lowest) M = Add(m, mask)",
    "added before": "m = Add(S, mask) M = Where(keep, m, lowest)",
    "added twice": "m = Add(mask, S) M = Add(m, mask)",
}


@pytest.mark.parametrize("case", CONDITIONS)
@pytest.mark.parametrize("shape", ["B, 1, S, T", "1, 1, S, T", "B, 1, 1, T", "S, T"])
def test_conditions(from_text, run, case, shape):
    body = PLAIN.replace(SOFTMAX, f"{CONDITIONS[case]} P = Softmax(M)")
    inputs = "".join(
        f", {kind}[{shape}] {name}"
        for kind, name in (("bool", "keep"), ("float", "mask"))
        if name in CONDITIONS[case]
    )
    whole = lambda rng, shape: (rng.random(shape) > 0.4) | (np.arange(shape[-1]) == 0)  # noqa: E731
    none = lambda rng, shape: (rng.random(shape) > 0.4) & (np.arange(shape[-1]) != 0)  # noqa: E731
    special = {"keep": none if case == "kept second" else whole}
    check_fused(build(from_text, body, inputs=INPUTS + inputs), run, special=special)


@pytest.mark.parametrize("case", ["kept first", "and added", "added before"])
def test_rows_without_a_kept_key(from_text, run, case):
    body = PLAIN.replace(SOFTMAX, f"{CONDITIONS[case]} P = Softmax(M)")
    inputs = f"{INPUTS}, bool[B, 1, S, T] keep" + (", float[B, 1, 1, T] mask" if "mask" in body else "")
    special = {"keep": lambda rng, shape: np.zeros(shape, bool), "mask": padding(MIN, whole_rows=False)}
    check_fused(build(from_text, body, inputs=inputs), run, special=special)


@pytest.mark.parametrize(
    "mask",
    [
        "all = Expand(yes, ones2) mask = Where(all, zero, lowest) M = Add(S, mask)",
        "mask = Where(yes, zero, infinity) M = Add(S, mask)",
        "M = Where(yes, S, lowest)",
        "M = Add(S, zero)",
    ],
)
def test_a_mask_that_keeps_everything_goes(from_text, run, mask):
    model = build(from_text, PLAIN.replace(SOFTMAX, f"{mask} P = Softmax(M)"))
    assert check_fused(model, run) == {"Attention": 1}


REPEATED = {
    "added": ("M = Add(S, nothing)", {"nothing": np.zeros((4, 1, 1, 7), np.float32)}),
    "a condition": ("M = Where(always, S, lowest)", {"always": np.ones((4, 1, 1, 7), bool)}),
    "one for other queries": ("M = Add(S, nothing)", {"nothing": np.zeros((1, 1, 5, 7), np.float32)}),
    "expanded": (
        "m = Expand(zero, whole) M = Add(S, m)",
        {"whole": np.array([4, 1, 5, 7])},
    ),
    "one that masks, expanded": (
        "m = Expand(row, whole) M = Add(S, m)",
        {"whole": np.array([4, 1, 1, 7]), "row": np.array([0, -3, 0, 0, -9, 0, 0], np.float32)},
    ),
}


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("known", [True, False])
def test_a_mask_that_repeats_the_scores_still_does(from_text, run, case, known):
    """Whether one batch of one query is known, or a symbol happens to be 1."""
    step, tensors = REPEATED[case]
    body = PLAIN.replace(SOFTMAX, f"{step} P = Softmax(M)")
    inputs = INPUTS.replace("T", "7")
    if known:
        inputs = inputs.replace("B, S", "1, 1").replace("B", "1")
    model = build(from_text, body, inputs=inputs, outputs=f"float[C, R, {E}] Y", **tensors)
    sizes = [(1, 1)] if known else [(1, 1), (4, 5 if "queries" in case or case == "expanded" else 3)]
    ops = check_fused(model, run, cross=False, sizes=sizes)
    assert ops["Attention"] == 1
    assert fused(model).op_type == "AttentionMasked"
    (y,) = run(model, feeds(model, 1, 1, 7)).values()
    assert y.shape[:2] != (1, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (7,), (4, 1, 1), (1, 4, 1, 7), ()])
def test_a_mask_of_zeros_that_repeats_nothing_goes(from_text, run, shape):
    body = PLAIN.replace(SOFTMAX, "M = Add(S, nothing) P = Softmax(M)")
    model = build(from_text, body, inputs=INPUTS.replace("T", "7"), nothing=np.zeros(shape, np.float32))
    assert check_fused(model, run, cross=False) == {"Attention": 1}
    assert fused(model).op_type == "Attention"


BATCHES = [("Q", "B", "B"), ("1", "B", "B"), ("B", "1", "B"), ("Q", "B", "V"), ("B", "B", "V")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symbols", BATCHES, ids="".join)
def test_batches_that_may_differ(from_text, run, symbols, masked):
    inputs = ", ".join(f"float[{b}, {s}, {E}] {x}" for b, s, x in zip(symbols, "STT", "qkv", strict=True))
    body = MASKED if masked else PLAIN
    if masked:
        inputs += ", float[B, 1, 1, T] mask"
    model = build(from_text, body, inputs=inputs, outputs=f"float[C, S, {E}] Y")
    names = sorted({name for name in symbols if not name.isdigit()} | ({"B"} if masked else set()))
    given = []
    for sizes in itertools.product((1, 3), repeat=len(names)):
        known = dict(zip(names, sizes, strict=True))
        rng = np.random.default_rng(len(given))
        shape = [[known.get(b, 1), n, E] for b, n in zip(symbols, (2, 5, 5), strict=True)]
        feed = {x: rng.standard_normal(s).astype(np.float32) for x, s in zip("qkv", shape, strict=True)}
        if masked:
            feed["mask"] = rng.standard_normal((known["B"], 1, 1, 5)).astype(np.float32)
        given.append(feed)
    expected = [run(model, feed) for feed in given]
    assert FUSE(model).statistics == {"found": 1, "fused": 1}
    with_library = session(model)
    for feed, outputs in zip(given, expected, strict=True):
        assert_same(outputs, run(model, feed))
        assert_same(outputs, dict(zip(outputs, with_library.run(None, feed), strict=True)))


def test_masks_of_two_kinds_that_look_alike_are_two(from_text, run):
    """Where(keep, S, -Inf) masks what Add(S, Where(keep, -Inf, 1)) keeps; True and 1 are equal in Python."""
    body = "m1 = Where(keep, infinity, one) " + two_layers(("m1", "m2"))
    body = body.replace("M_ = Add(S_, m2)", "M_ = Where(keep, S_, infinity)")
    inputs = f"float[B, S, {E}] q, float[B, S, {E}] k, float[B, S, {E}] v, bool[B, 1, 1, S] keep"
    some = {"keep": lambda _, shape: np.broadcast_to(np.arange(shape[-1]) % 2 == 0, shape).copy()}
    check_fused(
        build(from_text, body, inputs=inputs), run, count=2, cross=False, special=some, sizes=[(1, 7), (3, 5)]
    )


def two_layers(masks):
    first = MASKED.replace("Y =", "x =").replace("Add(S, mask)", f"Add(S, {masks[0]})")
    renamed = {name: f"{name}_" for name in ("q4", "k4", "v4", "Q", "K", "V", "s", "S", "M", "P", "c", "r")}
    second = MASKED.replace("Add(S, mask)", f"Add(S, {masks[1]})")
    for old, new in renamed.items():
        second = second.replace(f"{old} =", f"{new} =")
        for before, after in itertools.product("( ", "),"):
            second = second.replace(f"{before}{old}{after}", f"{before}{new}{after}")
    for name in "qkv":
        second = second.replace(f"({name},", "(x,")
    return f"{first} {second}"


def test_layers_share_the_mask(from_text, run):
    model = build(
        from_text,
        two_layers(("mask", "mask")),
        inputs=f"float[B, S, {E}] q, float[B, S, {E}] k, float[B, S, {E}] v, float[B, 1, S, S] mask",
    )
    ops = check_fused(model, run, count=2, cross=False, special={"mask": padding(MIN, whole_rows=True)})
    assert ops == {"Attention": 2}


def test_layers_share_a_condition_written_twice(from_text, run):
    body = "m1 = Where(keep, zero, lowest) m2 = Where(keep, zero, lowest)" + two_layers(("m1", "m2"))
    inputs = f"float[B, S, {E}] q, float[B, S, {E}] k, float[B, S, {E}] v, bool[B, 1, S, S] keep"
    assert check_fused(build(from_text, body, inputs=inputs), run, count=2, cross=False)["Where"] == 1


def test_layers_with_other_masks_do_not_share(from_text, run):
    inputs = (
        f"float[B, S, {E}] q, float[B, S, {E}] k, float[B, S, {E}] v, float[B, 1, S, S] m1, float[S, S] m2"
    )
    model = build(from_text, two_layers(("m1", "m2")), inputs=inputs)
    check_fused(model, run, count=2, cross=False)
    assert [node.inputs[3].name for node in model.graph if is_fused(node)] == ["m1", "m2"]


def test_layers_share_the_sum_of_two_masks(from_text, run):
    body = two_layers(("m1", "m1")).replace("P = Softmax(M)", "N = Add(M, m2) P = Softmax(N)")
    body = body.replace("P_ = Softmax(M_)", "N_ = Add(M_, m2) P_ = Softmax(N_)")
    inputs = (
        f"float[B, S, {E}] q, float[B, S, {E}] k, float[B, S, {E}] v, float[B, 1, S, S] m1, float[S, S] m2"
    )
    assert check_fused(build(from_text, body, inputs=inputs), run, count=2, cross=False)["Add"] == 1


# -- keys and values per head ------------------------------------------------------------------------------

CACHED = f"""{SPLIT_Q} k4 = Reshape(k, split) k5 = Transpose<perm = [0, 2, 1, 3]>(k4) {SPLIT_V}
             keys = Concat<axis = 2>(past_k, k5) values = Concat<axis = -2>(past_v, V)
             K = Transpose<perm = [0, 1, 3, 2]>(keys) {SCORES} {SOFTMAX} {MERGE.replace("(P, V)", "(P, values)")}"""


SAFE_SOFTMAX = "M = Add(S, mask) p = Softmax(M) n = IsNaN(p) P = Where(n, zero, p)"


@pytest.mark.parametrize("past", [1, 6])
def test_cache_with_rows_that_are_set_to_zero(from_text, run, past):
    inputs = f"{INPUTS}, float[B, {H}, P, {D}] past_k, float[B, {H}, P, {D}] past_v, float[B, 1, S, PT] mask"
    outputs = f"float[B, S, {E}] Y, float[B, {H}, PT, {D}] keys, float[B, {H}, PT, {D}] values"
    model = build(from_text, CACHED.replace(SOFTMAX, SAFE_SOFTMAX), inputs=inputs, outputs=outputs)
    ops = check_fused(model, run, past=past, special={"mask": padding(-np.inf, whole_rows=True)})
    assert ops == {"Attention": 1, "Concat": 2, "Transpose": 2, "Reshape": 2}
    assert fused(model).op_type == "AttentionSplitMaskedNanToZero"


@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_cache(from_text, run, past, masked):
    inputs = f"{INPUTS}, float[B, {H}, P, {D}] past_k, float[B, {H}, P, {D}] past_v"
    outputs = f"float[B, S, {E}] Y, float[B, {H}, PT, {D}] keys, float[B, {H}, PT, {D}] values"
    body = CACHED.replace(SOFTMAX, "M = Add(S, mask) P = Softmax(M)") if masked else CACHED
    if masked:
        inputs += ", float[1, 1, S, PT] mask"
    model = build(from_text, body, inputs=inputs, outputs=outputs)
    ops = check_fused(model, run, past=past, special={"mask": padding(MIN, whole_rows=False)})
    assert fused(model).op_type == ("AttentionSplitMasked" if masked else "AttentionSplit")
    assert ops["Concat"] == 2
    assert ops["Transpose"] == 2  # of the keys and values that the cache gets
    assert [value.name for value in fused(model).inputs[:3]] == ["q", "keys", "values"]


def test_repeated_heads(from_text, run):
    repeated = "".join(
        f"""{x}4 = Reshape({x}, two_heads) {x}5 = Transpose<perm = [0, 2, 1, 3]>({x}4) {x}6 = Unsqueeze({x}5, axis2)
            {x}7 = Expand({x}6, repeats) {x}8 = Reshape({x}7, regroup) """
        for x in "kv"
    )
    body = f"""{SPLIT_Q} {repeated} K = Transpose<perm = [0, 1, 3, 2]>(k8) {SCORES} {SOFTMAX}
               {MERGE.replace("(P, V)", "(P, v8)")}"""
    inputs = INPUTS.replace(f"{E}] k", "32] k").replace(f"{E}] v", "32] v")
    model = build(from_text, body, inputs=inputs)
    check_fused(model, run)
    assert [value.name for value in fused(model).inputs] == ["q", "k8", "v8"]


PER_HEAD_KEYS = "k4 = Reshape(k, split) K4 = Transpose<perm = [0, 2, 1, 3]>(k4)"
ROTATED = f"""{SPLIT_Q} {PER_HEAD_KEYS} {SPLIT_V} R = Mul(Q, turn) RK = Mul(K4, turn)
              K = Transpose<perm = [0, 1, 3, 2]>(RK) {SCORES.replace("(Q, K)", "(R, K)")} {SOFTMAX} {MERGE}"""


@pytest.mark.parametrize("masked", [False, True])
def test_queries_per_head(from_text, run, masked):
    """As rotary embeddings leave them; the values are merged, too, and need not be."""
    body = ROTATED.replace(SOFTMAX, "M = Add(S, mask) P = Softmax(M)") if masked else ROTATED
    inputs = INPUTS + (", float[B, 1, S, T] mask" if masked else "")
    turn = np.random.default_rng(0).random((1, 1, 1, D)).astype(np.float32)
    model = build(from_text, body, inputs=inputs, turn=turn)
    ops = check_fused(model, run, special={"mask": padding(MIN, whole_rows=False)})
    assert fused(model).op_type == ("AttentionHeadsMasked" if masked else "AttentionHeads")
    assert [value.name for value in fused(model).inputs[:3]] == ["R", "RK", "V"]
    assert ops["Transpose"] == 3


def test_queries_per_head_with_rows_that_are_set_to_zero(from_text, run):
    turn = np.random.default_rng(0).random((1, 1, 1, D)).astype(np.float32)
    inputs = f"{INPUTS}, float[B, 1, S, T] mask"
    model = build(from_text, ROTATED.replace(SOFTMAX, SAFE_SOFTMAX), inputs=inputs, turn=turn)
    ops = check_fused(model, run, special={"mask": padding(-np.inf, whole_rows=True)})
    assert not {"IsNaN", "Where"} & set(ops)
    assert fused(model).op_type == "AttentionHeadsMaskedNanToZero"


def test_queries_whose_rows_are_not_known(from_text, run):
    """The width of q has a name only, so that nothing says what its rows are; per head all is known."""
    body = f"""{SPLIT_Q} {PER_HEAD_KEYS} {SPLIT_V} K = Transpose<perm = [0, 1, 3, 2]>(K4) {SCORES} {SOFTMAX} {MERGE}"""
    model = build(from_text, body, inputs=INPUTS.replace(f"S, {E}] q", "S, W] q"))
    sizes = [dict.fromkeys("qkv", (b, s, E)) for b, s in SIZES]
    rng = np.random.default_rng(1)
    given = [{x: rng.standard_normal(s).astype(np.float32) for x, s in size.items()} for size in sizes]
    expected = [run(model, feed) for feed in given]
    assert FUSE(model).statistics == {"found": 1, "fused": 1}
    assert fused(model).op_type == "AttentionHeads"
    for feed, outputs in zip(given, expected, strict=True):
        assert_same(outputs, run(model, feed))


# -- what must stay ----------------------------------------------------------------------------------------

PER_HEAD = "queries, keys and values are neither all merged nor all per head"
HEADS = "queries, keys and values are not known to have the same number of heads"
ELSEWHERE = "scores or weights are used elsewhere too"
LEFT = {
    "no attention": ("Y = Softmax(q)", None, {}),
    "a gate": ("s = Softmax(q) Y = Mul(s, q)", None, {}),
    "rotated queries": (PLAIN.replace("s = MatMul(Q, K)", "R = Neg(Q) s = MatMul(R, K)"), PER_HEAD, {}),
    "scaled after the mask": (
        PLAIN.replace("S = Mul(s, scale)", "m = Add(s, half) n = Add(m, q9) S = Mul(n, scale)"),
        "scores are scaled after they are masked",
        {"inputs": f"{INPUTS}, float[S, T] q9"},
    ),
    "scale from an input": (
        PLAIN.replace("scale", "x"),
        "scores go through a Mul of something that is no constant",
        {"inputs": f"{INPUTS}, float x"},
    ),
    "weak fill": (
        PLAIN.replace(SOFTMAX, "M = Where(keep, S, weak) P = Softmax(M)"),
        "masked scores become something other than -Inf or a number of at most -1e30",
        {"inputs": f"{INPUTS}, bool[S, T] keep"},
    ),
    "scores as a condition": (
        PLAIN.replace(SOFTMAX, "C = Cast<to = 9>(S) M = Where(C, zero, lowest) P = Softmax(M)"),
        "masked scores become something other than -Inf or a number of at most -1e30",
        {},
    ),
    "weights are an output": (PLAIN, ELSEWHERE, {"outputs": f"float[B, S, {E}] Y, float[B, {H}, S, T] P"}),
    "scores are used twice": (
        PLAIN + " Z = ReduceSum<keepdims = 0>(S)",
        ELSEWHERE,
        {"outputs": f"float[B, S, {E}] Y, float Z"},
    ),
    "weights are changed": (
        PLAIN.replace(SOFTMAX, "p = Softmax(S) P = Where(keep, p, zero)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, bool[S, T] keep"},
    ),
    "weights become another number": (
        PLAIN.replace(SOFTMAX, "p = Softmax(S) n = IsNaN(p) P = Where(n, one, p)"),
        "weights go through a Where after Softmax",
        {},
    ),
    "NaN becomes a number of the caller": (
        MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsNaN(p) P = Where(n, x, p)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, float[S, T] mask, float x"},
    ),
    "all but NaN becomes zero": (
        MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsNaN(p) P = Where(n, p, zero)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, float[S, T] mask"},
    ),
    "infinity becomes zero": (
        MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsInf(p) P = Where(n, zero, p)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, float[S, T] mask"},
    ),
    "a test of the scores": (
        MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsNaN(S) P = Where(n, zero, p)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, float[S, T] mask"},
    ),
    "a test of the mask": (
        MASKED.replace("P = Softmax(M)", "p = Softmax(M) n = IsNaN(mask) P = Where(n, zero, p)"),
        "weights go through a Where after Softmax",
        {"inputs": f"{INPUTS}, float[S, T] mask"},
    ),
    "weights that may be NaN are an output": (
        NAN_TO_ZERO,
        ELSEWHERE,
        {
            "inputs": f"{INPUTS}, float[S, T] mask",
            "outputs": f"float[B, S, {E}] Y, float[B, {H}, S, T] p",
        },
    ),
    "weights without NaN are an output": (
        NAN_TO_ZERO,
        ELSEWHERE,
        {
            "inputs": f"{INPUTS}, float[S, T] mask",
            "outputs": f"float[B, S, {E}] Y, float[B, {H}, S, T] P",
        },
    ),
    "where weights were NaN is an output": (
        NAN_TO_ZERO,
        ELSEWHERE,
        {
            "inputs": f"{INPUTS}, float[S, T] mask",
            "outputs": f"float[B, S, {E}] Y, bool[B, {H}, S, T] n",
        },
    ),
    "over the queries": (PLAIN.replace("axis = -1", "axis = 2"), "Softmax is not over the keys", {}),
    "other order of merging": (
        PLAIN.replace("r = Transpose<perm = [0, 2, 1, 3]>(c)", "r = Transpose<perm = [0, 2, 3, 1]>(c)"),
        "heads are not merged by a Transpose",
        {},
    ),
    "not merged": (
        PLAIN.replace("r = Transpose<perm = [0, 2, 1, 3]>(c) Y = Reshape(r, merge)", "Y = Neg(c)"),
        "heads are not merged by a Transpose",
        {"outputs": f"float[B, {H}, S, {D}] Y"},
    ),
    "one head for all": (
        PLAIN.replace("k, split", "k, one_head"),
        HEADS,
        {"inputs": INPUTS.replace("64] k", "16] k")},
    ),
    "batch and rows mixed": (
        PLAIN.replace("q, split", "q, swapped"),
        PER_HEAD,
        {"inputs": INPUTS.replace("B, S", "B, 9"), "outputs": "float[N, M, 64] Y"},
    ),
    "a mask that may repeat the only head": (
        MASKED.replace("Reshape(q, split)", "Reshape(q, one_head)")
        .replace("Reshape(k, split)", "Reshape(k, one_head)")
        .replace("Reshape(v, split)", "Reshape(v, one_head)"),
        "its only head may be repeated for a mask with more of them",
        {
            "inputs": INPUTS.replace("64]", f"{D}]") + ", float[1, X, S, T] mask",
            "outputs": "float[B, S, M] Y",
            "merge": np.array([0, 0, -1]),
        },
    ),
    "a scale that adds an axis": (
        PLAIN.replace("scale", "high"),
        "scores are not known to be [batch, heads, queries, keys]",
        {"high": np.full((1, 1, 1, 1, 1), 0.25, np.float32), "outputs": f"float[N, M, O, {E}] Y"},
    ),
    "double": (
        PLAIN.replace("scale", "dscale"),
        "is not FLOAT, the type of the CPU kernel",
        {"inputs": INPUTS.replace("float", "double"), "outputs": f"double[B, S, {E}] Y"},
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(from_text, case):
    body, reason, options = LEFT[case]
    extra = {"one_head": np.array([0, 0, 1, D]), "dscale": np.float64(0.25)}
    check_left(build(from_text, body, **options, **extra), reason)


def test_values_of_another_size_per_head(from_text, run):
    body = CACHED.replace("Reshape(v, split)", "Reshape(v, wide)")
    body = body.replace("merge)", "wide_merge)")
    model = build(
        from_text,
        body,
        inputs=f"{INPUTS.replace('64] v', '96] v')}, float[B, {H}, P, {D}] past_k, float[B, {H}, P, 24] past_v",
        outputs=f"float[B, S, 96] Y, float[B, {H}, PT, {D}] keys, float[B, {H}, PT, 24] values",
        wide=np.array([0, 0, H, 24]),
        wide_merge=np.array([0, 0, 96]),
    )
    check_fused(model, run, past=3)


def test_merged_keys_with_values_per_head(from_text):
    body = f"{SPLIT_Q} {SPLIT_K} {SCORES} {SOFTMAX} {MERGE}"
    model = build(from_text, body, inputs=f"{INPUTS}, float[B, {H}, T, {D}] V")
    check_left(model, PER_HEAD)


@pytest.mark.parametrize("opset", [12, 27])
def test_opsets_without_a_body(from_text, opset):
    check_left(build(from_text, PLAIN, opset=opset), f"opset {opset} is none of 13 to 26")


def test_unknown_shapes(from_text):
    """Without the last dimension of the queries, nothing says that a Reshape keeps the rows."""
    model = build(from_text, PLAIN, inputs=INPUTS.replace(f"S, {E}", "S, W"))
    check_left(model, PER_HEAD)


def test_inside_a_subgraph(from_text):
    body = f"""Y = If(C) <then_branch = t () => (float[B, S, {E}] Y1) {{ {PLAIN.replace("Y =", "Y1 =")} }},
                          else_branch = e () => (float[B, S, {E}] Y2) {{ Y2 = Identity(q) }}>"""
    model = build(from_text, body, inputs=f"{INPUTS}, bool C")
    check_left(model, "lies in a function or in the body of If, Loop or Scan")


def test_inside_a_function(from_text):
    function = f"""<domain: "local", opset_import: ["" : 17]>
                   attend (q, k, v, split, merge, scale) => (Y) {{ {PLAIN} }}"""
    model = build(from_text, "Y = local.attend(q, k, v, split, merge, scale)", functions=function)
    check_left(model, "lies in a function or in the body of If, Loop or Scan")


def test_onnx_attention(from_text):
    body = f"Y = Attention<q_num_heads = {H}, kv_num_heads = {H}>(q, k, v)"
    check_left(build(from_text, body, opset=23), "is fused already, as ONNX Attention")


def test_nodes_that_are_fused_already(from_text):
    """As the model builder for generation writes them."""
    body = f"""G, pk, pv = com.microsoft.GroupQueryAttention<num_heads = {H}, kv_num_heads = {H}, do_rotary = 1>(
                   q, k, v, past_k, past_v, lengths, total, cos, sin)
               Y = com.microsoft.MultiHeadAttention<num_heads = {H}>(G, k, v)"""
    cache = f"float[B, {H}, P, {D}]"
    inputs = f"""{INPUTS}, {cache} past_k, {cache} past_v, int32[B] lengths, int32 total,
                 float[32, 8] cos, float[32, 8] sin"""
    outputs = f"float[B, S, {E}] Y, {cache} pk, {cache} pv"
    model = build(from_text, body, inputs=inputs, outputs=outputs)
    check_left(model, None)


# -- the border --------------------------------------------------------------------------------------------


def test_one_of_two_is_fused_and_the_other_named(from_text, run):
    second = PLAIN.replace("Y =", "x =")
    body = f"{second} Y = Identity(x) a = MatMul(q, k9) b = Softmax(a) Z = MatMul(b, v)"
    model = build(
        from_text,
        body,
        inputs=f"{INPUTS}, float[B, {E}, T] k9",
        outputs=f"float[B, S, {E}] Y, float[B, S, {E}] Z",
    )
    given = feeds(model, 2, 3, 5)
    expected = run(model, given)
    result = FUSE(model)
    assert result.statistics == {"found": 2, "fused": 1}
    assert [(place.place, place.reason) for place in result.declined] == [
        ("b", "scores are not known to be [batch, heads, queries, keys]")
    ]
    assert_same(expected, run(model, given))


def test_names_that_are_taken(from_text, run):
    body = MASKED.replace("Y = Reshape(r, merge)", "y = Reshape(r, merge) Y = Add(y, taken)")
    body = body.replace("M = Add(S, mask)", "M = Where(keep, S, lowest)")
    model = build(from_text, body, inputs=f"{INPUTS}, bool[T] keep, float taken")
    model.graph.inputs[-1].name = "P.Where"
    check_fused(model, run, special={"keep": lambda rng, shape: np.arange(*shape) > 0})
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    names = [value.name for value in (*values, *(out for node in model.graph for out in node.outputs))]
    assert "P.Where.1" in names
    assert len(names) == len(set(names))


def test_after_the_clean_up_and_with_metadata(from_text, run):
    model = build(from_text, PLAIN)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.name = "layer.0/softmax"
    softmax.metadata_props["module"] = "layer.0"
    Pipeline((*CLEAN_PASSES, FUSE))(model)
    assert fused(model).name == "layer.0/softmax"
    assert fused(model).metadata_props["module"] == "layer.0"
