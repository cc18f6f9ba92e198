"""What the page makes of a text: markup where it is meant, never code, and never slowly."""

from __future__ import annotations

import json
import re

from .browser import QUESTION, Page

EVIL = (
    '<img src=x onerror="window.hit=1"><script>window.hit=1</script> **<b onclick=hit()>** `<i>` '
    "[x](javascript:window.hit=1) [y](https://e.example/\"onmouseover=\"window.hit=1)\n\n```<svg onload=hit()>\n"
    "</code></pre><script>window.hit=1</script>\n```\n\n| <u> | b |\n|---|---|\n| <iframe src=javascript:hit()> | 1 |"
)  # fmt: skip


def test_hostile_text_stays_text(page: Page) -> None:
    talk = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL, "reasoning": EVIL, "note": EVIL}]
    page.js("sessionStorage.setItem('penstock.messages', JSON.stringify(arguments[0]))", talk)
    page.browser.refresh()
    page.wait(lambda: page.model == "demo", "connected")
    # and as a stream, a few characters at a time
    page.js(
        "const node = document.createElement('div'); node.id = 'grown'; document.getElementById('log').append(node);"
        "const show = growing(node); for (let i = 0; i <= arguments[0].length; i += 3) show(arguments[0].slice(0, i));",
        EVIL,
    )
    page.js(
        "document.getElementById('prompt').value = arguments[0]", EVIL
    )  # as if pasted: keys would send at each line
    page.ask("")
    made = set(page.js("return [...document.querySelectorAll('#log *')].map(node => node.tagName.toLowerCase())"))
    assert not made & {"img", "script", "svg", "iframe", "b", "i", "u", "style", "object", "embed"}
    links = page.js("return [...document.querySelectorAll('#log a')].map(node => node.href)")
    assert all(link.startswith("https://e.example/") for link in links)
    events = page.js(
        "return [...document.querySelectorAll('#log *')].flatMap(node => node.getAttributeNames())"
        ".filter(name => name.startsWith('on'))"
    )
    assert events == []
    assert "<script>window.hit=1</script>" in page.find("log").text
    assert page.js("return window.hit") is None
    # markup from a string is impossible even for code of the page itself
    assert page.js("try { document.body.innerHTML = '<p>x'; return 'done' } catch (e) { return e.name }") == "TypeError"


def test_markdown(page: Page) -> None:
    text = (
        "# Title\n\nA **bold *and italic* word**, `a*b*c`, 2 * 3 * 4, snake_case_name, \\*plain\\*\nnext line\n\n"
        "- one\n- two\n  - inner\n\n1. first\n2. second\n\n```python\nx = [1]  # **not bold**\n\n- not a list\n```\n"
        "> said\n\n| a | b |\n|---|--:|\n| 1 | `2` |\n\n---\n~~~\nunclosed"
    )
    page.js(
        "const node = document.createElement('div'); node.id = 'made';"
        "document.body.append(node); growing(node)(arguments[0])",
        text,
    )
    html = re.sub(r"<button.*?</button>", "", page.js("return document.getElementById('made').innerHTML"))
    assert html == (
        "<h3>Title</h3><p>A <strong>bold <em>and italic</em> word</strong>, <code>a*b*c</code>, 2 * 3 * 4, "
        "snake_case_name, *plain*\nnext line</p>"
        "<ul><li>one</li><li>two<ul><li>inner</li></ul></li></ul>"
        '<ol start="1"><li>first</li><li>second</li></ol>'
        '<figure><figcaption><span>python</span></figcaption><pre tabindex="0"><code>x = [1]  # **not bold**\n\n'
        "- not a list</code></pre></figure>"
        "<blockquote><p>said</p></blockquote>"
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div><hr>"
        '<figure><figcaption><span>text</span></figcaption><pre tabindex="0"><code>unclosed</code></pre></figure>'
    )


def test_no_text_is_slow(page: Page) -> None:
    """The time to draw 40,000 characters that could make a careless pattern or recursion explode."""
    for piece in (
        "**a ", "*", "`", "`a ", "[", "[a](", "> ", ">", "- ", "- a\n", "|-", "|a\n", " ", "\n", "  - x\n", "# ",
        "```\n", "\\", "~~~", "1. ", "---", "- - ", "a\n\n", "-" * 400 + "|", "_",
    ):  # fmt: skip
        text = piece * (40_000 // len(piece)) + "x"
        seconds = page.js(
            "const began = performance.now(); growing(document.createElement('div'))(arguments[0]);"
            "return (performance.now() - began) / 1000",
            text,
        )
        assert seconds < 2, (piece, seconds)


def test_nothing_leaves_the_server(page: Page) -> None:
    page.ask(QUESTION)
    page.ask("Show me ![this](https://e.example/pixel.png) please")
    sent = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = {entry["params"]["request"]["url"] for entry in sent if entry["method"] == "Network.requestWillBeSent"}
    assert f"{page.server.url}/v1/chat/completions" in urls
    assert {url for url in urls if not url.startswith((f"{page.server.url}/", "data:"))} == set()
    resources = page.js("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith(f"{page.server.url}/v1/") for name in resources)
