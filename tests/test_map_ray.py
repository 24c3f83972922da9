"""`embedgrad map --ray`: on a local cluster where Ray is installed, and without it."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from run_kit import Command

pytest_plugins = ["tiny_runs"]


def test_without_ray_one_line_says_how_to_get_it(
    recipe: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    rows = tmp_path / "table.csv"
    rows.write_text("name\na\n")
    done = embedgrad("map", recipe(), "--over", rows, "--out", tmp_path / "out", "--ray", "local")
    assert (done.code, done.lines) == (
        2,
        ["error: --ray: Ray is not installed; pip install 'embedgrad[ray]'"],
    )


DEATH = """The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits. Some common causes include: many."""


class PlayedRay(types.ModuleType):
    """What is used of Ray, in this process; the first actor dies before it begins."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: list[Any] = []
        self.exceptions = types.ModuleType("ray.exceptions")
        known = {"RayError": type("RayError", (Exception,), {})}
        for name in ("GetTimeoutError", "RayActorError", "RayTaskError"):
            known[name] = type(name, (known["RayError"],), {})
        vars(self.exceptions).update(known)

    def init(self, **how: Any) -> None:
        if how["address"] == "nowhere":
            raise ConnectionError("no one there")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2, "GPU": 4}

    def remote(self, cls: type) -> Any:
        def make(**options: Any) -> Any:
            self.asked.append(options)
            do = cls().work if len(self.asked) > 1 else None
            work = types.SimpleNamespace(remote=lambda *given: partial(do, *given) if do else None)
            return types.SimpleNamespace(remote=lambda: types.SimpleNamespace(work=work))

        return types.SimpleNamespace(options=make)

    def get(self, task: Any, timeout: int) -> None:
        if task is None:
            raise vars(self.exceptions)["RayActorError"](DEATH)
        task()

    def shutdown(self) -> None:
        self.asked.append("shutdown")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    ray = PlayedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    return ray


def test_an_actor_that_dies_is_replaced(
    recipe: Callable[..., Path], embedgrad: Command, tmp_path: Path, played: PlayedRay
) -> None:
    rows, out = tmp_path / "table.csv", tmp_path / "out"
    rows.write_text("name\na\nb\n")
    path = recipe(training={"steps": 1})
    done = embedgrad("map", path, "--over", rows, "--out", out, "--ray", "auto")
    assert done.code == 0, done.err
    assert "a worker died (Ray: Worker unexpectedly exits); another one takes its place" in done.err
    assert played.asked == [{"num_cpus": 1, "num_gpus": 1}] * 2 + ["shutdown"]
    assert "2 of 2 prompts finished" in " ".join(done.out.split())


def test_a_cluster_that_does_not_answer_is_one_line(
    recipe: Callable[..., Path], embedgrad: Command, tmp_path: Path, played: PlayedRay
) -> None:
    rows = tmp_path / "table.csv"
    rows.write_text("name\na\n")
    done = embedgrad("map", recipe(), "--over", rows, "--out", tmp_path / "out", "--ray", "nowhere")
    assert done.code == 2
    assert done.lines == [
        "error: --ray nowhere: no cluster answers (ConnectionError: no one there); give its "
        "address, or 'local' to start one on this machine"
    ]


@pytest.mark.slow
def test_actors_do_every_row_though_one_of_them_is_killed(
    recipe: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    init, killed = ray.init, list[int]()
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    monkeypatch.setattr(ray, "init", lambda **given: init(**given, **options))
    path, out = recipe(training={"epochs": 8, "evaluate_every": 5}), tmp_path / "out"
    rows = tmp_path / "table.csv"
    rows.write_text("name,training.seed\n" + "".join(f"row-{i},{i}\n" for i in range(3)))

    def kill() -> None:
        limit = time.monotonic() + 200
        while not list(out.glob("*/checkpoint/step-*")) and time.monotonic() < limit:
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            if not killed and "_Actor.work" in " ".join(process.info["cmdline"] or ()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    done = embedgrad("map", path, "--over", rows, "--out", out, "--ray", "local", "--workers", "2")
    killer.join()
    assert done.code == 0, done.err
    assert len(killed) == 1
    assert "a worker died (Ray: Worker unexpectedly exits" in done.err
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        found: list[Any] = list(csv.DictReader(file))
    assert [row["status"] for row in found] == ["finished"] * 3
    assert not ray.is_initialized()
