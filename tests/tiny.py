"""Tokenizers, chat templates, models and examples for tests: in memory, seeded, built in moments.

A float64 model made here computes in float64 throughout. `transformers` casts its norms and its
eager softmax to float32 whatever the dtype of the model, and two equal computations then differ by
1e-6 (see `_StayDouble`).
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny_text import (
    CHATML,
    DATED,
    NO_SYSTEM,
    PLAIN,
    TOKENIZERS,
    TRIMMING,
    reviews,
    tokenizer,
    with_template,
)

if TYPE_CHECKING:
    from embedgrad.model.loading import LoadedModel

__all__ = [
    "ARCHITECTURES",
    "CHATML",
    "DATED",
    "NO_SYSTEM",
    "PLAIN",
    "TOKENIZERS",
    "TRIMMING",
    "loaded",
    "model",
    "reviews",
    "tokenizer",
    "with_template",
]

_MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": _MIXED}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
# Architecture -> model type of `transformers`, and what its configuration has besides `_SHARED`.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    # Rotary frequencies that change once a pass is longer than 16 tokens. The dynamic model also
    # remembers its longest pass: a second one of 17 tokens or more may differ from the first.
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", **_ROPE}},
    ),
    "llama-longrope": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                **_ROPE,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 1.5, 2.0, 3.0],
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": _MIXED},
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", _GEMMA),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
            "logits_scaling": 1.25,
        },
    ),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mamba": ("mamba", {"state_size": 4, "residual_in_fp32": False}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)
_SHARED = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # logits of width 32 then have a standard deviation near 1
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class _StayDouble:
    """Within it, this thread's casts of float64 tensors to float32 are ignored.

    It takes the place of the three functions by which `transformers` casts; a
    `TorchFunctionMode` would cost more than the tiny models themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._own = threading.local()
        plain_to, plain_float = torch.Tensor.to, torch.Tensor.float
        plain_softmax = functional.softmax

        def keeps(value: torch.Tensor) -> bool:
            return value.dtype == torch.float64 and getattr(self._own, "depth", 0) > 0

        def to(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if keeps(value):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return plain_to(value, *args, **kwargs)

        def to_float(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return value if keeps(value) else plain_float(value, *args, **kwargs)

        def softmax(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if keeps(value) and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return plain_softmax(value, *args, **kwargs)

        self._places = [
            (torch.Tensor, "to", to, plain_to),
            (torch.Tensor, "float", to_float, plain_float),
            (functional, "softmax", softmax, plain_softmax),
        ]

    def __enter__(self) -> None:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth == 1:
            self._count(1)

    def __exit__(self, *_: object) -> None:
        self._own.depth -= 1
        if self._own.depth == 0:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            self._threads += more
            if self._threads == max(more, 0):  # the first one comes, or the last one goes
                for place, name, own, plain in self._places:
                    setattr(place, name, own if more > 0 else plain)


_STAY_DOUBLE = _StayDouble()


def _forward_in_double(module: torch.nn.Module) -> None:
    plain = type(module).forward

    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _STAY_DOUBLE:
            return plain(self, *args, **kwargs)

    # A bound method and not a closure: a deep copy of the model must call its own weights.
    module.forward = types.MethodType(forward, module)


def model(
    architecture: str,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    seed: int = 0,
    tie: bool = True,
) -> PreTrainedModel:
    """Build a frozen model in eval mode: width 32, 3 layers, 4 heads on 2 (GPT-2: 4) key heads.

    A seed gives the same weights in every dtype (rounded). "mamba" has no attention, "gemma2" takes
    eager attention only (ValueError from `transformers` for sdpa).
    """
    model_type, extra = _ARCHITECTURES[architecture]
    settings = {
        **_SHARED,
        **copy.deepcopy(extra),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tie,
    }
    if model_type == "mamba":
        attention = "eager"
        settings = {name: value for name, value in settings.items() if "heads" not in name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings), attn_implementation=attention
        )
    built.eval().requires_grad_(False)
    # Parameters only: the rotary frequencies stay in float32, as `from_pretrained` leaves them.
    for weight in built.parameters():
        weight.data = weight.data.to(dtype)
    built.config.dtype = dtype
    if dtype == torch.float64:
        for module in built.modules():
            if type(module).__name__.endswith(("Norm", "Attention", "Mixer", "ForCausalLM")):
                _forward_in_double(module)
    return built


def loaded(
    architecture: str = "llama",
    tokenizer_kind: str = "bytelevel",
    template: str | None = CHATML,
    **kwargs: Any,
) -> LoadedModel:
    """Build what `embedgrad.model.loading.load` returns; `kwargs` go to `model`.

    The tokenizer is the caller's own copy. No file stands behind it: `info.path` is empty.
    """
    from embedgrad.model.loading import LoadedModel, ModelInfo
    from embedgrad.model.loading.info import (
        context_length,
        embedding_digest,
        embedding_scale,
        embedding_table,
    )

    words = with_template(tokenizer(tokenizer_kind), template)
    built = model(architecture, len(words), **kwargs)
    generation = built.generation_config
    assert generation is not None
    generation.eos_token_id, generation.pad_token_id = words.eos_token_id, words.pad_token_id
    table_VD = embedding_table(built)
    info = ModelInfo(
        name=f"tiny-{architecture}",
        revision=None,
        kind="folder",
        path="",
        architecture=type(built).__name__,
        width=table_VD.shape[1],
        vocabulary=table_VD.shape[0],
        context=context_length(built.config),
        dtype=str(built.dtype).removeprefix("torch."),
        embedding_digest=embedding_digest(table_VD),
        embedding_scale=embedding_scale(built.get_input_embeddings(), table_VD),
        tied=built.get_output_embeddings().weight is built.get_input_embeddings().weight,
        license=None,
        gguf_sha256=None,
    )
    return LoadedModel(built, words, info)
