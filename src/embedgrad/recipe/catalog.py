"""List all settings and parts for `embedgrad parts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embedgrad.errors import RecipeError, nearest
from embedgrad.parts.registry import DEFAULTS, KINDS, LISTS, Option, options_of, summary_of
from embedgrad.prompt.place import PLACES
from embedgrad.recipe.recipe import AUTO, SECTIONS

_ROLES = {"system": "system message", "user": "user message", "assistant": "opening of the answer"}
_PLAIN = "Plain text with {columns} and one [[span]], for a model without a chat template."
_MESSAGES = "A list of { role, content } instead of these three."
_MERGES = "What to do if a row's own text merges with the span."
_PLACE = "Where the span is to stand; auto: where it does best on dev. Unset: where it is written."
_TEMPLATE = (
    Option("text", "str", "unset", _PLAIN),
    *(Option(role, "str", "unset", f"The {what}.") for role, what in _ROLES.items()),
    Option("messages", "list of tables", "unset", _MESSAGES),
    Option("options", "table", "{}", "Extra variables for the model's chat template."),
    Option("merges", "'report' | 'refuse'", '"report"', _MERGES),
    Option("place", " | ".join(map(repr, (AUTO, *PLACES))), "unset", _PLACE),
)
_SUMMARY = "The prompt: one text, chat messages by role, or a list of messages."
# How a part is written if it is not a section.
_WRITTEN = {**{kind: f"[[{kind}]]" for kind in LISTS}, "scorer": "[evaluation] scorer ="}


def catalog(only: str | None = None) -> dict[str, Any]:
    """Sections and kinds of parts by name. Raises `RecipeError` for an unknown name."""
    entries: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        if cls is not None:
            entries[name] = {"summary": summary_of(cls), "options": _options(cls)}
    entries["template"] = {"summary": _SUMMARY, "options": [asdict(option) for option in _TEMPLATE]}
    for kind, table in KINDS.items():
        entries[kind] = {
            "default": DEFAULTS.get(kind),
            "parts": {
                name: {"summary": summary_of(cls), "options": _options(cls)}
                for name, cls in table.items()
            },
        }
    if only is None:
        return entries
    if only not in entries:
        raise RecipeError("parts", [f"unknown kind or section {only!r}; {nearest(only, entries)}"])
    return {only: entries[only]}


def catalog_text(entries: Mapping[str, Any]) -> str:
    """The catalog for a terminal."""
    lines: list[str] = []
    for name, entry in entries.items():
        if "parts" in entry:
            lines += ["", f"{_WRITTEN.get(name, f'[{name}]')}  one of"]
            lines += [] if entry["parts"] else ["  (none in this version)"]
            for name, part in entry["parts"].items():
                default = " (default)" if name == entry["default"] else ""
                lines.append(f'  {{ name = "{name}" }}{default}  {part["summary"]}')
                lines += _option_lines(part["options"], "      ")
        else:
            lines += ["", f"[{name}]  {entry['summary']}", *_option_lines(entry["options"], "  ")]
    return "\n".join(lines[1:])


def _options(cls: type) -> list[dict[str, str]]:
    return [asdict(option) for option in options_of(cls) if option.name != "scorer"]


def _option_lines(options: list[dict[str, str]], indent: str) -> list[str]:
    lines = []
    for option in options:
        lines.append(f"{indent}{option['name']} = {option['default']}  ({option['type']})")
        lines.append(f"{indent}    {option['help']}")
    return lines
