"""What a person can do with the chat page."""

from __future__ import annotations

import re
from typing import Any

from ..running import Server
from .browser import QUESTION, Keys, Page


def test_an_answer_streams_and_is_counted(page: Page) -> None:
    page.js(
        "window.seen = [];"
        "new MutationObserver(() => seen.push(document.querySelector('.assistant .body').textContent)).observe("
        "document.getElementById('log'), {childList: true, subtree: true, characterData: true})"
    )
    page.set(max_tokens="200")
    page.ask("Tell me a story about a fox")
    (text,) = page.answers
    seen = [piece for piece in page.js("return seen") if piece]
    assert len(set(seen)) > 2  # it grew
    assert len(seen[0]) < len(text) / 2
    pattern = r"(\d+) tokens · [\d.]+ tokens/s · first after \d+\.\d\d s · prompt (\d+) tokens( \(\d+ cached\))?"
    tokens = re.fullmatch(pattern, page.stats)
    assert tokens
    plain = {"messages": [{"role": "user", "content": "Tell me a story about a fox"}], "max_tokens": 1}
    whole = page.server.post("/v1/chat/completions", plain).json()["usage"]
    assert int(tokens[2]) == whole["prompt_tokens"]
    assert page.status == "Answer complete"
    assert page.complaints() == []


def test_settings_and_system_prompt_reach_the_model(page: Page) -> None:
    page.set(system="You answer in one line.", temperature="1.3", top_p="0.9", max_tokens="9", seed="11")
    page.ask(QUESTION)
    body = {
        "messages": [
            {"role": "system", "content": "You answer in one line."},
            {"role": "user", "content": QUESTION},
        ],
        "temperature": 1.3, "top_p": 0.9, "max_tokens": 9, "seed": 11,
    }  # fmt: skip
    direct = page.server.post("/v1/chat/completions", body).json()
    assert page.js("return messages.at(-1).content") == direct["choices"][0]["message"]["content"]
    counts = direct["usage"]
    assert page.stats.startswith(f"{counts['completion_tokens']} tokens")
    assert f"prompt {counts['prompt_tokens']} tokens" in page.stats
    page.set(max_tokens="2")
    page.ask(QUESTION)
    assert "limit of tokens" in page.note
    page.set(temperature="-1")
    page.ask(QUESTION, answered=False)
    assert len(page.answers) == 2  # not sent: the field says what is wrong with it
    page.browser.refresh()
    assert page.find("system").get_attribute("value") == "You answer in one line."


def test_a_refusal_is_told_in_the_servers_words(page: Page) -> None:
    page.set(max_tokens="100000")
    page.ask(QUESTION)
    assert "max_new_tokens" in page.note
    assert "422" in page.note
    assert "bad" in page.all("article .note")[-1].get_attribute("class")


def test_regenerate_edit_copy_and_a_new_chat(page: Page) -> None:
    page.set(temperature="0")
    page.ask(QUESTION)
    page.ask("What does sinfo do?")
    assert len(page.answers) == 2
    first = "article.user:nth-of-type(1)"
    page.click("Regenerate")
    page.wait(lambda: page.idle and page.status == "Answer complete", "answered again")
    assert len(page.answers) == 2
    page.click("Edit", first)
    assert page.find("prompt").get_attribute("value") == QUESTION
    page.find("prompt").clear()
    page.find("prompt").send_keys("What does sinfo do?" + Keys.ENTER)
    page.wait(lambda: len(page.answers) == 1 and page.idle, "answered the edited message")
    assert page.answers[0].startswith("sinfo lists")
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.click("Copy")
    page.wait(lambda: "Copied" in page.texts("footer button"), "copied")
    copied = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied.startswith("`sinfo` lists")
    page.browser.refresh()
    page.wait(lambda: page.model == "demo", "connected again")
    assert page.answers[0].startswith("sinfo lists")  # the tab remembers
    page.find("new").click()
    assert page.answers == []
    assert page.find("empty").is_displayed()
    page.browser.refresh()
    assert page.answers == []


def test_by_keyboard_alone(browser: Any, demo: Server) -> None:
    page = Page(browser, demo).open(key=False)
    page.type(str(demo.key))  # the field has the focus
    page.type(Keys.ENTER)
    page.wait(lambda: page.model == "demo", "connected")
    focus = "return document.activeElement.id"
    assert page.js(focus) == "prompt"
    page.type("How do I list")
    page.chord(Keys.SHIFT, Keys.ENTER)
    page.type("my jobs on Slurm?")
    assert page.find("prompt").get_attribute("value") == "How do I list\nmy jobs on Slurm?"
    page.type(Keys.ENTER)
    page.wait(lambda: page.answers and page.idle, "answered")
    assert page.js(focus) == "prompt"
    for _ in range(40):  # backwards through everything before the field
        if page.js(focus) == "open":
            break
        page.chord(Keys.SHIFT, Keys.TAB)
    assert page.js(focus) == "open"
    page.type(Keys.ENTER)
    assert page.js(focus) == "system"
    assert page.find("open").get_attribute("aria-expanded") == "true"
    page.type(Keys.TAB)
    page.type("0.5")
    assert page.find("temperature").get_attribute("value") == "0.5"
    page.type(Keys.ESCAPE)
    assert not page.find("settings").is_displayed()
    assert page.js(focus) == "open"
    unnamed = page.js(
        "return [...document.querySelectorAll('button, input, select, textarea')].filter(node => "
        "!node.textContent.trim() && !node.getAttribute('aria-label') && !node.labels?.length).map(node => node.id)"
    )
    assert unnamed == []
    assert page.js(
        "return document.querySelector('[role=log]') !== null && document.querySelector('[role=status]') !== null"
    )


def test_dark_and_light(page: Page) -> None:
    def brightness() -> int:
        colour = page.js("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    def system(value: str) -> None:
        features = {"features": [{"name": "prefers-color-scheme", "value": value}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)

    system("light")
    assert brightness() > 600
    system("dark")
    assert brightness() < 150
    button = page.find("theme")
    for label, dark in (("Theme: dark", True), ("Theme: light", False), ("Theme: auto", True)):
        button.click()
        assert button.get_attribute("aria-label") == label
        assert (brightness() < 150) == dark
    system("light")


def test_a_narrow_screen(page: Page) -> None:
    page.ask(QUESTION)
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    )
    page.find("open").click()
    assert page.js("return document.documentElement.scrollWidth") <= 360
    for name in ("new", "open", "theme", "prompt", "send"):
        box = page.find(name).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
