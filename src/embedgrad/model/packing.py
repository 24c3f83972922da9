"""Batch packing: lay out a batch's tokens as padded tensors.

A sequence is laid out as prompt, suffix, then the tree of its targets, padded on the left. A
target's first token is read at the suffix's end; the tokens behind it branch off there, and targets
that begin alike share their beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from embedgrad.model.kv_cache import TRUNK, CachedContext, TokenLayout
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import DROPPED, TokenSequence

Scored = Sequence[tuple[TokenSequence, Sequence[Ids], Sequence[Ids]]]
"""Sequences with the targets to score behind each, and the tokens to read for themselves at each
place of the right one."""

PASS_COST = 64  # tokens that could be computed in the time that one more pass costs


def full_context(sequence: TokenSequence, prompt: int) -> tuple[Ids, list[int]]:
    """Ids of prefix, prompt (`prompt` rows, zeros) and suffix; and the rows' places, in order."""
    first, start = prompt - len(sequence.later), len(sequence.prefix)
    places = [*range(start, start + first), *(start + first + at for at in sequence.later)]
    return sequence.context((0,) * prompt), places


@final
class PackedBatch(NamedTuple):
    """Tensors of one padded batch; see `Packing`.

    `prompt_at` are flat positions of the prompt's rows. Target token w is `tokens[w]`, read at kept
    place number `places[w]` and counted in cell `cells[w]` of a table of `shape` [B, C].
    """

    ids_BT: Tensor
    layout: TokenLayout
    keep_BT: Tensor
    prompt_at: Tensor
    places: Tensor
    tokens: Tensor
    cells: Tensor
    shape: tuple[int, int]


@final
class Packing:
    """Collects sequences, each with `prompt` rows of its own and up to `width` targets.

    Up to `more` tokens of a sequence are read for themselves, into the cells behind its targets'.
    The first `begun` tokens of every suffix are left out.
    """

    def __init__(self, prompt: int, width: int, more: int = 0, begun: int = 0):
        self.prompt = prompt
        self.begun = begun
        self.width = width
        self.more = more
        self._packed: list[_Packed] = []

    @classmethod
    def behind(cls, context: CachedContext, scored: Scored, width: int, more: int = 0) -> Packing:
        """The sequences of a context, each with its targets and what else to read."""
        packing = cls(len(context.prompt_PD), width, more, context.begun)
        for before, sequence in zip(context.before, scored, strict=True):
            packing.add(before, *sequence)
        return packing

    def add(
        self, before: int, sequence: TokenSequence, targets: Sequence[Ids], read: Sequence[Ids] = ()
    ) -> None:
        """Add a sequence's own tokens, which follow `before` others.

        `read` are the tokens to read for themselves at each place of the right answer.
        """
        later = [at - self.begun for at in sequence.later if at >= self.begun]
        first = self.prompt - len(later)
        packed = _Packed(before, [0] * first + list(sequence.suffix[self.begun :]))
        packed.prompt_at = [*range(first), *(first + at for at in later)]
        packed.branch([(ids, sequence.inputs_of(ids)) for ids in targets])
        right = sequence.gold if len(targets) > 1 else 0
        places = [at for at, _, c in packed.reads if c == right]
        packed.reads += [(places[t], token, cell) for t, token, cell in cells_of(read, self.width)]
        self._packed.append(packed)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(packed.ids) for packed in self._packed]

    def tensors(self, group: Sequence[int], device: torch.device) -> PackedBatch:
        """Pad and stack the sequences of a group."""
        batch = [self._packed[i] for i in group]
        longest = max(len(packed.ids) for packed in batch)
        padded = [(longest - len(packed.ids), packed) for packed in batch]

        def stack(name: str, fill: int) -> Tensor:
            lines = [[fill] * pad + getattr(packed, name) for pad, packed in padded]
            return torch.tensor(lines, dtype=torch.long).to(device)

        def indices(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        reads = [
            (b, pad + at, token, b * (self.width + self.more) + c)
            for b, (pad, packed) in enumerate(padded)
            for at, token, c in packed.reads
        ]
        prompt_at = [
            b * longest + p + at for b, (p, packed) in enumerate(padded) for at in packed.prompt_at
        ]
        keep = torch.zeros(len(batch), longest, dtype=torch.bool)
        kept = sorted({(b, at) for b, at, _, _ in reads})
        number = {place: n for n, place in enumerate(kept)}
        for place in kept:
            keep[place] = True
        return PackedBatch(
            ids_BT=stack("ids", 0),
            layout=TokenLayout(stack("positions", 0), stack("enter", -1), stack("leave", -1)),
            keep_BT=keep.to(device),
            prompt_at=indices(prompt_at),
            places=indices([number[b, at] for b, at, _, _ in reads]),
            tokens=indices([token for _, _, token, _ in reads]),
            cells=indices([cell for *_, cell in reads]),
            shape=(len(batch), self.width + self.more),
        )


@final
class _Packed:
    """One sequence: its tokens with their layout, and (place, token, target) of what is read."""

    def __init__(self, before: int, ids: list[int]):
        self.ids = ids
        self.prompt_at: list[int] = []
        self.positions = list(range(before, before + len(ids)))
        self.enter = [0] * len(ids)
        self.leave = [TRUNK] * len(ids)
        self.reads: list[tuple[int, int, int]] = []

    def branch(self, targets: Sequence[tuple[Ids, Ids]]) -> None:
        """Add the tree of the targets, each with the inputs that the model reads, to the trunk."""
        # To do: a node's children, or (None) its end. Answers are too deep to recurse.
        waiting: list[tuple[int, int, dict[int, tuple[Ids, Ids]] | None]] = [
            (len(self.ids) - 1, 0, dict(enumerate(targets)))
        ]
        while waiting:
            at, depth, below = waiting.pop()
            if below is None:
                self.leave[at] = len(self.ids)
                continue
            if depth:
                parent, at = at, len(self.ids)
                self.ids.append(next(iter(below.values()))[1][depth - 1])
                self.positions.append(self.positions[parent] + 1)
                self.enter.append(at)
                self.leave.append(at)  # an empty interval: no token sees it
                if self.ids[at] != DROPPED:
                    waiting.append((at, depth, None))
            following: dict[int, dict[int, tuple[Ids, Ids]]] = {}
            for c, (ids, inputs) in below.items():
                if depth < len(ids):
                    self.reads.append((at, ids[depth], c))
                    if depth + 1 < len(ids):
                        following.setdefault(inputs[depth], {})[c] = ids, inputs
            waiting += [(at, depth + 1, more) for more in reversed(following.values())]


def cells_of(read: Sequence[Ids], first: int) -> Iterator[tuple[int, int, int]]:
    """Place, token and cell of every token to read for itself, from the cell `first` on."""
    tokens = ((place, token) for place, ids in enumerate(read) for token in ids)
    return ((place, token, first + n) for n, (place, token) in enumerate(tokens))


def table(logprobs_W: Tensor, cells_W: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sums of log-probabilities per cell of a table."""
    empty = logprobs_W.new_zeros(shape[0] * shape[1])
    return empty.index_add(0, cells_W, logprobs_W).view(shape)


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split sequences into passes with the least padding plus cost of the passes.

    Sequences of like length go together; the indices of a pass are in order.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost, cut = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        price, start = min(
            (cost[start] + (end - start) * longest + PASS_COST, start) for start in range(end)
        )
        cost.append(price)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]
