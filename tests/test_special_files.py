"""Pipes, devices and huge files in the place of every file that is read: one line, at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from bad_kit import Place, at
from embedgrad import RunError
from embedgrad.experiments.compare.folder import SCORES, Folder, Part
from refusals import refused
from run_kit import Command

pytest_plugins = ["tiny_runs"]
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")

SECONDS = 15  # far above what any case takes, on a busy machine too
MEMORY = 256 * 2**10  # kB more than before


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk


KINDS = {"pipe": pipe, "device": device, "huge": huge}


def model(place: Place, name: str) -> tuple[Path, list[object]]:
    folder = place.folder / "model"
    shutil.copytree(place.model, folder)
    return folder / name, [*place.optimize(model={"name": str(folder)}), "--quiet"]


def data(place: Place, suffix: str) -> tuple[Path, list[object]]:
    path = place.folder / "data" / f"strange{suffix}"
    return path, [*place.optimize(f"data.train={path}"), "--quiet"]


def of_run(place: Place, name: str, *command: str) -> tuple[Path, list[object]]:
    more = ["--out", place.folder / "page.html"] if command == ("report",) else ["--quiet"]
    return place.run / name, [*command, place.run, *more]


def scored_again(place: Place, name: str) -> tuple[Path, list[object]]:
    """A file that `resume` writes to while it scores the test rows."""
    (place.run / "result.json").unlink()
    return of_run(place, name, "resume")


def page_of(place: Place, name: str) -> tuple[Path, list[object]]:
    return of_run(place, name, "report")


def comparison(place: Place) -> tuple[Path, list[object]]:
    arguments = ["compare", place.optimize(compare={"methods": ["text"]})[1], "--quiet"]
    arguments += ["--out", place.folder / "comparison"]
    return at(place.folder / "comparison" / "work" / "text" / "trained.json"), arguments


def results(place: Place) -> tuple[Path, list[object]]:
    folder = place.folder / "comparison"
    return at(folder / "results.json"), ["report", folder, "--out", place.folder / "page.html"]


def exported(place: Place) -> tuple[Path, list[object]]:
    return at(place.folder / "e" / "embedgrad" / "export.json"), ["verify", place.folder / "e"]


FILES: dict[str, Callable[[Place], tuple[Path, list[object]]]] = {
    "recipe": lambda p: (p.folder / "recipe.toml", p.optimize()),
    "prompt": lambda p: of_run(p, "prompt/prompt.json", "evaluate"),
    "rows": lambda p: of_run(p, "prompt/prompt.safetensors", "evaluate"),
    "csv": lambda p: data(p, ".csv"),
    "parquet": lambda p: data(p, ".parquet"),
    "config": lambda p: model(p, "config.json"),
    "tokenizer": lambda p: model(p, "tokenizer.json"),
    "template": lambda p: model(p, "chat_template.jinja"),
    "comparison": comparison,
    "results": results,
    "export": exported,
    "answers": lambda p: scored_again(p, "answers.jsonl"),
    "events": lambda p: scored_again(p, "events.jsonl"),
}
PIPES: dict[str, Callable[[Place], tuple[Path, list[object]]]] = {
    "recipe of a run": lambda p: of_run(p, "recipe.toml", "evaluate"),
    "jsonl": lambda p: data(p, ".jsonl"),
    "json": lambda p: data(p, ".json"),
    **{
        name: partial(model, name=name)
        for name in (
            "model.safetensors",
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "README.md",
        )
    },
    **{
        f"page of {name}": partial(page_of, name=name)
        for name in ("result.json", "events.jsonl", "predictions.jsonl", "prompt/prompt.json")
    },
    "result of a resumed run": lambda p: of_run(p, "result.json", "resume"),
}
CASES = [(kind, FILES[name], name) for kind in KINDS for name in FILES]
CASES += [("pipe", PIPES[name], name) for name in PIPES]
CASES += [
    ("huge", partial(page_of, name=name), f"page of {name}")
    for name in ("events.jsonl", "predictions.jsonl")
]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt("waited too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("kind", "file"), [case[:2] for case in CASES], ids=[f"{c[2]}-{c[0]}" for c in CASES]
)
def test_a_special_file_ends_in_one_line(
    embedgrad: Command,
    place: Place,
    kind: str,
    file: Callable[[Place], tuple[Path, list[object]]],
) -> None:
    path, arguments = file(place)
    KINDS[kind](path)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    done = embedgrad(*arguments)
    assert time.monotonic() - started < SECONDS / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    if done.code:  # what is not needed may be left out
        assert done.code == 2
        assert len(done.lines) == 1, done.err
        assert done.err.startswith("error: ")


def test_a_pipe_in_the_place_of_answers_is_not_waited_for(tmp_path: Path) -> None:
    folder, part = Folder(tmp_path), Part("text", None)
    (folder.work / "text").mkdir(parents=True)
    scores: dict[str, object] = dict.fromkeys((*SCORES, "log_loss", "macro_f1"), 0)
    folder.save_scores(part, [], {**scores, "correct": "", "interval": []})
    pipe(folder.work / "text" / "answers.jsonl")
    with refused("scored.json: is damaged (", "delete it to score again", error=RunError):
        folder.scores(part)
