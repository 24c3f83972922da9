"""A small terminal: what a program's bytes leave on the screen, and how tall it ever got."""

from __future__ import annotations

import re

CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Screen:
    """Understands what the progress display uses; anything else is an error."""

    def __init__(self, columns: int):
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self.cursor_shown = True
        self.seen: list[list[str]] = []  # screens, one after every control sequence

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            match = CONTROL.match(text, place)
            if match:
                self._control(*match.groups())
                self.seen.append(self.shown())
                place = match.end()
            else:
                self._put(text[place])
                place += 1

    def shown(self) -> list[str]:
        """Lines that are not empty."""
        return [line.rstrip() for line in self.lines if line.strip()]

    def _control(self, numbers: str, name: str) -> None:
        match numbers, name:
            case ("?25", "l"):
                self.cursor_shown = False
            case ("?25", "h"):
                self.cursor_shown = True
            case (_, "m"):  # colors
                pass
            case (_, "A"):
                self.row = max(0, self.row - int(numbers or 1))
            case ("2", "K"):
                self.lines[self.row] = ""
            case _:
                raise AssertionError(f"unknown control sequence {numbers}{name}")

    def _put(self, character: str) -> None:
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        else:
            assert character.isprintable(), f"control character {character!r}"
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")
