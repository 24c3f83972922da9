"""Runs that do not reach their end: Ctrl-C, SIGTERM, a loss that is not finite, a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import DivergenceError, Recipe, RunError, load, load_model, run
from embedgrad.atomic_files import finite
from embedgrad.cli import main
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.model.backbone import join_spans
from embedgrad.model.language_model import LanguageModel
from embedgrad.training.checkpoint import Checkpoint
from forked import Child
from run_kit import ROWS, Command, values

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
Event = dict[str, Any]


@pytest.fixture
def small(model_folder: Path, data: Path) -> Recipe:
    """Two epochs of three steps, scored on dev at steps 0, 3 and 6."""
    return Recipe.from_dict(values(model_folder, data))


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name
)
def test_a_signal_ends_training_and_the_prompt_so_far_is_saved(
    number: signal.Signals, recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path, out = recipe(training={"epochs": 100_000, "evaluate_every": 2}), tmp_path / "run"

    def work() -> None:
        # A test that runs in the background of a shell, or by nohup, would hand down deaf signals.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        main(["optimize", str(path), "--out", str(out), "--quiet", "--json"])

    with Child(work, told=tmp_path / "told") as process:
        limit = time.monotonic() + 60
        while not (out / "checkpoint").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        process.kill(number)
        status = process.wait()
    printed, told = ((tmp_path / "told" / name).read_text("utf-8") for name in ("out", "err"))
    assert status == 128 + number, told
    result = json.loads(printed)
    assert result["artifact"] == str(out / "prompt")
    assert {**result, "artifact": "prompt"} == json.loads((out / "result.json").read_text("utf-8"))
    assert result["interrupted"] is True
    assert "text" not in result
    (line,) = told.splitlines()
    assert line.startswith(
        f"interrupted at step {result['train']['steps']}; {out / 'prompt'} holds"
    )
    assert torch.isfinite(load(out).rows).all()
    checkpoint = Checkpoint.find(out / "checkpoint")
    assert checkpoint is not None
    assert checkpoint.step == result["train"]["steps"]
    assert embedgrad("evaluate", out, "--json").json["test_rows"] == ROWS["test"]


# -- Ctrl-C anywhere -------------------------------------------------------------------------------


def interrupt_at(chosen: Callable[[Event], bool]) -> Callable[[Event], None]:
    def sink(event: Event) -> None:
        if chosen(event):
            raise KeyboardInterrupt

    return sink


@pytest.mark.parametrize("text", ["loading", "tokenizing"])
def test_an_interruption_before_training_leaves_nothing(
    text: str, small: Recipe, tmp_path: Path
) -> None:
    sink = interrupt_at(lambda event: event.get("text", "").startswith(text))
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "a" / "b" / "run", sink)
    assert listing(tmp_path) == []


def test_a_folder_that_holds_solutions_is_kept(small: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def sink(event: Event) -> None:
        if event.get("text") == "tokenizing":
            (out / "solutions.jsonl").write_text("{}\n")  # as self-training does before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small, out, sink)
    assert listing(out) == ["events.jsonl", "recipe.toml", "solutions.jsonl"]
    assert run(small, out, resume=True)["train"]["ended"] == "finished"


@pytest.mark.parametrize(
    ("event", "step", "best"),
    [("evaluation", 0, 0), ("step", 2, 0), ("step", 5, 3), ("evaluation", 6, 6)],
)
def test_an_interruption_keeps_what_was_best_on_dev(
    event: str, step: int, best: int, small: Recipe, tmp_path: Path
) -> None:
    sink = interrupt_at(lambda e: (e["event"], e.get("step")) == (event, step))
    result = run(small, tmp_path / "run", sink)
    assert result["interrupted"] is True
    assert (result["train"]["steps"], result["train"]["best_step"]) == (step, best)
    prompt = load(tmp_path / "run")
    assert (best == 0) == torch.equal(prompt.rows, prompt.start_rows)
    assert prompt.provenance["training"]["ended"] == "interrupted"
    assert json.loads((tmp_path / "run" / "result.json").read_text("utf-8")) == json.loads(
        json.dumps({**result, "artifact": "prompt"})
    )


def test_the_command_line_says_what_an_interrupted_run_left(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(100))
    plain = LanguageModel.outcome

    def outcome(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and next(steps) == 1:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "outcome", outcome)
    out = tmp_path / "run"
    done = embedgrad("optimize", recipe(), "--out", out, "--quiet")
    assert done.code == 130
    assert done.lines == [
        f"interrupted at step 1; {out / 'prompt'} holds the text prompt's own rows, "
        f"as no others scored better on dev; `embedgrad resume {out}` continues the run"
    ]
    assert "no test rows were scored" in done.out


def test_an_interruption_of_the_last_scoring_keeps_the_prompt(
    small: Recipe, embedgrad: Command, tmp_path: Path
) -> None:
    sink = interrupt_at(lambda event: event.get("which") == "refined prompt")
    result = run(small, tmp_path / "run", sink)
    assert result["interrupted"] is True
    assert result["train"]["ended"] == "finished"
    assert "text" not in result
    assert embedgrad("evaluate", tmp_path / "run", "--json").json["test_rows"] == ROWS["test"]


@pytest.mark.parametrize("verb", ["evaluate", "inspect", "generate"])
def test_an_interruption_of_another_verb_is_one_line(
    verb: str,
    finished: tuple[Path, Any],
    embedgrad: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "outcome", stop)
    done = embedgrad(verb, finished[0], *["A film."] * (verb == "generate"), "--quiet")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


# -- a loss that is not finite ---------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, *, training: int, dev: bool = False) -> None:
    """The loss of training pass number `training` (from 0) and later is NaN, on dev if asked."""
    plain, passes = LanguageModel.outcome, iter(range(10**6))

    def outcome(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        import dataclasses

        found = plain(self, *arguments, **options)
        bad = next(passes) >= training if torch.is_grad_enabled() else dev
        if bad:
            found = dataclasses.replace(found, logprobs_BC=found.logprobs_BC * torch.nan)
        return found

    monkeypatch.setattr(LanguageModel, "outcome", outcome)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_rows(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training=4)
    out = tmp_path / "run"
    done = embedgrad("optimize", recipe(), "--out", out, "--quiet")
    assert done.code == 2
    assert done.out == ""
    (line,) = done.lines
    assert line.startswith("error: step 5: the loss is nan")
    assert line.endswith(f"the last good rows are in {out / 'prompt'}")
    assert "optimizer.learning_rate" in line
    prompt = load(out)
    assert prompt.provenance["training"]["best_step"] == 3
    assert prompt.provenance["training"]["ended"] == "diverged"
    assert not torch.equal(prompt.rows, prompt.start_rows)
    assert not (out / "result.json").exists()
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [event for event in map(json.loads, lines) if event["event"] == "end"]
    assert [event["ended"] for event in ends] == ["diverged"]
    monkeypatch.undo()
    assert embedgrad("evaluate", out, "--json").json["test_rows"] == ROWS["test"]


def test_a_model_that_says_only_nan_leaves_the_text_prompt(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training=0, dev=True)
    done = embedgrad("optimize", recipe(), "--out", tmp_path / "run", "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert line.startswith("error: step 0: the model's logits are not finite; set model.dtype =")
    prompt = load(tmp_path / "run")
    assert torch.equal(prompt.rows, prompt.start_rows)
    assert prompt.provenance["training"]["dev_history"] == []


def test_a_model_that_says_only_nan_later_keeps_the_last_good_rows(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, looks = Evaluator.score, iter(range(10))

    def spoiled(self: Evaluator, prompt: Any, *others: Any) -> Any:
        rows = join_spans(prompt)
        return score(self, rows * torch.nan if next(looks) == 2 else rows, *others)

    monkeypatch.setattr(Evaluator, "score", spoiled)
    done = embedgrad("optimize", recipe(), "--out", tmp_path / "run", "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert line.startswith("error: step 6: the model's logits are not finite")
    assert line.endswith(f"the last good rows are in {tmp_path / 'run' / 'prompt'}")
    training = load(tmp_path / "run").provenance["training"]
    assert [score["step"] for score in training["dev_history"]] == [0, 3]


def test_numbers_that_json_does_not_know_are_null() -> None:
    held = {"loss": torch.inf, "history": [{"gap": torch.nan}, (1.5, -torch.inf)]}
    assert finite(held) == {"loss": None, "history": [{"gap": None}, [1.5, None]]}


def test_scores_that_are_no_numbers_are_refused(
    finished: tuple[Path, Any], embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training=0, dev=True)
    done = embedgrad("evaluate", finished[0], "--quiet")
    assert (done.code, done.lines) == (
        2,
        ["error: the model's logits are not finite; set model.dtype = 'float32'"],
    )


def test_python_gets_the_last_good_rows_with_the_error(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, training=4)
    with pytest.raises(DivergenceError, match=r"step 5: .*last good rows are in") as caught:
        run(small, tmp_path / "run")
    assert torch.equal(caught.value.refinement.prompt.rows, load(tmp_path / "run").rows)


# -- a full disk -----------------------------------------------------------------------------------


class Disk:
    """Lets `room` files be flushed to disk, and then is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int):
        self.flushed, self.room, self.plain = 0, room, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        self.flushed += 1
        if self.flushed > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.plain(descriptor)


def test_a_disk_that_fills_up_at_any_write_is_one_line_and_breaks_nothing(
    small: Recipe, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(model_folder), device="cpu")
    disk = Disk(monkeypatch, 10**6)
    run(small, tmp_path / "whole", model=model)
    writes = disk.flushed
    assert writes > 10
    told = []
    for room in range(writes):
        monkeypatch.undo()
        out = tmp_path / f"room-{room}"
        Disk(monkeypatch, room)
        try:
            run(small, out, model=model)
        except RunError as error:
            told.append(str(error))
        else:  # everything was written, and only the folder itself could not be flushed
            assert room >= writes - 2
            told.append(f"{out}{os.sep}result.json: No space left on device")
        assert told[-1].isprintable()
        assert told[-1].startswith(f"{out}{os.sep}")
        assert "No space left on device" in told[-1]
        if not out.exists():
            continue
        assert [name for name in listing(out) if "/." in f"/{name}"] == [], "something is left over"
        if (out / "prompt").exists():
            load(out)
        if (out / "checkpoint").exists():
            Checkpoint.find(out / "checkpoint")
    refused = {line.partition(":")[0].rpartition(os.sep)[2] for line in told}
    assert refused == {
        *("recipe.toml", "prompt", "check_rows.jsonl"),
        *("predictions.jsonl", "result.json"),
    }


def test_a_full_disk_ends_the_command_with_one_line(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    Disk(monkeypatch, 0)
    done = embedgrad("optimize", path, "--out", tmp_path / "run", "--quiet")
    assert done.code == 2
    target = tmp_path / "run" / "recipe.toml"
    assert done.lines == [
        f"error: {target}: cannot be written (No space left on device); free some space"
    ]
    assert listing(tmp_path) == ["recipe.toml"]
