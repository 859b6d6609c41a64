"""Charts as SVG: where things are drawn, on numbers that can be worked out by hand."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_onnx.report.charts import (
    MARKERS,
    Axis,
    Mark,
    Point,
    Rule,
    Series,
    axis_over,
    bars,
    line_chart,
    ticks,
)

LEFT, RIGHT, TOP, BOTTOM = 46, 328, 16, 190  # the inner rectangle of a chart


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.47, 0.98, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (0, 7e-5, [0, 1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5]),
        (0, 2e-15, [0, 5e-16, 1e-15, 1.5e-15, 2e-15]),
        (1, 144, [20, 40, 60, 80, 100, 120, 140]),  # 50 and 100 would be too few
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected, abs=0)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.sampled_from([4, 5]))
@example(1.0, 143.0, 5)
def test_ticks_lie_in_the_range_evenly(low: float, span: float, count: int) -> None:
    high = low + span
    found = ticks(low, high, count)
    assert 3 <= len(found) <= 8
    room = 1e-6 * max(abs(low), abs(high), span)
    assert low - room <= found[0] < found[-1] <= high + room
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert max(steps) - min(steps) <= room


def test_ticks_of_no_range() -> None:
    assert ticks(0, math.inf) == [0]


@pytest.mark.parametrize(
    ("values", "start", "low", "high"),
    [([1, 2], None, 0.94, 2.06), ([1, 2], 0.0, 0.0, 2.06), ([5], None, 4.5, 5.5), ([0], None, -1.0, 1.0)],
)
def test_axis_holds_all_values(values: list[float], start: float | None, low: float, high: float) -> None:
    axis = axis_over("x", values, start=start)
    assert (axis.low, axis.high) == pytest.approx((low, high))
    assert all(0 <= axis.share(value) <= 1 for value in values)


def tags(source: str, name: str, kind: str | None = None) -> list[ET.Element]:
    found = ET.fromstring(source).iter(name)
    return [tag for tag in found if kind is None or tag.get("class") == kind]


def test_bars_are_shares_of_the_longest() -> None:
    drawn = tags(bars((2.0, None, 0.5), ("before", "after", "error"), 4.0), "rect")
    assert [(tag.get("class"), tag.get("width"), tag.get("y")) for tag in drawn] == [
        ("before", "50%", "0"),
        ("error", "12.5%", "18"),
    ]
    assert [tag.get("width") for tag in tags(bars((0.0,), ("after",), 0.0), "rect")] == ["0%"]


SERIES = Series("a", (Point(0, 0), Point(1, 5, 4, 6), Point(2, 10)))
X, Y = Axis("zeros", 0, 2), Axis("speed", 0, 10)


def test_points_lie_where_the_axes_say() -> None:
    source = line_chart("label", [SERIES], X, Y)
    (line,) = tags(source, "polyline")
    middle = (LEFT + RIGHT) // 2
    assert line.get("points") == f"{LEFT},{BOTTOM} {middle},{(TOP + BOTTOM) // 2} {RIGHT},{TOP}"
    (interval,) = [tag for tag in tags(source, "line") if tag.get("class") is None]
    assert (interval.get("x1"), interval.get("y1"), interval.get("y2")) == (str(middle), "120.4", "85.6")
    words = [tag.text for tag in tags(source, "text")]
    assert words.count("zeros") == words.count("speed") == 1
    assert words[:3] == ["0", "2", "4"]


def test_points_outside_are_drawn_at_the_edge() -> None:
    (line,) = tags(line_chart("", [Series("", (Point(-1, 20),))], X, Y), "polyline")
    assert line.get("points") == f"{LEFT},{TOP}"


def test_every_series_has_a_sign_of_its_own() -> None:
    source = line_chart("", [Series(name, SERIES.points) for name in "abcdefg"], X, Y)
    groups = [tag.get("class") or "" for tag in tags(source, "g") if "series" in (tag.get("class") or "")]
    assert groups == [f"series s{index % len(MARKERS)}" for index in range(7)]


def test_rules_inside_are_drawn_and_others_are_not() -> None:
    rules = [
        Rule(5, "half"),
        Rule(1, "middle", vertical=True),
        Rule(11, "outside"),
        Rule(-1, "left", vertical=True),
    ]
    source = line_chart("", [SERIES], X, Y, rules)
    drawn = [tuple(tag.get(key) for key in ("x1", "y1", "x2", "y2")) for tag in tags(source, "line", "rule")]
    assert drawn == [(str(LEFT), "103", str(RIGHT), "103"), ("187", str(BOTTOM), "187", str(TOP))]
    assert [tag.text for tag in tags(source, "text", "rule")] == ["half", "middle"]


@pytest.mark.parametrize(("height", "anchor"), [(1, "end"), (9, "start")])
def test_words_of_a_rule_stand_where_the_line_is_far(height: float, anchor: str) -> None:
    (text,) = tags(line_chart("", [SERIES], X, Y, [Rule(height, "rule")]), "text", "rule")
    assert text.get("text-anchor") == anchor


@pytest.mark.parametrize(("x", "anchor"), [(0.2, "start"), (1.8, "end")])
def test_marks_point_inwards(x: float, anchor: str) -> None:
    source = line_chart("", [SERIES], X, Y, marks=[Mark(x, 5, "chosen")])
    (circle,) = tags(source, "circle", "mark")
    assert float(circle.get("cx") or 0) == pytest.approx(LEFT + x / 2 * (RIGHT - LEFT))
    (text,) = tags(source, "text", "mark")
    assert (text.text, text.get("text-anchor")) == ("chosen", anchor)


def test_text_is_escaped() -> None:
    hostile = "\"><script>alert('x')</script>"
    source = line_chart(hostile, [SERIES], Axis(hostile, 0, 2), Y, [Rule(5, hostile)], [Mark(1, 5, hostile)])
    assert "<script" not in source
    assert ET.fromstring(source).get("aria-label") == hostile
    assert [tag.text for tag in tags(source, "text")].count(hostile) == 3
