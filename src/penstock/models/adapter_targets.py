"""Which matrices of a family's layers an adapter may change, by the names that the family gives them.

A slot is a product of the decoder. It may be made of several matrices of the checkpoint, stacked and with rows in an
order of our own; then so are the adapters' terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from penstock.models.attention_weights import arranged, arranged_latent, arranged_queries, arranged_values
from penstock.models.config import DecoderConfig, ExpertsConfig, LatentConfig, WeightMap


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Target:
    """The product that a layer has in a slot.

    names: its matrices inside the layer, stacked along the output axis; rows: outputs of each; columns: inputs.
    rows_of_b, columns_of_a: into the decoder's order. expert: (its number, how many there are), of an expert's.
    """

    slot: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    rows_of_b: Callable[[Tensor], Tensor] = _as_it_is
    columns_of_a: Callable[[Tensor], Tensor] = _as_it_is
    expert: tuple[int, int] | None = None


def targets(config: DecoderConfig, names: WeightMap, layer: int) -> Iterator[Target]:
    """Every product of a layer."""
    hidden = config.hidden_size
    if config.latent is None:
        yield _qkv(config, names)
    else:
        yield from _latent(config, config.latent)
    inputs = config.num_heads * config.value_dim
    yield Target("out", (names.out,), (hidden,), inputs, columns_of_a=partial(arranged_values, config))
    if config.experts is not None and config.experts.layers[layer]:
        yield from _experts(config, config.experts, names)
    elif config.gated:
        yield from _gated("", names.gate, names.up, names.gate_up, names.down, config.intermediate_size, hidden)
    else:
        yield Target("up", (names.up,), (config.intermediate_size,), hidden)
        yield Target("down", (names.down,), (hidden,), config.intermediate_size)


def _qkv(c: DecoderConfig, names: WeightMap) -> Target:
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    rows = tuple(n * c.head_dim for n in heads) if len(names.qkv) == 3 else (sum(heads) * c.head_dim,)
    return Target("qkv", names.qkv, rows, c.hidden_size, rows_of_b=partial(arranged, c, names))


def _latent(c: DecoderConfig, latent: LatentConfig) -> Iterator[Target]:
    queries = partial(arranged_queries, c)
    count = c.num_heads * c.head_dim
    if latent.q_rank is None:
        yield Target("q", ("self_attn.q_proj",), (count,), c.hidden_size, rows_of_b=queries)
    else:
        yield Target("q_a", ("self_attn.q_a_proj",), (latent.q_rank,), c.hidden_size)
        yield Target("q_b", ("self_attn.q_b_proj",), (count,), latent.q_rank, rows_of_b=queries)
    keys = latent.kv_rank + latent.rotary_dim
    down = partial(arranged_latent, c, latent)
    yield Target("kv_a", ("self_attn.kv_a_proj_with_mqa",), (keys,), c.hidden_size, rows_of_b=down)
    values = c.num_heads * (c.head_dim - latent.rotary_dim + latent.value_dim)
    yield Target("kv_b", ("self_attn.kv_b_proj",), (values,), latent.kv_rank)


def _gated(
    prefix: str,
    gate: str,
    up: str,
    gate_up: str | None,
    down: str,
    wide: int,
    hidden: int,
    expert: tuple[int, int] | None = None,
) -> Iterator[Target]:
    if gate_up is None:
        yield Target(f"{prefix}gate_up", (gate, up), (wide, wide), hidden, expert=expert)
    else:
        yield Target(f"{prefix}gate_up", (gate_up,), (2 * wide,), hidden)
    yield Target(f"{prefix}down", (down,), (hidden,), wide, expert=expert)


def _experts(c: DecoderConfig, e: ExpertsConfig, names: WeightMap) -> Iterator[Target]:
    hidden = c.hidden_size
    yield Target("router", (names.router,), (e.count,), hidden)
    for i in range(e.count):
        gate, up, down = (name.format(e=i) for name in (names.expert_gate, names.expert_up, names.expert_down))
        yield from _gated(f"experts.{i}.", gate, up, None, down, e.intermediate_size, hidden, (i, e.count))
    if e.shared_size:
        parts = names.shared_gate, names.shared_up, names.shared_gate_up, names.shared_down
        yield from _gated("shared.", *parts, e.shared_size, hidden)
    if e.shared_gate:
        yield Target("shared_gate", (names.shared_expert_gate,), (1,), hidden)
