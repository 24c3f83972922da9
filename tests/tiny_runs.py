"""Fixtures: a tiny model in a folder, data, recipes, finished runs, the command line in process.

A test file gets them by `pytest_plugins = ["tiny_runs"]`; what it imports stands in `run_kit`.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import typer
from huggingface_hub import constants

import tiny
from bad_kit import Place
from embedgrad.cli import main
from run_kit import ROWS, Command, Done, get_command, save_model, values, write_jsonl

# Threads gain nothing on tiny tensors and cost much on a busy machine; also for new processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def embedgrad(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """`embedgrad("parts", "--json", stdin=...)` -> `Done`, in this process; None: a terminal."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(typer.main, "get_command", get_command)

    def command(*arguments: object, stdin: str | bytes | None = b"") -> Done:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        opened = (
            _Terminal(io.BytesIO()) if content is None else io.TextIOWrapper(io.BytesIO(content))
        )
        monkeypatch.setattr(sys, "stdin", opened)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:  # anything else is a bug of ours
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, told.out, told.err)

    yield command
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer and chat template, as a folder of safetensors."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, dev.jsonl and test.jsonl; no text stands twice."""
    folder = tmp_path_factory.mktemp("data")
    texts = {example.columns["review"]: dict(example.columns) for example in tiny.reviews(120)}
    rows = list(texts.values())
    for split, count in ROWS.items():
        write_jsonl(folder / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    return folder


@pytest.fixture
def recipe(model_folder: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`recipe(training={"steps": 1})` writes a recipe file and returns its path."""

    def write(**sections: Mapping[str, Any]) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(values(model_folder, data, **sections)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished run that tests must not change: its folder and what `run` returned."""
    from embedgrad import Recipe, run

    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(Recipe.from_dict(values(model_folder, data)), folder)


@pytest.fixture(scope="session")
def generated(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a generation task, scored by its numbers."""
    from embedgrad import Recipe, run

    folder = tmp_path_factory.mktemp("generation")
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(30)]
    recipe = values(
        model_folder,
        folder,
        data={"train": str(write_jsonl(folder / "sums.jsonl", rows)), "answer": "answer"},
        template={"user": "{question}\n\n[[Give the answer only:]]"},
        target={"choices": []},
        solutions={"source": "answer"},
        evaluation={"scorer": "number", "max_new_tokens": 4},
    )
    del recipe["data"]["dev"], recipe["data"]["test"]
    run(Recipe.from_dict(recipe), folder / "run")
    return folder / "run"


@pytest.fixture
def place(
    tmp_path: Path,
    data: Path,
    model_folder: Path,
    finished: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Place(tmp_path, model_folder, finished[0])


@pytest.fixture(scope="session")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that a prompt of `model_folder` does not fit, and one whose tokenizer drops spaces."""
    folder = tmp_path_factory.mktemp("other-models")
    save_model(folder / "wordpiece", tokenizer_kind="wordpiece")
    save_model(folder / "no-chat", template=None)
    return {
        "seed": save_model(folder / "seed", seed=1),
        "wordpiece": folder / "wordpiece",
        "no-chat": folder / "no-chat",
    }
