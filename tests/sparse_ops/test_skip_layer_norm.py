"""Residual addition with normalization inside ONNX Runtime, with the library and on the function bodies."""

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.ops import skip_layer_norm as sln

C = 45
EPSILON = 1e-5
NODE = "encoder/layer.3/LayerNorm"
every_op = pytest.mark.parametrize("op_type", sln.OP_TYPES)
both_ways = pytest.mark.parametrize("library", [True, False])


def inputs(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def constants(op_type, channels=C):
    names = sln.OP_TYPES[op_type].inputs[2:]
    return {name: inputs(channels, seed=seed) for seed, name in enumerate(names)}


def model(op_type, *, x=None, skip=None, opset=17, epsilon=EPSILON, stored=None, with_body=True):
    """One node; ``x`` and ``skip`` are the shapes of the inputs (None: of unknown rank)."""
    signature, float32 = sln.OP_TYPES[op_type], onnx.TensorProto.FLOAT
    stored = constants(op_type) if stored is None else stored
    node = onnx.helper.make_node(op_type, signature.inputs, signature.outputs, name=NODE, domain=DOMAIN)
    if epsilon is not None:
        node.attribute.append(onnx.helper.make_attribute("epsilon", epsilon))
    shapes = {"X": x, "skip": skip}
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info(name, float32, None) for name in signature.outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        functions=[sln.function_body(op_type, opset)] if with_body else [],
    )


def expected(op_type, x, skip, stored):
    y, total = sln.reference(x, skip, stored["gamma"], stored.get("beta"), EPSILON)
    return [y, total] if sln.OP_TYPES[op_type].sum else [y]


def assert_close(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


@every_op
@both_ways
@pytest.mark.parametrize("shape", [(C,), (1, C), (7, C), (0, C), (2, 5, C), (2, 0, C), (2, 3, 4, C)])
def test_computes_the_reference(op_type, library, shape, open_session):
    x, skip = inputs(*shape), inputs(*shape, seed=4)
    session = open_session(model(op_type), library=library)
    got = session.run(None, {"X": x, "skip": skip})
    assert_close(got, expected(op_type, x, skip, constants(op_type)))


@every_op
@pytest.mark.parametrize("opset", range(13, 27))
def test_body_of_every_opset(op_type, opset, open_session):
    x, skip = inputs(2, 5, C), inputs(2, 5, C, seed=4)
    session = open_session(model(op_type, opset=opset), library=False)
    got = session.run(None, {"X": x, "skip": skip})
    assert_close(got, expected(op_type, x, skip, constants(op_type)))


@every_op
@both_ways
@pytest.mark.parametrize(
    ("x_shape", "skip_shape"),
    [
        ((2, 5, C), (1, 5, C)),
        ((2, 5, C), (5, C)),
        ((5, C), (2, 5, C)),
        ((2, 5, C), (C,)),
        ((2, 5, C), (2, 1, C)),
        ((2, 1, C), (1, 5, C)),
        ((2, 5, 1), (2, 5, C)),
        ((2, 5, C), (1,)),
        ((2, 5, C), ()),
        ((2, 3, 5, C), (3, 1, C)),
        ((0, 5, C), (1, 5, C)),
        ((2, 0, C), (2, 1, C)),
        ((1, 5, C), (0, 1, C)),
    ],
)
def test_broadcasts_like_add(op_type, library, x_shape, skip_shape, open_session):
    x, skip = inputs(*x_shape), inputs(*skip_shape, seed=4)
    session = open_session(model(op_type), library=library)
    got = session.run(None, {"X": x, "skip": skip})
    assert_close(got, expected(op_type, x, skip, constants(op_type)))


@every_op
@pytest.mark.parametrize("channels", [1, 3, 4, 15, 16, 17, 64, 100, 768, 5000])
def test_any_number_of_channels(op_type, channels, open_session):
    stored = constants(op_type, channels)
    x, skip = inputs(3, channels), inputs(3, channels, seed=4)
    got = open_session(model(op_type, stored=stored)).run(None, {"X": x, "skip": skip})
    assert_close(got, expected(op_type, x, skip, stored))


@every_op
def test_threads_give_the_same_bytes(op_type, open_session):
    feeds = {"X": inputs(3000, C), "skip": inputs(3000, C, seed=4)}
    one, two, four = (open_session(model(op_type), threads=n).run(None, feeds) for n in (1, 2, 4))
    for a, b, c in zip(one, two, four, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@every_op
def test_a_mean_far_from_zero_costs_no_accuracy(op_type, open_session):
    x = inputs(4, C) + np.float32(10000)
    skip = np.zeros_like(x)
    got = open_session(model(op_type)).run(None, {"X": x, "skip": skip})
    assert_close(got[:1], expected(op_type, x, skip, constants(op_type))[:1])


@every_op
@both_ways
def test_not_a_number_and_infinity_stay_in_their_row(op_type, library, open_session):
    x, skip = inputs(4, C), inputs(4, C, seed=4)
    clean = expected(op_type, x, skip, constants(op_type))
    x[1, 5], x[2, 5] = np.nan, np.inf
    got = open_session(model(op_type), library=library).run(None, {"X": x, "skip": skip})
    assert np.isnan(got[0][1]).all()
    assert np.isnan(got[0][2, 5])
    for one, other in zip(got, clean, strict=True):
        np.testing.assert_allclose(one[[0, 3]], other[[0, 3]], rtol=2e-6, atol=2e-6)


@every_op
def test_the_node_is_ours_only_with_the_library(op_type, open_session, tmp_path):
    kept = {}
    for library in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{library}.onnx")
        open_session(model(op_type, x=["b", C], skip=["b", C]), library=library, options=options)
        nodes = onnx.load(tmp_path / f"{library}.onnx").graph.node
        kept[library] = [node.op_type for node in nodes if node.domain == DOMAIN]
    assert kept == {True: [op_type], False: []}


@every_op
@pytest.mark.parametrize("opset", [13, 17, 18, 23])
def test_the_runtime_fuses_the_body(op_type, opset, open_session, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    fixed = [2, 5, C]
    open_session(model(op_type, x=fixed, skip=fixed, opset=opset), library=False, options=options)
    op_types = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert any(name.endswith("Normalization") for name in op_types)
    assert not {"Pow", "Sqrt", "ReduceMean"} & set(op_types)


@every_op
@pytest.mark.parametrize(
    ("x", "skip", "shape"),
    [
        (["batch", "tokens", C], ["batch", "tokens", C], ["batch", "tokens", C]),
        ([4, "tokens", C], ["batch", "tokens", C], [4, "tokens", C]),
        (["batch", "tokens", C], [4, "tokens", C], [4, "tokens", C]),
        (["batch", 7, C], [1, 7, C], ["batch", 7, C]),
        (["tokens", C], ["batch", "tokens", C], ["batch", "tokens", C]),
        ([C], [C], [C]),
    ],
)
def test_output_shapes_are_inferred(op_type, x, skip, shape, open_session):
    for output in open_session(model(op_type, x=x, skip=skip)).get_outputs():
        assert output.shape == shape


@every_op
def test_different_symbols_stay_unknown(op_type, open_session):
    for output in open_session(model(op_type, x=["a", C], skip=["b", C])).get_outputs():
        assert output.shape[1] == C
        assert output.shape[0] not in ("a", "b")
        assert not isinstance(output.shape[0], int)


@every_op
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf"), None, 1])
def test_wrong_epsilon_is_refused_by_name(op_type, epsilon, open_session):
    with pytest.raises(Exception, match=rf"node '{NODE}' \({op_type}\): attribute epsilon is"):
        open_session(model(op_type, epsilon=epsilon, with_body=False))


@every_op
@pytest.mark.parametrize(
    ("x_shape", "skip_shape", "message"),
    [
        ((2, 3, C), (2, 4, C), r"shapes \[2, 3, 45\] and \[2, 4, 45\]"),
        ((), (), r"shapes \[\] and \[\]"),
        ((3, C - 1), (3, C - 1), r"input gamma has shape \[45\], expected \[44\]"),
        ((3, 0), (3, 0), r"input gamma has shape \[45\], expected \[0\]"),
    ],
)
def test_wrong_shapes_are_refused_by_name(op_type, x_shape, skip_shape, message, open_session):
    session = open_session(model(op_type, with_body=False))
    with pytest.raises(Exception, match=message) as caught:
        session.run(None, {"X": inputs(*x_shape), "skip": inputs(*skip_shape)})
    assert f"node '{NODE}' ({op_type})" in str(caught.value)


@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipLayerNormalizationSum"])
@pytest.mark.parametrize("beta", [inputs(C + 1), inputs(1, C), inputs(1)])
def test_a_wrong_beta_is_refused(op_type, beta, open_session):
    session = open_session(model(op_type, stored={"gamma": inputs(C), "beta": beta}, with_body=False))
    with pytest.raises(Exception, match=rf"input beta has shape .*, expected \[{C}\]"):
        session.run(None, {"X": inputs(2, C), "skip": inputs(2, C)})


def test_gamma_at_an_odd_address(tmp_path):
    """Constants are read where the file has them, whatever their address."""
    op_type = "SkipLayerNormalizationSum"
    stored = constants(op_type, 1000)
    proto = model(op_type, stored=stored)
    with open(tmp_path / "weights.bin", "wb") as data:
        for tensor in proto.graph.initializer:
            data.write(b"\0" * ((7 - data.tell()) % 16))  # begins 7 bytes behind a multiple of 16
            where = (data.tell(), len(tensor.raw_data))
            data.write(tensor.raw_data)
            onnx.external_data_helper.set_external_data(tensor, "weights.bin", *where)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    sparse_ops.register(options)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    x, skip = inputs(5, 1000), inputs(5, 1000, seed=4)
    assert_close(session.run(None, {"X": x, "skip": skip}), expected(op_type, x, skip, stored))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "generic", "avx1024"])
def test_the_forced_instruction_set_is_used_or_refused(isa, tmp_path, create_session):
    path = tmp_path / "model.onnx"
    path.write_bytes(model("SkipLayerNormalization").SerializeToString())
    result = create_session(path, isa)
    where = f"node '{NODE}' (SkipLayerNormalization): "
    if any(name.startswith(isa) for name in sparse_ops.info().kernels):
        assert result.returncode == 0, result.stderr
        assert f"{where}kernel {isa}" in result.stderr
    else:
        assert result.returncode != 0
        assert f"{where}SPARSE_ONNX_FORCE_ISA" in result.stderr
