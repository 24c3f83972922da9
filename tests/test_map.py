"""`embedgrad map`: a prompt for every row of a table, whatever fails or dies meanwhile."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import export_kit
from embedgrad import load
from embedgrad.atomic_files import write_file, write_json
from embedgrad.environment import process_name
from embedgrad.errors import EngineError
from embedgrad.experiments import map as mapping
from embedgrad.experiments import map_workers
from embedgrad.recipe import build
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.page.run_files import RESULT_VERSION
from run_kit import Command, Done

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
TABLE = """name,optimizer.learning_rate,template.user
plain,0.05,
other,,{review} [[Is it good?]]
"""


class Forked(map_workers.Worker):
    """A worker that needs no start of Python."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=do)
        self.process.start()
        self.name = process_name(self.process.pid)

    def ended(self) -> str | None:
        if self.process.is_alive():
            return None
        code = self.process.exitcode
        return f"was killed by signal {-code}" if code else ""

    def stop(self) -> None:
        self.process.terminate()


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str = TABLE) -> Path:
        path = tmp_path / "table.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def results(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_every_row_has_a_prompt_and_nothing_is_done_twice(
    recipe: Write,
    table: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads, open_model = [], build.open_model

    def counted(*arguments: Any) -> Any:
        loads.append(arguments)
        return open_model(*arguments)

    monkeypatch.setattr(build, "open_model", counted)
    path, out = recipe(training={"steps": 2}), tmp_path / "out"
    command = ("map", path, "--over", table(), "--out", out, "--workers", "0", "--quiet")
    done = embedgrad(*command)
    assert done.code == 0, done.err
    assert "2 of 2 prompts finished, 0 failed" in " ".join(done.out.split())
    assert len(loads) == 1
    assert load(out / "other").spans[0].text == "Is it good?"
    assert Recipe.read_run(out / "plain").parts.optimizer.learning_rate == 0.05
    assert Recipe.read_run(out / "other").parts.optimizer.learning_rate == 0.03
    found = results(out)
    assert {row["status"] for row in found.values()} == {"finished"}
    assert found["plain"]["verdict"] in ("no reliable gain", "improved", "worse")

    monkeypatch.setattr(mapping, "run", lambda *a, **o: pytest.fail("done twice"))
    again = embedgrad(*command, "--json").json
    assert (again["finished"], again["failed"]) == (2, 0)


def test_one_export_serves_every_row(
    recipe: Write, table: Callable[..., Path], embedgrad: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = {"name": str(export_kit.save_base(tmp_path / "model"))}
    path = recipe(model=model, training={"steps": 1}, optimizer={"learning_rate": 0.2})
    mapped = embedgrad("map", path, "--over", table(), "--out", out, "--workers", "0", "--quiet")
    assert mapped.code == 0, mapped.err
    call = ("export", out, "--to", "vocabulary", "--check-rows", "4", "--quiet", "--out")
    done = embedgrad(*call, tmp_path / "one", "--json")
    assert done.code == 0, done.err
    assert done.json["verify"]["passed"] is True
    served = done.json["prompts"]
    assert list(served) == ["plain", "other"]
    assert served["plain"]["artifact"] != served["other"]["artifact"]
    # One that is missing would be answered by another one.
    csv_file = out / "results.csv"
    csv_file.write_text(csv_file.read_text().replace("other,finished", "other,failed"))
    refused = embedgrad(*call, tmp_path / "two")
    assert refused.code == 2
    assert "1 of 2 prompts are not finished, other for one" in refused.lines[0]


def test_a_row_that_fails_is_retried_and_leaves_the_others_alone(
    recipe: Write,
    table: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, run = list[str](), mapping.run

    def noted(recipe: Recipe, out: Path, *arguments: Any, **options: Any) -> Any:
        tried.append(out.name)
        return run(recipe, out, *arguments, **options)

    monkeypatch.setattr(mapping, "run", noted)
    rows = table("name,data.where.label\nbad,neither\ngood,\n")
    command = ("map", recipe(training={"steps": 1}), "--over", rows, "--out", tmp_path / "out")
    done = embedgrad(*command, "--workers", "0", "--retries", "2", "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert "1 of 2 prompts failed" in line
    assert tried == ["bad", "bad", "bad", "good"]
    found = results(tmp_path / "out")
    assert (found["bad"]["status"], found["good"]["status"]) == ("failed", "finished")
    assert "neither" in found["bad"]["error"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("name\n../a\n", "'../a'; expected a name of its own"),
        ("name\na\na\n", "'a'; expected a name of its own"),
        ("name\nstate\n", "'state'; expected a name of its own"),
        ("name\nresults.csv\n", "'results.csv'; expected a name of its own"),
        (f"name\n{'a' * 300}\n", "expected a name of its own"),
        ("training.size\n3\n", "table.csv:2: training.size: unknown option"),
        ("training.steps\nmany\n", "table.csv:2: training.steps"),
    ],
)
def test_a_table_that_makes_no_recipes_is_refused(
    rows: str,
    says: str,
    recipe: Write,
    table: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
) -> None:
    done = embedgrad("map", recipe(), "--over", table(rows), "--out", tmp_path / "out")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "out").exists()


def test_a_row_that_was_changed_is_not_taken_for_finished(
    recipe: Write, table: Callable[..., Path], embedgrad: Command, tmp_path: Path
) -> None:
    def mapped(rows: str) -> Done:
        command = ("--over", table(rows), "--out", tmp_path / "out", "--workers", "0", "--quiet")
        return embedgrad("map", recipe(training={}), *command)

    assert mapped("name,training.epochs\na,1\n").code == 0
    other = mapped("name,training.epochs,training.seed\na,1,7\n")
    assert (other.code, len(other.lines)) == (2, 1)
    assert "a: training.seed" in other.err
    assert "a resumed run keeps its recipe" in other.err
    # A longer training goes on where it was.
    assert mapped("name,training.epochs\na,2\n").code == 0
    result = json.loads((tmp_path / "out" / "a" / "result.json").read_text())
    assert result["train"]["steps"] == 6


def test_a_second_map_leaves_what_another_one_is_at_work_on(recipe: Write, tmp_path: Path) -> None:
    jobs = [mapping.Job(name, recipe(), ()) for name in ("busy", "free")]
    (tmp_path / mapping.STATE).mkdir()
    for job in jobs:
        job.note(tmp_path, ["it failed"], "someone")
    with jobs[0].lock(tmp_path):
        mapping.prepare(jobs, tmp_path)
    assert [job.state(tmp_path)[0] for job in jobs] == [["it failed"], []]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Rows that run nothing, but kill their process if they are called "bad"; what was tried."""
    log = tmp_path / "tried"
    log.touch()

    def run(recipe: Recipe, out: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(f"{out.name}\n")
        if out.name == "bad":
            os.kill(os.getpid(), signal.SIGKILL)
        if out.name == "wrong":
            raise ZeroDivisionError("a mistake of ours")
        result = {"interrupted": False, "version": RESULT_VERSION, "train": {"steps": 1}}
        write_file(out / "recipe.toml", recipe.as_toml(out).encode())
        write_json(out / "result.json", result)
        return result

    monkeypatch.setattr(mapping, "run", run)
    monkeypatch.setattr(build.KeptModel, "open", lambda *arguments: None)
    monkeypatch.setattr(mapping, "PAUSE", 0.05)
    return lambda: log.read_text().split()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_row_that_always_kills_its_worker_fails_and_the_others_are_finished(
    recipe: Write,
    table: Callable[..., Path],
    embedgrad: Command,
    tmp_path: Path,
    tried: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, rows, out = recipe(), table("name\ngood\nbad\nlast\n"), tmp_path / "out"
    jobs = mapping.read_jobs(path, rows)
    begin = partial(Forked, partial(mapping.work, jobs, out, retries=2))
    side_by_side = list[int]()

    def start(*arguments: object, beside: int) -> map_workers.Worker:
        side_by_side.append(beside)
        return begin()

    monkeypatch.setattr(map_workers, "LocalWorker", start)
    command = ("map", path, "--over", rows, "--out", out)
    done = embedgrad(*command)
    assert done.code == 2
    assert done.lines[-1].endswith("1 of 3 prompts failed; the table says why")
    assert "a worker was killed by signal 9; another one takes its place" in done.err
    found = results(out)
    assert [row["status"] for row in found.values()] == ["finished", "failed", "finished"]
    assert found["bad"]["error"] == "its process was killed by signal 9"
    assert "its process was killed by signal 9" in " ".join(done.out.split())
    assert tried() == ["good", "bad", "bad", "bad", "last"]
    # A later call tries again what failed, and nothing else.
    assert set(side_by_side) == {1}
    assert embedgrad(*command, "--workers", "2", "--quiet").code == 2
    assert tried()[5:] == ["bad", "bad", "bad"]
    assert set(side_by_side) == {1, 2}


def test_a_mistake_of_ours_ends_the_process_and_is_told(
    recipe: Write, table: Callable[..., Path], tmp_path: Path, tried: Callable[[], list[str]]
) -> None:
    jobs = mapping.read_jobs(recipe(), table("name\nwrong\nlast\n"))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            mapping.work(jobs, tmp_path, retries=2)
    mapping.work(jobs, tmp_path, retries=2)
    assert tried() == ["wrong"] * 3 + ["last"]
    failed = mapping.collect(jobs, tmp_path)["rows"][0]
    assert (failed["status"], failed["error"]) == (
        *("failed", "ZeroDivisionError: a mistake of ours"),
    )


def test_a_local_worker_says_why_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    def ending(do: Callable[..., object], *arguments: object) -> str:
        worker = map_workers.LocalWorker(do, *arguments)
        while (said := worker.ended()) is None:
            time.sleep(0.01)
        return said

    assert ending(signal.raise_signal, signal.SIGKILL) == "was killed by signal 9"
    assert ending(signal.raise_signal, signal.SIGTERM) == "ended with status 130"
    assert ending(sys.exit, 3) == "ended with status 3"
    assert ending(print, "not on the command's own output") == ""
    assert capfd.readouterr().out == ""


def test_a_death_after_a_new_checkpoint_is_no_failure(
    recipe: Write, table: Callable[..., Path], tmp_path: Path
) -> None:
    (job,) = mapping.read_jobs(recipe(), table("name\nrow\n"))
    checkpoints = tmp_path / "row" / "checkpoint"
    (checkpoints / "step-9").mkdir(parents=True)
    job.note(tmp_path, ["once"], "here 1")
    assert job.failures(tmp_path) == ["once", "its process died (here 1)"]
    (checkpoints / "step-10").mkdir()
    assert job.failures(tmp_path) == ["once"]


def test_workers_that_do_not_even_begin_end_the_map(
    recipe: Write, table: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mapping.read_jobs(recipe(), table("name\nrow\n"))
    monkeypatch.setattr(mapping, "PAUSE", 0.01)
    started = []

    class Broken(map_workers.Worker):
        name = "broken"

        def ended(self) -> str:
            return "ended with status 1"

        def stop(self) -> None:
            raise AssertionError("it has ended")

    def start() -> Broken:
        started.append(1)
        return Broken()

    with pytest.raises(EngineError, match="end again and again without beginning a row"):
        mapping.map_rows(jobs, tmp_path, start, lambda event: None)
    assert len(started) == 1 + mapping.DEATHS


@pytest.mark.slow
def test_workers_that_are_killed_every_second_lose_nothing(
    recipe: Write, table: Callable[..., Path], tmp_path: Path
) -> None:
    path, out = recipe(training={"epochs": 1}), tmp_path / "out"
    rows = table("name,training.seed\n" + "".join(f"row-{i},{i}\n" for i in range(20)))
    command = ["map", str(path), "--over", str(rows), "--out", str(out), "--workers", "2"]
    command = [sys.executable, "-m", "embedgrad", *command, "--retries", "9"]
    killed = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with suppress(psutil.Error):
                forking = psutil.Process(process.pid).children()  # and one that cleans up
                workers = [worker for child in forking for worker in child.children()]
                if workers and killed < 8:
                    random.choice(workers).kill()
                    killed += 1
            time.sleep(1)
        _, told = process.communicate()
    assert process.returncode == 0, told
    assert killed > 1
    assert [row["status"] for row in results(out).values()] == ["finished"] * 20
    assert "a worker was killed by signal 9; another one takes its place" in told
