"""Progress events of long-running work, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Report = Callable[[dict[str, Any]], None]


def quiet(event: dict[str, Any]) -> None:
    """A `report` that shows nothing."""


def stage(report: Report, text: str) -> None:
    """Tell what begins now."""
    report({"event": "stage", "text": text})


def say(report: Report, notes: Iterable[str]) -> None:
    """Tell what the user should know, a sentence each."""
    for note in notes:
        report({"event": "note", "text": note})


def scoring(which: str, done: int, total: int) -> dict[str, Any]:
    """An event that says how far scoring is."""
    return {"event": "scoring", "which": which, "done": done, "total": total}


def part_of(report: Report, which: str, before: int, total: int) -> Report:
    """A report for a part of some scoring: `before` of `total` are done when it begins."""

    def shift(event: dict[str, Any]) -> None:
        if event["event"] == "scoring":
            event = scoring(which, before + event["done"], total)
        report(event)

    return shift
