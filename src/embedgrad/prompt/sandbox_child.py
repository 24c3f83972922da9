"""The child process's side of the sandbox.

It starts as a file, with the standard library alone. The first line names the function, and where
Python looks for modules; every further line is a call. Each line gets one line back:

    {"path": [...], "function": "package.module:function", "seconds": 120}      {}
    {"arguments": ["reply", "answer"], "seconds": 5, "scores": true}            {"value": 0.5}
                                     {"what": "raised KeyError: 3", "advice": "; it must ..."}
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONGEST = 200  # characters of a text in a message


def main() -> None:
    """Serve until the other side closes its pipe, which its end always does."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=replies.close)  # or it would hide that this one ended
    # What the function reads and prints must not get into the pipes.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    function: Callable[..., object] | None = None
    for line in requests:
        request = json.loads(line)
        # Both timers end the process also where no other thread can run. A user's function may
        # need the quicker one, of which there is only one, itself.
        ours = hasattr(signal, "setitimer") and not request.get("scores", True)
        if ours:
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        else:
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nothing)
        if function is None:
            sys.path[:] = request["path"]
            function, reply = find(request["function"])
        else:
            reply = (score if request["scores"] else tell)(function, *request["arguments"])
        if ours:
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(reply).encode() + b"\n")
    # Whatever the function left running gets a moment to end.
    faulthandler.dump_traceback_later(2, exit=True, file=nothing)


def find(target: str) -> tuple[Callable[..., object] | None, dict[str, Any]]:
    """Import the function that "package.module:function" names; the dict says why it cannot be."""
    place, _, name = target.partition(":")
    try:
        module = importlib.import_module(place)
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{place}.".startswith(f"{missing}."):
            return None, {"what": f"{place!r} cannot be imported: {describe_error(error)}"}
        parent, _, last = missing.rpartition(".")
        folders = getattr(sys.modules[parent], "__path__", []) if parent else sys.path[:1]
        known = [module.name for module in pkgutil.iter_modules(folders)]
        return None, {
            "what": f"there is no module {last!r} for {target!r}",
            "name": last,
            "known": known,
        }
    function = getattr(module, name, None)
    if callable(function):
        return function, {}
    known = [name for name, value in vars(module).items() if name[0] != "_" and callable(value)]
    return None, {
        "what": f"module {place!r} has no function {name!r}",
        "name": name,
        "known": known,
    }


def tell(function: Callable[..., object], *arguments: object) -> dict[str, Any]:
    """Call a function of ours: its JSON value as `value`, or what it did instead."""
    try:
        return {"value": function(*arguments)}
    except Exception as error:
        return {"what": f"raised {describe_error(error)}", "advice": ""}


def score(function: Callable[..., object], reply: str, answer: str) -> dict[str, Any]:
    """Call the function: its number from 0 to 1 as `value`, or what it did instead, and advice."""
    try:
        value = function(reply, answer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit
        return {"what": f"raised {describe_error(error)}", "advice": "; it must score any text"}
    with suppress(Exception):
        number = float("nan") if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
        if 0 <= number <= 1:
            return {"value": number}
    shown = "(cannot be shown)"
    with suppress(Exception):
        shown = repr(value)
    what = _shorten(f"{type(value).__name__} {shown}")
    return {"what": f"returned {what}", "advice": "; expected a number from 0 to 1"}


def describe_error(error: BaseException) -> str:
    """Type, message and place of an exception, in one line."""
    text = ""
    with suppress(Exception):
        text = str(error)
    steps = [s for s in traceback.extract_tb(error.__traceback__) if s.filename != __file__]
    imports = all(step.filename.startswith("<frozen ") for step in steps)
    place = "" if imports else f" ({os.path.basename(steps[-1].filename)}:{steps[-1].lineno})"
    return _shorten(f"{type(error).__name__}: {text}".rstrip(": ")) + place


def _shorten(text: str) -> str:
    """The beginning of a text, in one line that any terminal can show."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 2 * LONGEST])
    return " ".join(plain.split())[:LONGEST]


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the other side has ended and needs nothing any more
        main()
