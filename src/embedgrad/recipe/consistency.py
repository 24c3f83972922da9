"""Check what no section of a recipe can check alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from embedgrad.data.splits import NAMES as SPLITS
from embedgrad.errors import RecipeError, nearest
from embedgrad.model.prefix_cache import budget_bytes
from embedgrad.parts.objectives import Distill, Regret
from embedgrad.prompt.images import TEMPLATE
from embedgrad.recipe.settings import DataSettings, PrefixCacheSettings
from embedgrad.training.self_training import source_problems

TARGETLESS = ("auto", "answer")  # solutions.source that names no text to train on


def check_together(
    sections: Mapping[str, Any], objective: Any, problems: list[str], *, taught: bool
) -> None:
    """What no section can check alone; a section with a problem is None.

    `taught`: there is a section [teacher], which may have a problem.
    """
    template, data, target = sections["template"], sections.get("data"), sections["target"]
    shown = sections["demonstrations"]
    if shown and shown.k and objective and objective.sampling:
        problems.append(
            "demonstrations.k: the objective samples answers, with the demonstrations' own answers "
            "in view; leave them out"
        )
    if (
        sections["sampling"]
        and sections["sampling"].engine
        and objective
        and not objective.sampling
    ):
        problems.append(
            "sampling.engine: is for answers that the objective samples, as 'reward' does; set "
            "objective.name, or take it out"
        )
    free = target and not target.choices
    if free and objective and objective.needs_choices(available=False):
        problems.append(
            f"objective.over: {objective.over!r}, but target.choices lists none"
            if hasattr(objective, "over")
            else "objective: needs choices, but target.choices lists none"
        )
    if free and sections["training"] and sections["training"].metric == "macro_f1":
        problems.append("training.metric: 'macro_f1', but target.choices lists none")
    evaluation = sections["evaluation"]
    if evaluation and evaluation.samples and target and target.choices:
        problems.append(
            f"evaluation.samples: {evaluation.samples}, but answers are chosen, not written; leave "
            "it at 0, or take target.choices away"
        )
    if template and data and data.truncate and data.truncate not in template.columns:
        problems.append(
            f"data.truncate: {data.truncate!r} is not a column of the template; "
            f"{nearest(data.truncate, template.columns)}"
        )
    if isinstance(objective, Distill):
        _check_direction(objective, target, problems)
    training, solutions = sections["training"], sections["solutions"]
    if training and training.batch_by == "groups" and data and data.group is None:
        problems.append("training.batch_by: 'groups', but data.group names no column")
    if training and training.replay and objective and objective.sampling:
        problems.append(
            "training.replay: adds rows with their answers, but the objective samples answers; "
            "leave it at 0"
        )
    if isinstance(objective, Regret):
        _check_decisions(objective, data, target, training, problems)
    elif training and training.metric == "regret":
        problems.append("training.metric: 'regret' is for objective.name = 'regret'; set another")
    if not (taught or objective is None or objective.needs_labels):
        problems.append("objective: 'distill' needs a [teacher]; add the section")
    if sections.get("images"):
        _check_images(sections, objective, problems)
    if sections["teacher"]:
        _check_teacher(solutions, objective, problems)
    if solutions and objective and objective.sampling and solutions.source not in TARGETLESS:
        problems.append(
            f"solutions.source: {solutions.source!r}, but objective trains on answers that the "
            "model samples; take solutions.source out, or train on solutions first, in a run of "
            "their own"
        )
    elif solutions and target and data:
        problems += source_problems(solutions, target, column=data.solution is not None)
    if data:
        _check_splits(data, problems)
    if sections["prefix_cache"]:
        _check_prefixes(sections["prefix_cache"], problems)


def _check_images(sections: Mapping[str, Any], objective: Any, problems: list[str]) -> None:
    """What a recipe of images cannot have, as there is no text."""
    names = ("demonstrations", "sampling", "target", "model", "data", "prefix_cache", "report")
    shown, sampling, target, model, data, prefixes, report = (sections[name] for name in names)
    of_text = {
        "model.device_map": model and model.device_map,
        "model.fsdp": model and model.fsdp,
        "data.truncate": data and data.truncate is not None,
        "prefix_cache.spill": prefixes and prefixes.spill is not None,
        "prefix_cache.precision": prefixes and prefixes.precision != "model",
        "report.elicit": report and report.elicit,
        "template": sections["template"] != TEMPLATE,
        "teacher": sections["teacher"] is not None,
        "demonstrations.k": shown and shown.k,
        "sampling.engine": sampling and sampling.engine,
        "objective": objective and (objective.sampling or not objective.needs_labels),
    }
    problems += [
        f"{name}: is for text, which a recipe with [images] has not; take it or [images] out"
        for name, given in of_text.items()
        if given
    ]
    if target and not target.choices:
        problems.append("target.choices: lists none; a vision transformer chooses among classes")


def _check_teacher(solutions: Any, objective: Any, problems: list[str]) -> None:
    if objective and objective.needs_labels:
        problems.append("teacher: is for objective = 'distill'; set it, or take the section out")
    if solutions and solutions.source != "auto":
        problems.append(
            f"solutions.source: {solutions.source!r}, but the teacher writes the answers; take it "
            "or [teacher] out"
        )


def _check_direction(objective: Distill, target: Any, problems: list[str]) -> None:
    if objective.direction == "forward" and objective != Distill(top=objective.top):
        problems.append(
            "objective: samples, temperature and max_new_tokens are for direction = 'reverse'; set "
            "it, or take them out"
        )
    if objective.direction == "reverse" and target and target.choices:
        problems.append(
            "objective.direction: 'reverse' samples free answers, but target.choices lists all "
            "there are; take one of them out ('forward' compares the choices exactly)"
        )


def _check_decisions(
    objective: Regret, data: Any, target: Any, training: Any, problems: list[str]
) -> None:
    count = len(objective.table)
    if target and target.choices and count != len(target.choices):
        name = "costs" if objective.weights is None else "weights"
        problems.append(
            f"objective.{name}: {count} for {len(target.choices)} choices; expected one for each, "
            "in the order of target.choices"
        )
    if objective.needs_groups and training and training.replay:
        problems.append("training.replay: adds single rows to whole decisions; leave it at 0")
    if objective.needs_groups and data and data.limit:
        problems.append("data.limit: cuts decisions apart; give files with fewer of them")
    whole = data and data.group is not None and training and training.batch_by == "groups"
    if objective.needs_groups and data and training and not whole:
        problems.append(
            "objective: 'regret' decides over all rows of a group; set data.group to the column "
            "that names each row's decision, and training.batch_by = 'groups'"
        )


def _check_prefixes(prefixes: PrefixCacheSettings, problems: list[str]) -> None:
    for name, budget in (("budget", prefixes.budget), ("spill_budget", prefixes.spill_budget)):
        if isinstance(budget, float) and not math.isfinite(budget):
            continue  # `check_values` reports it
        try:
            budget_bytes(budget, name)
        except RecipeError as error:
            problems += [f"prefix_cache.{name}: {problem}" for problem in error.problems]
    if prefixes.spill is not None and not prefixes.spill.strip():
        problems.append("prefix_cache.spill: ''; expected a folder, or leave the option out")


def _check_splits(data: DataSettings, problems: list[str]) -> None:
    for name, rows in data.limit.items():
        if name not in SPLITS:
            problems.append(f"data.limit.{name}: unknown split; {nearest(name, SPLITS)}")
        elif rows < 1:
            problems.append(f"data.limit.{name}: {rows}; expected at least 1")
    shares = {"dev": data.dev_share, "test": data.test_share}
    taken = {n: share for n, share in shares.items() if getattr(data, n) is None}
    if sum(taken.values()) >= 1:
        settings = " and ".join(f"data.{n}_share = {share}" for n, share in taken.items())
        problems.append(f"data: {settings} leave nothing to train on")
