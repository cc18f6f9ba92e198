"""/tokenize, /detokenize and /tokenizer_info as clients that use the server's tokenizer expect them (vLLM's shapes)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from penstock.server.body import parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.models import check_model
from penstock.server.openai.turn import read_prompt
from penstock.server.openai.wire import ChatRequest
from penstock.server.refusal import invalid

Route = Callable[[Exchange, bytes], Awaitable[None]]

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class TokenizeText(msgspec.Struct, kw_only=True):
    """Body of /tokenize for a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(ChatRequest, kw_only=True):
    """Body of /tokenize for a conversation."""

    return_token_strs: bool | None = None


class Tokens(msgspec.Struct, kw_only=True):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenize(msgspec.Struct, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """What /tokenizer_info tells; the names are those of tokenizer_config.json."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    chat_template: str | None


class TokenRoutes:
    """The routes. native: TGI's /tokenize, which keeps every body that is not in vLLM's shape."""

    def __init__(self, house: House, native: Route) -> None:
        self._house, self._native = house, native

    async def tokenize(self, exchange: Exchange, raw: bytes) -> None:
        """POST /tokenize: `inputs` (TGI), `prompt` or `messages`."""
        given = _names(raw)
        if "inputs" in given or not given & {"prompt", "messages"}:
            await self._native(exchange, raw)
            return
        house = self._house
        body: TokenizeText | TokenizeChat
        if "messages" in given:
            body = parse(raw, TokenizeChat)
            check_model(body.model, house)
            ids = (await read_prompt(house, body)).ids
        else:
            body = parse(raw, TokenizeText)
            check_model(body.model, house)
            ids = await house.encode(body.prompt, body.add_special_tokens)
        spelt = [house.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
        length = house.limits.max_total_tokens
        await exchange.answer_json(Tokens(count=len(ids), max_model_len=length, tokens=ids, token_strs=spelt))

    async def detokenize(self, exchange: Exchange, raw: bytes) -> None:
        """POST /detokenize: the text of ids, special tokens shown."""
        body = parse(raw, Detokenize)
        check_model(body.model, self._house)
        size = self._house.limits.vocab_size
        if not all(0 <= i < size for i in body.tokens):
            raise invalid(f"`tokens` has a token id outside the vocabulary of {size}", "tokens")
        text = self._house.tokenizer.decode(body.tokens, skip_special_tokens=False)
        await exchange.answer_json({"prompt": text})

    async def info(self, exchange: Exchange) -> None:
        """GET /tokenizer_info."""
        tokenizer, limits = self._house.tokenizer, self._house.limits
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        await exchange.answer_json(
            TokenizerInfo(
                model_max_length=limits.max_total_tokens,
                vocab_size=len(tokenizer),
                bos_token=tokenizer.bos_token,
                bos_token_id=tokenizer.bos_id,
                eos_token=tokenizer.eos_token,
                eos_token_id=tokenizer.eos_id,
                chat_template=template,
            )
        )


def _names(raw: bytes) -> set[str]:
    """The fields of a body; none where it is no object."""
    try:
        return set(_FIELDS.decode(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return set()
