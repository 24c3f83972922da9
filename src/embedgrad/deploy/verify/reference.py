"""What the training path computes, which every engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from embedgrad.deploy.job import ExportedPrompt
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.model.kv_cache import KVCache
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.packing import Packing
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

BATCH = 8  # examples per pass


@final
@dataclass(frozen=True)
class Reference:
    """What training computes for a prompt: B examples, V ids of the tokenizer.

    `texts` are greedy answers; `choices` are indices of the likeliest choices, None for free
    answers. An answer ends at one of `end_ids`.
    """

    logprobs_BV: Tensor
    texts: list[str]
    choices: list[int] | None
    end_ids: Ids


@torch.no_grad()
def compute_reference(
    model: LanguageModel,
    exported: ExportedPrompt,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
) -> Reference:
    """Run the training path, which reuses prefixes if the model allows it."""
    rows_PD = exported.prompt.rows
    end_ids = model.ends_of(exported.sequencer)
    decoding = Decoding(max_new_tokens=max_new_tokens)
    answers = replies(model, rows_PD, sequences, decoding, end_ids=end_ids, batch_size=BATCH)
    target = exported.sequencer.target
    choices: list[int] | None = None
    if target.choices:
        choices = []
        for start in range(0, len(sequences), BATCH):
            batch = sequences[start : start + BATCH]
            outcome = model.outcome(rows_PD, batch, normalize=target.normalize)
            choices += [int(i) for i in outcome.scores_BC.argmax(dim=1)]
    logprobs_BV = next_logprobs(model, rows_PD, sequences)
    return Reference(logprobs_BV, [answer.text for (answer,) in answers], choices, end_ids)


@torch.no_grad()
def next_logprobs(
    model: LanguageModel, rows_PD: Tensor, sequences: Sequence[TokenSequence]
) -> Tensor:
    """Log-probabilities [B, V] of the first token after each prompt, fp32, on the CPU.

    V counts the tokenizer's ids: embedding rows beyond them belong to no token.
    """
    ids = min(len(model.tokenizer), model.info.vocabulary)
    parts = []
    for start in range(0, len(sequences), 1 if model.one_by_one else BATCH):
        if model.one_by_one:
            logits = _in_full(model, rows_PD, sequences[start])
        else:
            logits = _from_prefixes(model, rows_PD, sequences[start : start + BATCH])
        parts.append(torch.log_softmax(logits.float(), dim=1)[:, :ids].cpu())
    return torch.cat(parts)


def _from_prefixes(
    model: LanguageModel, rows_PD: Tensor, sequences: Sequence[TokenSequence]
) -> Tensor:
    context = model.context_of(rows_PD, sequences)
    packing = Packing(len(context.rows_PD), 0)
    for before, sequence in zip(context.before, sequences, strict=True):
        packing.add(before, sequence.suffix, ())
    everyone = range(len(sequences))
    batch = packing.tensors(everyone, model.device)
    embeds = model.splice(batch.ids_BT, batch.prompt_at, context.rows_PD)
    last = torch.zeros_like(batch.keep_BT)
    last[:, -1] = True
    return model.logits(embeds, batch.slots, KVCache(context.cached(everyone)), last)


def _in_full(model: LanguageModel, rows_PD: Tensor, sequence: TokenSequence) -> Tensor:
    ids = sequence.prefix + (0,) * len(rows_PD) + sequence.suffix
    ids_BT = torch.tensor([ids], device=model.device)
    prompt_at = torch.arange(len(rows_PD), device=model.device) + len(sequence.prefix)
    embeds = model.splice(ids_BT, prompt_at, rows_PD)
    keep = torch.zeros_like(ids_BT, dtype=torch.bool)
    keep[:, -1] = True
    return model.full_pass(embeds, torch.ones_like(ids_BT), keep)
