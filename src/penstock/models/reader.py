"""Typed look-ups in a config.json, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.kernels.rotary import RopeConfig
from penstock.models.config import DecoderConfig

_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a multimodal model's config.json that describes its text decoder."""
    part = raw.get("text_config") or {}
    if not isinstance(part, dict):
        raise ModelError("config.json: `text_config` must be an object")
    shared = {key: raw[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if raw.get(key) is not None}
    return {**shared, **part}


def refuse_quantized(raw: Mapping[str, Any]) -> None:
    """Raise ModelError where a config.json says that the checkpoint's matrices are stored in fewer bits."""
    if raw.get("quantization_config"):
        settings = raw["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ModelError(
            f"the checkpoint is quantized ({method}), which is not supported yet",
            hint="use the unquantized checkpoint of the same model",
        )


class ConfigReader:
    """A config.json, with what an absent key means to the family.

    defaults: values of absent keys; an explicit null stays null. aliases: a family's own names of keys -> the common
    ones.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        renamed = {aliases.get(key, key): value for key, value in raw.items()} if aliases else raw
        self.raw: dict[str, Any] = {**(defaults or {}), **renamed}

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelError(f"config.json: `{key}` must be a positive integer, not {value!r}")
        return value

    def maybe_integer(self, key: str) -> int | None:
        """None for null, and for 0, by which some say the same."""
        return self.integer(key) if self.raw.get(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
            raise ModelError(f"config.json: `{key}` must be a number, not {value!r}")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise ModelError(f"config.json: `{key}` must be above zero, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        return default if value is None else bool(value)

    def text(self, key: str, default: str = "") -> str:
        return str(self.raw.get(key) or default)

    def per_layer(self, key: str) -> list[Any] | None:
        """A list with an entry for each layer, or None where there is no such key."""
        value, layers = self.raw.get(key), self.integer("num_hidden_layers")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            raise ModelError(f"config.json: `{key}` must have an entry for each of the {layers} layers")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise ModelError(f"config.json: `{key}` must be a list of {count} numbers")
        return tuple(ConfigReader({key: item}).positive(key) for item in value)

    def decoder(self, family: str, **given: Any) -> DecoderConfig:
        """A description with the keys that most families share; `given` are fields that differ."""
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        positions = self.integer("max_position_embeddings")
        fields: dict[str, Any] = {
            "family": family,
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", hidden // heads),
            "intermediate_size": 4 * hidden,
            "max_positions": positions,
            "tie_head": self.flag("tie_word_embeddings"),
            "dtype": self.raw.get("dtype") or self.raw.get("torch_dtype"),
        } | given
        if "intermediate_size" in self.raw and "intermediate_size" not in given:
            fields["intermediate_size"] = self.integer("intermediate_size")
        if "rope" not in given:
            fields["rope"] = self.rope(fields["head_dim"])
        if "activation" not in given:
            fields["activation"] = self.text("hidden_act")
        rope = fields["rope"]
        if rope.kind in ("linear", "dynamic", "yarn"):  # these stretch what config.json states
            fields["max_positions"] = max(positions, int(rope.original_max_positions * rope.factor))
        return DecoderConfig(**fields)

    def rope(
        self, head_dim: int, layer_type: str | None = None, theta: float = 10000.0, partial: float | None = None
    ) -> RopeConfig:
        """The rotary settings, in every spelling: rope_parameters, for each type of layer or for all, or rope_scaling
        beside rope_theta.

        theta: the family's default. partial: the share of a head that is rotated where config.json does not say; None
        for families that always rotate all of it.
        """
        block = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if layer_type is not None and isinstance(block, dict) and layer_type in block:
            block = block[layer_type] or {}
        if not isinstance(block, dict):
            raise ModelError("config.json: the rope settings must be an object")
        part = ConfigReader(block)
        kind = str(block.get("rope_type") or block.get("type") or "default")
        if kind not in _ROPE_KINDS:
            raise ModelError(
                f"config.json: rope scaling {kind!r} is not supported",
                f"supported: {', '.join(_ROPE_KINDS)}",
            )
        positions = self.integer("max_position_embeddings")
        stated = self.maybe_integer("original_max_position_embeddings")
        original = stated or part.integer("original_max_position_embeddings", positions)
        if kind == "dynamic":  # its growth counts from the stated context, whatever else the file says
            original = positions
        rotary_dim = None
        if partial is not None:
            share = part.number("partial_rotary_factor", self.number("partial_rotary_factor", partial))
            rotary_dim = None if share == 1 else int(head_dim * share)
            if not 0 <= (rotary_dim or 0) <= head_dim:
                raise ModelError(f"config.json: `partial_rotary_factor` must be from 0 to 1, not {share!r}")
        pairs = -(-(head_dim if rotary_dim is None else rotary_dim) // 2)
        stretched = positions / original if kind in ("yarn", "longrope") else 1.0
        return RopeConfig(
            theta=part.positive("rope_theta", self.positive("rope_theta", theta)),
            rotary_dim=rotary_dim,
            kind=kind,
            factor=part.positive("factor", stretched),
            original_max_positions=original,
            low_freq_factor=part.positive("low_freq_factor", 1.0),
            high_freq_factor=part.positive("high_freq_factor", 4.0),
            beta_fast=part.number("beta_fast", 32.0) or 32.0,
            beta_slow=part.number("beta_slow", 1.0) or 1.0,
            attention_factor=part.maybe_number("attention_factor"),
            mscale=part.number("mscale", 0.0),
            mscale_all_dim=part.number("mscale_all_dim", 0.0),
            truncate=part.flag("truncate", True),
            short_factors=part.numbers("short_factor", pairs) if kind == "longrope" else (),
            long_factors=part.numbers("long_factor", pairs) if kind == "longrope" else (),
        )

    def windows(self, size: int | None, sliding: list[bool] | None = None) -> tuple[int | None, ...]:
        """The sliding window of each layer, from `layer_types` where the config has them, else from `sliding`, or the
        same for all."""
        layers = self.integer("num_hidden_layers")
        kinds = self.per_layer("layer_types")
        if kinds is not None:
            sliding = [kind == "sliding_attention" for kind in kinds]
        return tuple(size if slides else None for slides in sliding or [True] * layers)
