"""A server's life: take the port, start the engine, open the door, drain, leave."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock import logs
from penstock.devices.counters import EnergyMeter, disk_bytes
from penstock.engine.client import EngineClient
from penstock.engine.messages import Stage
from penstock.engine.output import EngineStats
from penstock.errors import ModelError, UsageError
from penstock.hub.adapters import resolve_adapter
from penstock.hub.snapshot import Snapshot, resolve
from penstock.server import announce, launcher_log, listen
from penstock.server.config import ServeConfig
from penstock.server.exchange import Exchange, Receive, Scope, Send
from penstock.server.guard import App, Guard, is_loopback
from penstock.server.key import Keys, make_key, read_keys
from penstock.server.listen import Listener
from penstock.server.refusal import unhealthy

if TYPE_CHECKING:
    from penstock.server.house import House
    from penstock.server.images import Images
    from penstock.server.openai.batches import Batches
    from penstock.server.tracing import Tracer
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.tokenizer import Tokenizer

INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


Visitor = Callable[[str, Path | None, Path | None], None]  # is given the URL, the unix socket and the key file


def serve(config: ServeConfig, offline: bool | None = None, first_visitor: Visitor | None = None) -> int:
    """Serve until a signal ends it. Returns the exit code; raises PenstockError for what goes wrong.

    first_visitor is called in a thread of its own as soon as the server answers, before the block to paste is shown.
    """
    _set_process_limits()
    logs.configure()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the loop takes over: ends like Ctrl-C
    listener = listen.bind(config)
    try:
        began = time.monotonic()
        if config.launcher:
            launcher_log.begin(config)
        snapshot = resolve(config.model, config.revision, offline=offline, code=config.engine.trust_remote_code)
        announce.stage(Stage("resolve", str(snapshot.path), time.monotonic() - began))
        if config.launcher:
            launcher_log.found(config, snapshot)
        listener.listen()
        if config.name in config.engine.adapters:
            raise UsageError(f"An adapter has the model's name, {config.name!r}.", hint="Give it another: NAME=FOLDER")
        adapters = {
            name: str(resolve_adapter(source, offline=offline)) for name, source in config.engine.adapters.items()
        }
        engine = msgspec.structs.replace(
            config.engine,
            model_path=str(snapshot.path),
            model_name=snapshot.name,
            trust_remote_code=snapshot.trusted,
            adapters=adapters,
        )
        config = msgspec.structs.replace(config, engine=engine)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(Launch(config, snapshot, listener, began, first_visitor).run())
    finally:
        listener.close()


class Door:
    """What stands behind the guard: until the model is loaded it says that the server is not ready."""

    def __init__(self) -> None:
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        else:
            await Exchange(scope, receive, send).refuse(unhealthy())


class Launch:
    """One run of the server."""

    def __init__(
        self, config: ServeConfig, snapshot: Snapshot, listener: Listener, began: float, visitor: Visitor | None
    ) -> None:
        """began: the moment of the command, on the monotonic clock."""
        self._config, self._snapshot, self._listener, self._began = config, snapshot, listener, began
        self._visitor = visitor
        self._stages: list[Stage] = []
        self._energy = EnergyMeter()
        self._engine = EngineClient(config.engine, self._staged)
        self._stop = asyncio.Event()
        self._signals = 0
        self._keys: Keys | None = None
        self._tracer: Tracer | None = None
        self._batches: Batches | None = None

    async def run(self) -> int:
        """Start, serve, drain. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish holds
                loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGUSR1, self._stop.set)  # drain, however often it is said
        if self._config.otlp_endpoint is not None:
            from penstock.server.tracing import make_tracer

            self._tracer = make_tracer(self._config.otlp_endpoint, self._config.otlp_service_name)
        if self._config.auth:
            path = self._config.api_key_file
            self._keys = make_key() if path is None else read_keys(path)
        try:
            return await self._run()
        finally:
            if self._keys is not None:
                self._keys.forget()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    async def _run(self) -> int:
        # The engine process is by far the slowest to start: everything else happens while it loads.
        starting = asyncio.create_task(self._engine.start())
        await asyncio.sleep(0)
        from penstock.server.protocol import HttpServer

        door = Door()
        guard = Guard(door, self._config, self._keys)
        if not is_loopback(self._config.host):
            _learn_full_name(guard)
        server = HttpServer(guard, self._config.header_seconds, self._config.unread_seconds)
        serving = asyncio.create_task(server.run_on(self._listener.socket))
        text = asyncio.create_task(asyncio.to_thread(load_text, self._snapshot.path, self._config))
        stopping = asyncio.create_task(self._stop.wait())
        giving_up = asyncio.create_task(self._engine.gave_up.wait())
        ready = asyncio.gather(starting, text)
        waiting = asyncio.create_task(launcher_log.waiting() if self._config.launcher else asyncio.sleep(0))
        tasks = (starting, serving, text, stopping, giving_up, ready, waiting)
        house: House | None = None
        try:
            await _first(ready, stopping, serving)
            if stopping.done():
                return INTERRUPTED
            _, (tokenizer, template, images) = await ready
            waiting.cancel()
            house = self._open(door, tokenizer, template, images)
            if self._visitor is not None:
                visit = asyncio.to_thread(self._visitor, self._listener.url, self._listener.uds, self._key_file)
                await _first(asyncio.ensure_future(visit), stopping, giving_up)
            self._show_block(template is not None)
            await _first(stopping, giving_up, serving)
            if self._engine.failure is not None:
                raise self._engine.failure
            await self._drain(house)
            return 0
        finally:
            server.leave.set()
            with suppress(asyncio.CancelledError):
                await serving
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._batches is not None:
                await self._batches.stop()
            stats, disk = self._engine.stats, disk_bytes(self._engine.pid)
            await self._engine.stop()
            if house is not None:
                house.close()
                if self._config.report:
                    await asyncio.to_thread(self._report, stats, disk)

    def _open(self, door: Door, tokenizer: Tokenizer, template: ChatTemplate | None, images: Images) -> House:
        """Let requests in, and say so."""
        from penstock.server.app import App
        from penstock.server.house import House

        house = House(self._config, self._engine, tokenizer, template, images, self._snapshot.revision)
        house.tracer = self._tracer
        app = door.app = App(house)
        self._batches = app.batches
        self._batches.resume([b""] if self._keys is None else self._keys.salts)
        config, listener = self._config, self._listener
        announce.stage(Stage("ready", "all of it", time.monotonic() - self._began))
        announce.derived(config, self._engine.limits)
        if config.launcher:
            launcher_log.loaded(config, self._engine.limits, self._began)
        if self._keys is None:
            announce.open_door_warning(config, listener)
        return house

    @property
    def _key_file(self) -> Path | None:
        return None if self._keys is None else self._keys.file

    def _show_block(self, chats: bool) -> None:
        """What to paste, and the line for programs. chats: the model has a chat template."""
        announce.block(self._config, self._listener, self._key_file, chats)
        if self._config.json_ready:
            announce.ready_line(self._config, self._listener, self._key_file)
        if self._config.launcher:
            launcher_log.connected(self._config, self._snapshot.revision)

    async def _drain(self, house: House) -> None:
        """Take nothing new; let those in the house finish, for so long."""
        house.draining = True
        count = house.presence.count
        if count:
            announce.say(f"stopping: {count} requests may finish within {self._config.drain_seconds:g} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_seconds):
                await house.presence.empty()

    def _staged(self, stage: Stage) -> None:
        self._stages.append(stage)
        announce.stage(stage)

    def _report(self, stats: EngineStats, disk: int | None) -> None:
        """Tell what the run did. The machine's limits are measured now that nothing else runs."""
        from penstock.devices.probe import measure
        from penstock.devices.threads import usable_cores
        from penstock.engine.report import RunReport

        seconds, joules = time.monotonic() - self._began, self._energy.joules()
        limits = measure(self._config.engine.threads or usable_cores(), device=self._engine.limits.device)
        flops = limits.flops_of(self._engine.limits.weight_size)
        report = RunReport.of(
            self._config.name, stats, self._stages, seconds, limits, flops, disk, joules, serving=True
        )
        for line in report.text().splitlines():
            announce.say(line)
        if self._config.json_ready:
            print(msgspec.json.encode({"report": report}).decode(), flush=True)

    def _signalled(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._stop.set()
            return
        # A second signal means now: leave nothing behind, wait for nobody.
        if self._engine.pid is not None:
            with suppress(OSError):
                os.kill(self._engine.pid, signal.SIGKILL)
        if self._keys is not None:
            self._keys.forget()
        self._listener.close()
        os._exit(INTERRUPTED)


def load_text(path: Path, config: ServeConfig) -> tuple[Tokenizer, ChatTemplate | None, Images]:
    """The tokenizer and the chat template of a model folder, and what is done with images.

    Raises ModelError, UsageError.
    """
    import penstock.server.app  # noqa: F401 (the routes' imports, while the engine loads)
    from penstock.server.images import open_images
    from penstock.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ModelError(
            f"The model folder {path} has no tokenizer, so a server cannot read prompts.",
            hint="Add tokenizer.json, or run `penstock generate` with prompt_token_ids.",
        )
    template = _load_template(tokenizer, config)
    images = open_images(path, config, tokenizer)
    if images.missing:
        announce.say(f"WARNING: {images.missing}")
    return tokenizer, template, images


def _load_template(tokenizer: Tokenizer, config: ServeConfig) -> ChatTemplate | None:
    from penstock.text.chat_template import ChatTemplate, TemplateFailure
    from penstock.text.template_files import read_template_file

    own = config.chat_template or config.tokenizer_config_path
    sources = read_template_file(Path(own)) if own else tokenizer.chat_templates
    if not sources:
        return None
    try:
        return ChatTemplate(sources, tokenizer.template_tokens)
    except TemplateFailure as failure:
        if own:
            raise UsageError(f"The chat template {own} is broken.", failure.what) from failure
        announce.say(f"WARNING: the model's chat template is broken, so chat is off: {failure.what}")
        return None


def _learn_full_name(guard: Guard) -> None:
    """Ask the name service on a thread that nobody waits for: it may take its time."""

    def ask() -> None:
        guard.names.add(socket.getfqdn().lower())

    threading.Thread(target=ask, daemon=True).start()


async def _first(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: type[asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _set_process_limits() -> None:
    """No core file, which would hold prompts and keys; as many open sockets as the system lets us have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
