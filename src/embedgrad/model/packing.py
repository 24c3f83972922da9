"""Where every token of a batch goes, as tensors: ids, slots, and what to read off.

A row is laid out as prompt, suffix, then the tree of its targets, padded on the left. A target's
first token is read off the suffix's end; the tokens behind it branch off there, and targets that
begin alike share their beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.model.kv_cache import TRUNK, TokenLayout
from embedgrad.prompt.boundaries import Ids

PASS_COST = 64  # tokens that could be computed in the time by which a pass of its own is dearer


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one padded batch; see `Packing`. `rows` and `tokens` [W] are what to read off."""

    ids_BT: Tensor
    slots: TokenLayout
    keep_BT: Tensor
    prompt_at: Tensor
    rows: Tensor
    tokens: Tensor
    cells: Tensor
    shape: tuple[int, int]

    def table(self, logprobs_W: Tensor) -> Tensor:
        """Summed log-probabilities [B, C] of the targets."""
        return table(logprobs_W, self.cells, self.shape)


class Packing:
    """A batch in the making; `prompt` counts the refined rows that stand in it, `width` targets."""

    def __init__(self, prompt: int, width: int):
        self.prompt = prompt
        self.width = width
        self._rows: list[_Row] = []

    def add(self, before: int, suffix: Ids, targets: Sequence[Ids]) -> None:
        """Add a row that goes on from `before` tokens."""
        row = _Row(before, [0] * self.prompt + list(suffix))
        row.branch(targets)
        self._rows.append(row)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self._rows]

    def tensors(self, group: Sequence[int], device: torch.device) -> Batch:
        """Pad and stack the rows of a group."""
        picked = [self._rows[i] for i in group]
        longest = max(len(row.ids) for row in picked)
        padding = [longest - len(row.ids) for row in picked]

        def stack(name: str, fill: int) -> Tensor:
            rows = [
                [fill] * pad + getattr(row, name) for pad, row in zip(padding, picked, strict=True)
            ]
            return torch.tensor(rows, dtype=torch.long).to(device)

        wanted = [
            (b, pad + at, token, b * self.width + c)
            for b, (pad, row) in enumerate(zip(padding, picked, strict=True))
            for at, token, c in row.wanted
        ]
        keep = torch.zeros(len(picked), longest, dtype=torch.bool)
        read = sorted({(b, at) for b, at, _, _ in wanted})
        index = {place: n for n, place in enumerate(read)}
        for place in read:
            keep[place] = True
        prompt_at = [
            b * longest + pad + p for b, pad in enumerate(padding) for p in range(self.prompt)
        ]
        rows = [index[b, at] for b, at, _, _ in wanted]
        return Batch(
            ids_BT=stack("ids", 0),
            slots=TokenLayout(stack("positions", 0), stack("enter", -1), stack("leave", -1)),
            keep_BT=keep.to(device),
            prompt_at=torch.tensor(prompt_at, dtype=torch.long, device=device),
            rows=torch.tensor(rows, dtype=torch.long, device=device),
            tokens=torch.tensor([w[2] for w in wanted], dtype=torch.long, device=device),
            cells=torch.tensor([w[3] for w in wanted], dtype=torch.long, device=device),
            shape=(len(picked), self.width),
        )


class _Row:
    """One row: its tokens with their slots, and (place, token, target) of what is read off."""

    def __init__(self, before: int, ids: list[int]):
        self.ids = ids
        self.positions = list(range(before, before + len(ids)))
        self.enter = [0] * len(ids)
        self.leave = [TRUNK] * len(ids)
        self.wanted: list[tuple[int, int, int]] = []

    def branch(self, targets: Sequence[Ids]) -> None:
        """Add the tree of the targets behind the trunk."""
        # What is left to do: a node's children, or (None) its end. Answers are too deep to recurse.
        waiting: list[tuple[int, int, dict[int, Ids] | None]] = [
            (len(self.ids) - 1, 0, dict(enumerate(targets)))
        ]
        while waiting:
            at, depth, below = waiting.pop()
            if below is None:
                self.leave[at] = len(self.ids)
                continue
            if depth:
                at = self._append(at, next(iter(below.values()))[depth - 1])
                waiting.append((at, depth, None))
            following: dict[int, dict[int, Ids]] = {}
            for c, ids in below.items():
                if depth < len(ids):
                    self.wanted.append((at, ids[depth], c))
                    if depth + 1 < len(ids):
                        following.setdefault(ids[depth], {})[c] = ids
            waiting += [(at, depth + 1, more) for more in reversed(following.values())]

    def _append(self, after: int, token: int) -> int:
        """Add a token behind the one at a place; returns its own place."""
        place = len(self.ids)
        self.ids.append(token)
        self.positions.append(self.positions[after] + 1)
        self.enter.append(place)
        self.leave.append(TRUNK)
        return place


def table(logprobs_W: Tensor, cells_W: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sums of log-probabilities per cell of a table."""
    empty = logprobs_W.new_zeros(shape[0] * shape[1])
    return empty.index_add(0, cells_W, logprobs_W).view(shape)


def passes(lengths: Sequence[int]) -> list[list[int]]:
    """Split rows into passes so that padding and the price of a pass are least.

    Rows of like length go together; the indices of a pass are in order.
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
