"""Sizes, times and shares in words."""

import pytest

from sparse_onnx.units import format_bytes, format_ms, format_number, format_share


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1500, "1.5 kB"), (999_999, "1000.0 kB"),
        (10**6, "1.0 MB"), (437_600_000, "437.6 MB"), (3 * 10**9, "3.0 GB"), (5 * 10**12, "5000.0 GB"),
    ],
)  # fmt: skip
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("ms", "text"), [(None, "-"), (0.0, "0.000 ms"), (9.9994, "9.999 ms"), (123.45, "123.5 ms")]
)
def test_milliseconds(ms, text):
    assert format_ms(ms) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0"), (3.14e-7, "3.1e-07"), (1.6, "1.6e+00")])
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.0%"), (0.876, "87.6%"), (1.0, "100.0%")])
def test_shares(value, text):
    assert format_share(value) == text
