"""Runs opened to be exported: names, one model for all, rows to calibrate and to check by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedgrad.data.examples import Example
from embedgrad.deploy.formats.token_names import check_name
from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.rules import exportability, facts_of
from embedgrad.errors import ExportError
from embedgrad.events import Report
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import OpenRun, open_run

Runs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
ROWS = 32  # to check on, and as many others to calibrate by


@dataclass(frozen=True)
class Opened:
    """Runs with their prompts; `checks` are rows that no export is calibrated by."""

    runs: Sequence[OpenRun]
    exported: Sequence[Exported]
    checks: Sequence[Sequence[TokenSequence]]

    def job(self, tag: str, report: Report) -> Job:
        """What a destination writes."""
        return Job(self.exported, self.runs[0].model, tag, report)

    def checking(self, job: Job) -> Job:
        """The same with the rows that are checked."""
        pairs = zip(self.exported, self.checks, strict=True)
        return replace(job, prompts=[replace(e, sequences=rows) for e, rows in pairs])


def named(runs: Runs) -> dict[str, Path]:
    """Run folders by the names of their prompts. Raises `ExportError`."""
    if isinstance(runs, Mapping):
        for name in runs:
            check_name(name)
        return {name: Path(run) for name, run in runs.items()}
    found: dict[str, Path] = {}
    for run in [runs] if isinstance(runs, str | Path) else runs:
        before, equals, after = str(run).partition("=")
        if equals and not Path(run).exists():
            check_name(before)
            name, path = before, Path(after)
        else:
            path = Path(run)
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.absolute().name)[:64].strip("-") or "prompt"
        if name in found:
            raise ExportError(
                f"two prompts are called {name!r} ({found[name]} and {path}); name them apart, as "
                f"in {name}-2={path}"
            )
        found[name] = path
    if not found:
        raise ExportError("no run to export; give at least one")
    return found


def open_runs(runs: Mapping[str, Path], overrides: Sequence[str], report: Report) -> Opened:
    """Load runs by name, with the first one's model for all. Raises what `open_run` raises."""
    opened: list[OpenRun] = []
    exported, checks = [], []
    for name, path in runs.items():
        run = open_run(path, overrides, report, model=opened[0].model if opened else None)
        splits = read_data(run.recipe)
        pool = [*splits.dev, *splits.test, *splits.train]
        checks.append(_uncut(run, pool))
        # From the other end: other rows, if there are enough.
        calibrating = _uncut(run, reversed(pool))
        exported.append(Exported(name, run.prompt, run.sequencer, calibrating, run.recipe.export))
        opened.append(run)
    return Opened(opened, exported, checks)


def _uncut(run: OpenRun, examples: Iterable[Example]) -> list[TokenSequence]:
    """The first rows that fit into the context as they are: a client's query is not cut."""
    rows: list[TokenSequence] = []
    for example in examples:
        before = run.sequencer.truncated
        row = run.sequencer(example)
        if run.sequencer.truncated == before:
            rows.append(row)
        if len(rows) == ROWS:
            break
    if not rows:
        raise ExportError(
            f"{run.folder}: no row of its data fits into the model's {run.model.info.context} "
            "tokens uncut, so nothing can be checked; shorten the template or the rows"
        )
    return rows


def refuse(to: str, opened: Opened) -> list[str]:
    """Remarks on an export to a destination. Raises `ExportError` where the rules refuse it."""
    remarks: dict[str, None] = {}
    for run, exported, rows in zip(opened.runs, opened.exported, opened.checks, strict=True):
        facts = facts_of(exported, run.model, [*exported.sequences, *rows])
        found = {entry["destination"]: entry for entry in exportability(facts)}
        if not found[to]["possible"]:
            others = ", ".join(name for name, entry in found.items() if entry["possible"])
            raise ExportError(
                f"{run.folder}: cannot be exported to {to}: {'; '.join(found[to]['remarks'])} "
                f"(possible: {others})"
            )
        remarks |= dict.fromkeys(found[to]["remarks"])
    return list(remarks)
