"""Settings of a GGUF file that transformers' reader lets go.

The reader takes a dozen keys and ignores the others, so that a model with scaled rotary
frequencies, say, would compute something else than llama.cpp without a word. Keys and defaults are
llama.cpp's (src/llama-arch.cpp, src/llama-model.cpp).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from embedgrad.errors import ModelError
from embedgrad.model.loading.gguf_header import GgufHeader

# Change it when the same file is converted to something else: old copies are not used then.
VERSION = 4

# Names, sizes that show in the shapes of tensors, and what only embedding models use.
_WITHOUT_EFFECT = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("tensor_data_layout", "pooling_type", "rope.scaling.finetuned"),
}
_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
# Key -> attributes of configurations, of which the first that there is takes the value.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("global_head_dim", "head_dim"),
    "attention.key_length_swa": ("head_dim",),
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "use_parallel_residual": ("use_parallel_residual",),
}
# Values that change nothing; for every key 0, False and "" do not either.
_NEUTRAL: dict[str, Any] = {
    "embedding_scale": 1.0,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_ROPE = {
    *("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def complete_settings(file: Path, header: GgufHeader, config: Any) -> None:
    """Set in `config` what the file says of the model.

    Raises `ModelError` with the keys that change what a model computes and have no place in it.
    """
    arch = header.metadata["general.architecture"]
    stated = {
        key.removeprefix(f"{arch}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{arch}.")
    }
    left = []
    if arch not in GGUF_CONFIG_ARCHS:  # of these transformers reads all that there is
        _set_defaults(header, stated, config)
        left = [
            key
            for key, value in stated.items()
            if not key.startswith("rope.") and not _carried_over(key, value, config)
        ]
    left += _set_rope(file, header, stated, config)
    if left:
        named = ", ".join(f"{arch}.{key} = {stated.get(key)}" for key in left)
        raise ModelError(
            f"{file}: transformers has no place for {named}, without which the model would compute"
            " something else than in llama.cpp; use the model's safetensors"
        )


def check_tensors(file: Path, header: GgufHeader, model: Any, unexpected: Sequence[str]) -> None:
    """Raise `ModelError` if the file has tensors that the model did not take."""
    arch = header.metadata["general.architecture"]
    left = list(unexpected)
    if arch not in GGUF_CONFIG_ARCHS:
        weights_map: Any = get_gguf_hf_weights_map  # without types
        processor: Any = TENSOR_PROCESSORS.get(arch, TensorProcessor)
        others = weights_map(model, processor()).keys() | {*_FACTORS, "output.weight"}
        left = [
            name
            for name in header.tensors
            if not {name, name.removesuffix(".weight")} & others
            and not name.endswith(".attn_rot_embd.weight")  # the frequencies, once more
        ]
    if left:
        raise ModelError(
            f"{file}: transformers has no place for {len(left)} of its tensors ({left[0]}), without"
            " which the model would compute something else than in llama.cpp; use the model's"
            " safetensors"
        )


def _set_defaults(header: GgufHeader, stated: Mapping[str, Any], config: Any) -> None:
    """What llama.cpp takes where a key is missing, or knows by the architecture alone."""
    width = config.hidden_size // config.num_attention_heads
    # A width that cannot be set, as Falcon's, is this one already.
    if getattr(config, "head_dim", width) != width and "attention.key_length" not in stated:
        config.head_dim = width
    if config.model_type == "mistral":
        config.sliding_window = None
    if hasattr(config, "query_pre_attn_scalar"):
        head = stated.get("attention.key_length", width)
        large = (config.model_type, config.num_hidden_layers) in (
            ("gemma2", 46),
            ("gemma3_text", 62),
        )
        config.query_pre_attn_scalar = width if large else head
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_output.bias" in header.tensors
        config.mlp_bias = "blk.0.ffn_down.bias" in header.tensors


def _carried_over(key: str, value: Any, config: Any) -> bool:
    """Set an attribute of the configuration; returns False if a value with effect has none."""
    if key == "attention.causal":
        return bool(value)
    if key in _WITHOUT_EFFECT or not value or value == _NEUTRAL.get(key):
        return True
    if key == "attention.sliding_window_pattern":
        layers = range(config.num_hidden_layers)
        windows = value if isinstance(value, tuple) else [(i + 1) % value != 0 for i in layers]
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        if hasattr(config, "layer_types"):
            config.layer_types = kinds
        return hasattr(config, "layer_types") or "sliding_attention" not in kinds
    if isinstance(value, tuple):
        if len(set(value)) > 1:
            return False
        value = value[0]
    if key.startswith("attention.value_length"):  # transformers has one width for keys and values
        names = _ATTRIBUTES[key.replace("value", "key")]
        widths = [getattr(config, name) for name in names if hasattr(config, name)]
        return bool(value == (*widths, head_width(config))[0])
    if key == "attention.scale" and hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = value**-2
        return True
    name = next((n for n in _ATTRIBUTES.get(key, ()) if hasattr(config, n)), None)
    if name is not None:
        if getattr(config, name) != value:
            setattr(config, name, value)
        return True
    if key == "attention.key_length":
        return bool(value == head_width(config))
    if key == "expert_gating_func":
        return hasattr(config, "scoring_func")  # transformers reads it
    if key == "attention.head_count_kv":
        return bool(value == config.num_attention_heads)
    if key == "attention.scale":
        return math.isclose(value, (config.hidden_size // config.num_attention_heads) ** -0.5)
    limit = getattr(config, "max_position_embeddings", 0)
    return key == "attention.sliding_window" and value >= limit


def _set_rope(file: Path, header: GgufHeader, stated: Mapping[str, Any], config: Any) -> list[str]:
    """Set the rotary frequencies; returns the keys that have no place in the configuration."""
    rope = {key: value for key, value in stated.items() if key.startswith("rope.")}
    parameters = getattr(config, "rope_parameters", None)
    tensors = [name for name in _FACTORS if name in header.tensors]
    if not parameters:
        return [key for key, value in rope.items() if key.startswith("rope.scal") and value]
    full = parameters.get("full_attention", parameters)
    if header.metadata["general.architecture"] in GGUF_CONFIG_ARCHS:
        rope.pop("rope.dimension_count", None)
        rope.pop("rope.dimension_sections", None)
    else:
        full["rope_theta"] = rope.get("rope.freq_base", 10_000.0)
        if "sliding_attention" in parameters and "rope.freq_base_swa" in rope:
            parameters["sliding_attention"]["rope_theta"] = rope["rope.freq_base_swa"]
        head = head_width(config)
        rotated = rope.get("rope.dimension_count", head)
        if "partial_rotary_factor" in full:
            full["partial_rotary_factor"] = rotated / head
        elif rotated not in (head, getattr(config, "rotary_dim", head)):
            return ["rope.dimension_count"]
    left = [
        key
        for key, value in rope.items()
        if not (key in _ROPE or key in _WITHOUT_EFFECT or not value or value == _NEUTRAL.get(key))
        and set(value if isinstance(value, tuple) else ()) != {0}
    ]
    if config.model_type == "gemma4_text":  # its one use of factors is in the configuration
        tensors = []
    factors = {name: _numbers(file, name) for name in tensors}
    scaling = _scaling(rope, factors, config, full)
    if scaling is None:
        return [*left, "rope.scaling.type"]
    if config.model_type == "gpt_oss":
        scaling["truncate"] = False  # as OpenAI's code, by which it was trained
    kept = {k: v for k, v in full.items() if k in ("rope_theta", "partial_rotary_factor")}
    kept |= {k: v for k, v in full.items() if k.startswith("mrope")}
    full.clear()
    full.update(kept | scaling)
    if hasattr(config, "original_max_position_embeddings"):
        original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        config.original_max_position_embeddings = original
    config.rope_parameters = parameters
    return left


def _scaling(
    rope: Mapping[str, Any], factors: Mapping[str, list[float]], config: Any, full: dict[str, Any]
) -> dict[str, Any] | None:
    """Rotary scaling as `rope_parameters` has it; None for a kind that is unknown."""
    kind = rope.get("rope.scaling.type", "linear")
    factor = float(rope.get("rope.scaling.factor") or rope.get("rope.scale_linear") or 1)
    context = config.max_position_embeddings
    original = int(rope.get("rope.scaling.original_context_length") or context)
    strength = float(
        rope.get("rope.scaling.attn_factor") or rope.get("rope.scaling.yarn_attn_factor") or 1
    )
    if kind == "yarn" and not factors:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": strength * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(rope.get("rope.scaling.yarn_beta_fast") or 32),
            "beta_slow": float(rope.get("rope.scaling.yarn_beta_slow") or 1),
        }
    if kind not in ("none", "linear", "longrope"):
        return None
    if kind == "none":
        factor = 1.0
    both = factors.get("rope_freqs.weight")
    short, long = (both or factors.get(f"rope_factors_{name}.weight") for name in ("short", "long"))
    if (short is None or set(short) == {1.0}) and short == long and strength == 1:
        return (
            {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
        )
    if short is not None and short == long and factor == strength == 1:
        llama3 = {
            "rope_type": "llama3",
            "factor": float(round(max(short))),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if _gives(llama3, short, config, full):
            return llama3
    ones = [1.0] * (len(short or long or ()) or _rotary_width(config, full) // 2)
    # Of the kinds that transformers has, this one takes any factors.
    return {
        "rope_type": "longrope",
        "short_factor": [factor * number for number in short or ones],
        "long_factor": [factor * number for number in long or ones],
        "attention_factor": strength,
        "factor": 1.0 if short == long else max(1.0, context / original),
        "original_max_position_embeddings": context if short == long else original,
    }


def _gives(scaling: dict[str, Any], factors: list[float], config: Any, full: Any) -> bool:
    """Whether a kind of scaling divides the rotary frequencies by these factors."""
    count = torch.arange(0, _rotary_width(config, full), 2) / _rotary_width(config, full)
    plain = full["rope_theta"] ** -count
    like = copy.deepcopy(config)
    like.rope_parameters = {**full, **scaling}
    scaled: Any = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](like, torch.device("cpu"))[0]
    return bool(torch.allclose(plain / scaled, torch.tensor(factors), rtol=1e-3))


def _rotary_width(config: Any, full: Mapping[str, Any]) -> int:
    return int(head_width(config) * full.get("partial_rotary_factor", 1.0))


def head_width(config: Any) -> int:
    """The width of an attention head."""
    own: int | None = getattr(config, "head_dim", None)
    return own or int(config.hidden_size // config.num_attention_heads)


def _numbers(file: Path, name: str) -> list[float]:
    tensor = next(t for t in GGUFReader(file).tensors if t.name == name)
    return [float(number) for number in dequantize(tensor.data, tensor.tensor_type).flatten()]
