"""Answers that are decoded together, and rows that change hands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.model.decoding import NOT_FINITE, Generation, draw
from embedgrad.model.kv_cache import CachedContext, GrowingKVCache, TokenLayout
from embedgrad.model.packing import Packing
from embedgrad.prompt.sequence import TokenSequence

if TYPE_CHECKING:
    from embedgrad.model.language_model import LanguageModel


@final
class AnswerBatch:
    """Answers that are decoded together, each with its last token, its position and its keys."""

    def __init__(
        self,
        generations: Sequence[Generation],
        token_N: Tensor,
        positions_N1: Tensor,
        cache: GrowingKVCache,
    ):
        self.generations = generations
        self.token_N, self.positions_N1, self.cache = token_N, positions_N1, cache

    @classmethod
    def enter(
        cls,
        model: LanguageModel,
        context: CachedContext,
        entering: Sequence[tuple[TokenSequence, Sequence[Generation]]],
    ) -> AnswerBatch:
        """Read sequences and choose the first token of each of their answers."""
        logits, positions, cache = read(model, context, [sequence for sequence, _ in entering])
        counts = torch.tensor([len(some) for _, some in entering], device=model.device)
        if counts.max() > 1:
            kept = torch.arange(len(entering), device=model.device).repeat_interleave(counts)
            cache = GrowingKVCache.join([(cache, kept)])
            logits, positions = logits[kept], positions[kept]
        generations = [generation for _, some in entering for generation in some]
        batch = cls(generations, torch.zeros_like(positions[:, 0]), positions, cache)
        batch._choose(logits)
        return batch

    @classmethod
    def join(cls, parts: Sequence[AnswerBatch]) -> AnswerBatch:
        """The answers of several batches that are not over."""
        left = [[i for i, g in enumerate(p.generations) if not g.over] for p in parts]
        kept = [
            torch.tensor(own, device=part.token_N.device, dtype=torch.long)
            for own, part in zip(left, parts, strict=True)
        ]
        pairs = list(zip(parts, kept, strict=True))
        return cls(
            [part.generations[i] for own, part in zip(left, parts, strict=True) for i in own],
            torch.cat([part.token_N[rows] for part, rows in pairs]),
            torch.cat([part.positions_N1[rows] for part, rows in pairs]),
            GrowingKVCache.join([(part.cache, rows) for part, rows in pairs if len(rows)]),
        )

    @property
    def over(self) -> int:
        """How many answers are over."""
        return sum(generation.over for generation in self.generations)

    def step(self, model: LanguageModel) -> int:
        """Choose the next token of every answer; returns how many ended with it."""
        moving = torch.tensor([not g.over for g in self.generations], device=model.device)
        # A finished one stays where it is: there may be no position behind it.
        self.positions_N1 = self.positions_N1 + moving[:, None].long()
        embeds = model.forward.embed(self.token_N[:, None])
        layout, last = TokenLayout.trunk(self.positions_N1), torch.ones_like(moving)[:, None]
        before = self.over
        self._choose(model.forward.logits(embeds, layout, self.cache, last))
        return self.over - before

    def _choose(self, logits_NV: Tensor) -> None:
        self.token_N = choose(logits_NV, self.generations)
        for generation, new in zip(self.generations, self.token_N.tolist(), strict=True):
            generation.add(new)


def read(
    model: LanguageModel, context: CachedContext, sequences: Sequence[TokenSequence]
) -> tuple[Tensor, Tensor, GrowingKVCache]:
    """Logits [B, V] and positions [B, 1] of each sequence's last token, and the cache behind."""
    packing = Packing.behind(context, [(sequence, (), ()) for sequence in sequences], 0)
    everyone = range(len(sequences))
    batch = packing.tensors(everyone, model.device)
    cache = GrowingKVCache(context.collect(everyone), len(sequences))
    embeds = model.forward.splice(batch.ids_BT, batch.prompt_at, context.prompt_PD)
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    logits = model.forward.logits(embeds, batch.layout, cache, last)
    return logits, batch.layout.positions[:, -1:], cache


def choose(logits_NV: Tensor, generations: Sequence[Generation]) -> Tensor:
    """The next token [N] of every generation; any where one is over."""
    running = [i for i, generation in enumerate(generations) if not generation.over]
    if not generations[0].decoding.temperature:
        highest_N, chosen_N = logits_NV.max(dim=1)  # NaN where any logit is
        if not highest_N[running].isfinite().all():
            raise ModelError(NOT_FINITE)
        return chosen_N
    uniform = [generations[i].next_uniform() for i in running]
    some = logits_NV if len(running) == len(generations) else logits_NV[running]
    drawn_R = draw(some, generations[0].decoding, uniform)
    return drawn_R.new_zeros(len(generations)).index_copy(
        0, torch.tensor(running, device=drawn_R.device), drawn_R
    )
