"""Charts as inline SVG, no library: lines, bars, ranges. Colours are the page's CSS classes, so that light and dark both read.

A series is "ours" (drawn strong), "peer" or "bound" (dashed: what hardware allows, what a bar asks for). Every mark has its
number as a tooltip. Knows nothing of what is drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 760
GAP = 10  # between groups of bars
CHAR = 7.4  # width of a character of the labels, about

CSS = """
svg { display: block; width: 100%; height: auto; max-width: 820px; font: 12px/1 system-ui, sans-serif; }
svg text { fill: var(--ink-2); } svg text.strong { fill: var(--ink); font-weight: 600; } svg text.end { font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--ink-3); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } svg .line.ours { stroke-width: 3.2; }
svg .line.bound { stroke-dasharray: 2 5; stroke-width: 2; } svg .bar { rx: 3; } svg .halo { stroke: var(--card); stroke-width: 2; }
""" + "".join(
    f"svg .s{n} {{ stroke: var(--s{n}); }} svg .f{n} {{ fill: var(--s{n}); }} svg text.t{n} {{ fill: var(--s{n}); }}\n" for n in range(7)
)


@dataclass(frozen=True, slots=True)
class Series:
    """`points` (x, y), y above 0 on a logarithmic axis. `colour`: 0 ours, 1.. peers, 6 bounds."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    kind: str = "peer"


@dataclass(frozen=True, slots=True)
class Bar:
    """`mark`: where a bar is asked for (a tick across), 0 for none; `note`: words behind the number; `gap`: space above, where
    a group of bars begins."""

    label: str
    value: float
    colour: int
    text: str
    mark: float = 0.0
    note: str = ""
    gap: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """A row of a range chart: values in order (p50, p90, p99, ...), named."""

    label: str
    values: Sequence[tuple[str, float]]
    colour: int


def number(value: float) -> str:
    """At most three digits that matter: 28,000; 1,975; 42.3; 0.95."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) < 100 else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def escape(text: str) -> str:
    return html.escape(text, quote=True)


class _Axis:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self._log = log
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self._log else value
        return self._start + (at - self._low) / ((self._high - self._low) or 1) * (self._end - self._start)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from `low` to `high`."""
    if log:
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [s * 10.0**p for p in powers for s in steps if low * 0.999 <= s * 10.0**p <= high * 1.001]
    raw = (high - low) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _frame(height: float, label: str, body: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *body, "</svg>"])


def lines(series: Sequence[Series], x_label: str, y_label: str, height: float = 400) -> str:
    """Both axes logarithmic, x ticks at the points; names stand at the ends of their lines."""
    xs = sorted({x for s in series for x, _ in s.points})
    values = [y for s in series for _, y in s.points]
    low, high = min(values) / 1.25, max(values) * 1.25
    left, right, top, bottom = 62, 168, 26, 48
    x, y = _Axis(xs[0], xs[-1], left, WIDTH - right, True), _Axis(low, high, height - bottom, top, True)
    out = [f'<text x="{left}" y="12">{escape(y_label)}</text>']
    for tick in ticks(low, high, True):
        out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for value in xs:
        out.append(f'<text x="{x(value):.1f}" y="{height - bottom + 18}" text-anchor="middle">{number(value)}</text>')
    out.append(f'<text x="{(left + WIDTH - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for s in sorted(series, key=lambda s: s.kind == "ours"):
        path = " ".join(f"{'L' if i else 'M'}{x(a):.1f} {y(b):.1f}" for i, (a, b) in enumerate(s.points))
        out.append(f'<path class="line s{s.colour} {s.kind}" d="{path}"/>')
        radius = {"ours": 5, "peer": 3.4, "bound": 0}[s.kind]
        for a, b in s.points if radius else ():
            tip = f"{s.name}, {x_label} {number(a)}: {number(b)}"
            out.append(_dot(x(a), y(b), radius, s.colour, tip))
    for s, at in zip(series, apart([y(s.points[-1][1]) for s in series], 15), strict=True):
        out.append(f'<text class="end t{s.colour}" x="{WIDTH - right + 12}" y="{at + 4:.1f}">{escape(s.name)}</text>')
    return _frame(height, f"{y_label} against {x_label}", out)


def _dot(x: float, y: float, radius: float, colour: int, tip: str) -> str:
    return f'<circle class="f{colour} halo" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(tip)}</title></circle>'


def apart(wanted: list[float], gap: float) -> list[float]:
    """Places near the wanted ones, none nearer than `gap` to the next: clusters are spread around their middle."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _middle(wanted, groups[-1]) - _middle(wanted, groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(wanted)
    for group in groups:
        first = _middle(wanted, group) - gap * (len(group) - 1) / 2
        for n, i in enumerate(group):
            places[i] = first + gap * n
    return places


def _middle(wanted: list[float], group: list[int]) -> float:
    return sum(wanted[i] for i in group) / len(group)


def bars(rows: Sequence[Bar], label: str, unit: str, most: float = 0.0) -> str:
    """Horizontal, one a row; a `mark` is a tick across the row."""
    left = min(300.0, 16 + CHAR * max(len(r.label) for r in rows))
    right = 24 + CHAR * max(len(r.text) + len(r.note) for r in rows)
    step, top = 26, 8
    high = most or max(max(r.value, r.mark) for r in rows) * 1.02
    places = [top + step * n + GAP * sum(r.gap for r in rows[1 : n + 1]) for n in range(len(rows))]
    x, end = _Axis(0, high, left, WIDTH - right, False), places[-1] + step
    out = []
    for tick in ticks(0, high, False):
        out.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{end}"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{end + 16}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<text x="{WIDTH - right}" y="{end + 34}" text-anchor="end">{escape(unit)}</text>')
    for at, r in zip(places, rows, strict=True):
        strong = ' class="strong"' if r.colour == 0 else ""
        tip = f"<title>{escape(f'{r.label}: {r.text} {unit}' + (f'; asked for {number(r.mark)}' if r.mark else ''))}</title>"
        out.append(f'<text{strong} x="{left - 10}" y="{at + 17}" text-anchor="end">{escape(r.label)}</text>')
        width = max(1.5, x(min(r.value, high)) - left)
        place = f'x="{left}" y="{at + 4}" width="{width:.1f}" height="{step - 8}"'
        out.append(f'<rect class="bar f{r.colour}" {place}>{tip}</rect>')
        if r.mark:
            place = f'x1="{x(r.mark):.1f}" x2="{x(r.mark):.1f}" y1="{at + 1}" y2="{at + step - 1}"'
            out.append(f'<line class="line s6" {place}>{tip}</line>')
        behind = max(left + width, x(r.mark) if r.mark else 0) + 8
        note = f' <tspan fill-opacity=".75">{escape(r.note)}</tspan>' if r.note else ""
        out.append(f'<text{strong} x="{behind:.1f}" y="{at + 17}">{escape(r.text)}{note}</text>')
    return _frame(end + 42, label, out)


def ranges(rows: Sequence[Range], label: str, unit: str) -> str:
    """One line a row on a logarithmic axis, from its first to its last value, a dot each."""
    values = [v for r in rows for _, v in r.values]
    low, high = min(values) / 1.3, max(values) * 1.3
    left, right, step, top = min(300.0, 16 + CHAR * max(len(r.label) for r in rows)), 40, 46, 8
    x, end = _Axis(low, high, left, WIDTH - right, True), top + step * len(rows)
    out = []
    for tick in ticks(low, high, True):
        out.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{end}"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{end + 16}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<text x="{WIDTH - right}" y="{end + 34}" text-anchor="end">{escape(unit)}</text>')
    for n, r in enumerate(rows):
        at = top + step * n + step / 2
        out.append(f'<text x="{left - 10}" y="{at + 4}" text-anchor="end">{escape(r.label)}</text>')
        first, last = x(r.values[0][1]), x(r.values[-1][1])
        out.append(f'<line class="line s{r.colour}" x1="{first:.1f}" x2="{last:.1f}" y1="{at}" y2="{at}"/>')
        for i, (name, value) in enumerate(r.values):
            out.append(_dot(x(value), at, 5, r.colour, f"{r.label}, {name}: {number(value)} {unit}"))
            out.append(f'<text x="{x(value):.1f}" y="{at + 20 if i % 2 else at - 10}" text-anchor="middle">{name} {number(value)}</text>')
    return _frame(end + 42, label, out)
