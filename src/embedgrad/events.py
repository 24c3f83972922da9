"""Progress events of long-running work, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Report = Callable[[dict[str, Any]], None]
Notify = Callable[[str], None]  # takes one line for a person


def nowhere(event: dict[str, Any]) -> None:
    """Where events go that nobody asked for."""


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
