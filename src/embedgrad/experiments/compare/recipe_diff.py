"""Check whether recipes may share one comparison table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from embedgrad.errors import RecipeError
from embedgrad.recipe.paths import anonymize, find_moved
from embedgrad.recipe.recipe import Recipe

# No part depends on these. Where prefixes are stored changes no result; their precision does.
MAY_CHANGE = (
    *("compare.methods", "compare.seeds", "export.", "report."),
    *("prefix_cache.budget", "prefix_cache.spill", "version"),
    "training.checkpoint_seconds",
)

# Where an engine is and how long it may take; whether there is one counts.
ENGINE = ("sampling.engine", "sampling.model", "sampling.timeout")

_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{16,}(,[0-9a-f]{64})*")


def recipe_differences(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """How the recipe differs from earlier values, a phrase each, except in `MAY_CHANGE`.

    A user's scorer may get another time limit: what it scored in time keeps its score.
    """
    then, now = _settings(before), flatten(recipe.as_dict())
    ignored = (*MAY_CHANGE, *find_moved(then, now))
    if now.get("evaluation.scorer.name") == "callable":
        ignored = (*ignored, "evaluation.scorer.timeout")
    ignored = (*ignored, *other_engine(then, now))
    return differences(then, now, ignored)


def other_engine(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings by dotted name that say which engine samples, where one does in both."""
    return ENGINE if all(values.get("sampling.engine") for values in (then, now)) else ()


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], ignored: tuple[str, ...] = ()
) -> list[str]:
    """How values by dotted name differ, a phrase each; names that begin with `ignored` may."""
    names = sorted(
        n for n in {*then, *now} if then.get(n) != now.get(n) and not n.startswith(ignored)
    )
    return [_difference(n, then.get(n), now.get(n)) for n in names]


def _difference(name: str, then: Any, now: Any) -> str:
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (then, now)):
        return f"{name.removesuffix('.sha256')} is not what it was"  # digests tell nobody anything
    return f"{name} is {show(then)} there and {show(now)} here"


def shared_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that the parts of a comparison share, by dotted name."""
    values = _settings(recipe)
    return {name: value for name, value in values.items() if not name.startswith(MAY_CHANGE)}


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of every setting that the parts of a comparison share; of paths the last part."""
    shared = shared_settings(anonymize(recipe.as_dict(), recipe.model.name))
    content = json.dumps(shared, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values by dotted name; settings that an old recipe lacks get their defaults."""
    try:
        return flatten(Recipe.from_dict(recipe).as_dict())
    except RecipeError:  # it has a setting that no longer exists, which is a difference
        return flatten(recipe)


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted name; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        flat |= flatten(value, where) if isinstance(value, Mapping) else {where: value}
    return flat


def show(value: Any) -> str:
    """A setting for a message, shortened if it is long."""
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
