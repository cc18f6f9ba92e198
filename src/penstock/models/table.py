"""The table of families in the documents, made from the families themselves.

`python -m penstock.models.table > docs/reference/families.md`
"""

from __future__ import annotations

from penstock.formats import FORMATS
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.encoder_decoder.config import KINDS, from_configs
from penstock.models.families import FAMILIES

_HEAD = """# Families of models

Made by `python -m penstock.models.table` from `src/penstock/models/families/`; a test holds it to that.

Every model of the first table runs on one decoder, in float32, bfloat16 and float16, with its matrices as they are
or in {formats} (`--quantize`), and with [LoRA adapters](../how-to/adapters.md) on any matrix of a layer. Greedy float32
output is token-exact against `transformers`, whatever the batch, the chunks of a prompt, the prefix cache and the
preemptions. What a row says is the family's usual configuration; what config.json sets otherwise (biases, windows,
norms, rope scaling, tied heads, head sizes) is followed. Models "with images" take them in prompts
([how](../how-to/images.md)); their vision towers are those of `transformers`. Any other causal language model runs
through `transformers` ([how](../how-to/any-model.md)).

| model_type | models | positions | norms | residual | attention | MLP |
|---|---|---|---|---|---|---|
"""

_PAIRS = """
## Encoder-decoders

An encoder reads the prompt, once and whole; a decoder writes the answer. Requests are batched as those of decoders are,
in the same formats and as exactly ([how](../how-to/encoder-decoder.md)).

| model_type | models | positions | norms | head | MLP |
|---|---|---|---|---|---|
"""


def families_table() -> str:
    """The page as Markdown."""
    *names, last = (name for name in FORMATS if name != "none")
    quantized = f"{', '.join(names)} or {last}"
    rows = [_row(name) for name in sorted(FAMILIES)]
    pairs = [_pair(name) for name in sorted(KINDS)]
    return _HEAD.format(formats=quantized) + "\n".join(rows) + "\n" + _PAIRS + "\n".join(pairs) + "\n"


def _row(model_type: str) -> str:
    family = FAMILIES[model_type]
    config, names = family.read({"model_type": model_type})
    cells = (
        f"`{model_type}`",
        family.models + ("; with images" if family.sees else ""),
        _positions(config),
        _norms(config, names),
        "parallel" if config.parallel else "sequential",
        _attention(config),
        _mlp(config),
    )
    return f"| {' | '.join(cells)} |"


def _pair(model_type: str) -> str:
    kind = KINDS[model_type]
    config = from_configs({"model_type": model_type}, {})
    head = "scaled" if kind.scaled_head else "not scaled" if kind.scaled_head is False else "scaled where it is tied"
    cells = (
        f"`{model_type}`",
        kind.models,
        f"by distance, in {'each layer' if config.bias_in_each_layer else 'all layers alike'}",
        "RMS, before",
        head,
        f"{'gated' if config.gated else 'plain'} {config.activation}",
    )
    return f"| {' | '.join(cells)} |"


def _positions(config: DecoderConfig) -> str:
    if config.alibi is not None:
        return "ALiBi"
    if config.positions_offset is not None:
        return "learned"
    turned = [rope for rope in config.ropes if rope.kind != "none"]
    words = ["rotary"]
    if any(rope.rotary_dim is not None for rope in turned):
        words.append("on part of a head")
    if len(turned) < config.num_layers:
        words.append("in some layers")
    return " ".join(words)


def _norms(config: DecoderConfig, names: WeightMap) -> str:
    kind = "RMS" if config.norm.kind == "rms" else "layer" if config.norm.weight else "layer, no weights"
    before = names.attention_norm is not None
    behind = names.attention_out_norm is not None
    place = "before and behind" if before and behind else "behind" if behind else "before"
    return f"{kind}, {place}" + ("; q and k" if config.qk_norm is not None else "")


def _attention(config: DecoderConfig) -> str:
    if config.latent is not None:
        kinds = ["latent, written out"]
    elif config.num_kv_heads == config.num_heads:
        kinds = ["multi-head"]
    else:
        kinds = ["multi-query" if config.num_kv_heads == 1 else "grouped"]
    if any(config.windows):
        kinds.append("windows")
    if config.attention_softcap is not None:
        kinds.append("softcap")
    if any(config.chunks):
        kinds.append("chunks")
    return ", ".join(kinds)


def _mlp(config: DecoderConfig) -> str:
    dense = f"{'gated' if config.gated else 'plain'} {config.activation}"
    experts = config.experts
    if experts is None:
        return dense
    shared = " and a shared one" if experts.shared_size else ""
    return f"{dense}; {experts.top_k} of {experts.count} experts{shared}"


if __name__ == "__main__":
    print(families_table(), end="")
