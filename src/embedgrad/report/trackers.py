"""Experiment trackers that follow a run: TensorBoard, W&B, MLflow, trackio.

Each is a thin sink for the numbers of a run's steps and evaluations. It works in a thread of its
own, so that one that blocks or fails changes nothing in the run.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Literal, final

from embedgrad.errors import RunError
from embedgrad.events import Report
from embedgrad.formatting import visible

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "embedgrad"
PATIENCE = 5.0  # seconds that trackers may delay the end of a run, all of them together

# The numbers of each kind of event, and the group that a tracker shows them in.
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

Log = Callable[[dict[str, float], int], object]
Close = Callable[[], object]
Opened = tuple[Log, Close]


@final
class Tracker:
    """Passes the numbers of events on to a tracker, in a thread of its own.

    `__call__` raises what the tracker raised at earlier events. Raises `RunError` where its package
    is not installed.
    """

    def __init__(self, name: TrackerName, folder: Path, settings: Mapping[str, Any]):
        self.name = name
        if find_spec(name) is None:
            raise RunError(
                f"report.trackers: the package {name} is missing; pip install 'embedgrad[{name}]'"
            )
        self._waiting: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        work = (OPEN[name], folder, settings)
        self._thread = Thread(target=self._work, args=work, daemon=True, name=name)
        self._thread.start()

    def __call__(self, event: dict[str, Any]) -> None:
        """Pass on the numbers of a step or an evaluation."""
        if self._failure is not None:
            raise self._failure
        group, names = SCALARS.get(event["event"], ("", ()))
        values = {f"{group}/{n}": float(event[n]) for n in names if event.get(n) is not None}
        if values:
            self._waiting.put((values, event["step"]))

    def __str__(self) -> str:
        return self.name

    def close(self, until: float) -> None:
        """Have it finish, waiting until this time of `time.monotonic` at the longest."""
        self._waiting.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        why = f"did not finish within {PATIENCE:.0f} s" if self._thread.is_alive() else ""
        if self._failure is not None:
            why = str(self._failure) or type(self._failure).__name__
        if why:
            with suppress(Exception):
                sys.stderr.write(visible(f"warning: report.trackers: {self.name}: {why}") + "\n")

    def _work(
        self,
        open_tracker: Callable[[Path, Mapping[str, Any]], Opened],
        folder: Path,
        settings: Mapping[str, Any],
    ) -> None:
        try:
            log, close = open_tracker(folder, settings)
            while (waiting := self._waiting.get()) is not None:
                log(*waiting)
            close()
        except Exception as error:
            self._failure = error


@contextmanager
def track(
    names: Sequence[TrackerName], folder: Path, settings: Mapping[str, Any]
) -> Iterator[list[Report]]:
    """A report for each named tracker of the run in `folder`; `settings` are shown with it."""
    trackers: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            trackers.append(Tracker(name, folder, settings))
        yield list(trackers)
    finally:
        until = time.monotonic() + PATIENCE
        for tracker in trackers:
            tracker.close(until)


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> Opened:
    import wandb

    # Without a login it would ask for one at the terminal.
    mode = None if wandb.login(prompt=False) else "offline"
    run = wandb.init(
        project=PROJECT, name=folder.name, dir=folder, config=dict(settings), mode=mode
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _mlflow(folder: Path, settings: Mapping[str, Any]) -> Opened:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(PROJECT).experiment_id
    run = client.create_run(experiment, run_name=folder.name).info.run_id
    for name, value in settings.items():
        client.log_param(run, name, value)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    return log, lambda: client.set_terminated(run)


def _trackio(folder: Path, settings: Mapping[str, Any]) -> Opened:
    import trackio

    run = trackio.init(project=PROJECT, name=folder.name, config=dict(settings))
    return lambda values, step: run.log(values, step=step), run.finish


OPEN: dict[TrackerName, Callable[[Path, Mapping[str, Any]], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
