"""Which input holds tokens: the one that chooses from the largest constant table."""

import numpy as np
import pytest

from sparse_onnx.passes.patterns.tokens import TokenInput, find_tokens

_MODEL = """<ir_version: 9, opset_import: ["" : 19]>
model ({inputs}) => (float[b, s, 4] Y) {{ {nodes} }}
"""
_IDS = "int64[b, s] ids"


def tables(**rows):
    return {name: np.ones((count, 4), np.float32) for name, count in rows.items()}


@pytest.mark.parametrize(
    ("inputs", "nodes", "rows", "expected"),
    [
        (_IDS, "Y = Gather(words, ids)", {"words": 90}, TokenInput("ids", 90)),
        ("int32[b, s] ids", "Y = Gather<axis = 0>(words, ids)", {"words": 90}, TokenInput("ids", 90)),
        (
            f"int64[b, s] places, {_IDS}, int64[b, s] types",
            "p = Gather(position, places) t = Gather(type, types) w = Gather(words, ids) q = Add(p, t) Y = Add(q, w)",
            {"words": 90, "position": 16, "type": 2},
            TokenInput("ids", 90),
        ),
        (_IDS, "i = Cast<to = 6>(ids) Y = Gather(words, i)", {"words": 90}, TokenInput("ids", 90)),
        (
            _IDS,
            "n = Identity(words) Y = Gather(n, ids)",
            {"words": 90},
            TokenInput("ids", 90),
        ),
    ],
)
def test_tokens_are_found(from_text, inputs, nodes, rows, expected):
    model = from_text(_MODEL.format(inputs=inputs, nodes=nodes), **tables(**rows))
    assert find_tokens(model) == expected


@pytest.mark.parametrize(
    ("inputs", "nodes", "rows"),
    [
        ("float[b, s, 4] X", "Y = Add(X, words)", {"words": 1}),
        (_IDS, "c = Cast<to = 1>(ids) u = Unsqueeze(c, axes) Y = Mul(u, words)", {"words": 1}),
        (f"{_IDS}, float[9, 4] table", "Y = Gather(table, ids)", {}),
        ("int64[s] ids", "g = Gather(words, ids) Y = Unsqueeze(g, axes)", {"words": 90}),
    ],
)
def test_what_is_no_token_is_none(from_text, inputs, nodes, rows):
    extra = {"axes": np.array([0 if "[s]" in inputs else 2])} if "axes" in nodes else {}
    model = from_text(_MODEL.format(inputs=inputs, nodes=nodes), **tables(**rows), **extra)
    assert find_tokens(model) is None


def test_a_table_on_a_grid_counts(from_text):
    text = _MODEL.format(inputs=_IDS, nodes="w = DequantizeLinear(integers, scale) Y = Gather(w, ids)")
    arrays = {"integers": np.ones((90, 4), np.int8), "scale": np.float32(0.5)}
    assert find_tokens(from_text(text, **arrays)) == TokenInput("ids", 90)
