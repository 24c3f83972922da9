"""What runs inside a scorer's process: one function, on request.

Started as a file, with the standard library alone. The first line says which function, and where
Python looks for modules; every further line is a call. Each line gets one line back:

    {"path": [...], "target": "package.module:function", "seconds": 60}     {"value": 1.0}
    {"arguments": ["the reply", "the answer"], "seconds": 5}                {"value": 0.5}
                                                    {"failed": "raised", "text": "KeyError: 3"}
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

GRACE = 2.0  # seconds; the process that started this one stops it earlier
LONGEST = 200  # characters of a text that goes into a message


def main() -> None:
    """Serve until the other side closes its end, as it does when it ends in whatever way."""
    requests, replies = _own_channel()
    # A call that hangs would outlive a parent that was killed: this timer needs no Python to run.
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def end_within(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=nowhere)

    function: Callable[..., object] | None = None
    for line in requests:
        request = json.loads(line)
        end_within(request["seconds"])
        if function is None:
            sys.path[:] = request["path"]
            function, reply = find(request["target"])
        else:
            reply = score(function, request["arguments"])
        faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(reply).encode() + b"\n")
    end_within(0)  # whatever the function left running


def _own_channel() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the other side, out of reach of a function that prints, reads or forks."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def find(target: str) -> tuple[Callable[..., object] | None, dict[str, Any]]:
    """The function that "package.module:function" names, and what to say about it."""
    place, _, name = target.partition(":")
    try:
        module = importlib.import_module(place)
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{place}.".startswith(f"{missing}."):
            return None, {"failed": "import", "text": described(error)}
        parent, _, last = missing.rpartition(".")
        folders = getattr(sys.modules[parent], "__path__", []) if parent else sys.path[:1]
        known = sorted(found.name for found in pkgutil.iter_modules(folders))
        return None, {"failed": "module", "text": last, "known": known}
    function = getattr(module, name, None)
    if callable(function):
        return function, {"value": 1.0}
    own = [name for name, value in vars(module).items() if _is_own(value, module.__name__)]
    return None, {"failed": "function", "text": name, "known": own}


def _is_own(value: object, module: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module


def score(function: Callable[..., object], arguments: list[str]) -> dict[str, Any]:
    """The function's value as a number from 0 to 1, or why there is none."""
    try:
        value = function(*arguments)
    except BaseException as error:  # also SystemExit
        return {"failed": "raised", "text": described(error)}
    with suppress(Exception):
        number = float("nan") if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
        if 0 <= number <= 1:
            return {"value": number}
    shown = "what cannot be shown"
    with suppress(Exception):
        shown = repr(value)
    return {"failed": "returned", "text": short(f"{type(value).__name__} {shown}")}


def described(error: BaseException) -> str:
    """Type, message and place of an exception, in one line."""
    text = ""
    with suppress(Exception):
        text = str(error)
    steps = [s for s in traceback.extract_tb(error.__traceback__) if s.filename != __file__]
    imports = all(step.filename.startswith("<frozen ") for step in steps)
    place = "" if imports else f" ({os.path.basename(steps[-1].filename)}:{steps[-1].lineno})"
    return short(f"{type(error).__name__}: {text}".rstrip(": ")) + place


def short(text: str) -> str:
    """The beginning of a text, in one line that any terminal can show."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 2 * LONGEST])
    return " ".join(plain.split())[:LONGEST]


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the other side has ended; it needs nothing any more
        main()
