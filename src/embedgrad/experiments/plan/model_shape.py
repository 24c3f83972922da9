"""A model as far as its work and memory depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a token costs.

    `weights` are multiplied with every token, `last` of them (the last layer's feed-forward part)
    only where logits are read if prefixes are reused. `parameters` counts all numbers of the model,
    `itemsize` is their bytes each.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    weights: int
    last: int
    parameters: int
    itemsize: int

    @property
    def model_bytes(self) -> int:
        """Bytes of the loaded weights."""
        return self.parameters * self.itemsize

    def token_bytes(self, precision: str = "model") -> int:
        """Bytes of the keys and values of one token, as prefixes are stored."""
        size = min(self.itemsize, 2) if precision == "half" else self.itemsize
        return 2 * self.layers * self.kv_heads * self.head_size * size


def shape_of(model: Any, last: nn.Module | None, itemsize: int | None = None) -> Shape:
    """Count a model of `transformers`, loaded or on the meta device.

    `last` is the part of it that is computed only where answers are read off, if there is one.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = 0
    for module in model.modules():
        if id(module) not in ends and not isinstance(module, nn.Embedding):
            weights += sum(_multiplied(p, config) for p in module.parameters(recurse=False))
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        weights=weights,
        last=0 if last is None else sum(_multiplied(p, config) for p in last.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        itemsize=itemsize or next(model.parameters()).element_size(),
    )


def empty_model(config: Any) -> Any:
    """The model's modules without memory for their weights."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def _multiplied(parameter: torch.Tensor, config: Any) -> int:
    """Numbers of a weight that one token is multiplied with; of experts only the chosen ones."""
    if parameter.dim() == 2:
        return parameter.numel()
    if parameter.dim() == 3:  # [experts, in, out]
        count = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n), 1)
        chosen = getattr(config, "num_experts_per_tok", None) or count
        return parameter.numel() * chosen // count
    return 0
