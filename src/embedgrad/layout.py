"""Where every token of a batch goes, as tensors: ids, positions, branches, and what to read off.

A row is laid out as prompt, tail, then one branch per target, padded on the left. Branch 0 is the
trunk; a target's first token is read off the trunk's end, and its other tokens form its branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from embedgrad.cutting import Ids
from embedgrad.head_cache import Head


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one padded batch; see `Layout`."""

    ids_BT: Tensor
    positions_BT: Tensor
    branches_BT: Tensor
    keep_BT: Tensor
    prompt_at: Tensor
    wanted: list[int]
    logit_rows: Tensor
    cells: list[int]
    width: int

    def gather(self, logits_NV: Tensor) -> Tensor:
        """Summed log-probabilities [B, C] of the targets."""
        size = len(self.ids_BT)
        return summed(logits_NV, self.logit_rows, self.wanted, self.cells, size, self.width)


class Layout:
    """A batch in the making: prompt, tail, then one branch per target, padded on the left."""

    def __init__(self, prompt: int, width: int):
        self.prompt = prompt
        self.width = width
        self._rows: list[tuple[list[int], list[int], list[int]]] = []
        self._wanted: list[tuple[int, int, int, int]] = []

    def add(self, head: int, tail: Ids, targets: Sequence[Ids]) -> None:
        """Add a row whose head has `head` tokens."""
        row = len(self._rows)
        ids = [0] * self.prompt + list(tail)
        positions = list(range(head, head + len(ids)))
        branches = [0] * len(ids)
        end = len(ids) - 1
        for c, target in enumerate(targets):
            at = end
            for i, token in enumerate(target):
                self._wanted.append((row, at, token, c))
                if i + 1 < len(target):
                    at = len(ids)
                    ids.append(token)
                    positions.append(head + end + 1 + i)
                    branches.append(c + 1)
        self._rows.append((ids, positions, branches))

    def tensors(self, device: torch.device) -> Batch:
        """Pad and stack what was added."""
        longest = max(len(ids) for ids, _, _ in self._rows)
        padding = [longest - len(ids) for ids, _, _ in self._rows]

        def stack(which: int, fill: int) -> Tensor:
            rows = [[fill] * pad + row[which] for pad, row in zip(padding, self._rows, strict=True)]
            return torch.tensor(rows, dtype=torch.long, device=device)

        at = [(row, padding[row] + place) for row, place, _, _ in self._wanted]
        keep = torch.zeros(len(self._rows), longest, dtype=torch.bool)
        for row, place in at:
            keep[row, place] = True
        index = {tuple(cell): n for n, cell in enumerate(keep.nonzero().tolist())}
        prompt_at = [
            row * longest + pad + p for row, pad in enumerate(padding) for p in range(self.prompt)
        ]
        return Batch(
            ids_BT=stack(0, 0),
            positions_BT=stack(1, 0),
            branches_BT=stack(2, -1),
            keep_BT=keep.to(device),
            prompt_at=torch.tensor(prompt_at, dtype=torch.long, device=device),
            wanted=[token for _, _, token, _ in self._wanted],
            logit_rows=torch.tensor([index[cell] for cell in at], dtype=torch.long, device=device),
            cells=[row * self.width + c for row, _, _, c in self._wanted],
            width=self.width,
        )


def summed(
    logits_NV: Tensor, rows: Tensor, wanted: list[int], cells: list[int], size: int, width: int
) -> Tensor:
    """Log-probabilities of the wanted tokens, summed per cell of a [size, width] table."""
    logits = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    token = torch.tensor(wanted, dtype=torch.long, device=logits.device)
    # Normalized before picking, so that a row shared by several choices is normalized once.
    logprobs = logits[rows, token] - logits.logsumexp(dim=1)[rows]
    table = torch.zeros(size * width, dtype=logits.dtype, device=logits.device)
    cell = torch.tensor(cells, dtype=torch.long, device=logits.device)
    return table.index_add(0, cell, logprobs).view(size, width)


def stack_heads(heads: Sequence[Head]) -> DynamicCache | None:
    """Heads of a batch as a cache, padded on the left; one shared head is not copied."""
    longest = max(head.length for head in heads)
    if not longest:
        return None
    first = heads[0]
    if all(head is first for head in heads):
        keys = first.keys[:, None].expand(-1, len(heads), -1, -1, -1)
        values = first.values[:, None].expand(-1, len(heads), -1, -1, -1)
    else:
        layers, kv_heads = first.keys.shape[:2]
        shape = (layers, len(heads), kv_heads, longest)
        keys = first.keys.new_zeros(*shape, first.keys.shape[3])
        values = first.values.new_zeros(*shape, first.values.shape[3])
        for b, head in enumerate(heads):
            if head.length:
                keys[:, b, :, longest - head.length :] = head.keys
                values[:, b, :, longest - head.length :] = head.values
    past = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        past.update(k, v, layer)
    return past


def left_padded(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions and branches [B, K] of keys that are padded on the left to the longest row."""
    most = max(lengths)
    slots = torch.arange(most, device=device)[None, :]
    positions = slots - most + torch.tensor(lengths, device=device)[:, None]
    return positions, torch.where(positions >= 0, 0, -1)
