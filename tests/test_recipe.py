"""Recipes: every problem is told at once, each by its dotted path, with the nearest names."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import tomli_w
import torch

from embedgrad import Recipe, Template, TrustRegion
from embedgrad.errors import DataError, RecipeError
from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.optimizers import AdamW, Muon
from embedgrad.parts.registry import DEFAULTS, KINDS
from embedgrad.recipe.build import read_data
from embedgrad.recipe.settings import DataSettings, ModelSettings, PrefixCacheSettings
from embedgrad.training.settings import Training
from refusals import refused
from small_recipe import SMALLEST, changed, read


def problems(values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values, "r.toml")
    assert str(caught.value).startswith("r.toml: ")
    return list(caught.value.problems)


def test_muon_refuses_in_one_line_what_is_no_matrix() -> None:
    with refused("muon steps matrices", "[2, 5, 16]", "take adamw", error=RecipeError):
        Muon().build([torch.zeros(3, 4), torch.zeros(2, 5, 16)])


def test_the_smallest_recipe_has_the_defaults_of_the_parts_themselves() -> None:
    recipe = Recipe.from_dict(SMALLEST)
    assert recipe.training == Training()
    assert recipe.parts.trust_region == TrustRegion(radius=0.3, min_cosine=None)
    assert recipe.parts.optimizer == AdamW()
    assert recipe.evaluation == Evaluation()
    assert recipe.prefix_cache == PrefixCacheSettings()
    assert recipe.data.answer == "label"
    assert recipe.merges == "report"
    assert recipe == Recipe(
        ModelSettings("tiny"),
        DataSettings("train.csv"),
        Template.chat(user="{text} [[Is it good?]]"),
        recipe.target,
    )


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [({}, 0.005), ({"name": "muon"}, 0.015), ({"learning_rate": 0.1}, 0.1), ("adamw", 0.005)],
)
def test_sampled_answers_are_learned_from_in_small_steps(optimizer: Any, rate: float) -> None:
    values = {**SMALLEST, "objective": {"name": "reward"}, "optimizer": optimizer}
    recipe = Recipe.from_dict(values)
    assert recipe.parts.optimizer.learning_rate == pytest.approx(rate)
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_every_default_part_is_a_known_one() -> None:
    assert DEFAULTS.keys() == KINDS.keys() - {"augmentations"}  # a list, by default empty
    for kind, name in DEFAULTS.items():
        KINDS[kind][name]()


def test_all_problems_are_told_at_once_each_by_its_path() -> None:
    told = problems(
        {
            "model": {"name": 3, "dtyp": "float32"},
            "data": {"train": "a.csv", "seed": -1, "limit": {"train": "many"}},
            "template": {"user": "{text} without a span"},
            "traning": {},
            "optimizer": {"name": "adam"},
            "objective": {"over": "answers"},
            "transforms": [{"name": "clip"}, {"max_norm": 0}, "clp"],
            "evaluation": {"scorer": {"name": "number", "absolute_tolerance": "1"}},
            "trust_region": 0.3,
        }
    )
    paths = [problem.partition(":")[0] for problem in told]
    assert sorted(paths) == [
        "data.limit.train",
        "data.seed",
        "evaluation.scorer.absolute_tolerance",
        "model.dtyp",
        "model.name",
        "objective.over",
        "optimizer.name",
        "template",
        "traning",
        "transforms.1.max_norm",
        "transforms.2.name",
        "trust_region",
    ]
    text = "\n".join(told)
    for near in ("'training'", "'dtype'", "'adamw'", "'clip'"):
        assert f"did you mean {near}?" in text
    for given_value in ("given: 3)", "given: -1)", "given: 'many')", "given: 'answers')"):
        assert given_value in text


def test_a_name_of_an_older_version_is_told_with_its_new_one(tmp_path: Path) -> None:
    old = {"head_cache": {"budget": 0}, "gradients": [], "target": {"prefix": " "}}
    assert problems(changed(**old)) == [
        "target.prefix: is now target.answer_prefix",
        "head_cache: is now [prefix_cache]",
        "gradients: is now [[transforms]]",
    ]
    with pytest.raises(RecipeError, match=r"head_cache: is now \[prefix_cache\]$"):
        read(tmp_path, "head_cache.budget=1")


def test_the_message_is_one_line_for_one_problem_and_a_list_for_several() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(changed(training={"epoch": 2}), "r.toml")
    assert str(caught.value).isprintable()
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({}, "r.toml")
    assert str(caught.value) == (
        "r.toml: 3 problems\n  model: missing section\n  data: missing section\n"
        "  template: missing section"
    )


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"name": None}}, "model.name: Input should be a valid string \\(given: None\\)"),
        ({"model": "tiny"}, "model: 'tiny'; expected a table of options"),
        ({"training": {"steps": 1.5}}, "training.steps: .* integer.* \\(given: 1.5\\)"),
        ({"training": {"steps": True}}, "training.steps: .* \\(given: True\\)"),
        ({"training": {"steps": "3"}}, "training.steps: .* \\(given: '3'\\)"),
        ({"training": {"epochs": 0}}, "training.epochs: .*greater than 0 \\(given: 0\\)"),
        ({"training": {"seed": 2**64}}, "training.seed: 18446744073709551616; .* 64 bits"),
        ({"training": {"metric": "f1"}}, "training.metric: .*'accuracy'.*\\(given: 'f1'\\)"),
        ({"training": {"metric": "macro_f1"}}, "training.metric: 'macro_f1', .*choices lists none"),
        ({"data": {"labels": {"0": 1}}}, "data.labels.0: .* valid string \\(given: 1\\)"),
        (
            {"data": {"limit": {"trian": 3}}},
            "data.limit.trian: unknown split; did you mean 'train'",
        ),
        ({"data": {"limit": {"dev": 0}}}, "data.limit.dev: 0; expected at least 1"),
        ({"data": {"dev_share": 0.95}}, "data.dev_share: .*0.9 \\(given: 0.95\\)"),
        (
            {"data": {"dev_share": 0.5, "test_share": 0.5}},
            "data: data.dev_share = 0.5 and data.test_share = 0.5 leave nothing to train on",
        ),
        ({"data": {"truncate": "txt"}}, "data.truncate: 'txt' .*; did you mean 'text'"),
        ({"data": {"train": tomllib.loads("d = 2024-01-01")["d"]}}, "data.train: .*in quotes"),
        ({"target": {"choices": ["a"]}}, "target.choices: \\['a'\\]; expected two or more"),
        ({"target": {"choices": ["a", "a"]}}, "target.choices: .*; expected two or more different"),
        ({"target": {"choices": "yes"}}, "target.choices: .*\\(given: 'yes'\\)"),
        ({"objective": {"over": "choices"}}, "objective.over: 'choices', but .* lists none"),
        ({"optimizer": 3}, "optimizer: name the part, as in { name = 'adamw' }"),
        ({"optimizer": {"name": 3}}, "optimizer: name the part"),
        ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum: unknown option; known: beta1,"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: inf; .* finite"),
        (
            {"transforms": {"name": "clip"}},
            "transforms: expected a list, as in \\[\\[transforms\\]\\]",
        ),
        ({"transforms": 5}, "transforms: expected a list"),
        (
            {"augmentations": ["mask"]},
            "augmentations.0.name: unknown augmentations 'mask'; known: ",
        ),
        ({"augmentations": [{}]}, "augmentations.0: name the part"),
        ({"augmentations": {}}, "augmentations: expected a list"),
        (
            {"training": {"batch_by": "groups"}},
            "training.batch_by: 'groups', but data.group names no column",
        ),
        ({"evaluation": "exact"}, "evaluation: 'exact'; expected a table of options"),
        ({"evaluation": {"scorer": "numbers"}}, "evaluation.scorer.name: unknown scorer 'numbers'"),
        ({"prefix_cache": {"budget": "much"}}, "prefix_cache.budget: 'much'; expected bytes"),
        ({"prefix_cache": {"budget": -1}}, "prefix_cache.budget: -1.* expected 0 or more"),
        ({"prefix_cache": {"spill_budget": "x"}}, "prefix_cache.spill_budget: 'x'; expected bytes"),
        ({"prefix_cache": {"spill": " "}}, "prefix_cache.spill: ''; expected a folder, or leave"),
        ({"prefix_cache": {"precision": "int8"}}, "prefix_cache.precision: .*'model' or 'half'"),
        ({"prefix_cache": {"budget": 400 * "9"}}, "prefix_cache.budget: expected a finite number"),
        ({"prefix_cache": {"budget": math.nan}}, "prefix_cache.budget: nan; .* finite"),
        ({"report": {"elicit": 1}}, "report.elicit: .*boolean.* \\(given: 1\\)"),
        ({"report": {"trackers": ["wand"]}}, "report.trackers.0: .*'wandb'.* \\(given: 'wand'\\)"),
        ({"data": {"answer": "\udcff"}}, "data.answer: .* is not UTF-8 text"),
    ],
)
def test_a_wrong_value_is_told_with_its_path(sections: dict[str, Any], told: str) -> None:
    found = problems(changed(**sections))
    assert any(re.match(told, p) for p in found), found
    assert all(problem.isprintable() for problem in found)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("hello", "template: 'hello'; expected a table"),
        ({}, "template: give either text, or messages, or system/user/assistant"),
        ({"merges": "refuse"}, "template: give either text"),
        (
            {"text": "[[a]]", "user": "[[a]]", "system": "b"},
            "template: give either text, or messages, or system/user/assistant, not text and syst",
        ),
        ({"user": "no span {text}"}, "template: no span; mark some text as"),
        ({"user": "[[]]"}, "template.user: an empty span"),
        ({"user": "[[a"}, "template.user: a span that is not closed"),
        ({"user": "a]] {text}"}, "template.user: ']]' without '[['"),
        ({"user": "[[a {text}]]"}, "template.user: column {text} inside the span"),
        ({"user": "[[a]] {"}, "template.user: lone '{'"),
        ({"system": "[[a]]"}, "template: the last message is a system message"),
        ({"user": 5}, "template.user: 5; expected text"),
        ({"text": ["[[a]]"]}, "template.text: ['[[a]]']; expected text"),
        (
            {"user": "[[a]]", "options": "thinking"},
            "template.options: 'thinking'; expected a table",
        ),
        ({"text": "[[a]]", "options": {"x": 1}}, "template.options: {'x': 1}; expected"),
        ({"user": "[[a]]", "options": {"x": math.nan}}, "template.options.x: nan; expected"),
        ({"user": "[[a]]", "merges": "ignore"}, "template.merges: 'ignore'; expected 'report'"),
        ({"user": "[[a]]", "usr": "b"}, "template.usr: unknown option; did you mean 'user'"),
        ({"messages": "user"}, "template.messages: expected a list of messages"),
        ({"messages": []}, "template: give either chat messages or one plain text"),
        ({"messages": [{"role": "user"}]}, "template.messages: expected a list of messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "template.messages: expected a list"),
        (
            {"messages": [{"role": "user", "content": "[[a]]", "name": "x"}]},
            "template.messages: expected a list",
        ),
        ({"messages": [{"role": "usr", "content": "[[a]]"}]}, "template: unknown role 'usr'; did"),
    ],
)
def test_a_wrong_template_is_told(template: object, told: str) -> None:
    found = problems({**SMALLEST, "template": template})
    assert any(problem.startswith(told) for problem in found), found


@pytest.mark.parametrize("values", [[], "model", None])
def test_a_recipe_that_is_no_table_is_refused(values: Any) -> None:
    assert problems(values) == ["expected a table of sections"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "3 problems"),
        (b"[model\n", "is not TOML: .*line 1"),
        (b"a = 1\na = 2\n", "is not TOML: .*line 2"),
        (b"\xff\xfe", "is not TOML: .*utf-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"{re.escape(str(path))}: {told}"):
        Recipe.read(path)


def test_a_file_that_is_not_there_or_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.toml: cannot be read \(No such file"):
        Recipe.read(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory"):
        Recipe.read(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.toml"
    text = tomli_w.dumps(SMALLEST).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Recipe.read(path) == Recipe.from_dict(SMALLEST)


def test_data_in_memory_becomes_files_of_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(changed(data={"answer": "label"}, target={"choices": ["no", "yes"]}))
    frame = pandas.DataFrame({"text": [f"caf\u00e9 {i}" for i in range(20)], "label": [0, 1] * 10})
    data = datasets.Dataset.from_pandas(frame)
    data = data.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    whole = recipe.with_data(tmp_path / "data", train=data, test=frame.assign(text="other"))
    assert whole.data.train == str(tmp_path / "data" / "train.jsonl")
    assert whole.data.labels == {"0": "no", "1": "yes"}
    splits = read_data(whole)
    assert {(row.answer, row.columns["text"]) for row in splits.test} == {
        ("no", "other"),
        ("yes", "other"),
    }
    assert len(splits.train) + len(splits.dev) == 20
    assert Recipe.from_dict(whole.as_dict()) == whole
    with pytest.raises(DataError, match="unknown split 'tset'; did you mean 'test'"):
        recipe.with_data(tmp_path, tset=frame)
