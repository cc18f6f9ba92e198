"""guidellm: its benchmark over chat and completions, streaming and not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from checks import KEY, TOKENIZER, URL, command, run

REQUESTS, PROMPT, OUTPUT = 4, 32, 16


def measure(path: str, stream: bool) -> None:
    """A short benchmark; every request must succeed with exactly as many tokens as it asked for."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command(
            "guidellm", "run",
            "--backend", f"kind=openai_http,target={URL},api_key={KEY},request_format={path},stream={stream}",
            "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
            "--profile", "kind=concurrent,streams=2",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
            "--output", f"kind=json,path={report}",
            "--disable-console",
            HF_HOME=f"{folder}/hf", HF_HUB_OFFLINE="1",
        )  # fmt: skip
        (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["scheduler_metrics"]["requests_made"] == {
        "successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS,
    }  # fmt: skip
    for request in found["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT
        assert request["input_metrics"]["text_tokens"] >= PROMPT


def check_chat_stream() -> None:
    measure("/v1/chat/completions", stream=True)


def check_completions_stream() -> None:
    measure("/v1/completions", stream=True)


def check_chat_whole() -> None:
    measure("/v1/chat/completions", stream=False)


run(globals())
