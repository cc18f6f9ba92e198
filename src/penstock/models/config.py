"""What a decoder is: its arithmetic as data, and where a checkpoint keeps its tensors. A family makes both."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, replace

from penstock.kernels.rotary import RopeConfig, arrangement


@dataclass(frozen=True)
class NormConfig:
    """kind: rms or layer. weight, bias: whether there is one. offset: added to the weight (Gemma's are around zero)."""

    kind: str = "rms"
    eps: float = 1e-6
    weight: bool = True
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class HeadNormConfig:
    """A norm on q and k before they are rotated.

    over: what is normalised together: `head`, one weight for all of them; `each`, a weight for each head; `all`, the
    heads of a token as one vector. rotated_only: layers without rotation do without it.
    """

    norm: NormConfig
    over: str = "head"
    rotated_only: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's MLP.

    layers: which layers have it. top_k: experts that a token goes to. scoring: softmax or sigmoid over the router's
    scores. normalized: the weights of the chosen add up to one. scale: on those weights. weighs_input: the weight
    multiplies what goes into an expert instead of what comes out. groups, top_groups: experts are chosen from the best
    groups only. shared_size: width of an expert that every token goes to, 0 for none; shared_gate: it has a gate.
    """

    layers: tuple[bool, ...]
    count: int
    top_k: int
    intermediate_size: int
    scoring: str = "softmax"
    normalized: bool = False
    scale: float = 1.0
    weighs_input: bool = False
    groups: int = 1
    top_groups: int = 1
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2 2024): keys and values come from a short vector for all heads.

    kv_rank, q_rank: of those vectors, None where q is made directly. rotary_dim: the part of a key that is rotated and
    the same for all heads. value_dim: of a head's values.
    """

    kv_rank: int
    q_rank: int | None
    rotary_dim: int
    value_dim: int
    norm: NormConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides a decoder's arithmetic.

    max_positions: the longest context the position embedding serves. rope: the rotation of every layer, where
    `layer_ropes` does not give each its own. windows, chunks: for each layer how many tokens back it sees, or within
    which stretch, None for all; empty for none anywhere. tie_head: the output matrix is the embedding. parallel:
    attention and MLP see the same input. residual_normed: what is added to is the norm's output. temperature: (floor,
    scale) of the factor on the queries of layers without rotation (Llama 4). alibi: None, `exact` or `half` (see
    `alibi_table`). attention_scale: on scores, None for 1 / sqrt(head_dim). Multipliers of 1 and caps of None change
    nothing.
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
    activation: str
    rope: RopeConfig
    norm: NormConfig = NormConfig()
    dtype: str | None = None
    eos_ids: tuple[int, ...] = ()
    # the way in and out
    embedding_size: int | None = None  # of the table, where a projection follows it
    embedding_multiplier: float = 1.0
    positions_offset: int | None = None  # position p is row p + offset of a learned table; None: there is none
    tie_head: bool = False
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    # a layer
    parallel: bool = False
    residual_normed: bool = False
    residual_multiplier: float = 1.0
    # attention
    layer_ropes: tuple[RopeConfig, ...] = ()
    windows: tuple[int | None, ...] = ()
    chunks: tuple[int | None, ...] = ()
    alibi: str | None = None
    attention_scale: float | None = None
    scale_by_depth: bool = False  # the scale of layer i is divided by i + 1
    attention_softcap: float | None = None
    temperature: tuple[float, float] | None = None
    qkv_clip: float | None = None
    qk_norm: HeadNormConfig | None = None
    latent: LatentConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    # MLP
    gated: bool = True
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None

    def scale(self, layer: int) -> float:
        """Factor on attention scores."""
        scale = 1.0 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_depth else scale

    @property
    def value_dim(self) -> int:
        """Numbers in the value of a head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def head_width(self) -> int:
        """What a head takes in the cache: its keys or its values, the wider of them, and one more where that is odd."""
        widest = max(self.head_dim, self.value_dim)
        return widest + widest % 2

    @property
    def head_order(self) -> list[int] | None:
        """How the dimensions of a head of q and k are laid out, see `arrangement`."""
        turned = next((rope for rope in (self.rope, *self.layer_ropes) if rope.kind != "none"), None)
        if turned is None:
            return arrangement(self.head_dim, 0, False, self.head_width)
        return arrangement(self.head_dim, turned.rotary_dim, turned.neighbours, self.head_width)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotation of each layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers

    @property
    def span_rope(self) -> RopeConfig | None:
        """The rotation whose angles depend on more than the position (see RopeConfig.span_limit), if any."""
        return next((rope for rope in self.ropes if rope.span_limit is not None), None)

    @property
    def kv_elements(self) -> int:
        """Numbers that one token takes in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width

    @property
    def kv_vectors(self) -> int:
        """How many vectors they are, one for each kv head."""
        return 2 * self.num_layers * self.num_kv_heads

    @property
    def mlp_width(self) -> int:
        """The widest vector between the two halves of an MLP."""
        experts = self.experts
        return max(
            self.intermediate_size, 0 if experts is None else max(experts.intermediate_size, experts.shared_size)
        )


@dataclass(frozen=True)
class VisionConfig:
    """How a model takes images.

    image_token: the id that stands in a prompt for each row of an image. merge: the side of the square of patches that
    becomes one row, where rotary positions follow the image's height and width (M-RoPE); None where they count on.
    whole: the tokens of a prompt with images see each other in both directions; whole_text: and so do those of one
    without.
    """

    image_token: int
    merge: int | None = None
    whole: bool = False
    whole_text: bool = False


@dataclass(frozen=True)
class WeightMap:
    """Where a family's checkpoint keeps each canonical tensor; `{i}` is the layer, `{e}` an expert.

    Matrices and norms are named without `.weight` and `.bias`. A canonical matrix may be made of several, stacked along
    the output axis in the order given. A norm that is None is not there. base: what stands before every name but the
    head's, and is absent where only the base model was saved.

    qkv_grouped: the rows of one qkv matrix go by kv head: its queries, its key, its value. transposed: matrices are
    stored [in, out]. gate_up: one matrix, gate first, in place of `gate` and `up`.
    """

    base: str = "model."
    embedding: str = "embed_tokens"
    embedding_norm: str | None = None
    project_in: str | None = None
    positions: str | None = None
    final_norm: str | None = "norm"
    project_out: str | None = None
    head: str = "lm_head"
    layer: str = "layers.{i}."
    attention_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None  # on what is added
    attention_sum_norm: str | None = None  # on the sum
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    mlp_sum_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_grouped: bool = False
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = None
    down: str = "mlp.down_proj"
    transposed: bool = False
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.{e}.gate_proj"
    expert_up: str = "mlp.experts.{e}.up_proj"
    expert_down: str = "mlp.experts.{e}.down_proj"
    experts_gate_up: str | None = None  # all experts in one tensor, full name: [experts, 2 * width, hidden]
    experts_down: str | None = None  # [experts, hidden, width]
    experts_transposed: bool = False  # the last two axes of these the other way round
    shared_gate: str = "mlp.shared_expert.gate_proj"
    shared_up: str = "mlp.shared_expert.up_proj"
    shared_gate_up: str | None = None
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_expert_gate: str = "mlp.shared_expert_gate"

    @property
    def embedding_tensor(self) -> str:
        """The full name of the table of the vocabulary."""
        return f"{self.base}{self.embedding}.weight"

    @property
    def head_tensor(self) -> str:
        """The full name of the output matrix."""
        return f"{self.head}.weight"

    def found_in(self, names: Container[str]) -> WeightMap:
        """These names as a checkpoint with `names` spells them: without the base where only the base model was saved,
        under another where the decoder is part of a larger model, with the head's common name where it has that."""
        bare = self.base.removeprefix("model.")
        bases = (self.base, bare, "", "model.language_model.", f"language_model.{self.base}", "model.text_model.")
        base = next((base for base in bases if f"{base}{self.embedding}.weight" in names), self.base)
        heads = (self.head, "lm_head", "language_model.lm_head")
        return replace(self, base=base, head=next((head for head in heads if f"{head}.weight" in names), self.head))
