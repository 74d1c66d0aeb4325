"""The page in a real browser against a live simulated session: every button does what it says, at a desk and on a phone."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from browser_kit import DESKTOP, PHONE, chromium, need_browser, open_page, wait
from console_kit import ACTION, live

from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.comparisons import read_comparisons

need_browser()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def until(condition, what: str, patience_s: float = 60.0):
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {patience_s:.0f} s")


def state(page, path: str, wanted, what: str = "") -> None:
    """Waits until a value of the page's state is the wanted one."""
    wait(page, f"JSON.stringify(window.page.state.{path}) === {json.dumps(json.dumps(wanted))}")


def sit(page, name: str = "ann") -> None:
    page.fill("#operator", name)
    page.click("#seat")
    page.wait_for_selector("#seat:has-text('Leave')")


def start(page) -> str:
    before = page.evaluate("window.page.state.episode.id")
    page.click("#start")
    wait(page, f"window.page.state.episode.state === 'running' && window.page.state.episode.id !== '{before}'")
    return page.evaluate("window.page.state.episode.id")


def test_every_button_does_what_it_says(tmp_path, browser):
    """One long session, because a browser takes seconds to start."""
    with live(tmp_path, skills=(0.0, 0.0), steps=4000) as console:
        page = open_page(browser, console.url, DESKTOP)
        session, desk = console.session, console.office.desk
        assert page.is_disabled("#success")
        sit(page)
        assert desk.seat is not None
        assert desk.seat.name == "ann"

        # ---- success, undo, failure, discard
        first = start(page)
        page.click("#success")
        state(page, "episode.outcome", "success")
        store = EpisodeStore.open(tmp_path / "store")
        assert store.meta(first).success is True
        page.click("#undo")
        until(lambda: store.meta(first).success is None, "the label is revoked")
        second = start(page)
        page.click("#failure")
        state(page, "episode.outcome", "failure")
        assert store.meta(second).success is False
        third = start(page)
        page.click("#discard")
        state(page, "episode.state", "aborted")
        assert third not in store

        # ---- driving: the pad, keys, take over and hand back
        start(page)
        page.locator("#pad-move").scroll_into_view_if_needed()
        box = page.locator("#pad-move").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0], middle[1] - box["height"] * 0.4)
        until(lambda: session.commands and session.commands[-1][0] == pytest.approx(ACTION.high[0]), "full speed forward")
        page.wait_for_selector("#control-text:has-text('You drive')")
        page.mouse.up()
        state(page, "control", "autonomous")
        page.keyboard.down(" ")
        page.keyboard.down("r")
        until(lambda: session.commands[-1][2] == pytest.approx(ACTION.high[2]), "up by key")
        page.keyboard.up("r")
        until(lambda: np.allclose(session.commands[-1][:4], 0.0), "a key that is up moves nothing")
        assert session.view().control == "human"
        page.keyboard.press("g")
        until(lambda: session.commands[-1][4] == pytest.approx(ACTION.low[4]), "the gripper closes")
        page.keyboard.up(" ")
        state(page, "control", "autonomous")
        page.click("#take-over")
        state(page, "control", "human")
        until(lambda: np.allclose(session.commands[-1][:4], 0.0), "taken over and at rest")
        page.evaluate("window.dispatchEvent(new Event('blur'))")  # another window: a loss, not a hand-back
        page.wait_for_selector("#control-text:has-text('The robot holds')")
        assert session.view().control == "human"
        assert np.allclose(session.commands[-1][:4], 0.0)
        page.click("#take-over:has-text('Hand back')")
        state(page, "control", "autonomous")
        page.click("#take-over")
        state(page, "control", "human")
        page.click("#take-over")
        state(page, "control", "autonomous")
        page.locator("#hold-drive").scroll_into_view_if_needed()
        hold = page.locator("#hold-drive").bounding_box()
        page.mouse.move(hold["x"] + 5, hold["y"] + 5)
        page.mouse.down()
        state(page, "control", "human")
        page.mouse.up()
        state(page, "control", "autonomous")

        # ---- hold, arm, instruction, weights
        page.click("#hold")
        until(lambda: session._holding and np.allclose(session.commands[-1][:4], 0.0), "the robot holds")
        page.click("#hold")
        until(lambda: not session._holding, "the robot goes on")
        page.click("#arm")
        state(page, "armed", False)
        page.click("#arm")
        state(page, "armed", True)
        page.fill("#instruction", "Push it gently")
        page.press("#instruction", "Enter")
        state(page, "task", "Push it gently")
        page.click("#promote")
        state(page, "weights.promoted", 1)
        page.click("#rollback")
        state(page, "weights.promoted", 0)
        page.click("#pause")
        state(page, "learning_paused", True)
        page.click("#pause")
        state(page, "learning_paused", False)

        # ---- the e-stop, which a watcher may press too; going on is the operator's
        watcher = open_page(browser, console.url, PHONE, has_touch=True)
        assert watcher.is_disabled("#success")
        assert watcher.is_disabled("#take-over")
        watcher.click("#estop")
        state(page, "control", "estop")
        page.wait_for_selector("#banner:has-text('Emergency stop')")
        state(page, "episode.state", "committed")
        page.click("#arm")  # refused while it is latched
        page.wait_for_timeout(1100)  # a stop lasts a second at least
        page.click("#reset-estop")
        state(page, "guard", "ok")
        page.click("#arm")
        state(page, "armed", True)

        # ---- notes
        page.click("[data-view=notes]")
        page.fill("#note", "The mark has moved <b>left</b>")
        page.click("#note-form button")
        page.wait_for_selector("#notes p:has-text('The mark has moved <b>left</b>')")
        assert any(n.text == "The mark has moved <b>left</b>" for n in console.office.notes.last())
        assert page.locator("#notes li.event:has-text('estop')").count() >= 1

        # ---- labels afterwards, with film
        page.click("[data-view=label]")
        page.wait_for_selector("#player-pictures img")
        waiting = page.locator("#episodes button").count()
        assert waiting == sum(store.meta(i).success is None for i in store.episode_ids())
        chosen = page.locator("#episodes button").first.get_attribute("data-episode")
        wait(page, "[...document.querySelectorAll('#player-pictures img')].every((i) => i.naturalWidth > 0)")
        before = page.locator("#player-pictures img").first.get_attribute("src")
        page.locator("#scrub").evaluate("(e) => { e.value = 0.8; e.dispatchEvent(new Event('input')); }")
        wait(page, f"document.querySelector('#player-pictures img').src.includes('at=0.8') && '{before}' !== ''")
        page.click("#label-success")
        until(lambda: store.meta(chosen).success is True, "the label")
        wait(page, f"document.querySelectorAll('#episodes button').length === {waiting - 1}")
        page.click("#label-undo")
        until(lambda: store.meta(chosen).success is None, "the label is revoked")

        # ---- pairs
        page.click("[data-view=compare]")
        page.wait_for_selector("#pair-second img")
        page.click("[data-choice=first]")
        kept = tmp_path / "console" / "comparisons.jsonl"
        until(kept.exists, "the choice is kept")
        wait(page, "document.querySelector('#pair-count').textContent.startsWith('1 ')")
        page.click("[data-choice=neither]")
        until(lambda: len(read_comparisons(kept)) == 2, "the second choice")
        assert [c.label for c in read_comparisons(kept)] == [0, -1]

        # ---- leaving
        page.click("[data-view=live]")
        page.click("#seat")
        page.wait_for_selector("#seat:has-text('Take')")
        assert desk.seat is None
        store.close()
        assert page.complaints == []
        assert watcher.complaints == []
        assert session.error is None
        page.context.close()
        watcher.context.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["1440", "390"])
def test_everything_fits_and_nothing_covers_the_stop(tmp_path, browser, viewport):
    with live(tmp_path, auto=True, steps=4000, skills=(0.0,)) as console:
        page = open_page(browser, console.url, viewport, has_touch=viewport is PHONE)
        wait(page, "document.querySelectorAll('.camera canvas').length === 2")
        for view in ("live", "label", "compare", "notes"):
            page.click(f"[data-view={view}]")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
            for y in (0, 10_000):
                page.evaluate(f"scrollTo(0, {y})")
                found = page.evaluate(
                    "(() => { const b = document.querySelector('#estop').getBoundingClientRect();"
                    " return document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2)?.id; })()"
                )
                assert found == "estop", view
            small = page.evaluate(
                "[...document.querySelectorAll('button')].filter((b) => b.offsetParent && (b.offsetHeight < 34 || b.offsetWidth < 34)).map((b) => b.id)"
            )
            assert small == [], view
            cut = page.evaluate(
                "[...document.querySelectorAll('button, h2, dd')].filter((b) => b.offsetParent && b.scrollWidth > b.clientWidth + 1 && b.id !== 'episode').map((b) => b.textContent)"
            )
            assert cut == [], view
        assert page.complaints == []
        page.context.close()


def test_pictures_of_two_cameras_reach_five_watchers_and_a_lost_server_is_told(tmp_path, browser):
    with live(tmp_path, auto=True, steps=4000, skills=(0.0,)) as console:
        pages = [open_page(browser, console.url, PHONE) for _ in range(5)]
        for page in pages:
            wait(page, "['front', 'wrist'].every((c) => (window.frameStats[c] ?? []).length >= 10)")
        assert console.office.desk.watchers == 5
        for page in pages[1:]:
            page.context.close()
        page = pages[0]
    page.wait_for_selector("#banner:has-text('connection is lost')")
    page.context.close()


def test_the_strip_the_rest_prompt_and_the_gate(tmp_path, browser):
    line = {
        "env_steps": 900,
        "event": "promoted",
        "version": 2,
        "successes": 9,
        "n": 10,
        "lower": 0.6,
        "upper": 0.99,
        "reference": 0.5,
    }
    (tmp_path / "gate.jsonl").write_text(json.dumps(line) + "\n")
    with live(tmp_path, skills=(0.0,), steps=4000) as console:
        console.office._rest.work_s = 0.0
        page = open_page(browser, console.url, DESKTOP)
        wait(page, "!document.getElementById('gate-panel').hidden")
        assert "v2 promoted, 90 % of 10 against 50 %" in page.inner_text("#gate-text")
        assert page.get_attribute("#strip", "aria-disabled") != "false"
        sit(page)
        page.wait_for_selector("#rest-text:has-text('time for a break')")
        page.click("#rest-later")
        page.wait_for_selector("#rest", state="hidden")
        start(page)
        page.wait_for_selector("#strip[aria-disabled=false]")
        page.locator("#strip").scroll_into_view_if_needed()
        box = page.locator("#strip").bounding_box()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 5)
        page.mouse.down()
        wait(page, "document.getElementById('strip').getAttribute('aria-valuenow') === '50'")
        page.wait_for_timeout(1500)
        page.mouse.up()
        assert page.get_attribute("#strip", "aria-valuenow") == "0"
        page.click("#success")
        state(page, "episode.outcome", "success")

        def felt():
            store = EpisodeStore.open(tmp_path / "store")
            return [e.value for i in store.episode_ids() for e in store.rewards(i) if e.source == "feedback"]

        values = until(felt, "what was felt is in the store")
        assert len(values) > 10
        assert values == pytest.approx([0.5] * len(values), abs=0.02)
        assert page.complaints == []
