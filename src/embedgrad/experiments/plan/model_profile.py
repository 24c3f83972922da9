"""The recipe's model: loaded, or known by its configuration and tokenizer alone."""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from embedgrad.events import Report, say
from embedgrad.model.capabilities import no_reuse, rope_limit
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import ModelInfo, load
from embedgrad.model.loading.device import choose_device
from embedgrad.model.prefix_cache import PrefixCache, Spill
from embedgrad.recipe.build import open_model
from embedgrad.recipe.recipe import Recipe


@typing.final
@dataclass(frozen=True)
class Profile:
    """What a plan needs to know of a model; `model` is None where no weights are loaded."""

    network: Any
    tokenizer: Any
    info: ModelInfo
    device: torch.device
    cache: PrefixCache
    why_not_reusable: str | None
    longest_reuse: float
    model: LanguageModel | None = None

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a prefix token."""
        config = self.network.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        itemsize = getattr(torch, self.info.dtype).itemsize
        return int(2 * config.num_hidden_layers * kv_heads * size * itemsize)


def profile_model(recipe: Recipe, report: Report, *, weights: bool) -> Profile:
    """The model as a run loads it, or without its weights. Raises `ModelError`."""
    model: LanguageModel | None = None
    if weights:
        model = open_model(recipe, report)
        parts, cache = (model.model, model.tokenizer, model.info), model.prefix_cache
        reason, limit = model.reuse_off or None, model.longest_reuse
    else:

        def notify(text: str) -> None:
            say(report, [text])

        parts = load(**asdict(recipe.model), weights=False, notify=notify)
        config: Any = parts[0].config.get_text_config(decoder=True)
        stored = recipe.prefix_cache
        spill = None if stored.spill is None else Spill(stored.spill, stored.spill_budget, notify)
        cache = PrefixCache.on(choose_device(recipe.model.device), stored.budget, spill=spill)
        reason, limit = no_reuse(parts[0], config) or None, rope_limit(config)
    longest = 0 if reason else math.inf if limit is None else limit
    device = choose_device(recipe.model.device)
    return Profile(*parts, device, cache, reason, longest, model)
