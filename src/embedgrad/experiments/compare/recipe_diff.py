"""Whether the parts of a comparison may stand in one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from embedgrad.errors import RecipeError
from embedgrad.recipe.recipe import Recipe

# No part depends on these. Where prefixes are stored changes no result; in which precision does.
MAY_CHANGE = (
    *("compare.methods", "compare.seeds", "export.", "report."),
    *("prefix_cache.budget", "prefix_cache.spill"),
)


def differences(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What another recipe's settings have otherwise, a phrase each, but for what may differ.

    Only methods and seeds may, as a comparison can grow, and where prefixes are stored. So may the
    time that a function of the user's own has for a reply, as what it did in time is the same.
    """
    then, now = _settings(before), dotted(recipe.as_dict())
    free: tuple[str, ...] = MAY_CHANGE
    if now.get("evaluation.scorer.name") == "callable":
        free = (*free, "evaluation.scorer.timeout")
    return unlike(then, now, free)


def unlike(
    then: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
    """What differs of values by dotted name, a phrase each, but for names that begin so."""
    names = sorted(n for n in {*then, *now} if then.get(n) != now.get(n) and not n.startswith(free))
    return [f"{n} is {shown(then.get(n))} there and {shown(now.get(n))} here" for n in names]


def shared_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that the parts of a comparison share, by dotted name."""
    values = _settings(recipe)
    return {name: value for name, value in values.items() if not name.startswith(MAY_CHANGE)}


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of every setting that the parts of a comparison share."""
    shared = shared_settings(recipe.as_dict())
    content = json.dumps(shared, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values by dotted name; what it is too old to have is at its default."""
    try:
        return dotted(Recipe.from_dict(recipe).as_dict())
    except RecipeError:  # it has what there is no longer, which is a difference
        return dotted(recipe)


def dotted(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted name; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        flat |= dotted(value, where) if isinstance(value, Mapping) else {where: value}
    return flat


def shown(value: Any) -> str:
    """A setting for a message, cut where it is long."""
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
