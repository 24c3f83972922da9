"""A function in a process of its own, where it can be stopped.

Python cannot stop a thread, and a signal interrupts the main thread alone, while it runs Python; a
process can always be ended, from any thread. One per function is started at its first call and
serves all later ones. It ends with this process, and when it had to be stopped, the next call
starts another. `served.py` is what runs in it, and describes the lines that go back and forth.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

START_SECONDS = 120.0  # for imports, which are no part of a call
_SERVED = Path(__file__).with_name("sandbox_child.py")
_CLOSING_SECONDS = 2.0

Kind = Literal["module", "function", "import", "raised", "returned", "hung", "ended"]


class WorkerError(Exception):
    """Why a call gave no score.

    `kind` says what went wrong: there is no such module or function (`known` are others there), its
    import or the function itself raised, it returned no number from 0 to 1, it took too long, or
    its process ended. `text` describes it in one line.
    """

    def __init__(self, kind: Kind, text: str, known: Sequence[str] = ()):
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text
        self.known = tuple(known)


def call(target: str, *arguments: str, seconds: float) -> float:
    """What the function "package.module:function" returns for some texts, a number from 0 to 1.

    Modules are looked for in the current folder, then where this process finds its own. Calls from
    several threads wait for each other. Raises `WorkerError`, after `seconds` at the latest, to
    which the first call adds the time of an import.
    """
    folder = _current_folder()
    with _lock:
        worker = _workers.setdefault((target, folder), Worker(target, folder))
    return worker.call(arguments, seconds)


def end_workers() -> None:
    """End every process that `call` has started, at work or not."""
    with _lock:
        workers = list(_workers.values())
        _workers.clear()
    for worker in workers:
        worker.end()


class Worker:
    """One function's process, started when it is needed."""

    def __init__(self, target: str, folder: str):
        self._target, self._folder = target, folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, arguments: Sequence[str], seconds: float) -> float:
        """See the function of that name."""
        request = {"arguments": arguments, "seconds": seconds}
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                try:
                    return self._ask(request, seconds)
                except WorkerError as error:
                    if error.kind != "ended":
                        raise
            # There is none, or somebody has ended it, perhaps before this call.
            self._start()
            return self._ask(request, seconds)

    def end(self) -> None:
        """End the process; a call that runs in another thread fails."""
        if self._lock.locked() and self._process is not None:
            _kill(self._process)
        with self._lock:
            self._close()

    def forget(self) -> None:
        """Let go of a process that belongs to the process this one was forked from."""
        if self._process is not None:
            _close_pipes(self._process)
            self._process.returncode = 0  # not ours to wait for

    def _start(self) -> None:
        self._close()
        path = [self._folder, *(entry for entry in sys.path if entry and isinstance(entry, str))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SERVED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # nothing that a fork could copy
            # The order of sets changes what sympy finds; a score should not change by chance.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            **_apart(),
        )
        try:
            self._ask(
                {"path": path, "target": self._target, "seconds": START_SECONDS}, START_SECONDS
            )
        except WorkerError as error:
            self._close()
            if error.kind in ("hung", "ended"):
                raise WorkerError("import", f"its process {error.text}") from None
            raise

    def _ask(self, request: Mapping[str, Any], seconds: float) -> float:
        process = self._process
        assert process is not None
        timer = threading.Timer(seconds, _kill, [process])
        timer.daemon = True
        started = time.monotonic()
        timer.start()
        try:
            line = _exchange(process, request)
        except BaseException:
            _kill(process)  # Ctrl-C; or the next call would read this one's reply
            self._close()
            raise
        finally:
            timer.cancel()
            timer.join()
        late = time.monotonic() - started >= seconds
        if late or not line.endswith(b"\n"):
            self._close()  # it has ended, or may have been told to
        if not line.endswith(b"\n"):
            if late:
                raise WorkerError("hung", f"took longer than {seconds:g} s")
            raise WorkerError("ended", f"ended with exit status {process.returncode}")
        reply = json.loads(line)
        if "value" in reply:
            return float(reply["value"])
        raise WorkerError(reply["failed"], reply["text"], reply.get("known", ()))

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _close_pipes(process)
        try:
            process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()


def _exchange(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> bytes:
    """The line that comes back; not a whole one if the process ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    rest = memoryview(json.dumps(request).encode() + b"\n")
    with suppress(OSError):  # the reply will be missing too
        while rest:
            rest = rest[process.stdin.write(rest) :]
    return process.stdout.readline()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process now, with those that it started itself."""
    if process.poll() is None:
        if sys.platform == "win32":
            process.kill()
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _apart() -> dict[str, Any]:
    """Options that keep a Ctrl-C in the terminal away from a new process."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # somebody has deleted it
        return ""


def _forget_workers() -> None:
    global _lock
    for worker in _workers.values():
        worker.forget()
    _workers.clear()
    _lock = threading.Lock()  # another thread may have held it


_workers: dict[tuple[str, str], Worker] = {}
_lock = threading.Lock()
atexit.register(end_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
