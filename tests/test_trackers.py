"""Trackers: real libraries get the numbers; one that fails or hangs changes nothing in a run."""

from __future__ import annotations

import importlib.machinery
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from embedgrad import Recipe, RunError, run
from embedgrad.events import quiet
from embedgrad.report import trackers
from embedgrad.report.event_files import write_events
from embedgrad.report.trackers import TrackerName
from run_kit import values

pytest_plugins = ["tiny_runs"]

Fake = Callable[[str, dict[str, Any]], None]
STEPS = [{"event": "step", "step": step, "loss": 1 / step, "reward": None} for step in (1, 2)]
EVENTS = [*STEPS, {"event": "evaluation", "step": 2, "accuracy": 0.75}, {"event": "note"}]
SETTINGS = {"training.seed": 3}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a package with these names in the place of an installed one."""

    def put(name: str, content: dict[str, Any]) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real libraries start processes and databases, which a busy machine may take long for."""
    monkeypatch.setattr(trackers, "PATIENCE", 60)


def follow(name: TrackerName, folder: Path) -> None:
    """A run's events go to a tracker."""
    folder.mkdir()
    with write_events(quiet, folder, trackers=[name], settings=SETTINGS) as report:
        for event in EVENTS:
            report(event)


@pytest.mark.usefixtures("patient")
def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    follow("tensorboard", tmp_path / "run")
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(s.step, s.value) for s in board.Scalars("dev/accuracy")] == [(2, 0.75)]
    assert set(board.Tags()["scalars"]) == {"train/loss", "dev/accuracy"}


@pytest.mark.usefixtures("patient")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    where = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    monkeypatch.chdir(tmp_path)
    follow("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(where)
    (experiment,) = [e for e in client.search_experiments() if e.name == "embedgrad"]
    (done,) = client.search_runs([experiment.experiment_id])
    assert (done.info.run_name, done.info.status) == ("run", "FINISHED")
    assert done.data.params == {"training.seed": "3"}
    losses = client.get_metric_history(done.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(1, 1.0), (2, 0.5)]


@pytest.mark.usefixtures("patient")
def test_wandb_without_a_login_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    follow("wandb", tmp_path / "run")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in kept.read_bytes()


@pytest.mark.usefixtures("patient")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    follow("trackio", tmp_path / "run")
    with sqlite3.connect(tmp_path / "embedgrad.db") as database:
        rows = database.execute("select step, metrics from metrics order by step, id").fetchall()
    kept = [(step, json.loads(metrics)) for step, metrics in rows]
    assert (1, {"train/loss": 1.0}) in kept


def test_wandb_gets_settings_and_numbers(fake: Fake, tmp_path: Path) -> None:
    """As W&B takes them; the library itself need not be installed."""
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((values, step))

        def finish(self) -> None:
            calls.append("finished")

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    fake("wandb", {"init": init, "login": lambda prompt: False})
    follow("wandb", tmp_path / "run")
    options, *rest = calls
    assert (options["name"], options["config"], options["mode"]) == ("run", SETTINGS, "offline")
    assert rest == [
        *(({"train/loss": 1 / step}, step) for step in (1, 2)),
        ({"dev/accuracy": 0.75}, 2),
        "finished",
    ]


@pytest.mark.parametrize("kind", ["raises", "blocks"])
def test_a_tracker_in_trouble_changes_no_row(
    kind: str,
    fake: Fake,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    begun, never = threading.Event(), threading.Event()

    def init(**options: Any) -> object:
        begun.set()
        if kind == "raises":
            raise OSError("no server\nat all")
        never.wait(60)
        return None

    fake("trackio", {"init": init})
    rows = []
    for name, names in (("plain", []), ("tracked", ["trackio"])):
        recipe = Recipe.from_dict(values(model_folder, data, report={"trackers": names}))
        run(recipe, tmp_path / name, quiet)
        rows.append(load_file(tmp_path / name / "prompt" / "prompt.safetensors")["rows"])
    ended = time.monotonic()
    assert begun.is_set()
    assert torch.equal(*rows)
    lines = [line for line in capsys.readouterr().err.splitlines() if "trackio" in line]
    assert lines
    assert ("no server" if kind == "raises" else "did not finish within") in lines[-1]
    never.set()
    assert time.monotonic() - ended < 5


def test_trackers_share_the_time_they_may_take(fake: Fake, tmp_path: Path) -> None:
    never = threading.Event()
    for name in ("trackio", "wandb"):
        fake(name, {"init": lambda **options: never.wait(60), "login": lambda prompt: True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "PATIENCE", 1.0)
        began = time.monotonic()
        with write_events(quiet, tmp_path, trackers=["trackio", "wandb"]):
            pass
    assert time.monotonic() - began < 1.9
    never.set()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with (
        pytest.raises(RunError, match=r"^report.trackers: .*pip install 'embedgrad\[mlflow\]'$"),
        write_events(quiet, tmp_path, trackers=["mlflow"]),
    ):
        pass
