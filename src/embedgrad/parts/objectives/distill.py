"""Distillation: learn a teacher's next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Gt
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.base import Objective, Sampling
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

TAUGHT = "teacher"  # the entry of an example's `extra` that holds what its teacher says
_LEAST = 1e-9  # share of all other tokens, below which it is rounding


@final
@dataclass(frozen=True)
class Taught:
    """What a teacher says of one row, in nats.

    `ids` are K tokens in each of the T places of the right answer, the likeliest ones for it or
    for its student; `logprobs_TK` are their log-probabilities. Of choices `shares_C` are the
    log-probabilities among themselves and `end` is that of ending the turn behind the right one;
    None where there is none.
    """

    ids: tuple[Ids, ...]
    logprobs_TK: Tensor
    shares_C: Tensor | None = None
    end: float | None = None


@final
@dataclass(frozen=True)
class Distill(Objective):
    """Answer as a teacher does: the same frozen model with another prompt, see `[teacher]`.

    loss = (1/n) sum_t KL(teacher || student) over next tokens            nats per token
    on an answer of n tokens that the teacher wrote, the end of the turn included. The KL is between
    k + 1 shares: those of the teacher's k likeliest tokens, and that of all others together, which
    is at most the KL over the whole vocabulary. With choices, the answer is the one that the
    teacher finds likeliest, and
    loss += KL(teacher || student) over the choices                       nats per choice
    as the tokens of one choice say little about the ranking of the others, and the ranking does not
    teach to answer with a choice at all. Labels are not read.

    direction = "reverse" learns from answers that the student samples with the rows as they are at
    each step, so that it is corrected where it goes itself:
    loss = (1/n) sum_t KL(student || teacher)                             nats per token
    with the student's k likeliest tokens told apart. Each place's divergence is exact up to the
    bucket, not an estimate from the token that was drawn. What was drawn is taken as given: the
    gradient through the sampling itself is left out, as in the source. It is for free answers:
    there is nothing to sample where all choices are known.
    Source: context distillation, Askell et al. 2021, https://arxiv.org/abs/2112.00861, section 3,
    and Snell et al. 2022, https://arxiv.org/abs/2209.15189; reverse: on-policy GKD, Agarwal et al.
    2023, https://arxiv.org/abs/2306.13649, section 3.1, with a teacher that reads more:
    https://arxiv.org/abs/2602.12275.
    """

    is_mean: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    top: Annotated[int, Gt(0)] = 32
    """Number k of likely tokens compared one by one at each position: the teacher's likeliest, or
    with reverse the student's. All others count as one."""
    direction: Literal["forward", "reverse"] = "forward"
    """Whether the teacher or the student writes the answers, and comes first in the KL."""
    samples: Annotated[int, Gt(0)] = 1
    """With reverse: answers per query and step."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """With reverse: the student's sampling temperature; 1: its own distribution."""
    max_new_tokens: Annotated[int, Gt(0)] | None = None
    """With reverse: longest answer, in tokens; unset: evaluation.max_new_tokens."""

    @property
    def sampling(self) -> Sampling | None:
        if self.direction == "forward":
            return None
        return Sampling(self.samples, self.temperature, self.max_new_tokens)

    @property
    def needs_end(self) -> bool:
        return True

    def needs_choices(self, *, available: bool) -> bool:
        return available

    def tokens_to_read(self, sequence: TokenSequence) -> Sequence[Ids]:
        return _taught(sequence.example.extra.get(TAUGHT)).ids

    def losses(self, outcome: Outcome) -> Tensor:
        taught = [_taught(cell) for cell in outcome.extra.get(TAUGHT, [None])]
        assert outcome.token_logprobs_BTK is not None
        return torch.stack([self._loss(outcome, b, t) for b, t in enumerate(taught)])

    def _loss(self, outcome: Outcome, b: int, taught: Taught) -> Tensor:
        assert outcome.token_logprobs_BTK is not None
        tokens, student_TK = len(taught.ids), outcome.token_logprobs_BTK[b, : len(taught.ids)]
        sum_ = bucketed_kl(*self._order(taught.logprobs_TK.to(student_TK), student_TK)).sum()
        if taught.end is not None and outcome.end_logprobs_B is not None:
            student_11 = outcome.end_logprobs_B[b].view(1, 1)
            teacher_11 = torch.full_like(student_11, taught.end)
            sum_ = sum_ + bucketed_kl(*self._order(teacher_11, student_11)).sum()
            tokens += 1
        loss = sum_ / tokens
        if taught.shares_C is None:
            return loss
        scores_C = outcome.scores_BC[b, : len(taught.shares_C)]
        p_C, q_C = self._order(taught.shares_C.to(scores_C), torch.log_softmax(scores_C, 0))
        return loss + (p_C.exp() * (p_C - q_C)).sum()

    def _order(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        return (teacher, student) if self.direction == "forward" else (student, teacher)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return losses_B.mean()


def bucketed_kl(p_TK: Tensor, q_TK: Tensor) -> Tensor:
    """KL(p || q) [T] in nats between the shares of K tokens and of all others."""
    p_rest_T, q_rest_T = (
        (1 - logprobs.double().exp().sum(1)).clamp(min=_LEAST).to(logprobs)
        for logprobs in (p_TK, q_TK)
    )
    told_T = (p_TK.exp() * (p_TK - q_TK)).sum(1)
    return told_T + p_rest_T * (p_rest_T.log() - q_rest_T.log())


def _taught(cell: object) -> Taught:
    if not isinstance(cell, Taught):
        raise RecipeError("objective", ["'distill' needs a [teacher]; add the section"])
    return cell
