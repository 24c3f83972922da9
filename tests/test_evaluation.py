"""What scoring refuses, and what it says of replies that did not end by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import embedgrad.evaluation.evaluator as evaluator_module
import tiny
from embedgrad.data.examples import Example
from embedgrad.errors import DataError
from embedgrad.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    ScoredAnswer,
    compare_answers,
    evaluate,
    summarize,
)
from embedgrad.evaluation.significance import bootstrap_mean, wilson_interval
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import Reply, replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.scorers import Exact, Number
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Template
from embedgrad.report.terminal.tables import describe_greedy
from kit_loop import small, train

ROWS = [
    Example({"review": text}, "7", f"rows.csv:{n}") for n, text in enumerate(("so", "it is"), 2)
]


def test_an_answer_that_no_reply_could_match_is_refused_before_anything_is_spent() -> None:
    check_answers(ROWS, Target(), Number())
    words = [Example({}, "Addition", f"rows.csv:{line}") for line in range(9, 14)]
    told = r"^rows\.csv:9: .* 'Addition' is none that .* 'number' .* \(of 5 such rows the next: "
    told += r"'Addition' \(rows\.csv:10\), 'Addition' \(rows\.csv:11\)\); choose another scorer"
    with pytest.raises(DataError, match=told):
        check_answers([*ROWS, *words], Target(), Number())
    check_answers(words, Target(), Exact())
    check_answers(words, Target(("Addition", "Division")), Number())


def test_replies_that_run_into_the_limit_are_counted() -> None:
    model = LanguageModel(tiny.loaded())
    sequencer = model.sequencer(Template.chat(user="{review} [[Is it?]]"), Target(), ROWS)
    sequences = sequencer.build(ROWS)
    rows = model.embed(sequencer.span.ids)
    decoding = Decoding(max_new_tokens=3)
    never = replies(model, rows, sequences, decoding, end_ids=())
    assert [reply.cut for (reply,) in never] == [True, True]
    everything = tuple(range(model.info.vocabulary))
    at_once = replies(model, rows, sequences, decoding, end_ids=everything)
    assert at_once == [(Reply("", False),), (Reply("", False),)]
    evaluator = Evaluator(model, sequencer, Evaluation(max_new_tokens=1))
    evaluator.end_ids = ()
    answered = evaluator.score(rows, sequences)
    assert summarize(answered, ()).cut == 2


def test_replies_without_any_answer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [replace(row, answer="7") for row in (*ROWS, ROWS[0])]
    model = LanguageModel(tiny.loaded())
    sequencer = model.sequencer(Template.chat(user="{review} [[Is it?]]"), Target(), numbers)
    evaluator = Evaluator(model, sequencer, Evaluation(scorer=Number()))
    said = [Reply("I do not know.", True), Reply("It is 8.", False), Reply("7", False)]
    monkeypatch.setattr(LanguageModel, "generate", lambda *_, **__: [(reply,) for reply in said])
    answered = evaluator.score(model.embed(sequencer.span.ids), sequencer.build(numbers))
    by_reply = {a.predicted: (a.correct, a.unread) for a in answered}
    assert by_reply == {"I do not know.": (0, True), "It is 8.": (0, False), "7": (1, False)}
    assert summarize(answered, ()).unread == 1


def answered(*scores: float) -> list[ScoredAnswer]:
    return [ScoredAnswer("a:1", "7", "7", score, 0.5, None) for score in scores]


def test_graded_scores_have_a_bootstrap_interval_and_their_own_test() -> None:
    text, refined = answered(0.25, 0.25, 0.5, 0.0), answered(1.0, 0.75, 0.5, 0.25)
    compared = compare_answers(text, refined, ()).as_dict()
    assert compared["text"]["accuracy"] == 0.25
    assert compared["text"]["interval"] == bootstrap_mean([0.25, 0.25, 0.5, 0.0])
    assert compared["difference"]["test"] == "sign-flip"
    compared = compare_answers(answered(0, 1, 0, 0), answered(1, 1, 1, 0), ()).as_dict()
    assert compared["text"]["interval"] == wilson_interval(1, 4)
    assert compared["difference"]["test"] == "McNemar"


def test_rows_that_dev_left_as_they_were_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    refined = train(made).prompt
    kept = refined.with_rows(refined.start_rows.clone())
    merged = [
        replace(s, plain=(*s.prefix, *made.sequencer.span.ids, *s.suffix)) for s in made.sequences
    ]
    passes: list[int] = []
    score = Evaluator.score

    def counted(self: Evaluator, *args: Any) -> Any:
        passes.append(len(args[1]))
        return score(self, *args)

    monkeypatch.setattr(Evaluator, "score", counted)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=4))
    for prompt, sequences, times in ((kept, made.sequences, 1), (refined, made.sequences, 2)):
        comparison = evaluate(evaluator, prompt, sequences)
        assert passes == [len(sequences)] * times
        passes.clear()
        assert comparison.refined.rows == len(sequences)
        assert (comparison.text_answers == comparison.refined_answers) == (prompt is kept)
    evaluate(evaluator, kept, merged)
    assert passes == [0, len(merged), len(merged)]  # the text's tokens are others than its rows'


def test_how_often_the_greedy_reply_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to REPLIES rows spread over all; decoding shows whether a reply goes on."""
    made = small()
    prompt = train(made).prompt
    monkeypatch.setattr(evaluator_module, "REPLIES", 5)
    asked: list[Any] = []

    def generate(
        self: LanguageModel, prompt: Any, rows: Any, decoding: Decoding, **options: Any
    ) -> list[tuple[Reply, ...]]:
        asked.append((rows, decoding.max_new_tokens))
        texts = [" positive", "negative", "positive.", "It is positive"]
        return [(Reply(text, cut=False),) for text in texts]

    monkeypatch.setattr(LanguageModel, "generate", generate)
    comparison = evaluate(Evaluator(made.model, made.sequencer), prompt, made.sequences)
    assert comparison.refined.greedy_is_choice == 0.5
    assert asked == [(made.sequences[::3], 2)]  # 12 rows; choices of one token
    written = [answer.reply for answer in comparison.refined_answers]
    assert written[::3] == ["positive", "negative", "positive.", "It is positive"]
    assert set(written[1::3] + written[2::3]) == {None}


def test_a_low_share_of_choices_is_a_warning_with_its_cure() -> None:
    assert (
        describe_greedy(0.995) == "the refined prompt's greedy reply is a choice in 99.5 % of rows"
    )
    told = describe_greedy(0.0)
    assert told.startswith(
        "warning: the refined prompt's greedy reply is a choice in 0.0 % of rows"
    )
    assert "objective.over = 'both'" in told
