"""What transformers makes of a model folder, and what the engine needs to know of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from penstock.errors import ModelError
from penstock.hub.jail import leave_network
from penstock.hub.remote_code import check_trusted, foreign_code, own_code

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
            "context_length")  # fmt: skip
_UNBOUND = 8192  # tokens of a text where the configuration names no longest one, as of recurrent models
_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "d_inner")


@dataclass(frozen=True)
class TransformersConfig:
    """A model as the engine sees it; the arithmetic is transformers' own.

    family: the class of the model. max_positions: a large number where the configuration names no bound. kv_elements:
    numbers that one token takes in the cache, over all layers; kv_vectors: how many vectors they are.
    hidden_states: the model gives them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    kv_elements: int = 0
    kv_vectors: int = 0
    hidden_states: bool = True
    eos_ids: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    gated: bool = True
    experts: None = None

    @property
    def head_width(self) -> int:
        return self.head_dim

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size


@dataclass(frozen=True)
class Found:
    """A folder that transformers can make a causal language model of.

    settings: its configuration object. name: the class of the model. own_code: it is made by Python code in the folder;
    offline: and that code cannot reach the network.
    """

    folder: Path
    settings: Any
    name: str
    own_code: bool
    offline: bool

    @property
    def text(self) -> Any:
        """The part of the configuration that is about the decoder of text."""
        return self.settings.get_text_config(decoder=True)

    @property
    def dtype(self) -> str | None:
        """The type of the checkpoint as config.json has it."""
        stated = getattr(self.settings, "dtype", None) or getattr(self.text, "dtype", None)
        return None if stated is None else str(stated).removeprefix("torch.")

    @property
    def shape(self) -> TransformersConfig:
        """The sizes that the configuration gives, under the names that most have; common ones where it does not say."""
        width = self._number("hidden_size", "n_embd", "d_model", default=1024)
        heads = self._number("num_attention_heads", "n_head", "n_heads", default=1)
        layers = self._number("num_hidden_layers", "n_layer", "num_layers", "n_layers", default=1)
        kv_heads = self._number("num_key_value_heads", default=heads)
        head_dim = self._number("head_dim", default=max(1, width // heads))
        return TransformersConfig(
            family=self.name,
            vocab_size=self._number("vocab_size", default=1),
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self._number(*_WIDTHS, default=4 * width),
            max_positions=self._number(*_LENGTHS, default=_UNBOUND),
            kv_elements=2 * layers * kv_heads * head_dim,
            kv_vectors=2 * layers * kv_heads,
        )

    def _number(self, *names: str, default: int) -> int:
        found = (getattr(self.text, name, None) for name in names)
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), default)


def find(folder: Path, raw: Mapping[str, Any], trusted: bool) -> Found:
    """Have transformers read a model folder. raw: its config.json. trusted: its own Python code may run.

    Raises ModelError for what transformers does not know as a causal language model, and for code that is not trusted.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind = raw.get("model_type")
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    place = foreign_code(raw)
    if place is not None or (folder / "adapter_config.json").exists():
        raise ModelError(
            f"The model in {folder} has transformers load something from elsewhere.",
            f"Its config.json has `{place}` with the name of a repository."
            if place is not None
            else "It holds an adapter_config.json, which names another model.",
            "Remove that, and run the command again.",
        )
    offline = False
    needs_code = kind not in CONFIG_MAPPING_NAMES and own_code(raw) is not None
    if needs_code:
        check_trusted(folder, raw, trusted)
        offline = leave_network()  # before any of it runs
    elif kind not in names or not _is_causal(raw, names):
        asked = ", ".join(map(str, raw.get("architectures") or [kind]))
        raise ModelError(
            f"unsupported architecture: {asked} (model_type {kind!r})",
            "Penstock does not describe it, and transformers knows no such causal language model.",
            "`penstock models` lists what runs; a newer version of transformers may know more.",
        )
    try:
        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=needs_code, local_files_only=True)
        settings._attn_implementation = (
            None  # what was there where it was saved (flash_attention_2, say) need not be here
        )
    except Exception as error:  # config.json is anybody's, and so may the code be
        raise ModelError(f"transformers cannot read {folder / 'config.json'}", words_of(error)) from error
    name = str((raw.get("architectures") or [names.get(str(kind), kind)])[0])
    return Found(folder, settings, name, needs_code, offline)


@torch.inference_mode()
def measured(found: Found, model: Any) -> TransformersConfig:
    """The sizes of a loaded model, as running it shows them. Raises ModelError where it does not run."""
    shape = found.shape
    try:
        out = model(
            torch.zeros(1, 2, dtype=torch.int64), **accepted(model, return_dict=True, output_hidden_states=True)
        )
    except Exception as error:  # somebody else's code
        raise ModelError(f"transformers cannot run {found.name}", words_of(error)) from error
    states: tuple[torch.Tensor, ...] = getattr(out, "hidden_states", None) or ()
    told = len(states) == shape.num_layers + 1 and all(x.shape == states[0].shape for x in states)
    return replace(
        shape,
        vocab_size=int(out.logits.shape[-1]),
        hidden_size=int(states[0].shape[-1]) if told else shape.hidden_size,
        hidden_states=told,
    )


def accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those of the options that the model's forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {name: option for name, option in options.items() if takes_all or name in parameters}


def _is_causal(raw: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether the classes that config.json names, if any, include one that generates text from left to right."""
    known = {name for entry in names.values() for name in ([entry] if isinstance(entry, str) else entry)}
    asked = raw.get("architectures")
    return not asked or any(name in known for name in asked)


def words_of(error: Exception) -> str:
    """An exception of somebody else's code, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
