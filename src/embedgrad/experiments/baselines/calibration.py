"""Calibration baselines: a number per choice added to its score.

    prediction = argmax_c (log p(c | row) + bias_c)

The rows whose scores decide the biases are the training rows: no test row is read.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.experiments.baselines.base import (
    Answers,
    Method,
    Task,
    Trained,
    facts_of,
    why_not_choices,
)
from embedgrad.experiments.baselines.prompting import answer_as_text
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

ROUNDS = 20  # over all choices; accuracy rises in each, so few are needed


class Calibration(Method):
    """The text prompt with a bias for each choice, from its scores of the training rows."""

    seeded = False

    def why_not(self, recipe: Recipe) -> str | None:
        return why_not_choices(recipe)

    @abstractmethod
    def biases(self, logprobs_NC: Tensor, gold_N: Tensor) -> Tensor:
        """What is added to the log-probabilities, shape [C]."""

    def train(self, task: Task, seed: int) -> Trained:
        began = time.perf_counter()
        logprobs_NC = _logprobs(answer_as_text(task, task.sequencer, task.learned).answered)
        gold_N = torch.tensor([sequence.gold for sequence in task.train])
        bias_C = self.biases(logprobs_NC, gold_N)
        seconds, trained = time.perf_counter() - began, Trained({"bias": bias_C}, {})
        choices = task.sequencer.target.choices
        facts = facts_of(
            bias_C.nbytes,
            self.score_on_dev(task, trained),
            seconds,
            {"rows": "train", "biases": dict(zip(choices, bias_C.tolist(), strict=True))},
            numbers=len(bias_C),
            seen=len(task.train),
        )
        return Trained(trained.tensors, facts)

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        answered, tokens = answer_as_text(task, task.sequencer, sequences)
        shares_NC = torch.softmax(_logprobs(answered) + trained.tensors["bias"], dim=1)
        choose = task.evaluator().choose
        return Answers(
            [choose(s, p_C) for s, p_C in zip(sequences, shares_NC, strict=True)], tokens
        )


@final
class BatchCalibration(Calibration):
    """The mean log-probability of each choice over the training rows, subtracted; no labels.

    Source: Zhou et al. 2023, https://arxiv.org/abs/2309.17249, section 3, where the rows are the
    batch to be answered.
    """

    def biases(self, logprobs_NC: Tensor, gold_N: Tensor) -> Tensor:
        return -logprobs_NC.mean(dim=0)


@final
class Threshold(Calibration):
    """The biases with the best accuracy on the training rows, by their labels.

    One choice at a time, exactly: with two choices this is the best threshold there is. Of equally
    good ones the middle of the interval nearest to no bias.
    """

    def biases(self, logprobs_NC: Tensor, gold_N: Tensor) -> Tensor:
        bias_C = torch.zeros(logprobs_NC.shape[1], dtype=logprobs_NC.dtype)
        right = int(((logprobs_NC + bias_C).argmax(dim=1) == gold_N).sum())
        for _ in range(ROUNDS):
            before = right
            for c in range(len(bias_C)):
                bias, found = best_bias(logprobs_NC + bias_C, gold_N, c)
                if found > right:
                    bias_C[c] += bias
                    right = found
            if right == before:
                break
        return bias_C - bias_C.mean()


def best_bias(scores_NC: Tensor, gold_N: Tensor, c: int) -> tuple[float, int]:
    """What to add to the scores of choice `c` so that most rows are right, and how many are."""
    rivals_NC = scores_NC.clone()
    rivals_NC[:, c] = -torch.inf
    rival_N, other_N = rivals_NC.max(dim=1)
    # A row goes to c where the bias is above its edge.
    edges_N, order = (rival_N - scores_NC[:, c]).sort()
    gains_N = ((gold_N == c).long() - (other_N == gold_N).long())[order]
    right_N = torch.cat([torch.zeros(1, dtype=torch.long), gains_N.cumsum(0)])
    right_N += int((other_N == gold_N).sum())
    below = torch.cat([edges_N[:1] - 1, edges_N])
    above = torch.cat([edges_N, edges_N[-1:] + 1])
    middles = (below + above) / 2
    right_N[below == above] = -1  # no bias lies between equal edges
    best = right_N == right_N.max()
    return float(middles[best][middles[best].abs().argmin()]), int(right_N.max())


def _logprobs(answered: Sequence[ScoredAnswer]) -> Tensor:
    """Log-probabilities [N, C] of the choices among themselves."""
    shares = [list((answer.probabilities or {}).values()) for answer in answered]
    return torch.tensor(shares, dtype=torch.float64).clamp(min=1e-45).log()
