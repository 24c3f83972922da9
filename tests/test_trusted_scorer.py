"""A run folder that comes from elsewhere runs no code of its own before the user says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tomli_w

from embedgrad import Recipe, RecipeError, run
from embedgrad.events import quiet
from embedgrad.parts.scorers import function
from embedgrad.recipe.open_run import open_run
from run_kit import Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

JUDGE = """
from pathlib import Path


def right(reply, answer):
    with open(Path(__file__).with_name("ran"), "a") as file:
        file.write("x")
    return float(reply == answer)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def judged(model_folder: Path, tmp_path: Path) -> Path:
    """A run made here; its scorer's code and its data lie beside it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "judge.py").write_text(JUDGE)
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(30)]
    recipe = values(
        model_folder,
        home,
        data={"train": str(write_jsonl(home / "sums.jsonl", rows)), "answer": "answer"},
        template={"user": "{question}\n\n[[Give the answer only:]]"},
        target={"choices": []},
        solutions={"source": "answer"},
        evaluation={
            "scorer": {"name": "callable", "function": "judge:right", "folder": str(home)},
            "max_new_tokens": 2,
        },
        training={"steps": 1, "batch_size": 2},
    )
    del recipe["data"]["dev"], recipe["data"]["test"]
    recipe["data"]["limit"] = {"train": 2, "dev": 2, "test": 2}
    run(Recipe.from_dict(recipe), home / "run", quiet)
    return home / "run"


def test_a_run_made_here_asks_nothing(judged: Path, embedgrad: Command) -> None:
    before = (judged.parent / "ran").stat().st_size
    assert embedgrad("evaluate", judged, "--quiet").code == 0
    assert (judged.parent / "ran").stat().st_size > before


@pytest.mark.parametrize(
    "verb", [("evaluate",), ("inspect",), ("resume", "--set", "training.steps=2")]
)
def test_a_run_from_elsewhere_asks_before_its_code_runs(
    verb: tuple[str, ...], judged: Path, embedgrad: Command, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(judged.parent, foreign)
    (foreign / "ran").unlink()
    shutil.rmtree(judged.parent)
    recipe = foreign / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(judged.parent), str(foreign)))
    name, *more = verb
    done = embedgrad(name, foreign / "run", "--quiet", *more)
    assert done.code == 2
    (line,) = done.lines
    assert "'judge:right' is code that came with the run" in line
    assert "--trust-scorer" in line
    assert not (foreign / "ran").exists()
    assert embedgrad("report", foreign / "run", "--quiet").code == 0
    assert not (foreign / "ran").exists()
    assert embedgrad(name, foreign / "run", "--quiet", *more, "--trust-scorer").code == 0
    assert (foreign / "ran").exists()
    assert embedgrad("evaluate", foreign / "run", "--quiet").code == 0  # it is remembered
    (foreign / "judge.py").write_text(JUDGE + "\n# changed\n")
    assert embedgrad("evaluate", foreign / "run", "--quiet").code == 2


def test_tasks_from_elsewhere_ask_too(
    judged: Path, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = judged.parent / "tasks.toml"
    both = [{"name": "one"}, {"name": "two", "solutions": {"source": "answer"}}]
    recipe = Recipe.read_run(judged).as_dict()
    tasks.write_text(tomli_w.dumps({**recipe, "tasks": both}))
    assert embedgrad("optimize", tasks, "--out", tmp_path / "out", "--quiet").code == 0
    shutil.rmtree(tmp_path / "cache" / "trusted-scorers")
    monkeypatch.setattr(function, "_trusted", set())  # as on another machine
    more = ("resume", tmp_path / "out", "--quiet", "--set", "training.steps=2")
    done = embedgrad(*more)
    assert (done.code, len(done.lines)) == (2, 1)
    assert "'judge:right' is code that came with the run" in done.err
    assert embedgrad(*more, "--trust-scorer").code == 0


def test_a_cache_that_cannot_be_written_asks_again(
    judged: Path, cache: Path, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(cache)
    cache.write_text("in the way")
    monkeypatch.setattr(function, "_trusted", set())  # as in another process
    more = ("resume", judged, "--quiet", "--set", "training.steps=2")
    assert embedgrad(*more).code == 2
    assert embedgrad(*more, "--trust-scorer").code == 0
    monkeypatch.setattr(function, "_trusted", set())
    opened = open_run(judged, trust_scorer=True)
    assert opened.evaluator.evaluation.scorer.score("7", "7") == 1.0
    monkeypatch.setattr(function, "_trusted", set())
    with pytest.raises(RecipeError, match="--trust-scorer"):
        open_run(judged).evaluator.evaluation.scorer.score("7", "7")
