"""`embedgrad map --ray`: a local Ray cluster, of which a worker is killed in the middle."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
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
