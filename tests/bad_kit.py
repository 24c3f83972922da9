"""A place to spoil what a command is given, and a check of how it is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file, save_file

from kit import reseal
from run_kit import Command, values, write_jsonl


@dataclass
class Place:
    """A folder of a test's own: data/ with the three splits, run/ (a finished run) if asked for."""

    folder: Path
    model: Path
    finished: Path

    def optimize(self, *settings: str, **sections: Mapping[str, Any]) -> list[object]:
        """Arguments of a run; `settings` go to --set, sections into the recipe."""
        recipe = self.folder / "recipe.toml"
        whole = values(self.model, self.folder / "data", **sections)
        recipe.write_text(tomli_w.dumps(whole), "utf-8")
        sets = [part for setting in settings for part in ("--set", setting)]
        return ["optimize", recipe, "--out", self.folder / "out" / "run", *sets]

    def rows(self, split: str) -> list[dict[str, str]]:
        lines = (self.folder / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def data(self, name: str, content: bytes) -> str:
        """Write a data file and return the setting that trains on it."""
        path = self.folder / "data" / name
        path.write_bytes(content)
        return f"data.train={path}"

    def train(self, change: Callable[[int, dict[str, str]], dict[str, str]]) -> Place:
        """Change the rows of train.jsonl, each by its index."""
        rows = [change(i, row) for i, row in enumerate(self.rows("train"))]
        write_jsonl(self.folder / "data" / "train.jsonl", rows)
        return self

    @property
    def run(self) -> Path:
        """A finished run to spoil."""
        copy = self.folder / "run"
        if not copy.exists():
            shutil.copytree(self.finished, copy)
        return copy

    def describe(self, **entries: Any) -> Path:
        """The run with other entries in its prompt.json; None takes one away."""
        path = self.run / "prompt" / "prompt.json"
        described = {**json.loads(path.read_text("utf-8")), **entries}
        kept = {name: value for name, value in described.items() if value is not None}
        path.write_text(json.dumps(kept), "utf-8")
        reseal(path.parent)
        return self.run

    def sign(self, content: bytes) -> Path:
        """The run with other bytes as its rows, and a prompt.json that says they are right."""
        path = self.run / "prompt" / "prompt.safetensors"
        path.write_bytes(content)
        described = json.loads((self.run / "prompt" / "prompt.json").read_text("utf-8"))
        described["rows"]["sha256"] = hashlib.sha256(content).hexdigest()
        return self.describe(**described)

    def tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        """The run with other rows, well written."""
        path = self.run / "prompt" / "prompt.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "rows": change(tensors["rows"]).contiguous()}, path)
        return self.sign(path.read_bytes())


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


Case = tuple[Callable[[Place], list[object]], tuple[str, ...]]


def check(embedgrad: Command, place: Place, case: Case, stdin: bytes = b"") -> None:
    arguments, told = case[0](place), case[1]
    before = contents(place.folder)
    quiet = [] if arguments[0] in ("parts", "new") else ["--quiet"]
    done = embedgrad(*arguments, *quiet, stdin=stdin)
    assert done.code == 2, done
    assert done.out == ""
    assert len(done.lines) == 1, done.err
    assert done.err.startswith("error: ")
    assert done.lines[0].isprintable()
    assert "Traceback" not in done.err
    for part in told:
        assert part in done.err
    assert contents(place.folder) == before


def at(path: Path, content: bytes = b"") -> Path:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
