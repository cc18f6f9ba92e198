"""Models from Python: `penstock.LLM`.

The engine runs in a child process: closing a model gives all of its memory back, a crash of native code does not take
the notebook along, and its threads are set whatever the notebook has imported. What that costs is measured in
benchmarks/python_api.py.
"""

from __future__ import annotations

import math
import os
import sys
import weakref
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack, overload

import msgspec

from penstock.batch.interrupt import Interrupt
from penstock.batch.local import AHEAD, generate_rows
from penstock.batch.parameters import Parameters
from penstock.batch.progress import bar
from penstock.batch.prompts import Prompter
from penstock.batch.results import Result
from penstock.batch.rows import Row
from penstock.engine.config import EngineConfig
from penstock.engine.remote import EngineChild, EngineEnded
from penstock.engine.request import Embed, EngineRequest
from penstock.errors import InvalidRequest, PenstockError, UsageError
from penstock.hub.adapters import resolve_adapter
from penstock.hub.snapshot import resolve
from penstock.text.grammar import GrammarSpec
from penstock.text.tokenizer import Tokenizer, load_tokenizer

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt = str | Sequence[int] | Mapping[str, Any]  # a text, token ids, or a row as in a JSONL file


class Asked(TypedDict, total=False):
    """How to generate; see `Parameters`, whose fields these are."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    typical_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    do_sample: bool | None
    watermark: bool | None
    seed: int | None
    stop: str | list[str] | None
    ignore_eos: bool | None
    n: int | None
    grammar: GrammarSpec | dict[str, Any] | None
    chat: bool | None
    system: str | None
    adapter: str | None


class LLM:
    """A model that is loaded and ready.

    >>> from penstock import LLM
    >>> with LLM("demo") as llm:
    ...     print(llm.generate("Once upon a time", max_new_tokens=8).text)

    model: `demo`, a folder, or a hub name ORG/NAME[@REVISION]. dtype: auto, float32, bfloat16 or float16; quantize:
    none, int8 or int4, on a GPU also fp8. The limits are in tokens and sequences; None derives them from the model and
    the memory. device: auto, cpu, cuda or cuda:I; cuda_memory_fraction: the share of the whole GPU that may be taken.
    packed_copy: where packed weights are kept for the next start: auto, off, or a folder.
    adapters: LoRA adapters by name, each a folder or ORG/NAME[@REVISION]; a call takes one with `adapter="name"`.
    trust_remote_code: the model's own Python code may run where it needs it, of a folder or of a full commit. progress:
    show a bar while several prompts run; None shows it on a terminal and in a notebook.

    Use it as a context manager, or call `close`: both give the memory back. Not thread-safe. Raises PenstockError where
    the model cannot be found, loaded or fitted into memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        offline: bool | None = None,
        dtype: str = "auto",
        quantize: str = "none",
        max_batch_size: int | None = None,
        max_batch_total_tokens: int | None = None,
        max_batch_prefill_tokens: int | None = None,
        max_total_tokens: int | None = None,
        memory_fraction: float = 0.9,
        prefix_caching: bool = True,
        threads: int | None = None,
        device: str = "auto",
        cuda_memory_fraction: float = 0.9,
        kv_cache_dtype: str | None = None,
        packed_copy: str | os.PathLike[str] = "auto",
        trust_remote_code: bool = False,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        progress: bool | None = None,
    ) -> None:
        snapshot = resolve(os.fspath(model), revision, offline=offline, code=trust_remote_code)
        self.name, self.path = snapshot.name, Path(snapshot.path)
        self.tokenizer: Tokenizer | None = load_tokenizer(self.path)
        self._config = EngineConfig(
            model_path=str(snapshot.path),
            model_name=snapshot.name,
            dtype=dtype,
            quantize=quantize,
            max_batch_size=max_batch_size,
            max_batch_total_tokens=max_batch_total_tokens,
            max_batch_prefill_tokens=max_batch_prefill_tokens,
            max_total_tokens=max_total_tokens,
            memory_fraction=memory_fraction,
            prefix_caching=prefix_caching,
            threads=threads,
            device=device,
            cuda_memory_fraction=cuda_memory_fraction,
            kv_cache_dtype=kv_cache_dtype,
            packed_copy=os.fspath(packed_copy),
            trust_remote_code=snapshot.trusted,
            adapters={
                name: str(resolve_adapter(os.fspath(source), offline=offline))
                for name, source in (adapters or {}).items()
            },
        )
        self._progress, self._offline = progress, offline
        self._prompter = Prompter(self.tokenizer)
        self._engine: EngineChild | None = None
        self._closed = False
        self._end: weakref.finalize[..., LLM] | None = None
        self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}{', closed' if self._closed else ''})"

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is also an iterable of texts
        self, prompts: str | Mapping[str, Any], *, progress: bool | None = None, **parameters: Unpack[Asked]
    ) -> Result: ...

    @overload
    def generate(
        self, prompts: Iterable[Prompt], *, progress: bool | None = None, **parameters: Unpack[Asked]
    ) -> list[Result]: ...

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Iterable[Prompt],
        *,
        progress: bool | None = None,
        **parameters: Unpack[Asked],
    ) -> Result | list[Result]:
        """Continue one prompt, or many; results come in the order of the prompts.

        A prompt is a text, a list of token ids, or a row as in a JSONL file: {"prompt": ..., "temperature": ...}. Of
        many, one that cannot be run has `error` set in its result and the others go on; a single one raises
        InvalidRequest. Beginnings that prompts share are computed once.
        """
        if isinstance(prompts, str | Mapping):
            return self._single(_row(prompts), parameters)
        return self._many([_row(prompt) for prompt in prompts], progress, parameters)

    @overload
    def chat(
        self, messages: str | Sequence[Message], *, progress: bool | None = None, **parameters: Unpack[Asked]
    ) -> Result: ...

    @overload
    def chat(
        self, messages: Sequence[Sequence[Message]], *, progress: bool | None = None, **parameters: Unpack[Asked]
    ) -> list[Result]: ...

    def chat(
        self,
        messages: str | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        progress: bool | None = None,
        **parameters: Unpack[Asked],
    ) -> Result | list[Result]:
        """Answer one conversation, or many, by the model's chat template.

        messages: a user's text, a list of {"role": ..., "content": ...}, or a list of such lists.
        """
        if isinstance(messages, str):
            return self._single(_conversation([{"role": "user", "content": messages}]), parameters)
        one = [message for message in messages if isinstance(message, Mapping)]
        if one and len(one) == len(messages):
            return self._single(_conversation(one), parameters)
        many = [each for each in messages if not isinstance(each, Mapping)]
        if one:
            raise InvalidRequest("`messages` are messages, or lists of messages, but not both")
        return self._many([_conversation(each) for each in many], progress, parameters)

    def each(self, prompts: Iterable[Prompt], **parameters: Unpack[Asked]) -> Generator[Result, None, None]:
        """Results as they are finished, for inputs of any size: prompts are read as they are needed.

        A result's `id` is its row's, else the prompt's place in the input, from 0. Leaving the loop early ends what
        still runs.
        """
        rows = (numbered_row(number, prompt) for number, prompt in enumerate(prompts))
        return self._run(rows, parameters_of(parameters))

    @overload
    def embed(  # type: ignore[overload-overlap]
        self, texts: str, *, progress: bool | None = None
    ) -> list[float]: ...

    @overload
    def embed(self, texts: Iterable[str], *, progress: bool | None = None) -> list[list[float]]: ...

    def embed(self, texts: str | Iterable[str], *, progress: bool | None = None) -> list[float] | list[list[float]]:
        """Vectors of length 1, the mean of the model's final hidden states over each text: [hidden], or a list.

        A model that was not trained for embeddings gives coarse ones. Raises InvalidRequest for a text that is empty or
        too long.
        """
        prompts = [Row(prompt=text) for text in ([texts] if isinstance(texts, str) else texts)]
        requests = [
            EngineRequest(id=number, prompt_ids=self._prompter.prompt(row).ids, max_new_tokens=0, embed=Embed())
            for number, row in enumerate(prompts)
        ]
        vectors: dict[int, list[float]] = {}
        with bar(len(requests), "embedding", self._shown(progress, len(requests))) as advance:
            for number, vector in self._embed(requests):
                vectors[number] = vector
                advance(1, 0)
        found = [vectors[number] for number in range(len(requests))]
        return found[0] if isinstance(texts, str) else found

    @property
    def adapters(self) -> list[str]:
        """The names of the LoRA adapters that are loaded."""
        return list(self._config.adapters)

    def load_adapter(self, name: str, source: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter: a folder, or ORG/NAME[@REVISION]. Raises PenstockError where it does not fit."""
        folder = str(resolve_adapter(os.fspath(source), offline=self._offline))
        self._adapt(lambda engine: engine.load_adapter(name, folder))
        self._config = msgspec.structs.replace(self._config, adapters={**self._config.adapters, name: folder})

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter. Raises PenstockError where there is none of that name."""
        self._adapt(lambda engine: engine.unload_adapter(name))
        left = {other: folder for other, folder in self._config.adapters.items() if other != name}
        self._config = msgspec.structs.replace(self._config, adapters=left)

    def _adapt(self, change: Callable[[EngineChild], None]) -> None:
        try:
            change(self._started())
        except EngineEnded as error:
            raise self._died(error) from error

    def close(self) -> None:
        """End the engine's process; all of the model's memory is free when this returns."""
        self._closed = True
        self._stop()
        self._prompter.close()

    def _single(self, row: Row, parameters: Asked) -> Result:
        result = next(self._run(iter([_numbered(0, row)]), parameters_of(parameters)))
        if result.error is not None:
            raise InvalidRequest(result.error)
        return result

    def _many(self, rows: list[Row], progress: bool | None, parameters: Asked) -> list[Result]:
        run = parameters_of(parameters)
        given = [row.id for row in rows]
        numbered = [msgspec.structs.replace(row, id=number) for number, row in enumerate(rows)]
        found: dict[int, Result] = {}
        with bar(len(rows), "generating", self._shown(progress, len(rows))) as advance:
            for result in self._run(iter(numbered), run):
                advance(1, result.generated_tokens)
                found[int(result.id)] = result
                name = given[int(result.id)]
                result.id = result.id if name is None else name
        return [found[number] for number in range(len(rows))]

    def _run(self, rows: Iterator[Row], run: Parameters) -> Generator[Result, None, None]:
        """Generate; Ctrl-C takes effect between two steps, so that the engine can be used again."""
        engine = self._started()
        with (
            closing(generate_rows(engine, self._prompter, rows, run)) as steps,
            Interrupt.where_possible() as interrupt,
        ):
            try:
                for step in steps:
                    yield from step.results
                    if interrupt.asked:
                        raise KeyboardInterrupt
            except EngineEnded as error:
                raise self._died(error) from error

    def _embed(self, requests: list[EngineRequest]) -> Iterator[tuple[int, list[float]]]:
        """(number, vector) of each text, as they are finished."""
        engine = self._started()
        waiting, room = iter(requests), AHEAD * engine.limits.max_batch_size
        live: set[int] = set()
        try:
            with Interrupt.where_possible() as interrupt:
                while True:
                    for request in waiting:
                        engine.add(request)
                        live.add(request.id)
                        if len(live) >= room:
                            break
                    if not live:
                        return
                    for output in engine.step().outputs:
                        if output.error is not None:
                            raise InvalidRequest(output.error)
                        live.discard(output.id)
                        yield output.id, _unit(array("f", output.embedding or b""))
                    if interrupt.asked:
                        raise KeyboardInterrupt
        except EngineEnded as error:
            raise self._died(error) from error
        finally:
            for number in live:
                engine.abort(number)

    def _started(self) -> EngineChild:
        """The engine, started when it is not there."""
        if self._closed:
            raise UsageError(f"The model {self.name} is closed.", hint="Make another LLM.")
        if self._engine is None:
            self._engine = EngineChild(self._config)
            self._end = weakref.finalize(self, self._engine.close)
        return self._engine

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._engine = self._end = None

    def _died(self, error: EngineEnded) -> PenstockError:
        self._stop()
        return PenstockError(
            "The engine's process ended.",
            f"{error}.",
            "The next call starts another; a smaller batch needs less memory.",
        )

    def _shown(self, progress: bool | None, count: int) -> bool:
        """Whether to show a bar."""
        asked = self._progress if progress is None else progress
        return count > 1 and (sys.stderr.isatty() or "ipykernel" in sys.modules) if asked is None else asked


def _row(prompt: Prompt) -> Row:
    """A prompt in any of its forms. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return Row(prompt=prompt)
    try:
        if isinstance(prompt, Mapping):
            return msgspec.convert(dict(prompt), Row)
        return Row(prompt_token_ids=[int(i) for i in prompt])
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InvalidRequest(f"a prompt is a text, token ids, or a row: {error}") from None


def numbered_row(number: int, prompt: Prompt) -> Row:
    """A prompt as a row whose id, unless it has one, is its place. Raises InvalidRequest."""
    return _numbered(number, _row(prompt))


def _numbered(number: int, row: Row) -> Row:
    return row if row.id is not None else msgspec.structs.replace(row, id=number)


def _conversation(messages: Sequence[Message]) -> Row:
    return Row(messages=[dict(message) for message in messages])


def parameters_of(asked: Asked) -> Parameters:
    """Raises InvalidRequest."""
    try:
        return msgspec.convert(asked, Parameters)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None


def _unit(vector: array[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector]
