"""embedgrad's side of every comparison, by its public interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedgrad import LanguageModel
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.prompt.sequence import TokenSequence

LEARNING_RATE = 1e-3


class Step(NamedTuple):
    """What a training step computed."""

    loss: float
    gradient_PD: Tensor


class Ours:
    """Training steps on one prompt's rows, scores and replies."""

    name = "embedgrad"

    def __init__(self, model: LanguageModel, prompt_ids: Sequence[int]):
        self.model = model
        self.start_PD = model.embed(prompt_ids)
        self.rows = self.start_PD.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.rows], lr=LEARNING_RATE, weight_decay=0.0)

    def reset(self) -> None:
        """Put the rows back to where they began."""
        with torch.no_grad():
            self.rows.copy_(self.start_PD)

    def build_prefixes(self, sequences: Sequence[TokenSequence]) -> None:
        """Have the prefixes stored, as after a first epoch."""
        self.model.prefixes_of([sequence.prefix for sequence in sequences])

    def step(self, sequences: Sequence[TokenSequence]) -> Step:
        """Loss of the right answers (mean over rows of the mean per token), gradient, AdamW."""
        self.optimizer.zero_grad()
        outcome = self.model.outcome(self.rows, sequences, choices=False)
        loss = -(outcome.answer_logprobs_B / outcome.answer_tokens_B).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        assert self.rows.grad is not None
        return Step(loss.item(), self.rows.grad.clone())

    @torch.no_grad()
    def choices(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probabilities [B, C] of all choices."""
        return self.model.outcome(self.start_PD, sequences).logprobs_BC

    @torch.no_grad()
    def candidates(self, prompts: Sequence[Tensor], sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probabilities [K, B] of the right answers with every candidate prompt."""
        outcomes = (self.model.outcome(rows, sequences, choices=False) for rows in prompts)
        return torch.stack([outcome.answer_logprobs_B for outcome in outcomes])

    def generate(self, sequences: Sequence[TokenSequence], new_tokens: int) -> list[str]:
        """Greedy replies of exactly this many tokens."""
        made = replies(
            self.model,
            self.start_PD,
            sequences,
            Decoding(max_new_tokens=new_tokens),
            end_ids=(),
            batch_size=len(sequences),
        )
        return [reply.text for (reply,) in made]
