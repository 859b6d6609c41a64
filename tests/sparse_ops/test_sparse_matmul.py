"""The operators inside ONNX Runtime, with the library and on their function bodies."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.errors import HostError
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm

K, N = 70, 45


@pytest.fixture
def packed(sparse):
    return CHUNKED_CSC.pack(sparse(K, N, 0.3), chunk=32, block=16)


@pytest.fixture
def bias():
    return np.linspace(-2, 2, N, dtype=np.float32)


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op_type", sm.ACTIVATIONS)
def test_library_and_body_compute_the_reference(op_type, threads, packed, bias, layer_model, open_session):
    model = layer_model(packed, bias, op_type)
    x = inputs(150, K)
    expected = sm.reference(x, packed, bias, sm.ACTIVATIONS[op_type])
    for library in (True, False):
        (got,) = open_session(model, library=library, threads=threads).run(None, {"X": x})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("width", [4, 8])
def test_entries_of_several_outputs(width, bias, layer_model, open_session):
    kept = np.repeat(np.random.default_rng(1).random((K, -(-N // width))) < 0.3, width, axis=1)[:, :N]
    packed = CHUNKED_CSC.pack(np.where(kept, inputs(K, N), 0).astype(np.float32), chunk=32, block=16)
    assert packed.width == width
    model, x = layer_model(packed, bias, "SparseMatMulGelu"), inputs(150, K)
    for library in (True, False):
        (got,) = open_session(model, library=library).run(None, {"X": x})
        np.testing.assert_allclose(got, sm.reference(x, packed, bias, "gelu"), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (3, 5, K), (2, 0, K), (2, 3, 4, K)])
def test_any_rank_and_empty_batches(shape, library, packed, bias, layer_model, open_session):
    model = layer_model(packed, bias, x_shape=[*(f"d{i}" for i in range(len(shape) - 1)), None])
    x = inputs(*shape)
    (got,) = open_session(model, library=library).run(None, {"X": x})
    assert got.shape == (*shape[:-1], N)
    np.testing.assert_allclose(got, sm.reference(x, packed, bias), rtol=1e-5, atol=3e-5)


def test_many_threads_and_tokens_agree_with_one(packed, bias, layer_model, open_session):
    model, x = layer_model(packed, bias, "SparseMatMulGelu"), inputs(1000, K)
    results = [open_session(model, threads=threads).run(None, {"X": x})[0] for threads in (1, 2, 4)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_results_do_not_change_while_an_operator_learns_its_threads(packed, bias, layer_model, open_session):
    """Plans of the first calls are for other numbers of threads than those of later ones."""
    model = layer_model(packed, bias, "SparseMatMulGelu")
    for tokens in (1, 65, 400):
        x, expected = inputs(tokens, K), None
        for threads in (1, 2, 8):
            session = open_session(model, threads=threads)
            for _ in range(20):
                (got,) = session.run(None, {"X": x})
                expected = got if expected is None else expected
                np.testing.assert_array_equal(got, expected)


def test_unnamed_unknown_dimensions_do_not_become_numbers(packed, bias, layer_model, open_session):
    """Legacy exports take sizes from Shape: a dimension inferred as -1 would give Reshape two of them."""
    model = layer_model(packed, bias, x_shape=[None, None, K])
    graph = model.graph
    steps = """s = Shape(Y) b = Gather(s, zero) t = Gather(s, one) b1 = Unsqueeze(b, axes) t1 = Unsqueeze(t, axes)
        target = Concat<axis = 0>(b1, t1, tail) Z = Reshape(Y, target)"""
    text = f"""rest (float[A, B, C] Y) => (float[D, E, F, G] Z)
        <int64 zero = {{0}}, int64 one = {{1}}, int64[1] axes = {{0}}, int64[2] tail = {{5, {N // 5}}}> {{ {steps} }}"""
    rest = onnx.parser.parse_graph(text)
    graph.node.extend(rest.node)
    graph.initializer.extend(rest.initializer)
    graph.output[0].CopyFrom(rest.output[0])
    x = inputs(2, 3, K)
    (got,) = open_session(model).run(None, {"X": x})
    expected = sm.reference(x, packed, bias).reshape(2, 3, 5, N // 5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-5)


def test_node_stays_with_the_library_only(packed, bias, layer_model, open_session, tmp_path):
    op_types = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(layer_model(packed, bias), library=library, options=options)
        op_types[library] = [node.op_type for node in onnx.load(tmp_path / f"{library}.onnx").graph.node]
    assert op_types[True] == ["SparseMatMul"]
    assert "SparseMatMul" not in op_types[False]


def test_library_needs_no_body(packed, bias, layer_model, open_session):
    x = inputs(3, K)
    (got,) = open_session(layer_model(packed, bias, with_body=False)).run(None, {"X": x})
    np.testing.assert_allclose(got, sm.reference(x, packed, bias), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("x_shape", "expected"),
    [
        (["batch", "tokens", None], ["batch", "tokens", N]),
        ([None], [N]),
        ([4, "tokens", None], [4, "tokens", N]),
        ([8, None], [8, N]),
        (["tokens", "width"], ["tokens", N]),
    ],
)
def test_output_shape_is_inferred(x_shape, expected, packed, bias, layer_model, open_session):
    (output,) = open_session(layer_model(packed, bias, x_shape=x_shape)).get_outputs()
    assert output.shape == expected


def test_unknown_rank_stays_unknown(packed, bias, layer_model, open_session):
    session = open_session(layer_model(packed, bias, x_shape=None))
    for shape in ((3, K), (2, 3, K)):
        x = inputs(*shape)
        (got,) = session.run(None, {"X": x})
        np.testing.assert_allclose(got, sm.reference(x, packed, bias), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("shape", [(3, K + 1), (3, K - 1), (K, 1), (0, 3), ()])
def test_wrong_input_fails_that_run_only(shape, packed, bias, layer_model, open_session, node_name):
    session = open_session(layer_model(packed, bias, x_shape=None))
    with pytest.raises(Exception, match=node_name) as caught:
        session.run(None, {"X": np.ones(shape, np.float32)})
    assert f"expected K = {K}" in str(caught.value) or f"expected [..., {K}]" in str(caught.value)
    x = inputs(3, K)
    np.testing.assert_allclose(
        session.run(None, {"X": x})[0], sm.reference(x, packed, bias), rtol=1e-5, atol=3e-5
    )


def test_registering_twice_is_harmless(packed, bias, layer_model, open_session):
    options = onnxruntime.SessionOptions()
    sparse_ops.register(options)
    sparse_ops.register(options)
    x = inputs(3, K)
    for _ in range(2):  # two sessions of the same options
        (got,) = open_session(layer_model(packed, bias), options=options).run(None, {"X": x})
        np.testing.assert_allclose(got, sm.reference(x, packed, bias), rtol=1e-5, atol=3e-5)


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


# Stored tensors or attributes that break one rule each, and words of the message.
HOSTILE_ARRAYS = {
    "offset past the chunk": (
        lambda p: {"offsets": changed(p.offsets, int(p.counts[0]) - 1, 255)},
        "offsets of block 0, chunk 0",
    ),
    "offsets that do not rise": (
        lambda p: {"offsets": changed(p.offsets, 1, 0)},
        "offsets of block 0, chunk 0",
    ),
    "offset past K": (lambda p: {"offsets": changed(p.offsets, -1, 7)}, "expected less than 6"),
    "count zero": (
        lambda p: {"counts": changed(p.counts, 0, 0)},
        r"counts of block 0, chunk 0 hold 0, expected 1..32",
    ),
    "count too large": (
        lambda p: {"counts": changed(p.counts, 0, 255)},
        "counts of block 0, chunk 0 hold 255",
    ),
    "counts that add up to more": (lambda p: {"counts": changed(p.counts, 0, p.counts[0] + 1)}, "values has"),
    "row twice": (lambda p: {"rows": changed(p.rows, 0, p.rows[1])}, "rows of block 0, chunk 0"),
    "row past the block": (lambda p: {"rows": changed(p.rows, 0, 200)}, "rows of block 0, chunk 0"),
    "values too short": (lambda p: {"values": p.values[:-1]}, "values has"),
    "offsets too short": (lambda p: {"offsets": p.offsets[:-1]}, "offsets has"),
    "counts too short": (lambda p: {"counts": p.counts[:-1]}, "counts has"),
    "rows too long": (lambda p: {"rows": np.concatenate([p.rows, p.rows])}, "rows has"),
    "values empty": (lambda p: {"values": p.values[:0]}, "values has 0 elements"),
    "everything empty": (lambda p: {n: a[:0] for n, a in p.arrays().items()}, "counts has 0 elements"),
    "bias too short": (
        lambda p: {"bias": np.zeros(N - 1, np.float32)},
        f"bias has {N - 1} elements, expected {N}",
    ),
    "values as a matrix": (lambda p: {"values": p.values[None]}, "input values .* no vector"),
}
HOSTILE_ATTRIBUTES = {
    "K zero": ({"K": 0}, "attribute K is 0"),
    "K negative": ({"K": -1}, "attribute K is -1"),
    "K huge": ({"K": 2**62, "N": 2**62}, "too large"),
    "N huge": ({"N": 2**62}, "expected"),
    "N zero": ({"N": 0}, "attribute N is 0"),
    "chunk zero": ({"chunk": 0}, r"attribute chunk is 0, expected 1..255"),
    "chunk too large": ({"chunk": 256}, "attribute chunk is 256"),
    "block negative": ({"block": -7}, "attribute block is -7"),
    "block too large": ({"block": 2**40}, r"expected 1..256"),
    "another format": ({"format": "bitmap"}, "attribute format is 'bitmap'; this library reads chunked_csc"),
    "a long format": ({"format": "x" * 1000}, "attribute format is missing or unknown"),
    "no format": ({"format": None}, "attribute format is missing"),
    "no K": ({"K": None}, "attribute K is missing"),
    "K as a float": ({"K": 70.0}, "attribute K is missing or no integer"),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_hostile_tensors_are_refused_by_name(case, packed, bias, layer_model, open_session, node_name):
    change, message = HOSTILE_ARRAYS[case]
    model = layer_model(packed, bias, arrays=change(packed), with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' \(SparseMatMul\): .*{message}"):
        open_session(model)


@pytest.mark.parametrize("case", HOSTILE_ATTRIBUTES)
def test_hostile_attributes_are_refused_by_name(case, packed, bias, layer_model, open_session, node_name):
    attributes, message = HOSTILE_ATTRIBUTES[case]
    model = layer_model(packed, bias, attributes=attributes, with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' \(SparseMatMul\): .*{message}"):
        open_session(model)


@pytest.mark.parametrize("name", ["values", "offsets", "counts", "rows", "bias"])
def test_weights_must_be_constant(name, packed, bias, layer_model, open_session, node_name):
    model = layer_model(packed, bias, inputs=[name], with_body=False)
    with pytest.raises(Exception, match=rf"node '{node_name}' .*input {name} is not a constant initializer"):
        open_session(model)


@pytest.mark.parametrize("name", ["values", "offsets", "bias"])
def test_wrong_element_types_are_refused(name, packed, bias, layer_model, open_session):
    array = {**packed.arrays(), "bias": bias}[name].astype(np.int32)
    with pytest.raises(Exception, match="Type Error"):
        open_session(layer_model(packed, bias, arrays={name: array}, with_body=False))


def test_unaligned_external_data(packed, bias, layer_model, tmp_path):
    """Weights are read where the file has them, whatever their address."""
    model = layer_model(packed, bias, "SparseMatMulGelu")
    with open(tmp_path / "weights.bin", "wb") as data:
        for tensor in model.graph.initializer:
            data.write(
                b"\0" * ((7 - data.tell()) % 16)
            )  # every tensor begins 7 bytes behind a multiple of 16
            onnx.external_data_helper.set_external_data(
                tensor, "weights.bin", data.tell(), len(tensor.raw_data)
            )
            data.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    sparse_ops.register(options)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    x = inputs(66, K)
    (got,) = session.run(None, {"X": x})
    np.testing.assert_allclose(got, sm.reference(x, packed, bias, "gelu"), rtol=1e-5, atol=3e-5)


def test_not_a_number_and_infinity_pass_through(packed, layer_model, open_session):
    x = inputs(4, K)
    x[1, 5], x[2, 5] = np.nan, np.inf
    bias = np.zeros(N, np.float32)
    bias[3], bias[4] = np.nan, np.inf
    (got,) = open_session(layer_model(packed, bias)).run(None, {"X": x})
    touched = packed.unpack()[5] != 0
    assert np.isnan(got[1, touched]).all()
    assert not np.isfinite(got[2, touched]).any()
    assert np.isnan(got[:, 3]).all()
    assert np.isposinf(got[0, 4])
    clean = ~touched
    clean[[3, 4]] = False
    expected = sm.reference(inputs(4, K), packed, np.zeros(N, np.float32))
    np.testing.assert_allclose(got[0][clean], expected[0][clean], rtol=1e-5, atol=3e-5)


@pytest.fixture
def model_file(packed, bias, layer_model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(layer_model(packed, bias).SerializeToString())
    return path


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_session_logs_the_kernel_of_the_forced_instruction_set(isa, model_file, node_name, create_session):
    result = create_session(model_file, isa)
    if any(name.startswith(isa) for name in sparse_ops.info().kernels):
        assert result.returncode == 0, result.stderr
        assert f"node '{node_name}' (SparseMatMul): kernel {isa}_t" in result.stderr
    else:
        assert result.returncode != 0
        assert "lacks" in result.stderr


def test_unknown_instruction_set_fails_the_session(model_file, node_name, create_session):
    result = create_session(model_file, "avx1024")
    assert result.returncode != 0
    assert f"node '{node_name}' (SparseMatMul): SPARSE_ONNX_FORCE_ISA is none of" in result.stderr


def test_unknown_instruction_set_is_an_error_of_the_environment(monkeypatch):
    """Known before any session is there."""
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "avx1024")
    with pytest.raises(HostError, match="SPARSE_ONNX_FORCE_ISA is none of"):
        sparse_ops.register(onnxruntime.SessionOptions())


def test_large_weight_in_strips(sparse, layer_model, open_session):
    """More tokens than have room in the scratch memory at a time, and a large last tile."""
    K = 40000
    packed, bias = CHUNKED_CSC.pack(sparse(K, 3, 0.01)), np.zeros(3, np.float32)
    x = inputs(300, K)
    for threads in (1, 2):
        (got,) = open_session(layer_model(packed, bias), threads=threads).run(None, {"X": x})
        np.testing.assert_allclose(got, x @ packed.unpack(), rtol=1e-4, atol=1e-3)


def test_concurrent_runs_of_one_session(packed, bias, layer_model, open_session):
    from concurrent.futures import ThreadPoolExecutor

    session = open_session(layer_model(packed, bias, "SparseMatMulSilu"), threads=2)
    feeds = [inputs(tokens, K) for tokens in (1, 9, 64, 200)] * 5
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: session.run(None, {"X": x})[0], feeds))
    for x, got in zip(feeds, results, strict=True):
        np.testing.assert_allclose(got, sm.reference(x, packed, bias, "silu"), rtol=1e-5, atol=3e-5)
