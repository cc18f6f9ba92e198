"""One request on its way through the engine: its tokens, how many are computed, the blocks that hold them."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from penstock.engine.adapters import LoadedAdapter
from penstock.engine.block_pool import BlockPool, block_key, root_key
from penstock.engine.grammar import Cursor
from penstock.engine.images import PromptImages
from penstock.engine.request import EngineRequest
from penstock.engine.states import PromptStates
from penstock.kernels.penalty import Tally
from penstock.kernels.rotary import RopeConfig

_NOTHING: list[int] = []


@dataclass(eq=False)
class Sequence:
    """`ids` are all known tokens, prompt first; the first `computed` of them have keys and values in `blocks`.

    Where an encoder reads the prompt, the first `encoded` are what its keys and values take, up to the end of a block;
    the decoder's own tokens follow.
    """

    request: EngineRequest
    root: bytes  # key of the empty prefix: salt and all
    span: int  # the length that its first tokens were computed for, see Rotary
    ids: list[int]
    prompt_length: int
    given: int  # tokens that were not generated
    encoded: int
    arrival: float
    number: int  # order of arrival, breaks ties
    computed: int = 0
    ahead: int = 0  # tokens behind `ids` that were chosen, or will be by a step under way, and are not known here yet
    blocks: array[int] = field(default_factory=lambda: array("q"))
    keys: list[bytes] = field(default_factory=list)  # of the full blocks of `ids`, grown on demand
    published: int = 0  # blocks already offered to the prefix index
    cached_tokens: int = 0  # taken from the prefix index at first admission
    started: float | None = None  # when it first ran
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    states: PromptStates | None = None  # where its hidden states are wanted
    ends: frozenset[int] = frozenset()  # tokens that end it
    bare: bool = False  # the raw scores decide alone, and nothing is told of them
    cursor: Cursor | None = None  # where it is in its grammar
    tally: Tally | None = None  # how often each token was there, where that matters
    adapter: LoadedAdapter | None = None
    images: PromptImages | None = None
    whole: int = 0  # so many first tokens are computed together, because they see each other in both directions

    @classmethod
    def of(
        cls,
        request: EngineRequest,
        number: int,
        nonce: bytes,
        rope: RopeConfig | None,
        eos_ids: frozenset[int] = frozenset(),
        start: tuple[int, int] | None = None,
        adapter: LoadedAdapter | None = None,
        images: PromptImages | None = None,
        whole: bool = False,
    ) -> Sequence:
        """nonce: random per process, so that block keys cannot be guessed from outside.

        rope: the rotation whose angles depend on a prompt's length beyond some context, if any; such prompts share
        cached blocks only with prompts of the same angles. start: where an encoder reads the prompt, the token that the
        decoder begins with and the size of a block. whole: all of the prompt's tokens see each other. Either way blocks
        are shared only between equal prompts.
        """
        n = len(request.prompt_ids)
        far = rope is not None and rope.span_limit is not None and n > rope.span_limit
        mark = 0 if rope is None or not far else n if rope.kind == "dynamic" else 1
        adapted = b"" if adapter is None else adapter.key
        root = root_key(nonce, request.salt, mark.to_bytes(8, "little"), adapted)
        if whole or start is not None:
            digests = b"" if images is None else b"".join(images.digests)
            root = root_key(root, sha256(array("q", request.prompt_ids).tobytes()).digest(), digests)
        if request.images:
            request = msgspec.structs.replace(request, images=[])  # their pixels are in `images` until they are seen
        if request.deterministic:  # what others computed is not the same to the last bit
            root = root_key(root, number.to_bytes(8, "little"))
        ends = frozenset(request.stop_ids) if request.ignore_eos else eos_ids | frozenset(request.stop_ids)
        ids, encoded = list(request.prompt_ids), 0
        if start is not None:
            token, block_size = start
            encoded = n if request.max_new_tokens == 0 else -(-n // block_size) * block_size
            ids += [token] * (encoded - n + (request.max_new_tokens > 0))  # what fills up the block is never computed
        bare = request.sampling.plain and not request.logprobs and not request.top_n_tokens
        sequence = cls(
            request,
            root,
            n,
            ids,
            n,
            len(ids),
            encoded,
            time.monotonic(),
            number,
            ends=ends,
            bare=bare,
            adapter=adapter,
            images=images,
            whole=n if whole else 0,
        )
        if encoded and request.prompt_logprobs:  # they are of what the decoder is given: nothing precedes that
            sequence.prompt_logprobs, sequence.prompt_top = [None], [[]] if request.prompt_top_n else []
        return sequence

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return self.request.priority, self.number

    @property
    def generated(self) -> int:
        return len(self.ids) - self.given

    @property
    def text_ids(self) -> list[int]:
        """What the decoder knows of the text: everything, or what follows the encoder's part."""
        return self.ids[self.encoded :] if self.encoded else self.ids

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: 1 while decoding."""
        return len(self.ids) + self.ahead - self.computed

    @property
    def reads_prompt(self) -> bool:
        """Whether the hidden states of prompt tokens are still wanted."""
        return self.request.reads_prompt and self.computed < self.prompt_length

    @property
    def withheld(self) -> list[int]:
        """Tokens that must not come next, if anything else can: an end before the least length, and, where the end of
        sequence is ignored, the one that a grammar offers."""
        if self.generated + self.ahead < self.request.min_new_tokens:
            return list(self.ends if self.cursor is None else self.ends | self.cursor.ends)
        return self.cursor.withheld if self.cursor is not None and self.request.ignore_eos else _NOTHING

    def full_keys(self, block_size: int, tokens: int) -> list[bytes]:
        """Keys of the full blocks among the first `tokens` tokens."""
        full = tokens // block_size
        while len(self.keys) < full:
            start, stop = len(self.keys) * block_size, (len(self.keys) + 1) * block_size
            parent = self.keys[-1] if self.keys else self.root
            media = b"" if self.images is None else self.images.mark(start, stop)
            self.keys.append(block_key(parent, self.ids[start:stop], media))
        return self.keys[:full]

    def take_prefix(self, pool: BlockPool) -> None:
        """Start from whatever the pool already holds; at least one token stays to compute."""
        keys = self.full_keys(pool.block_size, len(self.ids) - 1)
        self.blocks = array("q", pool.match(keys))
        if len(self.blocks) * pool.block_size < self.encoded:  # an encoder's part is of no use
            self.drop_blocks(pool)
        self.computed = len(self.blocks) * pool.block_size
        self.published = len(self.blocks)

    def grow(self, pool: BlockPool, tokens: int) -> bool:
        """Hold blocks for the first `tokens` tokens. False, and nothing changed, when the pool has not so many."""
        missing = -(-tokens // pool.block_size) - len(self.blocks)
        if missing <= 0:
            return True
        blocks = pool.allocate(missing)
        if blocks is None:
            return False
        self.blocks.extend(blocks)
        return True

    def may_grow(self, block_size: int) -> bool:
        """Whether it may come to need more blocks than it holds."""
        return len(self.blocks) * block_size < self.prompt_length + self.request.max_new_tokens

    def publish(self, pool: BlockPool) -> None:
        """Offer every newly filled block to the prefix index."""
        if self.encoded and self.request.max_new_tokens == 0:  # an encoder's states were all that was computed
            return
        full = self.computed // pool.block_size
        if full > self.published:
            keys = self.full_keys(pool.block_size, self.computed)
            for i in range(self.published, full):
                pool.publish(self.blocks[i], keys[i])
            self.published = full

    def restart_beyond(self, rope: RopeConfig | None, pool: BlockPool) -> None:
        """Where that is how the model was trained (Phi 3's LongRoPE): once the sequence has outgrown the original
        context, everything is computed anew with the angles of a long one."""
        limit = rope.span_limit if rope is not None and rope.restarts else None
        if limit is not None and self.span <= limit < len(self.ids):
            self.span = len(self.ids)
            self.root, self.keys = root_key(self.root, b"restarted"), []
            self.drop_blocks(pool)

    def drop_blocks(self, pool: BlockPool) -> None:
        """Give every block back; the sequence starts over as a fresh one with a longer prompt."""
        pool.release(self.blocks)
        self.blocks, self.computed, self.published = array("q"), 0, 0
