"""Fill in an export's programs, card and chat template, from `assets`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def fill(name: str, **values: Any) -> str:
    """A text with `values` in their places; `name` is that of its file without .jinja."""
    return _environment().get_template(f"{name}.jinja").render(values)


def fill_chat(**values: Any) -> str:
    """The chat template of an export, which is Jinja: it is filled in where <[ ]> and <% %> are."""
    environment = _environment().overlay(
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<[",
        variable_end_string="]>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    return environment.get_template("chat.jinja").render(values)


def to_source(value: Any) -> str:
    """Texts, numbers, and lists and mappings of them, as a Python literal."""
    return json.dumps(value, ensure_ascii=False)


def to_jinja(value: Any) -> str:
    """A plain JSON value as a Jinja expression."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        for character, escaped in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r")):
            value = value.replace(character, escaped)
        return f'"{value}"'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{to_jinja(str(k))}: {to_jinja(v)}' for k, v in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(to_jinja, value))}]"
    return repr(value)


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
    environment.filters.update(literal=to_source, jinja=to_jinja)
    return environment
