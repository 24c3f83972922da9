"""Runs and artifacts that cannot be used, and wrong calls of the other verbs: one line each."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from bad_kit import Case, Place, at, check
from run_kit import Command, save_model

pytest_plugins = ["tiny_runs"]


def nan(rows: torch.Tensor) -> torch.Tensor:
    rows[2, 3] = torch.nan
    return rows


def spoiled(change: Callable[[Place], Path]) -> Callable[[Place], list[object]]:
    return lambda p: ["evaluate", change(p)]


def without(place: Place, name: str) -> Path:
    path = place.run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place.run


def older(place: Place, change: Callable[[str], str] = str) -> Path:
    """The run with a recipe as version 1 wrote it."""
    path = place.run / "recipe.toml"
    text = path.read_text("utf-8")
    assert text.startswith("version = 2\n")
    path.write_text(change(text.removeprefix("version = 2\n")), "utf-8")
    return place.run


def cut(place: Place, keep: int) -> Path:
    return place.sign((place.run / "prompt" / "prompt.safetensors").read_bytes()[:keep])


OLDER = (
    "run was written by an older embedgrad (recipe version 1; this one reads 2): run its recipe "
    "again"
)
RUNS: dict[str, Case] = {
    "no run": (
        lambda p: ["evaluate", p.folder / "none"],
        ("none: no such run folder; `embedgrad optimize RECIPE --out RUN` makes one",),
    ),
    "file as run": (lambda p: ["evaluate", at(p.folder / "a")], ("a: no such run folder",)),
    "file of a run": (
        lambda p: ["inspect", p.run / "recipe.toml"],
        ("recipe.toml: is a file of a run; give its folder, ",),
    ),
    "file of a run to resume": (
        lambda p: ["resume", p.run / "result.json"],
        ("result.json: is a file of a run; give its folder, ",),
    ),
    "file of a run to show": (
        lambda p: ["report", p.run / "recipe.toml"],
        ("recipe.toml: is a file of a run; give its folder, ",),
    ),
    "other folder": (
        lambda p: ["inspect", p.folder / "data"],
        ("data: holds no recipe.toml and no prompt.json; give the folder",),
    ),
    "no prompt": (
        spoiled(lambda p: without(p, "prompt")),
        ("prompt.json: cannot be read (No such file",),
    ),
    "no rows": (
        spoiled(lambda p: without(p, "prompt/prompt.safetensors")),
        ("prompt.safetensors: cannot be read (No such file",),
    ),
    "other version": (
        spoiled(lambda p: p.describe(version=99)),
        ("prompt.json: not written by this embedgrad (format version 99, this one reads 2)",),
    ),
    "older version": (
        spoiled(lambda p: p.describe(version=1)),
        ("prompt.json: written by an older embedgrad (format version 1, this one reads 2)",),
    ),
    "older recipe": (spoiled(older), (OLDER,)),
    "older recipe with old names": (
        spoiled(lambda p: older(p, lambda text: text.replace("[prefix_cache]", "[head_cache]"))),
        (OLDER,),
    ),
    "older recipe to resume": (lambda p: ["resume", older(p)], (OLDER,)),
    "older recipe to generate with": (lambda p: ["generate", older(p), "x"], (OLDER,)),
    "older recipe to export": (
        lambda p: ["export", older(p), "--to", "safetensors", "--out", p.folder / "export"],
        (OLDER,),
    ),
    "newer recipe": (
        spoiled(lambda p: older(p, "version = 3\n".__add__)),
        ("recipe.toml: version: 3; this embedgrad reads 2, or leave it out",),
    ),
    "other format": (
        spoiled(lambda p: p.describe(format="peft")),
        ('is not a saved prompt; expected "format": "embedgrad-prompt"',),
    ),
    "half a description": (spoiled(lambda p: p.describe(spans=None)), ("lacks 'spans'",)),
    "no JSON": (
        spoiled(lambda p: at(p.run / "prompt" / "prompt.json", b"{").parents[1]),
        ("prompt.json: is not JSON",),
    ),
    "other rows": (
        spoiled(lambda p: p.describe(rows={"count": 7, "width": 32, "sha256": "0"})),
        ("digest differs",),
    ),
    "not finite": (
        spoiled(lambda p: p.tensors(nan)),
        ("prompt.safetensors: rows hold numbers that are not finite, in rows [2]",),
    ),
    "other shape": (
        spoiled(lambda p: p.tensors(lambda rows: rows[1:])),
        ("rows are torch.float32 [6, 32]; expected float32 [7, 32]",),
    ),
    "truncated": (spoiled(lambda p: cut(p, 200)), ("prompt.safetensors: ",)),
    "truncated header": (spoiled(lambda p: cut(p, 20)), ("cut short",)),
    "not safetensors": (
        spoiled(lambda p: p.sign(b"PK\x03\x04" + bytes(100))),
        ("prompt.safetensors: is not safetensors",),
    ),
    "monstrous header": (
        spoiled(lambda p: p.sign(struct.pack("<Q", 2**62) + b"{}")),
        ("prompt.safetensors: is not safetensors",),
    ),
    "unknown split": (
        lambda p: ["evaluate", p.run, "--split", "tests"],
        ("--split: unknown split 'tests'; did you mean 'test'?",),
    ),
    "split as attribute": (
        lambda p: ["evaluate", p.run, "--split", "notes"],
        ("--split: unknown split 'notes'; ", "known: dev, test, train"),
    ),
    "other template": (
        lambda p: ["evaluate", p.run, "--set", "template.messages.0.content=[[x]] {review}"],
        ("run: template of the recipe is not the one that the saved prompt was trained with",),
    ),
    "other choices": (
        lambda p: ["generate", p.run, "x", "--set", 'target.choices=["a", "b"]'],
        ("run: target of the recipe is not the one",),
    ),
    "data gone": (
        lambda p: ["evaluate", p.run, "--set", "data.test=gone.jsonl"],
        ("gone.jsonl: no such file",),
    ),
    "query without text": (lambda p: ["generate", p.run, " "], ("the query: column 'review'",)),
    "unknown kind": (lambda p: ["parts", "optimiser"], ("did you mean 'optimizer'?",)),
    "starter of nothing": (
        lambda p: ["new", p.folder / "no.csv", "--out", p.folder / "new.toml"],
        ("no.csv: no such file",),
    ),
    "starter of numbers": (
        lambda p: ["new", at(p.folder / "a.jsonl", b'{"a": 1}\n'), "--out", p.folder / "new.toml"],
        ("a.jsonl: no column holds text to read; its columns are a",),
    ),
    "starter that exists": (
        lambda p: ["new", p.folder / "data/dev.jsonl", "--out", p.folder / "data" / "dev.jsonl"],
        ("dev.jsonl: exists already; choose another name for --out",),
    ),
}


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_bad_run(case: Case, place: Place, embedgrad: Command) -> None:
    check(embedgrad, place, case)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("seed", "the embedding tables differ"),
        ("wordpiece", "the embedding tables differ"),
        ("wide", "its rows are 32 wide, the model's 64"),
    ],
)
def test_a_prompt_of_another_model(
    model: str,
    told: str,
    place: Place,
    other_models: dict[str, Path],
    embedgrad: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if model == "wide":
        monkeypatch.setitem(tiny._SHARED, "hidden_size", 64)
        name = save_model(tmp_path_factory.mktemp("wide") / "wide")
    else:
        name = other_models[model]
    case = (lambda p: ["evaluate", p.run, "--set", f"model.name={name}"], (told, "was made for"))
    check(embedgrad, place, case)


def test_bad_lines_on_standard_input(place: Place, embedgrad: Command) -> None:
    case = (lambda p: ["generate", p.run], ("standard input:1: is not JSON", "an object per line"))
    check(embedgrad, place, case, stdin=b"What is this?\n")
