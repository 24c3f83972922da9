"""Progress bars in scripts and notebooks: the default `report`."""

from __future__ import annotations

import re
import sys
from html import escape
from typing import Any, TextIO, final

from embedgrad.formatting import encodable, visible
from embedgrad.report.terminal.progress import Progress, dev_score

STEPS = "steps"
DELAY = 1.0  # seconds; what is done sooner shows no bar
WIDTH = 100  # characters of a bar in a notebook
LINES = 12  # of a cell's output; older ones are left out
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@final
class Bars:
    """Shows events as tqdm's bars in a terminal or a notebook, elsewhere as plain lines.

    A bar of steps shows the loss, the dev score and the time left, and stays; others go when they
    are full. In a notebook, bars and lines are one output of the cell, which is renewed.
    """

    def __init__(self) -> None:
        self._bar: Any = None  # tqdm is partly without types
        self._figures: dict[str, str] = {}
        self._lines: Progress | None = None
        self._stream: TextIO | None = None
        self._cell: _Cell | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event."""
        if sys.stderr is None:  # a program without a console
            return
        shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if getattr(shell, "kernel", None) is not None:  # a notebook
            if self._cell is None or self._cell.count != shell.execution_count:
                self._close()
                self._cell = _Cell(shell.execution_count)
        elif not sys.stderr.isatty():
            if self._lines is None or self._stream is not sys.stderr:
                self._stream, self._lines = sys.stderr, Progress(stream=sys.stderr)
            self._lines(event)
            return
        match event["event"]:
            case "note":
                self._print(event["text"])
            case "stage":
                self._close()
                self._figures = {}
                self._print(event["text"])
            case "step":
                self._figures["loss"] = f"{event['loss']:.3f}"
                self._move(_training(event), event["step"], event["total"])
            case "evaluation":
                metric = event["metric"]
                now, best = (dev_score(metric, score) for score in (event, event["best"]))
                self._figures |= {"dev": now, "best": best}
                self._move(_training(event), event["step"], event["total"])
            case "scoring":
                self._move(event["which"], event["done"], event["total"])
            case "download":
                self._move(event["which"], event["done"], event["total"], grows=True)
            case "end":
                self._close()

    def _move(self, name: str, done: int, total: int, *, grows: bool = False) -> None:
        """Move the bar of this name and total; one of bytes grows, as their number is not known."""
        training = name.endswith(STEPS)
        if self._bar is not None and grows and self._bar.name == name:
            self._bar.total = total
        if self._bar is None or (self._bar.name, self._bar.total) != (name, total):
            self._close()
            from tqdm.std import tqdm

            self._bar = tqdm(
                desc=visible(name),
                file=self._cell or sys.stderr,
                ncols=WIDTH if self._cell else None,
                initial=max(done - 1, 0),
                total=total,
                leave=training,
                delay=0 if training else DELAY,
                bar_format=FORMAT,
                unit_scale=grows,
            )
            self._bar.name = name
        self._bar.n = done
        if training:
            figures = (f"{name} {value}" for name, value in self._figures.items())
            self._bar.set_postfix_str(", ".join(figures), refresh=False)
        self._bar.update(0)
        if not training and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        from tqdm.std import tqdm

        stream = self._cell or sys.stderr
        tqdm.write(encodable(visible(text), stream.encoding), file=stream)


@final
class _Cell:
    """The output of one notebook cell as a file: a line that is written again takes its place."""

    encoding = "utf-8"

    def __init__(self, count: int):
        from IPython.display import display

        self.count, self._lines = count, [""]
        self._shown: Any = display(self._data(), raw=True, display_id=True)

    def write(self, text: str) -> None:
        """Add text, and show it."""
        for piece in re.split("([\r\n])", text):
            if piece == "\n":
                self._lines = [*self._lines, ""][-LINES:]
            else:
                self._lines[-1] = "" if piece == "\r" else self._lines[-1] + piece
        self._shown.update(self._data(), raw=True)

    def flush(self) -> None:
        """Nothing: what is written is shown."""

    def _data(self) -> dict[str, str]:
        text = "\n".join(self._lines).rstrip()
        return {
            "text/plain": text,
            "text/html": f'<pre style="margin:0;white-space:pre-wrap">{escape(text)}</pre>',
        }


def _training(event: dict[str, Any]) -> str:
    return f"{event['method']} {STEPS}" if "method" in event else STEPS


show = Bars()
