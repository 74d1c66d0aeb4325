"""The report as one page without anything outside it: numbers, curves, calibration, and the frames it got wrong."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from robot_rl.rewards.report import Frame, RewardReport
    from robot_rl.rewards.statistics import Calibration

WIDTH, HEIGHT = 560, 180
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
td.n{font-variant-numeric:tabular-nums}.bad{color:#b3261e}.good{color:#1b6e3c}figure{display:inline-block;margin:0 1rem 1rem 0}
figcaption{font-size:.8rem;color:#5b6676}img{height:140px;border-radius:4px}svg{background:#f6f8fa;border-radius:4px}
"""
ROWS = (
    ("agreement", "share of episodes judged as recorded"), ("auc", "chance that a success outscores a failure"),
    ("precision", "of what it called a success"), ("recall", "of the successes"),
    ("false_positives", "failed episodes called a success"), ("detection_delay", "steps from the recorded end to its verdict, median"),
    ("voc", "value-order correlation of successes, median"), ("voc_reversed", "of the same episodes backwards: should be negative"),
    ("voc_shuffled", "of the same frames in random order: should be near 0"),
    ("right_instruction", "mean value under the right instruction"), ("wrong_instruction", "under a wrong one: should be lower"),
    ("order_consistency", "pairs ordered alike whichever is shown first"), ("valid_fraction", "answers that were valid"),
    ("latency_p50_ms", "an episode, median"), ("latency_p95_ms", "an episode, 95th percentile"),
)  # fmt: skip


def page(report: RewardReport) -> str:
    """A whole HTML page."""
    findings = report.findings()
    verdict = (
        '<p class="good">Nothing measured here speaks against training on it.</p>'
        if not findings
        else '<p class="bad">Not to be trained on yet: ' + html.escape("; ".join(findings)) + ".</p>"
    )
    rows = "".join(
        f'<tr><td>{name}</td><td class="n">{_number(getattr(report, name))}</td><td>{text}</td></tr>' for name, text in ROWS
    )
    cost = "".join(
        f'<tr><td>{html.escape(k)}</td><td class="n">{_number(v)}</td><td></td></tr>' for k, v in report.cost.items()
    )
    invalid = ", ".join(f"{html.escape(k)}: {v}" for k, v in report.invalid.items())
    curves = [(line.values, line.success) for line in report.lines if np.isfinite(line.values).sum() > 1][:40]
    parts = [
        f"<h1>Reward source {html.escape(report.source)}</h1>",
        f"<p>{html.escape(report.model_id)}, kind {report.kind}; {report.episodes} episodes, {report.successes} recorded as "
        f"successes, {report.failures} as failures.</p>",
        verdict, f"<table>{rows}{cost}</table>", f"<p>Invalid answers: {invalid}.</p>" if invalid else "",
    ]  # fmt: skip
    if curves:
        parts += ["<h2>Values over an episode</h2><p>Green: successes. Red: failures. Grey: unknown.</p>", _curves(curves)]
    if report.calibration is not None:
        parts += [
            f"<h2>Calibration</h2><p>What it said against how often it was so; mean gap {report.calibration.error:.3f}.</p>",
            _reliability(report.calibration),
        ]
    if report.frames:
        parts += ["<h2>Frames of failures that it liked best</h2>", *(_figure(f) for f in report.frames)]
    rows = "".join(
        f"<tr><td>{html.escape(line.episode_id)}</td><td>{_said(line.success)}</td><td>{_said(line.said_success)}</td>"
        f'<td class="n">{_number(line.last)}</td><td class="n">{_number(line.voc)}</td><td class="n">{_number(line.voc_reversed)}</td></tr>'
        for line in report.lines
    )
    parts.append(
        "<h2>Every episode</h2><table><tr><th>episode</th><th>recorded</th><th>judged</th><th>last value</th><th>voc</th>"
        f"<th>reversed</th></tr>{rows}</table>"
    )
    title = html.escape(f"Reward source {report.source}")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>{"".join(parts)}</html>'


def _number(value: float) -> str:
    return "-" if isinstance(value, float) and not math.isfinite(value) else f"{value:.3g}"


def _said(value: bool | None) -> str:
    return "-" if value is None else "success" if value else "failure"


def _curves(curves: list[tuple[np.ndarray, bool | None]]) -> str:
    every = np.concatenate([v[np.isfinite(v)] for v, _ in curves])
    low, high = min(0.0, float(every.min())), max(1.0, float(every.max()))
    lines = []
    for values, success in curves:
        known = np.flatnonzero(np.isfinite(values))
        x = known / max(len(values) - 1, 1) * (WIDTH - 20) + 10
        y = HEIGHT - 10 - (values[known] - low) / (high - low) * (HEIGHT - 20)
        colour = {True: "#1b6e3c", False: "#b3261e", None: "#8a94a3"}[success]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-opacity=".6"/>')
    return f'<svg role="img" aria-label="values over time" width="{WIDTH}" height="{HEIGHT}">{"".join(lines)}</svg>'


def _reliability(found: Calibration) -> str:
    side = HEIGHT - 20
    dots = "".join(
        f'<circle cx="{10 + s * side:.1f}" cy="{10 + (1 - t) * side:.1f}" r="{2 + min(8.0, math.sqrt(n)):.1f}" fill="#2b5fb0" fill-opacity=".6"/>'
        for s, t, n in zip(found.said, found.true, found.count, strict=True)
        if n
    )
    line = f'<line x1="10" y1="{10 + side}" x2="{10 + side}" y2="10" stroke="#8a94a3"/>'
    return f'<svg role="img" aria-label="reliability" width="{HEIGHT}" height="{HEIGHT}">{line}{dots}</svg>'


def _figure(frame: Frame) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame.picture).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = f"{html.escape(frame.episode_id)}, step {frame.step}: {_number(frame.value)}"
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'
