"""Every answer in a pass of its own over the whole sequence, for models without prefix reuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.model.forward import FrozenModel
from embedgrad.model.packing import table
from embedgrad.model.token_logprobs import token_logprobs
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


def in_full(
    model: FrozenModel,
    rows_PD: Tensor,
    picked: Sequence[tuple[TokenSequence, Sequence[Ids]]],
    width: int,
) -> Tensor:
    """Summed log-probabilities [B, width] of the targets of each row; padding on the right."""
    if model.longest_reuse is not None and (len(picked), width) != (1, 1):
        # Rotary scaling by length sees the longest row of a batch, so each answer goes alone.
        lone = [
            [in_full(model, rows_PD, [(s, (ids,))], 1)[0, 0] for ids in targets]
            for s, targets in picked
        ]
        nothing = rows_PD.new_zeros(())
        return torch.stack([torch.stack(row + [nothing] * (width - len(row))) for row in lone])
    prompt = (0,) * len(rows_PD)
    lines = [
        (s.prefix + prompt + s.suffix, len(s.prefix), ids, b * width + c)
        for b, (s, targets) in enumerate(picked)
        for c, ids in enumerate(targets)
    ]
    longest = max(len(context) + len(ids) - 1 for context, _, ids, _ in lines)
    ids_BT = torch.zeros(len(lines), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    keep_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    prompt_at: list[int] = []
    wanted: list[int] = []
    cells: list[int] = []
    for i, (context, prefix, ids, cell) in enumerate(lines):
        full = context + ids[:-1]
        ids_BT[i, : len(full)] = torch.tensor(full)
        mask_BT[i, : len(full)] = 1
        keep_BT[i, len(context) - 1 : len(full)] = True
        prompt_at += range(i * longest + prefix, i * longest + prefix + len(prompt))
        wanted += ids
        cells += [cell] * len(ids)
    at, tokens, cells_W = (torch.tensor(n, dtype=torch.long) for n in (prompt_at, wanted, cells))
    put = model.device
    embeds = model.splice(ids_BT.to(put), at.to(put), rows_PD)
    logits = model.full_pass(embeds, mask_BT.to(put), keep_BT.to(put))
    logprobs = token_logprobs(logits, torch.arange(len(wanted), device=put), tokens.to(put))
    return table(logprobs, cells_W.to(put), (len(picked), width))
