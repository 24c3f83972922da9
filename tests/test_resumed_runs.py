"""Runs that are resumed: to the rows of a run that nothing interrupted, or refused in one line."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedgrad import DivergenceError, Recipe, RunError, load, run
from embedgrad.atomic_files import seal
from embedgrad.cli import main
from embedgrad.experiments.run_folder import read_finished
from embedgrad.model.language_model import LanguageModel
from embedgrad.report.event_files import write_events
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import Best
from forked import Child
from refusals import refused
from run_kit import Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
Event = dict[str, Any]
LONG = {"epochs": 4, "evaluate_every": 2}  # 12 steps
SCORES = ("text", "refined", "difference", "test_rows")


@pytest.fixture
def longer(model_folder: Path, data: Path) -> Recipe:
    """Four epochs of three steps, scored on dev at every other step."""
    return Recipe.from_dict(values(model_folder, data, training=LONG))


def test_a_clock_that_runs_backwards_changes_nothing(
    longer: Recipe, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(longer, tmp_path / "right")
    hours = itertools.count(1)

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls(2030, 1, 1, tzinfo=tz) - datetime.timedelta(hours=next(hours))

    with monkeypatch.context() as patch:
        patch.setattr(datetime, "datetime", Backwards)
        patch.setattr(time, "time", lambda: 2e9 - 3600 * next(hours))
        result = run(longer, tmp_path / "wrong")
        assert embedgrad("report", tmp_path / "wrong", "--no-model").code == 0
    assert next(hours) > 12
    assert result["train"]["ended"] == "finished"
    right, wrong = (load(tmp_path / name).rows for name in ("right", "wrong"))
    assert torch.equal(right, wrong)
    assert result["train"]["seconds"] >= 0


@pytest.fixture(scope="module")
def whole(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(Recipe.from_dict(values(model_folder, data, training=LONG)), folder)


def rows_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "prompt" / "prompt.safetensors")["rows"]


def assert_as_whole(folder: Path, result: Any, whole: tuple[Path, dict[str, Any]]) -> None:
    """The bits of rows and checkpoint, and all that was scored."""
    assert torch.equal(rows_of(folder), rows_of(whole[0]))
    one, other = (Checkpoint.find(at / "checkpoint") for at in (folder, whole[0]))
    assert one is not None
    assert other is not None
    assert (one.step, one.best_step, one.history) == (other.step, other.best_step, other.history)
    assert all(torch.equal(one.theta[name], other.theta[name]) for name in other.theta)
    assert {name: result[name] for name in SCORES} == {name: whole[1][name] for name in SCORES}
    assert result["interrupted"] is False
    assert (result["train"]["ended"], result["train"]["steps"]) == ("finished", 12)
    found = json.loads((folder / "result.json").read_text("utf-8"))
    assert found == json.loads(json.dumps({**result, "artifact": "prompt"}))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupting(step: int, event: str = "step") -> Callable[[Event], None]:
    def sink(values: Event) -> None:
        if (values["event"], values.get("step")) == (event, step):
            raise KeyboardInterrupt

    return sink


# -- whatever ended it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "event"),
    [(0, "evaluation"), (1, "step"), (5, "step"), (6, "evaluation"), (12, "step")],
)
def test_a_run_resumes_after_ctrl_c(
    step: int, event: str, longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out = tmp_path / "run"
    assert run(longer, out, interrupting(step, event))["interrupted"] is True
    assert_as_whole(out, run(longer, out, resume=True), whole)


def test_a_run_resumes_after_it_was_asked_to_stop(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out, steps = tmp_path / "run", 0
    while steps < 12:
        asked = iter(range(1, 100))
        result = run(
            longer, out, resume=steps > 0, should_stop=lambda asked=asked: next(asked) == 5
        )
        assert result["train"]["steps"] == min(steps + 5, 12)
        assert result["train"]["ended"] == ("stopped" if steps < 7 else "finished")
        assert result["interrupted"] == ("text" not in result)
        steps = result["train"]["steps"]
    assert_as_whole(out, result, whole)
    assert result["train"]["seconds"] > 0


def test_a_run_resumes_after_a_divergence(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, passes = LanguageModel.outcome, iter(range(1000))

    def outcome(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        found = plain(self, *arguments, **options)
        if torch.is_grad_enabled() and next(passes) == 6:
            found = dataclasses.replace(found, logprobs_BC=found.logprobs_BC * torch.nan)
        return found

    monkeypatch.setattr(LanguageModel, "outcome", outcome)
    out = tmp_path / "run"
    with pytest.raises(DivergenceError, match="step 7"):
        run(longer, out)
    assert_as_whole(out, run(longer, out, resume=True), whole)


def test_a_killed_run_resumes_from_the_command_line(
    recipe: Write, embedgrad: Command, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    path, out = recipe(training=LONG), tmp_path / "run"
    command = ["optimize", str(path), "--out", str(out), "--quiet"]
    with Child(lambda: main(command), told=tmp_path / "told") as process:
        limit = time.monotonic() + 60
        while not process.ended() and time.monotonic() < limit:
            if (out / "checkpoint").exists():
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert (out / "checkpoint").exists()
    (out / "result.json").unlink(missing_ok=True)  # a fast machine may have finished
    done = embedgrad("resume", out, "--json")
    assert done.code == 0, done.err
    assert_as_whole(out, done.json, json_of(whole))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 13))
    assert [e["step"] for e in events if e["event"] == "evaluation"] == list(range(0, 13, 2))
    assert [e["event"] for e in events].count("end") == 1


def json_of(run: tuple[Path, Any]) -> tuple[Path, Any]:
    return run[0], json.loads(json.dumps(run[1]))


# -- finished, and longer --------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changes_nothing(
    whole: tuple[Path, Any],
    embedgrad: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    before, calls = contents(out), []

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return read_finished(*arguments)

    monkeypatch.setattr("embedgrad.experiments.run.read_finished", count)
    done = embedgrad("resume", out, "--json")
    assert done.code == 0
    assert done.json == {**json_of(whole)[1], "artifact": str(out / "prompt")}
    assert f"{out}: finished already, at step 12; nothing is left to resume" in done.err
    assert len(calls) == 1, "it is read once"
    assert contents(out) == before


def test_a_finished_run_may_be_trained_for_longer(
    model_folder: Path, data: Path, tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "run"
    short = Recipe.from_dict(values(model_folder, data, training={"epochs": 1}))
    assert run(short, out)["train"]["steps"] == 3
    done = embedgrad("resume", out, "--json", "--set", "training.epochs=2")
    assert done.code == 0, done.err
    assert done.json["train"]["steps"] == 6
    checkpoint = Checkpoint.find(out / "checkpoint")
    assert checkpoint is not None
    assert [score["step"] for score in checkpoint.history] == [0, 3, 6]
    assert Recipe.read(out / "recipe.toml").training.epochs == 2
    for less in ("epochs=1", "steps=4"):
        line = embedgrad("resume", out, "--set", f"training.{less}").err
        assert line.startswith(f"error: {out}: training.{less.partition('=')[0]} is ")
        assert "may grow" in line


# -- refused ---------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(
    longer: Recipe, tmp_path: Path, finished: tuple[Path, Any], embedgrad: Command
) -> None:
    for folder in (tmp_path, tmp_path / "missing", finished[0] / "prompt"):
        with refused(f"{folder}: holds no run to resume", "embedgrad optimize", error=RunError):
            run(longer, folder, resume=True)
        assert embedgrad("resume", folder).lines[0].startswith(f"error: {folder}: holds no run")
    assert not (tmp_path / "missing").exists()


def test_another_recipe_is_refused_with_what_differs(
    model_folder: Path, data: Path, longer: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(longer, out, interrupting(3))
    other = Recipe.from_dict(
        values(model_folder, data, training={**LONG, "seed": 1}, optimizer={"name": "sgd"})
    )
    with refused(
        f"{out}: optimizer", "training.seed is 0 there and 1 here", "may grow", error=RunError
    ):
        run(other, out, resume=True)
    # What has no effect on the training may differ.
    free = Recipe.from_dict(
        values(model_folder, data, training=LONG, prefix_cache={"budget": "32 MiB"})
    )
    assert run(free, out, resume=True)["train"]["ended"] == "finished"


def test_other_data_and_another_model_are_refused(
    model_folder: Path,
    other_models: dict[str, Path],
    data: Path,
    tmp_path: Path,
) -> None:
    rows, model, out = tmp_path / "rows", tmp_path / "model", tmp_path / "run"
    shutil.copytree(data, rows)
    shutil.copytree(model_folder, model)
    recipe = Recipe.from_dict(values(model, rows, training=LONG))
    run(recipe, out, interrupting(3))
    (out / "events.jsonl").write_text('{"event": "step", "step": 3}\n')
    before = contents(out)
    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    write_jsonl(rows / "train.jsonl", [*lines[1:], {**lines[0], "review": "Another film."}])
    with refused(f"{out}: cannot be resumed, as data.train is not what it was", error=RunError):
        run(recipe, out, resume=True)
    write_jsonl(rows / "train.jsonl", lines)
    shutil.copytree(other_models["seed"], model, dirs_exist_ok=True)
    with refused(f"{out}: cannot be resumed, as model.embedding_digest is not", error=RunError):
        run(recipe, out, resume=True)
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    tensors = {n: t * 3 if "mlp" in n else t for n, t in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with refused(f"{out}: cannot be resumed, as model.weights is not", error=RunError):
        run(recipe, out, resume=True)
    assert contents(out) == before
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    assert run(recipe, out, resume=True)["train"]["ended"] == "finished"


def test_checkpoints_of_earlier_versions_are_refused(longer: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(longer, out, interrupting(5))
    path = out / "recipe.toml"
    text = path.read_text()
    path.write_text(text.removeprefix("version = 2\n"))
    with refused(f"{out} was written by an older embedgrad", error=RunError):
        run(longer, out, resume=True)
    path.write_text(text)
    path = out / "checkpoint" / "step-000005" / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    tensors = path.with_suffix(".safetensors").read_bytes()
    path.write_text(json.dumps(seal({**values, "format": 1}, tensors)))
    with refused("checkpoint format 1, but this version reads 2", error=RunError):
        run(longer, out, resume=True)
    path.rename(out / "checkpoint" / path.name)  # where they once were
    before = contents(out)
    with refused("a checkpoint as earlier versions wrote them", error=RunError):
        run(longer, out, resume=True)
    assert contents(out) == before


def test_what_a_recipe_of_an_earlier_version_called_otherwise_is_read(
    longer: Recipe, tmp_path: Path
) -> None:
    text = longer.as_toml(tmp_path)
    assert "[report]\ntrackers = []\n" in text
    for old, now in (("false", ()), ("true", ("tensorboard",))):
        report = f"[report]\ntensorboard = {old}\n"
        (tmp_path / "recipe.toml").write_text(text.replace("[report]\ntrackers = []\n", report))
        assert Recipe.read_run(tmp_path).report.trackers == now


@pytest.mark.parametrize("name", ["result.json", "prompt/prompt.json"])
@pytest.mark.parametrize("version", [1, 99])
def test_files_of_another_version_are_refused(
    name: str, version: int, longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / name).write_text(json.dumps({"version": version}))
    before = contents(out)
    with refused(f"{out / name}: written by another embedgrad", str(version), error=RunError):
        run(longer, out, resume=True)
    assert contents(out) == before


def test_a_checkpoint_beyond_the_run_is_refused(longer: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(longer, out, interrupting(5))
    checkpoint = Checkpoint.find(out / "checkpoint")
    assert checkpoint is not None
    dataclasses.replace(checkpoint, step=300).keep(out / "checkpoint")
    with refused("its checkpoint is of step 300 of 12", error=RunError):
        run(longer, out, resume=True)


# -- what a killed process leaves -----------------------------------------------------------------


def test_a_run_without_a_checkpoint_starts_again_and_says_so(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out, events = tmp_path / "run", list[Event]()
    run(longer, out, interrupting(5))
    shutil.rmtree(out / "checkpoint")
    (out / ".result.json.0123abcd").write_bytes(b"half")
    assert_as_whole(out, run(longer, out, events.append, resume=True), whole)
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert "no checkpoint: starts again at step 0" in notes
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("damaged", "step"), [(["step-000005"], 4), (["step-000005", "step-000004"], 0)]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    damaged: list[str], step: int, longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out, events = tmp_path / "run", list[Event]()
    run(longer, out, interrupting(5))
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["step-000004", "step-000005"]
    for name in damaged:
        path = out / "checkpoint" / name / "checkpoint.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert_as_whole(out, run(longer, out, events.append, resume=True), whole)
    notes = [event["text"] for event in events if event["event"] == "note"]
    for name in damaged:
        (line,) = [note for note in notes if f"{name}: the checkpoint cannot be read" in note]
        assert line.endswith("it is passed over")
    assert (
        f"resuming at step {step}" if step else "no checkpoint: starts again at step 0"
    ) in notes


def test_a_run_killed_while_it_loads_resumes(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out = tmp_path / "run"

    def kill(event: Event) -> None:
        if event["event"] == "stage":
            os._exit(9)

    if os.fork() == 0:
        run(longer, out, kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    assert {path.name for path in out.iterdir()} == {".lock", "events.jsonl", "recipe.toml"}
    assert_as_whole(out, run(longer, out, resume=True), whole)


def test_a_run_killed_before_its_recipe_is_written_can_be_started_again(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".recipe.toml.0123abcd").write_text("half a rec")  # what a killed write leaves
    assert_as_whole(out, run(longer, out), whole)
    assert not list(out.glob(".*"))


def test_a_folder_with_anything_else_in_it_is_left_alone(longer: Recipe, tmp_path: Path) -> None:
    files = {tmp_path / ".notes.0123abcd", tmp_path / "mine.txt"}
    for file in files:
        file.write_text("x")
    with pytest.raises(RunError, match="exists already; choose another folder"):
        run(longer, tmp_path)
    assert set(tmp_path.iterdir()) == files


def test_a_longer_run_that_is_killed_is_not_taken_for_finished(
    longer: Recipe, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    short = Recipe.from_dict(values(model_folder, data, training={**LONG, "epochs": 1}))
    run(short, out)

    def fail(event: Event) -> None:
        if event.get("step") == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(longer, out, fail, resume=True)
    assert run(longer, out, resume=True)["train"]["steps"] == 12


def test_early_stopping_is_said_when_a_run_resumes(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Best, "_is_better", lambda best, score: False)
    out, events = tmp_path / "run", list[Event]()

    def recipe(**training: Any) -> Recipe:
        return Recipe.from_dict(values(model_folder, data, training={**LONG, **training}))

    assert run(recipe(patience=1), out)["train"]["ended"] == "patience"
    more = run(recipe(patience=1, epochs=5), out, events.append, resume=True)
    assert (more["train"]["ended"], more["train"]["steps"]) == ("patience", 2)
    (note,) = [e["text"] for e in events if "early stopping" in e.get("text", "")]
    assert "training.patience" in note
    assert run(recipe(patience=3, epochs=5), out, resume=True)["train"]["steps"] == 6
    assert run(recipe(epochs=5), out, resume=True)["train"]["steps"] == 15


# -- the day of the first run ----------------------------------------------------------------------


def test_a_run_resumes_on_the_day_of_its_beginning(
    longer: Recipe, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    out = tmp_path / "run"
    run(longer, out, interrupting(5))
    checkpoint = Checkpoint.find(out / "checkpoint")
    assert checkpoint is not None
    checkpoint.made_from["date"] = "2001-02-03"
    checkpoint.keep(out / "checkpoint")
    assert_as_whole(out, run(longer, out, resume=True), whole)
    prompt = json.loads((out / "prompt" / "prompt.json").read_text("utf-8"))
    assert "2001-02-03" in json.dumps(prompt)


# -- a report that raises --------------------------------------------------------------------------


def test_a_report_that_raises_ends_the_run(tmp_path: Path) -> None:
    class PrunedError(Exception):
        pass

    def prune(event: Event) -> None:
        raise PrunedError

    with write_events(prune, tmp_path) as report, pytest.raises(PrunedError):
        report({"event": "note"})
