"""The recipe's model: loaded, or known by its configuration and tokenizer alone."""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from embedgrad.events import Report, say
from embedgrad.model.capabilities import no_reuse, rope_limit
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel, load
from embedgrad.model.loading.device import choose_device
from embedgrad.model.prefix_cache import PrefixCache, Spill
from embedgrad.recipe.build import open_model
from embedgrad.recipe.recipe import Recipe


@typing.final
@dataclass(frozen=True)
class Profile:
    """What a plan needs to know of a model; `model` is None where no weights are loaded.

    `longest_reuse` is the longest sequence that reuses its prefix (None: any).
    """

    parts: LoadedModel
    device: torch.device
    cache: PrefixCache
    why_not_reusable: str | None
    longest_reuse: int | None
    model: LanguageModel | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(getattr(torch, self.parts.info.dtype).itemsize)

    @property
    def weights(self) -> int:
        """Numbers that every token is multiplied with: all but embeddings and output layer."""
        network: Any = self.parts.model
        ends = (network.get_input_embeddings(), network.get_output_embeddings())
        outer = {id(p) for end in ends if end is not None for p in end.parameters()}
        return sum(p.numel() for p in network.parameters() if id(p) not in outer)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a prefix token, in the model's precision."""
        config: Any = self.parts.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(2 * config.num_hidden_layers * kv_heads * size * self.itemsize)

    def as_dict(self) -> dict[str, Any]:
        """The part of a plan that describes the model."""
        info, parameters = self.parts.info, sum(p.numel() for p in self.parts.model.parameters())
        return {
            **{name: getattr(info, name) for name in ("name", "architecture", "dtype", "context")},
            "parameters": parameters,
            "bytes": parameters * self.itemsize,
            "device": str(self.device),
        }


def profile_loaded(recipe: Recipe, report: Report) -> Profile:
    """Load the model as a run does. Raises `ModelError`."""
    model = open_model(recipe, report)
    return Profile(
        LoadedModel(model.model, model.tokenizer, model.info),
        model.device,
        model.prefix_cache,
        model.reuse_off or None,
        model.longest_reuse,
        model,
    )


def profile_config(recipe: Recipe, report: Report) -> Profile:
    """Read the model's configuration and tokenizer, but no weights. Raises `ModelError`."""

    def notify(text: str) -> None:
        say(report, [text])

    parts = load(**asdict(recipe.model), weights=False, notify=notify)
    config = parts.model.config.get_text_config(decoder=True)
    device, stored = choose_device(recipe.model.device), recipe.prefix_cache
    spill = None if stored.spill is None else Spill(stored.spill, stored.spill_budget, notify)
    cache = PrefixCache.on(device, stored.budget, spill=spill)
    reason = no_reuse(parts.model, config) or None
    return Profile(parts, device, cache, reason, rope_limit(config))
