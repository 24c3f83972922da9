"""Collect all data problems instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from embedgrad.errors import DataError

SHOWN = 5  # problems of one kind; further ones are counted


@final
class Problems:
    """What would keep a run from starting, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, lines: Sequence[str]) -> None:
        """Take the first few lines, and how many more there are."""
        new = [line for line in dict.fromkeys(lines) if line not in self.lines]
        self.lines += new[:SHOWN]
        if len(new) > SHOWN:
            self.lines.append(f"... and {len(new) - SHOWN} more problems like the last one")

    def each(self, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """What `action` returns for every item; those that it refuses are problems."""
        results, lines = [], []
        for item in items:
            try:
                results.append(action(item))
            except DataError as error:
                lines.append(str(error))
        self.add(lines)
        return results
