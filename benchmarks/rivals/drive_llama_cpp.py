"""llama.cpp through llama-cpp-python: the checkpoint becomes a GGUF file, which llama.cpp quantizes itself."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from protocol import Loaded, Setup, Stopwatch, Timing, serve

FTYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32}
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def prepare(setup: Setup) -> None:
    plain = Path(setup.cache).parent / "bf16.gguf"  # shared by all formats
    if not plain.exists():
        partial = plain.with_suffix(".partial")
        write_gguf(Path(setup.model), partial)
        partial.rename(plain)
    target = Path(setup.cache) / "model.gguf"
    if setup.format == "bf16":
        target.unlink(missing_ok=True)
        target.hardlink_to(plain)
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[setup.format], setup.threads
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize to {setup.format}")


def write_gguf(model: Path, target: Path) -> None:
    """The checkpoint as one GGUF file in bfloat16, norms in float32, without a tokenizer."""
    import gguf
    import torch
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]])
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer = gguf.GGUFWriter(str(target), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FTYPES["bf16"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                tensor = tensors.get_tensor(name)
                if ARCHITECTURES[config["model_type"]] == "LLAMA" and ".self_attn." in name:
                    for part, n in (("q_proj", heads), ("k_proj", kv_heads)):
                        if part in name:
                            tensor = interleave(tensor, n)
                stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if stored is None:
                    raise RuntimeError(f"GGUF has no place for {name}")
                if tensor.dim() == 1:
                    writer.add_tensor(stored, tensor.float().numpy())
                else:
                    data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
                    writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(tensor: Any, heads: int) -> Any:
    """Rows of a head from halves to pairs: llama.cpp rotates neighbours where the checkpoint rotates halves."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


class Context:
    """A llama.cpp context for so many streams of so many tokens, with a batch of its own."""

    def __init__(self, model: Any, streams: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = streams
        params.n_ctx = streams * -(-length // 256) * 256
        params.n_batch, params.n_ubatch = params.n_ctx, 512
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.pointer = llama_cpp.llama_init_from_model(model, params)
        if not self.pointer:
            raise RuntimeError("llama.cpp could not make a context")
        self.batch = llama_cpp.llama_batch_init(params.n_ctx, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute rows of (token, position, stream, whether its scores are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
        if llama_cpp.llama_decode(self.pointer, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.pointer), True)


def load(setup: Setup) -> Loaded:
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    path = str(Path(setup.cache) / "model.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp could not load the model")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    contexts: dict[tuple[int, int], Context] = {}

    def run(prompts: list[list[int]], new: int) -> Timing:
        streams = len(prompts)
        length = max(map(len, prompts)) + new
        if (streams, length) not in contexts:
            contexts[streams, length] = Context(model, streams, length, setup.threads)
        context = contexts[streams, length]
        context.clear()
        rows = [
            (token, i, stream, i == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        watch = Stopwatch(streams)
        for step in range(new):
            context.decode(rows)
            wanted = [i for i, row in enumerate(rows) if row[3]]
            scores = [llama_cpp.llama_get_logits_ith(context.pointer, i) for i in wanted]
            chosen = [int(np.argmax(np.ctypeslib.as_array(s, (vocab,)))) for s in scores]
            watch.step(range(streams))
            rows = [(token, len(prompts[i]) + step, i, True) for i, token in enumerate(chosen)]
        return watch.timing()

    return Loaded(f"llama.cpp {llama_cpp.__version__}", run, llama_cpp.llama_model_size(model))


@llama_cpp.llama_log_callback
def QUIET(level: int, text: bytes, data: Any) -> None:
    """Errors only."""
    if level == 4:
        print(text.decode(errors="replace"), end="")


if __name__ == "__main__":
    serve(prepare, load)
