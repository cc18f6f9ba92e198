"""aiperf: its benchmark over the endpoints it knows by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from checks import KEY, MODEL, TOKENIZER, URL, command, run

REQUESTS, PROMPT, OUTPUT = 4, 32, 16


def measure(endpoint: str, *flags: str, counted: bool = True) -> None:
    """A short benchmark; every request must succeed, and with as many tokens as it asked for where they are counted."""
    with tempfile.TemporaryDirectory() as folder:
        command(
            "aiperf", "profile", "-m", MODEL, "--url", URL, "--api-key", KEY, "--endpoint-type", endpoint,
            "--tokenizer", TOKENIZER, "--request-count", str(REQUESTS), "--concurrency", "2",
            "--isl", str(PROMPT), "--osl", str(OUTPUT), "--ui", "none", "--no-gpu-telemetry",
            "--artifact-dir", folder, *flags,
            HF_HOME=f"{folder}/hf",
        )  # fmt: skip
        found = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == REQUESTS, found
    assert not found.get("error_request_count"), found
    if counted:
        assert found["output_sequence_length"]["min"] == found["output_sequence_length"]["max"] == OUTPUT, found


OURS = ("--use-server-token-count", "--extra-inputs", "ignore_eos:true")


def check_chat_stream() -> None:
    measure("chat", "--streaming", *OURS)


def check_chat_whole() -> None:
    measure("chat", *OURS)


def check_completions_stream() -> None:
    measure("completions", "--streaming", *OURS)


def check_completions_whole() -> None:
    measure("completions", *OURS)


def check_huggingface_generate() -> None:
    measure("huggingface-generate", "--streaming", counted=False)
    measure("huggingface-generate", counted=False)


def check_embeddings() -> None:
    measure("embeddings", counted=False)


def check_responses() -> None:
    measure("responses", "--streaming", counted=False)


run(globals())
