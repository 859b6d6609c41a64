"""Attention heads, in the forms that exporters write, against attention in NumPy."""

import dataclasses

import numpy as np
import pytest

from sparse_onnx.passes.structured.heads import Heads

B, S, H, D, E = 3, 7, 6, 4, 24

SPLIT = """{x}r = Reshape({x}, {shape}) {x}h = Transpose<perm = [0, 2, 1, 3]>({x}r)"""
PROJECT = "{x}m = MatMul(X, w{x}) {x} = Add({x}m, b{x})"
OUT = """c = MatMul(p, vh) t = Transpose<perm = [0, 2, 1, 3]>(c) m = Reshape(t, {merged})
         om = MatMul(m, wo) Y = Add(om, bo)"""
SCORES = (
    "kt = Transpose<perm = [0, 1, 3, 2]>(kh) s = MatMul(qh, kt) z = Mul(s, scale) p = Softmax<axis = -1>(z)"
)
PROJECTIONS = " ".join(PROJECT.format(x=x) for x in "qkv")


def plain(shape="fixed", merged="joined", scores=SCORES):
    splits = " ".join(SPLIT.format(x=x, shape=shape) for x in "qkv")
    return f"{PROJECTIONS} {splits} {scores} {OUT.format(merged=merged)}"


ASKED = """xs = Shape(X) batch = Gather(xs, i0) length = Gather(xs, i1) bu = Unsqueeze(batch, a0)
           lu = Unsqueeze(length, a0) four = Concat<axis = 0>(bu, lu, hs, ds) three = Concat<axis = 0>(bu, lu, es)"""
ASKED_OF_Q = ASKED.replace("Shape(X)", "Shape(q)")

FORMS = {
    "constant shapes": plain(),
    "batch copied": plain("copied", "copied3"),
    "shapes computed": f"{ASKED} {plain('four', 'three')}",
    "shapes computed from q": plain("four", "three").replace("qr = ", f"{ASKED_OF_Q} qr = "),
    "scaled queries": plain().replace(
        "s = MatMul(qh, kt) z = Mul(s, scale)", "qz = Mul(qh, scale) z = MatMul(qz, kt)"
    ),
    "keys transposed at once": plain()
    .replace("kh = Transpose<perm = [0, 2, 1, 3]>(kr)", "kt = Transpose<perm = [0, 2, 3, 1]>(kr)")
    .replace("kt = Transpose<perm = [0, 1, 3, 2]>(kh) ", ""),
    "keys transposed as matrices": plain(
        "copied",
        scores="""kb = Reshape(kh, matrices) kx = Transpose<perm = [0, 2, 1]>(kb) kt = Reshape(kx, back)
                  s = MatMul(qh, kt) z = Mul(s, scale) p = Softmax<axis = -1>(z)""",
    ),
    "rows of all samples": f"""{ASKED} rows = Reshape(X, flat) q2 = Gemm(rows, wq, bq) k2 = Gemm(rows, wk, bk)
        v2 = Gemm(rows, wv, bv) {plain("four", "flat").removeprefix(PROJECTIONS)}""".replace(
        "Reshape(q,", "Reshape(q2,"
    )
    .replace("Reshape(k,", "Reshape(k2,")
    .replace("Reshape(v,", "Reshape(v2,")
    .replace("om = MatMul(m, wo) Y = Add(om, bo)", "o2 = Gemm(m, wo, bo) Y = Reshape(o2, three)"),
    "NaN to zero": plain().replace(
        "p = Softmax<axis = -1>(z)", "u = Softmax<axis = -1>(z) n = IsNaN(u) p = Where(n, nought, u)"
    ),
    "mask": plain().replace("p = Softmax<axis = -1>(z)", "a = Add(z, mask) p = Softmax<axis = -1>(a)"),
    "bias for each head": plain().replace(
        "p = Softmax<axis = -1>(z)", "a = Add(z, headbias) p = Softmax<axis = -1>(a)"
    ),
    "normalized queries": plain().replace(
        "s = MatMul(qh, kt)", "qn = LayerNormalization<axis = -1>(qh, gain) s = MatMul(qn, kt)"
    ),
}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    found = {f"w{x}": (rng.standard_normal((E, E)) / np.sqrt(E)).astype(np.float32) for x in "qkvo"}
    found["wq"] *= 2
    found |= {f"b{x}": rng.standard_normal(E).astype(np.float32) for x in "qkvo"}
    found |= {
        "fixed": np.array([0, -1, H, D]),
        "joined": np.array([0, -1, E]),
        "copied": np.array([0, 0, H, D]),
        "copied3": np.array([0, 0, E]),
        "matrices": np.array([-1, S, D]),
        "back": np.array([-1, H, D, S]),
        "flat": np.array([-1, E]),
        "i0": np.array(0),
        "i1": np.array(1),
        "a0": np.array([0]),
        "hs": np.array([H]),
        "ds": np.array([D]),
        "es": np.array([E]),
    }
    found |= {
        "scale": np.float32(D**-0.5),
        "nought": np.float32(0),
        "gain": rng.uniform(0.5, 1.5, D).astype(np.float32),
        "mask": np.where(np.tri(S, dtype=bool), 0, -1e4).astype(np.float32)[None, None],
        "headbias": rng.standard_normal((1, H, S, S)).astype(np.float32),
    }
    return {name: np.asarray(array) for name, array in found.items()}


def used(body, given):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in given.items() if name in words}


@pytest.fixture
def build(from_text):
    def build(body, given, outputs=f"float[B, S, {E}] Y", inputs=f"float[B, S, {E}] X"):
        if "matrices" in body:
            inputs = inputs.replace("S,", f"{S},")
        text = f'<ir_version: 10, opset_import: ["" : 22]> g ({inputs}) => ({outputs}) {{ {body} }}'
        return from_text(text, **used(body, given))

    return build


def batches(count=20, seed=1):
    rng = np.random.default_rng(seed)
    return [{"X": rng.standard_normal((B, S, E)).astype(np.float32)} for _ in range(count)]


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


def heads_of(before, after, size=D):
    """Which heads the columns of ``after`` are."""
    first = [
        next(i for i in range(before.shape[1]) if np.array_equal(before[:, i], column)) for column in after.T
    ]
    heads = [one // size for one in first[::size]]
    assert first == [head * size + i for head in heads for i in range(size)]
    return heads


@dataclasses.dataclass
class Reference:
    """Attention with the projections of ``kept`` heads of the original, and an output projection of its own."""

    given: dict[str, np.ndarray]
    kept: list[int]
    body: str

    def heads(self, x, X):
        projected = X @ self.given[f"w{x}"] + self.given[f"b{x}"]
        return projected.reshape(B, S, H, D).transpose(0, 2, 1, 3)[:, self.kept].astype(np.float64)

    def __call__(self, X, wo, bo):
        q, k, v = (self.heads(x, X) for x in "qkv")
        if "LayerNormalization" in self.body:
            q = (
                (q - q.mean(-1, keepdims=True))
                / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
                * self.given["gain"]
            )
        scores = q @ k.transpose(0, 1, 3, 2) * self.given["scale"]
        if "headbias" in self.body:
            scores = scores + self.given["headbias"][:, self.kept]
        if " mask" in self.body:
            scores = scores + self.given["mask"]
        p = np.exp(scores - scores.max(-1, keepdims=True))
        joined = (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(B, S, -1)
        return joined @ wo + bo


@pytest.mark.parametrize("form", FORMS)
def test_every_form(build, run, remove, form):
    given = tensors()
    model = build(FORMS[form], given)
    result = remove(Heads(sparsity=2 / 6), model, batches())
    assert result.declined == ()
    assert result.statistics["removed"] == 2
    assert [array(model, f"w{x}").shape for x in "qkvo"] == [(E, 16)] * 3 + [(16, E)]
    kept = heads_of(given["wq"], array(model, "wq"))
    assert kept == heads_of(given["wv"], array(model, "wv"))
    X = batches(1, seed=5)[0]["X"]
    expected = Reference(given, kept, FORMS[form])(X, array(model, "wo"), array(model, "bo"))
    np.testing.assert_allclose(run(model, {"X": X})["Y"], expected, atol=2e-5)
    # Batch and length stay free.
    assert run(model, {"X": X[:1]})["Y"].shape == (1, S, E)


def test_computed_shapes_that_nobody_needs_any_more_go(build, remove):
    model = build(FORMS["shapes computed"], tensors())
    remove(Heads(sparsity=0.5), model, batches())
    assert {node.op_type for node in model.graph} == {
        "MatMul",
        "Add",
        "Reshape",
        "Transpose",
        "Mul",
        "Softmax",
    }
    assert not {"four", "three", "hs", "ds", "es", "i0"} & set(model.graph.initializers)


def test_doubled_and_silent_heads_go_without_a_trace(build, run, remove):
    given = tensors()
    for x in "qkv":
        given[f"w{x}"][:, 4 * D : 5 * D] = given[f"w{x}"][:, D : 2 * D]
        given[f"b{x}"][4 * D : 5 * D] = given[f"b{x}"][D : 2 * D]
    given["wv"][:, 2 * D : 3 * D] = 0  # what it gives is its bias
    model = build(FORMS["constant shapes"], given)
    feeds = batches(1, seed=5)[0]
    expected = run(model, feeds)["Y"]
    remove(Heads(sparsity=2 / 6, dampening_frac=1e-7), model, batches(40))
    assert array(model, "wo").shape == (16, E)
    np.testing.assert_allclose(run(model, feeds)["Y"], expected, atol=1e-5)


def test_it_removes_the_heads_that_are_missed_least(build, run, remove):
    given = tensors()
    given["wv"][:, 3 * D : 4 * D] *= 1e-3
    given["wo"][5 * D :] *= 1e-3
    model = build(FORMS["constant shapes"], given)
    remove(Heads(sparsity=2 / 6), model, batches())
    assert heads_of(given["wq"], array(model, "wq")) == [0, 1, 2, 4]


GROUPS = 3
GROUPED = f"""{PROJECTIONS} {SPLIT.format(x="q", shape="fixed")} {SPLIT.format(x="k", shape="fewer")}
    {SPLIT.format(x="v", shape="fewer")}
    ku = Unsqueeze(kh, a2) ke = Expand(ku, five) kg = Reshape(ke, again)
    vu = Unsqueeze(vh, a2) ve = Expand(vu, five) vg = Reshape(ve, again)
    kt = Transpose<perm = [0, 1, 3, 2]>(kg) s = MatMul(qh, kt) z = Mul(s, scale) p = Softmax<axis = -1>(z)
    {OUT.format(merged="joined").replace("vh", "vg")}"""


def grouped_tensors():
    given = tensors()
    for x in "kv":
        given[f"w{x}"], given[f"b{x}"] = (
            given[f"w{x}"][:, : GROUPS * D].copy(),
            given[f"b{x}"][: GROUPS * D].copy(),
        )
    return given | {
        "fewer": np.array([0, -1, GROUPS, D]),
        "a2": np.array([2]),
        "five": np.array([1, 1, H // GROUPS, 1, 1]),
        "again": np.array([0, H, -1, D]),
    }


def test_heads_that_share_keys_and_values_go_together(build, run, remove):
    given = grouped_tensors()
    model = build(GROUPED, given)
    result = remove(Heads(sparsity=1 / 3), model, batches())
    assert result.declined == ()
    assert [array(model, f"w{x}").shape[1] for x in "qkv"] == [16, 8, 8]
    groups = heads_of(given["wk"], array(model, "wk"))
    kept = [2 * group + i for group in groups for i in range(2)]
    assert heads_of(given["wq"], array(model, "wq")) == kept
    wide = dict(given)
    for x in "kv":
        wide[f"w{x}"] = np.repeat(given[f"w{x}"].reshape(E, GROUPS, D), 2, axis=1).reshape(E, E)
        wide[f"b{x}"] = np.repeat(given[f"b{x}"].reshape(GROUPS, D), 2, axis=0).reshape(E)
    X = batches(1, seed=5)[0]["X"]
    expected = Reference(wide, kept, "")(X, array(model, "wo"), array(model, "bo"))
    np.testing.assert_allclose(run(model, {"X": X})["Y"], expected, atol=2e-5)


def packed_tensors(sizes):
    """One weight for queries, keys and values, in this order."""
    given = grouped_tensors() if sizes[1] < E else tensors()
    given["wp"] = np.hstack([given[f"w{x}"] for x in "qkv"])
    given["bp"] = np.hstack([given[f"b{x}"] for x in "qkv"])
    return given | {
        "sizes": np.array(sizes),
        "five": np.array([0, -1, 3, H, D]),
        "i2": np.array(2),
        "a0": np.array([0]),
    }


PACKED = "pm = MatMul(X, wp) pb = Add(pm, bp) "
ATTEND = plain().removeprefix(PROJECTIONS)
APART = f"{PACKED} r = Reshape(pb, five) t5 = Transpose<perm = [2, 0, 3, 1, 4]>(r) "
ATTEND_APART = f"{SCORES} {OUT.format(merged='joined')}"
PACKINGS = {
    "split": f"{PACKED} q, k, v = Split<axis = 2>(pb, sizes) {ATTEND}",
    "equal split": f"{PACKED} q, k, v = Split<axis = -1, num_outputs = 3>(pb) {ATTEND}",
    "gathers": APART + f"qh = Gather(t5, i0) kh = Gather(t5, i1) vh = Gather(t5, i2) {ATTEND_APART}",
    "split and squeeze": APART
    + f"""q1, k1, v1 = Split<axis = 0, num_outputs = 3>(t5)
          qh = Squeeze(q1, a0) kh = Squeeze(k1, a0) vh = Squeeze(v1, a0) {ATTEND_APART}""",
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_queries_keys_and_values_from_one_layer(build, run, remove, packing):
    given = packed_tensors([E, E, E])
    model = build(PACKINGS[packing], given)
    result = remove(Heads(sparsity=2 / 6), model, batches())
    assert result.declined == ()
    assert array(model, "wp").shape == (E, 48)
    parts = np.split(array(model, "wp"), 3, axis=1)
    kept = heads_of(given["wq"], parts[0])
    assert kept == heads_of(given["wk"], parts[1]) == heads_of(given["wv"], parts[2])
    X = batches(1, seed=5)[0]["X"]
    expected = Reference(given, kept, "")(X, array(model, "wo"), array(model, "bo"))
    np.testing.assert_allclose(run(model, {"X": X})["Y"], expected, atol=2e-5)


def test_grouped_queries_from_one_layer(build, run, remove):
    given = packed_tensors([E, GROUPS * D, GROUPS * D]) | {"five": grouped_tensors()["five"]}
    model = build(f"{PACKED} q, k, v = Split<axis = 2>(pb, sizes) {GROUPED.removeprefix(PROJECTIONS)}", given)
    result = remove(Heads(sparsity=1 / 3), model, batches())
    assert result.declined == ()
    assert array(model, "wp").shape == (E, 16 + 8 + 8)
    q, k, v = np.split(array(model, "wp"), [16, 24], axis=1)
    groups = heads_of(given["wk"], k)
    assert groups == heads_of(given["wv"], v)
    assert heads_of(given["wq"], q) == [2 * group + i for group in groups for i in range(2)]
    assert run(model, batches(1)[0])["Y"].shape == (B, S, E)


ROTARY = "{x}a = Slice({x}h, i0s, half, a3) {x}b = Slice({x}h, half, end, a3) {x}n = Neg({x}b) " + (
    "{x}c = Concat<axis = -1>({x}n, {x}a) {x}1 = Mul({x}h, cos) {x}2 = Mul({x}c, sin) {x}t = Add({x}1, {x}2)"
)


def test_rotary_embeddings(build, run, remove):
    body = plain().replace(
        SCORES,
        f"{ROTARY.format(x='q')} {ROTARY.format(x='k')} kz = Transpose<perm = [0, 1, 3, 2]>(kt) s = MatMul(qt, kz) "
        "z = Mul(s, scale) p = Softmax<axis = -1>(z)",
    )
    angles = np.arange(S)[:, None] * np.array([1.0, 0.1, 1.0, 0.1])
    given = tensors() | {
        "i0s": np.array([0]),
        "half": np.array([2]),
        "end": np.array([D]),
        "a3": np.array([3]),
        "cos": np.cos(angles).astype(np.float32)[None, None],
        "sin": np.sin(angles).astype(np.float32)[None, None],
    }
    model = build(body, given)
    result = remove(Heads(sparsity=0.5), model, batches())
    assert result.declined == ()
    kept = heads_of(given["wq"], array(model, "wq"))
    small = {**given, "fixed": np.array([0, -1, 3, D]), "joined": np.array([0, -1, 3 * D])}
    columns = [head * D + i for head in kept for i in range(D)]
    for x in "qkv":
        small |= {f"w{x}": given[f"w{x}"][:, columns], f"b{x}": given[f"b{x}"][columns]}
    small |= {"wo": array(model, "wo"), "bo": array(model, "bo")}
    feeds = batches(1, seed=5)[0]
    np.testing.assert_allclose(run(model, feeds)["Y"], run(build(body, small), feeds)["Y"], atol=2e-5)


LEFT = {
    "keys come from a cache": (
        plain()
        .replace(
            "kt = Transpose<perm = [0, 1, 3, 2]>(kh)",
            "ka = Concat<axis = 2>(past, kh) kt = Transpose<perm = [0, 1, 3, 2]>(ka)",
        )
        .replace("vh) t", "vl) t")
        .replace("c = ", "vl = Concat<axis = 2>(past, vh) c = "),
        {"inputs": f"float[B, S, {E}] X, float[B, {H}, P, {D}] past"},
        "past, which is given from outside",
    ),
    "weights of attention are an output": (
        plain(),
        {"outputs": f"float[B, S, {E}] Y, float[B, {H}, S, S] p"},
        "p, an output of the model",
    ),
    "heads are mixed": (
        plain().replace(
            "t = Transpose<perm = [0, 2, 1, 3]>(c)",
            "l = Softmax<axis = 1>(c) t = Transpose<perm = [0, 2, 1, 3]>(l)",
        ),
        {},
        "mixes the units",
    ),
    "one weight for queries and keys": (
        plain().replace("km = MatMul(X, wk)", "km = MatMul(X, wq)"),
        {},
        "wq is shared by several layers",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_lose_heads_is_left_and_named(build, remove, case):
    body, options, reason = LEFT[case]
    model = build(body, tensors(), **options)
    data = [
        feeds | ({"past": np.zeros((B, H, 2, D), np.float32)} if "past" in body else {})
        for feeds in batches(2)
    ]
    result = remove(Heads(sparsity=0.5), model, data)
    assert not result.modified
    assert reason in {item.place: item.reason for item in result.declined}["wo"]


def test_an_mlp_has_no_heads(build):
    model = build("m = MatMul(X, wq) r = Relu(m) Y = MatMul(r, wo)", tensors())
    result = Heads(sparsity=0.5)(model)
    assert not result.modified
    assert result.declined == ()
