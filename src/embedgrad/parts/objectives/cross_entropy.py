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
    over both:         loss = the sum of the two, and the answer includes the end of the turn
    where a choice's score is its log-probability (per token with target.normalize). The choices
    alone teach the ranking among them, but not to answer with one of them at all.
    Source: EmbedGrad, https://arxiv.org/abs/2508.03533 (over the answer).
    """

    is_mean: ClassVar[bool] = True

    over: Literal["auto", "answer", "choices", "both"] = "auto"
    """What the probability is shared among; auto: both where there are choices, else the answer."""

    @property
    def needs_end(self) -> bool:
        return self.over in ("auto", "both")

    def needs_choices(self, *, available: bool) -> bool:
        return self.over in ("choices", "both") or (self.over == "auto" and available)

    def losses(self, outcome: Outcome) -> Tensor:
        return torch.stack([*self.terms(outcome).values()]).sum(0)

    def terms(self, outcome: Outcome) -> dict[str, Tensor]:
        """The loss over the "answer", that over the "choices", or both; each of shape [B]."""
        available = outcome.logprobs_BC.shape[1] > 1
        chosen = self.needs_choices(available=available)
        if chosen and not available:  # a softmax over one is 1, and teaches nothing
            problem = f"{self.over!r}, but there are no choices; name them in target.choices"
            raise RecipeError("objective.over", [problem])
        terms = {}
        if chosen:
            shares_BC = torch.log_softmax(outcome.scores_BC, dim=1)
            terms["choices"] = -shares_BC.gather(1, outcome.gold_B[:, None]).squeeze(1)
        if self.over != "choices":
            answer_B, tokens_B = -outcome.answer_logprobs_B, outcome.answer_tokens_B
            if self.needs_end and outcome.end_logprobs_B is not None:
                answer_B, tokens_B = answer_B - outcome.end_logprobs_B, tokens_B + 1
            terms["answer"] = answer_B / tokens_B.clamp(min=1)
        return terms

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return losses_B.mean()
