"""Paths in a recipe are relative to its file.

In memory a relative path is relative to the current folder. A run writes it relative to the run,
so that both may move together; an absolute path stays as it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedgrad.report.page.run_files import PROMPT_FILE

RECIPE = "recipe.toml"  # of a run
PROMPT = "prompt"  # its artifact's folder
MAPPED = "results.csv"  # of a folder of `embedgrad map`
DATA = ("data.train", "data.dev", "data.test")
MODEL = "model.name"
SCORER = "evaluation.scorer.folder"
PATHS = (
    *DATA,
    MODEL,
    SCORER,
    "solutions.file",
    "training.warm_start",
    "parameterization.family",
    "transforms.memory",
    "teacher.prompt",
    "prefix_cache.spill",
)


def anchor(values: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe that lies in `folder` relative to the current folder, in place.

    What is not in `folder`, but in the current folder, is meant there.
    """
    _name_scorer_folder(values, folder)
    for section, option, path in _paths(values, folder):
        there = os.path.join(os.path.realpath(folder), path)
        if os.path.exists(there) or not os.path.exists(path):
            here = _relative(there, os.getcwd())
            no_hub_name = os.path.exists(there) or is_path(here) or section is not values["model"]
            section[option] = here if no_hub_name else os.path.join(".", here)


def relocate(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's values with paths as a recipe in `folder` has them."""
    moved = copy.deepcopy(dict(values))
    _name_scorer_folder(moved, Path())
    for section, option, path in _paths(moved, Path()):
        parent, name = os.path.split(os.path.abspath(path))
        there, here = os.path.join(os.path.realpath(parent), name), os.path.realpath(folder)
        section[option] = _relative(there, here) if share_folder(there, here) else there
    return moved


def anonymize(values: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A recipe's values without paths: of files the names only, and another name of the model.

    Nor do they say at which address answers were sampled.
    """
    bare = copy.deepcopy(dict(values))
    for section, option, path in _paths(bare, Path(), absolute=True):
        section[option] = os.path.basename(os.path.normpath(path))
    if isinstance(bare.get("sampling"), dict):
        bare["sampling"].pop("engine", None)
    if isinstance(bare.get("model"), dict):
        bare["model"]["name"] = model
    return bare


def find_moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of paths that lead to one place, or to what is no longer where it was.

    Both are settings by dotted name. Whether the content is the same is to be checked elsewhere;
    where a scorer lies never counts.
    """
    pairs = [(name, str(then[name]), str(now.get(name))) for name in PATHS if name in then]
    return SCORER, *(
        name
        for name, a, b in pairs
        if os.path.realpath(a) == os.path.realpath(b)
        or (not os.path.exists(a) and (is_path(a) if name == MODEL else not _is_hub(a)))
    )


def is_path(model: str) -> bool:
    """Whether a model's name is a path even if nothing is there."""
    path = os.path.expanduser(model)
    return path.startswith(".") or os.path.isabs(path) or path.lower().endswith(".gguf")


def find_run(folder: Path) -> Path | None:
    """The run that a folder is, or whose prompt it is; None for a prompt alone."""
    if (folder / RECIPE).is_file():
        return folder
    parent = folder.parent if folder.name == PROMPT else folder.resolve().parent
    inside = folder.resolve().name == PROMPT and (folder / PROMPT_FILE).is_file()
    return parent if inside and (parent / RECIPE).is_file() else None


def no_run(path: Path) -> str:
    """The message about a path that is no run's folder."""
    if path.is_file() and find_run(path.parent) is not None:
        return f"{path}: is a file of a run; give its folder, {path.parent}"
    return f"{path}: no such run folder; `embedgrad optimize RECIPE --out RUN` makes one"


def prompt_folder(folder: Path) -> Path:
    """The folder of the artifact in a run's folder, which may be a prompt's itself."""
    return folder if (folder / PROMPT_FILE).is_file() else folder / PROMPT


def share_folder(path: str | Path, other: str | Path) -> bool:
    """Whether two absolute paths have a folder in common that is not a root.

    Else a path from one to the other would spell the whole path, and neither moves with the other.
    """
    try:
        common = os.path.commonpath([path, other])
    except ValueError:  # on two drives
        return False
    return common != os.path.dirname(common)


def module_in(folder: str | Path, function: str) -> bool:
    """Whether a folder holds the module of "package.module:function"."""
    place = function.partition(":")[0].replace(".", "/")
    return any(os.path.exists(os.path.join(folder, name)) for name in (place, f"{place}.py"))


def _paths(
    values: Mapping[str, Any], folder: Path, *, absolute: bool = False
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every relative path in `values`, with its section and option; `absolute`: every path.

    A model's name is a path if it reads as one, or if it lies in `folder` or the current one.
    """
    for name, inner, option in _options(values):
        path = inner.get(option)
        if not isinstance(path, str) or not path.strip() or (name in DATA and _is_hub(path)):
            continue
        places = [os.path.join(place, path) for place in (folder, "")]
        if name == MODEL and not (is_path(path) or any(map(os.path.exists, places))):
            continue
        if absolute or not os.path.isabs(os.path.expanduser(path)):
            yield inner, option, path


def _options(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every name of `PATHS` with its section, or each part of a list, and its option."""
    for name in PATHS:
        *sections, option = name.split(".")
        inner: Any = values
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        for part in inner if isinstance(inner, list) else [inner]:
            if isinstance(part, dict):
                yield name, part, option


def is_missing(source: str | None) -> bool:
    """Whether the source of a split is a file that is not there."""
    return bool(source) and not os.path.exists(str(source)) and not _is_hub(str(source))


def name_source(source: str | None) -> str:
    """A data set of the Hub, or the name of a file without its folder."""
    return os.path.basename(source) if source and not _is_hub(source) else source or ""


def _is_hub(source: str) -> bool:
    return source.startswith("hub:") and not os.path.exists(source)


def _name_scorer_folder(values: Mapping[str, Any], folder: Path) -> None:
    """Say where a user's scorer is if it is in `folder`."""
    evaluation = values.get("evaluation")
    scorer = evaluation.get("scorer") if isinstance(evaluation, dict) else None
    if not isinstance(scorer, dict) or scorer.get("folder"):
        return
    function = scorer.get("function")
    if isinstance(function, str) and module_in(folder, function):
        scorer["folder"] = "."


def _relative(path: str, folder: str) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on another drive
        return os.path.normpath(path)
