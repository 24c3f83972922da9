"""Convert a Hugging Face checkpoint to GGUF.

The `gguf` package has the names of tensors, and `FAMILIES` the rest of the differences. Models that
llama.cpp would compute differently are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from embedgrad.deploy.formats.gguf_file import Bytes, Contents, Entry, Weight, entry
from embedgrad.deploy.formats.gguf_tokenizer import tokenizer_metadata
from embedgrad.deploy.formats.weight_files import StoredTensor, WeightFiles
from embedgrad.errors import ExportError
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.gguf_settings import head_width

WAY_OUT = "export to 'vocabulary' and convert that folder with llama.cpp's convert_hf_to_gguf.py"


@final
@dataclass(frozen=True)
class Family:
    """How a model type of transformers becomes an architecture of llama.cpp.

    `pairs_halves`: llama.cpp interleaves the rotary halves of a head. `norms_add`: it expects norms
    with this already added. `config_problem`: why a configuration cannot be served, or None.
    """

    arch: MODEL_ARCH
    config_problem: Callable[[Any], str | None] = lambda config: None
    pairs_halves: bool = False
    norms_add: float = 0.0


def _slides(config: Any) -> str | None:
    """llama.cpp has no sliding windows for these families."""
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if window and used and window < config.max_position_embeddings:
        return f"llama.cpp has no sliding window ({window} tokens) for {config.model_type}"
    return None


def _other_gemma(config: Any) -> str | None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    if any(kind != kinds[i % 6] for i, kind in enumerate(config.layer_types)):
        return "llama.cpp expects every sixth layer of Gemma 3 to be the one without a window"
    if config.query_pre_attn_scalar != config.head_dim:
        return "llama.cpp divides the queries of Gemma 3 by the root of their width"
    return None


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, pairs_halves=True),
    "mistral": Family(MODEL_ARCH.LLAMA, _slides, pairs_halves=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, _slides),
    "qwen3": Family(MODEL_ARCH.QWEN3, _slides),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _other_gemma, norms_add=1.0),
}
_FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32}
_DTYPES = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}


def from_checkpoint(model: LanguageModel) -> Contents:
    """The safetensors of a loaded model's folder. Raises `ExportError`."""
    config: Any = model.model.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ExportError(f"gguf: {config.model_type} is not among {known}; {WAY_OUT}")
    problem = family.config_problem(config)
    if problem:
        raise ExportError(f"gguf: {problem}; {WAY_OUT}")
    if getattr(config, "quantization_config", None):
        raise ExportError(
            f"gguf: {model.info.name} is quantized in a way that GGUF cannot hold; use the model "
            "that it was made from, or a GGUF file"
        )
    arch = family.arch.name.lower()
    metadata = {
        "general.name": entry(model.info.title),
        **({"general.license": entry(model.info.license)} if model.info.license else {}),
        **{f"{arch}.{key}": value for key, value in _numbers(config).items()},
        **tokenizer_metadata(model.tokenizer, model.info.vocabulary, model.end_ids),
    }
    weights = list(_weights(Path(model.info.path), config, family, model.info.tied))
    matrix = max(weights, key=lambda weight: weight.nbytes)
    metadata["general.file_type"] = entry(_FILE_TYPES[matrix.kind])
    return Contents(arch, metadata, [*_rope_factors(config), *weights])


def _numbers(config: Any) -> dict[str, Entry]:
    head = head_width(config)
    rope = _rope(config)
    entries = {
        "block_count": entry(config.num_hidden_layers),
        "context_length": entry(config.max_position_embeddings),
        "embedding_length": entry(config.hidden_size),
        "feed_forward_length": entry(config.intermediate_size),
        "vocab_size": entry(config.vocab_size),
        "attention.head_count": entry(config.num_attention_heads),
        "attention.head_count_kv": entry(config.num_key_value_heads),
        "attention.key_length": entry(head),
        "attention.value_length": entry(head),
        "attention.layer_norm_rms_epsilon": entry(float(config.rms_norm_eps)),
        "rope.dimension_count": entry(head),
        "rope.freq_base": entry(float(rope["rope_theta"])),
    }
    if config.model_type == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]
        entries["attention.sliding_window"] = entry(config.sliding_window)
        entries["rope.freq_base_swa"] = entry(float(local["rope_theta"]))
    if rope["rope_type"] == "linear":
        entries["rope.scaling.type"] = entry("linear")
        entries["rope.scaling.factor"] = entry(float(rope["factor"]))
    return entries


def _rope(config: Any) -> Mapping[str, Any]:
    """Rotary settings of the layers without a window."""
    rope: Mapping[str, Any] = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ExportError(
            f"gguf: rotary scaling of the type {rope['rope_type']!r} is not converted; {WAY_OUT}"
        )
    return rope


def _rope_factors(config: Any) -> Iterator[Weight]:
    """Divisors of the rotary frequencies: Llama 3.1's scaling, as transformers computes it in
    `_compute_llama3_parameters` of modeling_rope_utils."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return
    width, base = head_width(config), rope["rope_theta"]
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (i / width)
        turns = original / wavelength
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: unchanged, 0: fully scaled
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    row = np.array([factors], dtype=np.float32).view(np.uint8)
    yield Weight("rope_freqs.weight", Kind.F32, (width // 2,), lambda a, b: row[a:b])


def _weights(folder: Path, config: Any, family: Family, tied: bool) -> Iterator[Weight]:
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    for name, stored in WeightFiles.read(folder).tensors.items():
        if (name == "lm_head.weight" and tied) or name.endswith("rotary_emb.inv_freq"):
            continue
        short: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if short is None:
            raise ExportError(
                f"gguf: the weight {name} of {config.model_type} has no place in GGUF; {WAY_OUT}"
            )
        if stored.dtype not in _DTYPES:
            raise ExportError(f"gguf: cannot convert the weight {name} of type {stored.dtype}")
        yield _weight(stored, short, config, family)


def _weight(stored: StoredTensor, name: str, config: Any, family: Family) -> Weight:
    order: Tensor | None = None
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
    for part, n in heads.items():
        if family.pairs_halves and part in name:
            order = torch.arange(stored.shape[0]).view(n, 2, -1).transpose(1, 2).flatten()
    plus = family.norms_add if name.endswith("_norm.weight") else 0.0
    vector = len(stored.shape) == 1

    def read(start: int, stop: int) -> Bytes:
        if vector:
            numbers = stored.read().float()
            rows = (numbers if order is None else numbers[order])[None] + plus
        elif order is None:
            rows = stored.part(start, stop).read()
        else:
            rows = stored.read()[order[start:stop]]
        raw: Bytes = rows.contiguous().view(torch.uint8).numpy()
        return raw

    return Weight(name, Kind.F32 if vector else _DTYPES[stored.dtype], stored.shape, read)
