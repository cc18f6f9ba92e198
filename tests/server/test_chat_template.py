"""`--chat-template FILE`, and templates that misbehave, over HTTP."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.process import check_error, penstock

from .conftest import StartServer

TALK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_a_template_of_ones_own(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ bos_token }}OWN {{ messages[0].content }} {{ flavour }}")
    server = start_server(tiny_llama, "--chat-template", str(path))
    answer = server.post("/chat_tokenize", TALK)
    assert answer.status == 200
    assert answer.json()["templated_text"] == "<s>OWN hi "
    answer = server.post("/v1/chat/completions", {**TALK, "chat_template_kwargs": {"flavour": "salt"}})
    assert answer.status == 200
    answer = server.post("/v1/chat/completions", {**TALK, "chat_template_kwargs": {"messages": []}})
    assert (answer.status, answer.json()["error"]["message"]) == (
        422,
        "Template error: `chat_template_kwargs` cannot set 'messages'",
    )


def test_a_hostile_template_costs_its_request_alone(
    start_server: StartServer, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hostile.jinja"
    path.write_text(
        "{% if messages[0].content == 'loop' %}{% set r = range(99999) %}"
        "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}"
        "{% elif messages[0].content == 'eat' %}{{ range(99999) | map('string') | map('list') | sum(start=[]) }}"
        "{% elif messages[0].content == 'break out' %}{{ cycler.__init__.__globals__.os.popen('id').read() }}"
        "{% else %}fine{% endif %}"
    )
    server = start_server(tiny_llama, "--chat-template", str(path))
    for wish in ("loop", "eat", "break out"):
        began = time.monotonic()
        answer = server.post("/v1/chat/completions", {**TALK, "messages": [{"role": "user", "content": wish}]})
        assert time.monotonic() - began < 2
        assert answer.status == 422
        assert answer.json()["error"]["message"].startswith("Template error: ")
        assert server.post("/v1/chat/completions", TALK).status == 200


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file or directory"), ("", "There is no chat template in"), ("{% if %}", "Expected an expression")],
)
def test_a_file_that_is_none(tiny_llama: Path, tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "own.jinja"
    if text is not None:
        path.write_text(text)
    done = penstock("serve", tiny_llama, "--port", "0", "--chat-template", path, home=tmp_path)
    check_error(done, 2, says)
