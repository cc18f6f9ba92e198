"""The answer at `/` itself: who gets it, under which policy, and what is in the file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.process import ROOT

from ..conftest import StartServer
from ..running import Server
from .browser import ANSWER, QUESTION, Keys, Page

HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FILE = ROOT / "src/penstock/server/chat.html"


def test_the_page_is_open_and_nothing_else_is(demo: Server) -> None:
    answer = demo.get("/", Accept=HTML, Authorization="")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.body == FILE.read_bytes()
    head = demo.ask("HEAD", "/", Accept=HTML, Authorization="")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
    for method, path in (
        ("GET", "/info"), ("GET", "//"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/chat.html"),
        ("GET", "/x"), ("POST", "/"), ("POST", "/generate"), ("PUT", "/"), ("DELETE", "/"), ("OPTIONS", "/"),
    ):  # fmt: skip
        refused = demo.ask(method, path, "{}" if method == "POST" else None, Accept=HTML, Authorization="")
        assert refused.status == 401, (method, path)
        assert b"<html" not in refused.body
    assert demo.get("/", Accept=HTML, Authorization="", Host="evil.example").status == 403


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "application/json, text/html", "text/plain"])
def test_programs_still_get_health(demo: Server, accept: str) -> None:
    assert demo.get("/", Accept=accept, Authorization="").status == 401
    with_key = demo.get("/", Accept=accept)
    assert (with_key.status, with_key.body) == (200, b"")


def test_the_policy_allows_the_pages_own_code_and_nothing_else(demo: Server) -> None:
    answer = demo.get("/", Accept=HTML, Authorization="")
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))

    def hashed(kind: str) -> str:
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == hashed("script")
    assert rules["style-src"] == hashed("style")
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "accept" in answer.headers["vary"]


def test_the_file_is_small_and_stands_alone() -> None:
    text = FILE.read_text()
    assert len(text.encode()) < 40_000
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick=", 'style="'):
        assert word not in text
    addresses: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            addresses.extend(value or "" for name, value in attrs if name in ("src", "href", "action"))

    Reader().feed(text)
    assert [address[:5] for address in addresses] == ["data:", "#prom"]


def test_it_asks_for_the_key(browser: Any, demo: Server) -> None:
    page = Page(browser, demo).open(key=False)
    assert page.dialog_open
    page.find("key").send_keys("wrong" + Keys.ENTER)
    page.wait(lambda: "does not take this key" in page.find("door-note").text, "refused")
    assert page.dialog_open
    page.find("key").send_keys(demo.key)
    page.find("enter").click()
    page.wait(lambda: page.model == "demo", "connected")
    assert not page.dialog_open
    assert page.find("key").get_attribute("value") == ""
    page.ask(QUESTION)
    assert page.answers == [ANSWER]


def test_the_key_behind_the_address(page: Page) -> None:
    assert not page.dialog_open
    assert page.browser.current_url == f"{page.server.url}/"
    sent = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in sent if entry["method"] == "Network.requestWillBeSent"]
    assert urls
    assert not any((page.server.key or "?") in url for url in urls)


def test_the_key_is_asked_for_again_when_it_no_longer_fits(page: Page) -> None:
    page.js("sessionStorage.setItem('penstock.key', JSON.stringify('old'))")
    page.set(temperature="0")
    page.ask(QUESTION)
    assert page.dialog_open
    page.find("key").send_keys(str(page.server.key) + Keys.ENTER)
    page.wait(lambda: page.idle and page.answers == [ANSWER], "answered after the key")


def test_without_a_key(browser: Any, start_server: StartServer) -> None:
    server = start_server("demo", "--no-auth")
    began = time.monotonic()
    page = Page(browser, server).open(key=False)
    assert not page.dialog_open
    page.ask(QUESTION)
    assert page.answers[0]
    assert time.monotonic() - began < 15
