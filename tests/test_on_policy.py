"""PEFT methods with objective = "reward": the same answers, rewards and loss as EmbedGrad's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad import DataError, Recipe
from embedgrad.experiments.baselines import METHODS, Task, Trained
from embedgrad.experiments.baselines.lora import Lora
from embedgrad.experiments.baselines.on_policy import OnPolicy, without_prefixes
from embedgrad.experiments.baselines.peft_loop import Padded, PeftMethod
from embedgrad.experiments.compare.compare import compare
from embedgrad.model.generation import next_logits
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.scorers.function import scorer
from embedgrad.prompt import artifact
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.template import Template
from embedgrad.report.terminal.methods_table import methods_markdown
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.settings import Parts, Training
from kit import Kit, kit
from run_kit import values

pytest_plugins = ["tiny_runs"]

LEARNERS = ("peft-lora", "peft-prompt-tuning-text", "peft-cpt")
GPT2 = {"architecture": "gpt2"}


@scorer
def odd(reply: str, answer: str) -> float:
    return float(len(reply) % 2)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model seldom writes its end token, so that every fourth one ends an answer here."""
    ends = lambda model, sequencer: tuple(range(0, model.info.vocabulary, 4))  # noqa: E731
    monkeypatch.setattr(LanguageModel, "ends_of", ends)


def made_of(**options: Any) -> Kit:
    return kit(**{"rows": 10, "dtype": torch.float32, "tie": False, "target": Target(), **options})


def task_of(made: Kit, rule: Any = odd, **sections: Any) -> Task:
    """Six rows to train on, four to choose by."""
    given = {
        "objective": {"name": "reward", "samples": 4, "tries": 2},
        "target": {"choices": []},
        "training": {"steps": 4, "batch_size": 2, "evaluate_every": 2},
        "compare": {"lora_learning_rate": 0.03, "prompt_tuning_learning_rate": 0.03},
        "evaluation": {"max_new_tokens": 4},
    }
    given |= {name: {**given.get(name, {}), **section} for name, section in sections.items()}
    recipe = Recipe.from_dict(values(Path("tiny"), Path("data"), **given))
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, scorer=rule))
    rows = made.sequences
    return Task(recipe, made.model, made.sequencer, rows[:6], rows[6:], lambda event: None)


def peft(name: str) -> PeftMethod:
    method = METHODS[name]
    assert isinstance(method, PeftMethod)
    return method


def peft_logprobs(model: Any, lines: Sequence[tuple[Any, Any]]) -> Tensor:
    """Log-probabilities [B] of answers by PEFT's own forward, in one padded batch."""
    batch = Padded.of(lines, torch.device("cpu"))
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    logprobs = logits[:, -batch.ids.shape[1] :].log_softmax(-1)
    sums = []
    for row, (question, answer) in enumerate(lines):
        places = torch.arange(len(question), len(question) + len(answer)) - 1
        sums.append(logprobs[row, places, torch.tensor(answer)].sum())
    return torch.stack(sums)


# -- the law: PEFT's own forward -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("peft-lora", {}), ("peft-lora", GPT2), *((name, {}) for name in LEARNERS[1:])],
)
def test_loss_and_gradient_are_those_of_pefts_own_forward_at_every_step(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-advantage times log p of the answers; what an earlier step computed plays no part."""
    method, task = peft(name), task_of(made_of(**options))
    rows, plain, losses, seen = type(method).rows, OnPolicy.gradients, list[float](), list[Any]()

    def keep(self: Any, task: Task, model: Any) -> Tensor:
        seen.append(model)
        return rows(self, task, model)

    def gradients(policy: OnPolicy, answers: Sequence[TokenSequence], parts: int) -> float:
        model = seen[-1]
        leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
        lines = [(method.line(task, own(task, a))[0], a.targets[0]) for a in answers]
        advantages = torch.tensor([a.example.extra["advantage"] for a in answers])
        assert advantages.abs().max() > 0
        with torch.enable_grad():
            expected = -(advantages * peft_logprobs(model, lines)).mean()
            by_peft = torch.autograd.grad(expected, leaves)
        loss = plain(policy, answers, parts)
        assert loss == pytest.approx(expected.item(), abs=1e-4)
        scale = max(gradient.abs().max().item() for gradient in by_peft)
        for leaf, gradient in zip(leaves, by_peft, strict=True):
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-3, atol=1e-4 * scale)
        losses.append(loss)
        return loss

    def own(task: Task, answer: TokenSequence) -> TokenSequence:
        return next(s for s in task.train if s.example.source == answer.example.source)

    monkeypatch.setattr(type(method), "rows", keep)
    monkeypatch.setattr(OnPolicy, "gradients", gradients)
    facts = method.train(task, 0).facts
    assert facts["settings"]["learns"] == "its own answers, by the recipe's objective"
    assert len(set(losses)) == len(losses) >= 3


@pytest.mark.parametrize("placement", ["user-after", "system", "user-before"])
def test_answers_are_drawn_from_the_weights_of_the_step(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model without any memory of earlier weights: no prefix outlives a step."""
    task = task_of(made_of(template=placement), training={"steps": 4})
    assert any(sequence.prefix for sequence in task.train)
    plain, drawn = Rollouts.draw, list[list[Any]]()

    def draw(self: Rollouts, prompt: Any, batch: Any, step: int) -> Any:
        answers, figures = plain(self, prompt, batch, step)
        model = without_prefixes(task)
        parts = (model, task.evaluator(model), self.train, self.sampling)
        again, _ = plain(Rollouts(*parts, seed=0, start=self.start), prompt, batch, step)
        assert [a.targets for a in again] == [a.targets for a in answers]
        drawn.append([a.targets for a in answers])
        return answers, figures

    monkeypatch.setattr(Rollouts, "draw", draw)
    peft("peft-lora").train(task_of_same(task, lora_learning_rate=0.3), 0)
    assert len(drawn) == 4


def task_of_same(task: Task, **compare: Any) -> Task:
    recipe = replace(task.recipe, compare=replace(task.recipe.compare, **compare))
    return replace(task, recipe=recipe)


# -- what is learned -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_reward_that_is_always_the_same_moves_nothing(name: str, reward: float) -> None:
    made, rule = made_of(), scorer(lambda reply, answer: reward)
    task = task_of(made, rule, training={"steps": 2}, objective={"cut": "masked"})
    method = peft(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with method.wrap(task) as model:
            start = method.copy_trained(model)
    events = list[dict[str, Any]]()
    trained = method.train(replace(task, dev=(), report=events.append), 0)
    assert all(torch.equal(value, start[n]) for n, value in trained.tensors.items())
    steps = [event for event in events if event["event"] == "step"]
    assert [(e["loss"], e["gradient_norm"], e["examples"]) for e in steps] == [(0, 0, 0)] * 2
    assert all(event["reward"] == reward and event["answers"] >= 8 for event in steps)
    with pytest.raises(DataError, match="step 3: none of 12 questions in 3 steps"):
        method.train(replace(task_of(made, rule, objective={"cut": "masked"}), dev=()), 0)


@pytest.mark.parametrize("name", LEARNERS[:1])
def test_what_is_rewarded_becomes_likely(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandit: of all tokens, four that the model finds likeliest end an answer, and are right."""
    made = made_of()
    ends = tuple(next_tokens(made).mean(dim=0).topk(4).indices.tolist())
    monkeypatch.setattr(LanguageModel, "ends_of", lambda *_: ends)
    task = task_of(
        made,
        scorer(lambda reply, answer: float(reply == "")),
        training={"steps": 8, "batch_size": 6, "evaluate_every": 8},
        objective={"samples": 16},
        evaluation={"max_new_tokens": 1, "batch_size": 64},
    )
    events = list[dict[str, Any]]()
    METHODS[name].train(replace(task, dev=(), report=events.append), 0)
    first, *_, last = [event["reward"] for event in events if event["event"] == "step"]
    assert first < 0.08
    assert last > first + 0.1


def next_tokens(made: Kit) -> Tensor:
    """Probabilities [B, V] of each answer's first token."""
    with torch.inference_mode():
        return torch.softmax(next_logits(made.model, made.start, made.sequences), dim=1)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_resumed_training_is_the_same_and_the_base_model_bit_for_bit_as_it_was(
    name: str, tmp_path: Path
) -> None:
    made = made_of()
    before = {n: value.clone() for n, value in made.model.model.named_parameters()}
    task = task_of(made, objective={"updates": 2, "kl": 0.1}, training={"steps": 3})
    task = replace(task, dev=task.dev[:1])
    whole = METHODS[name].train(task, 3)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    kept = replace(task, state=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        METHODS[name].train(replace(kept, report=stop), 3)
    assert Checkpoint.find(tmp_path / "state").step == 2
    again = METHODS[name].train(kept, 3)
    assert all(torch.equal(value, again.tensors[n]) for n, value in whole.tensors.items())
    facts = ({**one.facts, "train_seconds": None} for one in (whole, again))
    assert next(facts) == next(facts)
    METHODS[name].answer(task, whole, task.dev)
    after = dict(made.model.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[n]) for n, value in before.items())
    assert not any(value.requires_grad for value in after.values())


def test_steps_without_anything_to_learn_are_counted_across_an_interruption(
    tmp_path: Path,
) -> None:
    """Two before, one after: the same error as of a training that was not interrupted."""
    objective = {"cut": "masked", "tries": 1}
    task = task_of(made_of(), scorer(lambda reply, answer: 1.0), objective=objective)
    for name in ("peft-lora", "embedgrad"):
        method, kept = METHODS[name], replace(task, state=tmp_path / name)
        with pytest.raises(DataError) as whole:
            method.train(task, 0)
        with pytest.raises(DataError):
            method.train(kept, 0)
        assert Checkpoint.find(tmp_path / name).step == 2
        with pytest.raises(DataError) as again:  # goes on at step 2, where one more is the third
            method.train(kept, 0)
        assert str(again.value) == str(whole.value)
        assert str(whole.value).startswith("step 3: none of 6 questions in 3 steps")


def test_a_kl_is_to_the_model_without_the_adapter() -> None:
    made = made_of()
    task, method = task_of(made, objective={"kl": 0.5}), peft("peft-lora")
    questions = [method.question(task, sequence) for sequence in task.train]
    targets = [replace(q, targets=((5, 7, 0),), gold=0, inputs=None, end=()) for q in questions]
    bare = made.model.outcome(
        made.start,
        [replace(s, targets=((5, 7, 0),), gold=0, inputs=None) for s in task.train],
        choices=False,
    ).answer_logprobs_B
    with torch.random.fork_rng(), method.wrap(task) as model:
        torch.manual_seed(0)
        leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
        with torch.no_grad():
            for leaf in leaves:
                leaf += 0.1 * torch.randn_like(leaf)
        model.eval()
        rows = lambda: method.rows(task, model)  # noqa: E731
        policy = OnPolicy(task, 0, leaves, rows, questions, lambda: method.reference(model))
        drawn = policy.rollouts
        with torch.no_grad():
            now = drawn._token_logprobs({"prompt": rows()}, targets)
            with drawn.reference():
                then = drawn._token_logprobs(drawn.start, targets)
        assert all(leaf.requires_grad for leaf in leaves)
    assert torch.tensor([sum(line) for line in then]) == pytest.approx(bare, abs=1e-4)
    assert (torch.tensor([sum(line) for line in now]) - bare).abs().min() > 1e-2


def test_lora_begins_at_the_rows_of_a_warm_start(tmp_path: Path) -> None:
    template = Template.chat(system="[[Be brief.]]", user="{review}\n\n[[Good or bad?]]")
    made = made_of(template=template)
    refined = optimize(
        *(made.model, made.sequencer, made.sequences[:6]),
        training=Training(steps=3, batch_size=3),
        parts=Parts(),
        report=lambda event: None,
    ).prompt
    artifact.save(refined, tmp_path / "prompt")
    task = task_of(made, training={"warm_start": str(tmp_path / "prompt"), "steps": 2})
    expected = task.evaluator().score(refined.rows, task.dev)
    events = list[dict[str, Any]]()
    trained = METHODS["peft-lora"].train(replace(task, report=events.append), 0)
    first = next(event for event in events if event["event"] == "evaluation")
    mean = sum(answer.loss for answer in expected) / len(expected)
    assert first["log_loss"] == pytest.approx(mean, abs=1e-5)
    assert torch.equal(trained.tensors["rows"], refined.rows)
    # The rows are kept: with an adapter that changes nothing, they answer.
    (tmp_path / "prompt").rename(tmp_path / "elsewhere")
    nothing = {n: t if n == "rows" else torch.zeros_like(t) for n, t in trained.tensors.items()}
    answers = METHODS["peft-lora"].answer(task, Trained(nothing, {}), task.dev)
    assert [a.loss for a in answers.answered] == pytest.approx([a.loss for a in expected], abs=1e-5)
    rows = Lora("peft-lora").question(task, task.train[0])
    assert (rows.prefix, len(rows.later)) == ((), len(made.sequencer.prompt_ids))
    assert rows.context(made.sequencer.prompt_ids) == task.train[0].context(
        made.sequencer.prompt_ids
    )


def test_a_comparison_says_what_peft_learned_from_and_samples_its_answers(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    sections = {
        "objective": {"name": "reward", "samples": 2, "tries": 1},
        "target": {"choices": []},
        "training": {"steps": 1, "batch_size": 2},
        "evaluation": {"scorer": "contains", "max_new_tokens": 2, "samples": 2},
        "compare": {"methods": ["peft-lora"], "seeds": [0]},
    }
    recipe = Recipe.from_dict(values(model_folder, data, **sections))
    results = compare(recipe, tmp_path / "out", lambda event: None)
    assert results["failed"] == {}
    (lora,) = (row for row in results["rows"] if row["method"] == "peft-lora")
    assert lora["sampled"] is not None
    assert lora["sampled"]["samples"] == 2
    assert lora["settings"]["dropout"] == 0
    said = "peft-lora: trained on its own answers, by the recipe's objective"
    assert said in methods_markdown(results)
