"""How the report words a figure, and the pieces of HTML that its sections share."""

from __future__ import annotations

import math
from html import escape

from robot_rl.evaluation.plots import DASH, MINUS, THIN, TIMES, percent
from robot_rl.evaluation.statistics import Interval


def section(title: str, *content: str, css: str = "") -> str:
    return f'<section class="{css}"><h2>{escape(title)}</h2>{"".join(content)}</section>'


def note(html: str) -> str:
    return f'<p class="note">{html}</p>'


def legend_entry(shape: str, label: str) -> str:
    """One entry of a legend: a trusted SVG shape and its name."""
    return f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>{escape(label)}</li>'


def span(interval: Interval, digits: int = 0) -> str:
    low, high = percent(interval.low, digits), percent(interval.high, digits)
    return f"{low} to {high}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return DASH
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f}{THIN}s"
    if minutes < 60:
        return f"{minutes}{THIN}min"
    return f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def p_value(p: float) -> str:
    if p >= 0.001:
        return f"{p:.3f}"
    if p == 0.0:
        return f"below 10<sup>{MINUS}300</sup>"
    exponent = math.floor(math.log10(p))
    return f"{p / 10**exponent:.1f}{THIN}{TIMES}{THIN}10<sup>{MINUS}{-exponent}</sup>"


def percentage_points(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", MINUS).replace("+0.0", "0.0").replace(MINUS + "0.0", "0.0")
