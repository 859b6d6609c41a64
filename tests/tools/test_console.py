"""What the commands share: one line about the work that no sparse kernel does."""

import pytest

from sparse_onnx.tools.console import other_work
from sparse_onnx.units import format_rounded


def row(op_type, share):
    return {"op_type": op_type, "count": 1, "share": share, "reason": "why"}


def test_no_line_without_such_work():
    assert other_work([]) == ""


def test_operators_are_added_up_and_sorted_by_work():
    rows = [row("MatMul", 0.1), row("LSTM", 0.3), row("MatMul", 0.25), row("Einsum", None)]
    assert other_work(rows) == "no sparse kernel for (share of work): MatMul 35%, LSTM 30%, Einsum"


def test_the_line_stays_on_a_screen():
    rows = [row(f"com.microsoft::AnOperatorWithALongName{index}", 0.1) for index in range(9)]
    found = other_work(rows)
    assert len(found) <= 120
    assert found.endswith("8 other operators")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "not known"),
        (0, "0%"),
        (1e-9, "<1%"),
        (0.3, "30%"),
        (0.9999, ">99%"),
        (1, "100%"),
        (0.994, "99%"),
    ],
)
def test_nothing_and_everything_are_exact(share, text):
    assert format_rounded(share) == text
