"""The child's side of rendering chat templates: jinja's sandbox.

It is set up as transformers does it, but without transformers, whose import takes ten times as long
as all the rest.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn, final

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**29  # bytes of addresses, some ten times what jinja takes


@final
class _Generation(Extension):
    """The tag around what a model generates: it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012, as jinja wants it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@final
class _Namespace(jinja2.utils.Namespace):
    """A namespace whose names cannot begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        names = dict(*rest, **values)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def render(chat_template: str, values: Mapping[str, Any], longest: int) -> dict[str, str]:
    """The `text`, the `problem` that the template has with the values, or the limit it `broke`.

    `longest`: how many characters it may have more than the values.
    """
    most = longest + len(json.dumps(values))
    parts, length = [], 0
    try:
        for part in _compile(chat_template).generate(**values):
            parts.append(part)
            length += len(part)
            if length > most:
                return {"broke": f"makes a text of more than {most:,} characters"}
    except MemoryError:
        return {"broke": f"takes more than {MEMORY:,} bytes of memory"}
    except (Exception, RecursionError) as error:  # a program from elsewhere: it may fail in any way
        return {"problem": str(error) or type(error).__name__}
    return {"text": "".join(parts)}


def variables(chat_template: str) -> list[str]:
    """What a chat template reads and does not set itself."""
    try:
        names = jinja2.meta.find_undeclared_variables(_environment().parse(chat_template))
    except (jinja2.TemplateError, RecursionError):  # it has other tags
        names = set(re.findall(r"[A-Za-z_]\w*", chat_template))
    return sorted(names)


@functools.lru_cache
def _compile(chat_template: str) -> jinja2.Template:
    return _environment().from_string(chat_template)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda layout: datetime.datetime.now().strftime(layout),
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": _Namespace,
    }
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


with suppress(ImportError, ValueError, OSError):
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
