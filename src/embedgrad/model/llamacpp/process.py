"""Start, watch and stop a server as a child process."""

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
from typing import final

from embedgrad.errors import EngineError

LAST_LINES = 8
LONGEST_LINE = 300  # characters of a line that a message shows
READ_BACK = 65536  # bytes at the end of the log that are searched for the last lines
GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises `EngineError` if it is taken."""
    with listen(host, port, "another address with --host and --port") as probe:
        number: int = probe.getsockname()[1]
        return number


def listen(host: str, port: int, cure: str) -> socket.socket:
    """A socket that listens, on any free port for 0. `EngineError` says to choose `cure`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # ignore connections of a server that has ended
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"{host}:{port}: cannot listen there ({reason}); choose {cure} (0: any free port)"
        ) from error


@final
class ServerProcess:
    """A server in a process group of its own; its output goes into `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name = name
        self.log = log
        # Exports are local: looking for updates would only delay the start.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches it only through `stop`
                )
        except OSError as error:
            raise EngineError(f"{name}: cannot be started ({error})") from error
        self.stop = weakref.finalize(self, _end, self._process)  # also when Python exits

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait_until_ready(self, url: str, seconds: float) -> None:
        """Return when `url` answers. Raises `EngineError` if the server ends first or is late."""
        # Without proxies: they are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + seconds
        while True:
            self.check_running()
            with suppress(urllib.error.URLError, OSError), opener.open(url, timeout=5):
                return
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"{self.name}: did not answer at {url} within {seconds:.0f} s{self._output()}"
                )
            time.sleep(0.1)

    def wait(self) -> None:
        """Block until the server ends, then raise `EngineError`."""
        self._process.wait()
        self.check_running()

    def check_running(self, seconds: float = 0.0) -> None:
        """Raise `EngineError` if the server has ended, or ends within `seconds`."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            raise EngineError(f"{self.name}: the server ended with {how}{self._output()}")

    def _output(self) -> str:
        """The server's last lines, to end a message with."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - READ_BACK))
            lines = file.read().decode(errors="replace").splitlines()
        last = [line.rstrip()[:LONGEST_LINE] for line in lines if line.strip()][-LAST_LINES:]
        if not last:
            return "; it printed nothing"
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
    """Signal the whole group, as some servers start processes of their own."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        else:
            process.terminate()
