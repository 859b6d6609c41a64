"""The window of a Conv: the padding that its attributes mean, held to what ONNX Runtime computes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.passes.patterns.conv_window import ConvWindow


def conv(**attributes):
    return ir.node("Conv", [ir.Value(name="X"), ir.Value(name="W")], attributes)


@st.composite
def windows(draw):
    axes = draw(st.integers(1, 2))

    def numbers(low, high, count=axes):
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, sizes = numbers(1, 3), numbers(5, 9)
    attributes = {"strides": numbers(1, 3)}
    auto_pad = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes["dilations"] = numbers(1, 2) if auto_pad in ("NOTSET", "VALID") else [1] * axes
    if auto_pad == "NOTSET":
        attributes["pads"] = numbers(0, 2, 2 * axes)
    else:
        attributes["auto_pad"] = auto_pad
    return kernel, sizes, attributes


def answer(x, w, attributes):
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float{list(x.shape)} X, float{list(w.shape)} W) => (float Y)
        {{ Y = Conv(X, W) }}"""
    )
    for name, value in attributes.items():
        model.graph[0].attributes.add(ir.convenience.convert_attribute(name, value))
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"X": x, "W": w})[0]


@given(windows())
@settings(max_examples=60, deadline=None)
def test_explicit_pads_mean_the_same(case):
    kernel, sizes, attributes = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, *sizes)).astype(np.float32)
    w = rng.standard_normal((1, 1, *kernel)).astype(np.float32)
    window = ConvWindow.of(conv(**attributes), tuple(kernel))
    assert window.fits
    assert window.needs_size == attributes.get("auto_pad", "").startswith("SAME")
    pads = window.explicit_pads(sizes)
    explicit = {name: attributes[name] for name in ("strides", "dilations")} | {"pads": list(pads)}
    expected = answer(x, w, attributes)
    np.testing.assert_array_equal(answer(x, w, explicit), expected)
    assert window.positions(tuple(sizes)) == expected.shape[2:]
    assert window.padding(sizes) == list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1]},
        {"strides": [1], "auto_pad": "SAME_UPPER"},
        {"dilations": [1, 1, 1]},
        {"pads": [0, 0]},
        {"group": 0},
        {"group": -1},
    ],
)
def test_attributes_that_no_filter_of_two_axes_has(attributes):
    assert not ConvWindow.of(conv(**attributes), (3, 3)).fits


def test_attributes_that_are_left_out():
    window = ConvWindow.of(conv(), (3, 1))
    assert window == ConvWindow((3, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    assert window.fits
    assert not window.needs_size
