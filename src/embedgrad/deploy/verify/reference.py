"""What the training path says, which every engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.deploy.job import Exported
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.model.kv_cache import KVCache
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
from embedgrad.model.packing import Packing
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

BATCH = 8  # rows per pass


@dataclass(frozen=True)
class Expected:
    """What training computed for a prompt: B rows, V ids of the tokenizer.

    `texts` are greedy answers; `chosen` are the likeliest choices, None for free answers. `end_ids`
    are where an answer ends.
    """

    logprobs_BV: Tensor
    texts: list[str]
    chosen: list[int] | None
    end_ids: Ids


@torch.no_grad()
def expected(
    model: LanguageModel, exported: Exported, rows: Sequence[TokenSequence], max_new_tokens: int
) -> Expected:
    """Ask the training path: prefixes reused where the model allows it, as in training."""
    rows_PD = exported.prompt.rows
    end_ids = model.ends_of(exported.sequencer)
    made = replies(
        model,
        rows_PD,
        rows,
        Decoding(max_new_tokens=max_new_tokens),
        end_ids=end_ids,
        batch_size=BATCH,
    )
    target = exported.sequencer.target
    chosen: list[int] | None = None
    if target.choices:
        chosen = []
        for start in range(0, len(rows), BATCH):
            outcome = model.outcome(
                rows_PD, rows[start : start + BATCH], normalize=target.normalize
            )
            chosen += likeliest(outcome)
    return Expected(
        next_logprobs(model, rows_PD, rows), [reply.text for (reply,) in made], chosen, end_ids
    )


def likeliest(outcome: Outcome) -> list[int]:
    """Index of the choice that each row's prediction is."""
    return [int(i) for i in outcome.scores_BC.argmax(dim=1)]


@torch.no_grad()
def next_logprobs(model: LanguageModel, rows_PD: Tensor, rows: Sequence[TokenSequence]) -> Tensor:
    """Log-probabilities [B, V] of the first token after each prompt, fp32, on the CPU.

    V counts the tokenizer's ids; rows of an embedding table beyond them stand for no token.
    """
    ids = min(len(model.tokenizer), model.info.vocabulary)
    parts = []
    for start in range(0, len(rows), 1 if model.one_by_one else BATCH):
        if model.one_by_one:
            logits = _in_full(model, rows_PD, rows[start])
        else:
            logits = _from_prefixes(model, rows_PD, rows[start : start + BATCH])
        parts.append(torch.log_softmax(logits.float(), dim=1)[:, :ids].cpu())
    return torch.cat(parts)


def _from_prefixes(model: LanguageModel, rows_PD: Tensor, rows: Sequence[TokenSequence]) -> Tensor:
    ahead = model.context_of(rows_PD, rows)
    layout = Packing(len(ahead.rows_PD), 0)
    for before, row in zip(ahead.before, rows, strict=True):
        layout.add(before, row.suffix, ())
    everyone = range(len(rows))
    batch = layout.tensors(everyone, model.device)
    embeds = model.splice(batch.ids_BT, batch.prompt_at, ahead.rows_PD)
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    return model.logits(embeds, batch.slots, KVCache(ahead.cached(everyone)), last)


def _in_full(model: LanguageModel, rows_PD: Tensor, row: TokenSequence) -> Tensor:
    ids_BT = torch.tensor([row.prefix + (0,) * len(rows_PD) + row.suffix], device=model.device)
    prompt_at = torch.arange(len(rows_PD), device=model.device) + len(row.prefix)
    embeds = model.splice(ids_BT, prompt_at, rows_PD)
    keep = torch.zeros_like(ids_BT, dtype=torch.bool)
    keep[:, -1] = True
    return model.full_pass(embeds, torch.ones_like(ids_BT), keep)
