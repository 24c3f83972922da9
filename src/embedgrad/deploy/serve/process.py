"""A server as a child process: started, waited for, stopped, and what it said last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from embedgrad.errors import EngineError

LAST_LINES = 8
LONGEST_LINE = 300  # characters of a line that goes into a message
READ_BACK = 65536  # bytes at the end of the log in which the last lines are looked for
GRACE = 10.0  # seconds between asking a server to stop and ending it


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises `EngineError` where a server listens already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":  # connections of a server that has ended are no obstacle
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
            found: int = probe.getsockname()[1]
            return found
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"{host}:{port}: cannot be listened on ({reason}); name another address with --host "
            "and --port; --port 0 takes any free port"
        ) from error


class ServerProcess:
    """A server that runs in a process group of its own; what it prints goes into `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name = name
        self.log = log
        # Exports are local: a look for updates would only make the start slower.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches it through `stop` alone
                )
        except OSError as error:
            raise EngineError(f"{name}: cannot be started ({error})") from error
        self._left = weakref.finalize(self, _end, self._process)  # also where Python just ends

    @property
    def pid(self) -> int:
        """Of the child process."""
        return self._process.pid

    def wait_until_ready(self, url: str, seconds: float) -> None:
        """Return when `url` answers. Raises `EngineError` where the server ends before, or late."""
        # Without proxies: they are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + seconds
        while True:
            self._refuse_dead()
            with suppress(urllib.error.URLError, OSError), opener.open(url, timeout=5):
                return
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"{self.name}: did not answer at {url} within {seconds:.0f} s{self._said()}"
                )
            time.sleep(0.1)

    def wait(self) -> None:
        """Return never by itself: raises `EngineError` when the server ends."""
        self._process.wait()
        self._refuse_dead()

    def stop(self) -> None:
        """Ask the server to end, and end it where it does not."""
        self._left()

    def _refuse_dead(self) -> None:
        status = self._process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            raise EngineError(f"{self.name}: the server ended with {how}{self._said()}")

    def _said(self) -> str:
        """What the server printed last, for the end of a message."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - READ_BACK))
            lines = file.read().decode(errors="replace").splitlines()
        last = [line.rstrip()[:LONGEST_LINE] for line in lines if line.strip()][-LAST_LINES:]
        if not last:
            return "; it said nothing"
        return "".join(["; its last lines:", *(f"\n  {line}" for line in last)])


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process, "SIGTERM")
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _signal(process, "SIGKILL")  # also what it left behind
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    """To the whole group, as some servers start processes of their own."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        else:
            process.terminate()
