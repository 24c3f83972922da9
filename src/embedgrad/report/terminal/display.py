"""Two status lines at the bottom of a terminal, updated in place."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import duration, encodable, eta, join_nonempty, visible

REFRESHES = 4  # per second
WIDEST_BAR = 40  # columns
OF_TEXT = ", text prompt "  # left out with the score behind it where the line would be too long


@final
@dataclass(frozen=True, slots=True)
class View:
    """What is shown until the next event; times are the clock's."""

    first: str = ""
    second: str = ""
    done: int = 0
    total: int = 0  # 0: no bar
    since: float | None = None  # shows how long it has taken
    until: float | None = None  # shows how long it will take


@final
class Display:
    """Shows `view`, and prints notes above it, until `stop` gives the terminal back.

    One thread does all the writing: Ctrl-C, which only the main thread sees, never cuts a write
    short, and the display moves during a long evaluation.
    """

    def __init__(self, console: Console, clock: Callable[[], float]):
        self.view = View()
        self._console, self._clock = console, clock
        self._notes: SimpleQueue[str | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="progress", daemon=True)
        own = console.file is sys.stderr
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=False,
            transient=True,
            redirect_stderr=own,
            redirect_stdout=own and sys.stdout.isatty(),
        )
        self._thread.start()

    def say(self, text: str) -> None:
        """Print a line above the two."""
        self._notes.put(text)

    def stop(self) -> None:
        """Print what is left to say, take the two lines away and show the cursor again."""
        self._notes.put(None)
        self._thread.join()

    def _run(self) -> None:
        # The terminal may be gone; that is no reason to lose a run.
        with suppress(OSError, ValueError):
            try:
                self._live.start(refresh=True)
                while True:
                    try:
                        note = self._notes.get(timeout=1 / REFRESHES)
                    except Empty:
                        self._live.refresh()
                        continue
                    if note is None:
                        return
                    self._console.print(Text(self._safe(note)))
            finally:
                self._live.stop()

    def _safe(self, text: str) -> str:
        return encodable(visible(text), self._console.encoding)

    def _render(self) -> RenderableType:
        """Two lines, if empty: what other threads print while the height changes is misplaced."""
        view, now, width = self.view, self._clock(), self._console.width
        since = "" if view.since is None else duration(now - view.since)
        first = self._safe(join_nonempty(view.first, since))
        second = join_nonempty(view.second, eta(None if view.until is None else view.until - now))
        if cell_len(second) > width:
            second = re.sub(f"{OF_TEXT}[^,]*", "", second)
        bar_width = max(4, min(WIDEST_BAR, width - cell_len(first) - 1))
        bar = [ProgressBar(view.total, view.done, width=bar_width)] if view.total else []
        grid = Table.grid(padding=(0, 1))
        grid.add_row(*bar, _line(first))
        return Group(grid, _line(second))


def _line(text: str) -> Text:
    # Cut without an ellipsis, which not every encoding has.
    return Text(text, no_wrap=True, overflow="crop")
