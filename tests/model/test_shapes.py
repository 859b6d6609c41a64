"""What shapes are known, and whether what follows from them holds for all sizes: NumPy is asked for many of them."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.model.shapes import Shapes, agree, broadcast, keeps, same

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
