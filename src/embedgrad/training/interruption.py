"""Hold a signal back until what must not be cut is done: a step, a save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Within it the first signal waits for the end, where it does what it would have done.

    A second one comes through at once. Signals that no Python function handles are left alone.
    """
    came: list[int] = []
    before: dict[int, Callable[..., Any]] = {}

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in SIGNALS:
            if callable(handler := signal.getsignal(number)):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # else somebody inside has decided otherwise
                signal.signal(number, handler)
        if came:
            before[came[0]](came[0], None)
