"""A browser for all tests of a module, and pages in it that ask nobody but their server."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import launched, watched

Opening = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opening]:
    """Opens a page with options of a browser's context, or another tab of one; afterwards all is looked through."""
    contexts: list[Any] = []
    seen: list[tuple[str, list[str], list[str]]] = []

    def open_it(url: str, beside: Any = None, **options: Any) -> Any:
        if beside is None:
            contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = (beside.context if beside else contexts[-1]).new_page()
        page.set_default_timeout(60_000)
        seen.append((url, *watched(page)))
        page.goto(url)
        page.locator(".connection:not(.away)").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()
    for url, requests, errors in seen:
        assert [one for one in requests if not one.startswith((url, "blob:", "data:"))] == []
        assert [error for error in errors if "Failed to load resource" not in error] == []  # answers of the API
