"""What people say of answers, kept and made into training rows.

RUN/feedback.jsonl        every judgement, one JSON object a line
RUN/feedback_rows.jsonl   the queries whose right answer is known, as `data.train` reads them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from embedgrad.atomic_files import to_json_lines, write_file
from embedgrad.errors import OptionError
from embedgrad.recipe.open_run import OpenRun
from embedgrad.report.event_files import EventLog
from embedgrad.report.page.run_files import json_lines

FILE, ROWS = "feedback.jsonl", "feedback_rows.jsonl"
VERDICTS = ("up", "down")


@final
@dataclass(frozen=True)
class Feedback:
    """A run's feedback; `fixed` are the columns that its recipe's `data.where` asks for."""

    folder: Path
    answer: str
    choices: Sequence[str]
    fixed: Mapping[str, str]

    @classmethod
    def of(cls, run: OpenRun, given: Path) -> Feedback:
        """The feedback in the folder of a run; a prompt of the Hub, as `given`, gets one here."""
        data, folder = run.recipe.data, run.folder if given.exists() else Path(given.name)
        return cls(folder, data.answer, run.prompt.target.choices, data.where)

    def keep(
        self,
        columns: Mapping[str, str],
        place: float,
        answer: str,
        said: Mapping[str, Any],
    ) -> None:
        """Append a judgement: its `verdict`, a `note`, and the `right` answer, which after "up" is
        this one.

        Raises `OptionError` for what is no judgement, and `RunError`.
        """
        verdict = said.get("verdict")
        if verdict not in VERDICTS:
            raise OptionError(f"verdict: {verdict!r}; expected {' or '.join(VERDICTS)}")
        note, right = _text(said, "note"), _text(said, "right")
        if right and self.choices and right not in self.choices:
            raise OptionError(f"right: {right!r}; expected one of {', '.join(self.choices)}")
        right = answer if verdict == "up" else right
        line = {"columns": dict(columns), "place": place, "answer": answer, "verdict": verdict}
        with suppress(OSError):  # which the log tells
            self.folder.mkdir(exist_ok=True)
        with EventLog(self.folder / FILE) as log:
            log({**line, "note": note, "right": right or None})

    def rows(self) -> tuple[int, list[dict[str, str]]]:
        """How many answers are judged, and the rows whose right answer is known, the last said."""
        latest: dict[Any, dict[str, Any]] = {}
        for _, line in json_lines(self.folder / FILE):
            columns = (line or {}).get("columns")
            if line is None or not isinstance(columns, dict):
                continue
            key = tuple(columns.items())
            latest.pop((key, line.get("answer")), None)
            latest[key, line.get("answer")] = line
        rows = {
            key: {**self.fixed, **line["columns"], self.answer: line["right"]}
            for (key, _), line in latest.items()
            if isinstance(line.get("right"), str)
        }
        return len(latest), list(rows.values())

    def count(self) -> dict[str, int]:
        """How many answers are judged, and how many rows that makes."""
        judged, rows = self.rows()
        return {"judged": judged, "rows": len(rows)}

    def write_rows(self) -> dict[str, Any]:
        """Write the rows anew. Raises `OptionError` if there are none, and `RunError`."""
        _, rows = self.rows()
        if not rows:
            raise OptionError("no right answer is known yet; judge one, or say what is right")
        path = self.folder / ROWS
        write_file(path, to_json_lines(rows))
        return {"file": str(path), "rows": len(rows)}


def _text(said: Mapping[str, Any], name: str) -> str:
    """A text that may be missing. Raises `OptionError`."""
    value = said.get(name) or ""
    try:
        return str.strip(value) if value.encode() else ""
    except (AttributeError, TypeError, UnicodeEncodeError):
        raise OptionError(f"{name}: {value!r}; expected a text") from None
