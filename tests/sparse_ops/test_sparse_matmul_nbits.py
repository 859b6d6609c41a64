"""Products with weights of few bits without their zeros, with the library and on the function bodies."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_onnx.sparse_ops.domain import DOMAIN, EXACT_DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, read
from sparse_onnx.sparse_ops.ops import sparse_matmul, sparse_matmul_split
from sparse_onnx.sparse_ops.ops import sparse_matmul_nbits as smn
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

K, N = 150, 37
NODE = "decoder/layer.3/query"
PLAIN = [op_type for op_type, (base, _) in smn.OP_TYPES.items() if base == "SparseMatMul"]
BEHIND = [op_type for op_type in smn.OP_TYPES if op_type not in PLAIN]
every_op = pytest.mark.parametrize("op_type", PLAIN)
every_step = pytest.mark.parametrize("op_type", BEHIND)
both_ways = pytest.mark.parametrize("library", [True, False])


def activations(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def weight(packed_levels):
    def weight(op_type, k=K, n=N, **options):
        return packed_levels(k, n, smn.OP_TYPES[op_type].layout, **options)[0]

    return weight


def biases(n, seed=7):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def model(
    op_type, packed, *, x=("tokens", K), opset=17, arrays=None, attributes=None, exact=False, body=True
):
    """One node; ``arrays`` and ``attributes`` replace packed ones."""
    stored = {**packed.arrays(), "bias": biases(packed.N), **(arrays or {})}
    domain = EXACT_DOMAIN if exact else DOMAIN
    made = smn.exact_body(op_type, opset) if exact else smn.function_body(op_type, opset)
    given = {**packed.attributes(), **(attributes or {})}
    node = onnx.helper.make_node(op_type, ["X", *stored], [*made.output], NODE, domain=domain, **given)
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("X", float32, x)],
        [onnx.helper.make_tensor_value_info(y, float32, None) for y in made.output],
        [onnx.numpy_helper.from_array(array, key) for key, array in stored.items()],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(domain, VERSION)],
        functions=[made] if body else [],
    )


def expected(op_type, x, packed, split=()):
    return smn.reference(op_type, x, packed, biases(packed.N), split)


def reference(op_type, x, packed):
    """Of an operator with one output."""
    (y,) = expected(op_type, x, packed)
    return y


def assert_near(got, want, packed, x):
    """Up to the rounding of float32 sums."""
    assert got.shape == want.shape
    size = np.abs(x).max(initial=0) * np.abs(packed.unpack()).sum(0).max() + 3
    assert np.abs(got - want).max(initial=0) <= 1e-6 * size


@every_op
@both_ways
@pytest.mark.parametrize("shape", [(K,), (1, K), (7, K), (9, K), (0, K), (2, 5, K), (2, 0, K), (2, 3, 4, K)])
def test_computes_the_reference(op_type, library, shape, open_session, weight):
    x, packed = activations(*shape), weight(op_type)
    got = open_session(model(op_type, packed, x=[None] * (x.ndim - 1) + [K]), library=library).run(
        None, {"X": x}
    )[0]
    assert_near(got, reference(op_type, x, packed), packed, x)


@every_op
@pytest.mark.parametrize("opset", range(13, 27))
def test_body_of_every_opset(op_type, opset, open_session, weight):
    x, packed = activations(2, K), weight(op_type)
    got = open_session(model(op_type, packed, opset=opset), library=False).run(None, {"X": x})[0]
    assert_near(got, reference(op_type, x, packed), packed, x)


@every_op
@both_ways
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 5), (64, 16), (65, 17), (128, 48), (131, 3)])
def test_every_group_and_odd_sizes(op_type, library, group, k, n, open_session, weight):
    if group not in smn.OP_TYPES[op_type].layout.groups:
        group = 64
    x, packed = activations(3, k), weight(op_type, k, n, group=group)
    got = open_session(model(op_type, packed, x=(3, k)), library=library).run(None, {"X": x})[0]
    assert_near(got, reference(op_type, x, packed), packed, x)


@pytest.mark.parametrize("kept", range(1, 16))
@both_ways
def test_every_number_of_16(kept, library, open_session, weight):
    op_type = "SparseMatMulInt4Of16"
    x, packed = activations(5, K), weight(op_type, kept=kept)
    got = open_session(model(op_type, packed), library=library).run(None, {"X": x})[0]
    assert_near(got, reference(op_type, x, packed), packed, x)


@both_ways
@pytest.mark.parametrize("op_type", ["SparseMatMulInt4", "SparseMatMulInt4WithZeros", "SparseMatMulInt8"])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_every_share_of_zeros(op_type, library, density, open_session, weight):
    x, packed = activations(2, K), weight(op_type, density=density)
    got = open_session(model(op_type, packed), library=library).run(None, {"X": x})[0]
    assert_near(got, reference(op_type, x, packed), packed, x)


@every_op
@both_ways
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_in_every_output_of_their_token_and_in_no_other(
    op_type, library, special, open_session, weight
):
    x, packed = activations(3, K), weight(op_type)
    x[1, 70] = special
    got = open_session(model(op_type, packed), library=library).run(None, {"X": x})[0]
    assert np.isnan(got[1]).all()
    assert_near(got[::2], reference(op_type, x[::2], packed), packed, x[::2])


@every_op
@both_ways
def test_a_token_of_zeros_gives_the_bias(op_type, library, open_session, weight):
    packed = weight(op_type)
    got = open_session(model(op_type, packed), library=library).run(
        None, {"X": np.zeros((2, K), np.float32)}
    )[0]
    np.testing.assert_array_equal(got, np.stack([biases(N)] * 2))


@every_op
def test_the_exact_body_rounds_nothing(op_type, open_session, weight):
    x, packed = activations(4, K), weight(op_type)
    got = open_session(model(op_type, packed, exact=True), library=True).run(None, {"X": x})[0]
    exact = x.astype(np.float64) @ packed.unpack() + biases(N)
    assert_near(got, exact, packed, x)
    assert np.abs(reference(op_type, x, packed) - exact).max() > 100 * np.abs(got - exact).max()


@every_op
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_gives_the_same_answer(op_type, isa, run_forced, open_session, weight):
    x, packed = activations(9, K), weight(op_type)
    (got,) = run_forced(model(op_type, packed), {"X": x}, isa)
    assert_near(got, reference(op_type, x, packed), packed, x)
    usual = open_session(model(op_type, packed), library=True).run(None, {"X": x})[0]
    assert_near(got, usual, packed, x)


@every_op
def test_the_body_is_folded_when_the_model_is_loaded(op_type, tmp_path, weight):
    """Nothing of the decoder is left: one product with a constant."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    packed = weight(op_type)
    onnxruntime.InferenceSession(
        model(op_type, packed).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    folded = onnx.load(tmp_path / "folded.onnx")
    left = {node.op_type for node in folded.graph.node}
    assert left & {"MatMul", "Gemm"}
    assert not left & {"BitShift", "CumSum", "Gather", "ScatterElements", "Transpose", "Range", "Greater"}
    assert sum(onnx.numpy_helper.to_array(tensor).size == K * N for tensor in folded.graph.initializer) == 1


def test_op_types_are_registered():
    for op_type, (base, layout) in smn.OP_TYPES.items():
        assert OP_TYPES[op_type].stored is None
        assert smn.op_type_of(base, layout) == op_type
        assert [*OP_TYPES[op_type].function_body(17).input] == ["X", *layout.parts, "bias"]


def test_there_is_one_for_every_operator_on_floats_and_every_layout():
    floats = {*sparse_matmul.ACTIVATIONS, *sparse_matmul_split.OP_TYPES}
    for layout in LAYOUTS.values():
        assert {base for base, own in smn.OP_TYPES.values() if own == layout} == floats


SPLITS = {2: [32, 21], 3: [16, 32, 5]}


def narrow(*shape):
    """Activations so small that the exponential function does not overflow behind 8 bits."""
    return activations(*shape) / 50


def case(op_type):
    """The outputs, and what of them is each linear's."""
    base = smn.OP_TYPES[op_type].base
    split = next((SPLITS[count] for count, name in sparse_matmul_split.SPLITS.items() if name == base), ())
    return (64 if base in sparse_matmul_split.GATES.values() else sum(split) or N), split


def run_steps(op_type, packed, split, x, session):
    found = session.run(None, {"X": x})
    want = expected(op_type, x, packed, split)
    size = np.abs(x).max(initial=0) * np.abs(packed.unpack()).sum(0).max() + 3
    assert len(found) == len(want)
    for got, one in zip(found, want, strict=True):
        assert got.shape == one.shape
        bound = 2e-6 * size * (size if "Gate" in op_type else 1)
        assert np.abs(got - one).max(initial=0) <= bound


@every_step
@both_ways
@pytest.mark.parametrize("shape", [(K,), (2, 5, K), (0, K)])
def test_what_comes_behind_the_product(op_type, library, shape, open_session, weight):
    (n, split), x = case(op_type), narrow(*shape)
    packed = weight(op_type, n=n)
    attributes = {"split": split} if split else {}
    proto = model(op_type, packed, x=[None] * (x.ndim - 1) + [K], attributes=attributes)
    run_steps(op_type, packed, split, x, open_session(proto, library=library))


@every_step
@pytest.mark.parametrize("opset", [13, 18, 26])
def test_bodies_with_what_comes_behind(op_type, opset, open_session, weight):
    n, split = case(op_type)
    packed = weight(op_type, n=n)
    proto = model(op_type, packed, opset=opset, attributes={"split": split} if split else {})
    run_steps(op_type, packed, split, narrow(2, K), open_session(proto, library=False))


@every_step
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_with_what_comes_behind(op_type, isa, run_forced, weight):
    n, split = case(op_type)
    packed, x = weight(op_type, n=n), narrow(9, K)
    found = run_forced(model(op_type, packed, attributes={"split": split} if split else {}), {"X": x}, isa)
    for got, want in zip(found, expected(op_type, x, packed, split), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


@every_step
def test_an_exact_twin_with_what_comes_behind(op_type, open_session, weight):
    (n, split), x = case(op_type), narrow(3, K)
    packed = weight(op_type, n=n)
    attributes = {"split": split} if split else {}
    found = open_session(model(op_type, packed, attributes=attributes, exact=True), library=True).run(
        None, {"X": x}
    )
    h = x.astype(np.float64) @ packed.unpack() + biases(n)
    base = smn.OP_TYPES[op_type].base
    if base in sparse_matmul.ACTIVATIONS:
        want = [sparse_matmul.activated(sparse_matmul.ACTIVATIONS[base], h)]
    else:
        want = sparse_matmul_split.divided(base, h, split)
    for got, one in zip(found, want, strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("op_type", smn.OP_TYPES)
@pytest.mark.parametrize("x", [["batch", "tokens", K], [4, K], [K]])
def test_output_shapes_are_inferred(op_type, x, open_session, weight):
    n, split = case(op_type)
    attributes = {"split": split} if split else {}
    session = open_session(
        model(op_type, weight(op_type, n=n), x=x, attributes=attributes, body=False), library=True
    )
    last = split or [n // 2 if "Gate" in op_type else n]
    assert [found.shape for found in session.get_outputs()] == [[*x[:-1], channels] for channels in last]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("base", "n", "split", "why"),
    [
        (
            "SparseMatMulSplit2",
            48,
            [24, 24],
            r"split is \[24, 24\], expected 2 sizes .* multiples of block 16",
        ),
        ("SparseMatMulSplit2", 48, [32, 32], "that add up to N = 48"),
        ("SparseMatMulSplit2", 48, [48, 0], "that add up to N = 48"),
        ("SparseMatMulSplit2", 48, [-16, 64], "that add up to N = 48"),
        ("SparseMatMulSplit2", 48, [16, 16, 16], "expected 2 sizes"),
        ("SparseMatMulSplit3", 48, [16, 32], "expected 3 sizes"),
        ("SparseMatMulSplit3", 48, [2**62, 2**62, 48], "that add up to N = 48"),
        ("SparseMatMulSiluGate", 33, None, "N is 33, expected 2 sizes"),
        ("SparseMatMulSiluGate", 48, None, "multiples of block 16"),
        ("SparseMatMulGeluTanhGate", 1, None, "N is 1, expected"),
    ],
)
def test_linears_that_do_not_fit_are_refused(layout, base, n, split, why, open_session, weight):
    op_type = smn.op_type_of(base, layout)
    attributes = {} if split is None else {"split": split}
    with pytest.raises(Exception, match=why):
        open_session(model(op_type, weight(op_type, n=n), attributes=attributes, body=False), library=True)


def damaged(op_type, packed):
    infinite = packed.scales.copy()
    infinite[5] = np.inf
    yield {"arrays": {"values": packed.values[:-1]}}, "values has"
    yield {"arrays": {"scales": packed.scales[1:]}}, "scales has"
    yield {"arrays": {"scales": infinite}}, "a scale is"
    yield {"arrays": {"values": packed.values.astype(np.int8)}}, ""
    yield {"arrays": {"values": packed.values[None]}}, ""
    yield {"attributes": {"format": "bitmap5"}}, "bitmap5"
    yield {"attributes": {"group": 48}}, "attribute group is 48"
    yield {"attributes": {"K": 2**40}}, "too many elements"
    yield {"attributes": {"N": 0}}, "attribute N is 0"
    yield {"arrays": {"bias": biases(packed.N - 1)}}, "bias has"
    yield {"arrays": {"bias": biases(packed.N).astype(np.float64)}}, ""
    if smn.OP_TYPES[op_type].layout.zeros:
        yield {"arrays": {"zeros": packed.zeros | np.uint8(16)}}, "more than 15"
        yield {"arrays": {"zeros": packed.zeros[1:]}}, "zeros has"
    if smn.OP_TYPES[op_type].layout.masks:
        yield {"arrays": {"masks": packed.masks ^ np.uint8(1)}}, "values has"
    else:
        yield {"attributes": {"kept": 4}}, "values has"


@every_op
def test_a_damaged_weight_is_refused_with_what_is_wrong(op_type, open_session, weight):
    packed = weight(op_type)
    for options, why in damaged(op_type, packed):
        with pytest.raises(Exception, match=why or "."):
            open_session(model(op_type, packed, body=False, **options), library=True)


@every_op
def test_a_wrong_shape_of_x_is_refused(op_type, open_session, weight):
    session = open_session(model(op_type, weight(op_type), x=[None, None]), library=True)
    with pytest.raises(Exception, match=rf"{K + 1}\], expected \[..., {K}\]"):
        session.run(None, {"X": activations(2, K + 1)})


@every_op
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_and_threads(op_type, threads, open_session, weight):
    x, packed = activations(70, 512), weight(op_type, 512, 1000)
    session = open_session(model(op_type, packed, x=("tokens", 512)), library=True, threads=threads)
    for _ in range(3):
        got = session.run(None, {"X": x})[0]
        assert_near(got, reference(op_type, x, packed), packed, x)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernel_and_reader_accept_the_same_bytes(data, packed_levels, open_session):
    """A file may say anything: both refuse it, or both know the same weight."""
    op_type = data.draw(st.sampled_from(PLAIN))
    layout = smn.OP_TYPES[op_type].layout
    k, n = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 40))
    packed, _ = packed_levels(k, n, layout, kept=data.draw(st.integers(1, 15)))
    sizes = {name: value for name, value in packed.attributes().items() if name != "format"}
    arrays = {name: array.copy() for name, array in packed.arrays().items()}
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from([*sizes, *arrays]))
        if name in sizes:
            sizes[name] += data.draw(st.sampled_from([-64, -1, 1, 16, 64, 2**31, -(2**40)]))
        elif data.draw(st.integers(0, 2)) == 0:
            arrays[name] = arrays[name][: data.draw(st.integers(0, arrays[name].size))]
        elif arrays[name].size:
            raw = arrays[name].view(np.uint8)
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(layout, sizes, list(arrays.values()))
        found.validate()
    except FormatError:
        found = None
    arrays["bias"] = biases(min(max(sizes["N"], 0), 1000))
    proto = model(
        op_type, packed, arrays=arrays, attributes=sizes, x=["tokens", max(sizes["K"], 1)], body=False
    )
    if found is None:
        with pytest.raises(Exception, match=NODE):
            open_session(proto, library=True)
    else:
        x = activations(3, found.K)
        got = open_session(proto, library=True).run(None, {"X": x})[0]
        assert_near(got, reference(op_type, x, found), found, x)
