"""`--set NAME=VALUE`: one setting of a recipe, changed from outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedgrad import Recipe, TrustRegion
from embedgrad.cli.common import with_model
from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers import SGD, AdamW
from embedgrad.recipe.overrides import override
from embedgrad.training.settings import Training
from small_recipe import changed, read, written


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("training.epochs=2", ("training", "epochs"), 2.0),
        ("training.epochs = 2", ("training", "epochs"), 2.0),
        ("training.steps=7", ("training", "steps"), 7),
        ("data.allow_duplicates=true", ("data", "allow_duplicates"), True),
        ("model.name=HuggingFaceTB/SmolLM2-135M", ("model", "name"), "HuggingFaceTB/SmolLM2-135M"),
        ('model.name="a = b # c"', ("model", "name"), "a = b # c"),
        ("model.name='7'", ("model", "name"), "7"),
        ("model.name=a=b", ("model", "name"), "a=b"),
        ("model.name=two words", ("model", "name"), "two words"),
        ("model.name=x\ny = 1", ("model", "name"), "x\ny = 1"),
        ("model.name='x'\ny = 1", ("model", "name"), "'x'\ny = 1"),
        ('target.choices=["no", "yes"]', ("target", "choices"), ("no", "yes")),
        ("data.limit={train=3}", ("data", "limit"), {"train": 3}),
        ("data.limit.dev=3", ("data", "limit"), {"dev": 3}),
        ('data.labels."a.b"=c', ("data", "labels"), {"a.b": "c"}),
        ("data.where.größe=klein", ("data", "where"), {"größe": "klein"}),
        ("optimizer=sgd", ("parts", "optimizer"), SGD()),
        ("optimizer={name='sgd', momentum=0.5}", ("parts", "optimizer"), SGD(momentum=0.5)),
        ("optimizer.learning_rate=0.5", ("parts", "optimizer"), AdamW(learning_rate=0.5)),
        ("trust_region.radius=none", ("parts", "trust_region"), TrustRegion(radius=None)),
        ("evaluation.scorer.casefold=false", ("evaluation", "scorer", "casefold"), False),
    ],
)
def test_an_override_sets_one_option(
    tmp_path: Path, setting: str, path: Sequence[str], value: object
) -> None:
    found: Any = read(tmp_path, setting)
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order_and_the_file_stays(tmp_path: Path) -> None:
    path = written(tmp_path, changed(training={"epochs": 9}))
    before = path.read_bytes()
    assert Recipe.read(path, ["training.epochs=2", "training.epochs=3"]).training.epochs == 3
    assert Recipe.read(path).training.epochs == 9
    assert path.read_bytes() == before


def test_an_override_without_a_value_takes_the_option_away(tmp_path: Path) -> None:
    assert read(tmp_path, "training.epochs=", training={"epochs": 9}).training == Training()
    assert read(tmp_path, "training.steps=").training == Training()
    assert read(tmp_path, "transforms.0=", transforms=["clip"]).parts.transforms == ()
    with pytest.raises(RecipeError, match=r"model\.name: Field required"):
        read(tmp_path, "model.name=")


def test_an_override_reaches_into_lists(tmp_path: Path) -> None:
    recipe = read(tmp_path, "transforms.0.max_norm=0.5", transforms=[{"name": "clip"}])
    assert [vars(part) for part in recipe.parts.transforms] == [{"max_norm": 0.5}]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["epochs"], "--set: 'epochs': expected section.option=value"),
        (["=3"], "--set: '=3': expected section.option=value"),
        (["model.name.first=x"], "--set: model.name.first: model.name is 'tiny', which has no"),
        (["objective=owa", "objective.group=a"], "has no 'group'; .*, write objective.name=owa$"),
        (["transforms.3.max_norm=1"], "--set: transforms.3.max_norm: transforms is \\[\\]"),
        (["a", "b"], "--set: 2 problems\n  'a': expected .*\n  'b': expected"),
        (["training.epoch=1"], "r.toml: training.epoch: unknown option; did you mean 'epochs'"),
        (["..=1"], "r.toml: : unknown section"),
        (["#=1"], "r.toml: #: unknown section"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, settings: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        read(tmp_path, *settings, transforms=[])


@given(name=st.text(max_size=12), value=st.text(max_size=12))
def test_no_override_ends_in_anything_but_a_value_or_a_refusal(name: str, value: str) -> None:
    values: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}}
    with suppress(RecipeError):
        override(values, [f"{name}={value}"])


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "7", "häß.gguf", 'a "b"', "none"])
@pytest.mark.parametrize("sets", [[], ["training.epochs=2", "model.dtype=float32"]])
def test_an_option_is_short_for_a_setting(
    tmp_path: Path, name: str, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = with_model(sets, name)
    assert read(tmp_path, *settings) == read(tmp_path, *sets, model={"name": name})


@pytest.mark.parametrize(
    ("sets", "ours"),
    [
        (["model.name=other"], "other"),
        (["model.name = 'other'"], "other"),
        (['model={name = "other"}'], "other"),
        (["model.name=this", "model.name=other"], "other"),
    ],
)
def test_an_option_and_a_setting_that_differ_are_refused(sets: list[str], ours: str) -> None:
    with pytest.raises(RecipeError) as error:
        with_model(sets, "this")
    assert str(error.value) == (
        f"--model: 'this', but --set model.name gives {ours!r}; give only one of them"
    )
    assert with_model(["model.name=this"], "this")[-1] == 'model.name="this"'
