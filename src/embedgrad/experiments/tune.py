"""Tune settings of a recipe on dev, by Optuna, in one process or several.

STUDY/journal.log   every trial, as Optuna's journal storage writes it
STUDY/trials.json   the trials, best first
STUDY/best.toml     the recipe with the best settings
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, final

from filelock import FileLock

from embedgrad.atomic_files import finite, write_file, write_json
from embedgrad.data.bounded_reads import parse_toml
from embedgrad.environment import is_running
from embedgrad.errors import DataError, EmbedgradError, OptionError, RecipeError, RunError
from embedgrad.events import Report, quiet, say, stage
from embedgrad.model.language_model import LanguageModel
from embedgrad.recipe.build import KeptModel, prepare
from embedgrad.recipe.overrides import as_toml
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.report.terminal.bars import show
from embedgrad.training.optimize import optimize
from embedgrad.training.selection import LOWER_IS_BETTER

JOURNAL, TRIALS, BEST = "journal.log", "trials.json", "best.toml"


@final
@dataclass(frozen=True)
class Setting:
    """A setting, and what it may be: a range of numbers, or one of several values as TOML."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read NAME=LOW..HIGH, NAME=LOW..HIGH log, or NAME=[VALUE, ...]. Raises `RecipeError`."""
        name, _, given = (part.strip() for part in text.partition("="))
        try:
            if given.startswith("["):
                values = tuple(as_toml(value) for value in parse_toml(f"v = {given}")["v"])
                if len(set(values)) < 2:
                    raise ValueError("expected two values or more")
                return cls(name, values=values)
            bounds, _, scale = given.partition(" ")
            low, high = (parse_toml(f"v = {part}")["v"] for part in bounds.split(".."))
            log = scale.strip() == "log"
            numbers = {type(low), type(high)} <= {int, float}
            if (
                not (numbers and low < high)
                or (log and low <= 0)
                or scale.strip() not in ("", "log")
            ):
                raise ValueError("expected LOW < HIGH, and with log 0 < LOW")
            whole = isinstance(low, int) and isinstance(high, int)
            return cls(name, low, high, log=log, whole=whole)
        except (ValueError, TypeError) as error:
            why = f"{text!r}: {error}; write NAME=LOW..HIGH, NAME=LOW..HIGH log or NAME=[A, B]"
            raise RecipeError("--over", [why]) from error

    @property
    def ends(self) -> tuple[str, ...]:
        """Values to try whether the recipe takes them."""
        return self.values or (json.dumps(self.low), json.dumps(self.high))

    def suggest(self, trial: Any) -> str:
        """A value for a trial, as TOML."""
        if self.values:
            return str(trial.suggest_categorical(self.name, self.values))
        draw = trial.suggest_int if self.whole else trial.suggest_float
        return json.dumps(draw(self.name, self.low, self.high, log=self.log))


@final
class Tuned(TypedDict):
    """The content of `trials.json`: the trials, best first, and where the best recipe is."""

    metric: str
    trials: list[dict[str, Any]]
    recipe: str


def tune(
    path: Path,
    out: Path,
    over: Sequence[str],
    report: Report = show,
    *,
    trials: int = 20,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Tuned:
    """Train a recipe with other settings again and again, and keep those that do best on dev.

    TPE suggests the settings, the median of earlier trials' dev scores stops the worse ones early,
    and no test row is read. The same call in another process shares the study: together they run
    `trials` trials, and what a process that died had begun is begun again. Raises `RecipeError`
    for settings that the recipe does not take, `RunError` for a folder of another study, and what
    the recipe's data and model raise.
    """
    space = [Setting.parse(text) for text in over]
    recipe = Recipe.read(path, overrides)
    _check(path, overrides, space, recipe)
    out.mkdir(parents=True, exist_ok=True)
    study = _open(out, recipe, space, seed)
    kept = KeptModel()
    failure: EmbedgradError | None = None
    while (number := _begun(study, out)) < trials:
        trial = study.ask()
        trial.set_user_attr("worker", _process())
        settings = [f"{setting.name}={setting.suggest(trial)}" for setting in space]
        stage(report, f"trial {number + 1} of {trials}: {', '.join(settings)}")
        with _lost_on_interruption(study, trial):
            try:
                one = Recipe.read(path, [*overrides, *settings])
                _run(one, kept.open(one, report), study, trial, report)
            except EmbedgradError as error:
                failure = error
                say(report, [f"trial {number + 1} failed: {error}"])
                _tell(study, trial, "FAIL")
    found = _write(study, out, path, overrides, space)
    if not found["trials"] and failure is not None:
        raise failure
    return found


def _check(path: Path, overrides: Sequence[str], space: Sequence[Setting], recipe: Recipe) -> None:
    if not space:
        raise OptionError("--over: name at least one setting to tune, as NAME=LOW..HIGH")
    names = [setting.name for setting in space]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise OptionError(f"--over: {twice[0]} twice; name it once")
    for setting in space:
        for value in setting.ends:
            one = Recipe.read(path, [*overrides, f"{setting.name}={value}"])
            if one.place == AUTO:
                raise RecipeError(
                    "template.place", ["'auto' needs a trial of its own; tune over the places"]
                )
    if recipe.data.dev is None and not recipe.data.dev_share:
        raise DataError("data.dev: no dev rows, which judge the trials; set data.dev_share")


def _open(out: Path, recipe: Recipe, space: Sequence[Setting], seed: int) -> Any:
    """The study in a folder. Raises `OptionError` without Optuna, `RunError` for another one."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        why = "Optuna is not installed; pip install 'embedgrad[tune]'"
        raise OptionError(f"tune: {why}") from error

    # The system's lock, which ends with its process; Optuna's own outlive a killed one.
    lock: Any = FileLock(out / f"{JOURNAL}.lock")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name="tune",
        storage=optuna.storages.JournalStorage(
            JournalFileBackend(str(out / JOURNAL), lock_obj=lock)
        ),
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        direction="maximize",
    )
    text = json.dumps([recipe.as_dict(out), [vars(setting) for setting in space]], sort_keys=True)
    made_from = hashlib.sha256(text.encode()).hexdigest()
    if study.user_attrs.get("made_from", made_from) != made_from:
        raise RunError(f"{out}: holds a study of another recipe or space; choose another folder")
    study.set_user_attr("made_from", made_from)
    # A stream of its own for every call that takes part, by its place in the journal.
    own = f"call {len(study.user_attrs)} of {_process()}"
    study.set_user_attr(own, True)
    stream = list(study.user_attrs).index(own)
    study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + stream, constant_liar=True)
    return study


def _run(recipe: Recipe, model: LanguageModel, study: Any, trial: Any, report: Report) -> None:
    """Train with a trial's settings, as long as it looks worth it."""
    ready = prepare(recipe, None, quiet, model=model)
    metric, seen, stops = ready.training.metric, 0, False

    def worth(score: Mapping[str, float]) -> float:
        return -score[metric] if metric in LOWER_IS_BETTER else score[metric]

    def watch(event: dict[str, Any]) -> None:
        nonlocal seen, stops
        if event["event"] == "evaluation":
            trial.report(worth(event["best"]), seen)
            seen, stops = seen + 1, trial.should_prune()
        if event["event"] != "end":
            report(event)

    refinement = optimize(
        *(ready.model, ready.sequencer, ready.train, ready.dev),
        training=ready.training,
        parts=ready.parts,
        evaluation=recipe.evaluation,
        start=ready.start,
        teacher=ready.teacher,
        warm_start=read_warm_start(recipe, ready.model, ready.sequencer),
        report=watch,
        should_stop=lambda: stops,
    )
    if refinement.ended == "interrupted":
        raise KeyboardInterrupt
    best = refinement.best.score
    trial.set_user_attr("metric", metric)
    trial.set_user_attr("dev", finite(best))
    if refinement.ended == "stopped":
        _tell(study, trial, "PRUNED")
    else:
        study.tell(trial, worth(best))


def _write(
    study: Any, out: Path, path: Path, overrides: Sequence[str], space: Sequence[Setting]
) -> Tuned:
    """Write the trials, best first, and the best recipe. Equal trials: the lower log-loss first."""
    found = []
    for trial in study.trials:
        if trial.state.name not in ("COMPLETE", "PRUNED") or "dev" not in trial.user_attrs:
            continue
        tried = {s.name: trial.params[s.name] for s in space}
        dev, pruned = trial.user_attrs["dev"], trial.state.name == "PRUNED"
        found.append({"trial": trial.number, **tried, "dev": dev, "pruned": pruned})
    metrics = {trial.user_attrs.get("metric") for trial in study.trials} - {None}
    metric = min(metrics, default="accuracy")
    sign = 1 if metric in LOWER_IS_BETTER else -1
    found.sort(key=lambda t: (t["pruned"], sign * t["dev"][metric], t["dev"]["log_loss"]))
    tuned: Tuned = {"metric": metric, "trials": found, "recipe": str(out / BEST)}
    write_json(out / TRIALS, tuned)
    if found:
        settings = [
            f"{s.name}={found[0][s.name] if s.values else json.dumps(found[0][s.name])}"
            for s in space
        ]
        best = Recipe.read(path, [*overrides, *settings])
        write_file(out / BEST, best.as_toml(out).encode())
    return tuned


def _process() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _begun(study: Any, out: Path) -> int:
    """How many trials ended or are on their way, without those that were lost.

    Those whose process is gone from this machine are lost now, and will be begun again.
    """
    with FileLock(out / f"{JOURNAL}.lost.lock"):  # by one process only
        for trial in study.trials:
            host, _, pid = trial.user_attrs.get("worker", "").partition(" ")
            here = host == socket.gethostname()
            if here and trial.state.name == "RUNNING" and not is_running(int(pid)):
                _lose(study, trial)
    lost = study.user_attrs
    return sum(t.state.name != "WAITING" and f"lost {t.number}" not in lost for t in study.trials)


def _lose(study: Any, trial: Any) -> None:
    study.set_user_attr(f"lost {trial.number}", True)
    _tell(study, trial, "FAIL")
    study.enqueue_trial(trial.params)


def _tell(study: Any, trial: Any, state: str) -> None:
    from optuna.trial import TrialState

    study.tell(trial.number, state=TrialState[state])


@contextmanager
def _lost_on_interruption(study: Any, trial: Any) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _lose(study, trial)
        raise
