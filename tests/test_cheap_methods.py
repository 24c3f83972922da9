"""Methods that fit a few numbers, or none, on the frozen model: on which rows, and what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embedgrad import DataError
from embedgrad.data.examples import Example
from embedgrad.experiments.baselines import METHODS, Task, Trained, frozen_features
from embedgrad.experiments.baselines.calibration import BatchCalibration, Threshold, best_bias
from embedgrad.experiments.baselines.frozen_features import folds, hidden_states
from embedgrad.experiments.baselines.linear_probe import LinearProbe
from embedgrad.prompt.sequence import Target
from embedgrad.training.rollouts import Rollouts
from kit import LONG_CHOICES, kit, plain_logprobs
from test_methods import small, task_of

FITTED = ("batch-calibration", "threshold", "linear-probe", "knn")
FREE = Target()


def biased(rows: int = 40) -> tuple[Tensor, Tensor]:
    """Scores that tell the two choices apart, but far from zero."""
    gold_N = torch.arange(rows) % 2
    generator = torch.Generator().manual_seed(0)
    margin_N = 2.0 * gold_N + 0.5 * torch.randn(rows, generator=generator) - 6
    return torch.stack([torch.zeros(rows), margin_N], dim=1).double().log_softmax(dim=1), gold_N


# -- the bare question -----------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["system", "opening", "plain"])
def test_no_template_reads_the_columns_and_nothing_else(placement: str) -> None:
    made = small(template=placement)
    task = task_of(made)
    answers = METHODS["no-template"].answer(task, Trained({}, {}), task.dev)
    tokenizer: Any = made.loaded.tokenizer
    for sequence, answer, tokens in zip(task.dev, *answers, strict=True):
        question = tokenizer(sequence.example.columns["review"])["input_ids"]
        choices = made.sequencer.target.choices
        targets = [tokenizer(f" {c}", add_special_tokens=False)["input_ids"] for c in choices]
        expected = plain_logprobs(made.loaded, question, targets).softmax(dim=0)
        assert answer.probabilities is not None
        assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-4)
        assert tokens == len(question)


def test_no_template_writes_free_answers_that_end() -> None:
    made = small(target=FREE, rows=[Example({"review": "2 and 3"}, "5", "r:1")] * 10)
    task = task_of(made, target={"choices": []}, evaluation={"max_new_tokens": 3})
    assert METHODS["no-template"].why_not(task.recipe) is None
    (answer, *_), _ = METHODS["no-template"].answer(task, Trained({}, {}), task.dev)
    tokenizer: Any = made.loaded.tokenizer
    question = tokenizer("2 and 3")["input_ids"]
    target = [*tokenizer(" 5", add_special_tokens=False)["input_ids"], *made.sequencer.end_ids]
    (expected,) = plain_logprobs(made.loaded, question, [target])
    assert answer.loss == pytest.approx(-expected.item() / len(target), rel=1e-4)


def test_no_template_cuts_a_question_that_does_not_fit() -> None:
    made = small()
    made.sequencer.context = 0
    whole = METHODS["no-template"].answer(task_of(made), Trained({}, {}), made.sequences).tokens
    task = task_of(small())
    task.sequencer.context = max(whole) - 1
    cut = METHODS["no-template"].answer(task, Trained({}, {}), made.sequences).tokens
    longest = max(len(ids) for ids in made.sequences[0].targets)
    assert max(cut) <= task.sequencer.context - min(1, longest) < max(whole)


# -- calibration -----------------------------------------------------------------------------------


def test_batch_calibration_takes_the_mean_away() -> None:
    scores_NC, gold_N = biased()
    assert ((scores_NC.argmax(dim=1) == gold_N).double().mean()) == 0.5
    method = BatchCalibration("batch-calibration")
    calibrated_NC = scores_NC + method.biases(scores_NC, gold_N)
    assert calibrated_NC.mean(dim=0).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert (calibrated_NC.argmax(dim=1) == gold_N).double().mean() > 0.9
    # Labels are not read.
    assert torch.equal(method.biases(scores_NC, gold_N), method.biases(scores_NC, 1 - gold_N))


def test_the_threshold_is_the_best_there_is() -> None:
    scores_NC, gold_N = biased()
    found_NC = scores_NC + Threshold("threshold").biases(scores_NC, gold_N)
    right = int((found_NC.argmax(dim=1) == gold_N).sum())
    margins = (scores_NC[:, 1] - scores_NC[:, 0]).tolist()
    best = max(sum((m > t) == bool(g) for m, g in zip(margins, gold_N, strict=True))
               for t in [-99.0, *(m + 1e-9 for m in margins)])  # fmt: skip
    assert right == best > 20


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 3, st.integers(0, 2)), min_size=1, max_size=9),
    st.integers(0, 2),
)
def test_the_best_bias_of_a_choice_is_found_exactly(
    rows: list[tuple[int, int, int, int]], c: int
) -> None:
    scores_NC = torch.tensor([row[:3] for row in rows], dtype=torch.float64)
    gold_N = torch.tensor([row[3] for row in rows])

    def right(bias: float) -> int:
        moved_NC = scores_NC.clone()
        moved_NC[:, c] += bias
        rivals_NC = scores_NC.clone()
        rivals_NC[:, c] = -torch.inf
        other_N = rivals_NC.argmax(dim=1)
        chosen = moved_NC[:, c] > rivals_NC.max(dim=1).values
        return int((torch.where(chosen, c, other_N) == gold_N).sum())

    bias, count = best_bias(scores_NC, gold_N, c)
    halves = [n / 2 for n in range(-15, 16)]  # between all edges, which are whole numbers
    assert count == max(right(b) for b in halves if b % 1)
    assert right(bias) == count


def test_several_choices_get_a_bias_each() -> None:
    generator = torch.Generator().manual_seed(1)
    gold_N = torch.arange(60) % 3
    scores_NC = 2 * torch.nn.functional.one_hot(gold_N, 3) + torch.tensor([0.0, -5.0, 4.0])
    scores_NC = scores_NC + 0.3 * torch.randn(60, 3, generator=generator)
    assert int((scores_NC.argmax(dim=1) == gold_N).sum()) == 20
    bias_C = Threshold("threshold").biases(scores_NC.double(), gold_N)
    assert int(((scores_NC + bias_C).argmax(dim=1) == gold_N).sum()) >= 58
    assert bias_C.sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", FITTED)
def test_what_is_fitted_is_fitted_on_train(name: str) -> None:
    task = task_of(small())
    whole = METHODS[name].train(task, 0)
    assert whole.facts["dev"]["log_loss"] > 0
    turned = [replace(s, gold=1 - s.gold) for s in task.dev]
    other = METHODS[name].train(replace(task, dev=turned), 0)
    assert all(torch.equal(tensor, other.tensors[n]) for n, tensor in whole.tensors.items())
    fewer = METHODS[name].train(replace(task, train=task.train[:5], dev=()), 0)
    assert fewer.facts["dev"] is None
    assert any(
        tensor.shape != fewer.tensors[n].shape or not torch.equal(tensor, fewer.tensors[n])
        for n, tensor in whole.tensors.items()
    )


@pytest.mark.parametrize("name", FITTED)
def test_the_right_answer_of_a_row_changes_no_prediction(name: str) -> None:
    task = task_of(small())
    trained = METHODS[name].train(task, 0)
    turned = [replace(s, gold=1 - s.gold) for s in task.dev]
    first, second = (
        METHODS[name].answer(task, trained, rows).answered for rows in (task.dev, turned)
    )
    assert [a.probabilities for a in first] == [a.probabilities for a in second]
    alone = [METHODS[name].answer(task, trained, [s]).answered[0] for s in task.dev]
    assert [a.predicted for a in alone] == [a.predicted for a in first]


@pytest.mark.parametrize("name", FITTED)
def test_free_text_has_no_choices_to_fit(name: str) -> None:
    task = task_of(small(), target={"choices": []})
    reason = METHODS[name].why_not(task.recipe)
    assert reason == "it needs target.choices, and answers are free text"


# -- hidden states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "llama-dynamic"])
@torch.no_grad()
def test_hidden_states_are_those_of_each_row_alone(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(architecture=architecture)
    task = task_of(made)
    whole = hidden_states(task, task.train)
    longest = max(s.length(len(made.sequencer.prompt_ids)) for s in task.train)
    monkeypatch.setattr(frozen_features, "PASS_TOKENS", 2 * longest)
    assert torch.allclose(hidden_states(task, task.train), whole, atol=1e-5)
    model: Any = made.loaded.model
    for i, sequence in enumerate(task.train):
        ids = sequence.plain or sequence.context(made.sequencer.prompt_ids)
        task.model.forward.forget_longest_pass()
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        alone = torch.stack([h[0, -1] for h in output.hidden_states])
        assert torch.allclose(whole[:, i], alone, atol=1e-5)
    assert torch.equal(hidden_states(task, task.train, 2), whole[2:3])


def test_the_probe_is_the_penalized_maximum_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    features_NF = torch.randn(30, 4, generator=generator)
    gold_N = (features_NF[:, 0] > 0).long()
    weights = LinearProbe("linear-probe").fit(features_NF, gold_N, 5.0, 2)["weights"].double()
    # At the maximum the gradient is zero.
    shares_NC = torch.softmax(features_NF.double() @ weights[:-1] + weights[-1], dim=1)
    wrong_NC = shares_NC - torch.nn.functional.one_hot(gold_N, 2)
    gradient = features_NF.double().T @ wrong_NC + 5.0 * weights[:-1]
    assert gradient.abs().max() < 0.02
    assert wrong_NC.sum(dim=0).abs().max() < 0.02


def planted(monkeypatch: pytest.MonkeyPatch, labels: Tensor) -> None:
    """Three layers of noise, of which the second holds the labels."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, len(labels), 6, generator=generator)
    states[1, :, 2] += 6 * labels

    def found(task: Task, sequences: Any, layer: int | None = None) -> Tensor:
        numbers = [int(s.example.source.rpartition(":")[2]) for s in sequences]
        kept = states[:, numbers]
        return kept if layer is None else kept[layer : layer + 1]

    monkeypatch.setattr(frozen_features, "hidden_states", found)


@pytest.mark.parametrize("name", ["linear-probe", "knn"])
def test_cross_validation_finds_the_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kit(rows=60, dtype=torch.float32)
    labels = torch.arange(60) % 2
    rows = [
        replace(s, gold=int(labels[i]), example=replace(s.example, source=f"r:{i}", group=None))
        for i, s in enumerate(made.sequences)
    ]
    planted(monkeypatch, labels)
    task = replace(task_of(made), train=rows[:40], dev=rows[40:])
    trained = METHODS[name].train(task, 0)
    assert trained.facts["settings"]["layer"] == 1
    assert trained.facts["settings"]["cross_validated"] >= 0.95
    answered = METHODS[name].answer(task, trained, task.dev).answered
    choices = made.sequencer.target.choices
    right = [choices.index(a.predicted) == s.gold for a, s in zip(answered, task.dev, strict=True)]
    assert sum(right) >= 19


def test_rows_of_a_group_stay_in_one_fold() -> None:
    groups = [f"story {i // 3}" for i in range(21)]
    parts = folds(groups)
    assert sorted(itertools.chain(*parts)) == list(range(21))
    assert len(parts) == 5
    assert sum(len({groups[i] for i in part}) for part in parts) == 7
    assert len(folds(["a", "a", "b"])) == 2


@pytest.mark.parametrize("name", ["linear-probe", "knn"])
def test_twins_of_a_group_do_not_vouch_for_each_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kit(rows=40, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (20,), generator=generator).repeat_interleave(2)
    states = torch.randn(1, 20, 30, generator=generator).repeat_interleave(2, dim=1)
    rows = [
        replace(s, gold=int(labels[i]), example=replace(s.example, group=f"pair {i // 2}"))
        for i, s in enumerate(made.sequences)
    ]
    monkeypatch.setattr(frozen_features, "hidden_states", lambda task, sequences: states)
    task = replace(task_of(made), train=rows, dev=())
    grouped = METHODS[name].train(task, 0).facts["settings"]["cross_validated"]
    alone = [replace(s, example=replace(s.example, group=None)) for s in rows]
    loose = METHODS[name].train(replace(task, train=alone), 0).facts["settings"]["cross_validated"]
    assert loose > 0.9 > grouped + 0.1


@pytest.mark.parametrize("name", ["linear-probe", "knn"])
def test_one_group_cannot_be_cross_validated(name: str) -> None:
    task = task_of(small())
    rows = [replace(s, example=replace(s.example, group="one")) for s in task.train]
    with pytest.raises(DataError, match=f"{name}: all training rows are of one group"):
        METHODS[name].train(replace(task, train=rows), 0)


def test_three_choices_are_classified() -> None:
    made = small(target=Target(choices=LONG_CHOICES), rows=18)
    task = replace(task_of(made), train=made.sequences[:12], dev=made.sequences[12:])
    for name in FITTED:
        answered = METHODS[name].answer(task, METHODS[name].train(task, 0), task.dev).answered
        assert {len(a.probabilities or {}) for a in answered} == {3}
        assert all(sum((a.probabilities or {}).values()) == pytest.approx(1) for a in answered)


# -- rewards by a coin -----------------------------------------------------------------------------


def test_random_rewards_know_nothing_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = {"name": "reward", "samples": 4}
    task = task_of(small(), objective=objective, training={"steps": 2, "batch_size": 4})
    method = METHODS["random-reward"]
    assert method.why_not(task.recipe) is None
    rewards: list[float] = []
    plain = Rollouts._answer

    def spy(self: Rollouts, *arguments: Any) -> Any:
        groups = plain(self, *arguments)
        rewards.extend(reward for group in groups for reward in group.rewards)
        return groups

    monkeypatch.setattr(Rollouts, "_answer", spy)
    first = method.train(task, 0)
    drawn, rewards[:] = list(rewards), []
    assert set(drawn) == {0.0, 1.0}
    # The same coin where every answer is right, and where none is.
    for right in (True, False):
        monkeypatch.setattr(Rollouts, "_reward", lambda *_, right=right: float(right))
        again = method.train(task, 0)
        assert rewards == drawn
        assert torch.equal(first.tensors["rows"], again.tensors["rows"])
        rewards[:] = []
    method.train(task, 1)
    assert rewards != drawn
    text = method.why_not(task_of(small()).recipe)
    assert text is not None
    assert "objective is another" in text
