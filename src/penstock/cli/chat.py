"""`penstock chat`: one question, a pipe, or a conversation on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from penstock.cli.conversation import Finish, Message, Partner
from penstock.cli.main import INTERRUPTED
from penstock.cli.options import COUNT, SEED, FiniteFloat, adapters_of, engine_options, find_model, source_options
from penstock.errors import InvalidRequest, UsageError

HELP = (
    "/clear forgets the conversation, /system TEXT sets the system prompt, /exit or Ctrl-D ends; Ctrl-C stops an answer"
)


@click.command(short_help="Talk to a model, here or on a server.")
@click.argument("model", required=False)
@click.argument("question", required=False)
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option(
    "--max-new-tokens", type=COUNT, help="Tokens of an answer, at most.  [default: 1024, or half the context]"
)
@click.option(
    "--temperature", type=FiniteFloat(0, 1e6), help="0 is greedy.  [default: greedy here, the server's there]"
)
@click.option("--top-p", type=FiniteFloat(0, 1, above_low=True), help="Choose among the likeliest that sum to P.")
@click.option("--seed", type=SEED, help="Of the random draws.  [default: a new one each time]")
@click.option("--chat-template", metavar="FILE", help="A jinja chat template, over the model's.")
@click.option("--adapter", metavar="SOURCE", help="Compute with this LoRA adapter: a folder or ORG/NAME[@REVISION].")
@click.option("--url", help="Ask the server there instead of loading the model.")
@click.option("--uds", metavar="PATH", help="Ask the server at this unix socket.")
@click.option("--job", metavar="NAME", help="Ask the server that `penstock submit` started under this name.")
@click.option("--tunnel", is_flag=True, help="With --job: through a tunnel, also where the node is reached directly.")
@click.option("--api-key-file", metavar="FILE", help="The server's key.  [default: the key that a server here made]")
@click.option("--json", "as_json", is_flag=True, help="Each answer as one JSON line.")
@source_options
@engine_options
def chat(model: str | None, question: str | None, as_json: bool, **options: Any) -> None:
    """Talk to MODEL, or to the server at --url.

    With QUESTION, or a question on stdin, prints one answer and ends. On a terminal without QUESTION it is a
    conversation. With --url, --uds or --job the model's name may be left out.
    """
    servers = [name for name in ("url", "uds", "job") if options[name]]
    if len(servers) > 1:
        raise click.UsageError(f"--{servers[0]} and --{servers[1]} name two servers; give one.")
    if options["chat_template"] and servers:
        raise click.UsageError("--chat-template is for a model here; a server has its own.")
    if options["adapter"] and servers:
        raise click.UsageError("--adapter is for a model here; of a server give the adapter's name as MODEL.")
    partner: Partner
    if servers:
        partner, question = _remote(model, question, options)
    elif model is None:
        raise click.UsageError("Missing argument 'MODEL'. Try: penstock chat demo")
    else:
        question = _first_question(question)
        partner = _local(model, options)
    talk = Talk(partner, options["system"], as_json)
    if partner.plain:
        print(f"{partner.model} has no chat template: it continues your text, each by itself", file=sys.stderr)
    if question is not None:
        talk.ask(question)
        if talk.interrupted:
            raise click.exceptions.Exit(INTERRUPTED)
    else:
        talk.converse()


class Talk:
    """A conversation and how it is shown."""

    def __init__(self, partner: Partner, system: str | None, as_json: bool) -> None:
        self._partner, self._as_json = partner, as_json
        self._messages: list[Message] = []
        self._set_system(system or "")
        self._raw = as_json or not sys.stdout.isatty()
        self.interrupted = False

    def ask(self, question: str) -> None:
        """Send a question and show the answer while it comes; both join the conversation."""
        self._messages.append({"role": "user", "content": question})
        finish, parts = Finish(), []
        try:
            for piece in self._partner.reply(self._messages, finish):
                parts.append(piece)
                if not self._as_json:
                    sys.stdout.write(piece if self._raw else terminal_safe(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            finish.reason = "interrupted"
        except BaseException:
            self._messages.pop()
            raise
        answer = "".join(parts)
        self.interrupted = finish.reason == "interrupted"
        if self._as_json:
            print(json.dumps(self._record(answer, finish), ensure_ascii=False), flush=True)
        elif not answer.endswith("\n"):
            print(flush=True)
        self._messages.append({"role": "assistant", "content": answer})

    def converse(self) -> None:
        """Questions from the terminal until Ctrl-D or /exit."""
        with contextlib.suppress(ImportError):  # some builds of Python lack it; then there is no line editing
            import readline  # noqa: F401 (input() uses it by itself)
        print(HELP, file=sys.stderr)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:  # as a shell does: a new line, not the end
                print(file=sys.stderr)
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                try:
                    self.ask(line)
                except InvalidRequest as error:  # this question's fault: the conversation goes on
                    print(error, file=sys.stderr)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/clear":
            self._messages = [m for m in self._messages if m["role"] == "system"]
        elif name == "/system":
            self._set_system(rest.strip())
        else:
            print(HELP, file=sys.stderr)

    def _set_system(self, text: str) -> None:
        self._messages = [m for m in self._messages if m["role"] != "system"]
        if text:
            self._messages.insert(0, {"role": "system", "content": text})

    def _record(self, answer: str, finish: Finish) -> dict[str, Any]:
        return {
            "model": self._partner.model,
            "text": answer,
            "finish_reason": finish.reason,
            "prompt_tokens": finish.prompt_tokens,
            "generated_tokens": finish.generated_tokens,
        }


def terminal_safe(text: str) -> str:
    """Text without the control characters that could drive a terminal; a model can write any."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _local(model: str, options: dict[str, Any]) -> Partner:
    from penstock.cli.engine import start_engine
    from penstock.text.template_files import read_template_file
    from penstock.text.tokenizer import load_tokenizer

    own = None if options["chat_template"] is None else read_template_file(Path(options["chat_template"]))
    snapshot = find_model(model, options["revision"], options["offline"], options["trust_remote_code"])
    options["adapters"] = adapters_of([options["adapter"]] if options["adapter"] else [], options["offline"])
    tokenizer = load_tokenizer(snapshot.path)
    engine = start_engine(snapshot, options, quiet=not sys.stderr.isatty())
    from penstock.cli.chat_local import LocalChat

    asked = {**_asked(options), "adapter": next(iter(options["adapters"]), None)}
    return LocalChat(engine, tokenizer, snapshot.name, asked, own)


def _remote(model: str | None, question: str | None, options: dict[str, Any]) -> tuple[Partner, str | None]:
    """The server as a partner. A single argument is the model if the server has it, else the question."""
    from penstock.cli.chat_remote import RemoteChat, Server

    if options["job"]:
        from penstock.cli.chat_job import JobServer

        server: Server = JobServer(options["job"], options["api_key_file"], options["tunnel"])
    else:
        server = Server(options["url"], options["uds"], options["api_key_file"])
    names = server.models()
    if model is not None and question is None and model not in names:
        model, question = None, model
    question = _first_question(question)
    return RemoteChat(server, model or (names[0] if names else "default"), _asked(options)), question


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("temperature", "top_p", "seed", "max_new_tokens")}


def _first_question(question: str | None) -> str | None:
    """The question of the command line or of a pipe; None for a conversation on the terminal."""
    if question is None:
        if sys.stdin.isatty():
            return None
        raw = sys.stdin.buffer.read()
        try:
            question = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"The question on stdin is not UTF-8 (byte {error.start + 1}).") from None
    if not question.strip():
        raise UsageError("The question is empty.", "", 'For example: penstock chat demo "What is Slurm?"')
    if any("\ud800" <= c <= "\udfff" for c in question):  # how Python shows bytes that are not UTF-8
        raise UsageError("The question is not UTF-8.", "", "Set a UTF-8 locale, for example LANG=C.UTF-8.")
    return question
