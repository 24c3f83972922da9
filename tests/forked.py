"""Processes that do a piece of work, forked from this one: nothing is imported again."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


class Child:
    """A process that does some work; `told` is a folder for its files `out` and `err`."""

    def __init__(
        self,
        work: Callable[[], object],
        environment: Mapping[str, str] | None = None,
        told: Path | None = None,
    ):
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.environ.update(environment or {})
                if told is not None:
                    _write_to(told)
                work()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def ended(self) -> bool:
        if self.status is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if process else None
        return self.status is not None

    def wait(self, seconds: float = 60) -> int | None:
        """The exit status; it is a failure if it takes longer."""
        limit = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < limit, f"no end within {seconds} s"
            time.sleep(0.005)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)


def _write_to(folder: Path) -> None:
    folder.mkdir()
    for number, name in ((1, "out"), (2, "err")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
