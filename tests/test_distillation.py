"""Distillation: what a teacher says, and how far a student is from it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad.data.examples import Example
from embedgrad.data.splits import Splits
from embedgrad.errors import RecipeError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.generation import Reply
from embedgrad.model.likeliest import likeliest_tokens
from embedgrad.parts.objectives import Distill
from embedgrad.parts.objectives.distill import TAUGHT, Taught, bucketed_kl
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import Free
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.template import Message, Template
from embedgrad.recipe.build import with_answers
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loss import Loss
from embedgrad.training.optimize import optimize
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.settings import Parts, Refinement, Training
from embedgrad.training.teacher import Teacher, Teaching
from kit import LABELS, LONG_CHOICES, PLACEMENTS, Kit, kit, noisy, plain_logits, plain_logprobs
from kit_teacher import LONG, teacher_of
from refusals import refused

FREE = Target()
CHOICES = Target(choices=LONG_CHOICES)


def logprobs(seed: int, places: int = 6, vocabulary: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(places, vocabulary, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, dim=1)


def said(sequence: TokenSequence) -> Taught:
    taught = sequence.example.extra[TAUGHT]
    assert isinstance(taught, Taught)
    return taught


# ---------------------------------------------------------------------------------- the divergence


def test_buckets_of_the_whole_vocabulary_give_the_whole_divergence() -> None:
    teacher, student = logprobs(0), logprobs(1)
    whole = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    assert (bucketed_kl(teacher, student) - whole).abs().max().item() < 1e-6


def test_more_tokens_tell_more_and_never_more_than_all() -> None:
    teacher, student = logprobs(0), logprobs(1)
    ids = teacher.topk(40, dim=1).indices
    found = [
        bucketed_kl(teacher.gather(1, ids[:, :k]), student.gather(1, ids[:, :k]))
        for k in (1, 3, 10, 40)
    ]
    for fewer, more in itertools.pairwise(found):
        assert (fewer < more).all()
    assert (found[0] > 0).all()


def test_equal_distributions_diverge_by_nothing() -> None:
    some = logprobs(0)[:, :5]
    assert not bucketed_kl(some, some).any()


def test_a_student_without_a_likely_token_is_far_away_and_finite() -> None:
    teacher = torch.tensor([[0.999, 1e-4]]).log()
    student = torch.tensor([[1e-6, 1 - 1e-6 - 1e-12]]).log()
    assert 13 < bucketed_kl(teacher, student).item() < 15


# ---------------------------------------------------------------------------------- the teacher


# Two spans that all rows share, and one behind what they do not.
SPANS = Template.chat(system="[[Be fair.]]", user="[[Read this:]] {review}\n\n[[Is it good?]]")


@pytest.mark.parametrize("template", [PLACEMENTS["user-after"], SPANS], ids=["one", "several"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba", "llama-dynamic"])
def test_likeliest_tokens_are_those_of_the_full_pass(architecture: str, template: Template) -> None:
    made = kit(architecture, template=template, target=CHOICES, rows=4, tie=False)
    rows = made.start
    found = list(likeliest_tokens(made.model, rows, made.sequences, 3))
    for ids, sequence in zip(found, made.sequences, strict=True):
        answer = sequence.targets[sequence.gold]
        context = sequence.context(made.sequencer.prompt_ids)
        logits = plain_logits(made.loaded, [*context, *answer[:-1]])[len(context) - 1 :]
        assert ids == tuple(map(tuple, logits.topk(3, dim=1).indices.tolist()))


@pytest.mark.parametrize("target", [CHOICES, FREE], ids=["choices", "free"])
def test_a_teacher_reads_the_text_of_its_template(target: Target) -> None:
    made = kit(target=target, rows=3, tie=False)
    teacher = teacher_of(made, Distill(top=4))
    for sequence, student in zip(teacher.teach(made.sequences), made.sequences, strict=True):
        taught, answer = said(sequence), student.targets[student.gold]
        text = made.loaded.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": LONG},
                {"role": "user", "content": f"Review: {student.example.columns['review']}"},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        context = made.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = plain_logits(made.loaded, [*context, *answer[:-1]])[len(context) - 1 :]
        expected, ids = torch.log_softmax(logits, dim=1).topk(4, dim=1)
        assert taught.ids == tuple(map(tuple, ids.tolist()))
        assert (taught.logprobs_TK - expected).abs().max().item() < 1e-10
        assert (taught.shares_C is None) == (not target.choices)
        if taught.shares_C is not None:
            scores = plain_logprobs(made.loaded, context, student.targets)
            assert (taught.shares_C - torch.log_softmax(scores, 0)).abs().max().item() < 1e-10
            ended = plain_logprobs(made.loaded, context, [(*answer, *student.end)])[0]
            assert taught.end == pytest.approx((ended - scores[student.gold]).item(), abs=1e-10)
        assert dataclasses.replace(sequence, example=student.example) == student


@pytest.mark.parametrize("target", [CHOICES, FREE], ids=["choices", "free"])
def test_the_loss_is_zero_where_the_student_is_the_teacher(target: Target) -> None:
    made = kit(target=target, rows=4, tie=False)
    rows = noisy(made.start)
    refined = PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=target,
        spans=made.sequencer.spans,
        date=made.sequencer.renderer.date,
        start_rows=made.start,
        rows=rows,
    )
    objective = Distill(top=6)
    teacher = Teacher(
        made.model, made.sequencer, Teaching(prompt="somewhere"), objective, refined=refined
    )
    taught = teacher.teach(made.sequences)
    assert teacher.divergence(rows, taught) == 0.0
    assert teacher.divergence(made.start, taught) > 1e-4


def test_the_loss_is_that_of_full_passes() -> None:
    made = kit(target=FREE, rows=3, tie=False)
    vocabulary = made.loaded.info.vocabulary
    teacher = teacher_of(made, Distill(top=vocabulary))
    taught = teacher.teach(made.sequences)
    expected = []
    for sequence in taught:
        answer, context = sequence.targets[0], sequence.context(made.sequencer.prompt_ids)
        logits = plain_logits(made.loaded, [*context, *answer[:-1]])[len(context) - 1 :]
        told = said(sequence)
        student = torch.log_softmax(logits, dim=1).gather(1, torch.tensor(told.ids))
        kl = (told.logprobs_TK.exp() * (told.logprobs_TK - student)).sum(1)
        expected.append(kl.mean().item())
    assert teacher.divergence(made.start, taught) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_choices_of_a_teacher_are_those_it_finds_likeliest() -> None:
    made = kit(target=CHOICES, rows=6, tie=False)
    teacher = teacher_of(made)
    bare = [dataclasses.replace(s.example, answer="") for s in made.sequences]
    answered, summary = teacher.answer_train(bare)
    assert summary == {"source": "teacher", "questions": 6, "kept": 6}
    for example, sequence in zip(answered, made.sequences, strict=True):
        context = teacher.context(sequence)
        ids = (*context.prefix, *context.suffix)
        scores = plain_logprobs(made.loaded, ids, sequence.targets)
        assert example.answer == LONG_CHOICES[int(scores.argmax())]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """A cache of the test's own, and a teacher that writes the review's first word.

    Gets each review that it is asked with the tokens of what it reads; "bad" has no end.
    """
    reviews: list[tuple[str, int]] = []

    def write(
        model: object, rows_PD: object, contexts: list[TokenSequence], *_: Any, **__: Any
    ) -> Any:
        for context in contexts:
            reviews.append((context.example.columns["review"], context.length(0)))
            word = reviews[-1][0].split()[0]
            yield (Reply(f" {word} ", cut=word == "bad"),)

    monkeypatch.setattr("embedgrad.model.language_model.LanguageModel.generate", write)
    monkeypatch.setattr("embedgrad.training.self_training.sampling.cache_folder", lambda: tmp_path)
    return reviews


def unlabelled(*reviews: str) -> list[Example]:
    return [Example({"review": r}, "", f"q.jsonl:{n}") for n, r in enumerate(reviews, 1)]


def test_free_answers_are_written_once(asked: list[tuple[str, int]], tmp_path: Path) -> None:
    made = kit(target=FREE, rows=2, tie=False)
    events: list[dict[str, Any]] = []
    queries = unlabelled("warm film", "bad film", "cold film", "warm film")
    found = []
    for name in ("a", "b"):
        teacher = teacher_of(made, evaluation=Evaluation(batch_size=2), report=events.append)
        found.append(teacher.answer_train(queries, tmp_path / name))
    (examples, summary), again = found
    assert [(e.source, e.answer) for e in examples] == [
        ("q.jsonl:1", "warm"),
        ("q.jsonl:3", "cold"),
        ("q.jsonl:4", "warm"),
    ]
    assert {n: summary[n] for n in ("questions", "kept", "cut")} == {
        "questions": 4,
        "kept": 3,
        "cut": 1,
    }
    assert again == (examples, summary)
    assert sorted(r for r, _ in asked) == ["bad film", "cold film", "warm film"]
    scored = [e["done"] for e in events if e["event"] == "scoring"]
    assert scored == [2, 3]
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert notes[-1].startswith("answers of all 3 questions are taken from")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Another prompt is another teacher.
    other = Template((Message("user", "{review}?"),), frozen=True)
    teacher_of(made, template=other).answer_train(queries)
    assert len(asked) == 6


def test_a_teacher_that_is_interrupted_goes_on(
    asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    made = kit(target=FREE, rows=2, tie=False)
    queries = unlabelled(*(f"film{n} is long" for n in range(6)))

    def stop(event: dict[str, Any]) -> None:
        if event.get("done") == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_of(made, evaluation=Evaluation(batch_size=2), report=stop).answer_train(queries)
    examples, _ = teacher_of(made).answer_train(queries)
    assert len(asked) == 6
    assert [e.answer for e in examples] == [f"film{n}" for n in range(6)]


def test_labels_of_dev_stay_and_the_teacher_fills_in_missing_ones(
    asked: list[tuple[str, int]],
) -> None:
    made = kit(target=FREE, rows=2, tie=False)
    teacher = teacher_of(made)
    labelled = (Example({"review": "cold film"}, "warm", "d:1"),)
    splits = Splits((), labelled, tuple(unlabelled("cold film", "bad film")), (), {})
    found = with_answers(splits, teacher)
    assert found.dev == labelled
    assert [e.answer for e in found.test] == ["cold", "bad"]
    (answer,) = teacher.score(labelled)
    assert (answer.predicted, answer.correct) == ("cold", 0.0)


def test_a_teacher_that_ends_no_answer_is_refused(asked: list[tuple[str, int]]) -> None:
    made = kit(target=FREE, rows=2, tie=False)
    with refused("ended none of its 2 answers within 7 tokens", "'bad'", "teacher.max_new_tokens"):
        teacher_of(made, max_new_tokens=7).answer_train(unlabelled("bad film", "bad story"))


def test_a_teacher_that_does_not_fit_the_context_is_refused() -> None:
    made = kit(target=LABELS, rows=2, tie=False)
    teacher = teacher_of(made)
    teacher.model = copy.copy(made.model)
    teacher.model.info = dataclasses.replace(made.model.info, context=40)
    with refused("tokens with the teacher's prompt, but the model takes 40", "shorten"):
        teacher.teach(made.sequences)


def test_the_taught_shares_are_what_dev_rows_are_scored_by() -> None:
    made = kit(target=CHOICES, rows=3, tie=False)
    taught = teacher_of(made).teach(made.sequences)
    evaluator = Evaluator(made.model, made.sequencer)
    answers = evaluator.score(made.start, taught)
    for answer, sequence in zip(answers, taught, strict=True):
        shares_C = said(sequence).shares_C
        assert shares_C is not None
        assert answer.probabilities is not None
        own = torch.tensor([answer.probabilities[c] for c in LONG_CHOICES]).log()
        assert answer.loss == pytest.approx(-(shares_C.exp() @ own.double()).item(), rel=1e-5)


# ---------------------------------------------------------------------------------- reverse

REVERSE = Distill(direction="reverse", samples=2, top=6, max_new_tokens=5)


def drawn_by(made: Kit, rows: torch.Tensor, objective: Distill = REVERSE) -> list[TokenSequence]:
    """Answers that a student samples with its rows; a quarter of the vocabulary ends one."""
    evaluator = Evaluator(made.model, made.sequencer)
    evaluator.end_ids = tuple(range(0, made.model.info.vocabulary, 4))
    assert objective.sampling is not None
    start = {"span": made.start}
    sampled = Rollouts(
        made.model, evaluator, made.sequences, objective.sampling, seed=1, start=start
    )
    found, figures = sampled.draw({"span": rows}, made.sequences, 0)
    assert figures["answers"] == len(found) == objective.samples * len(made.sequences)
    assert len({len(s.targets[0]) for s in found}) > 1
    return found


def as_teacher(made: Kit, rows: torch.Tensor, objective: Distill) -> Teacher:
    """A teacher with the student's own words and other rows."""
    refined = PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=made.sequencer.target,
        spans=made.sequencer.spans,
        date=made.sequencer.renderer.date,
        start_rows=made.start,
        rows=rows,
    )
    teaching = Teaching(prompt="somewhere")
    return Teacher(made.model, made.sequencer, teaching, objective, refined=refined)


def reverse_loss(
    made: Kit, rows: torch.Tensor, sequences: list[TokenSequence], objective: Distill = REVERSE
) -> Any:
    loss = Loss(made.model, Parts(objective=objective), FREE, {"span": rows})
    theta = {"span": torch.zeros_like(rows, requires_grad=True)}
    return loss.gradient(theta, sequences)


def test_the_reverse_divergence_is_zero_where_the_student_is_the_teacher() -> None:
    made = kit(target=FREE, rows=4, tie=False)
    rows = noisy(made.start)
    sampled = drawn_by(made, rows)
    same, other = (
        reverse_loss(made, rows, as_teacher(made, r, REVERSE).teach(sampled, {"span": rows}))
        for r in (rows, made.start)
    )
    assert same.loss == 0.0
    assert same.gradients["span"].abs().max().item() < 1e-9
    assert other.loss > 1e-4
    assert other.gradients["span"].norm().item() > 1e-4


@pytest.mark.parametrize("top", [3, None])
def test_the_reverse_divergence_is_that_of_full_passes(top: int | None) -> None:
    """At k = V the whole KL(student || teacher), with its gradient; below that, less."""
    made = kit(target=FREE, rows=3, tie=False)
    vocabulary = made.loaded.info.vocabulary
    objective = dataclasses.replace(REVERSE, top=top or vocabulary)
    teacher = teacher_of(made, objective)
    taught = teacher.teach(drawn_by(made, made.start, objective), {"span": made.start})
    found = reverse_loss(made, made.start, taught, objective)
    theta, expected = {"span": torch.zeros_like(made.start, requires_grad=True)}, []
    rows = Free().prompt(theta, {"span": made.start})
    for sequence in taught:
        answer, read = sequence.targets[0], teacher.context(sequence)
        ids = (*read.prefix, *read.suffix)
        logits = plain_logits(made.loaded, [*ids, *answer[:-1]])[len(ids) - 1 :]
        teacher_TV = torch.log_softmax(logits, dim=1)
        everything = [tuple(range(vocabulary))] * len(answer)
        outcome = made.model.outcome(rows, [sequence], choices=False, read=[everything])
        assert outcome.token_logprobs_BTK is not None
        student_TV = outcome.token_logprobs_BTK[0]
        assert said(sequence).ids[0] == tuple(student_TV[0].topk(objective.top).indices.tolist())
        expected.append((student_TV.exp() * (student_TV - teacher_TV)).sum(1).mean())
    whole = torch.stack(expected).mean()
    (gradient,) = torch.autograd.grad(whole, theta["span"])
    if top:
        assert 1e-4 < found.loss < whole.item() - 1e-4
    else:
        assert found.loss == pytest.approx(whole.item(), abs=1e-6)
        assert (found.gradients["span"] - gradient).norm() < 1e-4 * gradient.norm()


def trained(made: Kit, steps: int = 4, **options: Any) -> tuple[Refinement, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        ends = tuple(range(0, made.model.info.vocabulary, 4))
        patch.setattr(type(made.model), "ends_of", lambda *_: ends)
        refined = optimize(
            made.model,
            made.sequencer,
            made.sequences,
            training=Training(steps=steps, batch_size=4, evaluate_every=2, seed=3),
            parts=Parts(objective=REVERSE, optimizer=AdamW(learning_rate=0.1)),
            **{"teacher": teacher_of(made, REVERSE), "report": events.append, **options},
        )
    return refined, [event for event in events if event["event"] == "step"]


def test_reverse_distillation_lowers_the_divergence_and_resumes_to_the_bit() -> None:
    def fresh() -> Kit:
        return kit(target=FREE, rows=8, tie=False, dtype=torch.float32)

    kept: list[Checkpoint] = []
    whole, steps = trained(fresh(), keep=kept.append)
    again, _ = trained(fresh(), checkpoint=kept[0])
    assert kept[0].step == 2
    assert torch.equal(whole.checkpoint.theta["span"], again.checkpoint.theta["span"])
    assert not torch.equal(whole.checkpoint.theta["span"], kept[0].theta["span"])
    for event in steps:
        assert event["answers"] == event["examples"] == 8
        assert 1 <= event["answer_tokens"] <= 5
        assert "reward" not in event
    made = fresh()
    refined, _ = trained(made, 24)
    before, after = (
        reverse_loss(
            made,
            rows,
            teacher_of(made, REVERSE).teach(drawn_by(made, rows), {"span": rows}),
        ).loss
        for rows in (made.start, refined.prompt.rows)
    )
    assert after < 0.8 * before


def test_reverse_distillation_needs_a_teacher_and_room_for_the_answers() -> None:
    made = kit(target=FREE, rows=2, tie=False)
    with refused("'distill' needs a [teacher]", error=RecipeError):
        trained(made, teacher=None)
    teacher = teacher_of(made, dataclasses.replace(REVERSE, max_new_tokens=400))
    bare = unlabelled("warm film")
    assert teacher.answer_train(bare) == (bare, {"source": "student", "questions": 1})
    teacher.model = copy.copy(made.model)
    teacher.model.info = dataclasses.replace(made.model.info, context=300)
    with refused("q.jsonl:1", "the model takes 300", "objective.max_new_tokens below 400"):
        teacher.answer_train(bare)
