"""Recipes, templates and models that cannot be used: one line, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from bad_kit import Case, Place, at, check
from embedgrad import Recipe, RecipeError, Training, run
from embedgrad.parts.objectives import CrossEntropy
from run_kit import Command, values

pytest_plugins = ["tiny_runs"]


def recipe_file(content: bytes) -> Callable[[Place], list[object]]:
    return lambda p: ["optimize", at(p.folder / "r.toml", content), "--out", p.folder / "run"]


def template(**messages: str) -> Callable[[Place], list[object]]:
    def arguments(place: Place) -> list[object]:
        call = place.optimize()
        recipe = values(place.model, place.folder / "data")
        Path(str(call[1])).write_text(tomli_w.dumps({**recipe, "template": messages}), "utf-8")
        return call

    return arguments


def half_a_model(place: Place, name: str) -> list[object]:
    model = place.folder / "model"
    shutil.copytree(place.model, model)
    (model / name).unlink()
    return place.optimize(f"model.name={model}")


RECIPES: dict[str, Case] = {
    "missing recipe": (
        lambda p: ["optimize", p.folder / "none.toml", "--out", p.folder / "run"],
        ("none.toml: cannot be read (No such file or directory)", "`embedgrad new`"),
    ),
    "folder as recipe": (
        lambda p: ["optimize", p.folder, "--out", p.folder / "run"],
        ("cannot be read (Is a directory)",),
    ),
    "not TOML": (recipe_file(b"[model]\nname = tiny\n"), ("r.toml: is not TOML", "line 2")),
    "not text": (recipe_file(b"\xff\xff"), ("r.toml: is not TOML",)),
    "unknown section": (
        lambda p: p.optimize(trainig={"epochs": 1}),
        ("recipe.toml: trainig: unknown section; did you mean 'training'?",),
    ),
    "other version": (
        lambda p: p.optimize("version=3"),
        ("recipe.toml: version: 3; this embedgrad reads 2, or leave it out",),
    ),
    "version as text": (lambda p: p.optimize("version='2'"), ("recipe.toml: version: '2'; ",)),
    "unknown option": (
        lambda p: p.optimize(training={"epoch": 1}),
        ("recipe.toml: training.epoch: unknown option; did you mean 'epochs'?",),
    ),
    "unknown part": (
        lambda p: p.optimize("optimizer.name=adamW"),
        ("optimizer.name: unknown optimizer 'adamW'; did you mean 'adamw'?",),
    ),
    "unknown scorer": (
        lambda p: p.optimize("evaluation.scorer=numbers"),
        ("evaluation.scorer.name: unknown scorer 'numbers'; did you mean 'number'?",),
    ),
    "wrong type": (
        lambda p: p.optimize(training={"batch_size": "8"}),
        ("training.batch_size: Input should be a valid integer (given: '8')",),
    ),
    "out of range": (
        lambda p: p.optimize("evaluation.batch_size=0"),
        ("evaluation.batch_size: Input should be greater than 0 (given: 0)",),
    ),
    "radius": (lambda p: p.optimize("trust_region.radius=-1"), ("trust_region.radius: ", "-1")),
    "duplicates allowed and dropped": (
        lambda p: p.optimize("data.allow_duplicates=true", "data.drop_duplicates=true"),
        ("recipe.toml: data.allow_duplicates and data.drop_duplicates are both true; set one",),
    ),
    "bad setting": (
        lambda p: p.optimize("training"),
        ("--set: 'training': expected section.option=value",),
    ),
    "setting of no section": (
        lambda p: p.optimize("model.name.x=1"),
        ("--set: model.name.x: model.name is ",),
    ),
    "bad budget": (
        lambda p: p.optimize("prefix_cache.budget=lots"),
        ("prefix_cache.budget: 'lots'; expected bytes, a size such as '2 GiB', or a fraction",),
    ),
    "infinite budget": (
        lambda p: p.optimize("prefix_cache.budget=1e400"),
        ("prefix_cache.budget: inf; expected a finite number",),
    ),
    "budget of no type": (
        lambda p: p.optimize("prefix_cache.budget=true"),
        ("prefix_cache.budget: Input should be a valid string or a valid number (given: True)",),
    ),
    "list as budget": (
        lambda p: p.optimize("prefix_cache.budget=[]"),
        ("prefix_cache.budget: Input should be a valid string or a valid number (given: [])",),
    ),
    "file as spill folder": (
        lambda p: p.optimize(f"prefix_cache.spill={at(p.folder / 'a')}"),
        (
            "prefix_cache.spill: ",
            "a': no folder can be made here (",
            "expected a folder that you may",
        ),
    ),
    "no name of a folder": (
        lambda p: p.optimize(r'prefix_cache.spill="a\u0000b"'),
        (
            r"prefix_cache.spill: 'a\x00b': no folder can be made here (",
            "expected a folder that you",
        ),
    ),
    "spill budget": (
        lambda p: p.optimize("prefix_cache.spill_budget=-1"),
        ("prefix_cache.spill_budget: -1.0; expected 0 or more",),
    ),
    "choices of nothing": (
        lambda p: p.optimize("objective.over=choices", "target.choices=[]"),
        ("objective.over: 'choices', but target.choices lists none",),
    ),
    "solutions beside the model's own answers": (
        lambda p: p.optimize(
            "objective.name=reward", "target.choices=[]", "solutions.source=self-written"
        ),
        (
            "solutions.source: 'self-written', but objective trains on answers that the model "
            "samples; take solutions.source out",
        ),
    ),
    "one answer to compare": (
        lambda p: p.optimize("objective.name=reward", "objective.samples=1"),
        ("objective.samples: Input should be greater than or equal to 2 (given: 1)",),
    ),
    "no span": (
        template(user="{review}"),
        ("template: no span; mark some text as [[the words to refine]]",),
    ),
    "empty span": (template(user="[[]] {review}"), ("template.user: an empty span",)),
    "open span": (template(user="[[a {review}"), ("template.user: ",)),
    "column in the span": (template(user="[[a {review}]]"), ("column {review} inside the span",)),
    "text that merges": (
        template(text="{review}[[\nSo is it good]]\n", merges="refuse"),
        ("the text next to a span merges with it", "template.merges"),
    ),
    "unknown Hub model": (
        lambda p: p.optimize("model.name=nobody/nothing"),
        (
            "model 'nobody/nothing' was not found: no file or folder here; ",
            "not in the local Hub cache",
            "HF_HUB_OFFLINE",
        ),
    ),
    "misspelt model file": (
        lambda p: p.optimize(f"model.name={at(p.folder / 'mymodel.gguf').parent}/mymodle.gguf"),
        ("mymodle.gguf' was not found", "did you mean '", "mymodel.gguf'?"),
    ),
    "empty model folder": (
        lambda p: p.optimize(f"model.name={p.folder}/data"),
        ("not a model folder: no config.json",),
    ),
    "model without weights": (
        lambda p: half_a_model(p, "model.safetensors"),
        ("not a model folder: no weights (model.safetensors)",),
    ),
    "model without tokenizer": (
        lambda p: half_a_model(p, "tokenizer.json"),
        ("not a model folder: no tokenizer (tokenizer.json)",),
    ),
    "no GGUF": (
        lambda p: p.optimize(f"model.name={at(p.folder / 'a.gguf', b'GGUFnot')}"),
        ("a.gguf",),
    ),
    "other file": (
        lambda p: p.optimize(f"model.name={at(p.folder / 'a.bin')}"),
        ("a.bin: a file, but not a .gguf one",),
    ),
    "package": (
        lambda p: p.optimize("model.name=package:no_such_model"),
        (
            "package:no_such_model: the Python package no_such_model must be installed",
            "pip install",
        ),
    ),
    "revision of a folder": (
        lambda p: p.optimize("model.revision=main"),
        ("revision 'main' names a Hub commit, but", "is a folder"),
    ),
    "unknown device": (
        lambda p: [*p.optimize(), "--device", "tpu"],
        ("device 'tpu' is not available here; available:", "cpu"),
    ),
    "unknown dtype": (
        lambda p: [*p.optimize(), "--dtype", "float31"],
        ("dtype 'float31' is not known; known: auto, float32",),
    ),
    "unknown attention": (
        lambda p: [*p.optimize(), "--attention", "flash"],
        ("attention 'flash' is not known; known: auto, sdpa, eager",),
    ),
    "run folder exists": (
        lambda p: ["optimize", p.optimize()[1], "--out", p.run],
        ("run: exists already; choose another folder",),
    ),
    "file where the run goes": (
        lambda p: ["optimize", p.optimize()[1], "--out", at(p.folder / "run")],
        ("run: exists already",),
    ),
    "file above the run": (
        lambda p: ["optimize", p.optimize()[1], "--out", at(p.folder / "a") / "run"],
        ("cannot be made (Not a directory); choose another folder",),
    ),
}


@pytest.mark.parametrize("case", RECIPES.values(), ids=RECIPES)
def test_bad_recipe(case: Case, place: Place, embedgrad: Command) -> None:
    check(embedgrad, place, case)


def test_a_folder_that_may_not_be_written_is_told(place: Place, embedgrad: Command) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (place.folder / "closed").mkdir(mode=0o500)
    call = ["optimize", place.optimize()[1], "--out", place.folder / "closed" / "run"]
    check(embedgrad, place, (lambda p: call, ("cannot be made (Permission denied)",)))


@pytest.mark.parametrize(
    "messages",
    [{"text": "[[ \n ]] {review}"}, {"user": "{review}\n\n[[ \n ]]"}],
    ids=["text", "chat"],
)
def test_a_span_without_tokens(
    messages: dict[str, str], place: Place, embedgrad: Command, other_models: dict[str, Path]
) -> None:
    place.model = other_models["wordpiece"]
    told = "template: the span ' \\n ' tokenizes to nothing; write words into it"
    check(embedgrad, place, (template(**messages), (told,)))


def test_a_model_without_a_chat_template(
    place: Place, embedgrad: Command, other_models: dict[str, Path]
) -> None:
    place.model = other_models["no-chat"]
    told = "this model has no chat template; give the prompt as plain text"
    check(embedgrad, place, (lambda p: p.optimize(), (told,)))


def test_a_recipe_made_in_python_is_checked_too(place: Place, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(values(place.model, place.folder / "data"))
    wrong = replace(recipe, training=Training(batch_size=0, metric="f1"))  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as caught:
        run(wrong, tmp_path / "run")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "training.batch_size",
        "training.metric",
    ]
    assert not (tmp_path / "run").exists()


def test_a_part_that_no_recipe_can_name_is_told(place: Place, tmp_path: Path) -> None:
    class Mine(CrossEntropy):
        pass

    recipe = Recipe.from_dict(values(place.model, place.folder / "data"))
    with pytest.raises(RecipeError, match=r"objective: Mine is no registered part, .*cross"):
        run(replace(recipe, parts=replace(recipe.parts, objective=Mine())), tmp_path / "run")


def test_several_problems_are_one_block(place: Place, embedgrad: Command) -> None:
    arguments = place.optimize(training={"epoch": 1}, model={"nam": "x"})
    done = embedgrad(*arguments)
    assert done.code == 2
    first, *rest = done.lines
    assert first == f"error: {arguments[1]}: 2 problems"
    assert [line[:2] for line in rest] == ["  ", "  "]
    assert sorted(line.split(":")[0].strip() for line in rest) == ["model.nam", "training.epoch"]
