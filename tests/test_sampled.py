"""Sampled answers beside the greedy one: Avg@k and pass@k, intervals, where they are drawn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedgrad import Recipe, RecipeError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, summarize
from embedgrad.evaluation.sampled import pass_at_k, summarize_samples
from embedgrad.experiments.compare.compare import compare
from embedgrad.experiments.run import run
from embedgrad.parts.scorers import Contains
from embedgrad.prompt.sequence import Target
from embedgrad.report.page.page import run_page
from embedgrad.report.page.run_files import read_run
from embedgrad.report.terminal.methods_table import methods_markdown
from embedgrad.report.terminal.tables import comparison_table, show
from kit import kit
from run_kit import values, write_jsonl

pytest_plugins = ["tiny_runs"]

FREE = Target()


@given(st.integers(1, 7), st.integers(0, 7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, right: int, k: int) -> None:
    right, k = min(right, samples), min(k, samples)
    draws = list(itertools.combinations(range(samples), k))
    found = sum(any(i < right for i in draw) for draw in draws) / len(draws)
    assert pass_at_k(samples, right, k) == pytest.approx(found)


def test_pass_at_k_refuses_what_makes_no_sense() -> None:
    for samples, right, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            pass_at_k(samples, right, k)


def test_the_interval_knows_that_samples_of_a_row_are_alike() -> None:
    rows = [[float(i % 2)] * 16 for i in range(20)]  # each row all right or all wrong
    alike = summarize_samples(rows)
    mixed = summarize_samples([[0.0, 1.0] * 8] * 20)
    assert alike is not None
    assert mixed is not None
    assert alike["accuracy"] == mixed["accuracy"] == 0.5
    low, high = alike["interval"]
    assert high - low > 0.35  # as of 20 rows, and not of 320 answers
    assert mixed["interval"] == [0.5, 0.5]
    assert alike["pass_at"] == dict.fromkeys(("1", "2", "4", "8", "16"), 0.5)
    assert mixed["pass_at"]["2"] == pytest.approx(pass_at_k(16, 8, 2))
    assert mixed["pass_at"]["16"] == 1
    three = summarize_samples([[1.0, 0.0, 0.0]])
    assert three is not None
    assert list(three["pass_at"]) == ["1", "2", "3"]
    assert summarize_samples([(), ()]) is None
    assert summarize_samples([]) is None


def test_samples_are_scored_and_do_not_depend_on_the_rows_beside_them() -> None:
    made = kit(target=FREE, rows=6, dtype=torch.float32)
    evaluation = Evaluation(scorer=Contains(), max_new_tokens=6, samples=3, batch_size=4)
    evaluator = Evaluator(made.model, made.sequencer, evaluation)
    answers = evaluator.score_text_prompt(made.start, made.sequences)
    assert {len(a.samples) for a in answers} == {len(a.sample_scores) for a in answers} == {3}
    assert any(len(set(a.samples)) > 1 for a in answers)
    greedy = evaluator.greedy.score_text_prompt(made.start, made.sequences)
    assert [replace(a, samples=(), sample_scores=()) for a in answers] == greedy
    some = evaluator.score_text_prompt(made.start, made.sequences[2:5])
    assert [a.samples for a in some] == [a.samples for a in answers[2:5]]
    # What is right is what the scorer says.
    wanted = [replace(s, example=replace(s.example, answer=a.samples[1]))
              for s, a in zip(made.sequences, answers, strict=True)]  # fmt: skip
    again = evaluator.score_text_prompt(made.start, wanted)
    for answer in again:
        expected = [Contains().score(text, answer.answer) for text in answer.samples]
        assert list(answer.sample_scores) == expected
    summary = summarize(again, ())
    assert summary.sampled is not None
    assert summary.sampled["accuracy"] == pytest.approx(
        fmean(s for a in again for s in a.sample_scores)
    )
    assert summarize(greedy, ()).sampled is None


@pytest.fixture
def sums(model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    rows = [{"question": f"What is {i} plus 1?", "label": str(i + 1)} for i in range(30)]
    path = write_jsonl(tmp_path / "sums.jsonl", rows)

    def made(**evaluation: Any) -> Recipe:
        given = values(
            model_folder,
            tmp_path,
            data={"train": str(path)},
            template={"user": "{question}\n\n[[Give the answer only:]]"},
            solutions={"source": "answer"},
            training={"steps": 2, "batch_size": 4},
            compare={"seeds": [0, 1], "methods": ["no-template", "random-init"]},
            evaluation={"scorer": "number", "max_new_tokens": 4, **evaluation},
        )
        del given["target"], given["data"]["dev"], given["data"]["test"]
        return Recipe.from_dict(given)

    return made


def test_only_test_rows_are_sampled(
    sums: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = Evaluator.score

    def spy(self: Evaluator, prompt: Any, sequences: Any, *more: Any) -> Any:
        asked.append(self.evaluation.samples * len(sequences))
        return plain(self, prompt, sequences, *more)

    monkeypatch.setattr(Evaluator, "score", spy)
    out = tmp_path / "run"
    result = run(sums(samples=4), out)
    rows = result["test_rows"]
    assert sum(asked) in (4 * rows, 2 * 4 * rows)  # once where dev kept the text prompt
    for name in ("text", "refined"):
        sampled = result[name]["sampled"]  # type: ignore[literal-required]
        assert sampled["samples"] == 4
        assert 0 <= sampled["accuracy"] <= sampled["pass_at"]["4"] <= 1
    line = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert len(line["text"]["samples"]) == len(line["text"]["sample_scores"]) == 4
    page = run_page(read_run(out), "run")
    assert "mean over 4 sampled answers a row" in page
    shown = tmp_path / "shown"
    with shown.open("w") as file:
        show(comparison_table(result), file)
    assert "text prompt: mean over 4 sampled answers a row" in shown.read_text()


def test_a_comparison_has_the_mean_over_samples(
    sums: Callable[..., Recipe], tmp_path: Path
) -> None:
    results = compare(sums(samples=3), tmp_path / "out")
    rows = {(row["method"], row["seed"]): row for row in results["rows"]}
    text = rows["text", None]["sampled_scores"]
    assert text is not None
    assert len(text) == results["test_rows"]
    for entry in results["methods"]:
        own = [row["sampled_scores"] for (name, _), row in rows.items() if name == entry["method"]]
        means = [fmean(scores) for scores in zip(*own, strict=True)]  # type: ignore[arg-type]
        assert entry["sampled"]["samples"] == 3
        assert entry["sampled"]["accuracy"] == pytest.approx(fmean(means))
        difference = fmean(means) - fmean(text)
        assert entry["sampled"]["difference"] == pytest.approx(difference, abs=1e-12)
    assert "mean over 3 sampled answers a row: text " in methods_markdown(results)
    again = compare(sums(samples=3), tmp_path / "out")  # from what was saved
    assert again["methods"] == results["methods"]
    plain = compare(sums(), tmp_path / "plain")
    assert "sampled" not in plain["methods"][0]


def test_choices_are_not_sampled(model_folder: Path, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.samples: 2, but answers are chosen"):
        Recipe.from_dict(values(model_folder, data, evaluation={"samples": 2}))
