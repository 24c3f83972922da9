"""Workers of `embedgrad map`: processes of this machine, or Ray actors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

EMBEDGRAD = (sys.executable, "-m", "embedgrad")
DIED = "its process died ({})"  # with the worker's name


def this_process() -> str:
    """The name of this process among all machines."""
    return f"{socket.gethostname()} {os.getpid()}"


class Worker(ABC):
    """A process elsewhere that works until no row is left; `name` is what it signs rows with."""

    name: str

    @abstractmethod
    def ended(self) -> str | None:
        """None while it works, then why it died, say "was killed by signal 9", or else ""."""

    @abstractmethod
    def stop(self) -> None:
        """End it; what it was at is continued by the next call."""


@final
class LocalWorker(Worker):
    """A process of this package with arguments of its command line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen([*EMBEDGRAD, *arguments], stdout=subprocess.DEVNULL)
        self.name = f"{socket.gethostname()} {self._process.pid}"

    def ended(self) -> str | None:
        status = self._process.poll()
        if not status:
            return None if status is None else ""
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def stop(self) -> None:
        self._process.terminate()
