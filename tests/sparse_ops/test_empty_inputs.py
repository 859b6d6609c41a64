"""Every operator on an empty batch and an empty sequence, by the library and by its body of each opset: the standard
operators that it stands for take them, so it must."""

import math

import numpy as np
import onnx
import pytest

from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, concatenate
from sparse_onnx.sparse_ops.ops import (
    attention,
    skip_layer_norm,
    sparse_conv,
    sparse_conv_depthwise,
    sparse_feed_forward,
    sparse_matmul_split,
)
from sparse_onnx.sparse_ops.ops import sparse_matmul as sm
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

EVERY = [
    op_type
    for contract in (
        sparse_matmul_split,
        sparse_feed_forward,
        sparse_conv,
        sparse_conv_depthwise,
        attention,
        skip_layer_norm,
    )
    for op_type in contract.OP_TYPES
] + [*sm.ACTIVATIONS]

C, N, H = 12, 16, 4
WINDOW = sparse_conv.Window((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
TOKENS = [(0, 5, C), (2, 0, C), (0, 0, C), (0, C)]
IMAGES = [(0, C, 7, 5)]
HEADS = {
    # batch, queries, keys
    "batch": (0, 3, 4),
    "queries": (2, 0, 4),
    "keys": (2, 3, 0),
    "all": (0, 0, 0),
}


def sparse(*shape):
    rng = np.random.default_rng(0)
    return np.where(rng.random(shape) < 0.7, 0, rng.standard_normal(shape)).astype(np.float32)


def linear(op_type):
    count = 3 if op_type == "SparseMatMulSplit3" else 2
    if op_type in sparse_matmul_split.OP_TYPES:
        packed = concatenate([CHUNKED_CSC.pack(sparse(C, N), block=8) for _ in range(count)])
    else:
        packed = CHUNKED_CSC.pack(sparse(C, N), block=8)
    constants = {**packed.arrays(), "bias": np.ones(packed.N, np.float32)}
    attributes = {**packed.attributes(), "mask_structure": "unstructured"}
    outputs = {"Y": N}
    if op_type in sparse_matmul_split.SPLITS.values():
        attributes["split"] = [N] * count
        outputs = {f"Y{i}": N for i in range(count)}
    return constants, attributes, outputs


def feed_forward(op_type):
    constants, attributes, _ = linear(sparse_feed_forward.OP_TYPES[op_type])
    down = CHUNKED_CSC.pack(sparse(N, C))
    prefix = sparse_feed_forward.PREFIX
    bias = np.ones(C, np.float32)
    constants |= {prefix + name: array for name, array in {**down.arrays(), "bias": bias}.items()}
    attributes |= {prefix + name: value for name, value in down.attributes().items() if name != "format"}
    attributes[f"{prefix}mask_structure"] = "unstructured"
    return constants, attributes, {"Y": C}


def convolution(op_type):
    packed = CHUNKED_CSC.pack(sparse_conv.matrix_of(sparse(N, C, 3, 3)), block=8)
    constants = {**packed.arrays(), "bias": np.ones(N, np.float32)}
    attributes = {**packed.attributes(), **WINDOW.attributes(), "mask_structure": "unstructured"}
    if op_type in sparse_conv_depthwise.OP_TYPES:
        del attributes["group"]
        attributes |= {
            sparse_conv_depthwise.PREFIX + name: value
            for name, value in WINDOW.attributes().items()
            if name != "group"
        }
        constants |= {"filters": sparse(N, 9).reshape(-1), "filter_bias": np.ones(N, np.float32)}
    if "Clip" in op_type:
        attributes |= {"min": 0.0, "max": 6.0}
    return constants, attributes, {"Y": N}


def case(op_type):
    """Constants, attributes, channels of the outputs, and shapes of the other inputs by their name, with those of the
    outputs."""
    if op_type in attention.OP_TYPES:
        signature = attention.OP_TYPES[op_type]
        fed = []
        for b, sq, sk in HEADS.values():
            key = (b, H, sk, C // H) if signature.split else (b, sk, C)
            query = (b, H, sq, C // H) if signature.heads else (b, sq, C)
            fed.append(({"q": query, "k": key, "v": key, "mask": (b, 1, 1, sk)}, (b, sq, C)))
        return {}, {"num_heads": H, "scale": 0.5}, {"Y": C}, fed
    if op_type in skip_layer_norm.OP_TYPES:
        constants = {name: np.ones(C, np.float32) for name in ("gamma", "beta")}
        fed = [({"X": shape, "skip": shape}, shape) for shape in TOKENS]
        outputs = dict.fromkeys(skip_layer_norm.OP_TYPES[op_type].outputs, C)
        return constants, {"epsilon": 1e-5}, outputs, fed
    if op_type in (*sparse_conv.OP_TYPES, *sparse_conv_depthwise.OP_TYPES):
        fed = [({"X": shape, "R": (0, N, *shape[2:])}, (0, N, *shape[2:])) for shape in IMAGES]
        return *convolution(op_type), fed
    build = feed_forward if op_type in sparse_feed_forward.OP_TYPES else linear
    constants, attributes, outputs = build(op_type)
    (channels,) = set(outputs.values())
    return constants, attributes, outputs, [({"X": shape}, (*shape[:-1], channels)) for shape in TOKENS]


def model_of(op_type, opset):
    constants, attributes, outputs, fed = case(op_type)
    body = OP_TYPES[op_type].function_body(opset)
    node = onnx.helper.make_node(op_type, list(body.input), list(outputs), domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    floats, info = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    inputs = [name for name in body.input if name not in constants]
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [info(name, floats, None) for name in inputs],
        [info(name, floats, None) for name in outputs],
        [onnx.numpy_helper.from_array(constants[name], name) for name in body.input if name in constants],
    )
    model = onnx.helper.make_model(
        graph,
        ir_version=9 if opset < 21 else 10,
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[body],
    )
    feeds = [
        ({name: np.zeros(shapes[name], np.float32) for name in inputs}, expected) for shapes, expected in fed
    ]
    return model, feeds


@pytest.mark.parametrize("op_type", EVERY)
@pytest.mark.parametrize(
    ("library", "opset"), [(True, 17), *((False, opset) for opset in (13, 14, 15, 17, 18, 20, 23, 26))]
)
def test_empty_inputs_give_empty_outputs(op_type, library, opset, open_session):
    model, given = model_of(op_type, opset)
    session = open_session(model, library=library)
    for feeds, expected in given:
        for y in session.run(None, feeds):
            assert y.shape == expected
            assert not y.any()  # without keys, an attention gives zeros
        assert math.prod(expected) == 0 or op_type in attention.OP_TYPES
