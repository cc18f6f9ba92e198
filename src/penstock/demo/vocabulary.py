"""The tokenizer: byte-level BPE, learned from the corpus."""

import collections
import itertools
import json
import pathlib
import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from penstock.demo import sighting_words
from penstock.demo.corpus import ASSISTANT, BEGIN, END, PAD, SYSTEM, USER, Corpus

SPECIAL = [BEGIN, END, PAD, USER, ASSISTANT, SYSTEM]

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def learn_tokenizer(seed: int, size: int, sample: int = 12000) -> Tokenizer:
    """Learn a vocabulary of this size from the first documents of the corpus."""
    documents = itertools.islice(Corpus(seed).documents(), sample)
    texts = [text for document in documents for text, _ in document]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word_pattern(texts)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    markers = re.compile(r"<\|[a-z]+\|>")
    tokenizer.train_from_iterator((markers.sub("\n", text) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, SPECIAL.index(BEGIN))],
    )
    return tokenizer


def word_pattern(texts: list[str], count: int = 400) -> str:
    """How text is cut before BPE.

    A rare word is cut from the space before it, so that it has the same tokens in a sentence and between the quotes
    of a JSON string: copying a word is then copying tokens. Common words that never begin a copy keep their space.
    """
    values = sighting_words.ANIMALS + sighting_words.PLACES + sighting_words.ACTIVITIES + sighting_words.DOINGS
    copied = {re.split(r"[ /]", value)[0] for value in values}
    counts = collections.Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    common = [
        word for word, _ in counts.most_common(count * 2) if word not in copied and (word.islower() or word == "I")
    ]
    return rf" {alternatives(common[:count])}(?!\p{{L}})|\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\n+|\s"


def alternatives(words: Iterable[str]) -> str:
    """A pattern for these words as a whole. They branch letter by letter: of words side by side each would be tried."""
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[:1], []).append(word[1:])
    branches = [re.escape(head) + alternatives(tails[head]) if head else "" for head in sorted(tails, reverse=True)]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
