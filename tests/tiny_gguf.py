"""A tiny Llama as a GGUF file, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

import tiny

TOKENS = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120\u0120", "he"]


def write_gguf(
    path: Path, *, tensors: Mapping[str, Sequence[float]] | None = None, **changes: Any
) -> PreTrainedModel:
    """Write a tiny Llama as llama.cpp's converter would; returns the model it was made from.

    `changes` replaces metadata; None leaves a key out. `tensors` are written besides its own.
    """
    tokens = changes.get("tokenizer.ggml.tokens") or TOKENS
    model = tiny.model("llama", len(tokens), dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {
        "general.license": "mit",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["\u0120 \u0120", "h e"],
        "tokenizer.ggml.eos_token_id": 0,
        **changes,
    }.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[bool] = writer.add_bool
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for layer, count in heads.items():
            if layer in name:  # llama.cpp pairs the rotated halves of a head
                rows = weight.view(count, 2, -1, weight.shape[1])
                weight = rows.transpose(1, 2).reshape(weight.shape)
        if name != "lm_head.weight":
            short = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(short, weight.contiguous().numpy())
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, torch.tensor(numbers, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
