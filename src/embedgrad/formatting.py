"""Format numbers, and make untrusted text safe for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

# The marks by which tokenizers write a blank and a line end in a token, as signs that people know.
BLANKS = str.maketrans("\u0120\u2581\u010a", "\u00b7\u00b7\u21b5")
# What we write ourselves beyond ASCII, for encodings that lack it; each one column wide.
_PLAIN = {"\u2026": "~", "\u00b7": "_"}  # an ellipsis, the dot that marks a space


def visible(text: str) -> str:
    r"""Text that cannot drive a terminal: what does not print becomes an escape such as \x1b.

    That is control characters, escape sequences, line ends, marks that turn the reading direction
    and halves of surrogate pairs.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """Foreign text, such as another program's error, on one printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def wrap(text: str, stream: TextIO) -> str:
    """The text for a terminal, broken between words; for a file its lines stay whole."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if len(line) > width:
            indent = line[: len(line) - len(line.lstrip())]
            lines[i] = "\n".join(break_line(line, width, indent))
    return "\n".join(lines)


def break_line(line: str, width: int, indent: str = "") -> list[str]:
    """A line broken between words; a path or command longer than `width` stays whole."""
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def encodable(text: str, encoding: str | None) -> str:
    """Text that an output's encoding can hold, of the same width in columns.

    An output without an encoding, as a notebook's or a `StringIO`, holds all text.
    """
    try:
        text.encode(encoding or "utf-8", "strict" if encoding else "surrogatepass")
        return text
    except UnicodeEncodeError:
        if len(text) == 1:
            return _PLAIN.get(text, "?" * cell_len(text))
        return "".join(encodable(c, encoding) for c in text)


def pluralize(count: int, noun: str) -> str:
    """A count with its noun: 1 row, 2 rows."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share of one: 81.3 %."""
    return f"{100 * share:.1f} %"


def with_interval(share: float, interval: Sequence[float] | None, digits: int = 1) -> str:
    """A share with its interval: 81.3 % (76.0 to 85.6), as far as that is known."""
    if not interval:  # results of before have none
        return percent(share)
    low, high = (f"{100 * edge:.{digits}f}" for edge in interval)
    return f"{percent(share)} ({low} to {high})"


def duration(seconds: float) -> str:
    """45 s, 4.5 min, 62 min or 3.2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in powers of 1000: 512 B, 88 MB, 1.9 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def operations(count: float) -> str:
    """Floating-point operations in powers of 1000: 3.2 GFLOP, 41 TFLOP."""
    return scale(count, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def scale(count: float, units: Sequence[str]) -> str:
    """A count in three digits with the unit of its power of 1000, the last for all above."""
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}{units[-1]}"


def eta(seconds: float | None) -> str:
    """52 s left; nothing where that is unknown or over."""
    return f"{duration(seconds)} left" if seconds is not None and seconds > 0 else ""


def join_nonempty(*parts: str) -> str:
    """The parts that are not empty, with commas between."""
    return ", ".join(part for part in parts if part)
