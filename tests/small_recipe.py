"""The smallest recipe, with changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from embedgrad import Recipe

SMALLEST: dict[str, dict[str, Any]] = {
    "model": {"name": "tiny"},
    "data": {"train": "train.csv"},
    "template": {"user": "{text} [[Is it good?]]"},
}


def changed(**sections: Any) -> dict[str, Any]:
    """The smallest recipe with other sections; a table is merged into the one that is there."""
    values: dict[str, Any] = dict(SMALLEST)
    for name, section in sections.items():
        merge = isinstance(section, Mapping) and isinstance(values.get(name), Mapping)
        values[name] = {**values[name], **section} if merge else section
    return values


def written(tmp_path: Path, values: Mapping[str, Any]) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def read(tmp_path: Path, *overrides: str, **sections: Any) -> Recipe:
    return Recipe.read(written(tmp_path, changed(**sections)), overrides)
