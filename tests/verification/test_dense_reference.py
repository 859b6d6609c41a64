"""The model behind a compiled one: every operator in standard operators, with the very weights that were packed."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from sparse_onnx.errors import ModelFileError
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.fuse.attention import FuseAttention
from sparse_onnx.passes.fuse.skip_layer_norm import FuseSkipLayerNorm
from sparse_onnx.passes.lower.feed_forward import FuseFeedForward
from sparse_onnx.passes.lower.merge_linears import MergeLinears
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent
from sparse_onnx.verification.dense_reference import dense_reference

RNG = np.random.default_rng(0)


def sparse(*shape):
    weight = RNG.standard_normal(shape).astype(np.float32)
    return np.where(np.abs(weight) > 1, weight, 0).astype(np.float32)


def small(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(header, body, **arrays):
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> g {header} {{ {body} }}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def gated():
    return model_of(
        "(float[2, 3, 32] X) => (float[2, 3, 32] Y)",
        """g = MatMul(X, G) s = Sigmoid(g) a = Mul(g, s) u = MatMul(X, U) h = Mul(a, u) d = MatMul(h, D)
        s1 = Add(d, X) Y = LayerNormalization<axis = -1>(s1, scale, shift)""",
        G=sparse(32, 64), U=sparse(32, 64), D=sparse(64, 32), scale=small(32), shift=small(32),
    )  # fmt: skip


def projections():
    return model_of(
        "(float[2, 5, 64] X) => (float[2, 5, 64] Q, float[2, 5, 64] K, float[2, 5, 64] V)",
        "q = MatMul(X, Wq) Q = Add(q, b) K = MatMul(X, Wk) V = MatMul(X, Wv)",
        Wq=sparse(64, 64), Wk=sparse(64, 64), Wv=sparse(64, 64), b=small(64),
    )  # fmt: skip


def block():
    """An inverted residual block: pointwise, depthwise, pointwise."""
    return model_of(
        "(float[1, 16, 9, 9] X) => (float[1, 16, 9, 9] Y)",
        """e = Conv(X, W0) r = Clip(e, low, high)
        d = Conv<group = 32, pads = [1, 1, 1, 1]>(r, F, f) c = Clip(d, low, high)
        p = Conv(c, W1) Y = Add(p, X)""",
        W0=sparse(32, 16, 1, 1), F=small(32, 1, 3, 3), f=small(32), W1=sparse(16, 32, 1, 1),
        low=np.float32(0), high=np.float32(6),
    )  # fmt: skip


def shared():
    """One weight, used twice."""
    return model_of(
        "(float[4, 32] X) => (float[4, 32] Y)",
        "a = MatMul(X, W) b = Relu(a) Y = MatMul(b, W)",
        W=sparse(32, 32),
    )


def recurrent():
    """Both directions of an LSTM, and a GRU behind it; of the outputs some are used."""
    return model_of(
        "(float[4, 3, 32] X) => (float[1, 3, 16] Y)",
        """A = LSTM<hidden_size = 16, direction = "bidirectional">(X, W, R, B)
        t = Transpose<perm = [0, 2, 1, 3]>(A) P = Reshape(t, flat)
        unused, Y = GRU<hidden_size = 16, linear_before_reset = 1>(P, V, S)""",
        W=sparse(2, 64, 32), R=sparse(2, 64, 16), B=small(2, 128), V=sparse(1, 48, 32), S=sparse(1, 48, 16),
        flat=np.array([0, 0, -1]),
    )  # fmt: skip


LOWER = Pipeline(
    (
        FuseAttention(),
        FuseSkipLayerNorm(),
        LowerSparseMatMul(min_sparsity=0.3),
        LowerSparseConv(min_sparsity=0.3),
        LowerSparseRecurrent(min_sparsity=0.3),
        MergeLinears(),
        FuseFeedForward(),
    )
)


def run(model):
    """On stock ONNX Runtime, without the library."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(1)
    return session.run(
        None, {x.name: rng.standard_normal(x.shape).astype(np.float32) for x in session.get_inputs()}
    )


def put(array, name):
    return ir.tensor(array, name=name)


@pytest.mark.parametrize("make", [gated, projections, block, shared, recurrent])
def test_is_what_was_compiled(make):
    model = make()
    expected = run(model)
    LOWER(model)
    before = ir.to_proto(model).SerializeToString()
    assert any(node.domain == "sparse_onnx" for node in model.graph)
    dense = dense_reference(model, put)
    assert ir.to_proto(model).SerializeToString() == before, "the compiled model is left as it is"
    assert not any(node.domain == "sparse_onnx" for node in dense.graph)
    assert not any(key[0] == "sparse_onnx" for key in dense.functions)
    for got, value in zip(run(dense), expected, strict=True):
        assert np.linalg.norm(got - value) <= 1e-6 * np.linalg.norm(value)


def test_weights_are_those_that_were_packed_and_stored_once():
    model = shared()
    weight = model.graph.initializers["W"].const_value.numpy().copy()
    LOWER(model)
    dense = dense_reference(model, put)
    assert list(dense.graph.initializers) == ["sparse_onnx.zeros.32", "W"]
    np.testing.assert_array_equal(dense.graph.initializers["W"].const_value.numpy(), weight)


def test_the_decoder_of_the_model_has_no_part_in_it():
    """A body that unpacks wrongly changes what runs without the library, but not the reference."""
    model = shared()
    expected = run(model)[0]
    LOWER(model)
    for function in model.functions.values():
        next(
            node for node in function if node.op_type == "MatMul"
        ).op_type = "Add"  # [4, 32] and [32, 32]: refused
    np.testing.assert_allclose(run(dense_reference(model, put))[0], expected, rtol=1e-6)


def test_model_without_our_operators_is_a_copy():
    model = gated()
    dense = dense_reference(model, put)
    assert dense is not model
    assert ir.to_proto(dense).SerializeToString() == ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda node: node.attributes.pop("K"), "its stored weight is damaged"),
        (
            lambda node: node.attributes.add(ir.AttrString("format", "newer")),
            "no constant in the format chunked_csc",
        ),
        (
            lambda node: setattr(node, "op_type", "SparseMatMulNew"),
            "no operator sparse_onnx.SparseMatMulNew in this",
        ),
    ],
)
def test_operators_that_cannot_be_unpacked(spoil, said):
    model = shared()
    LOWER(model)
    spoil(next(node for node in model.graph if node.domain == "sparse_onnx"))
    with pytest.raises(ModelFileError, match=said):
        dense_reference(model, put)
