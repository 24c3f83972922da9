"""Override single settings with `--set`.

embedgrad optimize RECIPE --set training.epochs=2 --set 'target.choices=["no", "yes"]'
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from embedgrad.data.bounded_reads import DEEPEST, parse_toml
from embedgrad.errors import RecipeError

LONE_SURROGATES = re.compile("[\\ud800-\\udfff]")  # of an argument that was not UTF-8


def override(values: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply settings such as "training.epochs=2" to `values`. Raises `RecipeError`.

    A value is TOML, or else plain text; an empty one removes the option. A number in a name is an
    index into a list, from 0.
    """
    problems: list[str] = []
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            problems.append(f"{setting!r}: expected section.option=value")
        else:
            keys = _keys(name)
            if len(keys) > DEEPEST:
                problems.append(f"{name[:DEEPEST]}...: expected at most {DEEPEST} parts")
            else:
                _set(values, name, keys, text, problems)
    if problems:
        raise RecipeError("--set", problems)


def _set(
    values: dict[str, Any], name: str, keys: Sequence[str], text: str, problems: list[str]
) -> None:
    inner: Any = values
    for i, key in enumerate(keys):
        if isinstance(inner, list) and key.isdecimal() and int(key) < len(inner):
            index: Any = int(key)
        elif isinstance(inner, dict):
            index = key
        else:
            parent = ".".join(keys[:i])
            problem = f"{name}: {parent} is {inner!r}, which has no {key!r}"
            if isinstance(inner, str) and (i == 1 or parent == "evaluation.scorer"):
                problem += f"; to set options too, write {parent}.name={inner}"
            problems.append(problem)
            return
        if i < len(keys) - 1:
            inner = inner.setdefault(index, {}) if isinstance(inner, dict) else inner[index]
        elif text:
            inner[index] = _value(text)
        elif isinstance(inner, dict):
            inner.pop(index, None)
        else:
            del inner[index]


def _keys(name: str) -> list[str]:
    """The keys of a dotted name; a key with a dot is in quotes."""
    keys = []
    try:
        values: Any = parse_toml(f"{name} = 0")
        while isinstance(values, dict):
            ((key, values),) = values.items()
            keys.append(key)
    except ValueError:
        return name.split(".")
    return keys


def _value(text: str) -> object:
    try:
        values = parse_toml(f"value = {text}")
    except ValueError:
        return text
    return values["value"] if len(values) == 1 else text


def as_toml(value: object) -> str:
    """A plain value as `--set` takes it."""
    if isinstance(value, Mapping):
        cells = (
            f"{n if n.isidentifier() else json.dumps(n)} = {as_toml(v)}" for n, v in value.items()
        )
        return "{" + ", ".join(cells) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def check_values(value: object, path: str, problems: list[str]) -> None:
    """Note values that neither a recipe nor an artifact can hold, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_values(inner, f"{path}.{name}" if path else str(name), problems)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            check_values(inner, f"{path}.{i}", problems)
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: {value}; expected a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        problems.append(f"{path}: {value}; expected a number of at most 64 bits")
    elif isinstance(value, str) and LONE_SURROGATES.search(value):
        problems.append(f"{path}: {value!r} is not UTF-8 text")
    elif not isinstance(value, str | int | float | PurePath | None):
        problems.append(f"{path}: {value}; write a {type(value).__name__} as text, in quotes")
