"""A headless Chromium for the page's tests."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = os.environ.get("ROBOT_RL_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def need_browser() -> None:
    """Skips where there is no browser or nothing to drive it with."""
    pytest.importorskip("playwright", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or set ROBOT_RL_CHROMIUM to its path")


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = [
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-timer-throttling",
        "--disable-renderer-backgrounding",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, **options)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Any, url: str, viewport: dict[str, int], **more: Any) -> Any:
    """A page that has connected; what its console complains about is kept in ``page.complaints``."""
    context = browser.new_context(viewport=viewport, **more)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    wait(page, "Boolean(window.page && window.page.state)")
    return page


def wait(page: Any, expression: str, patience_s: float = 60.0) -> Any:
    """Until a JavaScript expression is true. Playwright's own waiting evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if found := page.evaluate(expression):
            return found
        page.wait_for_timeout(50)
    raise AssertionError(
        f"{expression}: not within {patience_s:.0f} s; {json.dumps(page.evaluate('window.page && window.page.state'))[:1500]}"
    )
