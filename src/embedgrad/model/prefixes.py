"""Compute what precedes the refined rows once, and share it.

Where all sequences of a batch have the same prefix, the first span is run once per batch too, with
the further ones that nothing of a sequence's own precedes, and their keys and values, with their
gradients, serve every sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from embedgrad.model.forward import ForwardPass
from embedgrad.model.kv_cache import (
    CachedContext,
    CachedKV,
    FixedKVCache,
    TokenLayout,
    stack_prefixes,
)
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.prompt.boundaries import Ids, alike
from embedgrad.prompt.sequence import TokenSequence

PASS_TOKENS = 2048  # of prefixes built at a time; a matrix product gains nothing from more
FEW = 16  # tokens of a pass from which its matrix products have the same bits in any company


@final
class PrefixStore:
    """Builds prefixes by a forward pass and keeps them in a `PrefixCache`."""

    def __init__(self, forward: ForwardPass, cache: PrefixCache):
        self.forward = forward
        self.cache = cache
        self._openings: dict[Ids, CachedPrefix] = {}
        self._token_bytes = 0  # of a token's keys and values; known once a prefix was built

    def context_of(self, prompt_PD: Tensor, sequences: Sequence[TokenSequence]) -> CachedContext:
        """What the own tokens of these sequences attend to.

        Spans that they share, with what lies between, are run here; their rows are left out of the
        context's.
        """
        prefixes = self.prefixes_of([s.prefix for s in sequences], [s.shared for s in sequences])
        before = [prefix.length for prefix in prefixes]
        one = sequences[0]
        first = len(prompt_PD) - len(one.later)
        same = all(
            s.suffix and s.prefix == one.prefix and len(s.later) == len(one.later)
            for s in sequences
        )
        # Gradients that reach a layer by its keys alone do not gather weights that are shared out.
        apart = self.forward.lockstep.needed
        if len(sequences) == 1 or not first or not same or apart:
            return CachedContext(prefixes, None, before, prompt_PD)
        begun, more = _shared_spans(sequences)
        count, rows_PD = first + begun, prompt_PD[: first + more]
        device = self.forward.device
        ids = torch.tensor([(0,) * first + one.suffix[:begun]], device=device)
        at = torch.tensor([*range(first), *(first + i for i in one.later[:more])], device=device)
        positions = torch.arange(len(one.prefix), len(one.prefix) + count, device=device)[None]
        cache = FixedKVCache(stack_prefixes(prefixes[:1], device))
        layout = TokenLayout.trunk(positions)
        self.forward.fill(self.forward.splice(ids, at, rows_PD), layout, cache)
        prompt = CachedKV(cache.own_keys, cache.own_values, layout, plain=True)
        left_PD = prompt_PD[len(rows_PD) :]
        return CachedContext(prefixes, prompt, [n + count for n in before], left_PD, begun)

    @torch.no_grad()
    def prefixes_of(self, ids: Sequence[Ids], shared: Sequence[int] = ()) -> list[CachedPrefix]:
        """Keys and values of prefixes, stored ones reused; the first `shared` tokens are template.

        On a CPU the bits of a sequencer's prefixes do not depend on what else is asked for or
        stored, so that a resumed run, which starts with nothing stored, gives the same rows.
        """
        openings = dict(zip(ids, shared or [0] * len(ids), strict=True))
        stored = {prefix_ids: self.cache.get(prefix_ids) for prefix_ids in openings}
        missing = [(i, openings[i]) for i, prefix in stored.items() if prefix is None]
        for opening, group in _passes(missing):
            for i, prefix in zip(group, self._build(opening, group), strict=True):
                stored[i] = self.cache.put(i, prefix)
        return [kept for i in ids if (kept := stored[i]) is not None]

    @torch.no_grad()
    def prepare(self, sequences: Sequence[TokenSequence]) -> None:
        """Build the first of these sequences' prefixes together, as far as they can be stored.

        Prefixes of one batch are seldom of one length, and matrix products of few tokens are slow.
        """
        if self.forward.why_not_reusable is not None:
            return
        limit = self.forward.longest_reuse
        missing: list[tuple[Ids, int]] = []
        tokens = 0
        for ids, shared in {s.prefix: s.shared for s in sequences}.items():
            if (limit is None or len(ids) <= limit) and ids not in self.cache:
                missing.append((ids, shared))
                tokens += len(ids) - shared
            if tokens > PASS_TOKENS:
                break
        for opening, group in _passes(missing):
            if self.cache.free < self._token_bytes * sum(map(len, group)):
                return
            self.cache.misses += len(group)
            for ids, prefix in zip(group, self._build(opening, group), strict=True):
                self.cache.put(ids, prefix)

    def _build(self, opening: Ids, group: Sequence[Ids]) -> list[CachedPrefix]:
        """Prefixes of one length that begin alike."""
        forward = self.forward
        new = [ids[len(opening) :] for ids in group]
        if not new[0]:
            nothing = torch.empty(0, 0, 0, 0, dtype=forward.dtype, device=forward.device)
            one = self._opening(opening) if opening else CachedPrefix(nothing, nothing)
            return [one] * len(group)
        batch = new + new[:1] * (-(-FEW // len(new[0])) - len(new))
        positions = torch.arange(len(opening), len(group[0]), device=forward.device)[None]
        first = [self._opening(opening)] if opening else []
        cache = FixedKVCache(stack_prefixes(first, forward.device) if first else ())
        layout = TokenLayout.trunk(positions.expand(len(batch), -1))
        forward.fill(forward.embed(torch.tensor(batch, device=forward.device)), layout, cache)
        keys, values = (
            torch.stack([part.to(forward.device) for part in parts], 1)
            for parts in (cache.own_keys, cache.own_values)
        )
        self._token_bytes = (keys.nbytes + values.nbytes) // (keys.shape[0] * keys.shape[3])
        built = []
        for b in range(len(group)):
            parts = zip(*first, (keys[b], values[b]), strict=True)
            built.append(CachedPrefix(*(torch.cat(part, dim=2) for part in parts)))
        return built

    def _opening(self, ids: Ids) -> CachedPrefix:
        """The shared beginning of prefixes; a few are kept beside the budget."""
        if ids not in self._openings:
            if len(self._openings) == 2:
                self._openings.pop(next(iter(self._openings)))
            (self._openings[ids],) = self._build((), [ids])
        return self._openings[ids]


def _shared_spans(sequences: Sequence[TokenSequence]) -> tuple[int, int]:
    """Tokens of the suffix up to the last further span that all share, and the rows among them."""
    one, rest = sequences[0], sequences[1:]
    # The last token stays each sequence's own: there its answer is read.
    shared = min(
        [len(s.suffix) - 1 for s in sequences] + [alike(one.suffix, s.suffix) for s in rest]
    )
    rows = min([len(one.later)] + [alike(one.later, s.later) for s in rest])
    while rows and one.later[rows - 1] >= shared:
        rows -= 1
    return (one.later[rows - 1] + 1 if rows else 0), rows


def _passes(prefixes: Sequence[tuple[Ids, int]]) -> Iterator[tuple[Ids, list[Ids]]]:
    """Prefixes with their shared tokens -> openings, each with the prefixes of one pass."""
    alike: dict[tuple[Ids, int], list[Ids]] = {}
    for ids, shared in prefixes:
        alike.setdefault((ids[:shared], len(ids)), []).append(ids)
    for (opening, length), group in alike.items():
        size = max(1, PASS_TOKENS // max(1, length - len(opening)))
        for start in range(0, len(group), size):
            yield opening, group[start : start + size]
