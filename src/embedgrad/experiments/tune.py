"""Tune settings of a recipe on dev, by Optuna, in one process or several.

STUDY/journal.log   every trial, as Optuna's journal storage writes it, or an SQL database
STUDY/trials.json   the trials, best first
STUDY/best.toml     the recipe with the best settings
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict, final

from filelock import FileLock

from embedgrad.atomic_files import finite, write_file, write_json
from embedgrad.environment import may_run, process_name
from embedgrad.errors import (
    DataError,
    EmbedgradError,
    OptionError,
    RecipeError,
    RunError,
    nearest,
    one_line,
)
from embedgrad.events import Report, quiet, say, stage
from embedgrad.experiments.tuned_setting import Setting
from embedgrad.model.language_model import LanguageModel
from embedgrad.recipe.build import KeptModel, prepare
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.report.figures.series import METRICS
from embedgrad.report.page.study import TRIALS
from embedgrad.report.terminal.bars import show
from embedgrad.training.optimize import optimize
from embedgrad.training.selection import LOWER_IS_BETTER

JOURNAL, BEST = "journal.log", "best.toml"
DEATHS = 3  # of a process by the same settings
UNNAMED = timedelta(minutes=1)  # after which the process of a trial that names none is gone
COSTS = ("tokens", "seconds")  # objectives besides those on dev: of the prompt, of the training


@final
class Tuned(TypedDict):
    """The content of `trials.json`: the trials, best first, and where the best recipe is.

    Of several objectives those in `lower` are better where they are lower, and the `front` of a
    trial says that no other one beats it in all of them.
    """

    metric: str
    objectives: list[str]
    lower: list[str]
    settings: dict[str, dict[str, Any]]
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
    objectives: Sequence[str] = (),
    storage: str | None = None,
) -> Tuned:
    """Train a recipe with other settings again and again, and keep those that do best on dev.

    TPE suggests the settings, the median of earlier trials' dev scores stops the worse ones early,
    and no test row is scored. The same call in another process shares the study and its `trials`;
    a trial whose process died is begun again. `objectives` are scores on dev or `COSTS`, in place
    of the training's metric; with several, no trial is stopped early. `storage` is the URL of an
    SQL database in place of a file in `out`. Raises `RecipeError`, `RunError` for a folder of
    another study, and what the recipe's data and model raise.
    """
    space = [Setting.parse(text) for text in over]
    recipe = Recipe.read(path, overrides)
    metrics = _check(path, overrides, space, recipe)
    if len(metrics) > 1 and not objectives:
        raise _differing(*metrics)
    for name in objectives:
        if name not in (*METRICS, *COSTS):
            known = nearest(name, (*METRICS, *COSTS))
            raise OptionError(f"--objective: unknown {name!r}; {known}")
    out.mkdir(parents=True, exist_ok=True)
    study = _open(out, recipe, space, objectives, storage)
    kept = KeptModel()
    failure: EmbedgradError | None = None
    while (begun := _begin(study, out, trials, report)) is not None:
        trial, number = begun
        study.sampler = _sampler(seed, trial.number)
        settings = [f"{setting.name}={setting.suggest(trial)}" for setting in space]
        stage(report, f"trial {number + 1} of {trials}: {', '.join(settings)}")
        with _lost_on_interruption(study, trial):
            try:
                one = Recipe.read(path, [*overrides, *settings])
                _run(one, kept.open(one, report), study, trial, report, objectives)
            except EmbedgradError as error:
                failure = error
                say(report, [f"trial {number + 1} failed: {error}"])
                _tell(study, trial, "FAIL")
    found = _write(study, out, path, overrides, space, objectives)
    if not found["trials"] and failure is not None:
        raise failure
    return found


def _check(
    path: Path, overrides: Sequence[str], space: Sequence[Setting], recipe: Recipe
) -> list[str]:
    """What the values would be judged by on dev. Raises for those that the recipe does not take."""
    if not space:
        raise OptionError("--over: name at least one setting to tune, as NAME=LOW..HIGH")
    names = [setting.name for setting in space]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise OptionError(f"--over: {twice[0]} twice; name it once")
    metrics = list[str]()
    for setting in space:
        for value in setting.ends:
            one = Recipe.read(path, [*overrides, f"{setting.name}={value}"])
            objective, choices = one.parts.objective, bool(one.target.choices)
            source = one.solutions.source
            metrics.append(one.training.metric_for(objective, choices=choices, source=source))
            if one.place == AUTO:
                raise RecipeError(
                    "template.place", ["'auto' needs a trial of its own; tune over the places"]
                )
    if recipe.data.dev is None and not recipe.data.dev_share:
        raise DataError("data.dev: no dev rows, which judge the trials; set data.dev_share")
    return list(dict.fromkeys(metrics))


def _differing(first: str, other: str, *_: str) -> OptionError:
    return OptionError(
        f"--over: dev decides by {first} with some values and by {other} with others; set "
        "training.metric, or name an --objective for all"
    )


def _open(
    out: Path,
    recipe: Recipe,
    space: Sequence[Setting],
    objectives: Sequence[str] = (),
    url: str | None = None,
) -> Any:
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
    try:
        storage = url or optuna.storages.JournalStorage(
            JournalFileBackend(str(out / JOURNAL), lock_obj=lock)
        )
        study = optuna.create_study(
            study_name="tune",
            storage=storage,
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
            directions=["maximize"] * max(1, len(objectives)),
        )
    except Exception as error:
        if url is None:
            raise
        raise RunError(
            f"--storage: cannot be used ({one_line(error)}); give a URL as SQLAlchemy writes it, "
            "for example sqlite:///study.db"
        ) from error
    told = [recipe.as_dict(out), [vars(setting) for setting in space], *objectives]
    text = json.dumps(told, sort_keys=True)
    made_from = hashlib.sha256(text.encode()).hexdigest()
    if study.user_attrs.get("made_from", made_from) != made_from:
        raise RunError(f"{out}: holds a study of another recipe or space; choose another folder")
    study.set_user_attr("made_from", made_from)
    return study


def _sampler(seed: int, number: int) -> Any:
    """Where a trial's settings come from: a stream of its own, whichever process asks."""
    from optuna.samplers import TPESampler

    return TPESampler(seed=1_000_003 * seed + number, constant_liar=True)


def _run(
    recipe: Recipe,
    model: LanguageModel,
    study: Any,
    trial: Any,
    report: Report,
    objectives: Sequence[str],
) -> None:
    """Train with a trial's settings, as long as it looks worth it."""
    ready = prepare(recipe, None, quiet, model=model)
    metric, seen, stops = ready.training.metric, 0, False
    names = list(objectives) or [metric]
    # 'auto' may depend on the data too.
    if not objectives and (first := study.user_attrs.get("metric", metric)) != metric:
        raise _differing(first, metric)
    study.set_user_attr("metric", metric)

    def worth(values: Mapping[str, float]) -> list[float]:
        if lacking := [name for name in names if name not in values]:
            raise OptionError(f"--objective: the recipe has no {lacking[0]} on dev")
        return [-values[name] if _is_lower(name) else values[name] for name in names]

    def watch(event: dict[str, Any]) -> None:
        nonlocal seen, stops
        if event["event"] == "evaluation" and len(names) == 1 and names[0] in event["best"]:
            trial.report(*worth(event["best"]), seen)
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
    tokens = refinement.prompt.rows.shape[-2]
    values = {**best, "tokens": tokens, "seconds": refinement.seconds}
    trial.set_user_attr("metric", metric)
    trial.set_user_attr("dev", finite(best))
    trial.set_user_attr("values", finite({name: values[name] for name in names if name in values}))
    if refinement.ended == "stopped":
        _tell(study, trial, "PRUNED")
    else:
        study.tell(trial, worth(values))


def _write(
    study: Any,
    out: Path,
    path: Path,
    overrides: Sequence[str],
    space: Sequence[Setting],
    objectives: Sequence[str],
) -> Tuned:
    """Write the trials, best first, and the best recipe. Equal trials: the lower log-loss first."""
    found = []
    front = {trial.number for trial in study.best_trials} if len(objectives) > 1 else set()
    for trial in study.trials:
        if trial.state.name not in ("COMPLETE", "PRUNED") or "dev" not in trial.user_attrs:
            continue
        tried = {s.name: trial.params[s.name] for s in space}
        kept = {name: trial.user_attrs[name] for name in ("dev", "values")}
        ended = {"pruned": trial.state.name == "PRUNED", "front": trial.number in front}
        found.append({"trial": trial.number, **tried, **kept, **ended})
    metrics = {trial.user_attrs.get("metric") for trial in study.trials} - {None}
    metric = min(metrics, default="accuracy")
    names = list(objectives) or [metric]
    sign = 1 if _is_lower(names[0]) else -1

    def rank(trial: dict[str, Any]) -> tuple[Any, ...]:
        first, second = trial["values"][names[0]], trial["dev"]["log_loss"]
        worst = math.inf  # None: not finite
        rest = worst if first is None else sign * first, worst if second is None else second
        return trial["pruned"], not trial["front"], *rest

    found.sort(key=rank)
    tuned: Tuned = {
        "metric": metric,
        "objectives": names,
        "lower": [name for name in names if _is_lower(name)],
        "settings": {s.name: {"log": s.log, "values": list(s.values)} for s in space},
        "trials": found,
        "recipe": str(out / BEST),
    }
    write_json(out / TRIALS, tuned)
    if found:
        settings = [
            f"{s.name}={found[0][s.name] if s.values else json.dumps(found[0][s.name])}"
            for s in space
        ]
        best = Recipe.read(path, [*overrides, *settings])
        write_file(out / BEST, best.as_toml(out).encode())
    return tuned


def _is_lower(objective: str) -> bool:
    return objective in (*LOWER_IS_BETTER, *COSTS)


def _begin(study: Any, out: Path, trials: int, report: Report) -> tuple[Any, int] | None:
    """The next trial, and how many were begun before; None where there are `trials`.

    A trial whose process has died here is begun again, unless its settings did so `DEATHS` times.
    """
    with FileLock(out / f"{JOURNAL}.lost.lock"):  # by one process only
        for trial in study.trials:
            if trial.state.name == "RUNNING" and _is_dead(trial):
                _bury(study, trial, report)
        lost = study.user_attrs
        begun = [t.state.name != "WAITING" and f"lost {t.number}" not in lost for t in study.trials]
        if sum(begun) >= trials:
            return None
        trial = study.ask()
        trial.set_user_attr("worker", process_name())
        return trial, sum(begun)


def _is_dead(trial: Any) -> bool:
    """Whether a trial's process is gone, as far as can be told from here."""
    if worker := trial.user_attrs.get("worker"):
        return not may_run(worker)
    # Its process died before it said who it is.
    return bool(datetime.now() - trial.datetime_start > UNNAMED)


def _bury(study: Any, trial: Any, report: Report) -> None:
    study.set_user_attr(f"died {trial.number}", True)
    died = study.user_attrs
    deaths = sum(t.params == trial.params for t in study.trials if f"died {t.number}" in died)
    if deaths < DEATHS:
        _lose(study, trial)
    else:
        say(report, [f"trial {trial.number + 1} failed: its process died {deaths} times"])
        _tell(study, trial, "FAIL")


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
