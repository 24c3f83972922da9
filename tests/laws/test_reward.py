"""Laws of reward training: the estimator's mean is the gradient of the expected reward."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.generation import begin
from embedgrad.parts.objectives import Reward
from embedgrad.parts.scorers.function import scorer
from embedgrad.prompt.sequence import Target
from embedgrad.training.engine import SamplingEngine
from embedgrad.training.loss import Loss
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.settings import Parts
from kit import Kit, kit, noisy

FREE = Target()
DRAWS, GROUPS, SAMPLES = 40, 50, 4


@scorer
def always(reply: str, answer: str) -> float:
    """Right if it ended: an answer that hits the limit is wrong whatever it says."""
    return 1.0


def bandit(**options: Any) -> Kit:
    """One question over and over."""
    made = kit("llama", target=FREE, rows=1, tie=False, **options)
    (one,) = made.sequences
    copies = [
        dataclasses.replace(one, example=dataclasses.replace(one.example, source=f"row {i}"))
        for i in range(GROUPS)
    ]
    return dataclasses.replace(made, sequences=copies)


def rollouts(made: Kit, objective: Reward, rule: Any, ends: Sequence[int], seed: int = 0) -> Any:
    evaluation = Evaluation(scorer=rule, max_new_tokens=2, batch_size=256)
    evaluator = Evaluator(made.model, made.sequencer, evaluation)
    evaluator.end_ids = tuple(ends)
    assert objective.sampling is not None
    start = {"span": made.start}
    return Rollouts(
        made.model, evaluator, made.sequences, objective.sampling, seed=seed, start=start
    )


def estimates(made: Kit, rows: Tensor, objective: Reward, rule: Any, ends: Sequence[int]) -> Tensor:
    """Gradients [draws, P, D]; groups that are left out count as zero."""
    loss = Loss(made.model, Parts(objective=objective), FREE, {"span": rows})
    drawn = rollouts(made, objective, rule, ends)
    gradients = []
    for step in range(DRAWS):
        theta = {"span": torch.zeros_like(rows, requires_grad=True)}
        sequences, _ = drawn.draw({"span": rows}, made.sequences, step)
        alive = len(sequences) / (GROUPS * SAMPLES)
        gradients.append(loss.gradient(theta, sequences).gradients["span"] * alive)
    return torch.stack(gradients)


def true_gradient(made: Kit, rows: Tensor, ends: Sequence[int]) -> Tensor:
    """Of the probability that an answer ends within two tokens, in theta."""
    loss = Loss(made.model, Parts(), FREE, {"span": rows})
    theta = {"span": torch.zeros_like(rows, requires_grad=True)}
    prompt = loss.parts.parameterization.prompt(theta, {"span": rows})
    goes_on = [t for t in range(made.model.info.vocabulary) if t not in ends]
    sequences = [dataclasses.replace(made.sequences[0], targets=((t, 0),)) for t in goes_on]
    read = [[(*ends, t), (*ends, 0)] for t in goes_on]
    outcome = made.model.outcome(prompt, sequences, choices=False, read=read)
    assert outcome.token_logprobs_BTK is not None
    shares = outcome.token_logprobs_BTK.exp()
    at_once, then = shares[0, 0, :-1].sum(), shares[:, 1, :-1].sum(dim=1)
    expected = at_once + (shares[:, 0, -1] * then).sum()
    assert 0.2 < expected.item() < 0.8
    (gradient,) = torch.autograd.grad(expected, theta["span"])
    return gradient


def distance(found: Tensor, expected: Tensor) -> float:
    """Squared distance of the mean over what chance makes it on average: near 1."""
    chance = found.var(dim=0).sum() / len(found)
    return ((found.mean(dim=0) - expected).pow(2).sum() / chance).item()


@pytest.mark.parametrize("updates", [1, 2])
def test_the_mean_estimate_is_the_gradient_of_the_expected_reward(updates: int) -> None:
    """A bandit of 8,000 answers of one or two tokens; the loss is minus the reward."""
    made = bandit()
    ends = range(0, made.model.info.vocabulary, 4)
    rows, objective = noisy(made.start), Reward(samples=SAMPLES, tries=1, updates=updates)
    expected = -true_gradient(made, rows, ends)
    found = estimates(made, rows, objective, always, ends)
    assert distance(found, expected) < 2
    # Along the true gradient, where the error is small against it.
    along = (found * expected).sum(dim=(1, 2)) / expected.pow(2).sum()
    error = along.std().item() / DRAWS**0.5
    assert error < 0.1
    assert abs(along.mean().item() - 1) < 3 * error


def test_answers_of_another_engine_count_by_their_ratio() -> None:
    """Answers of one token, drawn from other shares: weighted, their mean is the gradient here."""
    made, mixed = bandit(), random.Random(0)
    ends = range(0, made.model.info.vocabulary, 4)
    rows, objective = noisy(made.start), Reward(samples=SAMPLES, tries=1, max_new_tokens=1)
    loss = Loss(made.model, Parts(objective=objective), FREE, {"span": rows})
    theta = {"span": torch.zeros_like(rows, requires_grad=True)}
    prompt = loss.parts.parameterization.prompt(theta, {"span": rows})
    one = dataclasses.replace(made.sequences[0], targets=((0,),))
    outcome = made.model.outcome(prompt, [one], choices=False, read=[[tuple(range(512))]])
    assert outcome.token_logprobs_BTK is not None
    ours_V = outcome.token_logprobs_BTK[0, 0]
    (expected,) = torch.autograd.grad(-ours_V.exp()[list(ends)].sum(), theta["span"])
    theirs_V = torch.log_softmax(ours_V.detach() / 2, dim=0)  # as if it were less sure
    shares = theirs_V.exp().tolist()

    class Elsewhere:
        settings = SamplingEngine(most_weight=100.0)

        def sample(self, model: Any, _: Any, questions: Any, decoding: Any, **more: Any) -> Any:
            groups = [
                [
                    begin(model, rows, decoding, more["end_ids"], s, (i, n))
                    for n in range(decoding.samples)
                ]
                for s, i in zip(questions, more["numbers"], strict=True)
            ]
            for answer in itertools.chain.from_iterable(groups):
                (token,) = mixed.choices(range(512), shares)
                answer.add(token)
                answer.logprobs.append(theirs_V[token].item())
            return groups

    drawn = rollouts(made, objective, always, ends)
    drawn.engine = Elsewhere()
    found: dict[str, list[Tensor]] = {"weighted": [], "plain": []}
    for step in range(DRAWS):
        sequences, figures = drawn.draw({"span": rows}, made.sequences, step)
        assert figures["mismatch"] > 0.1
        plain = [s.example.with_extra(weights=[1.0]) for s in sequences]
        batches = {
            "weighted": sequences,
            "plain": [
                dataclasses.replace(s, example=e) for s, e in zip(sequences, plain, strict=True)
            ],
        }
        for name, batch in batches.items():
            gradient = loss.gradient(theta, batch).gradients["span"]
            alive = len(batch) / (GROUPS * SAMPLES)
            found[name].append((gradient * expected).sum() * alive / expected.pow(2).sum())
    far = {}
    for name, values in found.items():
        along = torch.stack(values)
        far[name] = abs(along.mean().item() - 1) / (along.std().item() / DRAWS**0.5)
    assert far["weighted"] < 3 < far["plain"]


def test_a_random_reward_teaches_nothing() -> None:
    made, dice = bandit(), random.Random(0)
    ends = range(made.model.info.vocabulary)  # all answers end, with their first token
    objective = Reward(samples=SAMPLES, tries=1)
    rule = scorer(lambda reply, answer: float(dice.random() < 0.5))
    found = estimates(made, noisy(made.start), objective, rule, ends)
    assert distance(found, torch.zeros_like(found[0])) < 2
