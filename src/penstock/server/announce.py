"""What people read while the server starts: stages with seconds, derived defaults, and the block to paste."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from pathlib import Path

import msgspec

from penstock.engine.limits import Limits
from penstock.engine.messages import Stage
from penstock.logs import in_json, json_line, visible
from penstock.server.config import ServeConfig
from penstock.server.guard import is_loopback
from penstock.server.listen import Listener

# (what people call it, the field of Limits, the flag; the field of EngineConfig has the flag's name)
DERIVED = (
    ("tokens per request", "max_total_tokens", "--max-total-tokens"),
    ("prompt tokens per request", "max_input_tokens", "--max-input-tokens"),
    ("tokens of one step", "max_batch_prefill_tokens", "--max-batch-prefill-tokens"),
    ("requests that run together", "max_batch_size", "--max-batch-size"),
)


class Ready(msgspec.Struct):
    """The line on stdout with --json."""

    url: str
    uds: str | None
    key_file: str | None
    pid: int
    model: str


def say(line: str = "") -> None:
    """One line for people. Control characters, which a model's name could bring, are spelt out."""
    if in_json():
        if line:
            print(json_line("INFO", line, "penstock"), file=sys.stderr, flush=True)
        return
    print(visible(line), file=sys.stderr, flush=True)


def stage(done: Stage) -> None:
    """A finished stage of the start."""
    say(f"{done.name:<10} {done.seconds:6.2f} s  {done.text}")


def derived(config: ServeConfig, limits: Limits) -> None:
    """Every limit that nobody set, with the flag that changes it."""
    for words, name, flag in DERIVED:
        if getattr(config.engine, name) is None:
            say(f"{'default':<10} {getattr(limits, name):>8}  {words} ({flag})")
    if config.engine.max_batch_total_tokens is None:
        slots = limits.num_blocks * limits.block_size
        say(f"{'default':<10} {slots:>8}  tokens of KV memory (--max-batch-total-tokens)")
    if config.engine.dtype == "auto":
        say(f"{'default':<10} {limits.dtype:>8}  numbers (--dtype)")


def open_door_warning(config: ServeConfig, listener: Listener) -> None:
    """Who can use a server without a key."""
    if listener.uds is not None:
        who = "only this user, through the socket's file mode"
    elif is_loopback(config.host):
        who = f"every user of {socket.gethostname()}"
    else:
        who = f"everybody who reaches {socket.gethostname()} over the network"
    say(f"WARNING: no key is asked for (--no-auth). Who can use this server: {who}.")


def ready_line(config: ServeConfig, listener: Listener, key_file: Path | None) -> None:
    """One JSON line on stdout, for programs."""
    line = Ready(
        url=_url(config, listener),
        uds=None if listener.uds is None else str(listener.uds),
        key_file=None if key_file is None else str(key_file),
        pid=os.getpid(),
        model=config.name,
    )
    print(msgspec.json.encode(line).decode(), flush=True)


def block(config: ServeConfig, listener: Listener, key_file: Path | None, chats: bool) -> None:
    """What to paste into another terminal, a program or a laptop. chats: the model has a chat template."""
    route, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    call, given, answer = "chat.completions", 'messages=[{"role": "user", "content": "Hello"}]', "message.content"
    if not chats:
        route, asked = "completions", '"prompt": "Hello"'
        call, given, answer = "completions", 'prompt="Hello"', "text"
    node = socket.gethostname()
    url = _url(config, listener)
    header = f'-H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})" ' if key_file is not None else ""
    unix = f"--unix-socket {shlex.quote(str(listener.uds))} " if listener.uds is not None else ""
    key = f"open({str(key_file)!r}).read().strip()" if key_file is not None else '"none"'
    say()
    say(f"Serving {config.name} at {listener.uds or url}")
    if key_file is not None:
        say(f"Key file: {key_file}")
    say()
    say("Ask it from a shell on this machine:")
    say(f"  curl {unix}{url}/v1/{route} {header}\\")
    say('    -H "Content-Type: application/json" \\')
    say(f"""    -d '{{{asked}, "max_tokens": 64}}'""")
    if listener.uds is None:
        say("From Python (pip install openai):")
        say("  from openai import OpenAI")
        say(f'  client = OpenAI(base_url="{url}/v1", api_key={key})')
        say(f"  answer = client.{call}.create(")
        say(f'      model="{config.name}", {given}, max_tokens=64)')
        say(f"  print(answer.choices[0].{answer})")
    say("From your laptop, through a tunnel:")
    if listener.uds is not None:
        say(f"  ssh -N -L 3000:{listener.uds} {node}")
    else:
        target = "localhost" if is_loopback(config.host) else node
        say(f"  ssh -N -L {listener.port}:{target}:{listener.port} {node}")
        local = f"http://localhost:{listener.port}/"
        here = local if is_loopback(config.host) else f"{url}/, through the tunnel {local}"
        if chats:
            say(f"Chat in a browser: {here}")
    say(f"Stop it{' with Ctrl-C here, or' if sys.stdin.isatty() else ''}: kill {os.getpid()}")


def _url(config: ServeConfig, listener: Listener) -> str:
    """The address as clients type it: no wildcard."""
    if listener.uds is None and config.host in ("0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
        return f"http://{socket.gethostname()}:{listener.port}"
    return listener.url
