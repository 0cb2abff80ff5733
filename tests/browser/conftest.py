"A real browser: this machine's own Chromium or Chrome, driven by Playwright (which would otherwise download one of its own)."
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 300_000                  # milliseconds: it ends what hangs, and never what is slow
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")     # while it is open, the thread has a running event loop, which would disturb other modules
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None: pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the PATH")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=QUIET + ["--no-sandbox"] * (hasattr(os, "getuid") and os.getuid() == 0))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    "A fresh page with no cookies; what the browser's console and network complain of is in `page.complaints`."
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    context.close()
