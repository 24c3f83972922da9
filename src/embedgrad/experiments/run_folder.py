"""The folder of a run: made, read back, and described."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import (
    is_leftover,
    lock_folder,
    remove_file,
    remove_leftovers,
    restore_folder,
    write_file,
)
from embedgrad.data.bounded_reads import file_digest, read_object
from embedgrad.errors import EmbedgradError, RunError
from embedgrad.events import Report
from embedgrad.experiments.choose_place import read_places
from embedgrad.experiments.compare.recipe_diff import (
    MAY_CHANGE,
    differences,
    flatten,
    other_engine,
)
from embedgrad.experiments.finish import RunResult
from embedgrad.model.loading.info import weights_digest
from embedgrad.parts.scorers import SandboxedFunction
from embedgrad.prompt import artifact
from embedgrad.recipe.build import Prepared, sources
from embedgrad.recipe.paths import find_moved, no_run
from embedgrad.recipe.recipe import Recipe, read_toml
from embedgrad.report.figures.series import is_number
from embedgrad.report.page.run_files import RESULT_VERSION, json_lines
from embedgrad.report.terminal.tables import kept_text
from embedgrad.training.checkpoint import Checkpoint

LENGTHS = ("training.epochs", "training.steps")  # may grow when a run resumes
PATIENCE = "training.patience"  # may change then
AGAIN = "no checkpoint: starts again at step 0"


def make_folder(out: Path) -> None:
    """Make the folder of a new run. Raises `RunError` where there is one that holds anything."""
    try:
        with suppress(FileExistsError):
            out.mkdir(parents=True)
        # A run that was killed at once leaves a folder without a recipe.
        if not (out.is_dir() and all(map(is_leftover, out.iterdir()))):
            raise RunError(f"{out}: exists already; choose another folder")
    except OSError as error:
        why = f"cannot be made ({error.strerror}); choose another folder"
        raise RunError(f"{out}: {why}") from error


@contextmanager
def preparing(
    out: Path, report: Report, stack: ExitStack, *, resume: bool
) -> Iterator[Checkpoint | None]:
    """A run's folder until its training begins; gives the checkpoint that it resumes from.

    The folder stays locked until `stack` ends. A new run that fails inside leaves no folder behind,
    unless it holds what took long: solutions, or trials of places. Raises `RunError` where the
    folder cannot be made, or another process has it.
    """
    parents = [parent for parent in out.parents if not parent.exists()]
    if not resume:
        make_folder(out)
    stack.enter_context(lock_folder(out))
    checkpoint = Checkpoint.find(out / "checkpoint", report) if resume else None
    try:
        yield checkpoint
    except BaseException as error:
        sampled = any(out.rglob("solutions.jsonl")) and not isinstance(error, EmbedgradError)
        if not (resume or sampled or read_places(out)["trials"]):
            # Nothing is learned yet, and the folder is our own; samples are in the cache too.
            shutil.rmtree(out, ignore_errors=True)
            with suppress(OSError):  # another run may have moved in
                for parent in parents:
                    parent.rmdir()
        raise


def let_scorer_run(recipe: Recipe, *, resume: bool) -> None:
    """A new run's recipe is the user's own; a folder to resume may come from anywhere."""
    if isinstance(scorer := recipe.evaluation.scorer, SandboxedFunction):
        scorer.ask_first() if resume else scorer.trust()


def begin_files(
    out: Path, toml: str, checkpoint: Checkpoint | None, tasks: Sequence[str] = ()
) -> None:
    """Write a run's recipe, and take away what the run writes anew from its checkpoint on."""
    for folder in (out, *(out / name for name in tasks)):
        restore_folder(folder / "prompt", artifact.load)
        remove_file(folder / "result.json")  # of a shorter run
        remove_leftovers(folder)
    remove_leftovers(out / "checkpoint")
    drop_events(out / "events.jsonl", checkpoint.step if checkpoint else -1)
    write_file(out / "recipe.toml", toml.encode())


def facts_of(recipe: Recipe, ready: Prepared) -> dict[str, Any]:
    """What a training depends on besides its recipe, and a resumed one must find again."""
    splits = sources(recipe, ready.splits)
    more: dict[str, dict[str, str]] = {}
    if column := recipe.parts.objective.group_column:
        names = json.dumps([sequence.example.group_in(column) for sequence in ready.train])
        more["groups"] = {"sha256": hashlib.sha256(names.encode()).hexdigest()}
    solutions = [sequence.example.solution for sequence in ready.train]
    if any(solution is not None for solution in solutions):  # a split's digest has answers only
        texts = json.dumps(solutions).encode()
        more["set of solutions"] = {"sha256": hashlib.sha256(texts).hexdigest()}
    if files := recipe.parts.parameterization.files:
        more["parameterization"] = {"sha256": ",".join(map(file_digest, files))}
    return {
        "date": ready.sequencer.renderer.date.isoformat(),
        "model": {
            "embedding_digest": ready.model.info.embedding_digest,
            "weights": weights_digest(ready.model.model),
        },
        "data": {name: {"sha256": splits[name]["sha256"]} for name in splits},
        "solutions": {"kept": ready.solutions.get("kept")},
        **more,
    }


def check_resumed(out: Path, checkpoint: Checkpoint, found: Mapping[str, Any], steps: int) -> None:
    """Raise `RunError` where a run's model, data or length are not those of its checkpoint."""
    changes = differences(flatten(checkpoint.made_from), flatten(found))
    if checkpoint.step > steps:
        changes.append(f"its checkpoint is of step {checkpoint.step} of {steps}")
    if changes:
        raise RunError(
            f"{out}: cannot be resumed, as {changes[0]}; bring back what the run began "
            "with, or start a new one"
        )


def require_run(out: Path) -> None:
    """Raise `RunError` where a folder holds no run."""
    if out.is_file():
        raise RunError(no_run(out))
    if not (out / "recipe.toml").is_file():
        raise RunError(
            f"{out}: holds no run to resume; `embedgrad optimize RECIPE --out {out}` starts one"
        )


def changed_length(then: Recipe, now: Recipe, out: Path) -> list[str]:
    """Which of `LENGTHS` have grown, and `PATIENCE` if it changed, in a recipe that resumes.

    Raises `RunError` where anything else has.
    """
    before, after = flatten(then.as_dict()), flatten(now.as_dict())
    changed = [name for name in LENGTHS if after.get(name, 0) > before.get(name, math.inf)]
    changed += [PATIENCE] if before.get(PATIENCE) != after.get(PATIENCE) else []
    may = (*MAY_CHANGE, *changed, *find_moved(before, after), *other_engine(before, after))
    changes = differences(before, after, may)
    if changes:
        raise RunError(
            f"{out}: {'; '.join(changes)}; a resumed run keeps its recipe, of which only "
            f"{' and '.join(LENGTHS)} may grow and {PATIENCE} may change"
        )
    return changed


def has_ended(result: Mapping[str, Any], changed: Sequence[str]) -> bool:
    """Whether a run with this result has nothing left to do, though its length changed."""
    more = [name for name in changed if name in LENGTHS or result["train"]["ended"] == "patience"]
    return not (more or result["interrupted"])


def read_resumable(
    out: Path, overrides: Sequence[str] = (), *, trust_scorer: bool = False
) -> Recipe:
    """The recipe of a run that can be resumed. Raises `RunError` and `RecipeError`."""
    require_run(out)
    whole = out.resolve().parent
    if (whole / "events.jsonl").is_file() and (whole / "recipe.toml").is_file():
        tasks = read_toml(whole / "recipe.toml").get("tasks", [])
        if any(task.get("name") == out.resolve().name for task in tasks):
            raise RunError(
                f"{out}: was trained with the other tasks of {out.parent}; "
                f"`embedgrad resume {out.parent}` resumes it"
            )
    return Recipe.read_run(out, overrides, trust_scorer=trust_scorer)


def read_finished(recipe: Recipe, out: Path) -> RunResult | None:
    """The result of the run in a folder if it has nothing left to do. Raises `RunError`."""
    changed = changed_length(read_resumable(out), recipe, out)
    versions = {"result.json": RESULT_VERSION, "prompt/prompt.json": artifact.VERSION}
    values: dict[str, Any] = {}
    for name, known in versions.items():
        values[name] = read_object(out / name)
        version = values[name].get("version")
        if version not in (None, known):
            raise RunError(
                f"{out / name}: written by another embedgrad (version {version!r}, this one reads "
                f"{known}); resume with the one that wrote it, or start a new run"
            )
    try:
        result: RunResult = values["result.json"]
        done = has_ended(result, changed) and "version" in result and "steps" in result["train"]
    except (KeyError, TypeError):
        return None  # scored again, which writes it again
    return {**result, "artifact": str(out / "prompt")} if done else None


def drop_events(path: Path, step: int) -> None:
    """Take the events after a step out of a log: the resumed run reports them again."""
    if path.is_file():
        kept = [
            f"{json.dumps(event)}\n"
            for _, event in json_lines(path)
            if event and event.get("event") not in (None, "end", "scoring")
            if not is_number(event.get("step")) or event["step"] <= step
        ]
        write_file(path, "".join(kept).encode())


def describe_interruption(result: Mapping[str, Any], out: Path) -> str:
    """What an interrupted run in `out` leaves, in one line."""
    train, artifact_folder = result["train"], result["artifact"]
    if train["best_step"]:
        rows = f"the best rows so far, of step {train['best_step']}"
    else:
        began = "the text prompt's own rows" if kept_text(result) else "the rows of its warm start"
        rows = f"{began}, as no others scored better on dev"
    return (
        f"interrupted at step {train['steps']}; {artifact_folder} holds {rows}; "
        f"`embedgrad resume {out}` continues the run"
    )
