"""Where a run's events go: events.jsonl, and trackers."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from embedgrad.atomic_files import finite
from embedgrad.data.bounded_reads import LARGEST_FILE, open_to_append, read_bytes
from embedgrad.errors import RunError
from embedgrad.events import Report
from embedgrad.formatting import visible
from embedgrad.report.trackers import TrackerName, track


@final
class EventLog(AbstractContextManager["EventLog"]):
    """Appends events to a file, one JSON object a line with its `time` (ISO 8601, UTC).

    A line that a crash left unfinished is cut off first. Numbers that are not finite, which JSON
    does not know, become null. Raises `RunError` when the file cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if self.path.is_file():
                content = read_bytes(self.path, LARGEST_FILE)
                os.truncate(self.path, content.rfind(b"\n") + 1)
            self._file = open_to_append(self.path)
        except OSError as error:
            raise self._write_error(error) from error

    def __call__(self, event: dict[str, Any]) -> None:
        """Write one event."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps(finite({"time": now, **event}), allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._write_error(error) from error

    def __str__(self) -> str:
        return str(self.path)

    def __exit__(self, *exception: object) -> None:
        """Close the file; every event is in it already."""
        # After a failed write the rest of a line is still waiting, and fails again.
        with suppress(OSError):
            self._file.close()

    def _write_error(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: events cannot be written ({error.strerror or error})")


@contextmanager
def write_events(
    report: Report,
    folder: Path,
    *,
    trackers: Sequence[TrackerName] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Report]:
    """A report that also writes a folder's events.jsonl, and to `trackers`, which show `settings`.

    A file that cannot be written ends no run. Raises `RunError` if it cannot be opened.
    """
    with EventLog(folder / "events.jsonl") as log, track(trackers, folder, settings) as others:
        write = fan_out(log, *others)

        def both(event: dict[str, Any]) -> None:
            write(event)  # first, as `report` may raise
            report(event)

        yield both


def fan_out(*reports: Report) -> Report:
    """One report that passes every event on to all.

    One that raises gets no more events, and stderr a line about it.
    """
    alive = list(reports)

    def report(event: dict[str, Any]) -> None:
        for each in tuple(alive):
            try:
                each(event)
            except Exception as error:
                alive.remove(each)
                name = getattr(each, "__name__", str(each))
                reason = str(error) or type(error).__name__
                # The warning may have to go through what has just failed.
                with suppress(Exception):
                    text = visible(f"warning: {name} gets no more events: {reason}")
                    sys.stderr.write(f"{text}\n")

    return report
