"""The resolved recipe that a run saves says everything: read again, it is the same recipe."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad import Recipe, Target, TrustRegion
from embedgrad.errors import RecipeError
from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.objectives import OWA, Regret
from embedgrad.parts.optimizers import Extrapolated, Schedule
from embedgrad.parts.parameterizations import CP, LowRank, Subspace
from embedgrad.parts.registry import KINDS
from embedgrad.parts.transforms.context import ContextPull
from embedgrad.recipe.recipe import SECTIONS
from embedgrad.recipe.settings import (
    DataSettings,
    ModelSettings,
    PrefixCacheSettings,
    ReportSettings,
)
from embedgrad.training.self_training import Solutions, source_problems
from embedgrad.training.settings import Parts, Training
from small_recipe import SMALLEST, changed


def returned(recipe: Recipe) -> Recipe:
    return Recipe.from_dict(tomllib.loads(recipe.as_toml()))


TEMPLATES = {
    "text": {"text": "{a}\n[[Is it good?]]\nAnswer:"},
    "user": {"user": "[[Is it good?]] {a}"},
    "all roles": {"system": "Be [[brief]].", "user": "{a} {b}", "assistant": "I say"},
    "messages": {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "[[two]] {a}"},
        ]
    },
    "options": {
        "user": "[[a]] {a}",
        "options": {"enable_thinking": False, "n": 3, "x": {"y": [1.5, "z"]}},
    },
    "odd text": {"user": 'tab\t quote" back\\slash\r\n é 𝄞 \x7f ]]]] [[[[ {{ }} [[it]] {a}'},
    "merges": {"user": "[[a]] {a}", "merges": "refuse"},
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_kind_of_template_comes_back(template: dict[str, Any]) -> None:
    recipe = Recipe.from_dict({**SMALLEST, "template": template})
    assert returned(recipe) == recipe


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"choices": ["no", "yes"], "normalize": True},
        {"choices": ["no\n", " ü"], "answer_prefix": "", "end": True},
        {"answer_prefix": " ", "end": False},
    ],
)
def test_every_kind_of_target_comes_back(target: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(changed(target=target))
    assert returned(recipe) == recipe


@pytest.mark.parametrize(
    "region",
    [{}, {"radius": "none"}, {"radius": "none", "min_cosine": 0.9}, {"radius": 0.1}],
)
def test_every_trust_region_comes_back(region: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(changed(trust_region=region))
    assert returned(recipe) == recipe
    if region.get("radius") == "none":
        assert recipe.parts.trust_region.radius is None


def test_what_is_unset_by_default_takes_none_as_a_word() -> None:
    """A column, a group or a revision may be called "none"."""
    recipe = Recipe.from_dict(changed(data={"group": "none"}, model={"revision": "none"}))
    assert (recipe.data.group, recipe.model.revision) == ("none", "none")
    assert returned(recipe) == recipe


def test_no_gradient_transforms_is_not_the_default() -> None:
    recipe = Recipe.from_dict(changed(transforms=[]))
    assert recipe.parts.transforms == ()
    assert returned(recipe) == recipe != Recipe.from_dict(SMALLEST)


def test_a_part_is_named_in_short_or_in_full() -> None:
    full = Recipe.from_dict(changed(optimizer={"name": "sgd"}, evaluation={"scorer": "number"}))
    short = Recipe.from_dict(changed(optimizer="sgd", evaluation={"scorer": {"name": "number"}}))
    assert short == full


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
# Within the bounds of every option that has any.
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    str: TEXT,
    int: st.integers(2, 2**62),
    float: st.floats(0.001, 0.9),
    type(None): st.none(),
    Mapping[str, str]: st.dictionaries(TEXT, TEXT, max_size=3),
}


def of_type(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation as the settings use them."""
    if annotation in BY_TYPE:
        return BY_TYPE[annotation]
    if hasattr(annotation, "__metadata__"):
        return BY_TYPE[annotation.__origin__]
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        return st.lists(of_type(get_args(annotation)[0]), max_size=3).map(tuple)
    return st.one_of([of_type(kind) for kind in get_args(annotation)])


def instances(cls: type, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a dataclass of settings, each option from its annotation."""
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return st.builds(cls, **{n: given[n] if n in given else of_type(hints[n]) for n in names})


# Options that must fit each other.
OF_PARTS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    OWA: {"weights": st.sampled_from(["mean", "gini", (0.75, 0.25), (1.0,)]), "share": st.none()},
    **{part: {"rank": st.integers(1, 4096)} for part in (LowRank, Subspace)},
    CP: {"rank": st.integers(1, 4096), "family": st.none()},
    Regret: {
        "decision": st.just("cost_matrix"),
        "costs": st.sampled_from([((0.0, 2.0), (1.0, 0.0)), ((0.0, 1.0), (2.0, 0.0), (3.0, 1.5))]),
        **{n: st.none() for n in ("k", "width", "decisions", "constraints", "place", "weights")},
        "penalty": st.floats(1.5, 9),
    },
    ContextPull: {"sign": st.just("minus")},
    Extrapolated: {"base": st.sampled_from(["adamw", "lars", {"name": "sgd", "momentum": 0.5}])},
}


def parts(kind: str) -> st.SearchStrategy[Any]:
    return st.one_of([instances(cls, **OF_PARTS.get(cls, {})) for cls in KINDS[kind].values()])


SHARES = st.floats(0, 0.49)
TARGETS = instances(
    Target,
    choices=st.just(())
    | st.lists(TEXT.filter(bool), min_size=2, max_size=4, unique=True).map(tuple),
)
RECIPES = st.builds(
    Recipe,
    model=instances(
        ModelSettings,
        device_map=st.sampled_from([None, "auto", {"model.layers": "cpu", "lm_head": 0}]),
        max_memory=st.dictionaries(st.sampled_from(["0", "cpu"]), st.sampled_from([7, "1GiB"])),
    ),
    data=instances(
        DataSettings,
        limit=st.dictionaries(st.sampled_from(["train", "dev", "test"]), st.integers(1, 2**62)),
        dev_share=SHARES,
        test_share=SHARES,
        allow_duplicates=st.just(False),  # not together with drop_duplicates
        truncate=st.sampled_from([None, "a"]),
        solution=st.none() | TEXT.filter(lambda text: not set(text) & set("{}")),
    ),
    template=st.sampled_from(
        [Recipe.from_dict({**SMALLEST, "template": t}).template for t in TEMPLATES.values()]
    ),
    target=TARGETS,
    training=instances(Training),
    parts=st.builds(
        Parts,
        trust_region=instances(TrustRegion),
        parameterization=parts("parameterization"),
        objective=parts("objective").filter(lambda part: part.needs_labels),  # no teacher here
        transforms=st.lists(parts("transforms"), max_size=3).map(tuple),
        optimizer=parts("optimizer"),
        schedule=instances(Schedule),
    ),
    evaluation=instances(
        Evaluation,
        scorer=parts("scorer"),
        stop=st.lists(TEXT.filter(bool), max_size=2).map(tuple),
        samples=st.sampled_from([0, 0, 0, 8]),
    ),
    prefix_cache=st.builds(
        PrefixCacheSettings,
        st.sampled_from([0.0, 0.25, 1e9, "2 GiB", "0"]),
        st.sampled_from([None, "prefixes"]),
        st.sampled_from([0.5, "10 GB"]),
        st.sampled_from(["model", "half"]),
    ),
    report=instances(ReportSettings),
    solutions=instances(Solutions),
    merges=st.sampled_from(["report", "refuse"]),
)


def fit_together(recipe: Recipe) -> Recipe:
    """The recipe with others of those settings that contradict each other."""
    target, objective, training = recipe.target, recipe.parts.objective, recipe.training
    if isinstance(objective, Regret):
        target = replace(target, choices=tuple("abc"[: len(objective.table)]))
    elif not target.choices and objective.needs_choices(available=False):
        target = replace(target, choices=("no", "yes"))
    free, metric, solutions = not target.choices, training.metric, recipe.solutions
    for_regret = isinstance(objective, Regret)
    if (metric == "regret" and not for_regret) or (metric == "macro_f1" and free):
        training = replace(training, metric="auto")
    if training.batch_by == "groups" and recipe.data.group is None:
        training = replace(training, batch_by="examples")
    if objective.sampling:
        solutions, training = replace(solutions, source="answer"), replace(training, replay=0.0)
    if source_problems(solutions, target, column=recipe.data.solution is not None):
        solutions = Solutions(source="answer")
    evaluation = recipe.evaluation if free else replace(recipe.evaluation, samples=0)
    return replace(
        recipe, target=target, training=training, evaluation=evaluation, solutions=solutions
    )


@settings(max_examples=100)
@given(recipe=RECIPES.map(fit_together))
def test_any_valid_recipe_comes_back_from_its_resolved_form(recipe: Recipe) -> None:
    assert returned(recipe) == recipe


@settings(max_examples=100)
@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "user", "train", "choices", "limit", "options"]) | TEXT,
                inner,
                max_size=3,
            )
        ),
        max_leaves=10,
    ),
    section=st.sampled_from(list(SECTIONS)),
)
def test_whatever_a_section_holds_is_taken_or_refused(values: Any, section: str) -> None:
    try:
        recipe = Recipe.from_dict({**SMALLEST, section: values})
    except RecipeError:
        return
    assert returned(recipe) == recipe
