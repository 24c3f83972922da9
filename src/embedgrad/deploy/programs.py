"""Fill in the texts of `assets`: the programs and the card of an export."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def fill(name: str, **values: Any) -> str:
    """A text with `values` in their places; `name` is that of its file without .jinja."""
    return _environment().get_template(f"{name}.jinja").render(values)


def asset(name: str) -> str:
    """A file of `assets` as it is."""
    return files("embedgrad.deploy").joinpath("assets", name).read_text(encoding="utf-8")


def to_source(value: Any) -> str:
    """Texts, numbers, and lists and mappings of them, as a Python literal."""
    return json.dumps(value, ensure_ascii=False)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("embedgrad.deploy", "assets"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["literal"] = to_source
    return environment
