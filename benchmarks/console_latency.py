"""Camera to screen, in a real browser: two cameras at 20 pictures a second, alone and with watchers beside. One JSON object.

    python benchmarks/console_latency.py [--seconds 20] [--watchers 5] [--width 640]

A picture is stamped when the camera has it; its age is taken in the animation frame that shows it (same machine, same clock), with what it is
made of: encoding, the way to the page, showing. Beside it: what the server's process and each kind of the browser's processes used of the
processors. The browser renders in software here, which is the slowest there is. Needs playwright and Chromium; without them it says "absent".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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


def cpu_seconds() -> dict[str, float]:
    """Of this process (server and simulation) and of the browser's, by kind."""
    used: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").split() or [b""]
            ticks = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        own = folder.name == str(os.getpid())
        if not own and b"chrom" not in words[0]:
            continue
        kind = "server" if own else next((f"browser {w[7:].decode()}" for w in words if w.startswith(b"--type=")), "browser")
        used[kind] = used.get(kind, 0.0) + (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    return used


def listen(url: str, seconds: float) -> None:
    """A watcher without a screen, in a process of its own: takes every picture, acknowledges it, counts."""
    import asyncio

    import websockets

    async def work() -> int:
        count, until = 0, time.monotonic() + seconds
        async with websockets.connect(url.replace("http", "ws", 1) + "/ws/frames", origin=url, max_size=2**22) as socket:
            while (left := until - time.monotonic()) > 0:
                try:
                    data = await asyncio.wait_for(socket.recv(), left)
                except (asyncio.TimeoutError, TimeoutError):
                    break
                name = data[32 : 32 + int.from_bytes(data[4:6], "little")].decode()
                number = int.from_bytes(data[8:16], "little")
                await socket.send(json.dumps({"type": "seen", "camera": name, "number": number}))
                count += 1
        return count

    print(asyncio.run(work()))


def measure(watchers: int, screens: int, seconds: float, width: int) -> dict[str, object]:
    """One operator's page; ``watchers`` without a screen and ``screens`` more pages of the same browser beside it."""
    from browser_kit import DESKTOP, PHONE, chromium, open_page, wait
    from console_kit import live

    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        size = (width, width * 3 // 4)
        with live(Path(folder), auto=True, steps=10**6, skills=(0.0,), size=size) as console:
            page = open_page(browser, console.url, DESKTOP)
            others = [open_page(browser, console.url, PHONE) for _ in range(screens)]
            words = [sys.executable, __file__, "--listen", console.url, "--seconds", str(seconds + 4.0)]
            processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(watchers)]
            page.click("#seat")
            wait(page, "(window.frameStats.front ?? []).length > 20", 60.0)
            page.wait_for_timeout(2000)
            page.evaluate("for (const kept of [window.frameStats, window.frameParts]) for (const k in kept) kept[k].length = 0")
            began, ticks, used = time.monotonic(), console.session.ticks, cpu_seconds()
            page.wait_for_timeout(seconds * 1000)
            took, ages, parts = time.monotonic() - began, page.evaluate("window.frameStats"), page.evaluate("window.frameParts")
            spent = {k: round(100 * (v - used.get(k, 0.0)) / took, 1) for k, v in cpu_seconds().items()}
            others_shown = [p.evaluate("Object.values(window.frameStats).map((x) => x.slice(-40))") for p in others]
            hz = (console.session.ticks - ticks) / took
            asked = page.evaluate(
                "(async () => { const out = []; for (let i = 0; i < 30; i++) { const t = performance.now();"
                " await window.page.link.ask('hold', { on: false }); out.push(performance.now() - t); } return out; })()"
            )
            counts = [int(p.communicate()[0]) for p in processes]
            return {
                "watchers": watchers, "more_screens_on_this_machine": screens,
                "camera_to_screen": figures([a for v in ages.values() for a in v]),
                "made_of": {n: figures([p[i] for v in parts.values() for p in v]) for i, n in enumerate(("encoding", "way", "showing"))},
                "on_the_other_screens": figures([a for o in others_shown for v in o for a in v]) if others else None,
                "cpu_percent": spent, "pictures_a_second": {k: round(len(v) / took, 1) for k, v in sorted(ages.items())},
                "button_to_answer": figures(asked), "control_hz": round(hz, 1),
                "watchers_pictures_a_second": [round(c / 2 / (seconds + 4.0), 1) for c in counts],
                "screens_open": len(others),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--watchers", type=int, default=5)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument(
        "--screens", type=int, default=0, help="further pages of the same browser; on two cores they are the load"
    )
    parser.add_argument("--listen", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.listen:
        return listen(given.listen, given.seconds)
    try:
        import playwright  # noqa: F401
        from browser_kit import CHROMIUM
    except ImportError:
        CHROMIUM = None
    if CHROMIUM is None:
        print(json.dumps({"console_latency": "absent", "why": "playwright or Chromium is not installed"}))
        return
    plans = sorted({(0, 0), (given.watchers, 0), (0, given.screens)})
    runs = [measure(w, s, given.seconds, given.width) for w, s in plans]
    print(json.dumps({"cameras": 2, "hz": 20, "width": given.width, "runs": runs}))


if __name__ == "__main__":
    main()
