"""`embedgrad rerun`: the same rows to the bit, or what differs; what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from embedgrad import Recipe, run
from run_kit import Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def own(model_folder: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A finished run, and the folder of its data, which may be changed."""
    folder = shutil.copytree(data, tmp_path / "data")
    run(Recipe.from_dict(values(model_folder, folder)), tmp_path / "first")
    return tmp_path / "first", folder


def test_a_run_is_repeated_to_the_bit(own: tuple[Path, Path], embedgrad: Command) -> None:
    first, folder = own
    again = first.with_name("first-rerun")
    done = embedgrad("rerun", first / "prompt", "--quiet")
    assert done.code == 0, done.err
    assert done.out == f"same: the rows of {again} and {first} are equal to the bit\n"
    result = json.loads((again / "result.json").read_text("utf-8"))
    assert result["refined"] == json.loads((first / "result.json").read_text("utf-8"))["refined"]

    rows = (folder / "train.jsonl").read_text("utf-8").splitlines()
    write_jsonl(folder / "train.jsonl", [json.loads(row) for row in reversed(rows)])
    done = embedgrad("rerun", first, "--out", first.with_name("other"), "--quiet", "--json")
    assert done.code == 0, done.err
    assert (done.json["same"], done.json["changed"]) == (False, ["train rows"])
    assert 0 < done.json["farthest"] < 1
    shown = embedgrad("rerun", first, "--out", first.with_name("third"), "--quiet").out
    assert shown.startswith(f"different: the rows of {first.with_name('third')} and {first} differ")
    assert shown.endswith("of a row's norm\nnot as before: train rows\n")


def test_what_cannot_be_rerun_is_one_line(
    own: tuple[Path, Path], model_folder: Path, embedgrad: Command
) -> None:
    first, folder = own

    def told(*arguments: object) -> str:
        done = embedgrad("rerun", *arguments, "--quiet")
        assert done.code == 2
        (line,) = done.err.splitlines()
        return line

    assert "no such run folder" in told(folder.with_name("none"))
    assert "is a file of a run; give its folder" in told(first / "recipe.toml")
    assert f"{folder}: exists already" in told(first, "--out", folder)
    cut = first.with_name("cut")
    asked = iter(range(9))
    recipe = Recipe.from_dict(values(model_folder, folder))
    run(recipe, cut, should_stop=lambda: next(asked) == 1)
    assert f"{cut}: is not finished; `embedgrad resume {cut}` ends it" in told(cut)
    tasks: dict[str, Any] = {
        "tasks": [{"name": "one"}, {"name": "two"}],
        **values(model_folder, folder),
    }
    (cut / "recipe.toml").write_text(tomli_w.dumps(tasks), "utf-8")
    assert "a run of several [[tasks]] is not rerun" in told(cut)
