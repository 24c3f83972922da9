"""Build parts from a recipe's names and options.

A part is a frozen dataclass whose fields are its options. The docstring of a field is its help, so
recipe errors, `embedgrad parts` and the docs say the same.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

from pydantic import ValidationError

from embedgrad.data.typed import adapter_of
from embedgrad.errors import EmbedgradError, RecipeError, nearest
from embedgrad.parts.augmentations import AUGMENTATIONS
from embedgrad.parts.objectives import OBJECTIVES
from embedgrad.parts.optimizers import OPTIMIZERS
from embedgrad.parts.parameterizations import PARAMETERIZATIONS
from embedgrad.parts.scorers import SCORERS
from embedgrad.parts.transforms import TRANSFORMS

T = TypeVar("T")
_SHOULD_BE = "Input should be "  # how pydantic begins

KINDS: dict[str, Mapping[str, type]] = {
    "parameterization": PARAMETERIZATIONS,
    "objective": OBJECTIVES,
    "augmentations": AUGMENTATIONS,
    "transforms": TRANSFORMS,
    "optimizer": OPTIMIZERS,
    "scorer": SCORERS,
}
# Kinds without a default are off unless a recipe names a part. Those of LISTS take several.
LISTS = ("augmentations", "transforms")
DEFAULTS = {
    "parameterization": "free",
    "objective": "cross_entropy",
    "transforms": "clip",
    "optimizer": "adamw",
    "scorer": "exact",
}


@final
@dataclass(frozen=True, slots=True)
class Option:
    """One option of a part or a section: its name, type and default as text, and its help."""

    name: str
    type: str
    default: str
    help: str


def options_of(cls: type) -> list[Option]:
    """The options of a frozen dataclass, with the docstring of each field."""
    helps = _read_field_docs(cls)
    options = []
    for field in dataclasses.fields(cls):
        value: object = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is dataclasses.MISSING:
            default = "required"
        else:
            default = "unset" if value is None else json.dumps(value, default=str)
        help = helps.get(field.name, "")
        options.append(Option(field.name, _describe_type(field.type), default, help))
    return options


def summary_of(cls: type) -> str:
    """First line of a part's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def build(cls: type[T], values: object, path: str, problems: list[str]) -> T | None:
    """Build a dataclass from plain values; on failure None, and `problems` gets a line for each."""
    if not isinstance(values, Mapping):
        problems.append(f"{path}: {values!r}; expected a table of options")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [str(name) for name in values if name not in fields]
    problems += [f"{path}.{name}: unknown option; {nearest(name, fields)}" for name in unknown]
    options = {name: value for name, value in values.items() if name in fields}
    plain = {n: None if _means_unset(fields[n], value) else value for n, value in options.items()}
    try:
        instance = adapter_of(cls).validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        reasons: dict[tuple[str, str], list[str]] = {}  # an option of several types has one of each
        for entry in error.errors(include_url=False):
            reason = entry.get("ctx", {}).get("error") or entry["msg"]
            shown = "" if entry["type"] == "missing" else f" (given: {entry['input']!r})"
            reasons.setdefault((_locate(entry["loc"], options), shown), []).append(str(reason))
        for (where, shown), (first, *others) in reasons.items():
            text = " or ".join([first, *(other.removeprefix(_SHOULD_BE) for other in others)])
            problems.append(f"{path}.{where}: {text}{shown}")
        return None
    except EmbedgradError as error:
        text = str(error)
        problems.append(text if text.startswith(f"{path}.") else f"{path}: {text}")
        return None
    return None if unknown else instance


def build_part(kind: str, values: object, path: str, problems: list[str]) -> Any:
    """Build a part from `"name"` or `{name = ..., options}`; on failure None, as `build` does.

    Options without a name are those of the kind's default part, if it has one.
    """
    table, default = KINDS[kind], DEFAULTS.get(kind)
    if isinstance(values, str):
        values = {"name": values}
    name = values.get("name", default) if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or not isinstance(name, str):
        example = default or next(iter(table), "NAME")
        problems.append(f"{path}: name the part, as in {{ name = {example!r} }}")
        return None
    if name not in table:
        problems.append(f"{path}.name: unknown {kind} {name!r}; {nearest(name, table)}")
        return None
    rest = {key: value for key, value in values.items() if key != "name"}
    return build(table[name], rest, path, problems)


def build_parts(kind: str, values: object, problems: list[str]) -> tuple[Any, ...]:
    """The parts of a kind that takes several, from a list; see `build_part`."""
    if not isinstance(values, list | tuple):
        problems.append(f"{kind}: expected a list, as in [[{kind}]]")
        return ()
    return tuple(build_part(kind, part, f"{kind}.{i}", problems) for i, part in enumerate(values))


def values_of(part: Any) -> dict[str, Any]:
    """The options of a part as `build` takes them, without those that are unset by default."""
    values = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value is not None:
            values[field.name] = value
        elif field.default is not None:
            values[field.name] = "none"  # TOML has no null
    return values


def part_values(kind: str, part: object) -> dict[str, Any]:
    """The part's name and all its options, as `build_part` takes them.

    Raises `RecipeError` for a part that no recipe can name.
    """
    for name, cls in KINDS[kind].items():
        if type(part) is cls:
            return {"name": name, **values_of(part)}
    known = ", ".join(KINDS[kind])
    problem = f"{type(part).__name__} is no registered part, so no recipe can name it"
    raise RecipeError("recipe", [f"{kind}: {problem}; known: {known}"])


def _means_unset(field: dataclasses.Field[Any], value: object) -> bool:
    """Whether a value is "none" and says no value: where that is possible and not the default."""
    return value == "none" and field.default is not None and "None" in str(field.type)


def _locate(location: tuple[int | str, ...], values: object) -> str:
    """The steps of a location that lead through `values`; the others are pydantic's own."""
    names: list[str] = []
    for step in location:
        try:
            values = values[step]  # type: ignore[index]
        except (LookupError, TypeError):
            if names:
                continue
        names.append(str(step))
    return ".".join(names)


def _read_field_docs(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _describe_type(annotation: object) -> str:
    """`Annotated[int, Gt(0)] | None` reads as "int > 0 or none"."""
    text = str(annotation).replace(" | None", " or none")
    text = text.replace("Mapping[str, ", "table[").replace("tuple[str, ...]", "list[str]")
    text = re.sub(r"tuple\[(int|float), \.\.\.\]", r"list[\1]", text)
    for name, sign in (("Gt", ">"), ("Ge", ">="), ("Lt", "<"), ("Le", "<=")):
        text = text.replace(f"{name}(", f"{sign} ")
    text = text.replace("tuple[list[float], ...]", "list[list[float]]")
    if text.startswith("Annotated["):
        text = text.removeprefix("Annotated[").replace(")", "").replace("]", "").replace(",", "")
    return re.sub(r"Literal\[(.*?)\]", lambda names: names[1].replace(", ", " | "), text)
