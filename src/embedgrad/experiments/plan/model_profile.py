"""The recipe's model: loaded, or known by its configuration and tokenizer alone."""

from __future__ import annotations

import math
import typing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from embedgrad.events import Report, say
from embedgrad.model.capabilities import rope_limit, why_not_reusable
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.loading.device import choose_device
from embedgrad.model.prefix_cache import PrefixCache, Spill
from embedgrad.recipe.build import open_model
from embedgrad.recipe.recipe import Recipe


@typing.final
@dataclass(frozen=True)
class Profile:
    """What a plan needs to know of a model; `model` is None where no weights are loaded."""

    parts: LoadedModel
    cache: PrefixCache
    why_not_reusable: str | None
    rope_limit: int | None
    model: LanguageModel | None = None

    @property
    def longest_reuse(self) -> float:
        """Tokens of the longest sequence that reuses its prefix."""
        limit = math.inf if self.rope_limit is None else self.rope_limit
        return 0 if self.why_not_reusable else limit

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a prefix token."""
        config: Any = self.parts.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        itemsize = getattr(torch, self.parts.info.dtype).itemsize
        return int(2 * config.num_hidden_layers * kv_heads * size * itemsize)


def profile_model(recipe: Recipe, report: Report, *, weights: bool) -> Profile:
    """The model as a run loads it, or without its weights. Raises `ModelError`."""
    if weights:
        model = open_model(recipe, report)
        parts, forward = LoadedModel(model.model, model.tokenizer, model.info), model.forward
        limit = forward.longest_reuse
        return Profile(parts, model.prefix_cache, forward.why_not_reusable, limit, model)

    def notify(text: str) -> None:
        say(report, [text])

    parts = load(**asdict(recipe.model), weights=False, notify=notify)
    config, stored = parts.model.config.get_text_config(decoder=True), recipe.prefix_cache
    spill = None if stored.spill is None else Spill(stored.spill, stored.spill_budget, notify)
    cache = PrefixCache.on(choose_device(recipe.model.device), stored.budget, spill=spill)
    reason = why_not_reusable(parts.model, config)
    return Profile(parts, cache, reason, rope_limit(config))
