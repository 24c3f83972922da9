"""Compute in training's own way what an export must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from embedgrad.deploy.job import ExportedPrompt
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import next_logits
from embedgrad.model.language_model import LanguageModel
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
    answers = model.generate(rows_PD, sequences, decoding, end_ids=end_ids, batch_size=BATCH)
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
    for start in range(0, len(sequences), BATCH):
        logits = next_logits(model, rows_PD, sequences[start : start + BATCH])
        parts.append(torch.log_softmax(logits.float(), dim=1)[:, :ids].cpu())
    return torch.cat(parts)
