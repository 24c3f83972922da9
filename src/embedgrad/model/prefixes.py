"""Head reuse: what stands before the refined rows is computed once.

    heads_of:   heads -> their keys and values, built in batches of equal length
    past_of:    rows  -> what a batch's own tokens attend to, and where they begin

Where the prompt stands before all that differs between rows, it too is run once per batch, and its
keys and values, with their gradients, serve every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedgrad.model.forward import FrozenModel
from embedgrad.model.kv_cache import Past, Slots, Stretch, stack_heads
from embedgrad.model.loading import LoadedModel
from embedgrad.model.prefix_cache import Head, HeadCache
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

PASS_TOKENS = 2048  # of heads built at a time; a matrix product gains nothing from more
FEW = 16  # rows of a matrix from which its products have the same bits in any company


class Ahead(NamedTuple):
    """What stands before a batch's own tokens: heads, a shared prompt, tokens in each row.

    `rows_PD` are the refined rows that still stand among the own tokens.
    """

    heads: list[Head]
    prompt: Stretch | None
    before: list[int]
    rows_PD: Tensor

    def stretches(self, group: Sequence[int]) -> list[Stretch]:
        """What the given rows of the batch attend to."""
        stacked = stack_heads([self.heads[i] for i in group], self.rows_PD.device)
        return stacked if self.prompt is None else [*stacked, self.prompt]


class ReusingModel(FrozenModel):
    """A frozen model with stored heads."""

    def __init__(self, loaded: LoadedModel, heads: HeadCache):
        super().__init__(loaded)
        self.heads = heads
        self._openings: dict[Ids, Head] = {}
        self._token_bytes = 0  # of a token's keys and values; known once a head was built

    def past_of(self, rows_PD: Tensor, sequences: Sequence[TokenSequence]) -> Ahead:
        """What the tokens of these rows attend to; the prompt is left to them unless it is shared.

        `rows_PD` comes back empty where it has been run already.
        """
        heads = self.heads_of([s.head for s in sequences], [s.shared for s in sequences])
        before = [head.length for head in heads]
        first = sequences[0].head
        alike = all(s.tail and s.head == first for s in sequences)
        if len(sequences) == 1 or not len(rows_PD) or not alike:
            return Ahead(heads, None, before, rows_PD)
        positions = torch.arange(len(first), len(first) + len(rows_PD), device=self.device)[None]
        past, slots = Past(stack_heads(heads[:1], self.device)), Slots.trunk(positions)
        self.read(rows_PD[None].to(self.dtype), slots, past)
        prompt = past.as_stretch(slots)
        return Ahead(heads, prompt, [n + len(rows_PD) for n in before], rows_PD[:0])

    @torch.no_grad()
    def heads_of(self, wanted: Sequence[Ids], shared: Sequence[int] = ()) -> list[Head]:
        """Keys and values of heads, stored ones reused; the first `shared` tokens are template.

        On a CPU the bits of a sequencer's heads do not depend on what else is asked for or stored:
        an interrupted run, which starts with nothing stored, then gives the same rows.
        """
        openings = dict(zip(wanted, shared or [0] * len(wanted), strict=True))
        found = {ids: self.heads.get(ids) for ids in openings}
        missing: dict[tuple[Ids, int], list[Ids]] = {}
        for ids, opening in openings.items():
            if found[ids] is None:
                missing.setdefault((ids[:opening], len(ids)), []).append(ids)
        for opening_ids, group in _passes(missing):
            for ids, head in zip(group, self._build(opening_ids, group), strict=True):
                found[ids] = self.heads.put(ids, head)
        heads = [found[ids] for ids in wanted]
        return [head for head in heads if head is not None]

    @torch.no_grad()
    def prepare(self, sequences: Sequence[TokenSequence]) -> None:
        """Build the first of these rows' heads together, as far as they can be stored.

        Heads of one batch are seldom of one length, and matrix products of few rows are slow.
        """
        if self.reuse_off:
            return
        missing: dict[tuple[Ids, int], list[Ids]] = {}
        tokens = 0
        for ids, shared in {s.head: s.shared for s in sequences}.items():
            if tokens > PASS_TOKENS:
                break
            short = self.longest_reuse is None or len(ids) <= self.longest_reuse
            if short and ids not in self.heads:
                missing.setdefault((ids[:shared], len(ids)), []).append(ids)
                tokens += len(ids) - shared
        for opening_ids, group in _passes(missing):
            if self.heads.free < self._token_bytes * sum(map(len, group)):
                return
            self.heads.misses += len(group)
            for ids, head in zip(group, self._build(opening_ids, group), strict=True):
                self.heads.put(ids, head)

    def _build(self, opening: Ids, group: Sequence[Ids]) -> list[Head]:
        """Heads of one length that begin alike."""
        new = [ids[len(opening) :] for ids in group]
        if not new[0]:
            nothing = torch.empty(0, 0, 0, 0, dtype=self.dtype, device=self.device)
            return [self._opening(opening) if opening else Head(nothing, nothing)] * len(group)
        rows = new + new[:1] * (-(-FEW // len(new[0])) - len(new))
        positions = torch.arange(len(opening), len(group[0]), device=self.device)[None]
        first = [self._opening(opening)] if opening else []
        past = Past(stack_heads(first, self.device) if first else ())
        slots = Slots.trunk(positions.expand(len(rows), -1))
        self.read(self._embed(torch.tensor(rows, device=self.device)), slots, past)
        keys, values = torch.stack(past.own_keys, 1), torch.stack(past.own_values, 1)
        self._token_bytes = (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[3])
        return [
            Head(
                torch.cat([*(head.keys for head in first), keys[b]], dim=2),
                torch.cat([*(head.values for head in first), values[b]], dim=2),
            )
            for b in range(len(group))
        ]

    def _opening(self, ids: Ids) -> Head:
        """How many heads begin; a few are kept beside the budget."""
        if ids not in self._openings:
            if len(self._openings) == 2:
                self._openings.pop(next(iter(self._openings)))
            (self._openings[ids],) = self._build((), [ids])
        return self._openings[ids]


def _passes(missing: dict[tuple[Ids, int], list[Ids]]) -> Iterator[tuple[Ids, list[Ids]]]:
    """Heads by opening and length -> openings with as many heads as one pass takes."""
    for (opening, length), group in missing.items():
        size = max(1, PASS_TOKENS // max(1, length - len(opening)))
        for start in range(0, len(group), size):
            yield opening, group[start : start + size]
