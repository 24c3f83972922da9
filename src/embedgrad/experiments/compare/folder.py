"""A comparison's folder: trainings, answers, checkpoints.

FOLDER/recipe.toml                    every setting; methods and seeds may be added
FOLDER/predictions.jsonl              the test rows with the answers of all methods
FOLDER/work/comparison.json           what all parts share: data, model, day
FOLDER/work/METHOD-seed-N/trained.*   a training: tensors, and facts as JSON
FOLDER/work/METHOD-seed-N/answers.jsonl, scored.json   its answers to the test rows
FOLDER/work/unfinished/METHOD-seed-N/checkpoint.*   of a training, from its last evaluation
FOLDER/work/unfinished/METHOD-seed-N.json      the answers to the test rows so far
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from embedgrad.atomic_files import (
    SEAL,
    check_seal,
    finite,
    remove_file,
    seal,
    to_json_lines,
    write_file,
    write_folder,
    write_json,
)
from embedgrad.data.bounded_reads import (
    LARGEST_FILE,
    MOST_VALUES_OF_ROWS,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_lines,
    read_text,
)
from embedgrad.environment import versions
from embedgrad.errors import RunError
from embedgrad.evaluation.answers import ScoredAnswer
from embedgrad.experiments.baselines import METHODS, Answers, Trained
from embedgrad.experiments.compare.recipe_diff import recipe_differences, show
from embedgrad.recipe.paths import anchor
from embedgrad.recipe.recipe import Recipe, check_run_version

FACTS = {"trained_numbers", "stored_bytes", "examples_seen", "train_seconds", "dev", "settings"}
SCORES = ("accuracy", "cut", "tokens", "scoring_seconds")
_FIRST = ("events.jsonl", "recipe.toml", "solutions.jsonl", "work")  # before a part is finished


@final
class Part(NamedTuple):
    """One method with one seed; None if a seed changes nothing."""

    method: str
    seed: int | None

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.method if self.seed is None else f"{self.method}-seed-{self.seed}"


def sort_parts(parts: Iterable[Part]) -> list[Part]:
    """Parts by method, in the table's order, then by seed."""
    order = list(METHODS)
    return sorted(parts, key=lambda part: (order.index(part.method), part.seed or 0))


@final
class Folder:
    """The output folder of a comparison."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / "work"
        self.unfinished = self.work / "unfinished"

    def open(self, recipe: Recipe, parts: Sequence[Part]) -> list[str]:
        """Check that the folder belongs to this recipe. Raises `RunError` naming what differs.

        A folder without a finished part may belong to any recipe. What is damaged of `parts` is put
        aside, so that it is done again, and told; damage of others is raised.
        """
        lost = [
            f"{part} has lost its trained.json; {self._put_aside(part)}"
            for part in parts
            if (self.work / part.folder).is_dir()
            and not (self.work / part.folder / "trained.json").is_file()
        ]
        if not any(self._parts()):
            if self.path.exists() and (not self.path.is_dir() or self._foreign()):
                raise RunError(f"{self.path}: exists and is no comparison; choose another --out")
            shutil.rmtree(self.unfinished, ignore_errors=True)  # perhaps of another recipe
            return lost
        path = self.path / "recipe.toml"
        try:
            before = parse_toml(read_text(path))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read ({error}); choose another --out") from error
        check_run_version(self.path, before)
        anchor(before, self.path)
        different = recipe_differences(before, recipe)
        if different:
            more = f", and {len(different) - 3} more differ" if len(different) > 3 else ""
            raise RunError(
                f"{self.path}: is a comparison of another recipe: {'; '.join(different[:3])}{more}"
                "; choose another --out"
            )
        told = lost
        for part in self._parts():  # damage is found before any time is spent
            try:
                self.training(part)
                if self.is_scored(part):
                    self.scored_answers(part, len(self.scores(part)["correct"]))
            except RunError as error:
                if part not in parts:
                    raise
                told.append(f"{str(error).rpartition('; ')[0]}; {self._put_aside(part)}")
        return told

    def _put_aside(self, part: Part) -> str:
        """Make room for a damaged part, whose training may be whole; what is done about it."""
        folder = self.work / part.folder
        try:
            self.training(part)
            remove_file(folder / "scored.json")
            return f"{part} is scored again"
        except RunError as damage:
            aside = folder.with_name(f".{part.folder}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                os.replace(folder, aside)
            except OSError:
                raise damage from None
            return f"{part} is trained again, and what is there is kept in {aside.name}"

    def agree(self, recipe: Recipe, shared: Mapping[str, Any]) -> None:
        """Record what all parts share. Raises `RunError` if earlier parts have other values."""
        path = self.work / "comparison.json"
        before = {**shared, **self.shared}
        for name, value in shared.items():
            if before[name] != value:
                raise RunError(
                    f"{self.path}: its parts were made with another {name} "
                    f"({show(before.get(name))} there, {show(value)} here); "
                    "choose another --out"
                )
        write_json(path, before)
        write_file(self.path / "recipe.toml", recipe.as_toml(self.path).encode())

    @property
    def shared(self) -> dict[str, Any]:
        """What all parts share; empty if none is finished. Raises `RunError`."""
        if not any(self._parts()):
            return {}
        path = self.work / "comparison.json"
        unknown = "what its finished parts share is unknown; restore it, or choose another --out"
        values = _read_json(path, unknown)
        try:
            datetime.date.fromisoformat(values["day"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: has no day ({error}); {unknown}") from error
        return values

    def is_trained(self, part: Part) -> bool:
        """Whether the part's training is finished."""
        return (self.work / part.folder / "trained.json").is_file()

    def is_scored(self, part: Part) -> bool:
        """Whether the part's answers to the test rows are scored."""
        return (self.work / part.folder / "scored.json").is_file()

    def finished_parts(self) -> list[Part]:
        """Every part that is trained and scored, in the order of methods and seeds."""
        return sort_parts(p for p in self._parts() if self.is_trained(p) and self.is_scored(p))

    def save_training(self, part: Part, trained: Trained) -> None:
        """Write a finished training, all of it or nothing."""
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {n: t.detach().cpu().clone().contiguous() for n, t in trained.tensors.items()}
        content = tensors_to_bytes(tensors)
        values = {
            "method": part.method,
            "seed": part.seed,
            "versions": versions("peft"),
            "facts": finite({**trained.facts, "threads": torch.get_num_threads()}),
        }
        files = {
            "trained.safetensors": content,
            "trained.json": json.dumps(
                seal(values, content), indent=1, ensure_ascii=False
            ).encode(),
        }
        write_folder(self.work / part.folder, files)
        shutil.rmtree(self.unfinished / part.folder, ignore_errors=True)

    def training(self, part: Part) -> Trained:
        """Read a finished training. Raises `RunError` if it is damaged."""
        folder = self.work / part.folder
        values = _read_json(folder / "trained.json")
        try:
            content = read_bytes(folder / "trained.safetensors", LARGEST_FILE)
            if (values["method"], values["seed"]) != part:
                raise ValueError("it is of another part")
            missing = sorted(FACTS - values["facts"].keys())
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            if hashlib.sha256(content).hexdigest() != values[SEAL]:  # as earlier versions wrote
                check_seal(values, content)
            return Trained(tensors_from_bytes(content), values["facts"])
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise RunError(
                f"{folder}: the training is damaged ({error}); delete the folder to train again"
            ) from error

    def save_scores(
        self, part: Part, answers: list[ScoredAnswer], scores: Mapping[str, Any]
    ) -> None:
        """Write the answers to the test rows, then the scores."""
        folder = self.work / part.folder
        lines = to_json_lines(map(asdict, answers))
        write_file(folder / "answers.jsonl", lines)
        write_json(folder / "scored.json", seal(finite(scores), lines))
        remove_file(self._partial(part))

    def save_partial_answers(
        self, part: Part, answers: Answers, seconds: float, scorer: Mapping[str, Any]
    ) -> None:
        """Write the answers to the first test rows, their seconds, and the scorer."""
        values = {
            "training": self._digest(part),
            "scorer": scorer,
            "answered": [asdict(answer) for answer in answers.answered],
            "tokens": answers.tokens,
            "seconds": seconds,
        }
        self.unfinished.mkdir(exist_ok=True)
        # Not `finite`: an infinite loss must stay infinite.
        write_file(self._partial(part), json.dumps(seal(values)).encode())

    def partial_answers(self, part: Part) -> tuple[Answers, float, dict[str, Any] | None]:
        """What `save_partial_answers` wrote: answers, seconds, scorer (None: unknown).

        Raises `RunError` if it is damaged.
        """
        path = self._partial(part)
        if not path.exists():
            return Answers([], []), 0.0, None
        try:
            values = parse_json(read_bytes(path, LARGEST_FILE), most=MOST_VALUES_OF_ROWS)
            check_seal(values)
            if values["training"] != self._digest(part):
                raise ValueError("of another training")
            answered = [ScoredAnswer.from_values(a) for a in values["answered"]]
            if len(answered) != len(values["tokens"]):
                raise ValueError("answers and tokens differ in number")
            answers = Answers(answered, values["tokens"])
            return answers, float(values["seconds"]), values.get("scorer")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: cannot be used ({error})") from error

    def _partial(self, part: Part) -> Path:
        return self.unfinished / f"{part.folder}.json"

    def _digest(self, part: Part) -> str:
        return str(_read_json(self.work / part.folder / "trained.json").get("sha256"))

    def versions(self, part: Part) -> dict[str, str]:
        """The versions that the part was trained with."""
        return dict(_read_json(self.work / part.folder / "trained.json").get("versions") or {})

    def scores(self, part: Part) -> dict[str, Any]:
        """The saved scores. Raises `RunError` if they are damaged."""
        path = self.work / part.folder / "scored.json"
        again = "delete it to score again"
        values = _read_json(path, again)
        correct, graded = values.get("correct"), values.get("scores")
        sound = isinstance(correct, str) and set(correct) <= {"0", "1"}
        sound &= graded is None or (isinstance(graded, list) and len(graded) == len(correct or ""))
        sound &= all(isinstance(values.get(name), int | float) for name in SCORES)
        interval = values.get("interval")
        sound &= isinstance(interval, list) and all(isinstance(x, int | float) for x in interval)
        sound &= {"log_loss", "macro_f1"} <= values.keys()  # either may be null
        if not sound:
            raise RunError(f"{path}: is damaged (it lacks scores); {again}")
        try:
            if SEAL in values:  # earlier versions wrote none
                check_seal(values, read_bytes(path.with_name("answers.jsonl"), LARGEST_FILE))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: is damaged ({error}); {again}") from error
        return values

    def answers(self, part: Part) -> list[dict[str, Any]]:
        """The answers to the test rows, as plain values. Raises `RunError` if damaged."""
        path = self.work / part.folder / "answers.jsonl"
        try:
            # Not splitlines: texts may contain other line separators.
            return [parse_json(line) for line in read_lines(path) if line.strip()]
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: is damaged ({error}); delete its folder to train and score again"
            ) from error

    def scored_answers(self, part: Part, count: int) -> list[ScoredAnswer]:
        """The answers to `count` test rows. Raises `RunError` if they are damaged."""
        values = self.answers(part)
        try:
            answers = [ScoredAnswer.from_values(value) for value in values]
            if len(answers) != count:
                raise ValueError(f"{len(answers)} answers for {count} scores")
        except (KeyError, TypeError, ValueError) as error:
            path = self.work / part.folder
            raise RunError(
                f"{path / 'answers.jsonl'}: is damaged ({error}); delete {path / 'scored.json'} to "
                "answer again"
            ) from error
        return answers

    def _foreign(self) -> list[str]:
        """Files that no comparison has before its first part; a killed write leaves a dot file."""
        if (self.work / "comparison.json").is_file():  # all of its parts were put aside
            return []
        names = (path.name for path in self.path.iterdir())
        return [name for name in names if name not in _FIRST and not name.startswith(".")]

    def _parts(self) -> Iterator[Part]:
        for path in sorted(self.work.glob("[!.]*/trained.json")):  # a dot: half written
            method, _, seed = path.parent.name.partition("-seed-")
            part = Part(method, int(seed) if seed.isdecimal() else None)
            if method in METHODS and part.folder == path.parent.name:
                yield part


def _read_json(path: Path, advice: str = "delete its folder") -> dict[str, Any]:
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {advice}") from error
    return values
