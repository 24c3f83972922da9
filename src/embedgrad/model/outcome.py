"""Outcome: log-probabilities of a batch's answers, per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """Log-probabilities of a batch of B examples with up to C targets each.

    `logprobs_BC` is the summed log-probability (nats) of each target's tokens, -inf where there are
    fewer targets; `tokens_BC` counts those tokens; `gold_B` is the index of the right answer.
    `normalize` compares choices per token. `groups`, `tasks` and the columns of `extra` have one
    entry per example, as have `reasoning_tokens`: how many tokens of the right answer are a worked
    solution up to its final answer. `end_logprobs_B` is the log-probability of ending the turn
    after the right choice, where the objective asks for it; so is `token_logprobs_BTK`, in the
    places of the right answer's tokens: log-probabilities of K tokens each, 0 behind the answer.
    """

    logprobs_BC: Tensor
    tokens_BC: Tensor
    gold_B: Tensor
    groups: tuple[str | None, ...]
    normalize: bool = False
    tasks: tuple[str | None, ...] = ()
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    reasoning_tokens: tuple[int, ...] = ()
    end_logprobs_B: Tensor | None = None
    token_logprobs_BTK: Tensor | None = None

    @property
    def answer_logprobs_B(self) -> Tensor:
        """Summed log-probability of the right answers."""
        return self.logprobs_BC.gather(1, self.gold_B[:, None]).squeeze(1)

    @property
    def answer_tokens_B(self) -> Tensor:
        """Number of tokens of the right answers."""
        return self.tokens_BC.gather(1, self.gold_B[:, None]).squeeze(1)

    @property
    def scores_BC(self) -> Tensor:
        """What choices are compared by: log-probabilities, per token if `normalize`."""
        if not self.normalize:
            return self.logprobs_BC
        return self.logprobs_BC / self.tokens_BC.clamp(min=1)
