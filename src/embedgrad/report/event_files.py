"""Files that a run's events are written to: events.jsonl and TensorBoard."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, final

from embedgrad.atomic_files import finite
from embedgrad.errors import RunError
from embedgrad.events import Report
from embedgrad.formatting import visible

# The numbers of each kind of event, and the group that TensorBoard shows them in.
SCALARS = {
    "step": (
        "train",
        (
            *("loss", "gradient_norm", "learning_rate", "drift_mean", "drift_max", "cosine_min"),
            *("reward", "groups_alive", "answers_cut", "answer_tokens", "answers_per_second"),
            *("mismatch", "mismatch_ratio", "mismatch_cut"),
        ),
    ),
    "evaluation": ("dev", ("accuracy", "macro_f1", "log_loss", "answer_loss", "regret")),
}


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
                content = self.path.read_bytes()
                os.truncate(self.path, content.rfind(b"\n") + 1)
            self._file = open(self.path, "ab")  # noqa: SIM115, closed by __exit__
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


@final
class TensorBoard(AbstractContextManager["TensorBoard"]):
    """Writes losses, scores and drift for TensorBoard (extra: tensorboard). Raises `RunError`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(
                "report.tensorboard: the package tensorboard is missing; "
                "pip install 'embedgrad[tensorboard]'"
            ) from error
        try:
            self._writer = SummaryWriter(str(self.folder), flush_secs=10)
        except OSError as error:
            why = error.strerror or error
            raise RunError(f"{self.folder}: cannot be written ({why})") from error

    def __call__(self, event: dict[str, Any]) -> None:
        """Write the numbers of a step or an evaluation."""
        group, names = SCALARS.get(event["event"], ("", ()))
        for name in names:
            if event.get(name) is not None:
                self._writer.add_scalar(f"{group}/{name}", event[name], event["step"])

    def __str__(self) -> str:
        return f"TensorBoard in {self.folder}"

    def __exit__(self, *exception: object) -> None:
        """Write what is waiting."""
        # Its thread's failure comes out here again; it must not end the run.
        with suppress(Exception):
            self._writer.close()


@contextmanager
def write_events(report: Report, folder: Path, *, tensorboard: bool = False) -> Iterator[Report]:
    """A report that also writes a folder's events.jsonl, and its TensorBoard files if asked to.

    A file that cannot be written ends no run. Raises `RunError` if it cannot be opened.
    """
    with ExitStack() as stack:
        files: list[Report] = [stack.enter_context(EventLog(folder / "events.jsonl"))]
        if tensorboard:
            files.append(stack.enter_context(TensorBoard(folder / "tensorboard")))
        write = fan_out(*files)

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
