"""`embedgrad tune`: what is tried, what comes out, and what a process that dies leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedgrad import load
from embedgrad.cli import main
from embedgrad.environment import process_name
from embedgrad.errors import DivergenceError, RecipeError, RunError
from embedgrad.events import quiet
from embedgrad.experiments import tune as tuning
from embedgrad.experiments.tune import tune
from embedgrad.experiments.tuned_setting import Setting
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.figures import study as figures
from embedgrad.report.terminal.tables import show as print_table
from embedgrad.report.terminal.trials_table import trials_table
from forked import Child
from refusals import refused
from run_kit import Command

optuna = pytest.importorskip("optuna")
pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
RATE = "optimizer.learning_rate=0.01..0.2 log"
SIZE = "training.batch_size=[4, 8]"


def trials_of(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "trials.json").read_text("utf-8"))["trials"]
    assert isinstance(found, list)
    return found


def tried(trial: dict[str, Any]) -> tuple[Any, ...]:
    return trial["optimizer.learning_rate"], trial["training.batch_size"]


# ------------------------------------------------------------------------------------------ values


def test_a_setting_says_what_it_may_be() -> None:
    rate, size = Setting.parse(RATE), Setting.parse("training.batch_size = 4..12")
    assert (rate.low, rate.high, rate.log, rate.whole) == (0.01, 0.2, True, False)
    assert (size.low, size.high, size.log, size.whole) == (4, 12, False, True)
    part = Setting.parse('objective=["cross_entropy", {name = "cross_entropy", over = "choices"}]')
    assert part.values == ('"cross_entropy"', '{name = "cross_entropy", over = "choices"}')


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a=1",
            "a=2..1",
            "a=0..1 log",
            "a=[1]",
            "a=1..2 linear",
            "a=x..y",
            "a",
            "a=[",
            "a=1..2..3",
        ),
        *("a=false..true", "a=2026-01-01..2026-02-01", "a=0.1..nan", f"a={'[' * 5000}"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with refused("--over", text, "write NAME=LOW..HIGH", error=RecipeError):
        Setting.parse(text)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ("training.batch_size=0..4", "training.batch_size"),
        ('optimizer=["adamw", "adam"]', "optimizer.name"),
        ('template.place=["auto", "user"]', "template.place"),
        ("training.size=1..4", "training.size"),
    ],
)
def test_values_that_the_recipe_does_not_take_are_refused_before_any_trial(
    over: str, says: str, recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    done = embedgrad("tune", recipe(), "--over", over, "--out", tmp_path / "study")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "study").exists()


def test_a_setting_that_is_named_twice_is_refused(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    over = ("--over", SIZE, "--over", "training.batch_size=[4, 7]")
    done = embedgrad("tune", recipe(), *over, "--out", tmp_path / "study")
    assert (done.code, done.lines) == (
        2,
        ["error: --over: training.batch_size twice; name it once"],
    )
    assert not (tmp_path / "study").exists()


def test_values_that_dev_would_judge_by_other_scores_are_refused(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    matrix = "costs = [[0.0, 9.0], [1.0, 0.0]]"
    regret = f'{{name = "regret", decision = "cost_matrix", {matrix}}}'
    over = ("--over", f'objective=["cross_entropy", {regret}]', "--trials", "2", "--quiet")
    call = ("tune", recipe(training={"steps": 1}), *over, "--out", tmp_path / "study")
    done = embedgrad(*call)
    assert (done.code, len(done.lines)) == (2, 1)
    assert "--over: dev decides by accuracy with some values and by regret with" in done.err
    assert not (tmp_path / "study").exists()
    done = embedgrad(*call, "--objective", "accuracy", "--json")
    assert done.code == 0, done.err
    assert {trial["objective"] for trial in done.json["trials"]} <= {'"cross_entropy"', regret}


def test_trials_that_only_the_data_gives_another_score_fail(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `solutions.source = "auto"` means another source for other answers."""
    prepare, notes, metrics = tuning.prepare, list[str](), iter(("accuracy", "log_loss"))

    def prepared(*arguments: Any, **options: Any) -> Any:
        ready = prepare(*arguments, **options)
        return replace(ready, training=replace(ready.training, metric=next(metrics)))

    monkeypatch.setattr(tuning, "prepare", prepared)
    note = lambda event: notes.append(event.get("text", ""))  # noqa: E731
    found = tune(recipe(training={"steps": 1}), tmp_path / "study", [RATE], note, trials=2)
    assert (found["metric"], len(found["trials"])) == ("accuracy", 1)
    assert any("dev decides by accuracy with some values and by log_loss" in n for n in notes)


# ----------------------------------------------------------------------------------------- a study


def test_a_study_writes_the_best_recipe_and_goes_on_where_it_was(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path, out = recipe(training={"epochs": 1}), tmp_path / "study"
    command = ("tune", path, "--over", RATE, "--over", SIZE, "--out", out, "--quiet")
    first = embedgrad(*command, "--trials", "2")
    assert first.code == 0, first.err
    assert "2 trials by dev accuracy; the best recipe is" in " ".join(first.out.split())
    begun = {tried(trial) for trial in trials_of(out)}
    again = embedgrad(*command, "--trials", "3", "--json").json
    assert len(again["trials"]) == 3
    assert begun < {tried(trial) for trial in again["trials"]}
    best, *others = again["trials"]
    scores = [
        (-t["dev"]["accuracy"], t["dev"]["log_loss"]) for t in (best, *others) if not t["pruned"]
    ]
    assert scores == sorted(scores)
    written = Recipe.read(out / "best.toml")
    assert written.parts.optimizer.learning_rate == best["optimizer.learning_rate"]
    assert written.training.batch_size == json.loads(best["training.batch_size"])
    assert "test" in tomllib.loads((out / "best.toml").read_text("utf-8"))["data"]
    other = embedgrad("tune", path, "--over", SIZE, "--out", out)
    assert other.code == 2
    (line,) = other.lines[-1:]
    assert "holds a study of another recipe or space" in line


def test_a_trial_that_looks_bad_is_stopped_early(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def prune(self: Any, study: Any, trial: Any) -> bool:
        asked.append(trial.last_step)
        return trial.last_step == 1

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", prune)
    path = recipe(training={"epochs": 4})
    found = tune(path, tmp_path / "study", [RATE], lambda event: None, trials=1)
    assert asked == [0, 1]
    (trial,) = found["trials"]
    assert trial["pruned"] is True
    assert trial["dev"]["step"] <= 3 < 12


def test_a_trial_that_fails_ends_no_study(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize, notes, calls = tuning.optimize, list[str](), list[int]()

    def sometimes(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise DivergenceError("step 1: the loss is nan")
        return optimize(*arguments, **options)

    monkeypatch.setattr(tuning, "optimize", sometimes)
    note = lambda event: notes.append(event.get("text", ""))  # noqa: E731
    path = recipe(training={"steps": 1})
    found = tune(path, tmp_path / "study", [RATE], note, trials=2)
    assert [trial["trial"] for trial in found["trials"]] == [1]
    assert "trial 1 failed: step 1: the loss is nan" in notes

    calls.clear()
    monkeypatch.setattr(tuning, "optimize", lambda *a, **o: sometimes(calls.clear()))
    with refused("the loss is nan", error=DivergenceError):
        tune(path, tmp_path / "other", [RATE], note, trials=2)


def test_the_place_of_the_span_is_a_setting(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(training={"steps": 1}, template={"user": "{review}\n\n[[Is it positive?]]"})
    over = ("--over", 'template.place=["system", "before"]', "--objective", "log_loss")
    call = ("tune", path, *over, "--trials", "4")
    found = embedgrad(*call, "--out", tmp_path / "study", "--json", "--quiet").json
    losses = {t["template.place"]: t["values"]["log_loss"] for t in found["trials"]}
    assert losses.keys() == {'"system"', '"before"'}
    assert len(set(losses.values())) == 2  # they are other prompts
    best = min(losses, key=lambda name: losses[name])
    out = tmp_path / "run"
    assert embedgrad("optimize", tmp_path / "study" / "best.toml", "--out", out).code == 0
    template = load(out).template
    in_system = any(m.role == "system" and "[[" in m.content for m in template.messages)
    assert in_system is (best == '"system"')


def test_of_several_objectives_those_are_kept_that_no_other_one_beats(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    words = "[[Is the review positive?]]", "[[Is the review positive or negative?]]"
    texts = json.dumps([f"{{review}} {text}" for text in words])
    call = ("tune", recipe(training={"steps": 1}), "--over", f"template.user={texts}")
    goals = ("--objective", "log_loss", "--objective", "tokens", "--trials", "3", "--json")
    found = embedgrad(*call, *goals, "--out", tmp_path / "study", "--quiet").json
    assert (found["objectives"], found["lower"]) == (["log_loss", "tokens"], ["log_loss", "tokens"])
    values = [(t["values"]["log_loss"], t["values"]["tokens"]) for t in found["trials"]]
    assert len({tokens for _, tokens in values}) == 2  # the length of the span is a setting
    for (loss, tokens), trial in zip(values, found["trials"], strict=True):
        beaten = any(a <= loss and b <= tokens and (a, b) != (loss, tokens) for a, b in values)
        assert trial["front"] is not beaten
    fronts = [loss for (loss, _), t in zip(values, found["trials"], strict=True) if t["front"]]
    assert fronts == sorted(fronts)
    assert values[0][0] == min(fronts)
    best = (tmp_path / "study" / "best.toml").read_text("utf-8")
    assert json.loads(found["trials"][0]["template.user"]) in best


def test_an_objective_that_there_is_not_is_refused(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    call = ("tune", recipe(), "--over", RATE, "--out", tmp_path / "study", "--objective", "loss")
    done = embedgrad(*call)
    assert (done.code, done.lines) == (
        2,
        [
            "error: --objective: unknown 'loss'; did you mean 'log_loss'? known: accuracy, "
            "log_loss, macro_f1, regret, seconds, tokens"
        ],
    )


def test_a_database_holds_a_study_that_two_folders_share(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path, url = recipe(training={"steps": 1}), f"sqlite:///{tmp_path / 'study.db'}"
    call = ("tune", path, "--over", RATE, "--storage", url, "--quiet", "--json", "--out")
    here = embedgrad(*call, tmp_path / "a", "--trials", "1").json["trials"]
    there = embedgrad(*call, tmp_path / "b", "--trials", "2").json["trials"]
    assert (len(here), len(there)) == (1, 2)
    assert here[0]["dev"] in [trial["dev"] for trial in there]
    assert len({trial["optimizer.learning_rate"] for trial in there}) == 2
    assert not (tmp_path / "a" / "journal.log").exists()
    wrong = embedgrad(*call[:-1], "--storage", "nosuch://db", "--out", tmp_path / "c")
    assert wrong.code == 2
    assert wrong.lines[-1].startswith("error: --storage: cannot be used (")


# ------------------------------------------------------------------------ several, and interrupted


def test_an_interrupted_trial_is_tried_again_with_the_same_settings(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    optimize = tuning.optimize

    def stopped(*arguments: Any, **options: Any) -> Any:
        given.append(options["parts"].optimizer.learning_rate)
        if len(given) == 1:
            raise KeyboardInterrupt
        return optimize(*arguments, **options)

    monkeypatch.setattr(tuning, "optimize", stopped)
    command = ("tune", recipe(training={"steps": 1}), "--over", RATE, "--out", tmp_path / "study")
    first = embedgrad(*command, "--trials", "1", "--quiet")
    assert first.code == 130
    assert first.lines == [f"interrupted; the same command continues in {tmp_path / 'study'}"]
    assert embedgrad(*command, "--trials", "1", "--quiet").code == 0
    assert given == [given[0]] * 2
    assert len(trials_of(tmp_path / "study")) == 1


def test_what_a_killed_process_had_begun_is_begun_again(recipe: Write, tmp_path: Path) -> None:
    path, out = recipe(training={"steps": 1}), tmp_path / "study"
    tune(path, out, [RATE], lambda event: None, trials=1)
    space = [Setting.parse(RATE)]
    study = tuning._open(out, Recipe.read(path), space)
    lost = study.ask()
    settings = space[0].suggest(lost)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lost.set_user_attr("worker", process_name(gone.pid))
    found = tune(path, out, [RATE], lambda event: None, trials=2)
    assert [trial["trial"] for trial in sorted(found["trials"], key=lambda t: t["trial"])] == [0, 2]
    assert json.loads(settings) in [t["optimizer.learning_rate"] for t in found["trials"]]


def losing(study: Any) -> Any:
    """A trial of a process that has ended; not waited for, it is a zombie."""
    gone = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert gone.stdout is not None
    with gone.stdout:
        gone.stdout.read()
    trial = study.ask()
    trial.set_user_attr("worker", process_name(gone.pid))
    return gone


def test_a_trial_that_is_lost_meanwhile_is_begun_again(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gone = tuning._run, []

    def lose(one: Recipe, model: Any, study: Any, trial: Any, *others: Any) -> None:
        if not trial.number:
            gone.append(losing(study))
        run(one, model, study, trial, *others)

    monkeypatch.setattr(tuning, "_run", lose)
    path = recipe(training={"steps": 1})
    found = tune(path, tmp_path / "study", [RATE], lambda event: None, trials=2)
    gone[0].wait()
    assert sorted(trial["trial"] for trial in found["trials"]) == [0, 2]


def test_a_process_that_died_before_it_said_who_it_is_costs_no_trial(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tuning._open(tmp_path, Recipe.read(recipe()), [Setting.parse(RATE)])
    study.ask()
    assert tuning._begin(study, tmp_path, 1, quiet) is None  # it may be about to say it
    monkeypatch.setattr(tuning, "UNNAMED", timedelta(0))
    begun = tuning._begin(study, tmp_path, 1, quiet)
    assert begun is not None
    assert (begun[0].number, begun[1]) == (1, 0)


def test_two_processes_that_start_together_bring_a_trial_back_once(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recipe.read(recipe())
    studies = [tuning._open(tmp_path, made, [Setting.parse(RATE)]) for _ in range(2)]
    gone, lose = losing(studies[0]), tuning._lose

    def slowly(study: Any, trial: Any) -> None:
        time.sleep(0.2)
        lose(study, trial)

    monkeypatch.setattr(tuning, "_lose", slowly)
    with ThreadPoolExecutor(2) as threads:
        begun = threads.map(lambda study: tuning._begin(study, tmp_path, 0, quiet), studies)
        assert list(begun) == [None, None]
    gone.wait()
    assert [trial.state.name for trial in studies[0].trials] == ["FAIL", "WAITING"]


def test_settings_that_end_every_process_fail_in_the_end(recipe: Write, tmp_path: Path) -> None:
    study = tuning._open(tmp_path, Recipe.read(recipe()), [Setting.parse(RATE)])
    told: list[dict[str, Any]] = []
    for _ in range(tuning.DEATHS):
        gone = losing(study)
        assert tuning._begin(study, tmp_path, 0, told.append) is None
        gone.wait()
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * tuning.DEATHS
    assert [event["text"] for event in told] == ["trial 3 failed: its process died 3 times"]


def test_a_score_that_is_not_finite_is_the_worst(recipe: Write, tmp_path: Path) -> None:
    space, trials = [Setting.parse(RATE)], []
    for number, loss in enumerate((None, 0.7)):
        known = {"dev": {"accuracy": 0.5, "log_loss": loss}, "values": {"log_loss": loss}}
        state = SimpleNamespace(name="COMPLETE")
        of = {"params": {space[0].name: 0.1}, "user_attrs": known}
        trials.append(SimpleNamespace(number=number, state=state, **of))
    study = SimpleNamespace(best_trials=[], trials=trials)
    found = tuning._write(study, tmp_path, recipe(), [], space, ["log_loss"])
    assert [trial["trial"] for trial in found["trials"]] == [1, 0]
    print_table(trials_table(dict(found)))


@pytest.mark.slow
def test_two_processes_share_a_study(recipe: Write, tmp_path: Path) -> None:
    path, out = recipe(training={"steps": 2}), tmp_path / "study"
    command = ["tune", str(path), "--over", RATE, "--out", str(out), "--trials", "4", "--quiet"]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(Child(lambda: main(command), told=tmp_path / f"told-{n}"))
            for n in range(2)
        ]
        for n, process in enumerate(processes):
            assert process.wait(300) == 0, (tmp_path / f"told-{n}" / "err").read_text("utf-8")
    rates = [trial["optimizer.learning_rate"] for trial in trials_of(out)]
    assert len(rates) == len(set(rates)) == 4


# ---------------------------------------------------------------------------------------- its page


def study(**changes: Any) -> dict[str, Any]:
    """A study of four trials of two settings, one of them stopped early."""
    kinds = ['"system"', '"<b>"', '"system"', '"system"']
    trials = [
        {
            **{"trial": i, "optimizer.learning_rate": 10.0**-i, "template.place": kinds[i]},
            **{"dev": {}, "values": {"accuracy": score, "tokens": 8 - i}},
            **{"pruned": i == 3, "front": i == 1},
        }
        for i, score in enumerate([0.6, 0.9, 0.7, 0.5])
    ]
    rate, place = {"log": True, "values": []}, {"log": False, "values": ['"system"', '"<b>"']}
    return {
        **{"objectives": ["accuracy"], "lower": [], "metric": "accuracy"},
        **{"settings": {"optimizer.learning_rate": rate, "template.place": place}},
        **{"trials": sorted(trials, key=lambda t: -t["values"]["accuracy"]), "recipe": "best.toml"},
        **changes,
    }


def test_the_figures_show_every_trial_and_the_best_so_far() -> None:
    (axes,) = figures.history(study()).axes
    line, *dots = axes.lines
    assert list(line.get_xdata()) == [1, 2, 3]  # one that was stopped early is no best
    assert list(line.get_ydata()) == pytest.approx([60, 90, 90])
    places = [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots]
    assert places == [(1, 60), (2, 90), (2, 90), (3, pytest.approx(70)), (4, 50)]  # and a ring
    rates, kinds = figures.settings(study()).axes
    assert (rates.get_xscale(), rates.get_xlabel()) == ("log", "optimizer.learning_rate")
    assert [dot.get_xdata()[0] for dot in rates.lines] == [1, 0.1, 0.1, 0.01, 0.001]
    assert [dot.get_xdata()[0] for dot in kinds.lines] == [0, 1, 1, 0, 0]
    assert [label.get_text() for label in kinds.get_xticklabels()] == ['"system"', '"<b>"']
    falling = study(objectives=["tokens"], lower=["tokens"])
    (axes,) = figures.history(falling).axes
    assert list(axes.lines[0].get_ydata()) == [8, 7, 6]


def test_the_front_joins_what_nothing_beats() -> None:
    both = study(objectives=["accuracy", "tokens"], lower=["tokens"])
    both["trials"][1]["front"] = True
    (axes,) = figures.front(both).axes
    assert list(zip(*axes.lines[0].get_data(), strict=True)) == [
        *((6, pytest.approx(70)), (7, pytest.approx(90))),
    ]
    with refused("front: the study has one objective", error=RunError):
        figures.front(study())
    with refused("no trial that finished", error=RunError):
        figures.history(study(trials=[]))


def test_report_makes_a_page_and_figures_of_a_study(embedgrad: Command, tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text(json.dumps(study()))
    done = embedgrad("report", tmp_path)
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text("utf-8")
    for part in ("How it went", "What each setting did", "Every trial", "&lt;b&gt;"):
        assert part in page
    assert "<b>" not in page
    assert "What is not here" not in page
    assert page.count('<svg class="figure"') == 2
    assert embedgrad("report", tmp_path, "--figure", "history", "--format", "png").code == 0
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    other = embedgrad("report", tmp_path, "--figure", "curves", "--format", "png")
    assert (other.code, "unknown figure 'curves'" in other.err) == (2, True)
    (tmp_path / "trials.json").write_text('{"trials": [{}]}')
    damaged = embedgrad("report", tmp_path)
    assert (damaged.code, len(damaged.lines)) == (2, 1)
    assert "trials.json: is no file of `embedgrad tune`" in damaged.err
