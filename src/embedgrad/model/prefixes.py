"""Prefix reuse: what stands before the refined rows is computed once.

    prefixes_of:   prefixes -> their keys and values, built in batches of equal length
    context_of:    rows  -> what a batch's own tokens attend to, and where they begin

Where the prompt stands before all that differs between rows, it too is run once per batch, and its
keys and values, with their gradients, serve every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedgrad.model.forward import FrozenModel
from embedgrad.model.kv_cache import CachedKV, KVCache, TokenLayout, stack_prefixes
from embedgrad.model.loading import LoadedModel
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

PASS_TOKENS = 2048  # of prefixes built at a time; a matrix product gains nothing from more
FEW = 16  # rows of a matrix from which its products have the same bits in any company


class CachedContext(NamedTuple):
    """What stands before a batch's own tokens: prefixes, a shared prompt, tokens in each row.

    `rows_PD` are the refined rows that still stand among the own tokens.
    """

    prefixes: list[CachedPrefix]
    prompt: CachedKV | None
    before: list[int]
    rows_PD: Tensor

    def cached(self, group: Sequence[int]) -> list[CachedKV]:
        """What the given rows of the batch attend to."""
        stacked = stack_prefixes([self.prefixes[i] for i in group], self.rows_PD.device)
        return stacked if self.prompt is None else [*stacked, self.prompt]


class ReusingModel(FrozenModel):
    """A frozen model with stored prefixes."""

    def __init__(self, loaded: LoadedModel, prefixes: PrefixCache):
        super().__init__(loaded)
        self.prefix_cache = prefixes
        self._openings: dict[Ids, CachedPrefix] = {}
        self._token_bytes = 0  # of a token's keys and values; known once a prefix was built

    def context_of(self, rows_PD: Tensor, sequences: Sequence[TokenSequence]) -> CachedContext:
        """What the tokens of these rows attend to; the prompt is left to them unless it is shared.

        `rows_PD` comes back empty where it has been run already.
        """
        prefixes = self.prefixes_of([s.prefix for s in sequences], [s.shared for s in sequences])
        before = [prefix.length for prefix in prefixes]
        first = sequences[0].prefix
        alike = all(s.suffix and s.prefix == first for s in sequences)
        if len(sequences) == 1 or not len(rows_PD) or not alike:
            return CachedContext(prefixes, None, before, rows_PD)
        positions = torch.arange(len(first), len(first) + len(rows_PD), device=self.device)[None]
        past, slots = (
            KVCache(stack_prefixes(prefixes[:1], self.device)),
            TokenLayout.trunk(positions),
        )
        self.read(rows_PD[None].to(self.dtype), slots, past)
        prompt = past.as_cached(slots)
        return CachedContext(prefixes, prompt, [n + len(rows_PD) for n in before], rows_PD[:0])

    @torch.no_grad()
    def prefixes_of(self, wanted: Sequence[Ids], shared: Sequence[int] = ()) -> list[CachedPrefix]:
        """Keys and values of prefixes, stored ones reused; the first `shared` tokens are template.

        On a CPU the bits of a sequencer's prefixes do not depend on what else is asked for or
        stored: an interrupted run, which starts with nothing stored, then gives the same rows.
        """
        openings = dict(zip(wanted, shared or [0] * len(wanted), strict=True))
        found = {ids: self.prefix_cache.get(ids) for ids in openings}
        missing: dict[tuple[Ids, int], list[Ids]] = {}
        for ids, opening in openings.items():
            if found[ids] is None:
                missing.setdefault((ids[:opening], len(ids)), []).append(ids)
        for opening_ids, group in _passes(missing):
            for ids, prefix in zip(group, self._build(opening_ids, group), strict=True):
                found[ids] = self.prefix_cache.put(ids, prefix)
        prefixes = [found[ids] for ids in wanted]
        return [prefix for prefix in prefixes if prefix is not None]

    @torch.no_grad()
    def prepare(self, sequences: Sequence[TokenSequence]) -> None:
        """Build the first of these rows' prefixes together, as far as they can be stored.

        Prefixes of one batch are seldom of one length, and matrix products of few rows are slow.
        """
        if self.reuse_off:
            return
        missing: dict[tuple[Ids, int], list[Ids]] = {}
        tokens = 0
        for ids, shared in {s.prefix: s.shared for s in sequences}.items():
            if tokens > PASS_TOKENS:
                break
            short = self.longest_reuse is None or len(ids) <= self.longest_reuse
            if short and ids not in self.prefix_cache:
                missing.setdefault((ids[:shared], len(ids)), []).append(ids)
                tokens += len(ids) - shared
        for opening_ids, group in _passes(missing):
            if self.prefix_cache.free < self._token_bytes * sum(map(len, group)):
                return
            self.prefix_cache.misses += len(group)
            for ids, prefix in zip(group, self._build(opening_ids, group), strict=True):
                self.prefix_cache.put(ids, prefix)

    def _build(self, opening: Ids, group: Sequence[Ids]) -> list[CachedPrefix]:
        """Prefixes of one length that begin alike."""
        new = [ids[len(opening) :] for ids in group]
        if not new[0]:
            nothing = torch.empty(0, 0, 0, 0, dtype=self.dtype, device=self.device)
            return [self._opening(opening) if opening else CachedPrefix(nothing, nothing)] * len(
                group
            )
        rows = new + new[:1] * (-(-FEW // len(new[0])) - len(new))
        positions = torch.arange(len(opening), len(group[0]), device=self.device)[None]
        first = [self._opening(opening)] if opening else []
        past = KVCache(stack_prefixes(first, self.device) if first else ())
        slots = TokenLayout.trunk(positions.expand(len(rows), -1))
        self.read(self._embed(torch.tensor(rows, device=self.device)), slots, past)
        keys, values = torch.stack(past.own_keys, 1), torch.stack(past.own_values, 1)
        self._token_bytes = (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[3])
        return [
            CachedPrefix(
                torch.cat([*(prefix.keys for prefix in first), keys[b]], dim=2),
                torch.cat([*(prefix.values for prefix in first), values[b]], dim=2),
            )
            for b in range(len(group))
        ]

    def _opening(self, ids: Ids) -> CachedPrefix:
        """How many prefixes begin; a few are kept beside the budget."""
        if ids not in self._openings:
            if len(self._openings) == 2:
                self._openings.pop(next(iter(self._openings)))
            (self._openings[ids],) = self._build((), [ids])
        return self._openings[ids]


def _passes(missing: dict[tuple[Ids, int], list[Ids]]) -> Iterator[tuple[Ids, list[Ids]]]:
    """Prefixes by opening and length -> openings with as many prefixes as one pass takes."""
    for (opening, length), group in missing.items():
        size = max(1, PASS_TOKENS // max(1, length - len(opening)))
        for start in range(0, len(group), size):
            yield opening, group[start : start + size]
