"""Pages as a reader without a network sees them: Debian's Chromium, headless, driven by Playwright.

A test module imports the fixture and opens its file::

    from browser import chromium, opened

    def test_a_page(chromium, tmp_path):
        with opened(chromium, tmp_path / "index.html") as view:
            view.page.locator("#quantity").select_option("Frobenius norm of the memory matrix")
            assert view.faults() == []
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

#: No service of Google's is looked for: the machines of CI reach none.
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class View:
    """One opened page, and what happened in it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def images(self) -> list[str]:
        """The texts of all images of the page, in order."""
        return self.page.eval_on_selector_all("img", "images => images.map(image => image.alt)")

    def broken_images(self) -> list[str]:
        """The texts of the images that show nothing."""
        script = "images => images.filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"
        return self.page.eval_on_selector_all("img", script)

    def faults(self) -> list[str]:
        """Everything that should not be: images that show nothing, requests to elsewhere, errors of scripts."""
        return [
            *(f"image: {text}" for text in self.broken_images()),
            *(f"request: {address}" for address in self.requests),
            *(f"console: {text}" for text in self.complaints),
        ]


def executable() -> str | None:
    """Where Chromium is, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for the tests of a module; without Chromium they are skipped, in CI they fail."""
    found = executable()
    if found is None:
        reason = "Chromium is not installed: make browser"
        if os.environ.get("PREFIXMEMORY_BROWSER") == "required" or os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS, chromium_sandbox=False)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, file: Path, width: int = 1200, height: int = 900) -> Iterator[View]:
    """``file`` in a window of its own that reaches no network; what it asks for elsewhere is refused and noted."""
    own = file.resolve().as_uri()
    context = browser.new_context(offline=True, viewport={"width": width, "height": height})
    try:
        page = context.new_page()
        view = View(page)

        def judge(route: Route) -> None:
            if route.request.url.split("#")[0] == own:
                route.continue_()
            else:
                view.requests.append(route.request.url)
                route.abort()

        def hear(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                view.complaints.append(message.text)

        context.route("**/*", judge)
        page.on("console", hear)
        page.on("pageerror", lambda error: view.complaints.append(str(error)))
        page.goto(own, wait_until="load")
        yield view
    finally:
        context.close()
