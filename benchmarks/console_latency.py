"""Camera to screen, in a real browser: two cameras at 20 pictures a second, alone and with watchers beside. One JSON object.

    python benchmarks/console_latency.py [--seconds 20] [--watchers 5] [--width 640]

A picture is stamped when the camera has it; its age is taken in the animation frame that shows it (same machine, same clock). The
browser renders in software here, which is the slowest there is. Needs playwright and Chromium; without them it says "absent".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "console")]


def figures(ages: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(ages, [50, 95, 99])
    return {"n": len(ages), "p50_ms": round(float(p50), 1), "p95_ms": round(float(p95), 1), "p99_ms": round(float(p99), 1)}


def measure(watchers: int, seconds: float, width: int) -> dict[str, object]:
    from browser_kit import DESKTOP, PHONE, chromium, open_page, wait
    from console_kit import live

    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        size = (width, width * 3 // 4)
        with live(Path(folder), auto=True, steps=10**6, skills=(0.0,), size=size) as console:
            page = open_page(browser, console.url, DESKTOP)
            others = [open_page(browser, console.url, PHONE) for _ in range(watchers)]
            page.click("#seat")
            wait(page, "(window.frameStats.front ?? []).length > 20")
            page.evaluate("for (const k in window.frameStats) window.frameStats[k].length = 0")
            began, steps = time.monotonic(), console.session.ticks
            page.wait_for_timeout(seconds * 1000)
            took = time.monotonic() - began
            ages = page.evaluate("window.frameStats")
            asked = page.evaluate(
                "(async () => { const out = []; for (let i = 0; i < 30; i++) { const t = performance.now();"
                " await window.page.link.ask('hold', { on: false }); out.push(performance.now() - t); } return out; })()"
            )
            every = [a for v in ages.values() for a in v]
            return {
                "watchers": watchers, "camera_to_screen": figures(every),
                "pictures_a_second": {k: round(len(v) / took, 1) for k, v in sorted(ages.items())},
                "button_to_answer": figures(asked), "control_hz": round((console.session.ticks - steps) / took, 1),
                "watchers_pictures_a_second": [
                    round(sum(len(v) for v in o.evaluate("window.frameStats").values()) / 2 / (time.monotonic() - began), 1) for o in others
                ],
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--watchers", type=int, default=5)
    parser.add_argument("--width", type=int, default=640)
    given = parser.parse_args()
    try:
        import playwright  # noqa: F401
        from browser_kit import CHROMIUM
    except ImportError:
        CHROMIUM = None
    if CHROMIUM is None:
        print(json.dumps({"console_latency": "absent", "why": "playwright or Chromium is not installed"}))
        return
    runs = [measure(n, given.seconds, given.width) for n in sorted({0, given.watchers})]
    print(json.dumps({"cameras": 2, "hz": 20, "width": given.width, "runs": runs}))


if __name__ == "__main__":
    main()
