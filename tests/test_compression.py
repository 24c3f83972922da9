"""`embedgrad compress`, and whole runs with a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import Recipe, compare, load, plan, run
from embedgrad.errors import RecipeError
from embedgrad.events import quiet
from embedgrad.prompt import artifact
from embedgrad.recipe.build import prepare
from refusals import refused
from run_kit import CHOICES, Command, values, write_jsonl
from small_recipe import changed

pytest_plugins = ["tiny_runs"]

LONG = (
    "Judge every review with care. A warm {film} is [[positive]]. A dull film is negative. "
    "Say positive or negative."
)
QUERY = {"template": {"user": "{text}"}}
SMALL = [
    f"target.choices={json.dumps(CHOICES)}",
    "training.epochs=2",
    "training.batch_size=4",
    "prefix_cache.budget='64 MiB'",
]


@pytest.fixture
def queries(data: Path, tmp_path: Path) -> Path:
    """Reviews without labels."""
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    return write_jsonl(tmp_path / "q.jsonl", [{"query": line["review"]} for line in lines])


@pytest.fixture
def compress(
    embedgrad: Command, model_folder: Path, queries: Path, tmp_path: Path
) -> Callable[..., Any]:
    """`compress(text, "--tokens", 6)` with the tiny model."""
    prompt = tmp_path / "long.txt"

    def command(text: str = LONG, *arguments: object) -> Any:
        prompt.write_text(text, encoding="utf-8")
        settings = [part for setting in SMALL for part in ("--set", setting)]
        of = ("--queries", queries, "--model", model_folder, "--out", tmp_path / "runs" / "short")
        return embedgrad("compress", prompt, *of, "--json", *settings, *arguments)

    return command


def test_a_long_prompt_becomes_a_few_rows(
    compress: Callable[..., Any], embedgrad: Command, tmp_path: Path
) -> None:
    done = compress(LONG, "--tokens", 16, "--margin", 0.2)
    assert done.code == 0, done.err
    out = tmp_path / "runs" / "short"
    assert f"wrote {out}.toml" in done.err
    recipe = Recipe.read(tmp_path / "runs" / "short.toml")
    (system, user) = recipe.template.messages
    assert system.content.startswith("[[Judge ")
    assert user.content == "{query}"
    assert recipe.teacher is not None
    assert recipe.teacher.template is not None
    assert recipe.teacher.template.messages[0].content.startswith("Judge every review with care. ")
    assert recipe.parts.trust_region.radius == 1.0
    prompt = artifact.load(out / "prompt")
    assert 8 < len(prompt.rows) <= 16
    found = done.json["teacher"]
    tokens = found["tokens"]
    assert tokens["saved"] == tokens["teacher"] - tokens["refined"] > 0
    assert 0 <= found["agreement"]["refined"] <= 1
    assert done.json["refined"]["accuracy"] == found["agreement"]["refined"]  # no labels
    assert found["scores"]["accuracy"] == 1
    assert found["divergence"]["text"] > 0
    assert found["non_inferiority"]["margin"] == 0.2
    assert done.json["solutions"]["labelled"] == {"dev": False, "test": False}
    # A run as any other.
    again = embedgrad("evaluate", out, "--json")
    assert again.json["refined"] == done.json["refined"]
    page = embedgrad("report", out)
    assert page.code == 0, page.err
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "with the teacher&#39;s prompt" in html
    assert "inferior to the teacher" in html
    assert load(out).generate([{"query": "warm"}])[0] in CHOICES


def test_the_terminal_says_what_was_saved(
    embedgrad: Command, compress: Callable[..., Any], tmp_path: Path
) -> None:
    compress(LONG, "--tokens", 6)
    told = embedgrad("resume", tmp_path / "runs" / "short").out
    assert "tokens per query instead of" in told
    assert "KL to the teacher" in told
    assert "one-sided 95 % limit" in told


def test_training_comes_closer_to_the_teacher(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"review": line["review"]} for line in lines])
    recipe = taught(model_folder, data, training={"epochs": 8})
    recipe["data"] = {"train": str(bare)}
    found = run(Recipe.from_dict(recipe), tmp_path / "run")["teacher"]
    assert found["divergence"]["refined"] < 0.8 * found["divergence"]["text"]


def taught(model_folder: Path, folder: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with a teacher, on the labelled rows of `data`."""
    teacher = {"template": {"system": LONG.replace("{film}", "film"), "user": "{review}"}}
    return values(
        model_folder,
        folder,
        **{
            "teacher": teacher,
            "objective": {"name": "distill"},
            "template": {"user": "{review}\n\n[[Positive or negative?]]"},
            "trust_region": {"radius": 1.0},
            **sections,
        },
    )


def test_a_run_with_a_teacher_resumes_to_the_bit(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(taught(model_folder, data))
    whole = run(recipe, tmp_path / "whole")
    asked = iter(range(100))
    stopped = run(recipe, tmp_path / "parts", should_stop=lambda: next(asked) == 2)
    assert stopped["interrupted"]
    resumed = run(recipe, tmp_path / "parts", resume=True)
    rows = [artifact.load(tmp_path / name / "prompt").rows for name in ("whole", "parts")]
    assert torch.equal(*rows)
    assert resumed["teacher"] == whole["teacher"]


def test_a_refined_prompt_can_teach(
    finished: tuple[Path, Any], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder, result = finished
    recipe = taught(model_folder, data, teacher={"prompt": str(folder)})
    found = run(Recipe.from_dict(recipe), tmp_path / "run")
    assert found["teacher"]["scores"] == {**result["refined"], "greedy_is_choice": None}
    assert (tmp_path / "run" / "recipe.toml").read_text().count("finished") == 1


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"objective": {"name": "distill"}}, "objective: 'distill' needs a [teacher]"),
        ({"teacher": {"prompt": "x"}}, "teacher: is for objective = 'distill'"),
        (
            {"objective": {"name": "distill"}, "teacher": {"seed": 1}},
            "teacher: give either a template, as [teacher.template], or a prompt",
        ),
        (
            {
                "objective": {"name": "distill"},
                "teacher": {"template": {"user": "{text}"}},
                "solutions": {"source": "answer"},
            },
            "solutions.source: 'answer', but the teacher writes the answers",
        ),
        (
            {"objective": {"name": "distill"}, "teacher": {"template": {"sistem": "a"}}},
            "teacher.template.sistem: unknown option; did you mean 'system'?",
        ),
        (
            {"objective": {"name": "distill"}, "teacher": "long"},
            "teacher: 'long'; expected a table",
        ),
        (
            {"objective": {"name": "distill", "samples": 4}, "teacher": QUERY},
            "objective: samples, temperature and max_new_tokens are for direction = 'reverse'",
        ),
        (
            {
                "objective": {"name": "distill", "direction": "reverse"},
                "teacher": QUERY,
                "target": {"choices": ["a", "b"]},
            },
            "objective.direction: 'reverse' samples free answers, but target.choices lists all",
        ),
    ],
)
def test_a_recipe_whose_teacher_cannot_be_used(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed(**sections))
    assert any(line.startswith(problem) for line in caught.value.problems), caught.value.problems


def test_a_recipe_with_a_teacher_is_read_as_it_is_written() -> None:
    teacher = {"template": {"system": "Long {text}.", "user": "{text}"}, "margin": 0.1}
    recipe = Recipe.from_dict(changed(objective="distill", teacher=teacher))
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    own = {"name": "distill", "direction": "reverse", "samples": 2}
    recipe = Recipe.from_dict(changed(objective=own, teacher=teacher, target={}))
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_a_student_is_corrected_in_a_whole_run(
    model_folder: Path, queries: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(reverse(model_folder, queries))
    asked = iter(range(100))
    whole = run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts", should_stop=lambda: next(asked) == 1)
    resumed = run(recipe, tmp_path / "parts", resume=True)
    rows = [artifact.load(tmp_path / name / "prompt").rows for name in ("whole", "parts")]
    assert torch.equal(*rows)
    assert resumed["teacher"] == whole["teacher"]
    assert whole["solutions"]["source"] == "student"
    assert not (tmp_path / "whole" / "solutions.jsonl").exists()
    found = plan(recipe)
    assert found["problems"] == []
    assert found["course"]["answers"] == 3 * 4 * 2
    (note,) = [note for note in found["notes"] if note.startswith("a step samples")]
    assert note.endswith("to 4 questions")
    with refused("'reverse' is for optimize", error=RecipeError):
        compare(recipe, tmp_path / "compared")


def reverse(model_folder: Path, queries: Path) -> dict[str, Any]:
    """A recipe without labels whose student writes its own answers."""
    recipe = taught(
        model_folder,
        queries.parent,
        objective={"name": "distill", "direction": "reverse", "samples": 2, "max_new_tokens": 3},
        target={"choices": []},
        training={"steps": 3, "batch_size": 4},
        evaluation={"max_new_tokens": 4},
    )
    recipe["data"] = {"train": str(queries)}
    recipe["template"] = {"user": "{query}\n\n[[Positive or negative?]]"}
    recipe["teacher"] = {"template": {"user": "{query} Say it."}}
    return recipe


def test_a_column_that_only_the_teacher_reads_must_be_there(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    teacher = {"template": {"system": "{document}", "user": "{review}"}}
    recipe = Recipe.from_dict(taught(model_folder, data, teacher=teacher))
    with refused("no column 'document', which the teacher's template names"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "problem"),
    [
        (" \n", (), "long.txt: is empty; expected the long prompt"),
        (LONG, ("--tokens", 0), "--tokens: 0; expected 1 or more"),
        ("Say it.", ("--tokens", 60), "expected fewer rows than tokens"),
        (LONG, ("--column", "question"), "no column 'question' with queries"),
        (LONG, ("--margin", 2), "teacher.margin"),
        (LONG * 40, (), "tokens with the teacher's prompt, but the model takes 512; shorten"),
    ],
)
def test_a_compression_that_cannot_be_done(
    text: str, arguments: tuple[object, ...], problem: str, compress: Callable[..., Any]
) -> None:
    done = compress(text, *arguments)
    assert done.code == 2
    assert problem in done.err
    assert "needs a [teacher]" not in done.err  # there is one
    assert "Traceback" not in done.err


def test_a_prompt_that_is_no_file_and_a_recipe_of_another_run(
    embedgrad: Command, queries: Path, compress: Callable[..., Any], tmp_path: Path
) -> None:
    done = embedgrad("compress", tmp_path / "none.txt", "--queries", queries)
    assert done.code == 2
    assert "none.txt: cannot be read" in done.err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "short.toml").write_text("mine = 1")
    done = compress()
    assert done.code == 2
    assert "short.toml: holds another recipe" in done.err
    assert (tmp_path / "runs" / "short.toml").read_text() == "mine = 1"


@pytest.mark.parametrize("choices", [CHOICES, []])
def test_a_run_with_a_teacher_can_be_planned(
    choices: list[str], model_folder: Path, queries: Path
) -> None:
    recipe = taught(model_folder, queries.parent, target={"choices": choices})
    recipe["data"] = {"train": str(queries)}
    recipe["template"] = {"user": "{query}\n\n[[Positive or negative?]]"}
    recipe["teacher"] = {"template": {"user": "{query} Say it."}}
    recipe["evaluation"] = {"max_new_tokens": 2}
    found = plan(Recipe.from_dict(recipe))
    assert found["problems"] == []
    assert "the teacher's own passes over the queries are not counted" in found["notes"]
    assert found["seconds"]["all"] > 0


def test_what_no_run_began_from_leaves_no_recipe(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "short"
    done = compress(LONG * 40, "--tokens", 6)
    assert done.code == 2, done.err
    assert not out.exists()
    assert not out.with_name("short.toml").exists()
    assert compress(LONG, "--tokens", 5).code == 0  # another recipe of the same name
    # Where there is a run, its recipe stays.
    again = compress(LONG, "--tokens", 5)
    assert again.code == 2
    assert out.with_name("short.toml").exists()


def test_a_teaching_prompt_is_read_once(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Recipe.from_dict(values(model_folder, data, training={"steps": 1})), tmp_path / "teacher")
    sections = taught(model_folder, data)
    sections["teacher"] = {"prompt": str(tmp_path / "teacher")}
    read, plain = list[Path](), artifact.load
    monkeypatch.setattr(artifact, "load", lambda folder: read.append(folder) or plain(folder))
    prepare(Recipe.from_dict(sections), None, quiet)
    assert len(read) == 1
