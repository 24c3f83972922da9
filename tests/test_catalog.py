"""`embedgrad parts`: everything that a recipe may say, in the words that check it."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

import pytest

from embedgrad import Recipe
from embedgrad.errors import RecipeError
from embedgrad.parts.registry import DEFAULTS, KINDS
from embedgrad.recipe.catalog import catalog, catalog_text
from embedgrad.recipe.recipe import SECTIONS
from small_recipe import changed

FOUND = catalog()
TEMPLATE = {"text", "system", "user", "assistant", "messages", "options", "merges", "place"}


def described() -> list[tuple[str, dict[str, str]]]:
    """Every option with its place."""
    listed = []
    for name, entry in FOUND.items():
        for part, inner in entry.get("parts", {"": entry}).items():
            listed += [(f"{name} {part} {o['name']}", o) for o in inner["options"]]
    return listed


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def test_every_section_and_every_part_is_listed() -> None:
    assert FOUND.keys() == SECTIONS.keys() - {"template"} | {"template", "scorer"}
    for kind, table in KINDS.items():
        assert FOUND[kind]["parts"].keys() == table.keys()
        assert FOUND[kind]["default"] == DEFAULTS.get(kind)


def test_every_option_is_listed() -> None:
    for name, cls in SECTIONS.items():
        if cls is not None:
            listed = {option["name"] for option in FOUND[name]["options"]}
            assert listed == fields(cls) - {"scorer"}
    for kind, table in KINDS.items():
        for name, cls in table.items():
            listed = {option["name"] for option in FOUND[kind]["parts"][name]["options"]}
            assert listed == fields(cls)
    assert {option["name"] for option in FOUND["template"]["options"]} == TEMPLATE


@pytest.mark.parametrize(("place", "option"), described(), ids=lambda value: str(value)[:40])
def test_every_option_says_its_type_its_default_and_what_it_is(
    place: str, option: dict[str, str]
) -> None:
    assert option["help"][0].isupper() or option["help"].startswith(("auto", "A .jsonl")), place
    assert option["help"].endswith(".")
    assert option["type"]
    assert "Annotated" not in option["type"]
    assert "Mapping" not in option["type"]
    if option["default"] not in ("required", "unset"):
        json.loads(option["default"])


def test_every_part_and_section_has_a_summary() -> None:
    for entry in FOUND.values():
        for inner in entry.get("parts", {"": entry}).values():
            assert inner["summary"].endswith(".")
            assert "(" not in inner["summary"].partition(" ")[0], "no docstring of its own"


def test_the_listed_defaults_are_those_of_an_empty_section() -> None:
    resolved = Recipe.from_dict(changed()).as_dict()
    for name, entry in FOUND.items():
        if "parts" in entry or name in ("template", "teacher", "images"):  # none without one
            continue
        for option in entry["options"]:
            if option["default"] == "required":
                continue
            value = resolved[name].get(option["name"])
            shown = None if option["default"] == "unset" else json.loads(option["default"])
            if name != "data" or option["name"] != "train":
                assert value == shown, f"{name}.{option['name']}"


def test_one_section_or_kind_can_be_asked_for() -> None:
    assert catalog("optimizer") == {"optimizer": FOUND["optimizer"]}
    with pytest.raises(RecipeError, match="unknown kind or section 'optimiser'; did you mean 'op"):
        catalog("optimiser")


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_shows_how_a_part_is_written(kind: str) -> None:
    text = catalog_text(catalog(kind))
    header, *lines = text.splitlines()
    assert KINDS[kind] or lines == ["  (none in this version)"]
    assert header.endswith("  one of")
    section = header.removesuffix("  one of")
    for name in KINDS[kind]:
        (line,) = [line for line in lines if line.startswith(f'  {{ name = "{name}" }}')]
        assert ("(default)" in line) == (name == DEFAULTS.get(kind))
        options = FOUND[kind]["parts"][name]["options"]
        given = "".join(f', {o["name"]} = "x"' for o in options if o["default"] == "required")
        one = f'{{ name = "{name}"{given} }}'
        written: dict[str, Any] = {
            "scorer": f"{section.replace('] ', ']@')} {one}".replace("@", "\n"),
        }
        rest = "".join(f'\n{o["name"]} = "x"' for o in options if o["default"] == "required")
        toml = written.get(kind, f'{section}\nname = "{name}"{rest}')
        sections = tomllib.loads(toml)
        if name == "distill":
            sections["teacher"] = {"prompt": "run"}
        if name == "regret":
            sections["objective"] |= {"k": 1, "weights": [0, 1]}
            sections["target"] = {"choices": ["no", "yes"]}
            sections |= {"data": {"group": "day"}, "training": {"batch_by": "groups"}}
        Recipe.from_dict(changed(**sections))
