"""The chat page in headless Chromium."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.chat_page import FLAGS, Fake, Tab, serving

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # not longer: playwright keeps an event loop running, which other files need
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium on PATH: one of {', '.join(NAMES)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def fake_server() -> Iterator[Fake]:
    fake = Fake()
    with serving(fake.app()) as fake.url:
        yield fake


@pytest.fixture
def fake(fake_server: Fake) -> Fake:
    """The server, as at its start."""
    url = fake_server.url
    fake_server.release.set()  # of streams of the last test
    fake_server.__init__()
    fake_server.url = url
    return fake_server


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Any]:
    """Opens a tab. No test may leave an error in the console that it did not expect, or ask another host."""
    tabs: list[Tab] = []

    def open_one(url: str, size: str = "wide", **options: Any) -> Tab:
        tabs.append(Tab(browser, url, size, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.context.close()
        assert tab.console == []
        assert [url for url in tab.requests if not url.startswith(tab.url)] == []
