"""Reward: make the model's own better answers more likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.base import Objective, Sampling
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


@final
@dataclass(frozen=True)
class Reward(Objective):
    """Make the model's own answers more likely if they get a reward, else less likely.

    To each question of a batch the model writes several answers; evaluation.scorer gives each a
    reward r of 0 to 1 (with target.choices: 1 for the right choice), which is compared with those
    of the others to the same question (RLOO):

        advantage_i = r_i - mean of r_j, j != i
        loss_i      = -advantage_i sum_t log p(token_t | before it)

    It is the sum over tokens, not their mean, so that the mean of its gradient is the gradient of
    the expected reward, and long wrong answers are not punished less per token than short ones.
    With more updates than one, token by token:

        loss_i = -sum_t min(ratio_t advantage_i, clip(ratio_t, 1 - clip, 1 + clip) advantage_i)

    where ratio_t is a token's probability over that when it was drawn. Questions whose answers are
    all right or all wrong teach nothing; they are left out and others asked. The loss is the mean
    over the answers that are left, so its gradient is that of the reward over the share of such
    questions.

    It helps where the model is right now and then, and where its form fails: no end, no answer that
    can be read. It does not help where it is never right: train on solutions first. Answers are
    sampled anew at every step, which is most of the time.
    Source: Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740, eq. 6; ratio: Schulman et al. 2017,
    https://arxiv.org/abs/1707.06347, eq. 7; no mean over tokens: Liu et al. 2025,
    https://arxiv.org/abs/2503.20783.
    """

    # Most of a gradient from a few dozen answers is noise, which large steps add up.
    step_share: ClassVar[float] = 0.05
    is_mean: ClassVar[bool] = True

    samples: Annotated[int, Ge(2)] = 8
    """Answers per question."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Sampling temperature; the gradient is exactly that of the reward at 1."""
    max_new_tokens: Annotated[int, Gt(0)] | None = None
    """Longest answer, in tokens; unset: evaluation.max_new_tokens, or the longest choice."""
    positive: Annotated[float, Ge(0)] = 1.0
    """Weight of answers that are better than the others."""
    negative: Annotated[float, Ge(0)] = 1.0
    """Weight of answers that are worse than the others."""
    cut: Literal["wrong", "masked"] = "wrong"
    """What becomes of an answer that hits the token limit: it is wrong, or left out."""
    tries: Annotated[int, Gt(0)] = 4
    """Most questions asked per step, in batches, to replace those with nothing to learn from."""
    kl: Annotated[float, Ge(0)] = 0.0
    """Weight in the reward of an answer's log-probability over that with the starting rows, which
    is the KL divergence on average; the trust region holds the rows near their start without it."""
    updates: Annotated[int, Gt(0)] = 1
    """Optimizer steps per batch of answers."""
    clip: Annotated[float, Gt(0)] = 0.2
    """How far a token's ratio may leave 1 before it stops counting, with more updates than one."""
    random: bool = False
    """Reward by coin flip, whatever the answer: a control."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            samples=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            scored=True,
            tries=self.tries,
            drop_cut=self.cut == "masked",
            kl=self.kl,
            updates=self.updates,
            random=self.random,
        )

    def tokens_to_read(self, sequence: TokenSequence) -> Sequence[Ids] | None:
        if self.updates == 1 and "weights" not in sequence.example.extra:
            return None
        return [(token,) for token in sequence.targets[sequence.gold]]

    def needs_choices(self, *, available: bool) -> bool:
        return False

    def losses(self, outcome: Outcome) -> Tensor:
        logprobs_B = outcome.answer_logprobs_B
        # Without rollouts, as in a plan's probe, every answer is as good as any.
        advantages = outcome.extra.get("advantage", [1.0] * len(logprobs_B))
        advantage_B = torch.tensor(advantages).to(logprobs_B)
        weight_B = torch.where(advantage_B > 0, self.positive, self.negative).to(logprobs_B)
        tokens_BTK = outcome.token_logprobs_BTK
        if tokens_BTK is None or "old_logprobs" not in outcome.extra:
            return -weight_B * advantage_B * logprobs_B
        new_BT = tokens_BTK[:, :, 0]
        lines = [torch.tensor(line).to(new_BT) for line in outcome.extra["old_logprobs"]]
        old_BT = pad_sequence(lines, batch_first=True)
        ratio_BT = torch.exp(new_BT[:, : old_BT.shape[1]] - old_BT)
        clipped_BT = ratio_BT.clamp(1 - self.clip, 1 + self.clip)
        gain_BT = torch.minimum(ratio_BT * advantage_B[:, None], clipped_BT * advantage_B[:, None])
        places = torch.arange(old_BT.shape[1], device=new_BT.device)
        if "weights" in outcome.extra:  # of tokens that another engine drew
            lines = [torch.tensor(line).to(new_BT) for line in outcome.extra["weights"]]
            gain_BT = gain_BT * pad_sequence(lines, batch_first=True)
        inside_BT = places < outcome.answer_tokens_B[:, None]
        return -weight_B * (gain_BT * inside_BT).sum(dim=1)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return losses_B.mean()
