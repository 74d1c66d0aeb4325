"""The report of a run: one HTML page with everything in it, that works offline and prints.

``write_report`` reads the run folder (``docs/architecture.md``) and writes ``report.html``. Every part is optional: a run
without gate, videos or final evaluation gets the page that its files allow, and the page says what is missing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from robot_rl import __version__
from robot_rl.evaluation.plots import THIN
from robot_rl.evaluation.report_assets import CSS, JS
from robot_rl.evaluation.report_sections import (
    curve_section,
    details_section,
    failure_section,
    header,
    scalar_section,
    start_section,
    video_section,
)
from robot_rl.evaluation.run_record import RunRecord


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write ``report.html`` (atomically) for a run folder, finished or not; returns its path.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file in it is damaged; it is named with its line.
    """
    run = RunRecord.load(run_dir)
    target = Path(output) if output is not None else run.path / "report.html"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(render(run), encoding="utf-8")
    os.replace(temporary, target)
    return target


def render(run: RunRecord) -> str:
    """The whole page."""
    parts = [
        header(run), curve_section(run), video_section(run), start_section(run), failure_section(run),
        scalar_section(run), details_section(run),
    ]  # fmt: skip
    # The only script that may run is ours, by its hash, and nothing may be loaded from anywhere.
    digest = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = run.task or run.path.resolve().name
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=True)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} · robot_rl report</title>'
        f"<style>{CSS}</style></head><body><main>"
        + "".join(parts)
        + f"</main><footer>Written {stamp} by robot_rl {escape(__version__)}. "
        + f"Intervals are 95{THIN}% Wilson unless named.</footer>"
        f'<div id="tip" role="status"></div><script>{JS}</script></body></html>\n'
    )
