"""A headless browser that reaches nothing but this machine, where there is one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--autoplay-policy=no-user-gesture-required", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser of Playwright's. Skips the test where there is none."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_OPTIONS))
        yield browser
        browser.close()


def watched(page: Any) -> tuple[list[str], list[str]]:
    """The requests that a page makes from now on, and its errors; both lists grow."""
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    return requests, errors


@contextlib.contextmanager
def opened(page: Path, width: int = 1280, height: int = 900) -> Iterator[tuple[Any, list[str], list[str]]]:
    """A file in the browser: the page, the requests it makes besides itself, and its errors; both lists grow."""
    with launched() as browser:
        opened_page = browser.new_page(viewport={"width": width, "height": height})
        requests, errors = watched(opened_page)
        opened_page.goto(page.as_uri())
        yield opened_page, requests, errors
