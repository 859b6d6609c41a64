"""The charts of a report as inline SVG: pure functions from numbers to markup, styled by the page.

Text is escaped wherever it comes from. Colours are classes, so that dark mode and print decide them; no element carries
a style of its own, which the page's content policy would refuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

__all__ = [
    "MARKERS",
    "Axis",
    "Mark",
    "Point",
    "Rule",
    "Series",
    "axis_over",
    "bars",
    "line_chart",
    "marker",
    "ticks",
]

_WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 16, 40
_FEWEST = 3  # ticks that show how an axis goes on

MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")
"""What tells series apart, along with the dashes of their lines: colours alone would not do."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point; ``low`` to ``high`` is its interval in y."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """Points by rising x under one name."""

    name: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What an axis shows: its title, its range, and how a number on it is written."""

    title: str
    low: float
    high: float
    text: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Where ``value`` lies: 0 at ``low``, 1 at ``high``."""
        return (value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A line across the chart at ``value`` of the y axis, or of the x axis if ``vertical``, with its meaning."""

    value: float
    text: str
    vertical: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point that is pointed out, with its meaning."""

    x: float
    y: float
    text: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, at least three."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (0.5, 1, 2, 5, 10)
    place = next(place for place, factor in enumerate(factors) if factor * power >= 0.7 * rough)
    found = _multiples(factors[place] * power, low, high)
    return found if len(found) >= _FEWEST else _multiples(factors[place - 1] * power, low, high)


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def axis_over(
    title: str,
    values: Sequence[float],
    *,
    start: float | None = None,
    text: Callable[[float], str] = "{:g}".format,
) -> Axis:
    """An axis that holds all ``values`` with some room; it starts at ``start`` if given."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(title, low - room if start is None else min(start, low), high + room, text)


def bars(values: Sequence[float | None], kinds: Sequence[str], longest: float) -> Markup:
    """Horizontal bars one below the other, as long as their share of ``longest``; None is no bar.

    The numbers stand beside it as text, so it is hidden from screen readers.
    """
    height = 8 if len(values) > 1 else 12
    drawn = [
        Markup('<rect class="{}" y="{}" width="{}%" height="{}"/>').format(
            kind, index * (height + 1), _number(100 * value / longest if longest > 0 else 0), height
        )
        for index, (value, kind) in enumerate(zip(values, kinds, strict=True))
        if value is not None
    ]
    total = len(values) * (height + 1)
    return Markup('<svg class="bars" aria-hidden="true" height="{}">{}</svg>').format(
        total, Markup("").join(drawn)
    )


def line_chart(
    label: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    rules: Sequence[Rule] = (),
    marks: Sequence[Mark] = (),
) -> Markup:
    """A chart of ``series`` over two axes; ``label`` says for screen readers what is to be seen."""

    def at(px: float, py: float) -> tuple[str, str]:
        across, up = (min(max(share, 0.0), 1.0) for share in (x.share(px), y.share(py)))
        inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _number(_LEFT + across * inner_width), _number(_HEIGHT - _BOTTOM - up * inner_height)

    parts = [_grid(x, y, at)]
    points = [point for line in series for point in line.points]
    parts += [_rule(rule, x, y, points, at) for rule in rules]
    for index, line in enumerate(series):
        kind = index % len(MARKERS)
        steps = " ".join(",".join(at(point.x, point.y)) for point in line.points)
        parts.append(Markup('<g class="series s{}"><polyline points="{}"/>').format(kind, steps))
        for point in line.points:
            if point.low is not None and point.high is not None:
                (px, low), (_, high) = at(point.x, point.low), at(point.x, point.high)
                parts.append(Markup('<line x1="{}" y1="{}" x2="{}" y2="{}"/>').format(px, low, px, high))
            parts.append(marker(kind, *at(point.x, point.y)))
        parts.append(Markup("</g>"))
    for mark in marks:
        px, py = at(mark.x, mark.y)
        right = x.share(mark.x) < 0.6
        parts.append(Markup('<circle class="mark" cx="{}" cy="{}" r="7"/>').format(px, py))
        parts.append(
            Markup('<text class="mark" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                _number(float(px) + (10 if right else -10)),
                _number(max(float(py) - 8, 11)),
                "start" if right else "end",
                mark.text,
            )
        )
    return Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        label, _WIDTH, _HEIGHT, Markup("").join(parts)
    )


def marker(kind: int, x: str = "6", y: str = "6") -> Markup:
    """The sign of a series, centred at (``x``, ``y``)."""
    shapes = {
        "circle": '<circle r="3.2"/>',
        "square": '<rect x="-3" y="-3" width="6" height="6"/>',
        "triangle": '<path d="M-3.8 3L0-3.8L3.8 3Z"/>',
        "diamond": '<path d="M-4 0L0-4L4 0L0 4Z"/>',
        "cross": '<path class="open" d="M-3-3L3 3M-3 3L3-3"/>',
        "bar": '<path class="open" d="M0-4V4"/>',
    }
    return Markup('<g class="marker s{}" transform="translate({} {})">{}</g>').format(
        kind, x, y, Markup(shapes[MARKERS[kind % len(MARKERS)]])
    )


def _grid(x: Axis, y: Axis, at: Callable[[float, float], tuple[str, str]]) -> Markup:
    parts = []
    for value in ticks(y.low, y.high, 4):
        left, height = at(x.low, value)
        right, _ = at(x.high, value)
        line = '<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
        parts.append(
            Markup(line).format(
                left, height, right, height, _LEFT - 6, _number(float(height) + 4), y.text(value)
            )
        )
    for value in ticks(x.low, x.high, 5):
        across, _ = at(value, y.low)
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                across, _HEIGHT - _BOTTOM + 15, x.text(value)
            )
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            _WIDTH - _RIGHT, _HEIGHT - 6, x.title
        )
    )
    parts.append(Markup('<text class="axis" x="2" y="10">{}</text>').format(y.title))
    return Markup("").join(parts)


def _rule(
    rule: Rule, x: Axis, y: Axis, points: Sequence[Point], at: Callable[[float, float], tuple[str, str]]
) -> Markup:
    axis = x if rule.vertical else y
    if not 0 <= axis.share(rule.value) <= 1:
        return Markup("")
    start = at(rule.value, y.low) if rule.vertical else at(x.low, rule.value)
    end = at(rule.value, y.high) if rule.vertical else at(x.high, rule.value)
    line = Markup('<line class="rule" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*start, *end)
    if rule.vertical:
        right = x.share(rule.value) < 0.6
        place, anchor = (
            (float(end[0]) + (4 if right else -4), float(end[1]) + 10),
            "start" if right else "end",
        )
    else:  # where the points are farther away
        halves: tuple[list[float], list[float]] = ([1.0], [1.0])
        for point in points:
            halves[x.share(point.x) > 0.5].append(abs(y.share(point.y) - y.share(rule.value)))
        left = min(halves[0]) > min(halves[1])
        place, anchor = (float((start if left else end)[0]), float(end[1]) - 4), "start" if left else "end"
    return line + Markup('<text class="rule" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        _number(place[0]), _number(place[1]), anchor, rule.text
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
