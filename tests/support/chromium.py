"""A headless Chromium that is installed already, and pages in it that are watched."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
#: It asks nobody for anything on its own account.
_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

_PATIENCE = 60_000  # milliseconds

#: What the console says of an answer with an error's status: that is the page's to show, not a fault of the page.
_REFUSED = "Failed to load resource: the server responded with a status of"

_LISTEN = """
globalThis.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium that $CHROMIUM names, else the first one found."""
    named = os.environ.get("CHROMIUM")
    found = next((path for name in ([named] if named else _NAMES) if (path := shutil.which(name))), None)
    assert found, f"no Chromium found (tried: {named or ', '.join(_NAMES)}): install one, or name it in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_FLAGS)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A new page at `url` in a context of its own, made with `options`.

    At its end it must have had no error, no violation of its policy and no request to any other origin.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(_PATIENCE)
    expect.set_options(_PATIENCE)
    page.add_init_script(_LISTEN)
    wrong, asked = list[str](), list[str]()

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(_REFUSED):
            wrong.append(message.text)

    def requested(request: Request) -> None:
        asked.append(request.url)

    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", requested)
    page.goto(url)
    yield page
    violations: list[str] = page.evaluate("violations")
    context.close()
    assert (wrong, violations) == ([], [])
    assert asked
    assert {urlsplit(one).netloc for one in asked if not one.startswith("data:")} == {urlsplit(url).netloc}
