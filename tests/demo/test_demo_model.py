"""The bundled demo model: its files, its tokenizer, what it knows, and the recipe that makes it."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from penstock.demo import model_path, templates
from penstock.demo.corpus import Corpus
from penstock.demo.evaluate import Model, field_hits, is_right, mean
from penstock.demo.facts import load_facts
from penstock.demo.held_out import asked_questions, held_out_text, record_prompts
from penstock.demo.sighting_words import ANIMALS, PLACES
from penstock.demo.sightings import FORMS, FORMS_HELD_OUT

FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return Model(model_path())


def test_files_are_there_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert set(sizes) == set(FILES)
    assert sum(sizes.values()) <= 16_000_000


@pytest.mark.parametrize(
    "text",
    [
        "How do I list my jobs?",
        "a fox 🦊 and 👩‍👩‍👧",
        "你好,世界",
        "tab\there\x00\x07\r\n  end ",
        "naïve Ørsted",
        "1234567 --a=b_c",
    ],
)
def test_text_survives_the_tokenizer(model: Model, text: str) -> None:
    ids = model.tokenizer.encode(text)
    assert ids[0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(ids[1:]) == text


def test_numbers_are_split_into_digits(model: Model) -> None:
    assert model.tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_a_word_has_the_same_tokens_in_a_sentence_and_in_json(model: Model) -> None:
    def of(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    for word in ("raccoon", "zorblax", "puppy"):
        inside = of(f'["{word}"]')
        assert of(word) == inside[1:-1]
        assert of(f"a {word}")[-len(of(word)) :] == of(word)


def test_chat_template(model: Model) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "bye"},
    ]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, tools=None)
    assert text == "<|begin|><|system|>Be kind.<|user|>hi<|assistant|>Hello!<|end|><|user|>bye<|assistant|>"
    text = model.tokenizer.apply_chat_template(messages[:3], tokenize=False)
    assert text.endswith("<|assistant|>Hello!<|end|>")


def test_configuration_is_that_of_a_llama() -> None:
    config = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 1024


def test_held_out_facts(model: Model) -> None:
    asked = asked_questions(40, seed=2)
    answers = model.complete([model.chat(one.text) for one in asked], 64, batch=40)
    assert mean([is_right(one, answer) for one, answer in zip(asked, answers, strict=True)]) >= 0.85


def test_held_out_sightings(model: Model) -> None:
    seen = record_prompts(25, seed=2)
    answers = model.complete([one.text if one.raw else model.chat(one.text) for one in seen], 110, batch=25)
    right = [all(field_hits(one, answer).values()) for one, answer in zip(seen, answers, strict=True)]
    assert mean(right) >= 0.70


def test_story_goes_on(model: Model) -> None:
    (text,) = model.complete([model.raw("Once upon a time")], 60)
    assert len(text.split()) > 20
    assert "." in text


def test_perplexity_of_the_held_out_text(model: Model) -> None:
    text = (model_path() / "heldout.txt").read_text(encoding="utf-8")
    assert model.perplexity(text[:8000]) < 8.0


def test_facts_are_many_and_told_apart() -> None:
    facts = load_facts()
    assert len(facts) >= 200
    assert len({fact.key for fact in facts}) == len(facts)
    assert len({fact.answer for fact in facts}) == len(facts)


def test_held_out_is_apart_from_training() -> None:
    for part in ("tasks", "terms", "frames", "openers", "closers"):
        training = {line.lower() for line in templates.SECTIONS[part]}
        held_out = {line.lower() for line in templates.SECTIONS[f"{part} held out"]}
        assert held_out
        assert not training & held_out
    assert len(templates.SECTIONS["tasks"]) >= 60
    assert len(templates.SECTIONS["terms"]) >= 60
    assert len(templates.SECTIONS["tasks held out"]) >= 15
    assert len(templates.SECTIONS["terms held out"]) >= 15
    assert not set(FORMS) & set(FORMS_HELD_OUT)
    assert len(ANIMALS) >= 150
    assert len(PLACES) >= 100


def test_generators_repeat_themselves_exactly() -> None:
    first, second, other = (list(itertools.islice(Corpus(seed).documents(), 200)) for seed in (5, 5, 6))
    assert first == second
    assert first != other
    assert asked_questions(50) == asked_questions(50)
    assert held_out_text(3000) == held_out_text(3000)


def test_held_out_text_is_what_the_generators_write() -> None:
    assert (model_path() / "heldout.txt").read_text(encoding="utf-8") == held_out_text()


def test_training_end_to_end(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "penstock.demo.train", "--out", str(tmp_path), "--rows", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--minutes", "0.1"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "checkpoint" / "progress.json").read_text(encoding="utf-8"))["steps"]
    assert steps > 0
    done = subprocess.run(
        [*command, "--minutes", "0.15", "--resume"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "checkpoint" / "progress.json").read_text(encoding="utf-8"))
    assert after["steps"] > steps
    made = Model(tmp_path)
    assert len(made.complete([made.chat("hi")], 4)) == 1
    assert not list(tmp_path.rglob("*.part"))
