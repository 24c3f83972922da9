"""What the training path says, which every engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.deploy.job import Exported
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import next_logits, replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
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
    for start in range(0, len(rows), BATCH):
        logits = next_logits(model, rows_PD, rows[start : start + BATCH])
        parts.append(torch.log_softmax(logits.float(), dim=1)[:, :ids].cpu())
    return torch.cat(parts)
