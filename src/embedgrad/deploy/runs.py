"""Open runs for export: names, shared model, rows to check by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from embedgrad.data.examples import Example
from embedgrad.data.readers import read_table
from embedgrad.deploy.base_model import anonymous
from embedgrad.deploy.formats.token_names import check_name
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.rules import exportability, gather_facts, made_up
from embedgrad.errors import DataError, ExportError, OptionError
from embedgrad.events import Report
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.check_rows import whole_rows
from embedgrad.recipe.open_run import OpenRun, open_run
from embedgrad.recipe.paths import MAPPED, find_run

Runs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
ROWS = 32  # to check with, and as many others to calibrate with


def why_unchecked(job: Job) -> str | None:
    """Why there is nothing to check an export with, if so."""
    for exported in job.prompts:
        if not exported.checks:
            return (
                f"not checked: {exported.folder.resolve().name} is a prompt without its run, which "
                "keeps the rows for checks; give the run to have it checked"
            )
    return None


def name_runs(runs: Runs) -> dict[str, Path]:
    """Run folders by prompt name: that of NAME=RUN, else the folder's. Raises `ExportError`.

    The folder of `embedgrad map` stands for all its runs, in the order of its table.
    """
    if isinstance(runs, Mapping):
        for name in runs:
            check_name(name)
        return {name: Path(run) for name, run in runs.items()}
    paths: dict[str, Path] = {}
    given = [runs] if isinstance(runs, str | Path) else runs
    for run in (one for folder in given for one in _find_mapped(Path(folder)) or [Path(folder)]):
        before, equals, after = str(run).partition("=")
        if equals and not Path(run).exists():
            check_name(before)
            name, path = before, Path(after)
        else:
            path = Path(run)
            folder = (find_run(path) or path).absolute()
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:64].strip("-") or "prompt"
        if name in paths:
            raise ExportError(
                f"two prompts are called {name!r} ({paths[name]} and {path}); give one another "
                f"name, such as {name}-2={path}"
            )
        paths[name] = path
    if not paths:
        raise ExportError("no run to export; give at least one")
    return paths


def _find_mapped(folder: Path) -> list[Path]:
    if not (folder / MAPPED).is_file():
        return []
    rows = read_table(folder / MAPPED).rows
    if left := [str(row.get("name")) for row in rows if row.get("status") != "finished"]:
        raise ExportError(
            f"{folder}: {len(left)} of {len(rows)} prompts are not finished, {left[0]} for one; "
            "map them again, or name the runs to export"
        )
    names = [str(row.get("name")) for row in rows]
    for name in names:
        if Path(name).name != name:
            raise ExportError(f"{folder / MAPPED}: {name!r} is no name of a run; map it again")
    return [folder / name for name in names]


def open_runs(
    runs: Mapping[str, Path],
    overrides: Sequence[str],
    tag: str,
    report: Report,
    *,
    checked: bool = True,
    check_rows: int = ROWS,
) -> Job:
    """Load runs by name, all with the first one's model. Raises what `open_run` raises.

    Made-up rows calibrate an export where there are no others: for a prompt without its run, and,
    if it is not to be `checked`, where the data is gone.
    """
    if check_rows < 1:
        raise OptionError(f"check_rows: expected at least 1, got {check_rows}")
    model: LanguageModel | None = None
    exported = []
    for name, path in runs.items():
        run = open_run(path, overrides, report, model=model)
        run.recipe.needs_text("an export")
        model, settings = run.model, run.recipe.export
        if run.prompt.rows.shape[1] != model.info.width:
            raise ExportError(
                f"{path}: has rows for every layer (parameterization.deep), which no other engine "
                "takes; `embedgrad generate` answers with it, and a training without deep exports"
            )
        try:
            pool = run.check_rows()
        except DataError:
            if checked:
                raise
            pool = []
        checks = _whole(run, pool, check_rows) if pool else []
        calibrating = _whole(run, [*reversed(pool)] or made_up(run.prompt))  # others, if enough
        prompt = anonymous(run.prompt, model.info, settings)
        exported.append(
            ExportedPrompt(name, prompt, run.sequencer, calibrating, settings, checks, run.folder)
        )
    assert model is not None, "runs have names"
    return Job(exported, model, tag, report)


def _whole(run: OpenRun, examples: Iterable[Example], most: int = ROWS) -> Sequence[TokenSequence]:
    rows = whole_rows(run.sequencer, examples, most)
    if not rows:
        raise ExportError(
            f"{run.folder}: no row of its data fits into the model's {run.model.info.context} "
            "tokens whole, so nothing can be checked; shorten the template or the rows"
        )
    return rows


def check_exportable(to: str, job: Job) -> list[str]:
    """Remarks on an export to a destination. Raises `ExportError` if the rules forbid it."""
    remarks: dict[str, None] = {}
    for exported in job.prompts:
        entries = {e["destination"]: e for e in exportability(gather_facts(exported, job.model))}
        if not entries[to]["possible"]:
            others = ", ".join(name for name, entry in entries.items() if entry["possible"])
            raise ExportError(
                f"{exported.folder}: cannot be exported to {to}: "
                f"{'; '.join(entries[to]['remarks'])} (possible: {others})"
            )
        remarks |= dict.fromkeys(entries[to]["remarks"])
    return list(remarks)
