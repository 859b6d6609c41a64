"""Convolutions by unfolding: against explicit loops, and against what ONNX Runtime computes from the same input."""

import itertools
import math

import numpy as np
import pytest

from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration.rows import unfolded_rows
from sparse_onnx.passes.patterns.conv_window import ConvWindow

CASES = {
    "plain": ("kernel_shape = [3, 3]", (2, 4, 7, 6), (5, 4, 3, 3)),
    "pads that differ": ("pads = [1, 0, 2, 1]", (2, 3, 5, 6), (4, 3, 3, 2)),
    "strides and dilations": (
        "strides = [2, 1], dilations = [2, 3], pads = [2, 2, 2, 2]",
        (1, 2, 9, 8),
        (3, 2, 3, 2),
    ),
    "groups": ("group = 2, pads = [1, 1, 1, 1]", (3, 4, 5, 5), (6, 2, 3, 3)),
    "pointwise": ("strides = [2, 2]", (2, 6, 4, 4), (3, 6, 1, 1)),
    "one axis": ("pads = [2, 2]", (2, 3, 9), (4, 3, 5)),
    "three axes": ("strides = [1, 2, 1]", (2, 2, 4, 5, 4), (3, 2, 2, 2, 2)),
    "same upper": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 2, 6, 7), (3, 2, 3, 4)),
    "same lower": ('auto_pad = "SAME_LOWER"', (1, 2, 6, 7), (3, 2, 2, 4)),
    "valid": ('auto_pad = "VALID"', (1, 2, 6, 7), (3, 2, 3, 3)),
}


def _conv(from_text, attributes: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]):
    rng = np.random.default_rng(6)
    dims = ", ".join(["n", *map(str, x_shape[1:])])
    free = ", ".join("abcdef"[: len(x_shape)])
    model = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        conv (float[{dims}] X) => (float[{free}] Y) {{ Y = Conv<{attributes}>(X, W) }}""",
        W=rng.standard_normal(w_shape).astype(np.float32),
    )
    return model, rng.standard_normal(x_shape).astype(np.float32)


def _loops(x: np.ndarray, window: ConvWindow) -> list[np.ndarray]:
    """The rows of each group, position by position and tap by tap."""
    padding = window.padding(x.shape[2:])
    padded = np.pad(x, [(0, 0), (0, 0), *padding])
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    outs = [
        (size - span) // s + 1 for size, span, s in zip(padded.shape[2:], spans, window.strides, strict=True)
    ]
    channels = x.shape[1] // window.groups
    groups = []
    for group in range(window.groups):
        rows = []
        for image, *place in itertools.product(range(len(x)), *map(range, outs)):
            row = []
            for channel, *tap in itertools.product(range(channels), *map(range, window.kernel)):
                at = [
                    p * s + t * d
                    for p, s, t, d in zip(place, window.strides, tap, window.dilations, strict=True)
                ]
                row.append(padded[(image, group * channels + channel, *at)])
            rows.append(row)
        groups.append(np.array(rows))
    return groups


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_the_unfolded_input(from_text, calibrator, run, assert_moments, case):
    model, x = _conv(from_text, *CASES[case])
    (weight,), _ = find_weights(model)
    window = ConvWindow.of(weight.nodes[0], CASES[case][2][2:])
    groups = _loops(x, window)
    statistics = calibrator(model, {"X": x}, batch=2).oneshot()["W"]
    assert len(statistics) == len(groups)
    expected = run(model, {"X": x})["Y"]
    assert window.positions(x.shape[2:]) == expected.shape[2:]
    columns = np.split(weight.matrix(), len(groups), axis=1)
    products = [rows @ w for rows, w in zip(groups, columns, strict=True)]
    ours = np.concatenate(products, axis=1).reshape(len(x), *expected.shape[2:], -1)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), expected, rtol=1e-4, atol=1e-4)
    for layer, rows in zip(statistics, groups, strict=True):
        assert_moments(layer, rows.astype(np.float64))


def test_a_large_input_is_unfolded_in_bounded_parts(monkeypatch):
    x = np.random.default_rng(7).standard_normal((3, 2, 9, 8)).astype(np.float32)
    window = ConvWindow((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    whole = [np.concatenate(parts) for parts in zip(*unfolded_rows(x, window), strict=True)]
    limit = 2000  # bytes; one image unfolds to 5 kB
    monkeypatch.setattr("sparse_onnx.passes.calibration.rows._CHUNK_BYTES", limit)
    parts = list(unfolded_rows(x, window))
    assert len(parts) > 3
    assert max(rows.nbytes for (rows,) in parts) <= limit
    np.testing.assert_array_equal(np.concatenate([rows for (rows,) in parts]), whole[0])


def test_two_convolutions_with_one_window_share_their_statistics(from_text, calibrator):
    rng = np.random.default_rng(8)
    weights = {name: rng.standard_normal((3, 2, 3, 3)).astype(np.float32) for name in ("A", "B", "C")}
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        convs (float[n, 2, 6, 6] X) => (float[a, b, c, d] Y, float[e, f, g, h] Z) {
          p = Conv(X, A) q = Conv(X, B) Y = Add(p, q) Z = Conv<pads = [1, 1, 1, 1]>(X, C) }""",
        **weights,
    )
    x = rng.standard_normal((2, 2, 6, 6)).astype(np.float32)
    statistics = calibrator(model, {"X": x}).oneshot()
    assert statistics["A"] is statistics["B"]
    assert statistics["A"][0].count == 2 * 16
    assert statistics["C"][0].count == 2 * 36
    assert statistics["C"][0].size == math.prod((2, 3, 3))
