"""Drawings as SVG text, made by hand: small, the same for the same input, and coloured by the page's own theme.

matplotlib's SVG is ten times as large, cannot follow a dark theme, and takes a second to import. Colours and dashes are
the classes `s0` … `s7` and `rest`; the report's style sheet says what they look like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 12, 48
ROW_HEIGHT, BAR_HEIGHT, BAR_LEFT, BAR_VALUES = 38, 13, 14, 140
CHARACTER_WIDTH = 6.9
"""Of the drawings' text at most: for keeping labels apart."""
BAND_ROOM = 0.25
"""Of the height of the lines themselves, so much above and below them is for bands: shown whole, the interval of two
repeats (Student's t is 12.7) would press the lines flat."""
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, width, height."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, with a band around it where `band` gives (x, low, high)."""

    points: tuple[Point, ...]
    title: str
    style: str = "rest"
    band: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Dot:
    """A point with its own text and, where the page should show one, a label beside it."""

    at: Point
    title: str
    style: str = "rest"
    label: str = ""
    half_height: float | None = None
    """Of its error bar."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar."""

    value: float
    style: str
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar, whole or of parts that add up to it; `mark` is a second figure on the same scale."""

    label: str
    value: float
    text: str
    style: str = "s0"
    mark: float | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """What stands beside a scale."""

    label: str
    format: Callable[[float], str] | None = None
    """Of its ticks; as many decimals as their steps have where nothing is said."""
    at: tuple[float, ...] = ()
    """Where its ticks are; round numbers where nothing is said."""
    from_zero: bool = False
    """For sizes and speeds, of which a reader compares the heights."""


def ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round numbers between two bounds, some `about` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return (low,)
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def _spelled(places: Sequence[float], axis: Axis) -> list[tuple[float, str]]:
    if axis.format:
        return [(place, axis.format(place)) for place in places]
    decimals = max((len(f"{place:.6g}".partition(".")[2]) for place in places), default=0)
    is_small = any(place and abs(place) < 1e-4 for place in places)
    return [(place, f"{place:.3g}" if is_small else f"{place:.{decimals}f}") for place in places]


def xy_plot(title: str, summary: str, x: Axis, y: Axis, lines: Sequence[Line] = (), dots: Sequence[Dot] = ()) -> str:
    """Lines and dots over two axes; where nothing can be drawn, an empty text."""
    points = [point for line in lines for point in line.points] + [dot.at for dot in dots]
    if not points:
        return ""
    # Ticks that are named are places in a row, not figures.
    x_range = (min(x.at) - 0.5, max(x.at) + 0.5) if x.at else _padded([point[0] for point in points])
    low, high = _heights(lines, dots)
    scale = _Scale(x_range, (0.0 if y.from_zero else low, high))
    parts = [_grid(scale, x, y)]
    parts += [_band(line, scale) for line in lines if len(line.band) > 1]
    parts += [_line(line, scale) for line in lines]
    parts += [_dot(dot, scale) for dot in dots]
    # The last drawn are the ones that stand out: theirs come first.
    parts.append(_labels(dots[::-1], scale))
    return _svg(title, summary, WIDTH, HEIGHT, parts)


def is_cut(lines: Sequence[Line]) -> bool:
    """Whether a band goes on beyond the drawing of these lines."""
    low, high = _heights(lines, ())
    return any(bottom < low or top > high for line in lines for _, bottom, top in line.band)


def _heights(lines: Sequence[Line], dots: Sequence[Dot]) -> Point:
    """What the drawing shows of its y axis: all lines and dots, and of the bands what lies near them."""
    shown = [point[1] for line in lines for point in line.points]
    shown += [dot.at[1] + side * (dot.half_height or 0) for dot in dots for side in (-1, 1)]
    room = BAND_ROOM * (max(shown) - min(shown))
    least, most = min(shown) - room, max(shown) + room
    edges = [min(max(edge, least), most) for line in lines for _, *both in line.band for edge in both]
    low, high = _padded([*shown, *edges])
    return (max(0.0, low) if min(shown) > 0 else low), high


def bar_plot(title: str, summary: str, bars: Sequence[Bar], axis: Axis) -> str:
    """Horizontal bars from zero, each with its label and its figure."""
    if not bars:
        return ""
    bottom = ROW_HEIGHT * len(bars) + 6
    longest = max(max(bar.value, bar.mark or 0.0) for bar in bars) or 1.0
    per_unit = (WIDTH - BAR_LEFT - BAR_VALUES) / longest
    parts = []
    for tick, text in _spelled(ticks(0, longest, 4), axis):
        at = BAR_LEFT + tick * per_unit
        parts.append(f'<path class="grid" d="M{at:.1f} 0V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>')
    parts += [_bar(bar, ROW_HEIGHT * place, per_unit) for place, bar in enumerate(bars)]
    parts.append(f'<text class="axis" x="{BAR_LEFT}" y="{bottom + 38}">{escape(axis.label)}</text>')
    return _svg(title, summary, WIDTH, bottom + BOTTOM, parts)


def _bar(bar: Bar, top: float, per_unit: float) -> str:
    """Its label above it, so that a long one has room."""
    end = max(1.0, bar.value * per_unit)
    parts = [
        f"<g><title>{escape(bar.label)}: {escape(bar.text)}</title>",
        f'<text class="value" x="{BAR_LEFT + 2}" y="{top + 15:.1f}">{escape(_shortened(bar.label, WIDTH))}</text>',
    ]
    if bar.parts:
        parts.append(_stack(bar.parts, top + 20, per_unit))
    elif bar.value:
        parts.append(_rect(BAR_LEFT, top + 20, end, bar.style))
    if bar.mark is not None:
        at = bar.mark * per_unit
        end = max(end, at)
        parts.append(f'<path class="mark" d="M{BAR_LEFT + at:.1f} {top + 17:.1f}v{BAR_HEIGHT + 6}"/>')
    parts.append(f'<text class="value" x="{BAR_LEFT + end + 7:.1f}" y="{top + 31:.1f}">{escape(bar.text)}</text></g>')
    return "".join(parts)


def _stack(parts: Sequence[Part], top: float, per_unit: float) -> str:
    drawn, left = [], float(BAR_LEFT)
    for part in parts:
        width = part.value * per_unit
        drawn.append(f"<g><title>{escape(part.title)}</title>{_rect(left, top, width, part.style)}</g>")
        left += width
    return "".join(drawn)


def _rect(left: float, top: float, width: float, style: str) -> str:
    return f'<rect class="bar {style}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}"/>'


def _shortened(text: str, room: float) -> str:
    most = int(room / CHARACTER_WIDTH)
    return text if len(text) <= most else text[: most - 1] + "…"


@dataclass(frozen=True, slots=True)
class _Scale:
    """From figures to places in the drawing."""

    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _padded(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    # What cannot be negative does not begin below zero.
    return (max(0.0, low - margin) if low > 0 else low - margin), high + margin


def _grid(scale: _Scale, x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick, text in _spelled(y.at or ticks(*scale.y_range), y):
        at = scale.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    columns = _spelled(x.at or ticks(*scale.x_range, 6), x)
    room = (right - LEFT) / len(columns)
    for tick, text in columns:
        at = scale.x(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {bottom}v5"/>')
        parts += [
            f'<text x="{at:.1f}" y="{bottom + 16 + 12 * row}" text-anchor="middle">{escape(words)}</text>'
            for row, words in enumerate(_in_rows(text, room))
        ]
    middle, centre = (TOP + bottom) / 2, (LEFT + right) / 2
    parts.append(f'<path class="frame" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text class="axis" x="{centre:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text class="axis" transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    return "".join(parts)


def _in_rows(text: str, room: float) -> list[str]:
    """What is too long for the room beside its neighbours, as `0.0001 to 0.000283`, in two rows."""
    first, _, last = text.rpartition(" ")
    if len(text) * CHARACTER_WIDTH <= room or not first:
        return [_shortened(text, room)]
    return [_shortened(first, room), _shortened(last, room)]


def _path(points: Sequence[Point], scale: _Scale) -> str:
    return "M" + "L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in points)


def _band(line: Line, scale: _Scale) -> str:
    upper = _cut([(x, high) for x, _, high in line.band], scale.y_range)
    lower = _cut([(x, low) for x, low, _ in reversed(line.band)], scale.y_range)
    return f'<path class="band {line.style}" d="{_path([*upper, *lower], scale)}Z"/>'


def _cut(edge: Sequence[Point], y_range: Point) -> list[Point]:
    """With a point where it leaves the drawing and one where it comes back; between them it runs along the frame."""
    low, high = y_range
    points = [edge[0]]
    for (x, y), (next_x, next_y) in pairwise(edge):
        leaves = sorted((bound - y) / (next_y - y) for bound in y_range if min(y, next_y) < bound < max(y, next_y))
        points += [(x + part * (next_x - x), y + part * (next_y - y)) for part in leaves]
        points.append((next_x, next_y))
    return [(x, min(max(y, low), high)) for x, y in points]


def _line(line: Line, scale: _Scale) -> str:
    if len(line.points) == 1:
        return _dot(Dot(line.points[0], line.title, line.style), scale)
    return f'<path class="line {line.style}" d="{_path(line.points, scale)}"><title>{escape(line.title)}</title></path>'


def _dot(dot: Dot, scale: _Scale) -> str:
    x, y = scale.x(dot.at[0]), scale.y(dot.at[1])
    parts = [f"<g><title>{escape(dot.title)}</title>"]
    if dot.half_height:
        high, low = scale.y(dot.at[1] + dot.half_height), scale.y(dot.at[1] - dot.half_height)
        parts.append(f'<path class="line error {dot.style}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
    parts.append(f'<circle class="dot {dot.style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
    return "".join([*parts, "</g>"])


def _labels(dots: Sequence[Dot], scale: _Scale) -> str:
    """Each label beside its dot, where it meets no other label or dot; one that finds no place is left to its title."""
    taken = [(scale.x(d.at[0]) - 6, scale.y(d.at[1]) - 6, 12.0, 12.0) for d in dots]
    parts = []
    for dot in dots:
        width, x, y = len(dot.label) * CHARACTER_WIDTH, scale.x(dot.at[0]), scale.y(dot.at[1])
        places = [(x + side, y + lift) for lift in (-19, 5, -7) for side in (8, -8 - width)]
        places += [(x - width / 2, y + lift) for lift in (-24, 10)]
        free = [p for p in places if dot.label and _is_free((*p, width, 14), taken)]
        if free:
            taken.append((*free[0], width, 14))
            left, top = free[0]
            parts.append(f'<text class="value" x="{left:.1f}" y="{top + 11:.1f}">{escape(dot.label)}</text>')
    return "".join(parts)


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    x, y, width, height = box
    if x < LEFT or x + width > WIDTH or y < 0 or y + height > HEIGHT - BOTTOM:
        return False
    return not any(x < a + w and a < x + width and y < b + h and b < y + height for a, b, w, h in taken)


def _svg(title: str, summary: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}: {escape(summary)}"><title>{escape(title)}</title><desc>{escape(summary)}</desc>'
        f"{''.join(parts)}</svg>"
    )
