"""The one page a session ends with: what was measured, with intervals, how the comparison was blind, and what people wrote down."""

from __future__ import annotations

import os
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robot_rl.evaluation.plots import Point, learning_curve, percent
from robot_rl.evaluation.report_assets import CSS

if TYPE_CHECKING:
    from robot_rl.console.flow import SessionFlow
    from robot_rl.console.library import Library
    from robot_rl.console.notes import Notes

REPORT = "session_report.html"


def _rate(data: dict[str, Any]) -> str:
    low, high = data["interval"]
    return f"{percent(data['success'])} <small>{data['successes']} of {data['n']}, 95 % interval {percent(low)} to {percent(high)}</small>"


def _signed(value: float) -> str:
    """Percentage points with their sign."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(100 * value):.0f}"


def _hero(result: dict[str, Any]) -> str:
    comparison = result.get("comparison")
    if comparison is None:
        text = result.get("given_up", "")
        why = f" {escape(text[:1].upper() + text[1:])}." if text else ""
        return f"<p class='lead'>No blind comparison was finished in this session.{why}</p>"
    low, high = comparison["interval"]
    old, new = comparison["old"], comparison["new"]
    return (
        f"<div class='hero'><div class='rate before'><b>{percent(old['success'])}</b><span>old policy, {old['successes']} of {old['n']}</span></div>"
        "<svg class='arrow' viewBox='0 0 64 64' fill='none' stroke='currentColor' stroke-width='2.5'><path d='M6 32h48M38 16l16 16-16 16'/></svg>"
        f"<div class='rate after'><b>{percent(new['success'])}</b><span>version {result['version']}, {new['successes']} of {new['n']}</span></div></div>"
        f"<p class='lead'><strong>{escape(comparison['verdict'])}</strong> The difference is {_signed(comparison['difference'])} percentage points; "
        f"its 95 % interval goes from {_signed(low)} to {_signed(high)} (exact, for two independent samples). "
        f"{comparison['discarded']} episodes were set aside and played again.</p>"
    )


def render(result: dict[str, Any], curve: list[dict[str, Any]], notes: list[dict[str, Any]], title: str) -> str:
    """The page as HTML. ``result`` is that of :meth:`SessionFlow.result`."""
    facts = []
    if "baseline" in result:
        facts.append(f"<div><dt>Baseline before training</dt><dd>{_rate(result['baseline'])}</dd></div>")
    if "training" in result:
        t = result["training"]
        driven = t.get("driven")
        shown = "" if driven is None else f"; a person drove {percent(driven, 1)} of the last {t['driven_steps']} steps"
        facts.append(
            f"<div><dt>Training</dt><dd>{t['episodes']} episodes <small>{t['successes']} of them succeeded{shown}</small></dd></div>"
        )
    begun, ended = result["started_ns"], result["ended_ns"]
    if begun and ended:
        minutes = (ended - begun) / 6e10
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(begun / 1e9))
        facts.append(f"<div><dt>Session</dt><dd>{minutes:.0f} min <small>began {when} UTC</small></dd></div>")
    if "commitment" in result:
        facts.append(
            f"<div><dt>Blinding</dt><dd>Order fixed beforehand <small>SHA-256 <code>{escape(result['commitment'][:16])}…</code></small></dd></div>"
        )
    figure = ""
    points = [
        Point(
            p["x"],
            p["rate"],
            p["low"],
            p["high"],
            f"{percent(p['rate'])} of the last {p['n']} judged episodes, version {p['version']}",
        )
        for p in curve
    ]
    if points:
        plots = "".join(learning_curve(points, None, width=w, height=h) for w, h in ((960, 360), (390, 280)))
        plots = plots.replace("Environment steps", "Judged episodes")
        figure = f"<section><h2>Success while it ran</h2><p class='note'>Of the last 20 judged episodes, with the 95 % Wilson interval.</p>{plots}</section>"
    rows = "".join(
        f"<tr><td>{time.strftime('%H:%M:%S', time.gmtime(n['stamp_ns'] / 1e9))}</td><td>{escape(n['who'])}</td>"
        f"<td style='white-space:normal'>{escape(n['text'])}</td></tr>"
        for n in notes
    )
    book = (
        f"<section><h2>Notes</h2><div class='scroll'><table><tr><th>UTC</th><th>who</th><th>what</th></tr>{rows}</table></div></section>"
        if rows
        else ""
    )
    order = ""
    if "order" in result:
        listed = "".join("n" if a == "new" else "o" for a in result["order"])
        order = (
            "<section><details><summary>How the comparison was blind <small>the order, and how to check it</small></summary>"
            "<p>Episodes were assigned in permuted blocks of two and four, drawn before the first one. Nobody at the page was told which policy acted. "
            "The SHA-256 of <code>salt:order</code> was shown from the start.</p>"
            f"<pre>order       {listed}\nsalt        {escape(result['salt'])}\ncommitment  {escape(result['commitment'])}</pre></details></section>"
        )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main><header><p class='kicker'>Session report</p><h1>{escape(title)}</h1></header>"
        f"{_hero(result)}<dl class='facts'>{''.join(facts)}</dl>{figure}{order}{book}</main>"
        "<footer><p>None of this is a safety-rated function: the hardware e-stop and the cell's safeguards stay in force.</p></footer></body></html>"
    )


def write_session_report(folder: Path, flow: SessionFlow, library: Library, notes: Notes) -> Path:
    """Write ``session_report.html`` into the run folder; the path."""
    from dataclasses import asdict

    title = flow.path.resolve().parent.name
    text = render(flow.result(), library.curve(), [asdict(n) for n in notes.last(200)[::-1]], title)
    path = folder / REPORT
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
