"""Everything that a recipe may say, read off the classes that check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embedgrad.errors import RecipeError, nearest
from embedgrad.parts import KINDS, options_of, summary_of
from embedgrad.recipe import SECTIONS

TEMPLATE_OPTIONS = (
    ("text", "Plain text with {columns} and one [[span]], for a model without a chat template."),
    ("system", "The system message."),
    ("user", "The user message."),
    ("assistant", "The opening of the answer."),
    ("messages", "Instead of these three: a list of { role, content }."),
    ("options", "Extra variables for the model's chat template."),
    ("merges", "Rows whose own text merges with the span: 'report' (default) or 'refuse'."),
)


def catalog(only: str | None = None) -> dict[str, Any]:
    """Sections and kinds of parts by name. Raises `RecipeError` for an unknown one."""
    found: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        if cls is not None:
            found[name] = {"summary": summary_of(cls), "options": _options(cls)}
    found["template"] = {
        "summary": "The prompt: chat messages or plain text.",
        "options": [
            {"name": name, "type": "", "default": "", "help": text}
            for name, text in TEMPLATE_OPTIONS
        ],
    }
    for kind, table in KINDS.items():
        found[kind] = {
            "parts": {
                name: {"summary": summary_of(cls), "options": _options(cls)}
                for name, cls in table.items()
            }
        }
    if only is None:
        return found
    if only not in found:
        raise RecipeError("parts", [f"{only!r} is not known; {nearest(only, found)}"])
    return {only: found[only]}


def catalog_text(found: Mapping[str, Any]) -> str:
    """The catalog for a terminal."""
    lines: list[str] = []
    for name, entry in found.items():
        if "parts" in entry:
            lines += ["", f"{name}: one of"]
            for part, described in entry["parts"].items():
                lines.append(f'  {{ name = "{part}" }}  {described["summary"]}')
                lines += _option_lines(described["options"], "      ")
        else:
            lines += ["", f"[{name}]  {entry['summary']}", *_option_lines(entry["options"], "  ")]
    return "\n".join(lines[1:])


def _options(cls: type) -> list[dict[str, str]]:
    return [asdict(option) for option in options_of(cls) if option.name != "scorer"]


def _option_lines(options: list[dict[str, str]], indent: str) -> list[str]:
    lines = []
    for option in options:
        value = f" = {option['default']}" if option["default"] else ""
        kind = f"  ({option['type']})" if option["type"] else ""
        lines += [f"{indent}{option['name']}{value}{kind}", f"{indent}    {option['help']}"]
    return lines
