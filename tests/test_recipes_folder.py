"""The recipes of the repository: each can be used, and says what it needs and what it scored."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from embedgrad.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
sys.path.insert(0, str(ROOT))
import measured  # noqa: E402

import benchmarks.run as bench  # noqa: E402

PROMPTS = ("text", "refined")
METHODS = ("text", "embedgrad")
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
REPEATING = ("hub:SetFit/sst2:train", "hub:stanfordnlp/imdb:train")  # texts of later splits
MINUTES = re.compile(r"about (\d+) minutes of training")
TASKS = ("demo", "sst2", "imdb", "operation", "causal-judgement", "gsm8k", "svamp", "math-500")
MEASURED = re.compile(
    r"Measured: (\S+) % with the text prompt, (\S+) % refined \((benchmarks/results/\S+\.json)\)"
)


def opening(path: Path) -> str:
    """The comments at the top, as one text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comments)


def test_there_is_one_for_every_task() -> None:
    assert {path.stem for path in RECIPES} == set(TASKS) == set(measured.RECIPES)


def test_the_table_of_models_has_every_measurement_of_a_recipe() -> None:
    table = measured.models(ROOT, "")
    rows = {row.split(" | ")[0][2:]: row for row in table.splitlines()[2:]}
    of = {**bench.MEASUREMENTS, **bench.COMPARISONS}
    there = [n for n in of if (bench.RESULTS / f"{n}.json").exists()]
    scored = [n for n in there if not getattr(of[n], "dev_only", False)]
    assert len(scored) > 10
    for name in scored:
        model = "Qwen2.5-Coder-0.5B-Instruct" if "qwen" in name else "SmolLM2-135M-Instruct"
        column = measured.RECIPES.index(of[name].recipe.removesuffix(".toml"))
        assert f"results/{name}.json)" in rows[model].split(" | ")[3 + column], name
    assert table.count(".json)") == len(scored)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_used(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.data.train != recipe.data.test
    assert (
        recipe.target.choices
        or recipe.evaluation.scorer != Recipe.read(ROOT / "recipes" / "demo.toml").evaluation.scorer
    ), "free answers need a scorer that finds them"


def test_recipes_of_data_that_repeats_texts_of_test_can_start() -> None:
    of = [r.data for r in map(Recipe.read, RECIPES) if r.data.train in REPEATING]
    assert len(of) == 2
    assert all(data.drop_duplicates for data in of)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_needs_and_what_it_scored(path: Path) -> None:
    said = opening(path)
    assert measured.HEADLINE.match(path.read_text(encoding="utf-8"))
    assert "Needs: " in said
    assert ("Not measured" in said) != ("Measured: " in said)
    for text, refined, file in MEASURED.findall(said):
        found = accuracies(json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"])
        for shown, rows in zip((text, refined), found, strict=True):
            assert shown == f"{100 * sum(rows) / len(rows):.1f}"
    assert "Measured: " not in said or MEASURED.search(said)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_minutes_are_those_of_the_longest_training_that_was_measured(path: Path) -> None:
    said = opening(path)
    told = [int(minutes) for minutes in MINUTES.findall(said)]
    took = [
        round(max(seconds(json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"])) / 60)
        for _, _, file in MEASURED.findall(said)
    ]
    assert told == took
    assert len(re.findall(r"\bminutes?\b", said)) == len(told)


def seconds(rows: Any) -> list[float]:
    """Of each training of the refined prompt, in a results file of runs or of methods."""
    if isinstance(rows, dict):
        return [row["train"]["seconds"] for row in rows.values()]
    return [row["train_seconds"] for row in rows if row["method"] == METHODS[1]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_solution_of_columns_that_a_comment_names_has_those_of_the_hub(path: Path) -> None:
    said, data = opening(path), Recipe.read(path).data
    for text in re.findall(r'data\.solution = "(.+?)"', said):
        assert "{" not in text or f"{{{data.answer}}}" in text


def accuracies(rows: Any) -> tuple[list[float], list[float]]:
    """Of the text prompt and of the refined one, in a results file of runs or of methods."""
    if isinstance(rows, dict):
        text, refined = ([row[name]["accuracy"] for row in rows.values()] for name in PROMPTS)
        return text, refined
    of = {name: [r["accuracy"] for r in rows if r["method"] == name] for name in METHODS}
    return of["text"], of["embedgrad"]


@pytest.mark.parametrize("name", bench.MEASUREMENTS)
def test_rows_state_the_settings_that_made_them(name: str) -> None:
    path, measurement = bench.RESULTS / f"{name}.json", bench.MEASUREMENTS[name]
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    local = bench.placeless(bench.local_settings(measurement, ROOT), ROOT)
    for row, values in found.items():
        said = bench.read(measurement.recipe, [*values["settings"], "data.drop_duplicates=false"])
        assert said == bench.read(measurement.recipe, [*measurement.rows[row], *local]), row


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_was_measured_names_its_results(path: Path) -> None:
    of = {**bench.MEASUREMENTS, **bench.COMPARISONS}
    names = [name for name, measured in of.items() if measured.recipe == path.name]
    there = [f"{name}.json" for name in names if (bench.RESULTS / f"{name}.json").exists()]
    assert not there or any(name in opening(path) for name in there)
