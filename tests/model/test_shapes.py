"""What shapes are known, and whether what follows from them holds for all sizes: NumPy is asked for many of them."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.model import model_io
from sparse_onnx.model.shapes import Shapes, agree, broadcast, keeps, same, without_claims

SYMBOLS = ("A", "B", "C")
DIMS = st.one_of(st.sampled_from([0, 1, 1, 2, 3]), st.sampled_from(SYMBOLS), st.none())
SHAPES = st.lists(DIMS, max_size=4).map(tuple)


def concrete(shapes, random):
    """Twenty choices of sizes 0 to 3 for the symbols and the unknown dimensions: the shapes, and the symbols' sizes."""
    for _ in range(20):
        names = {symbol: random.randint(0, 3) for symbol in SYMBOLS}
        yield (
            [tuple(random.randint(0, 3) if d is None else names.get(d, d) for d in s) for s in shapes],
            names,
        )


def result(shapes):
    """What NumPy makes of these shapes; None: they do not broadcast, so that no valid model has them."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


@given(st.lists(SHAPES, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_broadcast_holds_for_all_sizes(shapes, random):
    told = broadcast(*shapes)
    for sizes, names in concrete(shapes, random):
        made = result(sizes)
        if made is not None:
            assert len(made) == len(told)
            assert all(
                dim is None or names.get(dim, dim) == size for size, dim in zip(made, told, strict=True)
            )


@given(SHAPES, st.lists(SHAPES, max_size=2), st.randoms(use_true_random=False))
def test_what_keeps_a_shape_keeps_it_for_all_sizes(shape, others, random):
    if keeps(shape, *others):
        for sizes, _ in concrete([shape, *others], random):
            assert result(sizes) in (None, sizes[0])


@given(SHAPES, SHAPES, st.randoms(use_true_random=False))
def test_shapes_that_agree_are_equal_for_all_sizes(one, other, random):
    if agree(one, other):
        assert all(first == second for (first, second), _ in concrete([one, other], random))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(3, 3, True), ("N", "N", True), (3, 4, False), ("N", "M", False), (None, None, False), (1, "N", False)],
)
def test_same(one, other, expected):
    assert same(one, other) is expected


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([], ()),
        ([("B", 1, 4), ("S", 4)], ("B", "S", 4)),
        ([("B", 4), ("C", 4)], (None, 4)),
        ([("B",), (7,)], (7,)),
        ([(1,), (1, 1)], (1, 1)),
        ([("B",), ("B",), (1,)], ("B",)),
        ([("B",), (None,)], (None,)),
        ([(0,), (1,)], (0,)),
    ],
)
def test_broadcast(shapes, expected):
    assert broadcast(*shapes) == expected


@pytest.mark.parametrize(
    ("shape", "other", "expected"),
    [
        (("B", 4), (), True),
        (("B", 4), (1, 4), True),
        (("B", 4), ("B", 1), True),
        (("B", 4), (None,), True),  # 4 stays 4, whatever fits
        (("B", 4), ("C", 4), False),
        (("B", 4), (2, 4), False),  # B may be 1
        ((1, 4), ("B", 4), False),
        ((None, 4), (None, 4), False),
        ((4,), (1, 1), False),  # another axis
        ((), (1,), False),
    ],
)
def test_keeps(shape, other, expected):
    assert keeps(shape, other) is expected


def model_of(text, opset=17):
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {text}'))


def value_of(model, name):
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return next(value for value in values if value.name == name)


def test_inference_is_asked_and_the_model_stays_as_it_is():
    model = model_of(
        "g (float[B, S, 2] X) => (float[B, S, D] Y) <float[2, 1] W = {1, 2}> { h = MatMul(X, W) Y = Relu(h) }"
    )
    shapes = Shapes(model)
    h = value_of(model, "h")
    assert shapes.dims(h) == ("B", "S", 1)
    assert shapes.rank(h) == 3
    assert shapes.is_float32(h)
    assert h.shape is None


def test_names_for_any_size_are_no_symbols():
    model = model_of(
        "g (float[B, 4] X, float[C, 4] Z) => (float[D, 4] Y) { h = Relu(X) i = Relu(Z) Y = Add(h, i) }"
    )
    for value in model.graph.inputs:
        value.shape = ir.Shape(["?", 4])
    shapes = Shapes(model)
    h, i = (shapes.dims(value_of(model, name)) for name in ("h", "i"))
    assert h[1] == i[1] == 4
    assert not same(h[0], i[0])
    model.graph.inputs[0].shape = ir.Shape([-1, 4])
    model.graph.inputs[1].shape = ir.Shape([None, 4])
    shapes = Shapes(model)
    assert not agree(*(shapes.dims(value_of(model, name)) for name in ("X", "Z")))
    assert not same(shapes.dims(value_of(model, "h"))[0], -1)


def test_given_inputs_replace_what_the_model_declares():
    model = model_of("g (float[B, S, 6] X) => (float[B, S, 6] Y) { h = Relu(X) Y = Relu(h) }")
    value_of(model, "h").shape = ir.Shape(["B", "S", 6])
    found = Shapes(model, inputs={"X": (2, 3, 6)})
    assert found.sizes() == {"X": (2, 3, 6), "h": (2, 3, 6), "Y": (2, 3, 6)}
    assert found.dims(value_of(model, "h")) == (2, 3, 6)


def test_a_model_that_inference_refuses_still_has_what_it_declares():
    model = model_of("g (float[B, 4] X) => (float[B, 4] Y) { h = Frobnicate(X) Y = Relu(h) }")
    shapes = Shapes(model)
    assert shapes.dims(value_of(model, "X")) == ("B", 4)
    assert shapes.rank(value_of(model, "h")) is None
    assert shapes.dims(value_of(model, "h")) == ()


BLIND = "g (float[%s, 4] X, int64[K] s) => (float[N, M] Y) { h = Reshape(X, s) Y = Relu(h) }"


def test_runs_fill_in_what_inference_does_not_know():
    model = model_of(BLIND % "B")
    h = value_of(model, "h")
    assert Shapes(model).rank(h) is None
    runs = [{"X": (2, 4), "s": (2,), "h": (2, 4)}, {"X": (3, 4), "s": (2,), "h": (3, 4)}]
    shapes = Shapes(model, runs=runs)
    assert shapes.dims(h) == (None, 4)
    assert shapes.assumed == {"h"}
    one = Shapes(model, runs=runs[:1])  # 4 may be twice the batch
    assert one.dims(h) == (None, None)
    assert one.rank(h) == 2


def test_one_run_tells_all_if_the_inputs_have_fixed_sizes():
    model = model_of((BLIND % "2").replace("int64[K]", "int64[2]"))
    run = {"X": (2, 4), "s": (2,), "h": (8, 1)}
    assert Shapes(model, runs=[run]).dims(value_of(model, "h")) == (8, 1)


def test_runs_do_not_overrule_inference():
    model = model_of("g (float[B, 4] X) => (float[B, 4] Y) { h = Relu(X) Y = Relu(h) }")
    runs = [{"X": (2, 4), "h": (2, 4)}, {"X": (2, 4), "h": (2, 4)}]
    shapes = Shapes(model, runs=runs)
    assert shapes.dims(value_of(model, "h")) == ("B", 4)
    assert not shapes.assumed


def test_numbers_are_read_from_constants_and_from_known_dimensions():
    model = model_of("""g (float[B, S, 16] X) => (float Y) <int64[1] at = {2}> {
        s = Shape(X) d = Gather(s, at) f = Cast<to = 1>(d) r = Sqrt(f)
        one = Constant<value_float: float = 1.0>() i = Div(one, r) Y = Mul(i, i) }""")
    shapes = Shapes(model)
    assert shapes.number(value_of(model, "i")) == 0.25
    assert shapes.number(value_of(model, "i"), rank=1) == 0.25
    assert shapes.number(value_of(model, "i"), rank=0) is None
    assert shapes.number(value_of(model, "s")) is None


@pytest.mark.parametrize(("dims", "adds"), [((), False), ((1,), False), ((1, 1), False), ((1, 1, 1), True)])
def test_axes_that_a_constant_would_add(dims, adds):
    model = model_of("g (float[B, 4] X) => (float[B, 4] Y) <float c = {1}> { h = Relu(X) Y = Add(h, c) }")
    constant = model.graph.initializers["c"]
    constant.const_value = ir.tensor(np.ones(dims, np.float32), name="c")
    constant.shape = ir.Shape(dims)
    assert Shapes(model).may_add_axes(constant, value_of(model, "h")) is adds


def values_in(model, body):
    """The values of the body of that name, by their names."""
    (graph,) = (graph for graph in model.graph.subgraphs() if graph.name == body)
    return {
        value.name: value for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]
    }


BRANCHES = """g (float[B, 4] X, bool c) => (float[M, N] Y) {
    h = If (c) <then_branch = yes () => (float[K, L] e) { t = Relu(X) e = Concat<axis = 1>(t, X) },
                else_branch = no () => (float[K, L] e) { t = Transpose(X) e = Concat<axis = 0>(t, t) }>
    Y = Relu(h) }"""


def test_bodies_of_branches_are_looked_into_and_may_share_names():
    model = model_of(BRANCHES)
    for shapes, size in ((Shapes(model, inputs={}), "B"), (Shapes(model, inputs={"X": (3, 4)}), 3)):
        yes, no = values_in(model, "yes"), values_in(model, "no")
        assert (shapes.dims(yes["t"]), shapes.dims(no["t"])) == ((size, 4), (4, size))
        assert shapes.dims(yes["e"])[1:] == (8,)
        assert shapes.dims(no["e"])[0] == 8
        assert shapes.is_float32(yes["t"])
    assert shapes.fixed(no["e"]) == (8, 3)
    assert "t" not in shapes.sizes()


LOOP = """g (float[5, 6] X, int64 n, bool c) => (float[A, B] Y, float[P, Q, R] Z) {
    Y, Z = Loop (n, c, X) <body = steps (int64 i, bool go, float[5, 6] h) => (bool on, float[A, B] k, float[A, B] z) {
        on = Identity(go) k = Relu(h) t = Transpose(k)
        z = If (on) <then_branch = inside () => (float[A, B] u) { m = MatMul(t, h) u = Relu(m) },
                     else_branch = beside () => (float[A, B] w) { m = Concat<axis = 1>(t, t) w = Relu(m) }> }> }"""


def test_bodies_in_bodies_are_looked_into():
    model = model_of(LOOP)
    shapes = Shapes(model)
    assert shapes.dims(values_in(model, "steps")["h"]) == (5, 6)
    assert shapes.dims(values_in(model, "steps")["t"]) == (6, 5)
    assert shapes.dims(values_in(model, "inside")["m"]) == (6, 6)
    assert shapes.dims(values_in(model, "beside")["m"]) == (6, 10)


def test_a_scan_gives_its_body_one_slice():
    model = model_of("""g (float[7, B, 4] X) => (float[A, C, D] Y) {
        Y = Scan<num_scan_inputs = 1, body = step (float[C, D] x) => (float[C, D] y) {
            t = Transpose(x) y = Relu(t) }>(X) }""")
    t = values_in(model, "step")["t"]
    assert Shapes(model, inputs={"X": (7, 3, 4)}).fixed(t) == (4, 3)


CHAIN = """one = Constant<value_ints: ints = [1]>() two = Constant<value_ints: ints = [2]>()
    a = Transpose<perm = [1, 0, 2]>(X) b = Shape(a) c = Slice(b, one, two) d = Reshape(X, two)
    e = Concat<axis = 2>(a, a)"""


def test_a_body_is_known_as_the_same_nodes_would_be_in_the_main_graph():
    main = model_of(f"g (float[B, S, 4] X) => (float[P, Q, R] e) {{ {CHAIN} }}")
    inner = model_of(f"""g (float[B, S, 4] X, bool t) => (float[P, Q, R] Y) {{
        Y = If (t) <then_branch = yes () => (float[P, Q, R] f) {{ {CHAIN} f = Relu(e) }},
                    else_branch = no () => (float[P, Q, R] g) {{ g = Relu(X) }}> }}""")
    shapes, known = Shapes(main, inputs={}), Shapes(inner, inputs={})
    values = values_in(inner, "yes")
    for name in "abcde":
        assert known.dims(values[name]) == shapes.dims(value_of(main, name))
        assert known.element_type(values[name]) == shapes.element_type(value_of(main, name)) != 0
    assert known.dims(values["a"]) == ("S", "B", 4)
    assert known.dims(values["e"]) == ("S", "B", 8)


def test_values_of_bodies_are_known_of_the_model_itself_only():
    """A copy may have been changed, and names of bodies say too little."""
    model = model_of(BRANCHES)
    shapes, copy = Shapes(model, inputs={}), model.clone()
    assert shapes.dims(value_of(copy, "X")) == ("B", 4)
    assert shapes.rank(values_in(copy, "yes")["t"]) is None
    later = ir.node("Relu", [values_in(model, "yes")["t"]])
    values_in(model, "yes")["t"].producer().graph.append(later)
    later.outputs[0].shape = ir.Shape([7])
    assert shapes.dims(later.outputs[0]) == (7,), "what it says itself"


def test_a_copy_without_claims_shares_the_weights_and_says_nothing_else():
    model = model_of(BRANCHES.replace("float[K, L] e", "float[9, 9] e"))
    value_of(model, "h").shape = ir.Shape([9, 9])
    copy = without_claims(model)
    made = [value for graph in copy.graphs() for node in graph for value in node.outputs]
    assert len(made) == 6
    assert all(value.shape is None for value in made)
    assert copy.graph.inputs[0].shape == model.graph.inputs[0].shape
    assert value_of(model, "h").shape == ir.Shape([9, 9]), "the model is left as it was"
    weighted = model_of("g (float[B, 2] X) => (float[B, 1] Y) <float[2, 1] W = {1, 2}> { Y = MatMul(X, W) }")
    shared = without_claims(weighted).graph.initializers["W"].const_value
    assert shared is weighted.graph.initializers["W"].const_value


def test_names_may_be_given_to_inputs():
    model = model_of("g (float[B, S, 6] X) => (float[P, Q, R] Y) { Y = Transpose(X) }")
    model.graph.inputs[0].shape = ir.Shape([None, "S", 6])
    shapes = Shapes(model, inputs={"X": ("X.0", None, 6)})
    assert shapes.dims(value_of(model, "Y"))[0] == 6
    assert shapes.dims(value_of(model, "Y"))[2] == "X.0"
    assert shapes.dims(value_of(model, "X")) == ("X.0", None, 6)


@pytest.mark.parametrize(
    ("dims", "sizes"), [("", ()), ("2, 3", (2, 3)), ("0", (0,)), ("B, 3", None), (None, None)]
)
def test_sizes_are_fixed_if_all_are_known(dims, sizes):
    text = f"float[{dims}]" if dims else "float"
    model = model_of(f"g ({text} X) => ({text} Y) {{ Y = Relu(X) }}")
    if dims is None:
        model.graph.inputs[0].shape = None
    assert Shapes(model, inputs={}).fixed(value_of(model, "Y")) == sizes
    assert Shapes(model, inputs={}).fixed(None) is None


def test_a_graph_that_is_too_large_for_inference_says_what_it_declares(monkeypatch):
    model = model_of(BRANCHES)
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", -1)
    shapes = Shapes(model, inputs={})
    assert shapes.dims(value_of(model, "X")) == ("B", 4)
    assert shapes.rank(value_of(model, "h")) is None
    assert shapes.rank(values_in(model, "yes")["t"]) is None
    assert shapes.sizes() == {}
