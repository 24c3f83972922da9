"""Prompts in every placement on the tiny models, and plain `transformers` to compare with."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny
from embedgrad.atomic_files import seal
from embedgrad.data.examples import Example
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.model.prefixes import PrefixStore
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.prompt.template import Renderer, Template

DAY = datetime.date(2024, 3, 12)
CHOICES = ("positive", "negative")
# Several tokens each, of different number; two begin alike.
LONG_CHOICES = ("a waste of time", "a waste of money, dull and cold", "warm")
LABELS = Target(choices=CHOICES)
PLACEMENTS = {
    "system": Template.chat(
        system="You are brief. [[Is the review positive or negative?]] One word.",
        user="Review: {review}",
    ),
    "user-before": Template.chat(
        user="[[Is the review positive or negative?]]\n\nReview: {review}"
    ),
    "user-after": Template.chat(user="Review: {review}\n\n[[Is it positive or negative?]]"),
    "opening": Template.chat(user="Review: {review}", assistant="[[The review is clearly]] so:"),
    "plain": Template.plain("Review: {review}\n[[Is it positive or negative?]]\nAnswer:"),
    "plain-start": Template.plain("[[Is it positive or negative?]]\nReview: {review}\nAnswer:"),
}
SEVERAL = {
    "system-and-user": Template.chat(
        system="You are brief. [[Be fair.]]", user="Review: {review}\n\n[[Is it good?]]"
    ),
    "around": Template.chat(user="[[Read this:]]\n{review}\n[[Is it positive?]]\nSay:"),
    "adjacent": Template.plain("{review}\n[[Is it positive]][[ or negative?]]\nAnswer:"),
    "twice": Template.plain("[[Is it good?]]\n{review}\n[[Is it good?]]\nAnswer:"),
    "opening": Template.chat(
        system="[[Be brief.]]", user="{review} [[Good?]]", assistant="[[The review is]]"
    ),
}
ATTENTION = tuple(name for name in tiny.ARCHITECTURES if name != "mamba")
REUSING = tuple(name for name in ATTENTION if "-dynamic" not in name and "-longrope" not in name)


@dataclass(frozen=True)
class Kit:
    """A tiny model with a prompt, its rows in token ids, and the rows of the span."""

    loaded: LoadedModel
    model: LanguageModel
    sequencer: Sequencer
    sequences: list[TokenSequence]
    start: Tensor

    def with_cache(self, cache: PrefixCache) -> Kit:
        """The same with its prefixes in another cache."""
        return dataclasses.replace(self, model=self.model.with_prefix_cache(cache))


def kit(
    architecture: str = "llama",
    tokenizer: str = "bytelevel",
    chat: str | None = tiny.CHATML,
    template: Template | str = "user-after",
    *,
    target: Target = LABELS,
    rows: Sequence[Example] | int = 6,
    budget: str | float = "1 GiB",
    **model: Any,
) -> Kit:
    """Put a prompt on a tiny model that others share; `model` goes to `tiny.model`."""
    if isinstance(template, str):
        template = PLACEMENTS[template]
    examples = tiny.reviews(rows) if isinstance(rows, int) else rows
    if target.choices == LONG_CHOICES:
        examples = [
            Example(e.columns, LONG_CHOICES[i % 3], e.source, e.group)
            for i, e in enumerate(examples)
        ]
    loaded, tried = _tried(architecture, tokenizer, chat, **model)
    sequencer = Sequencer(
        Renderer(template, loaded.tokenizer, date=DAY), loaded.tokenizer, target, rows=examples
    )
    language_model = copy.copy(tried)
    language_model.forward = copy.copy(tried.forward)
    cache = PrefixCache.on(loaded.model.device, budget)
    language_model.prefixes = PrefixStore(language_model.forward, cache)
    start = language_model.embed(sequencer.prompt_ids)
    return Kit(loaded, language_model, sequencer, sequencer.build(examples), start)


@functools.lru_cache
def _tried(*arguments: Any, **options: Any) -> tuple[LoadedModel, LanguageModel]:
    """What `tiny.loaded` builds, with what a language model finds out about it, once."""
    loaded = tiny.loaded(*arguments, **options)
    return loaded, LanguageModel(loaded, prefix_cache_budget=0)


@torch.no_grad()
def plain_logits(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of token ids, alone in a batch, by `transformers` and nothing else."""
    model: Any = loaded.model
    if any(hasattr(module, "max_seq_len_cached") for module in model.modules()):
        model = copy.deepcopy(model)
        forget_longest_pass(model)
    logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits


def plain_logprobs(
    loaded: LoadedModel, context: Sequence[int], targets: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log-probability [C] of each target behind the context, one pass per target."""
    sums = []
    for target in targets:
        logits = plain_logits(loaded, [*context, *target[:-1]])
        logprobs = torch.log_softmax(logits[len(context) - 1 :], dim=1)
        sums.append(logprobs[torch.arange(len(target)), torch.tensor(target)].sum())
    return torch.stack(sums)


def full_logprobs(
    loaded: LoadedModel, prompt_PD: Tensor, sequences: Sequence[TokenSequence]
) -> list[Tensor]:
    """Log-probabilities [C] of each row's targets: every answer alone, nothing stored or padded.

    By `transformers` and its own masks from `inputs_embeds`; differentiable in the rows.
    """
    model: Any = loaded.model
    found = []
    for sequence in sequences:
        sums = []
        for target in sequence.targets:
            forget_longest_pass(model)
            embeds = spliced(loaded, prompt_PD, sequence, target[:-1])
            logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -len(target) :]
            logprobs = torch.log_softmax(logits.to(torch.float64), dim=1)
            sums.append(logprobs[torch.arange(len(target)), torch.tensor(target)].sum())
        found.append(torch.stack(sums))
    return found


def spliced(
    loaded: LoadedModel, prompt_PD: Tensor, sequence: TokenSequence, answer: Sequence[int] = ()
) -> Tensor:
    """Embeddings [1, T, D] of a sequence with its rows, those of later spans one by one."""
    table: Any = loaded.model.get_input_embeddings()
    before = table(torch.tensor(sequence.prefix, dtype=torch.long))
    after = table(torch.tensor([*sequence.suffix, *answer], dtype=torch.long))
    first = len(prompt_PD) - len(sequence.later)
    for row, at in zip(prompt_PD[first:].to(before), sequence.later, strict=True):
        after = torch.cat([after[:at], row[None], after[at + 1 :]])
    return torch.cat([before, prompt_PD[:first].to(before), after])[None]


def forget_longest_pass(model: Any) -> None:
    """Dynamic rotary scaling remembers its longest pass."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = 0


def noisy(rows_PD: Tensor, size: float = 0.1, seed: int = 0) -> Tensor:
    """Rows a share `size` of their norms away, so that nothing is zero by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows_PD.shape, generator=generator).to(rows_PD)
    scale = size * rows_PD.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return rows_PD + scale * noise


def cut(sequence: TokenSequence, prompt_ids: Sequence[int]) -> list[int]:
    """Prefix, spans and suffix of a row as it is deployed."""
    ids = [*sequence.suffix]
    first = len(prompt_ids) - len(sequence.later)
    for place, token in zip(sequence.later, prompt_ids[first:], strict=True):
        assert ids[place] == 0
        ids[place] = token
    return [*sequence.prefix, *prompt_ids[:first], *ids]


def reseal(folder: Path) -> None:
    """Write a prompt's digest again, as if what its JSON says now had been saved so."""
    path = folder / "prompt.json"
    values = {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k != "sha256"}
    rows = (folder / "prompt.safetensors").read_bytes()
    path.write_text(json.dumps(seal(values, rows)), "utf-8")
