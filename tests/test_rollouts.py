"""Runs on the model's own answers: resumed, without anything to learn, with scorers that fail."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedgrad.errors import DataError, RecipeError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import Reward
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.scorers.function import scorer
from embedgrad.prompt.sequence import Target
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize
from embedgrad.training.rollouts import Rollouts, leave_one_out
from embedgrad.training.settings import Parts, Training
from kit import LABELS, Kit, kit

FREE = Target()
SMALL = Training(steps=4, batch_size=2, evaluate_every=2, seed=3)


@scorer
def short(reply: str, answer: str) -> float:
    return float(len(reply) % 2)


def made_of(target: Target = FREE) -> Kit:
    made = kit("llama", target=target, rows=10, tie=False, dtype=torch.float32)
    return made


def train(
    made: Kit, objective: Reward = Reward(samples=4), rule: Any = short, **options: Any
) -> Any:
    ends = tuple(range(0, made.model.info.vocabulary, 4))
    model = dataclasses.replace(made).model
    arguments: dict[str, Any] = {
        "training": SMALL,
        "parts": Parts(objective=objective, optimizer=AdamW(learning_rate=0.1)),
        "evaluation": Evaluation(scorer=rule, max_new_tokens=5, batch_size=6),
        **options,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "ends_of", lambda *_: ends)
        return optimize(model, made.sequencer, made.sequences[:8], made.sequences[8:], **arguments)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_resumed_run_has_the_same_rows(updates: int) -> None:
    made, kept, events = made_of(), list[Checkpoint](), list[dict[str, Any]]()
    objective = Reward(samples=4, updates=updates, kl=0.1)
    whole = train(made, objective, keep=kept.append, report=events.append)
    again = train(made_of(), objective, checkpoint=kept[0], report=lambda event: None)
    assert kept[0].step == 2
    assert torch.equal(whole.checkpoint.theta["span"], again.checkpoint.theta["span"])
    assert not torch.equal(whole.checkpoint.theta["span"], kept[0].theta["span"])
    assert whole.best.metric == "accuracy"
    steps = [event for event in events if event["event"] == "step"]
    for event in steps:
        assert 8 <= event["answers"] <= 32
        assert 0 <= event["reward"] <= 1
        assert 0 < event["groups_alive"] <= 1
        assert 0 <= event["answers_cut"] < 1
        assert 1 <= event["answer_tokens"] <= 5
        assert event["answers_per_second"] > 0
        assert event["examples"] in (4, 8)
    # What is drawn depends on the step.
    assert len({event["answer_tokens"] for event in steps}) > 1


@pytest.mark.parametrize(
    ("reward", "told"), [(1.0, "harder ones"), (0.0, "more objective.samples")]
)
def test_where_all_answers_are_as_good_no_step_is_made(reward: float, told: str) -> None:
    made, events = made_of(), list[dict[str, Any]]()
    rule = scorer(lambda reply, answer: reward)
    objective = Reward(samples=2, cut="masked", tries=2)
    with pytest.raises(DataError) as caught:
        train(made, objective, rule, report=events.append)
    message = str(caught.value)
    assert message.startswith("step 3: none of 12 questions in 3 steps has answers that differ")
    assert told in message
    assert (reward > 0) != ("larger objective.max_new_tokens if answers are cut" in message)
    assert "\n" not in message
    steps = [event for event in events if event["event"] == "step"]
    assert [(e["loss"], e["gradient_norm"], e["examples"]) for e in steps] == [(0, 0, 0)] * 2
    refined = caught.value.refinement
    assert (refined.ended, refined.steps) == ("failed", 2)
    assert torch.equal(refined.prompt.rows, refined.prompt.start_rows)
    assert events[-1]["ended"] == "failed"


@pytest.mark.parametrize("bad", [math.nan, 2.0, "right"])
def test_a_reward_that_is_none_ends_the_run_with_the_rows_so_far(bad: Any) -> None:
    calls = iter(range(10**6))
    rule = scorer(lambda reply, answer: short(reply, answer) if next(calls) < 24 else bad)
    with pytest.raises(RecipeError, match="on the reply") as caught:
        train(made_of(), Reward(samples=4), rule, report=lambda event: None)
    assert caught.value.refinement.steps > 0
    assert caught.value.refinement.ended == "failed"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "ended", "reward"),
    [(" {}\n", True, 1.0), ("{}", True, 1.0), ("{}", False, 0.0), ("not {}", True, 0.0)],
)
def test_a_choice_is_its_own_reward(text: str, ended: bool, reward: float) -> None:
    made = made_of(LABELS)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(scorer=short))
    sampling = Reward().sampling
    start = {"span": made.start}
    drawn = Rollouts(made.model, evaluator, made.sequences, sampling, seed=0, start=start)
    longest = max(len(ids) for s in made.sequences for ids in s.targets)
    assert drawn.decoding.max_new_tokens == longest + 1
    question = made.sequences[0]
    answer: Any = SimpleNamespace(text=text.format(question.example.answer), ended=ended)
    assert drawn._reward(question, answer) == reward


def test_each_reward_is_compared_with_the_others() -> None:
    assert leave_one_out([1.0, 0.0, 0.0, 1.0]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out([0.5, 0.5]) == [0, 0]


def outcome_of(advantages: list[float], old: list[list[float]], new: list[list[float]]) -> Outcome:
    tokens = torch.zeros(len(new), 3, 1)
    for b, line in enumerate(new):
        tokens[b, : len(line), 0] = torch.tensor(line)
    return Outcome(
        torch.tensor([[sum(line)] for line in new]),
        torch.tensor([[len(line)] for line in new]),
        torch.zeros(len(new), dtype=torch.long),
        (None,) * len(new),
        extra={"advantage": advantages, "old_logprobs": old},
        token_logprobs_BTK=tokens,
    )


def test_weights_of_better_and_of_worse_answers() -> None:
    outcome = outcome_of([0.5, -0.5], [[], []], [[-1.0, -2.0], [-4.0]])
    outcome = dataclasses.replace(outcome, token_logprobs_BTK=None)
    assert Reward().losses(outcome).tolist() == [1.5, -2.0]
    assert Reward(positive=0.1).losses(outcome).tolist() == pytest.approx([0.15, -2.0])
    assert Reward(negative=0).losses(outcome).tolist() == [1.5, 0.0]


def test_a_token_whose_ratio_went_too_far_stops_counting() -> None:
    old = [[-1.0, -1.0], [-1.0]]
    new = [[-1.0 + math.log(1.5), -1.0 + math.log(0.9)], [-1.0 + math.log(0.5)]]
    outcome = outcome_of([1.0, -1.0], old, new)
    objective = Reward(updates=2, clip=0.2)
    assert objective.losses(outcome).tolist() == pytest.approx([-(1.2 + 0.9), 0.8])
    assert objective.losses(outcome_of([-1.0, 1.0], old, new)).tolist() == pytest.approx(
        [1.5 + 0.9, -0.5]
    )
