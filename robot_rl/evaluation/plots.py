"""Plots as inline SVG, without a plotting library: small, themable by CSS, sharp on paper.

Colours come from the page's CSS through classes (``policy``, ``base``, ``good``, ``bad``, ``muted``), so that light, dark and
printed pages use one drawing. Every function returns a whole ``<svg>`` element and escapes every string it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

import numpy as np

THIN, MINUS, DASH, TIMES = "\u202f", "\u2212", "\u2013", "\u00d7"  # narrow space, minus, en dash, times


def percent(value: float, digits: int = 0) -> str:
    """``42 %``, with a narrow space; never rounds a rate that is not 0 or 1 to 0 % or 100 %."""
    if not isfinite(value):
        return DASH
    shown = round(100 * value, digits)
    if digits == 0 and ((shown == 100 and value < 1) or (shown == 0 and value > 0)):
        return percent(value, 1)
    return f"{shown:.{digits}f}{THIN}%".replace("-", MINUS)


def count(value: float) -> str:
    """Thousands separated by narrow spaces."""
    return f"{value:,.0f}".replace(",", THIN)


def short(value: float) -> str:
    """Axis labels: ``0``, ``50k``, ``1.2M``, ``0.003``."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e3:
        return f"{value / 1e3:g}k"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}".replace("-", MINUS)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high]."""
    if not (isfinite(low) and isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(1, wanted)
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """A plot area inside an SVG: maps data to pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / ((high - low) or 1) * (self.height - self.top - self.bottom)

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    @property
    def end(self) -> float:
        return self.width - self.right

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)

    def band(self, rows: Sequence[tuple[float, float, float]]) -> str:
        """Closed path around (x, low, high)."""
        upper = [(x, high) for x, _, high in rows]
        return self.path(upper + [(x, low) for x, low, _ in reversed(rows)]) + "Z"


def svg(width: float, height: float, title: str, body: list[str], css: str = "") -> str:
    return (
        f'<svg class="plot {css}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>{"".join(body)}</svg>'
    )


def text(x: float, y: float, value: str, css: str = "", anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}" {extra}>{escape(value)}</text>'


def _axes(
    frame: Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: Callable[[float], str],
    y_name: Callable[[float], str],
) -> list[str]:
    out = []
    for value in y_ticks:
        y = frame.py(value)
        out.append(f'<line class="grid" x1="{frame.left}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(text(frame.left - 8, y + 4, y_name(value), "tick", "end"))
    for value in x_ticks:
        x = frame.px(value)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.floor:.1f}" y2="{frame.floor + 4:.1f}"/>')
        out.append(text(x, frame.floor + 18, x_name(value), "tick", "middle"))
    out.append(f'<line class="axis" x1="{frame.left}" x2="{frame.end}" y1="{frame.floor}" y2="{frame.floor}"/>')
    return out


@dataclass(frozen=True)
class Point:
    """One evaluated point: steps, rate, interval, and what to say about it."""

    x: float
    rate: float
    low: float
    high: float
    tip: str = ""


@dataclass(frozen=True)
class Mark:
    """One gate event on the strip below the learning curve.

    ``kind`` is ``promoted`` (and acts), ``reserve`` (promoted, but another version acts), ``rejected`` or ``rolled_back``.
    """

    x: float
    kind: str
    tip: str = ""


def _spread(labels: list[tuple[float, str, str]], gap: float, low: float, high: float) -> list[tuple[float, str, str]]:
    """Move labels (y, text, class) apart so that none overlap."""
    placed: list[tuple[float, str, str]] = []
    for y, value, css in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else max(y, low), value, css))
    limit = high
    for index in range(len(placed) - 1, -1, -1):
        y, value, css = placed[index]
        placed[index] = (min(y, limit), value, css)
        limit = placed[index][0] - gap
    return placed


def learning_curve(
    acting: Sequence[Point],
    base: Point | None,
    latest: Sequence[Point] = (),
    marks: Sequence[Mark] = (),
    width: float = 960,
    height: float = 400,
) -> str:
    """Success of what acted, with its interval band, against the base's line and band; gate decisions on a strip below."""
    everything = [p.x for p in (*acting, *latest)] + [m.x for m in marks]
    x_max = max(everything, default=1.0) or 1.0
    narrow = width < 600
    strip = 46 if marks else 0
    frame = Frame(width, height, 44 if narrow else 52, 16 if narrow else 126, 14, 46 + strip, (0.0, x_max), (0.0, 1.0))
    body = _axes(
        frame, ticks(0, x_max, 3 if narrow else 6), [0, 0.25, 0.5, 0.75, 1.0], short, lambda v: f"{100 * v:.0f}{THIN}%"
    )
    labels: list[tuple[float, str, str]] = []
    if base is not None:
        rows = [(0.0, base.low, base.high), (x_max, base.low, base.high)]
        body.append(f'<path class="band base" d="{frame.band(rows)}"/>')
        body.append(f'<path class="line base dashed" d="{frame.path([(0, base.rate), (x_max, base.rate)])}"/>')
        labels.append((frame.py(base.rate), f"Base {percent(base.rate)}", "base"))
    for mark in marks:
        if mark.kind == "promoted":
            x = frame.px(mark.x)
            body.append(
                f'<line class="promotion" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.floor + strip - 8:.1f}"/>'
            )
    if latest:
        body.append(f'<path class="line latest" d="{frame.path([(p.x, p.rate) for p in latest])}"/>')
        labels.append((frame.py(latest[-1].rate), f"Latest {percent(latest[-1].rate)}", "muted"))
    if acting:
        body.append(f'<path class="band policy" d="{frame.band([(p.x, p.low, p.high) for p in acting])}"/>')
        body.append(f'<path class="line policy" d="{frame.path([(p.x, p.rate) for p in acting])}"/>')
        for p in acting:
            body.append(
                f'<circle class="dot policy" cx="{frame.px(p.x):.1f}" cy="{frame.py(p.rate):.1f}" r="{2.6 if narrow else 3.4}" '
                f'data-tip="{escape(p.tip, quote=True)}"/>'
            )
        labels.append((frame.py(acting[-1].rate), f"Acting {percent(acting[-1].rate)}", "policy"))
    if not narrow:
        for y, value, css in _spread(labels, 18, frame.top + 6, frame.floor):
            body.append(text(frame.end + 12, y + 4.5, value, f"label {css}"))
    y = frame.floor + 40
    for mark in marks:
        body.append(_gate_mark(frame.px(mark.x), y, mark))
    if marks and not narrow:
        body.append(text(frame.end + 12, y + 4, "Gate", "label muted"))
    middle = (frame.left + frame.end) / 2
    body.append(text(middle, height - 8, "Environment steps", "axis-name", "middle"))
    return svg(width, height, "Success rate over environment steps", body, "narrow" if narrow else "wide")


def _gate_mark(x: float, y: float, mark: Mark) -> str:
    tip = f'data-tip="{escape(mark.tip, quote=True)}"'
    if mark.kind in ("promoted", "reserve"):
        css = "good" if mark.kind == "promoted" else "reserve"
        return f'<path class="mark {css}" d="M{x:.1f},{y - 7}l6.5,12h-13z" {tip}/>'
    if mark.kind == "rolled_back":
        return f'<path class="mark bad" d="M{x:.1f},{y + 7}l6.5,-12h-13z" {tip}/>'
    if mark.kind == "rejected":
        return f'<path class="mark cross" d="M{x - 3.5:.1f},{y - 4.5}l7,7m0,-7l-7,7" {tip}/>'
    return f'<circle class="mark muted" cx="{x:.1f}" cy="{y - 1}" r="2" {tip}/>'


@dataclass(frozen=True)
class Start:
    """One start state in the plane of two parameters."""

    x: float
    y: float
    success: bool
    tip: str = ""


def start_map(
    starts: Sequence[Start],
    x_name: str,
    y_name: str,
    title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> str:
    """Success (dots) and failure (crosses) over two start parameters. Shapes differ as well as colours."""
    width, height = 440.0, 380.0
    frame = Frame(width, height, 62, 14, 12, 50, _padded(x_range), _padded(y_range))
    body = _axes(frame, ticks(*frame.x, 4), ticks(*frame.y, 4), short, short)
    for success in (True, False):  # failures on top: they are what one looks for
        for s in starts:
            if s.success is not success:
                continue
            x, y, tip = frame.px(s.x), frame.py(s.y), escape(s.tip, quote=True)
            if success:
                body.append(f'<circle class="start good" cx="{x:.1f}" cy="{y:.1f}" r="4" data-tip="{tip}"/>')
            else:
                body.append(f'<path class="start bad" d="M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8" data-tip="{tip}"/>')
    body.append(text((frame.left + frame.end) / 2, height - 8, x_name, "axis-name", "middle"))
    middle = (frame.top + frame.floor) / 2
    body.append(text(14, middle, y_name, "axis-name", "middle", f'transform="rotate(-90 14 {middle:.1f})"'))
    return svg(width, height, title, body)


def _padded(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    pad = 0.04 * (high - low) or max(abs(low), 1.0) * 0.1
    return low - pad, high + pad


def paired_bars(rows: Sequence[tuple[str, int, int]], names: tuple[str, str], title: str) -> str:
    """Horizontal bars of two counts per row: where episodes ended, before and after."""
    width, row_height, left = 440.0, 46.0, 128.0
    height = row_height * len(rows) + 30
    most = max((max(a, b) for _, a, b in rows), default=1) or 1
    scale = (width - left - 48) / most
    body = []
    for index, (name, before, after) in enumerate(rows):
        y = 6 + index * row_height
        shown = name if len(name) <= 18 else name[:17] + "…"
        body.append(text(left - 10, y + 22, shown, "label", "end"))
        for offset, value, css in ((3, before, "base"), (19, after, "policy")):
            length = max(1.5, value * scale) if value else 1.5
            body.append(f'<rect class="bar {css}" x="{left}" y="{y + offset}" width="{length:.1f}" height="13" rx="2"/>')
            body.append(text(left + length + 7, y + offset + 11, count(value), "tick"))
    y = height - 8
    body.append(f'<rect class="bar base" x="{left}" y="{y - 9}" width="10" height="10" rx="2"/>')
    body.append(text(left + 16, y, names[0], "tick"))
    body.append(f'<rect class="bar policy" x="{left + 96}" y="{y - 9}" width="10" height="10" rx="2"/>')
    body.append(text(left + 112, y, names[1], "tick"))
    return svg(width, height, title, body)


def scalar(name: str, points: Sequence[tuple[float, float]], x_max: float) -> str:
    """One training scalar: every value faint, a running median on top."""
    width, height = 300.0, 150.0
    finite = [(x, y) for x, y in points if isfinite(x) and isfinite(y)]
    values = np.array([y for _, y in finite])
    low, high = (float(v) for v in np.percentile(values, [1, 99]))
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    pad = 0.08 * (high - low)
    frame = Frame(width, height, 48, 8, 8, 24, (0.0, x_max or 1.0), (low - pad, high + pad))
    body = _axes(frame, ticks(0, frame.x[1], 3), ticks(*frame.y, 4), short, short)
    drawn = _thin(finite, 400)
    clipped = [(x, min(max(y, frame.y[0]), frame.y[1])) for x, y in drawn]
    if len(clipped) == 1:
        x, y = clipped[0]
        body.append(f'<circle class="dot policy" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="3"/>')
    elif len(clipped) < 40:
        body.append(f'<path class="line policy thin" d="{frame.path(clipped)}"/>')
    else:
        body.append(f'<path class="line policy faint" d="{frame.path(clipped)}"/>')
        half = max(2, len(clipped) // 40)
        smooth = [
            (x, float(np.median([v for _, v in clipped[max(0, i - half) : i + half + 1]]))) for i, (x, _) in enumerate(clipped)
        ]
        body.append(f'<path class="line policy thin" d="{frame.path(smooth)}"/>')
    return svg(width, height, f"{name} over environment steps", body)


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points: each block's lowest and highest value, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    out: list[tuple[float, float]] = []
    for block in np.array_split(np.arange(len(points)), most // 2):
        chosen = {min(block, key=lambda i: points[i][1]), max(block, key=lambda i: points[i][1])}
        out += [points[i] for i in sorted(chosen)]
    return out


def informative_parameters(starts: Sequence[dict[str, float]], outcomes: Sequence[Sequence[bool]], bins: int = 5) -> list[str]:
    """Start parameters that vary, the ones that tell most about the outcomes first.

    The score is the mutual information of the parameter (in ``bins`` quantile bins) and each list of outcomes, less its
    expectation under independence (``(bins - 1) / 2n``, Miller and Madow), so that noise does not win.
    """
    names = sorted(set.intersection(*(set(s) for s in starts))) if starts else []
    scores: list[tuple[float, str]] = []
    for name in names:
        values = np.array([s[name] for s in starts], float)
        if not np.isfinite(values).all() or np.ptp(values) <= 1e-9 * (1 + np.abs(values).max()):
            continue
        edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
        bin_of = np.searchsorted(edges, values, side="right")
        score = 0.0
        for outcome in outcomes:
            success = np.asarray(outcome, float)
            p = success.mean()
            if p in (0.0, 1.0):
                continue
            total = 0.0
            for b in range(len(edges) + 1):
                inside = success[bin_of == b]
                if len(inside):
                    total += len(inside) / len(success) * (_entropy(p) - _entropy(inside.mean()))
            score += total - len(edges) / (2 * len(success))
        scores.append((-score, name))
    return [name for _, name in sorted(scores)]


def _entropy(p: float) -> float:
    return 0.0 if p <= 0 or p >= 1 else float(-p * np.log(p) - (1 - p) * np.log(1 - p))
