"""The web page in a browser without a window: what it shows after a drawing."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def browser() -> str | None:
    """A browser's path, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def opened(url: str, width: int, height: int) -> Iterator[Any]:
    """The page in a browser without a window.

    Raises:
        ValueError: if Playwright or a browser is missing.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError("Playwright is missing: pip install 'tarflow[dev]'") from error
    if browser() is None:
        raise ValueError(f"no browser found; one of {', '.join(BROWSERS)} is needed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        yield page
        chromium.close()


def draw(page: Any, prompt: str | None, seed: int, count: int) -> None:
    """Fill in the form, draw, and wait for the end."""
    page.wait_for_selector("#draw")
    if prompt is not None:
        page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("number input for Images").fill(str(count))
    press(page, "#draw", "#status")
    if page.locator("#status .error").count():
        raise ValueError(page.inner_text("#status .error"))
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def press(page: Any, button: str, place: str) -> None:
    """Press a button, and wait until a place (both CSS selectors) has other numbers or another error than before."""
    shown = f"{place} dl, {place} .error"
    before = page.evaluate("shown => document.querySelector(shown)?.innerText ?? null", shown)
    page.click(button)
    page.wait_for_function(
        "([shown, before]) => ![before, null].includes(document.querySelector(shown)?.innerText ?? null)",
        arg=[shown, before],
        timeout=600_000,
    )
