"""The interpolation from the text rows to the refined rows, and what the model says of both."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad.errors import DataError
from embedgrad.evaluation.evaluator import summarize
from embedgrad.experiments.interpolation import (
    PLACES,
    QUESTIONS,
    _question,
    ask_about_prompt,
    interpolate,
    score_points,
)
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import OpenRun, open_run
from run_kit import Command

pytest_plugins = ["tiny_runs"]


@pytest.fixture(scope="module")
def opened(finished: tuple[Path, Any]) -> OpenRun:
    return open_run(finished[0])


@pytest.fixture
def folder(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_the_line_goes_through_both_prompts_to_the_bit(opened: OpenRun) -> None:
    prompt = opened.prompt
    assert torch.equal(prompt.rows_at(0.0), prompt.start_rows)
    assert torch.equal(prompt.rows_at(1.0), prompt.rows)
    half = prompt.rows_at(0.5)
    torch.testing.assert_close(half - prompt.start_rows, prompt.rows - half)
    beyond = prompt.rows_at(1.5)
    torch.testing.assert_close(beyond - prompt.rows, (prompt.rows - prompt.start_rows) / 2)


def test_scores_at_the_ends_are_those_of_the_prompts(opened: OpenRun) -> None:
    sequences = opened.sequencer.build(read_data(opened.recipe).dev)
    events: list[dict[str, Any]] = []
    points = score_points(opened, sequences, events.append)
    done = [event["done"] for event in events]
    assert [point["t"] for point in points] == list(PLACES)
    assert done[-1] == len(PLACES) * len(sequences)
    assert done == sorted(done)
    for place, rows in ((0.0, opened.prompt.start_rows), (1.0, opened.prompt.rows)):
        answered = opened.evaluator.score(rows, sequences)
        expected = summarize(answered, opened.evaluator.target.choices)
        point = points[PLACES.index(place)]
        assert point["accuracy"] == expected.accuracy
        assert point["log_loss"] == expected.log_loss
        assert point["interval"] == list(expected.interval)
    losses = [point["log_loss"] for point in points]
    assert len(set(losses)) == len(PLACES)  # every place is another prompt


def test_an_interpolation_needs_rows(opened: OpenRun) -> None:
    with pytest.raises(DataError, match="no rows"):
        score_points(opened, [])


def test_questions_hold_the_rows_in_their_words_place(opened: OpenRun) -> None:
    for question in QUESTIONS:
        sequence, evaluator = _question(opened, question)
        decode = evaluator.model.tokenizer.decode
        text = decode([*sequence.prefix, *opened.prompt.span.ids, *sequence.suffix])
        assert question.replace("<prompt>", opened.prompt.span.text) in text


def test_replies_are_those_of_plain_decoding(opened: OpenRun) -> None:
    said = ask_about_prompt(opened)
    assert [asked["question"] for asked in said] == [
        q.replace("<prompt>", "...") for q in QUESTIONS
    ]
    sequence, _ = _question(opened, QUESTIONS[0])
    ids = torch.tensor([[*sequence.prefix, *opened.prompt.span.ids, *sequence.suffix]])
    new = opened.model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False,
        eos_token_id=list(opened.evaluator.end_ids), pad_token_id=0,
    )[0, ids.shape[1] :]  # fmt: skip
    plain = opened.model.tokenizer.decode(new, skip_special_tokens=True)
    assert said[0]["text"]["reply"] == plain.strip()


def test_an_interpolation_is_kept_and_used_again(
    folder: Path, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embedgrad("report", folder, "--rows", "5", "--quiet")
    assert (first.code, first.err) == (0, "")
    kept = json.loads((folder / "interpolation.json").read_text(encoding="utf-8"))
    assert (kept["split"], kept["rows"]) == ("dev", 5)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="interpolation"' in html
    assert 'id="meaning"' in html
    with monkeypatch.context() as patch:
        patch.setattr(
            "embedgrad.experiments.interpolation.interpolate",
            lambda *_: pytest.fail("interpolated again"),
        )
        assert embedgrad("report", folder, "--rows", "5", "--quiet").code == 0
        assert embedgrad("report", folder, "--rows", "7", "--no-model").code == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == html
    assert embedgrad("report", folder, "--rows", "7", "--quiet").code == 0
    assert json.loads((folder / "interpolation.json").read_text(encoding="utf-8"))["rows"] == 7


def test_an_interpolation_that_cannot_be_written_is_shown(folder: Path, embedgrad: Command) -> None:
    (folder / "interpolation.json").mkdir()  # what no file can replace
    done = embedgrad("report", folder, "--rows", "3", "--quiet")
    assert (done.code, len(done.lines)) == (0, 1)
    assert done.err.startswith("The interpolation is not saved (")
    assert "interpolation.json: cannot be written" in done.err
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="interpolation"' in html
    assert 'id="meaning"' in html


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(
    folder: Path, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "embedgrad.experiments.interpolation.interpolate", lambda *_: pytest.fail("interpolated")
    )
    access = os.access
    monkeypatch.setattr(os, "access", lambda at, mode: not mode & os.W_OK and access(at, mode))
    done = embedgrad("report", folder)
    problem = "cannot be written (Permission denied); give a folder that you may write to"
    assert (done.code, done.err) == (2, f"error: {folder / 'report.html'}: {problem}\n")


def test_an_interpolation_shows_how_far_it_is(folder: Path) -> None:
    told: list[dict[str, Any]] = []
    interpolate(folder, 3, (), told.append)
    stages = [event["text"] for event in told if event["event"] == "stage"]
    assert stages[-2:] == ["interpolating", "asking the model"]
    scored = [event for event in told if event["event"] == "scoring"]
    assert scored[-1]["done"] == scored[-1]["total"] == 3 * len(PLACES)


def test_a_run_of_free_answers_has_a_page(
    generated: Path, tmp_path: Path, embedgrad: Command
) -> None:
    folder = shutil.copytree(generated, tmp_path / "run")
    done = embedgrad("report", folder, "--rows", "4", "--quiet")
    assert (done.code, done.err) == (0, "")
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="reliability"' not in html
    assert 'id="interpolation"' in html
    assert "Left out" not in html
