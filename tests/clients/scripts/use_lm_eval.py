"""lm-eval with `local-completions`: log-likelihoods by echo, and generation; both with either tokenizer."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from checks import KEY, MODEL, TOKENIZER, URL, command, run

TASKS = Path(__file__).parent.parent / "tasks"
os.chdir(TASKS)  # where its task files look for their data


def results(model: str, endpoint: str, tasks: str, *flags: str, **arguments: object) -> dict[str, dict[str, float]]:
    """Scores by task. The key goes in a file, as it should: a command line is visible to everybody."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "eval.yaml"
        given = {"model": MODEL, "base_url": f"{URL}{endpoint}", "auth_token": KEY, "num_concurrent": 2, **arguments}
        config.write_text(json.dumps({"model": model, "model_args": given}))  # JSON is YAML
        command(
            "lm-eval", "run", "--config", str(config), "--tasks", tasks, "--include_path", str(TASKS),
            "--output_path", folder, *flags,
            OPENAI_API_KEY=KEY, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=f"{folder}/hf",
        )  # fmt: skip
        (found,) = Path(folder).rglob("results_*.json")
        return json.loads(found.read_text())["results"]


def check_with_the_servers_tokenizer() -> None:
    found = results("local-completions", "/v1/completions", "penstock_choose,penstock_answer", "--batch_size", "3")
    assert found["penstock_choose"]["acc,none"] == 1.0, found
    # lm-eval puts no BOS before prompts of this tokenizer, which costs the demo model one answer
    assert found["penstock_answer"]["exact_match,none"] == 0.75, found


def check_with_its_own_tokenizer() -> None:
    found = results(
        "local-completions", "/v1/completions", "penstock_choose,penstock_answer",
        tokenizer_backend="huggingface", add_bos_token=True, tokenizer=TOKENIZER,
    )  # fmt: skip
    assert found["penstock_choose"]["acc,none"] == 1.0, found
    assert found["penstock_answer"]["exact_match,none"] == 1.0, found


def check_chat() -> None:
    found = results("local-chat-completions", "/v1/chat/completions", "penstock_answer", "--apply_chat_template")
    assert found["penstock_answer"]["exact_match,none"] == 1.0, found


run(globals())
