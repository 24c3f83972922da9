"""Scores by group, end to end: runs, comparisons, tables and pages; bad groups in one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks.run import groups_in, merge_results
from embedgrad import Recipe
from embedgrad.data.examples import Example
from embedgrad.data.problems import Problems
from embedgrad.errors import DataError, RunError
from embedgrad.evaluation.evaluator import ScoredAnswer, compare_answers
from embedgrad.evaluation.per_group import compare_groups, group_scores, worst
from embedgrad.evaluation.significance import wilson_interval
from embedgrad.experiments.compare.compare import compare
from embedgrad.experiments.compare.results import methods_of
from embedgrad.experiments.run import run
from embedgrad.prompt import artifact
from embedgrad.recipe.build import read_data
from embedgrad.report.page.page import comparison_page, run_page
from embedgrad.report.page.run_files import read_run
from embedgrad.report.terminal.methods_table import methods_markdown, methods_table
from embedgrad.report.terminal.tables import comparison_table, show
from refusals import refused
from run_kit import ROWS, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

OWA = {"name": "owa", "group": "genre", "weights": "gini"}
GENRES = ("crime", "drama", "farce")


@pytest.fixture(scope="module")
def genres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the fixture `data`, with a column of three genres."""
    folder = tmp_path_factory.mktemp("genres")
    texts = {example.columns["review"]: dict(example.columns) for example in tiny.reviews(120)}
    rows = [{**row, "genre": GENRES[i % 3]} for i, row in enumerate(texts.values())]
    for split, count in ROWS.items():
        write_jsonl(folder / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    return folder


def recipe(model: Path, data: Path, **sections: Any) -> Recipe:
    options: dict[str, Any] = {"objective": OWA, "training": {"epochs": 1, "batch_size": 6}}
    return Recipe.from_dict(values(model, data, **{**options, **sections}))


def printed(renderable: Any) -> str:
    file = io.StringIO()
    show(renderable, file)
    return file.getvalue()


# -- the numbers -----------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    found = group_scores("abaab", [1, 0, 1, 0, 0])
    assert [(one["group"], one["rows"], one["accuracy"]) for one in found] == [
        ("a", 3, pytest.approx(2 / 3)),
        ("b", 2, 0.0),
    ]
    assert found[0]["interval"] == list(wilson_interval(2, 3))
    assert worst(found)["group"] == "b"


def test_a_group_is_judged_among_all_groups() -> None:
    def answers(right: str) -> list[ScoredAnswer]:
        return [ScoredAnswer("", "yes", "", float(r == "1"), 0.0, None) for r in right]

    examples = [Example({"g": g}, "yes", "") for g in "a" * 7 + "b" * 7]
    comparison = compare_answers(answers("0" * 14), answers("1" * 7 + "0" * 7), ())
    found = compare_groups("g", examples, comparison)["groups"]
    assert found["verdicts"] == ["improved", "no reliable gain"]  # 2 / 2**7, twice, and 1
    assert found["worst"]["refined"]["group"] == "b"
    shorter = compare_answers(answers("0" * 13), answers("1" * 6 + "0" * 7), ())
    found = compare_groups("g", examples[1:], shorter)["groups"]
    assert found["verdicts"] == ["no reliable gain"] * 2
    assert compare_groups(None, examples, comparison) == {}


def test_hostile_names_of_groups_stay_on_their_line() -> None:
    examples = [Example({"g\x1b[2J": g}, "yes", "") for g in ("a\nb", "[bold]c\x07")]
    right, wrong = (ScoredAnswer("", "yes", "", c, 0.0, None) for c in (1.0, 0.0))
    comparison = compare_answers([wrong, right], [right, wrong], ())
    found = compare_groups("g\x1b[2J", examples, comparison)["groups"]
    shown = printed(comparison_table({**comparison.as_dict(), "groups": found}))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    lines = [line for line in shown.splitlines() if "0.0 % (" in line]
    assert len(lines) == 3  # two groups, and the worst
    assert any("[bold]c" in line for line in lines)


# -- runs and comparisons --------------------------------------------------------------------------


def test_a_run_says_how_each_group_fares(
    model_folder: Path, genres: Path, tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "run"
    result = run(recipe(model_folder, genres), out)
    groups = result["groups"]
    assert groups["column"] == "genre"
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for name in ("text", "refined"):
        assert [one["group"] for one in groups[name]] == list(GENRES)
        for one in groups[name]:
            own = [r[name]["correct"] for r in rows if r["columns"]["genre"] == one["group"]]
            assert one["rows"] == len(own) == 4
            assert one["accuracy"] == pytest.approx(sum(own) / 4)
        lowest = min(one["accuracy"] for one in groups[name])
        assert groups["worst"][name]["accuracy"] == lowest
    shown = printed(comparison_table(result))
    assert f"worst group: {100 * groups['worst']['text']['accuracy']:.1f} %" in shown
    assert all(genre in shown for genre in GENRES)
    html = run_page(read_run(out), "run")
    section = html.partition('<section id="groups"')[2].partition("</section>")[0]
    assert all(f'<th scope="row">{genre}</th>' in section for genre in GENRES)
    assert "</strong> worst" in section
    assert "Holm" in section
    # The saved prompt knows them too, and `evaluate` finds the same.
    prompt = json.loads((out / "prompt" / "prompt.json").read_text(encoding="utf-8"))
    assert prompt["scores"]["groups"] == groups
    assert embedgrad("evaluate", out, "--json").json["groups"] == groups


def test_the_plain_objective_is_scored_by_a_column_that_evaluation_names(
    model_folder: Path, genres: Path, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"objective": {"name": "cross_entropy"}}
    training = {"steps": 1, "batch_size": 6}
    scored = recipe(model_folder, genres, evaluation={"group": "genre"}, training=training, **plain)
    assert run(scored, tmp_path / "scored")["groups"]["column"] == "genre"
    bare = recipe(model_folder, genres, training=training, **plain)
    result = run(bare, tmp_path / "bare")
    assert "groups" not in result
    assert "worst group" not in printed(comparison_table(result))
    assert 'id="groups"' not in run_page(read_run(tmp_path / "bare"), "bare")


def test_a_comparison_says_which_group_is_worst_with_each_method(
    model_folder: Path, genres: Path, tmp_path: Path
) -> None:
    options = {"compare": {"methods": ["embedgrad"], "seeds": [0, 1]}}
    results: Any = compare(recipe(model_folder, genres, **options), tmp_path / "compared")
    assert results["group_column"] == "genre"
    text, method = results["methods"]
    assert [one["rows"] for one in method["groups"]] == [4, 4, 4]
    runs = [row["groups"] for row in results["rows"] if row["method"] == "embedgrad"]
    for one, *own in zip(method["groups"], *runs, strict=True):
        assert one["accuracy"] == pytest.approx(sum(o["accuracy"] for o in own) / 2)
    accuracy = sum(4 * one["accuracy"] for one in text["groups"]) / 12
    assert accuracy == pytest.approx(text["accuracy"])
    assert method["worst_group"] == worst(method["groups"])
    assert "worst group (95 %)" in printed(methods_table(results))
    header, _, *lines = methods_markdown(results).splitlines()
    place = header.split(" | ").index("worst group (95 %)")
    assert lines[0].split(" | ")[place].startswith(f"{100 * text['worst_group']['accuracy']:.1f}")
    # Merged with rows of another session, methods keep them.
    lines = (tmp_path / "compared" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["group"] for line in lines} == set(GENRES)
    named = groups_in(tmp_path / "compared" / "predictions.jsonl")
    now = {**results, "rows": [row for row in results["rows"] if row["seed"] != 0]}
    now["methods"] = methods_of(now["rows"], named)
    assert merge_results(results, now, named)["methods"] == results["methods"]
    html = comparison_page(results, "compared")
    assert "</strong> worst" in html.partition('<section id="groups"')[2].partition("</section>")[0]


def test_a_run_resumes_with_its_groups_and_not_with_others(
    model_folder: Path, genres: Path, tmp_path: Path
) -> None:
    training = {"epochs": 2, "batch_size": 4, "evaluate_every": 3}
    whole = run(recipe(model_folder, genres, training=training), tmp_path / "whole")
    data = tmp_path / "data"
    shutil.copytree(genres, data)
    own = recipe(model_folder, data, training=training)
    asked = iter(range(100))
    stopped = run(own, tmp_path / "cut", should_stop=lambda: next(asked) == 4)
    assert (stopped["interrupted"], stopped["train"]["steps"]) == (True, 5)
    lines = (data / "train.jsonl").read_text(encoding="utf-8")
    (data / "train.jsonl").write_text(lines.replace("farce", "drama", 1), encoding="utf-8")
    with refused("cannot be resumed, as groups is not what it was", error=RunError):
        run(own, tmp_path / "cut", resume=True)
    (data / "train.jsonl").write_text(lines, encoding="utf-8")
    resumed = run(own, tmp_path / "cut", resume=True)
    assert resumed["tokens"] == whole["tokens"]
    assert resumed["groups"] == whole["groups"]
    first, second = (artifact.load(tmp_path / n / "prompt").rows for n in ("whole", "cut"))
    assert torch.equal(first, second)


# -- bad input -------------------------------------------------------------------------------------


def test_bad_groups_are_refused_before_the_model_is_loaded(genres: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no model"

    def with_rows(split: str, change: dict[str, Any]) -> Path:
        folder = tmp_path / f"{split} {change}"
        folder.mkdir()
        for name in ROWS:
            text = (genres / f"{name}.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            rows = [{**row, **(change if name == split else {})} for row in rows]
            write_jsonl(folder / f"{name}.jsonl", rows)
        return folder

    missing = recipe(nowhere, genres, objective={**OWA, "group": "gender"})
    with refused("no column 'gender', which the objective names", "'genre'", error=DataError):
        run(missing, tmp_path / "missing")
    one = recipe(nowhere, with_rows("train", {"genre": "crime"}))
    with refused("objective.group: all 24 training rows have 'crime'", error=DataError):
        run(one, tmp_path / "one")
    problems = Problems()
    read_data(one, problems)  # as `plan` does, which reports every problem
    assert [line.partition(";")[0] for line in problems.lines] == [
        "objective.group: all 24 training rows have 'crime' in column 'genre'"
    ]
    unknown = recipe(nowhere, with_rows("dev", {"genre": "dramas"}))
    with refused("dev.jsonl:", "group 'dramas' in column 'genre' is in no", error=DataError):
        run(unknown, tmp_path / "unknown")
    listed = recipe(nowhere, with_rows("dev", {"genre": ["drama"]}))
    with refused("dev.jsonl:", "column 'genre' holds a list", error=DataError):
        run(listed, tmp_path / "listed")
    fewer = recipe(nowhere, genres, objective={**OWA, "weights": [0.75, 0.25]})
    with refused("objective.weights: 2 numbers, but column 'genre' has 3 groups", error=DataError):
        run(fewer, tmp_path / "fewer")
    scored = recipe(nowhere, genres, evaluation={"group": "gender"})
    with refused("no column 'gender', which evaluation.group names", error=DataError):
        run(scored, tmp_path / "scored")
    # A test row of a new group is a group of its own.
    assert read_data(recipe(nowhere, with_rows("test", {"genre": "dramas"}))).test
