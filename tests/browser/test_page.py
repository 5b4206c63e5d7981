"""The HTTP server's page in a real browser: chat streams, the tree shows a shared prefix, nothing is on the console."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import PATH, Browser
from tests.http_server.server import Server, serving

pytestmark = pytest.mark.skipif(PATH is None, reason="there is no Chromium (apt install chromium)")
SHOTS = os.environ.get("SCREENSHOTS")  # a folder for the pictures of docs/http.md

ASK = """
document.getElementById("prompt").value = %r;
document.getElementById("form").requestSubmit();
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_chat_streams_and_the_tree_shows_a_shared_prefix(server: Server) -> None:
    prefix = "The quick brown fox jumps over the lazy dog. " * 6
    for ending in ("One", "Two"):
        server.post("/v1/completions", {"prompt": prefix + ending * 20, "max_tokens": 1})
    with Browser() as browser:
        browser.open(server.url)
        browser.wait("document.querySelectorAll('.tile').length >= 6", "the tiles")
        browser.wait("document.getElementById('model').textContent === 'tiny'", "the model's name")
        browser.run(ASK % "What is 17 + 25?")
        browser.wait("document.querySelector('.assistant .thinking')?.textContent", "thinking")
        browser.wait("document.querySelector('.assistant .text')?.textContent === '42'", "the answer")
        browser.wait("!document.getElementById('send').disabled", "the end")
        browser.run(ASK % "And 3 more?")
        browser.wait("document.querySelectorAll('.assistant .text').length === 2", "a second answer")
        shared = (
            "[...document.querySelectorAll('#tree details > summary')].find(e => e.textContent.includes('quick brown'))"
        )
        browser.wait(f"!!{shared}", "the shared prefix")
        assert browser.run(f"{shared}.parentElement.children.length") == 3  # its own line, and the two that part there
        assert browser.run("[...document.querySelectorAll('.tile b')].every(e => e.textContent !== '')")
        if SHOTS:
            browser.screenshot(Path(SHOTS) / "page-wide.png")
        assert browser.console == []


def test_rows_show_and_stop_stops(server: Server) -> None:
    with Browser() as browser:
        browser.open(server.url)
        browser.wait("document.querySelectorAll('.tile').length >= 6", "the tiles")
        browser.run(
            "document.getElementById('most').value = 20000; document.getElementById('thinking').checked = false"
        )
        server.post("/v1/completions", {"prompt": "warm", "max_tokens": 1})
        browser.run(ASK % "Repeat: one two three four five six seven eight nine ten")
        browser.run("document.getElementById('stop').click()")
        browser.wait("!document.getElementById('send').disabled", "stopped")
        server.wait_idle()
        browser.run("document.getElementById('reset').click()")
        assert browser.run("document.getElementById('messages').childElementCount") == 0
        assert browser.console == []


def test_errors_are_shown(server: Server) -> None:
    with Browser() as browser:
        browser.open(server.url)
        browser.wait("document.querySelectorAll('.tile').length >= 6", "the tiles")
        browser.run("document.getElementById('most').value = 10000000")
        browser.run(ASK % "Hi")
        text = browser.wait("document.querySelector('.message.error')?.textContent", "the error")
        assert "max_tokens=10000000" in text
        assert all("400" in line for line in browser.console)  # the browser's own line about the answer's status


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_needs_no_sideways_scrolling(server: Server, dark: bool) -> None:
    with Browser(400, 850, dark=dark) as browser:
        browser.open(server.url)
        browser.wait("document.querySelectorAll('.tile').length >= 6", "the tiles")
        browser.run(ASK % "What is 17 + 25?")
        browser.wait("document.querySelector('.assistant .text')?.textContent === '42'", "the answer")
        assert browser.run("document.documentElement.scrollWidth") <= 400
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (int(back.split("(")[1].split(",")[0]) < 60) == dark
        if SHOTS and dark:
            browser.screenshot(Path(SHOTS) / "page-narrow.png")
        assert browser.console == []
