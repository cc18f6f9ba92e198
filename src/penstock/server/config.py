"""What the server is told at its start."""

from __future__ import annotations

import msgspec

from penstock.engine.config import EngineConfig


class ServeConfig(msgspec.Struct, frozen=True):
    """Options of one server. Sizes are bytes, times seconds; the engine's own options are in `engine`.

    model: what the user named (resolved to `engine.model_path` at start). port 0: a free one. uds: a unix
    socket's path, which then replaces host and port. api_key_file: the file that holds the key; None makes a
    key.
    """

    model: str
    engine: EngineConfig
    revision: str | None = None
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 3000
    fallback_ports: tuple[int, int] | None = None  # first and last to try where that one is taken; 0, 0: any
    uds: str | None = None
    api_key_file: str | None = None
    auth: bool = True
    allow_hosts: tuple[str, ...] = ()
    cors_allow_origin: tuple[str, ...] = ()
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000
    max_images: int = 8  # of a request
    max_image_bytes: int = 2**24  # of one, as a file
    max_image_pixels: int = 2**25  # of one
    allow_image_hosts: tuple[str, ...] = ()  # from which images may be fetched
    validation_workers: int = 2
    enable_prefill_logprobs: bool = False
    strict: bool = False  # refuse fields that nobody knows, instead of naming them in a header
    disable_grammar_support: bool = False
    drain_seconds: float = 25.0
    keep_alive_seconds: float = 15.0  # a silent stream gets a comment that often
    header_seconds: float = 10.0  # until the head of a request is whole
    body_seconds: float = 30.0  # longest silence while a body arrives
    unread_seconds: float = 60.0  # that a client may leave its stream unread once the buffers are full
    batch_dir: str | None = None  # where uploaded files and batches are kept; None turns them off
    batch_quota: int = 2**30  # bytes that one key may keep there
    otlp_endpoint: str | None = None  # where traces go, over HTTP
    otlp_service_name: str = "text-generation-inference.router"
    chat_template: str | None = None  # a file whose chat template replaces the model's
    tokenizer_config_path: str | None = None  # a tokenizer_config.json whose chat template replaces the model's
    launcher: bool = False  # print what TGI's launcher prints
    json_ready: bool = False  # one JSON line on stdout when ready
    report: bool = False  # tell at the end what the run did and what held it back

    @property
    def name(self) -> str:
        """The name that clients see."""
        return self.served_model_name or self.engine.model_name or self.model
