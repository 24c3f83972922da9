"""Runs with [[tasks]] that stop early, fail or resume: nothing learned is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedgrad import Recipe, RecipeError, RunError, run
from embedgrad.errors import EmbedgradError
from embedgrad.experiments.tasks import run_tasks
from embedgrad.prompt import artifact
from refusals import refused
from run_kit import Command, values
from test_tasks import recipe_file, recipes_of, rows_of

__all__ = ["recipe_file"]
pytest_plugins = ["tiny_runs"]


def interrupt_at(kind: str, text: str) -> Callable[[dict[str, Any]], None]:
    """A report that is interrupted at an event of a kind, or at one that holds a text."""

    def report(event: dict[str, Any]) -> None:
        if event["event"] == kind and text in str(event):
            raise KeyboardInterrupt

    return report


def test_a_resumed_run_keeps_its_recipe(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path, out = recipe_file(), tmp_path / "out"
    run_tasks(recipes_of(path, "training.epochs=1"), out)
    with refused("optimizer.learning_rate is 0.03 there and 0.5 here", error=RunError):
        run_tasks(recipes_of(path, "optimizer.learning_rate=0.5"), out, resume=True)
    longer = run_tasks(recipes_of(path), out, resume=True)
    assert longer["train"]["steps"] == 10
    again = run_tasks(recipes_of(path), out, resume=True)
    assert again["tasks"]["good"]["artifact"] == str(out / "good" / "prompt")
    others = dict(reversed(recipes_of(path).items()))
    with refused("[[tasks]] are good, again there and again, good here", error=RunError):
        run_tasks(others, out, resume=True)


def test_a_task_is_not_resumed_alone(
    recipe_file: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "out"
    run_tasks(recipes_of(recipe_file()), out, should_stop=lambda: True)
    before = rows_of(out / "good")["rows"]
    done = embedgrad("resume", out / "good")
    assert done.code == 2
    assert f"`embedgrad resume {out}` resumes it" in done.err
    assert rows_of(out / "good")["rows"].equal(before)


def test_an_interrupted_scoring_ends_them_all(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipes, out = recipes_of(recipe_file()), tmp_path / "out"
    result = run_tasks(recipes, out, interrupt_at("scoring", "12"))
    assert result["interrupted"]
    assert [task["interrupted"] for task in result["tasks"].values()] == [True, True]
    assert not (out / "again" / "predictions.jsonl").exists()
    rows = rows_of(out / "again")["rows"]
    assert not run_tasks(recipes, out, resume=True)["interrupted"]
    assert rows_of(out / "again")["rows"].equal(rows)


def test_a_prompt_is_written_when_it_is_trained_and_when_it_is_scored(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, save = list[str](), artifact.save

    def note(prompt: Any, folder: Path) -> None:
        written.append(folder.parent.name)
        save(prompt, folder)

    monkeypatch.setattr(artifact, "save", note)
    run_tasks(recipes_of(recipe_file(), "training.steps=1"), tmp_path / "out")
    assert written == ["good", "again"] * (len(written) // 2)  # and when better rows are found
    assert len(written) >= 6


def test_a_run_interrupted_before_it_trains_leaves_nothing(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipes, out = recipes_of(recipe_file()), tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(recipes, out, interrupt_at("stage", "tokenizing"))
    assert not out.parent.exists()
    run_tasks(recipes, out, should_stop=lambda: True)
    shutil.rmtree(out / "checkpoint")
    assert run_tasks(recipes, out, resume=True)["train"]["steps"] == 10


def test_a_scoring_that_fails_loses_no_prompt(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RecipeError("recipe", ["evaluation.scorer: raised"])

    monkeypatch.setattr("embedgrad.experiments.finish.evaluate", fail)
    with refused("holds the refined prompt", error=RunError):
        run_tasks(recipes_of(recipe_file()), tmp_path / "out")
    assert artifact.load(tmp_path / "out" / "again" / "prompt").rows.isfinite().all()


def test_a_family_that_changed_is_noticed(
    recipe_file: Callable[..., Path], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    path, out = recipe_file(), tmp_path / "out"
    run_tasks(recipes_of(path, "training.epochs=1"), out)
    family = {"name": "cp", "family": str(out)}
    recipe = Recipe.from_dict(values(model_folder, data, parameterization=family))
    run(recipe, tmp_path / "new", should_stop=lambda: True)
    run_tasks(recipes_of(path), out, resume=True)
    with refused("cannot be resumed, as parameterization is not what it was", error=RunError):
        run(recipe, tmp_path / "new", resume=True)


@pytest.mark.parametrize(
    "sections",
    [
        {"parameterization": {"name": "cp", "family": "nowhere"}},
        {"parameterization": {"name": "low_rank"}, "training": {"warm_start": "FINISHED"}},
    ],
)
def test_a_refused_parameterization_leaves_no_folder(
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    finished: tuple[Path, Any],
    sections: dict[str, Any],
) -> None:
    if "training" in sections:
        sections = {**sections, "training": {"warm_start": str(finished[0])}}
    with pytest.raises(EmbedgradError, match="parameterization"):
        run(Recipe.from_dict(values(model_folder, data, **sections)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_folder_of_all_tasks_is_no_run_of_one(
    recipe_file: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "out"
    run_tasks(recipes_of(recipe_file()), out, should_stop=lambda: True)
    done = embedgrad("evaluate", out)
    assert done.code == 2
    assert len(done.lines) == 1
    assert "of its run give one task's folder" in done.err
    assert json.loads((out / "result.json").read_text("utf-8"))["mean"] is None
