"""Small recipes, tiny models in folders, and what a command left."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import tiny
from embedgrad.cli import app

ROWS = {"train": 24, "dev": 8, "test": 12}
PROMPT = "Is the review positive or negative?"
CHOICES = ["negative", "positive"]


@dataclass(frozen=True)
class Done:
    """What a command left: exit status, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that standard output is; numbers that JSON lacks are refused."""
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def lines(self) -> list[str]:
        """Standard error by lines."""
        return self.err.splitlines()


Command = Callable[..., Done]
# Typer builds every verb anew for each call, which takes longer than most of them.
get_command = functools.cache(typer.main.get_command)
# Of a command's own context: a command keeps the help option of its first one.
LIKE_THE_PROGRAM: Any = app.info.context_settings


def save_model(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    """Save a tiny model and its tokenizer, in float32."""
    import torch

    loaded = tiny.loaded(architecture, dtype=torch.float32, **options)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def values(model: Path, folder: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A small recipe as plain values; `sections` are merged into it."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {**{split: str(folder / f"{split}.jsonl") for split in ROWS}},
        "template": {"user": f"Review: {{review}}\n\n[[{PROMPT}]]"},
        "target": {"choices": CHOICES},
        "training": {"epochs": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 0.03},  # with larger steps the tiny model gets worse on dev
        "prefix_cache": {"budget": "64 MiB"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    return recipe


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
