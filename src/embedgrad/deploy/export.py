"""Export a run's refined prompt, and check it in the destination's engine.

runs -> rules -> disk space -> written to a temporary folder -> checked -> renamed to its place
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, final

from embedgrad.atomic_files import write_file, write_json
from embedgrad.data.bounded_reads import file_digest, read_text
from embedgrad.deploy import folder as folders
from embedgrad.deploy.base_model import shareable
from embedgrad.deploy.card import build_card, low_agreement, smaller_ways, update_check
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.formats.token_names import new_tag
from embedgrad.deploy.job import Job, find_destination
from embedgrad.deploy.runs import ROWS, Runs, check_exportable, name_runs, open_runs, why_unchecked
from embedgrad.deploy.verify.engine import CHECK_ENGINES, check_installed
from embedgrad.deploy.verify.parity import CheckResult, check
from embedgrad.environment import versions
from embedgrad.errors import ExportError, border
from embedgrad.events import Report, say, stage
from embedgrad.prompt import artifact
from embedgrad.recipe.paths import prompt_folder, share_folder
from embedgrad.report.terminal.bars import show


@final
class ExportResult(TypedDict):
    """What was exported, how to use it, and its check; None where it was not checked."""

    folder: str
    destination: str
    bytes: int
    linked_bytes: int
    prompts: dict[str, Any]
    commands: list[str]
    snippet: str | None
    notes: list[str]
    smaller: list[str]
    verify: CheckResult | None
    seconds: float


def export(
    runs: Runs,
    to: str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    verify: bool = True,
    check_rows: int = ROWS,
    report: Report = show,
) -> ExportResult:
    """Write refined prompts for a destination into a new folder, and check them in its engine.

    Several runs of one model share an export; a prompt is named after its run's folder, or NAME in
    "NAME=RUN". `overrides` change the recipes' settings, `check_rows` with how many rows the export
    is checked. Returns plain JSON values. Raises
    `ExportError`, also if the check fails (OUT.failed.json then holds its report), and
    `EngineError`, `RunError`, `ArtifactError`, `RecipeError`, `ModelError`.
    """
    began, out = time.perf_counter(), Path(out)
    failed = out.with_name(f"{out.name}.failed.json")
    writer = find_destination(to)
    if verify:
        check_installed(to)
    folders.refuse_existing(out)
    named, tag = name_runs(runs), new_tag()
    job = open_runs(named, overrides, tag, report, checked=verify, check_rows=check_rows)
    notes = check_exportable(to, job)
    if verify and (why := why_unchecked(job)):
        verify, notes = False, [*notes, why]
    copies = 1 + (CHECK_ENGINES[to].copies if verify else 0)
    folders.check_room(out, copies * writer.bytes_needed(job), links=to == "vocabulary")
    with folders.staging(out) as aside:
        stage(report, f"writing for {to}")
        with folders.one_line(out):
            written = writer.write(job, aside)
            for prompt in job.prompts:
                artifact.save(prompt.prompt, aside / folders.OWN / prompt.name)
            entries = _entries(to, out, job, overrides, written, aside)
            write_json(aside / folders.FILE, entries)
        checked = None
        if verify:
            checked = check(to, aside, job.checking(), written)
            if not checked["passed"]:
                write_json(failed, checked)
                raise ExportError(
                    f"{out}: the export does not compute what training computed: "
                    f"{checked['problems'][0]}; it was not kept; see {failed} for the report"
                )
        commands = writer.commands(out, written)
        notes += [note for note in written.get("notes", ()) if note not in notes]
        if checked:
            notes += [f"warning: {warning}" for warning in low_agreement(checked, entries)]
        text = build_card(
            out.name,
            entries,
            job,
            checked,
            commands=writer.commands(Path(out.name), written),
            notes=notes,
        )
        with folders.one_line(out):
            if checked:
                write_json(aside / folders.REPORT, checked)
            write_file(aside / folders.CARD, text.encode())
    say(report, notes)
    failed.unlink(missing_ok=True)  # from an earlier attempt
    own, linked = folders.sizes(out)
    return {
        "folder": str(out),
        "destination": to,
        "bytes": own,
        "linked_bytes": linked,
        "prompts": entries["prompts"],
        "commands": commands,
        "snippet": written.get("snippet"),
        "notes": notes,
        "smaller": smaller_ways(to, job),
        "verify": checked,
        "seconds": time.perf_counter() - began,
    }


def verify(
    folder: str | Path,
    *,
    runs: Runs = (),
    overrides: Sequence[str] = (),
    check_rows: int = ROWS,
    report: Report = show,
) -> CheckResult:
    """Check an export again in its destination's engine, and store the report in it.

    `runs` are the runs that it was made from, if they moved; `overrides` change their recipes, for
    example `model.name` if the model moved; `check_rows` is the number of rows to check with.
    Returns the content of `verify.json`;
    see its "passed" and "problems". Raises `ExportError` for changed files, and what `export`
    raises.
    """
    folder = Path(folder)
    entries = folders.read_export(folder)
    to = entries["destination"]
    check_installed(to)
    folders.check_files(folder, entries)
    settings = [*entries["settings"], *overrides]
    with border(folder / folders.FILE, ExportError):
        runs_of = _runs_of(folder, entries, runs)
    job = open_runs(runs_of, settings, entries["tag"], report, check_rows=check_rows)
    if why := why_unchecked(job):
        raise ExportError(f"{folder}: {why}")
    with border(folder / folders.FILE, ExportError):
        checked = check(to, folder, job.checking(), entries["written"])
    say(report, [f"warning: {warning}" for warning in low_agreement(checked, entries)])
    write_json(folder / folders.REPORT, checked)
    path = folder / folders.CARD
    if path.is_file():
        write_file(path, update_check(read_text(path), checked).encode())
    return checked


def _runs_of(folder: Path, entries: Mapping[str, Any], moved: Runs) -> dict[str, Path]:
    """The runs that an export was made from. Raises `ExportError` if they changed since."""
    prompts = entries["prompts"]
    where = name_runs(moved) if moved else {}
    if len(where) == len(prompts) == 1:
        where = dict(zip(prompts, where.values(), strict=True))
    for name in where:
        if name not in prompts:
            raise ExportError(f"--run {name}: {folder} holds {', '.join(prompts)}")
    before = {name: (folder.resolve() / entry["run"]).resolve() for name, entry in prompts.items()}
    runs = {**before, **where}
    for name, run in runs.items():
        rows = prompt_folder(run) / artifact.ROWS_FILE
        if not rows.is_file():
            raise ExportError(
                f"{folder}: the run that it was made from is not in {run}; tell where it is with "
                f"--run {name}=RUN"
            )
        if file_digest(rows) != prompts[name]["artifact"]:
            raise ExportError(
                f"{folder}: was made from other rows than those in {run}; export that run again"
            )
    return runs


def _entries(
    to: str,
    out: Path,
    job: Job,
    overrides: Sequence[str],
    written: Mapping[str, Any],
    aside: Path,
) -> dict[str, Any]:
    """The content of `export.json`."""
    model = {**job.model.info.facts(), "name": job.base.model, "revision": job.base.revision}
    return {
        "format": folders.FORMAT,
        "version": folders.VERSION,
        "destination": to,
        "tag": job.tag,
        "prompts": {
            prompt.name: {
                "run": _relative(prompt.folder, out),
                "artifact": file_digest(aside / folders.OWN / prompt.name / artifact.ROWS_FILE),
                "tokens": [len(span.ids) for span in prompt.spans],
                "scores": prompt.prompt.provenance.get("scores"),
                "choices": (choices := Choices.of(prompt)) and asdict(choices),
            }
            for prompt in job.prompts
        },
        "model": model,
        "export": asdict(job.settings),
        "settings": shareable(overrides),
        "written": dict(written),
        "files": folders.digests(aside),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _relative(run: Path, out: Path) -> str:
    """The run's folder relative to the export's, so that both may move together.

    If they share no folder, that would spell the run's whole path: then only its name.
    """
    run, out = run.resolve(), out.resolve()
    return Path(os.path.relpath(run, out)).as_posix() if share_folder(run, out) else run.name
