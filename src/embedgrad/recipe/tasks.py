"""Recipes with [[tasks]]: one training, a prompt for each task.

Every task is a recipe of its own, made of the file's sections and the task's: a task's option
replaces the file's, a task's template the whole template. Tasks differ in what `OWN` names, and
share everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from embedgrad.errors import RecipeError
from embedgrad.recipe.overrides import override
from embedgrad.recipe.paths import anchor
from embedgrad.recipe.recipe import AUTO, VERSION, Recipe, read_toml

OWN = ("data", "template", "target", "solutions")


def read_tasks(path: Path, overrides: Sequence[str] = ()) -> dict[str, Recipe] | None:
    """The recipe of each task by name; None for a recipe without [[tasks]].

    Overrides hold for every task. Raises `RecipeError`.
    """
    values = read_toml(path)
    if "tasks" not in values:
        return None
    tasks, problems = values.pop("tasks"), list[str]()
    if not isinstance(tasks, list) or not all(isinstance(task, Mapping) for task in tasks):
        raise RecipeError(str(path), ["tasks: expected a list of tables, each as [[tasks]]"])
    recipes: dict[str, Recipe] = {}
    taken = {"checkpoint", "prompt"}  # by other folders of a run; not all disks tell case apart
    found: dict[str, list[str]] = {}
    for number, task in enumerate(tasks):
        name, where = task.get("name"), f"tasks.{number}"
        if not isinstance(name, str) or not name.isidentifier() or name.casefold() in taken:
            own = "other than 'checkpoint' and 'prompt'"
            problems.append(f"{where}.name: {name!r}; expected a name of letters, once, {own}")
            continue
        taken.add(name.casefold())
        merged = _merge(values, {key: value for key, value in task.items() if key != "name"})
        anchor(merged, path.parent)
        override(merged, overrides)
        if "tasks" in merged:
            problems.append(
                f"{where}.tasks: a task has none, and --set changes none; edit the file"
            )
            continue
        try:
            recipes[name] = Recipe.from_dict(merged, name)
        except RecipeError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
    problems += [f"task {', '.join(names)}: {problem}" for problem, names in found.items()]
    problems += _differences(recipes) if recipes else []
    if len(tasks) < 2:
        problems.append("tasks: expected two or more; a recipe without [[tasks]] is one task")
    if problems:
        raise RecipeError(str(path), problems)
    return recipes


def as_toml(recipes: Mapping[str, Recipe], folder: Path) -> str:
    """The recipe of all tasks, every setting of each written out, for a run's `folder`."""
    tasks = [{"name": name, **recipe.as_dict(folder)} for name, recipe in recipes.items()]
    for task in tasks:
        del task["version"]
    return tomli_w.dumps({"version": VERSION, "tasks": tasks})


def _merge(values: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """The file's sections with a task's options in them."""
    merged = copy.deepcopy(dict(values))
    for section, options in task.items():
        both = isinstance(options, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = (
            {**merged[section], **options} if both and section != "template" else options
        )
    return merged


def _differences(recipes: Mapping[str, Recipe]) -> list[str]:
    """What tasks must share and do not, and what no recipe with tasks can have."""
    problems: list[str] = []
    first, *others = recipes
    problems += [
        f"task {name}: template.place: 'auto'; choose a place for each task"
        for name, recipe in recipes.items()
        if recipe.place == AUTO
    ]
    some = recipes[first]
    if any(recipe.images is not None for recipe in recipes.values()):
        problems.append("images: not with [[tasks]]; train each task by itself")
    if some.parts.objective.sampling or some.teacher:
        problems.append("objective: with [[tasks]] prompts are trained on answers in the data")
    if some.parts.objective.decides:
        problems.append("objective: 'regret' not with [[tasks]]; train each task by itself")
    if some.demonstrations.k:
        problems.append("demonstrations.k: not with [[tasks]]; write them into the templates")
    if some.training.warm_start:
        problems.append("training.warm_start: not with [[tasks]]")
    if some.training.replay:
        problems.append("training.replay: not with [[tasks]], which begin together")
    if some.report.elicit:
        problems.append("report.elicit: not with [[tasks]]; measure each task by itself")
    shared = some.as_dict()
    for name in others:
        differing = [n for n, part in recipes[name].as_dict().items() if part != shared.get(n)]
        problems += [
            f"tasks {first} and {name} differ in {section}, which they must share; tasks may "
            f"differ in {', '.join(OWN)}"
            for section in differing
            if section not in OWN
        ]
    return problems
