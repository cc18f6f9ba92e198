"""llm, the command line program: an endpoint given by address, and a model that is set up once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from checks import ANSWER, KEY, MODEL, QUESTION, RECORD, SCHEMA, SIGHTING, URL, command, run

HOME = tempfile.TemporaryDirectory()
Path(HOME.name, "extra-openai-models.yaml").write_text(
    f"""
- model_id: penstock
  model_name: {MODEL}
  api_base: {URL}/v1
  api_key_name: penstock
  supports_schema: true
  supports_tools: true
"""
)
Path(HOME.name, "keys.json").write_text(json.dumps({"penstock": KEY}))


def llm(*arguments: str) -> str:
    return command("llm", *arguments, LLM_USER_PATH=HOME.name).strip()


def endpoint(*arguments: str) -> str:
    return llm("openai", "endpoint", f"{URL}/v1", "--key", "penstock", *arguments)


def check_models() -> None:
    assert MODEL in endpoint("--models").split()


def check_prompt() -> None:
    assert llm("-m", "penstock", "-o", "temperature", "0", QUESTION) == ANSWER
    assert llm("-m", "penstock", "-o", "temperature", "0", "--no-stream", QUESTION) == ANSWER
    usage = json.loads(llm("logs", "-n", "1", "--json"))[0]
    assert usage["output_tokens"] > 5


def check_endpoint() -> None:
    assert endpoint("-m", MODEL, "-o", "temperature", "0", QUESTION) == ANSWER
    assert endpoint("-m", MODEL, "-o", "temperature", "0", "--no-stream", QUESTION) == ANSWER


def check_endpoint_responses() -> None:
    assert endpoint("-m", MODEL, "-o", "temperature", "0", "--responses", QUESTION) == ANSWER
    assert endpoint("-m", MODEL, "-o", "temperature", "0", "--responses", "--no-stream", QUESTION) == ANSWER


def check_schema() -> None:
    schema = json.dumps(SCHEMA)
    assert json.loads(llm("-m", "penstock", "-o", "temperature", "0", "--schema", schema, SIGHTING)) == RECORD


def check_tools() -> None:
    # the demo model calls no tools and, with their description before it, does not know when to stop
    answer = llm("-m", "penstock", "-o", "temperature", "0", "-o", "max_tokens", "40", "-T", "llm_version", QUESTION)
    assert answer.startswith(ANSWER)


run(globals())
