"""One refined prompt for every row of a table, by processes that share it.

OUT/NAME/           the run of a row
OUT/results.csv     the scores of all rows
OUT/state/          locks of rows that are at work, who is at work, and why rows failed
"""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, final

from filelock import FileLock, Timeout

from embedgrad.atomic_files import remove_file, write_file, write_json
from embedgrad.data.bounded_reads import read_json, read_object
from embedgrad.data.readers import read_table
from embedgrad.environment import process_name
from embedgrad.errors import EmbedgradError, EngineError, RecipeError, one_line
from embedgrad.evaluation.significance import holm
from embedgrad.evaluation.verdict import word
from embedgrad.events import Report, quiet, say, scoring
from embedgrad.experiments.map_workers import DIED, Worker
from embedgrad.experiments.run import run
from embedgrad.experiments.run_folder import read_finished
from embedgrad.recipe.build import KeptModel
from embedgrad.recipe.overrides import as_toml
from embedgrad.recipe.paths import MAPPED
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.terminal.bars import show

STATE, NAME = "state", "name"
PLAIN = re.compile(r"\w[\w.-]{0,63}")
DEATHS = 3  # of workers in a row that did not even begin a row
PAUSE = 0.5  # seconds
COLUMNS = (NAME, "status", "text", "refined", "p_value", "verdict", "prompt", "error")


@final
class Mapped(TypedDict):
    """What became of every row of a table: `results.csv` as values."""

    rows: list[dict[str, Any]]
    finished: int
    failed: int
    results: str


@final
@dataclass(frozen=True)
class Job:
    """A row of the table: the name of its run, and what its recipe is read from."""

    name: str
    path: Path
    settings: tuple[str, ...]

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe, once it is asked for. Raises `RecipeError`."""
        return Recipe.read(self.path, self.settings)

    def result(self, out: Path) -> Mapping[str, Any] | None:
        """The result of its run, if it is finished."""
        found = read_object(out / self.name / "result.json")
        return None if found.get("interrupted", True) else found

    def state(self, out: Path) -> tuple[list[str], str, str]:
        """Why it failed, each time; who is at work, or died of it, and from which checkpoint."""
        try:
            found = read_json(self._file(out))
            errors = [str(line) for line in found["errors"]]
            return errors, str(found["worker"]), str(found["checkpoint"])
        except (OSError, ValueError, LookupError, TypeError):
            return [], "", ""

    def note(self, out: Path, errors: Sequence[str], worker: str = "") -> None:
        """Keep why it failed, and who is at work."""
        values = {"errors": errors, "worker": worker, "checkpoint": self._checkpoint(out)}
        write_json(self._file(out), values)

    def lock(self, out: Path) -> FileLock:
        """Whose holder is at work on it; `Timeout` where that is another one."""
        return FileLock(out / STATE / f"{self.name}.lock", timeout=0)

    def forget(self, out: Path) -> None:
        """Let it be tried as if it had never failed. Raises `RunError`."""
        remove_file(self._file(out))

    def failures(self, out: Path) -> list[str]:
        """Why it failed, each time; for who holds its lock.

        A process that died while it was at work counts, unless it left a new checkpoint: a long
        training outlives any number of machines that are taken away.
        """
        errors, worker, checkpoint = self.state(out)
        died = worker and checkpoint == self._checkpoint(out)
        return [*errors, DIED.format(worker)] if died else errors

    def over(self, out: Path, retries: int) -> bool:
        """Whether it is finished or given up."""
        return self.result(out) is not None or len(self.state(out)[0]) > retries

    def _file(self, out: Path) -> Path:
        return out / STATE / f"{self.name}.json"

    def _checkpoint(self, out: Path) -> str:
        folders = (out / self.name / "checkpoint").glob("step-*")
        return max((folder.name for folder in folders), key=lambda n: (len(n), n), default="")


def read_jobs(
    path: Path, over: Path, overrides: Sequence[str] = (), *, check: bool = True
) -> list[Job]:
    """The rows of a table as recipes. Raises `RecipeError` for rows that make none.

    A worker does not `check` those again, thousands maybe, before it begins.

    A column is a setting, as in `--set`, and an empty cell leaves it as it is; the column `name`
    names the run, or else the row's number does.
    """
    table, jobs, problems = read_table(over), dict[str, Job](), list[str]()
    for number, (row, source) in enumerate(zip(table.rows, table.sources, strict=True), start=1):
        cells = {n: value for n, value in row.items() if n != NAME and value not in ("", None)}
        name = str(row.get(NAME) or number)
        if name in jobs or name in (STATE, MAPPED) or not PLAIN.fullmatch(name):
            problems.append(f"{source}: {name!r}; expected a name of its own of letters and digits")
            continue
        settings = [f"{n}={v if isinstance(v, str) else as_toml(v)}" for n, v in cells.items()]
        jobs[name] = Job(name, path, (*overrides, *settings))
        try:
            _ = check and jobs[name].recipe
        except RecipeError as error:
            problems += [f"{source}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError("--over", problems)
    return list(jobs.values())


def prepare(jobs: Sequence[Job], out: Path) -> None:
    """Let failed rows be tried again, and reopen those to be trained longer than they were.

    Rows that another process is at work on are left to it. Raises `RunError` where a finished run
    is one of other settings than its row's.
    """
    (out / STATE).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        with suppress(Timeout), job.lock(out):
            if job.result(out) is None:
                job.forget(out)
            elif read_finished(job.recipe, out / job.name) is None:
                remove_file(out / job.name / "result.json")


def join(
    path: Path,
    over: Path,
    out: Path,
    overrides: Sequence[str],
    retries: int,
    worker: str = "",
) -> None:
    """What a worker does: `work` for a table that was checked already."""
    work(read_jobs(path, over, overrides, check=False), out, retries=retries, worker=worker)


def work(
    jobs: Sequence[Job], out: Path, report: Report = quiet, *, retries: int = 2, worker: str = ""
) -> None:
    """Run the rows that are neither finished nor given up, one after the other.

    Other processes may do the same in the same folder: a row that is at work is locked by its
    process, also where that dies. What it left is continued. `worker` is this process's name.
    """
    (out / STATE).mkdir(parents=True, exist_ok=True)
    kept, worker = KeptModel(), worker or process_name()
    left = [job for job in jobs if not job.over(out, retries)]
    while left:
        busy = []
        for job in left:
            try:
                with job.lock(out):
                    _try(job, out, report, kept, retries=retries, worker=worker)
            except Timeout:
                busy.append(job)
        left = [job for job in busy if not job.over(out, retries)]
        if left:
            time.sleep(PAUSE)


def _try(
    job: Job, out: Path, report: Report, kept: KeptModel, *, retries: int, worker: str
) -> None:
    while not job.over(out, retries):
        errors = job.failures(out)
        job.note(out, errors, worker if len(errors) <= retries else "")
        if len(errors) > retries:
            return  # died of it once too often
        try:
            model = kept.open(job.recipe, report)
            resume = (out / job.name / "recipe.toml").is_file()
            result = run(job.recipe, out / job.name, report, model=model, resume=resume)
            if result["interrupted"]:
                raise KeyboardInterrupt
            job.forget(out)
        except KeyboardInterrupt:
            job.note(out, errors)
            raise
        except Exception as error:
            job.note(out, [*errors, one_line(error)])
            say(report, [f"{job.name} failed: {one_line(error)}"])
            if not isinstance(error, EmbedgradError):
                raise  # the next process begins with nothing that this one has broken


def map_rows(
    jobs: Sequence[Job],
    out: Path,
    start: Callable[[], Worker],
    report: Report = show,
    *,
    workers: int = 1,
    retries: int = 2,
) -> Mapped:
    """Run every row by workers that do `work`, and collect the results.

    A worker that dies is started again, and a row that it died of is tried again, `retries` times.
    Raises `EngineError` where workers die before they begin a row. What an earlier call finished is
    not done again, and what failed is tried again.
    """
    (out / STATE).mkdir(parents=True, exist_ok=True)
    begun, reasons = [start() for _ in range(workers)], dict[str, str]()
    left, before, deaths = list(jobs), list[object](), 0
    try:
        while begun:
            time.sleep(PAUSE)
            ended = [(w, why) for w in begun if (why := w.ended()) is not None]
            touched = {path.stem for path in (out / STATE).glob("*.json")} | {*os.listdir(out)}
            over = {j.name for j in left if j.name in touched and j.over(out, retries)}
            if over:
                left = [job for job in left if job.name not in over]
                report(scoring("prompts", len(jobs) - len(left), len(jobs)))
            now: list[object] = [(j.name, j.state(out)) for j in left if j.name in touched]
            deaths, before = deaths if now == before else 0, now
            for worker, why in ended:
                begun.remove(worker)
                if why:
                    reasons[DIED.format(worker.name)] = f"its process {why}"
                if why and left:
                    deaths += 1
                    say(report, [f"a worker {why}; another one takes its place"])
                    if deaths > DEATHS * workers:
                        raise EngineError(
                            f"{out}: workers end again and again without beginning a row; the "
                            "same command with --workers 0 says why"
                        )
                    begun.append(start())
    finally:
        for worker in begun:
            worker.stop()
        while any(worker.ended() is None for worker in begun):
            time.sleep(PAUSE / 10)
    return collect(jobs, out, reasons)


def collect(jobs: Sequence[Job], out: Path, reasons: Mapping[str, str] | None = None) -> Mapped:
    """Write `results.csv`, a line for every row; verdicts by Holm's correction over all of them.

    `reasons` say better what a failure was.
    """
    rows = []
    for job in jobs:
        result, failures = job.result(out), job.state(out)[0]
        row: dict[str, Any] = {NAME: job.name, "status": "finished" if result else "unfinished"}
        if result is None and failures:
            row |= {"status": "failed", "error": (reasons or {}).get(failures[-1], failures[-1])}
        if result and "refined" in result:
            row |= {name: result[name]["accuracy"] for name in ("text", "refined")}
            row["p_value"] = result["difference"]["p_value"]
        rows.append({**row, "prompt": str(out / job.name / "prompt") if result else ""})
    scored = [row for row in rows if "p_value" in row]
    for row, p_holm in zip(scored, holm([row["p_value"] for row in scored]), strict=True):
        row["verdict"] = word(row["refined"] - row["text"], p_holm)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / MAPPED, text.getvalue().encode())
    counts = [sum(row["status"] == status for row in rows) for status in ("finished", "failed")]
    return Mapped(rows=rows, finished=counts[0], failed=counts[1], results=str(out / MAPPED))
