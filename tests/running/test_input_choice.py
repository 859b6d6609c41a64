"""Sizes and values that a run takes where nobody says them: of the data, of the graph, or guessed."""

import dataclasses

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.running.input_choice import choose_inputs


@pytest.mark.parametrize("lengths", [(7, 7), (7, 9)])
def test_sizes_of_the_data_stand_for_guesses(lengths):
    """But for the batch, which is how the data was cut, and equal in all inputs that have it."""
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[n, time] x, float[m, other] z) => (float[1, 1] y) { a = ReduceMax(x) b = ReduceMax(z) y = Add(a, b) }
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    batches = [{"x": np.ones((4, length)), "z": np.ones((4, 3))} for length in lengths]
    choice = choose_inputs(model, input_specs(model), {"z": (2, 5)}, batches)
    assert choice.shapes["z"] == (2, 5)
    if len(set(lengths)) == 1:
        assert choice.shapes["x"] == (2, 7)
        assert (
            "dimension time is taken as 7, as in the data; say --input-shape or --input now"
            in choice.notes("now")
        )
    else:
        assert choice.shapes["x"] == (2, 128)
    ranked = input_specs(model)
    unknown = (dataclasses.replace(ranked[0], shape=None), ranked[1])
    assert choose_inputs(model, unknown, {}, batches[:1]).shapes == {"x": (1, 7), "z": (1, 3)}


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        ("int64 level", "c = Equal(level, three) y = Not(c)", 3),
        (
            "int64[1] level",
            "a = Squeeze(level) b = Cast<to = 6>(a) d = Cast<to = 7>(b) c = Equal(d, three) y = Not(c)",
            3,
        ),
        ("int64 level", "c = Equal(three, level) y = Not(c)", 3),
        ("int64[1, 1] level", "c = Equal(level, three) y = Not(c)", 0),  # one token, say
        ("int64[1] attention_mask", "c = Equal(attention_mask, three) y = Not(c)", 1),
        ("int64[1] level", "t = Gather(table, level) c = Equal(level, three) y = Not(c)", None),  # an index
        ("int64 level", "c = Less(level, three) y = Not(c)", 0),
        ("int64 level, int64 other", "c = Equal(level, other) y = Not(c)", 0),
    ],
)
def test_an_integer_is_what_the_graph_compares_it_with(inputs, body, expected):
    text = f"""
    <ir_version: 9, opset_import: ["" : 17]>
    g ({inputs}) => (bool[k] y) <int64 three = {{3}}, float[2, 1] table = {{1, 2}}> {{ {body} }}
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    choice = choose_inputs(model, input_specs(model), {})
    (value,) = list(choice.feeds(0).values())[:1]
    if expected is None:
        assert value.item() in (0, 1)
    else:
        assert value.reshape(-1).tolist() == [expected]
    assert any("which the graph compares it with" in line for line in choice.notes("now")) == (expected == 3)
