"""The chat page when answers are stopped, and when the server is full, broken or gone."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from ..conftest import StartServer
from ..running import Server
from .browser import Keys, Page


def streams(page: Page, before: int) -> bool:
    """Whether one more answer than `before` is there and grows."""
    return [len(text) > 20 for text in page.answers[before:]] == [True]


def test_stop_ends_the_generation(browser: Any, narrow: Server) -> None:
    page = Page(browser, narrow).open()

    for stop in (lambda: page.find("stop").click(), lambda: page.type(Keys.ESCAPE), lambda: page.find("new").click()):
        before = len(page.answers)
        page.ask("the quick", answered=False)
        page.wait(partial(streams, page, before), "streaming")
        assert narrow.metric("tgi_batch_current_size") == 1
        assert page.find("stop").is_displayed()
        assert not page.find("send").is_displayed()
        page.find("prompt").send_keys("not yet" + Keys.ENTER)
        assert page.find("prompt").get_attribute("value") == "not yet"  # kept, not sent
        page.find("prompt").clear()
        stop()
        page.wait(lambda: page.idle, "stopped")
        narrow.wait_idle()
        assert page.find("send").is_displayed()
    before = len(page.answers)
    page.ask("the quick", answered=False)
    page.wait(lambda: any(page.answers[before:]), "streaming")
    page.browser.get("about:blank")  # leaving the page ends it too
    narrow.wait_idle()


def test_a_full_server_is_asked_again(browser: Any, narrow: Server) -> None:
    page = Page(browser, narrow).open()
    with narrow.stream("/generate_stream", {"inputs": "the", "parameters": {"max_new_tokens": 60000}}) as answer:
        assert answer.read(10)
        page.set(max_tokens="5")
        page.ask("the quick", answered=False)
        page.wait(lambda: "busy" in page.status and "Next try in" in page.status, "told to wait")
        assert page.answers == [""]
        page.type(Keys.ESCAPE)
        page.wait(lambda: page.idle and page.note == "Stopped.", "given up")
        page.click("Regenerate")
        page.wait(lambda: "Next try in" in page.status, "waiting again")
    page.wait(lambda: page.idle and page.stats.startswith("5 tokens"), "answered once there is room")


def test_an_engine_that_dies_and_comes_back(browser: Any, start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama, "--served-model-name", "demo")
    page = Page(browser, server).open()
    page.ask("the quick", answered=False)
    page.wait(lambda: page.answers and page.answers[-1], "streaming")
    os.kill(server.engine_pid(), signal.SIGKILL)
    page.wait(lambda: page.idle, "told")
    assert page.note.startswith("The server says: ")
    page.set(max_tokens="4")
    page.click("Regenerate")  # the page waits for the new engine by itself
    page.wait(lambda: page.idle and page.stats.startswith("4 tokens"), "answered by the new engine")
    assert page.complaints() == []


def test_a_server_that_is_gone(browser: Any, start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama, "--served-model-name", "demo")
    page = Page(browser, server).open()
    page.ask("the quick", answered=False)
    page.wait(lambda: page.answers and page.answers[-1], "streaming")
    server.kill()
    page.wait(lambda: page.idle, "told")
    assert page.note == "The connection broke off."
    kept = page.answers[-1]
    page.ask("and now?")
    assert "does not answer" in page.note
    assert page.answers[0] == kept
