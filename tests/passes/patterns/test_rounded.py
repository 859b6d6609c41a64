"""Values that a graph rounds to 8 bits: where they come from, what stands for them, and what is none."""

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.patterns.rounded import (
    RoundedInput,
    decoded_alone,
    dequantized,
    rounded_dtype,
    rounded_in_passing,
)

TENSORS = {
    "s": np.float32(0.5),
    "s1": np.array([0.5], np.float32),
    "t": np.float32(0.25),
    "zero": np.float32(0),
    "negative": np.float32(-1),
    "nan": np.float32("nan"),
    "double": np.float16(0.5),
    "many": np.full(4, 0.5, np.float32),
    "z": np.uint8(7),
    "zs": np.int8(-7),
    "z16": np.int16(3),
    "zmany": np.full(4, 7, np.uint8),
}


@pytest.fixture
def graph(from_text):
    def graph(text, inputs="float[2, 4] X"):
        used = {name: array for name, array in TENSORS.items() if f"{name}," in text or f"{name})" in text}
        model = from_text(
            f"""<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[2, 4] Y) {{ {text} }}""",
            **used,
        )
        return {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value}

    return graph


FOUND = {
    "uint8": ("q = QuantizeLinear(X, s, z) Y = DequantizeLinear(q, s, z)", ir.DataType.UINT8, 0),
    "int8": ("q = QuantizeLinear(X, s1, zs) Y = DequantizeLinear(q, s1, zs)", ir.DataType.INT8, -128),
    "no zero point": ("q = QuantizeLinear(X, s) Y = DequantizeLinear(q, s)", ir.DataType.UINT8, 0),
    "a type and no zero point": (
        "q = QuantizeLinear<output_dtype = 3>(X, s) Y = DequantizeLinear(q, s)",
        ir.DataType.INT8,
        -128,
    ),
    "another maker": ("p = QuantizeLinear(X, s, z) q = Identity(p) Y = DequantizeLinear(q, s, z)",
                      ir.DataType.UINT8, 0),
}  # fmt: skip


@pytest.mark.parametrize(("text", "dtype", "lowest"), FOUND.values(), ids=FOUND)
def test_integers_are_found(graph, text, dtype, lowest):
    values = graph(text)
    found = dequantized(values["Y"])
    assert isinstance(found, RoundedInput)
    assert (found.integers, found.dtype, found.lowest) == (values["q"], dtype, lowest)
    assert rounded_dtype(values["q"]) == dtype


LEFT = {
    "floats": ("Y = Relu(X)", "is not rounded"),
    "several scales": ("q = QuantizeLinear(X, many, zmany) Y = DequantizeLinear(q, many, zmany)", "more than one"),
    "16 bits": ("q = QuantizeLinear(X, s, z16) Y = DequantizeLinear(q, s, z16)", "INT16, not of 8 bits"),
    "a scale of 0": ("q = QuantizeLinear(X, zero, z) Y = DequantizeLinear(q, zero, z)", "scale of 0"),
    "a scale below 0": ("q = QuantizeLinear(X, negative, z) Y = DequantizeLinear(q, negative, z)", "scale of -1"),
    "no number": ("q = QuantizeLinear(X, nan, z) Y = DequantizeLinear(q, nan, z)", "scale of nan"),
    "other floats": ("q = QuantizeLinear(X, double, z) Y = DequantizeLinear(q, double, z)", "FLOAT16, not FLOAT"),
    "a scale of every run": ("r = Sqrt(s) q = QuantizeLinear(X, r, z) Y = DequantizeLinear(q, r, z)", "no constant"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_no_grid_of_8_bits_is_left(graph, text, reason):
    found = dequantized(graph(text)["Y"])
    assert isinstance(found, str)
    assert reason in found


def test_what_is_rounded_in_passing(graph):
    values = graph("q = QuantizeLinear(X, s, z) g = DequantizeLinear(q, s, z) Y = Relu(g)")
    found = rounded_in_passing(values["X"])
    assert found is not None
    assert (found.scale, found.steps, found.output) == (0.5, (-7, 248), values["g"])
    assert [node.op_type for node in found.nodes] == ["QuantizeLinear", "DequantizeLinear"]
    alone = decoded_alone(values["q"])
    assert alone is not None
    assert (alone.scale, alone.zero_point, alone.output) == (0.5, 7, values["g"])


PASSING_NOT = {
    "another scale": "q = QuantizeLinear(X, s, z) g = DequantizeLinear(q, t, z) Y = Relu(g)",
    "read before": "q = QuantizeLinear(X, s, z) g = DequantizeLinear(q, s, z) Y = Add(X, g)",
    "integers read": "q = QuantizeLinear(X, s, z) g = DequantizeLinear(q, s, z) c = Cast<to = 1>(q) Y = Add(c, g)",
    "only down": "q = QuantizeLinear(X, s, z) Y = Cast<to = 1>(q)",
    "as a scale": "q = QuantizeLinear(s, X, z) Y = DequantizeLinear(q, s, z)",
}


@pytest.mark.parametrize("text", PASSING_NOT.values(), ids=PASSING_NOT)
def test_what_is_not(graph, text):
    assert rounded_in_passing(graph(text)["X"]) is None


def test_floats_are_no_integers(graph):
    values = graph("q = QuantizeLinear(X, s, z) Y = DequantizeLinear(q, s, z)")
    assert rounded_dtype(values["X"]) == rounded_dtype(values["Y"]) == ir.DataType.FLOAT
