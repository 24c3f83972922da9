"""Run a function in a child process that can be stopped.

Python cannot stop a thread, but a process can always be ended. Each function has one process, which
starts with the first call and serves all later ones. When a call takes too long it ends itself, by
a timer that needs no interpreter; the next call starts another. `sandbox_child.py` runs in it.

Process pools cannot do this. `ProcessPoolExecutor` and pebble run the user's script again in every
new process, as multiprocessing does, so a script without `if __name__ == "__main__"` fails.
`ProcessPoolExecutor` and loky have no time limit per call, wait for a call that hangs when the
program ends, and leave their processes behind when it is killed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from embedgrad.errors import nearest

START_SECONDS = 120.0  # for imports, which are no part of a call
CLOSING_SECONDS = 2.0
_CHILD = Path(__file__).with_name("sandbox_child.py")


@final
class SandboxError(Exception):
    """Why a call gave no score: what the function did, and what to do about it.

    `at_start` says that there is no function to call; then `what` is a message of its own.
    """

    def __init__(self, what: str, advice: str = "", *, at_start: bool = False):
        super().__init__(what, advice)
        self.what = what
        self.advice = advice
        self.at_start = at_start


def score(function: str, reply: str, answer: str, *, seconds: float, folder: str = "") -> float:
    """Score a reply by "package.module:function", which must return a number from 0 to 1.

    Raises `SandboxError`, as `call` does.
    """
    return float(call(function, reply, answer, seconds=seconds, folder=folder, scores=True))


def call(
    function: str, *arguments: Any, seconds: float, folder: str = "", scores: bool = False
) -> Any:
    """Call "package.module:function" with JSON values; it returns one, or a score if it `scores`.

    The child looks for modules in `folder` first, then, for what `scores`, in the current folder,
    which may be a stranger's, then where this process finds its own.
    Calls from several threads take turns. Raises `SandboxError`, after `seconds` at the latest, to
    which the first call adds the time of an import.
    """
    key = function, os.path.abspath(folder) if folder else "", _current_folder() if scores else ""
    request = {"arguments": arguments, "seconds": seconds, "scores": scores}
    with _lock:
        process = _processes.get(key)
        alive = process is not None and process.returncode is None
        result = _ask(process, request) if process and alive else None
        # It may have ended since its last call; but where `end_workers` ended it, that is that.
        if result is None and _processes.get(key) is process:
            process = _processes[key] = _start(*key)
            result = _ask(process, request)
        if result is None:
            assert process is not None
            raise SandboxError(f"ended its process with exit status {process.returncode}")
    if "value" not in result:
        raise SandboxError(result["what"], result["advice"])
    return result["value"]


def end_workers() -> None:
    """End every child process; a call that runs in another thread fails."""
    while _processes:
        _, process = _processes.popitem()
        if _lock.locked():
            _kill(process)
        with _lock:
            _end(process)


def _start(function: str, *folders: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # a fork would copy what is in a buffer
        # The order of sets changes what sympy finds; a score must not change by chance.
        env={**os.environ, "PYTHONHASHSEED": "0"},
        # Keeps a Ctrl-C in the terminal away from it.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    path = [
        *filter(None, folders),
        *(entry for entry in sys.path if entry and isinstance(entry, str)),
    ]
    request = {"path": path, "function": function, "seconds": START_SECONDS}
    failed = f"{function.partition(':')[0]!r} cannot be imported: its process"
    try:
        problem = _ask(process, request)
    except SandboxError as error:
        raise SandboxError(f"{failed} {error.what}", at_start=True) from None
    if problem is None:
        raise SandboxError(f"{failed} ended with exit status {process.returncode}", at_start=True)
    if problem:
        _end(process)
        known = f"; {nearest(problem['name'], problem['known'])}" if "known" in problem else ""
        raise SandboxError(problem["what"] + known, at_start=True)
    return process


def _ask(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Send a request and return the reply; None if the process ended before its time was over."""
    assert process.stdin is not None
    assert process.stdout is not None
    line, started = b"", time.monotonic()
    try:
        rest = memoryview(json.dumps(request).encode() + b"\n")
        with suppress(OSError):  # it has ended; then there is no reply either
            while rest:
                rest = rest[process.stdin.write(rest) :]
        while not line.endswith(b"\n") and (read := process.stdout.read(2**20)):
            line += read  # one reply a request
    finally:
        if not line.endswith(b"\n"):  # also after Ctrl-C: the next call must not read this reply
            _kill(process)
            _end(process)
    if line.endswith(b"\n"):
        reply: dict[str, Any] = json.loads(line)
        return reply
    if time.monotonic() - started < request["seconds"]:
        return None
    raise SandboxError(
        f"took longer than {request['seconds']:g} s",
        " and was stopped; repair it, or raise evaluation.scorer.timeout",
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process now, with those that it has started itself."""
    if process.returncode is None:
        if sys.platform == "win32":
            process.kill()
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close a process's pipes, upon which it ends."""
    _close_pipes(process)
    try:
        process.wait(CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)
        process.wait()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # somebody has deleted it
        return ""


def _forget_workers() -> None:
    """After a fork: let go of the processes of the process that this one was forked from."""
    global _lock
    for process in _processes.values():
        _close_pipes(process)
        process.returncode = 0  # not ours to wait for
    _processes.clear()
    _lock = threading.Lock()  # another thread may have held it


_processes: dict[tuple[str, str, str], subprocess.Popen[bytes]] = {}
_lock = threading.Lock()
atexit.register(end_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
