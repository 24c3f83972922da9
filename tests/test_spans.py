"""Several spans in one template: tokens, rows by span, artifact, drift, and what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import embedgrad
import tiny
from embedgrad.errors import TemplateError
from embedgrad.evaluation.drift import drift_facts, token_drift
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, evaluate
from embedgrad.inference.answer import as_text, stream_answer
from embedgrad.prompt.artifact import load, save
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Template
from embedgrad.prompt.truncation import longest_fit
from embedgrad.recipe.open_run import Answering
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Training
from kit import DAY, SEVERAL, Kit, cut, kit, noisy
from kit_text import KINDS, TEXTS, example, plain_ids, sequencer


def prompt_of(made: Kit) -> PromptEmbedding:
    return PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=made.sequencer.target,
        spans=made.sequencer.spans,
        date=DAY,
        start_rows=made.start,
        rows=noisy(made.start, 0.2),
        provenance={"model": {"name": "m"}},
    )


# ------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("place", SEVERAL)
@pytest.mark.parametrize("kind", KINDS)
def test_spans_in_their_places_are_the_plain_tokens(kind: str, place: str) -> None:
    made = sequencer(kind, SEVERAL[place])
    assert made.prompt_ids == sum((span.ids for span in made.spans), ())
    merges = kind == "metaspace-always"  # which puts a space behind every cut
    for row in tiny.reviews(6, seed=1):
        sequence = made(row)
        first, *others = made.spans
        assert len(sequence.later) == sum(len(span.ids) for span in others)
        assert list(sequence.later) == sorted(set(sequence.later))
        assert sequence.context(made.prompt_ids) == tuple(cut(sequence, made.prompt_ids))
        plain = plain_ids(made, dict(row.columns))
        if sequence.plain is None:
            assert cut(sequence, made.prompt_ids) == plain
            assert cut(sequence, first.ids + len(sequence.later) * (7,)) != plain
        else:
            assert merges
            assert list(sequence.plain) == plain
            assert sequence.uncut().later == ()


@pytest.mark.parametrize("place", SEVERAL)
@settings(max_examples=15)
@given(review=TEXTS)
def test_a_row_is_its_plain_tokens_or_says_so(place: str, review: str) -> None:
    made = sequencer("bytelevel", SEVERAL[place])
    sequence = made(example(review))
    expected = plain_ids(made, {"review": review})
    assert (cut(sequence, made.prompt_ids) == expected) is (sequence.plain is None)
    assert sequence.plain is None or list(sequence.plain) == expected


def test_one_span_is_what_it_was() -> None:
    made = sequencer("bytelevel", Template.plain("{review}\n[[Is it?]]\nSo:"))
    assert made.spans == (made.span,)
    assert made(example("x")).later == ()


def test_text_between_two_spans_is_drawn_in_once() -> None:
    made = sequencer(
        "bytelevel", Template.plain("[[Is it positive or negative?]]\n[[So]] {review}")
    )
    first, second = made.spans
    assert (first.text, first.drawn_right) == ("Is it positive or negative?\n", "\n")
    assert second.drawn_left == ""
    sequence = made(example("It was great"))
    assert sequence.plain is None
    assert sequence.later[0] == 0  # directly behind the first
    assert sum("the span became" in note for note in made.notes([])) == 1


def test_spans_that_merge_with_each_other_keep_plain_tokens_for_the_text_prompt() -> None:
    made = sequencer("bytelevel", Template.plain("{review}\n[[The fi]][[lm is good]]\n"))
    row = example("x")
    sequence = made(row)
    assert sequence.plain is not None
    assert list(sequence.plain) == plain_ids(made, dict(row.columns))
    assert "in 1 of 1 rows the text next to a span merges with it" in made.notes([sequence])[0]
    refusing = sequencer("bytelevel", made.renderer.template, merges="refuse")
    with pytest.raises(TemplateError, match="put a line feed between them"):
        refusing.build([row])


def test_a_later_span_that_tokenizes_to_nothing_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"span ' ' tokenizes to nothing"):
        sequencer("wordpiece", Template.plain("[[Is it?]] {review} [[ ]]"))


@pytest.mark.parametrize("place", SEVERAL)
def test_saved_spans_give_the_same_tokens(place: str) -> None:
    made = sequencer("bytelevel", SEVERAL[place])
    again = sequencer("bytelevel", SEVERAL[place], rows=(), spans=made.spans)
    for row in tiny.reviews(4, seed=3):
        assert again(row) == made(row)
    with pytest.raises(TemplateError, match="are not those it was prepared for"):
        sequencer("bytelevel", SEVERAL[place], rows=(), spans=made.spans[:1])


def test_rows_are_shortened_to_the_context_with_every_span_counted() -> None:
    template = SEVERAL["around"]
    row = example("The film was great. " * 8)
    whole = len(
        sequencer("bytelevel", template)(row).context(sequencer("bytelevel", template).prompt_ids)
    )
    made = sequencer("bytelevel", template, context=whole - 3, truncate="review")
    short = made(row)
    longest = max(map(len, short.targets))
    assert len(short.context(made.prompt_ids)) + longest <= whole - 3
    assert made.truncated == 1


# ---------------------------------------------------------------------------------- rows and files


@pytest.fixture(scope="module", params=["system-and-user", "twice"])
def made(request: pytest.FixtureRequest) -> Kit:
    return kit(dtype=torch.float32, template=SEVERAL[request.param], rows=4)


def test_rows_are_seen_by_span(made: Kit) -> None:
    prompt = prompt_of(made)
    named = {name: prompt.rows[place] for name, place in prompt.places().items()}
    assert list(named) == ["span 1", "span 2"]
    assert [len(rows) for rows in named.values()] == [len(span.ids) for span in prompt.spans]
    assert torch.equal(torch.cat([*named.values()]), prompt.rows)
    alone = prompt_of(kit(dtype=torch.float32))
    assert alone.places() == {"span": slice(0, len(alone.rows))}
    with pytest.raises(TemplateError, match=r"2 spans, but this works with one"):
        _ = prompt.span


def test_several_spans_come_back_from_the_file(made: Kit, tmp_path: Path) -> None:
    prompt = prompt_of(made)
    folder = save(prompt, tmp_path / "prompt")
    found = load(folder)
    assert found.spans == prompt.spans
    assert found.template == prompt.template
    assert torch.equal(found.rows, prompt.rows)
    values = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    assert [span["text"] for span in values["spans"]] == [s.text for s in prompt.spans]
    drift = [distance for span in values["spans"] for distance in span["drift"]]
    assert drift == pytest.approx([0.2] * len(prompt.rows), abs=1e-4)


def test_drift_is_reported_per_span(made: Kit) -> None:
    prompt = prompt_of(made)
    first = len(prompt.spans[0].ids)
    rows = prompt.start_rows.clone()
    rows[first:] = prompt.rows[first:]
    prompt = prompt.with_rows(rows)
    tokens = token_drift(prompt, made.model)
    assert [t.span for t in tokens] == [1] * first + [2] * (len(rows) - first)
    facts = drift_facts(prompt, tokens)
    assert [span["drift"]["max"] for span in facts["spans"]] == pytest.approx([0, 0.2], abs=1e-4)
    assert facts["drift"]["max"] == pytest.approx(0.2, abs=1e-4)
    assert facts["spans"][0]["nearest_tokens_unchanged"] == 1
    assert facts["tokens"] == [dataclasses.asdict(t) for t in tokens]
    alone = prompt_of(kit(dtype=torch.float32))
    assert "spans" not in drift_facts(alone, token_drift(alone, made.model))


# ------------------------------------------------------------------------------ trained and used


@pytest.fixture(scope="module")
def trained() -> tuple[Kit, PromptEmbedding]:
    made = kit(dtype=torch.float32, template=SEVERAL["around"], rows=8)
    found = optimize(
        made.model,
        made.sequencer,
        made.sequences[:6],
        made.sequences[6:],
        training=Training(steps=4, batch_size=3),
    )
    info = {"name": "m", "embedding_digest": made.loaded.info.embedding_digest}
    return made, found.prompt.with_rows(noisy(made.start, 0.25)).with_provenance(model=info)


def test_several_spans_are_trained_together(trained: tuple[Kit, PromptEmbedding]) -> None:
    made, _ = trained
    events: list[dict[str, Any]] = []
    found = optimize(
        made.model,
        made.sequencer,
        made.sequences,
        training=Training(steps=4, batch_size=3),
        report=events.append,
    )
    assert found.prompt.spans == made.sequencer.spans
    drift = found.prompt.drift
    assert all(drift[place].max() > 0 for place in found.prompt.places().values())
    assert drift.max() <= 0.3 + 1e-5


def test_a_saved_prompt_with_several_spans_answers(
    trained: tuple[Kit, PromptEmbedding], tmp_path: Path
) -> None:
    made, prompt = trained
    folder = save(prompt, tmp_path / "prompt")
    loaded = embedgrad.load(folder)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation())
    expected = [a.predicted for a in evaluator.score(prompt.rows, made.sequences)]
    texts = [s.example.columns["review"] for s in made.sequences]
    assert loaded.generate(texts, model=made.model) == expected
    compared = evaluate(evaluator, prompt, made.sequences)
    assert [a.predicted for a in compared.refined_answers] == expected


def test_free_answers_to_several_spans_are_streamed(tmp_path: Path) -> None:
    made = kit(dtype=torch.float32, template=SEVERAL["opening"], target=Target(), rows=3)
    evaluation = Evaluation(max_new_tokens=6)
    evaluator = Evaluator(made.model, made.sequencer, evaluation)
    run = Answering(prompt_of(made), made.model, made.sequencer, evaluator)
    for sequence, answered in zip(
        made.sequences, evaluator.score(run.prompt.rows, made.sequences), strict=True
    ):
        streamed = "".join(stream_answer(run, sequence.example))
        assert streamed == as_text({"answer": answered.predicted, "cut": answered.cut})


class Characters:
    """A tokenizer without offsets, so that a text may be cut behind any character."""

    is_fast = False


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("abcdefgh", "abcde"),
        ("ab\U0001f468\u200d\U0001f469\u200d\U0001f467cd", "ab"),  # a family of one emoji
        ("abc\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "abc\U0001f1e9\U0001f1ea"),  # flags
        ("abcde\u0301\u0323fg", "abcd"),  # a letter with two marks
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466cd", ""),
    ],
)
def test_a_text_is_cut_between_what_reads_as_characters(text: str, kept: str) -> None:
    for excess in range(1, 8):
        end = longest_fit(Characters(), text, excess, lambda end: end <= 5)
        assert text[:end] == kept
