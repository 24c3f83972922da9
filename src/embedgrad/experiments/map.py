"""One refined prompt for every row of a table, by processes that share it.

OUT/NAME/           the run of a row
OUT/results.csv     the scores of all rows
OUT/state/          locks of rows that are at work, and why rows failed
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, final

from filelock import FileLock, Timeout

from embedgrad.atomic_files import remove_file, write_file, write_json
from embedgrad.data.bounded_reads import read_json
from embedgrad.data.readers import read_table
from embedgrad.errors import EmbedgradError, EngineError, RecipeError, one_line
from embedgrad.evaluation.significance import holm
from embedgrad.evaluation.verdict import word
from embedgrad.events import Report, quiet, say, scoring
from embedgrad.experiments.run import run
from embedgrad.experiments.run_folder import read_finished
from embedgrad.recipe.build import KeptModel
from embedgrad.recipe.overrides import as_toml
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.terminal.bars import show

RESULTS, STATE, NAME = "results.csv", "state", "name"
PLAIN = re.compile(r"\w[\w.-]{0,63}")
DEATHS = 3  # of workers in a row, without a row that was finished in between
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
    """A row of the table: the name of its run, and its recipe."""

    name: str
    recipe: Recipe

    def result(self, out: Path) -> Mapping[str, Any] | None:
        """The result of its run, if it is finished."""
        try:
            found = read_json(out / self.name / "result.json")
            return None if found["interrupted"] else found
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def failures(self, out: Path) -> list[str]:
        """Why it failed, each time."""
        try:
            found = read_json(out / STATE / f"{self.name}.json")
            return [str(line) for line in found["errors"]]
        except (OSError, ValueError, LookupError, TypeError):
            return []


def read_jobs(path: Path, over: Path, overrides: Sequence[str] = ()) -> list[Job]:
    """The rows of a table as recipes. Raises `RecipeError` for rows that make none.

    A column is a setting, as in `--set`, and an empty cell leaves it as it is; the column `name`
    names the run, or else the row's number does.
    """
    table, jobs, problems = read_table(over), dict[str, Job](), list[str]()
    for number, (row, source) in enumerate(zip(table.rows, table.sources, strict=True), start=1):
        cells = {n: value for n, value in row.items() if n != NAME and value not in ("", None)}
        name = str(row.get(NAME) or number)
        if name in jobs or name in (STATE, RESULTS) or not PLAIN.fullmatch(name):
            problems.append(f"{source}: {name!r}; expected a name of its own of letters and digits")
            continue
        settings = [f"{n}={v if isinstance(v, str) else as_toml(v)}" for n, v in cells.items()]
        try:
            jobs[name] = Job(name, Recipe.read(path, [*overrides, *settings]))
        except RecipeError as error:
            problems += [f"{source}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError("--over", problems)
    return list(jobs.values())


def check_finished(jobs: Sequence[Job], out: Path) -> None:
    """Reopen finished rows that are to be trained longer than they were.

    Raises `RunError` where a finished run is one of other settings than its row's.
    """
    for job in jobs:
        if job.result(out) is not None and read_finished(job.recipe, out / job.name) is None:
            remove_file(out / job.name / "result.json")


def work(
    jobs: Sequence[Job],
    out: Path,
    report: Report = quiet,
    *,
    retries: int = 1,
) -> None:
    """Run the rows that are neither finished nor given up, one after the other.

    Other processes may do the same in the same folder: a row that is at work is locked by its
    process, also where that dies. What it left is continued.
    """
    (out / STATE).mkdir(parents=True, exist_ok=True)
    kept = KeptModel()
    left = [job for job in jobs if not _over(job, out, retries)]
    while left:
        busy = []
        for job in left:
            lock = FileLock(out / STATE / f"{job.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                busy.append(job)
                continue
            with lock:
                while not _over(job, out, retries):
                    try:
                        model = kept.open(job.recipe, report)
                        resume = (out / job.name / "recipe.toml").is_file()
                        result = run(job.recipe, out / job.name, report, model=model, resume=resume)
                        if result["interrupted"]:
                            raise KeyboardInterrupt
                    except EmbedgradError as error:
                        why = [*job.failures(out), one_line(error)]
                        write_json(out / STATE / f"{job.name}.json", {"errors": why})
                        say(report, [f"{job.name} failed: {why[-1]}"])
            lock.release()
        left = [job for job in busy if not _over(job, out, retries)]
        if left:
            time.sleep(PAUSE)


def map_rows(
    jobs: Sequence[Job],
    out: Path,
    arguments: Sequence[str],
    report: Report = show,
    *,
    workers: int = 1,
    retries: int = 1,
) -> Mapped:
    """Run every row by processes of this package that do `work`, and collect the results.

    `arguments` are those of their command line.

    A process that dies is started again. Raises `EngineError` where they die without finishing
    anything. What an earlier call finished is not done again, and what failed is tried again.
    """
    command = [sys.executable, "-m", "embedgrad", *arguments]
    (out / STATE).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        (out / STATE / f"{job.name}.json").unlink(missing_ok=True)
    begun = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(workers)]
    finished, deaths, done = set[str](), 0, 0
    try:
        while begun:
            time.sleep(PAUSE)
            over = {j.name for j in jobs if j.name not in finished and _over(j, out, retries)}
            finished |= over
            deaths = 0 if over else deaths
            if len(finished) > done:
                done = len(finished)
                report(scoring("prompts", done, len(jobs)))
            ended = [process for process in begun if process.poll() is not None]
            begun = [process for process in begun if process.returncode is None]
            for process in ended:
                if process.returncode and len(finished) < len(jobs):
                    deaths += 1
                    say(report, [f"a worker ended with status {process.returncode}"])
                    if deaths > DEATHS * workers:
                        raise EngineError(
                            f"{out}: workers end again and again without finishing a row; the "
                            "same command with --workers 0 says why"
                        )
                    begun.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    finally:
        for process in begun:
            process.terminate()
        for process in begun:
            process.wait()
    return collect(jobs, out)


def collect(jobs: Sequence[Job], out: Path) -> Mapped:
    """Write `results.csv`, a line for every row; verdicts by Holm's correction over all of them."""
    rows = []
    for job in jobs:
        result, failures = job.result(out), job.failures(out)
        row: dict[str, Any] = {NAME: job.name, "status": "finished" if result else "unfinished"}
        if result is None and failures:
            row |= {"status": "failed", "error": failures[-1]}
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
    write_file(out / RESULTS, text.getvalue().encode())
    counts = [sum(row["status"] == status for row in rows) for status in ("finished", "failed")]
    return Mapped(rows=rows, finished=counts[0], failed=counts[1], results=str(out / RESULTS))


def _over(job: Job, out: Path, retries: int) -> bool:
    return job.result(out) is not None or len(job.failures(out)) > retries
