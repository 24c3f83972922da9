"""Open runs for export: names, shared model, rows to check by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from embedgrad.data.examples import Example
from embedgrad.deploy.formats.token_names import check_name
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.rules import exportability, gather_facts
from embedgrad.errors import ExportError, OptionError
from embedgrad.events import Report
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import OpenRun, open_run

Runs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
ROWS = 32  # to check with, and as many others to calibrate with


@final
@dataclass(frozen=True)
class ExportRuns:
    """Runs with their prompts; no export is calibrated with the rows of `checks`."""

    runs: Sequence[OpenRun]
    exported: Sequence[ExportedPrompt]
    checks: Sequence[Sequence[TokenSequence]]

    def job(self, tag: str, report: Report) -> Job:
        """The job of a destination."""
        return Job(self.exported, self.runs[0].model, tag, report)

    def checking(self, job: Job) -> Job:
        """The same job with the rows of the check."""
        pairs = zip(self.exported, self.checks, strict=True)
        return replace(job, prompts=[replace(e, sequences=rows) for e, rows in pairs])


def name_runs(runs: Runs) -> dict[str, Path]:
    """Run folders by prompt name: that of NAME=RUN, else the folder's. Raises `ExportError`."""
    if isinstance(runs, Mapping):
        for name in runs:
            check_name(name)
        return {name: Path(run) for name, run in runs.items()}
    paths: dict[str, Path] = {}
    for run in [runs] if isinstance(runs, str | Path) else runs:
        before, equals, after = str(run).partition("=")
        if equals and not Path(run).exists():
            check_name(before)
            name, path = before, Path(after)
        else:
            path = Path(run)
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.absolute().name)[:64].strip("-") or "prompt"
        if name in paths:
            raise ExportError(
                f"two prompts are called {name!r} ({paths[name]} and {path}); give one another "
                f"name, such as {name}-2={path}"
            )
        paths[name] = path
    if not paths:
        raise ExportError("no run to export; give at least one")
    return paths


def open_runs(
    runs: Mapping[str, Path], overrides: Sequence[str], report: Report, check_rows: int = ROWS
) -> ExportRuns:
    """Load runs by name, all with the first one's model. Raises what `open_run` raises."""
    opened: list[OpenRun] = []
    exported, checks = [], []
    for name, path in runs.items():
        run = open_run(path, overrides, report, model=opened[0].model if opened else None)
        splits = read_data(run.recipe)
        pool = [*splits.dev, *splits.test, *splits.train]
        checks.append(_uncut(run, pool, check_rows))
        calibrating = _uncut(run, reversed(pool), ROWS)  # other rows, if there are enough
        exported.append(
            ExportedPrompt(name, run.prompt, run.sequencer, calibrating, run.recipe.export)
        )
        opened.append(run)
    return ExportRuns(opened, exported, checks)


def _uncut(run: OpenRun, examples: Iterable[Example], most: int) -> list[TokenSequence]:
    """The first rows that fit into the context whole, as a client's query must."""
    if most < 1:
        raise OptionError(f"check_rows: expected at least 1, got {most}")
    rows: list[TokenSequence] = []
    for example in examples:
        before = run.sequencer.truncated
        row = run.sequencer(example)
        if run.sequencer.truncated == before:
            rows.append(row)
        if len(rows) == most:
            break
    if not rows:
        raise ExportError(
            f"{run.folder}: no row of its data fits into the model's {run.model.info.context} "
            "tokens whole, so nothing can be checked; shorten the template or the rows"
        )
    return rows


def check_exportable(to: str, opened: ExportRuns) -> list[str]:
    """Remarks on an export to a destination. Raises `ExportError` if the rules forbid it."""
    remarks: dict[str, None] = {}
    for run, exported, rows in zip(opened.runs, opened.exported, opened.checks, strict=True):
        facts = gather_facts(exported, run.model, [*exported.sequences, *rows])
        entries = {entry["destination"]: entry for entry in exportability(facts)}
        if not entries[to]["possible"]:
            others = ", ".join(name for name, entry in entries.items() if entry["possible"])
            raise ExportError(
                f"{run.folder}: cannot be exported to {to}: {'; '.join(entries[to]['remarks'])} "
                f"(possible: {others})"
            )
        remarks |= dict.fromkeys(entries[to]["remarks"])
    return list(remarks)
