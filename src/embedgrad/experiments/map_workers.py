"""Workers of `embedgrad map`: what all have, and local processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

from embedgrad.environment import process_name

DIED = "its process died ({})"  # with the worker's name
PRELOADED = ["embedgrad.experiments.map"]


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
    """A process that calls a function. All are forked from one that has imported everything.

    `beside` are the processes that share this machine's cores with it, itself included.
    """

    def __init__(self, do: Callable[..., object], *arguments: object, beside: int = 1) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_call, args=(do, beside, *arguments))
        self._process.start()
        self.name = process_name(self._process.pid)

    def ended(self) -> str | None:
        status = self._process.exitcode
        if not status:
            return None if status is None else ""
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def stop(self) -> None:
        self._process.terminate()


def _call(do: Callable[..., object], beside: int, *arguments: object) -> None:
    from embedgrad.model.loading.device import use_real_cores  # imports torch

    use_real_cores(beside)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the command's own is for its result
    try:
        do(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
