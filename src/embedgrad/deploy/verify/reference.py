"""Compute in training's own way what an export must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from embedgrad.deploy.job import ExportedPrompt
from embedgrad.events import Report, quiet, scoring
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import next_logits, replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

BATCH = 8  # examples per pass


@final
@dataclass(frozen=True)
class Reference:
    """What training computes for a prompt: B examples, V ids of the tokenizer.

    `texts` are greedy answers, `choices` indices of the likeliest choices: one of them is None.
    An answer ends at one of `end_ids`.
    """

    logprobs_BV: Tensor
    texts: list[str] | None
    choices: list[int] | None
    end_ids: Ids


@torch.no_grad()
def compute_reference(
    model: LanguageModel,
    exported: ExportedPrompt,
    sequences: Sequence[TokenSequence],
    max_new_tokens: int,
    report: Report = quiet,
) -> Reference:
    """Run the training path, which reuses prefixes if the model allows it."""
    rows_PD = exported.prompt.rows
    end_ids = model.ends_of(exported.sequencer)
    target = exported.sequencer.target
    texts: list[str] | None = None
    choices: list[int] | None = None
    if not target.choices:
        decoding = Decoding(max_new_tokens=max_new_tokens)
        answers = replies(
            model, rows_PD, sequences, decoding, end_ids=end_ids, batch_size=BATCH, report=report
        )
        texts = [answer.text for (answer,) in answers]
    else:
        choices = []
        for start in range(0, len(sequences), BATCH):
            batch = sequences[start : start + BATCH]
            outcome = model.outcome(rows_PD, batch, normalize=target.normalize)
            choices += [int(i) for i in outcome.scores_BC.argmax(dim=1)]
            report(scoring("rows", len(choices), len(sequences)))
    logprobs_BV = next_logprobs(model, rows_PD, sequences)
    return Reference(logprobs_BV, texts, choices, end_ids)


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
