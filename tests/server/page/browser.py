"""The chat page in a headless Chromium, driven as a person would: by clicks and keys."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ..running import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 20
QUESTION = "How do I list my jobs on Slurm?"
ANSWER = "squeue --me lists only your own jobs."  # as shown, the backticks are gone


def driver() -> Iterator[Any]:
    """A running browser; the test is skipped where there is none."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    program = shutil.which("chromedriver")
    if binary is None or program is None:
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(program))
    yield found
    found.quit()


class Page:
    """The page of one server, in a fresh tab."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser, self.server = browser, server
        browser.switch_to.new_window("tab")
        browser.get_log("browser")
        browser.get_log("performance")

    def open(self, key: bool = True) -> Page:
        """Open it; with the key behind `#`, or without."""
        self.browser.get(f"{self.server.url}/" + (f"#key={self.server.key}" if key else ""))
        self.wait(lambda: self.model == "demo" or self.dialog_open or self.status, "connected")
        return self

    def find(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return found

    def texts(self, selector: str) -> list[str]:
        """What those elements show, read in one call: the page may replace an element between two."""
        found: list[str] = self.js(
            "return Array.from(document.querySelectorAll(arguments[0]), node => node.innerText.trim())", selector
        )
        return found

    def js(self, code: str, *arguments: object) -> Any:
        return self.browser.execute_script(code, *arguments)

    @property
    def model(self) -> str:
        text: str = self.find("model").text
        return text

    @property
    def status(self) -> str:
        text: str = self.find("status").text
        return text

    @property
    def dialog_open(self) -> bool:
        return bool(self.js("return document.getElementById('door').open"))

    @property
    def answers(self) -> list[str]:
        """The texts of the answers, as shown."""
        return self.texts("article.assistant .body")

    @property
    def stats(self) -> str:
        return self.texts("article.assistant .stats")[-1]

    @property
    def note(self) -> str:
        return self.texts("article.assistant .note")[-1]

    @property
    def idle(self) -> bool:
        return bool(self.js("return running === null"))

    def wait(self, until: Callable[[], object], what: str) -> None:
        """Until that is so; fails with what is on the page when it takes too long."""
        end = time.monotonic() + SECONDS
        while not until():
            assert time.monotonic() < end, f"not {what}: {self.find('log').text!r}, status {self.status!r}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Keys to whatever has the focus."""
        webdriver.ActionChains(self.browser).send_keys(text).perform()

    def chord(self, held: str, key: str) -> None:
        webdriver.ActionChains(self.browser).key_down(held).send_keys(key).key_up(held).perform()

    def set(self, **fields: str) -> None:
        """Fill in settings."""
        if not self.find("settings").is_displayed():
            self.find("open").click()
        for name, value in fields.items():
            self.find(name).clear()
            self.find(name).send_keys(value)

    def ask(self, text: str, answered: bool = True) -> None:
        """Type a message and click Send; wait for the whole answer."""
        before = len(self.all("article.assistant"))
        self.find("prompt").send_keys(text)
        self.find("send").click()
        if answered:
            self.wait(lambda: len(self.all("article.assistant")) > before and self.idle, "answered")

    def click(self, text: str, inside: str = "article:last-of-type") -> None:
        """Click a button of a message by its words."""
        (button,) = [node for node in self.all(f"{inside} footer button") if node.text == text]
        button.click()

    def complaints(self) -> list[str]:
        """What the browser wrote to its console but for failed requests."""
        return [e["message"] for e in self.browser.get_log("browser") if e["source"] != "network"]


__all__ = ["ANSWER", "QUESTION", "Keys", "Page", "driver"]
