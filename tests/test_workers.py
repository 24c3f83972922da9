"""Several workers: the rows of one, less work for each, one that writes, and one that dies."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tiny
from embedgrad import load
from embedgrad.atomic_files import write_folder
from embedgrad.cli import main
from embedgrad.experiments.together import _hand_over
from embedgrad.model.workers import Workers
from embedgrad.training.checkpoint import Checkpoint
from forked import Child
from kit import kit
from run_kit import Command, Done, values
from worker_kit import found, sampled_solutions, tell, tell_solutions

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]


def two(work: Callable[[], object], told: Path) -> list[Done]:
    """What two workers leave that have the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told.mkdir()
    folders = [told / f"worker-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(Child(work, {**where, "RANK": str(rank)}, folder))
            for rank, folder in enumerate(folders)
        ]
        codes = [process.wait(300) for process in processes]
    return [
        Done(int(code or 0), *((folder / name).read_text("utf-8") for name in ("out", "err")))
        for code, folder in zip(codes, folders, strict=True)
    ]


# ------------------------------------------------------------------------------------------ shares


def test_every_row_has_one_worker_that_has_its_prefix() -> None:
    batch = kit(rows=12).sequences
    shares = [Workers(rank, 3).share(batch) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(12))
    for rank, share in enumerate(shares):
        workers = Workers(rank, 3)
        assert all(batch[i] in workers.select_stored(batch) for i in share)
        again = [s for s in batch[::-1] if s in [batch[i] for i in share]]
        assert all(workers.owner(sequence) in (None, rank) for sequence in again)
    assert sum(len(share) > 0 for share in shares) > 1


def test_rows_behind_the_template_alone_are_spread_evenly() -> None:
    batch = kit(rows=11, template="user-before").sequences
    workers = [Workers(rank, 3) for rank in range(3)]
    assert Counter(len(own.share(batch)) for own in workers) == {4: 2, 3: 1}
    assert all(own.select_stored(batch) == list(batch) for own in workers)


def test_rows_of_one_text_are_spread_evenly() -> None:
    batch = kit(rows=tiny.reviews(1) * 11).sequences
    assert len(batch[0].prefix) > batch[0].shared
    assert Counter(len(Workers(rank, 3).share(batch)) for rank in range(3)) == {4: 2, 3: 1}


# --------------------------------------------------------------------------------- the same numbers


@functools.cache
def one() -> Any:
    """What one worker tells."""
    return json.loads(json.dumps(found()))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_workers_compute_what_one_does(fsdp: bool, tmp_path: Path) -> None:
    """Gradients of means and of other objectives, in parts too, and the order of free answers."""
    first, second = (done.json for done in two(lambda: tell(fsdp), tmp_path / "told"))
    alone = one()
    for name, numbers in alone["numbers"].items():
        assert first["numbers"][name] == second["numbers"][name]
        assert first["numbers"][name] == pytest.approx(numbers, abs=1e-10), name
    assert first["answers"] == second["answers"] == alone["answers"]
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-10)
    assert first["sampled"] == second["sampled"] == alone["sampled"]
    ends = {(ended, over) for group in alone["sampled"] for *_, ended, over in group}
    assert len(ends) > 1  # some are cut, some end
    assert first["sampled here"] + second["sampled here"] == alone["sampled here"] == 9
    assert min(first["sampled here"], second["sampled here"]) > 0
    assert alone["sent"] == {"gradients": 0, "log-probabilities": 0}
    # Layers are shared out, the embedding table (512 x 32, tied) is not.
    whole, table = alone["weights"], 512 * 32
    part = table + (whole - table) // 2
    for done in (first, second):
        assert abs(done["weights"] - (part if fsdp else whole)) <= 32
    # No prefix is computed twice.
    misses = [done["stored"]["misses"] for done in (first, second)]
    assert sum(misses) == alone["stored"]["misses"]
    assert min(misses) > 0


@pytest.mark.slow
def test_workers_share_out_what_the_model_writes_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "alone"))
    alone = json.loads(json.dumps(sampled_solutions()))
    assert alone["asked"] == 9
    assert len(alone["solutions"]) > 1
    # The first worker's machine knows three answers already.
    header, *lines = Path(alone["file"]).read_bytes().splitlines(keepends=True)
    known = tmp_path / "caches" / "0" / "solutions" / Path(alone["file"]).name
    known.parent.mkdir(parents=True)
    known.write_bytes(header + b"".join(lines[:3]))
    told = [d.json for d in two(lambda: tell_solutions(tmp_path / "caches"), tmp_path / "told")]
    assert [done["solutions"] for done in told] == [alone["solutions"]] * 2
    assert sum(done["asked"] for done in told) == 9
    assert min(done["asked"] for done in told) > 0


@pytest.mark.slow
def test_a_run_of_two_workers_has_the_rows_of_one(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(training={"epochs": 3}, optimizer={"learning_rate": 0.1})
    alone = embedgrad("optimize", path, "--out", tmp_path / "one", "--json").json
    command = ["-m", "embedgrad", "optimize", path, "--out", tmp_path / "two", "--json"]
    # `--cpu` would start one process, however many are asked for.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    both = [sys.executable, "-m", *launch, "--main_process_port", "0", *map(str, command)]
    ended = subprocess.run(both, capture_output=True, text=True, timeout=300, check=False)
    first = Done(ended.returncode, ended.stdout, ended.stderr)
    assert first.code == 0, first.err
    moved = (load(tmp_path / "two").rows - load(tmp_path / "one").rows).abs().max().item()
    assert moved < 1e-6
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    rows = load(tmp_path / "one").rows
    assert first.json["workers"]["count"] == 2
    assert first.json["workers"]["bytes_sent"]["gradients"] == rows.numel() * 4
    assert first.json["workers"]["bytes_sent"]["log-probabilities"] == 8 * 3 * 4
    assert first.err.count("2 workers; each sent") == 1
    assert "workers" not in alone
    steps = read_jsonl(tmp_path / "two" / "events.jsonl")
    sent = {step["bytes_sent"] for step in steps if step["event"] == "step"}
    assert sent == {sum(first.json["workers"]["bytes_sent"].values())}


@pytest.mark.slow
def test_workers_that_share_out_the_weights_have_the_rows_of_one(
    finished: tuple[Path, Any], recipe: Write, tmp_path: Path
) -> None:
    path = recipe(model={"fsdp": True})
    command = ["optimize", str(path), "--out", str(tmp_path / "two"), "--quiet"]
    first, second = two(lambda: main(command), tmp_path / "told")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    moved = (load(tmp_path / "two").rows - load(finished[0]).rows).abs().max().item()
    assert moved < 1e-6
    assert answers(tmp_path / "two") == answers(finished[0])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers(folder: Path) -> list[Any]:
    rows = read_jsonl(folder / "predictions.jsonl")
    return [(row["source"], row["text"]["predicted"], row["refined"]["predicted"]) for row in rows]


@pytest.mark.slow
def test_a_mistake_is_said_once(recipe: Write, tmp_path: Path) -> None:
    path = recipe(data={"train": str(tmp_path / "missing.jsonl")})
    command = ["optimize", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    first, second = two(lambda: main(command), tmp_path / "told")
    assert (first.code, second.code) == (2, 2)
    (line,) = first.lines
    assert "missing.jsonl" in line
    assert (second.out, second.err) == ("", "")
    assert not (tmp_path / "run").exists()


ENGINE = {"sampling": {"engine": "http://127.0.0.1:9/v1"}, "objective": {"name": "reward"}}
IMAGES: dict[str, Any] = {"images": {}, "template": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (ENGINE, "sampling.engine: several workers would each ask the engine; run one process"),
        (IMAGES, "images: several workers would each read all images; run one process"),
    ],
)
def test_what_workers_do_not_share_out_is_refused(
    sections: dict[str, Any], says: str, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    made = {
        n: part
        for n, part in {**values(model_folder, data), **sections}.items()
        if part is not None
    }
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(made), encoding="utf-8")
    command = ["optimize", str(path), "--out", str(tmp_path / "run"), "--quiet"]
    first, second = two(lambda: main(command), tmp_path / "told")
    assert (first.code, second.code) == (2, 2)
    assert says in first.err
    assert "error" not in second.err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- a worker that dies


def test_what_a_worker_saved_is_kept_where_the_first_one_is_gone(tmp_path: Path) -> None:
    own, out = tmp_path / "own", tmp_path / "out"
    for folder, text in ((own, "newer"), (out, "older")):
        for name in ("checkpoint/step-000003", "prompt", "task/prompt"):
            write_folder(folder / name, {"file": text.encode()})
    write_folder(own / "checkpoint" / "step-000004", {"file": b"newer"})
    _hand_over(own, out)
    assert {file.read_text() for file in out.rglob("file")} == {"newer"}
    assert len([*out.rglob("file")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "end", "fsdp"),
    [(1, signal.SIGKILL, True), (0, signal.SIGKILL, False), (1, signal.SIGTERM, False)],
)
def test_a_worker_that_dies_is_named_and_one_goes_on_alone(
    rank: int, end: signal.Signals, fsdp: bool, recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(training={"epochs": 100, "evaluate_every": 20}, model={"fsdp": fsdp})
    out = tmp_path / "run"
    pids, told = tmp_path / "pids", tmp_path / "told"
    pids.mkdir()
    with Child(lambda: launch(path, out, pids), told=told) as launcher:
        limit = time.monotonic() + 120
        while not (out / "checkpoint").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        worker = int((pids / str(rank)).read_text())
        os.kill(worker, end)
        assert launcher.wait(120) != 0
    said = (told / "err").read_text("utf-8")
    assert f"worker {rank} (process {worker} on {socket.gethostname()}) ended" in said
    assert f"the last good rows are in {out / 'prompt'}" in said
    kept = Checkpoint.find(out / "checkpoint")
    assert kept is not None
    assert torch.isfinite(load(out).rows).all()
    done = embedgrad("resume", out, "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.json["train"]["steps"] == 300 > kept.step > 0


def launch(path: Path, out: Path, pids: Path) -> None:
    """What `torchrun --nproc-per-node 2 --standalone` does, with workers that are forked."""
    config = LaunchConfig(
        *(1, 1, 2),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, work)(path, out, pids)


def work(path: Path, out: Path, pids: Path) -> None:
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    main(["optimize", str(path), "--out", str(out), "--quiet"])


def test_other_commands_take_one_process(
    embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = embedgrad("parts")
    assert done.code == 2
    assert "parts: several workers take `optimize` and `resume` only" in done.err
