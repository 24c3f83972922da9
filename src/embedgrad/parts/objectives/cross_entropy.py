"""Cross-entropy of the correct answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.base import Objective


@final
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Make the right answer more likely.

    over the answer:   loss = -(1/n) sum_t log p(token_t | before it)      nats per token
    over the choices:  loss = -log softmax(scores)[right choice]           nats per choice
    where a choice's score is its log-probability (per token with target.normalize).
    Source: EmbedGrad, https://arxiv.org/abs/2508.03533 (over the answer).
    """

    is_mean: ClassVar[bool] = True

    over: Literal["auto", "answer", "choices"] = "auto"
    """What the probability is shared among; auto: the choices where there are any."""

    def needs_choices(self, *, available: bool) -> bool:
        return self.over == "choices" or (self.over == "auto" and available)

    def losses(self, outcome: Outcome) -> Tensor:
        available = outcome.logprobs_BC.shape[1] > 1
        if self.needs_choices(available=available):
            if not available:  # a softmax over one is 1, and teaches nothing
                problem = "'choices', but there are none; name them in target.choices"
                raise RecipeError("objective.over", [problem])
            shares_BC = torch.log_softmax(outcome.scores_BC, dim=1)
            return -shares_BC.gather(1, outcome.gold_B[:, None]).squeeze(1)
        return -outcome.answer_logprobs_B / outcome.answer_tokens_B.clamp(min=1)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return losses_B.mean()
