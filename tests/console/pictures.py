"""The pictures in docs/console.md, of a guided session beside a run: ``python tests/console/pictures.py RUN [--out docs]``.

RUN is the folder of a finished run on a table-top task, with a store and a gate's decisions (``gate.jsonl``); it is copied, not changed. The base
and the newest version act in simulation, a person at the page drives a little, and a headless Chromium takes the pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from browser_kit import chromium, open_page, wait

TALL = {"width": 1440, "height": 1290}
PHONE = {"width": 390, "height": 844}
QUALITY = 82


def save(page: Any, path: Path) -> None:
    from PIL import Image

    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=QUALITY, optimize=True)


def take(console: Any, url: str, out: Path) -> None:
    """At a desk with somebody driving and feeling, then on a phone, at the top and at the gate's panel."""
    with chromium() as browser:
        desk = open_page(browser, url, TALL)
        desk.fill("#operator", "Ann")
        desk.click("#seat")
        wait(desk, "window.page.state.seat !== null")
        desk.hover("#hold-drive")
        desk.mouse.down()
        desk.wait_for_timeout(600)
        desk.mouse.up()
        desk.click("#ready")  # the list
        wait(desk, "window.page.state.flow.phase === 'training'")
        desk.click("#ready")
        wait(desk, "window.page.state.episode.state === 'running' && window.page.state.episode.step >= 8")
        desk.click("#take-over")
        wait(desk, "window.page.state.control === 'human'")
        box = desk.locator("#strip").bounding_box()
        desk.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
        desk.mouse.down()
        wait(desk, "!document.getElementById('gate-panel').hidden")
        desk.wait_for_timeout(1200)
        save(desk, out / "console_1440.jpg")
        desk.mouse.up()
        phone = open_page(browser, url, PHONE, device_scale_factor=2, has_touch=True)
        wait(phone, "document.querySelectorAll('.camera canvas').length === 2 && !document.getElementById('gate-panel').hidden")
        phone.wait_for_timeout(1200)
        save(phone, out / "console_390.jpg")
        phone.locator("#gate-panel").scroll_into_view_if_needed()
        phone.evaluate("document.getElementById('gate-panel').scrollIntoView({block: 'center'})")
        phone.wait_for_timeout(600)
        save(phone, out / "console_390_gate.jpg")
        print(json.dumps({"complaints": desk.complaints + phone.complaints, "pages": console.office.desk.watchers}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    parser.add_argument("--name", default="lift_with_ann", help="what the run is called on the page")
    parser.add_argument("--episodes", type=int, default=90, help="of the run's store, from its beginning")
    given = parser.parse_args()
    from console_kit import Live

    from robot_rl.cli.console import _simulated
    from robot_rl.console.flow import FlowConfig, SessionFlow
    from robot_rl.console.hosting import ConsoleServer, HostConfig
    from robot_rl.console.office import Office
    from robot_rl.doctor import choose_gl
    from robot_rl.replay.store import EpisodeStore

    choose_gl()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / given.name
        shutil.copytree(given.run, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        with EpisodeStore.open(folder / "store") as store:
            late = store.episode_ids()[given.episodes :]
        for name in late:
            shutil.rmtree(folder / "store" / "episodes" / name)
        session, _ = _simulated(folder, folder, 7, auto=False)
        flow = SessionFlow(FlowConfig(baseline_episodes=0, reset_s=0.0), folder)
        with session:
            office = Office(session, folder, folder / "store", flow=flow)
            with ConsoleServer(office, HostConfig(port=0)) as server:
                take(Live(session, office, server, folder), server.url, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
