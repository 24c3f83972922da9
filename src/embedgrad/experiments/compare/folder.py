"""A comparison on disk, so that nothing finished is done twice.

FOLDER/recipe.toml                    every setting; methods and seeds may grow
FOLDER/work/comparison.json           what all parts of it share: data, model, day
FOLDER/work/METHOD-seed-N/trained.*   a training: tensors, and facts as JSON
FOLDER/work/METHOD-seed-N/answers.jsonl, scored.json   its answers to the test rows
FOLDER/work/unfinished/METHOD-seed-N/state.*   where a training stood at its last evaluation
FOLDER/work/unfinished/METHOD-seed-N.json      the answers of the test rows so far
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from embedgrad.atomic_files import finite, write_file, write_folder, write_json
from embedgrad.environment import versions
from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.experiments.baselines import METHODS, Trained
from embedgrad.experiments.baselines.base import Answers
from embedgrad.experiments.compare.recipe_diff import differences, shown
from embedgrad.recipe.recipe import Recipe

FACTS = {"trained_numbers", "stored_bytes", "examples_seen", "train_seconds", "dev", "settings"}
SCORES = ("accuracy", "cut", "tokens", "scoring_seconds")
_BEGUN = ("events.jsonl", "recipe.toml", "solutions.jsonl", "work")  # before anything is finished


class Part(NamedTuple):
    """One method with one seed; None where a seed changes nothing."""

    method: str
    seed: int | None

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.method if self.seed is None else f"{self.method}-seed-{self.seed}"


def answered_from(values: Mapping[str, Any]) -> ScoredAnswer:
    """An answer as it was before it was JSON, where an infinite loss may be null.

    Raises `KeyError` or `TypeError` for what is none.
    """
    shares, loss = values["probabilities"], values["loss"]
    told = {"probabilities": shares and tuple(shares), "loss": math.inf if loss is None else loss}
    return ScoredAnswer(**{**values, **told})


def in_order(parts: Iterable[Part]) -> list[Part]:
    """Parts by method, as the table has them, then by seed."""
    order = list(METHODS)
    return sorted(parts, key=lambda part: (order.index(part.method), part.seed or 0))


class Folder:
    """The output folder of one comparison."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / "work"
        self.unfinished = self.work / "unfinished"

    # -- whose folder it is --------------------------------------------------------------------

    def open(self, recipe: Recipe) -> None:
        """Make the folder, or find it to be of this recipe. Raises `RunError` naming what differs.

        Where no part is finished, nothing holds.
        """
        if not any(self._parts()):
            if self.path.exists() and (not self.path.is_dir() or self._foreign()):
                raise RunError(f"{self.path}: exists and is no comparison; choose another --out")
            shutil.rmtree(self.unfinished, ignore_errors=True)  # of whatever recipe it was
            return
        path = self.path / "recipe.toml"
        try:
            before = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read ({error}); choose another --out") from error
        told = differences(before, recipe)
        if told:
            more = f", and {len(told) - 3} more differ" if len(told) > 3 else ""
            raise RunError(
                f"{self.path}: is a comparison of another recipe: {'; '.join(told[:3])}{more}; "
                "choose another --out"
            )
        for part in self._parts():  # what is damaged is told before anything is spent
            self.training(part)
            if self.is_scored(part):
                self.scores(part)

    def agree(self, recipe: Recipe, shared: Mapping[str, Any]) -> None:
        """Note what all parts share, or refuse data or a model that is not that of the parts."""
        path = self.work / "comparison.json"
        before = {**shared, **self.shared}
        for name, value in shared.items():
            if before[name] != value:
                raise RunError(
                    f"{self.path}: its parts were made with another {name} "
                    f"({shown(before.get(name))} there, {shown(value)} here); "
                    "choose another --out"
                )
        write_json(path, before)
        write_file(self.path / "recipe.toml", recipe.as_toml().encode())

    @property
    def shared(self) -> dict[str, Any]:
        """What all parts share; nothing where none is finished. Raises `RunError`."""
        if not any(self._parts()):
            return {}
        path = self.work / "comparison.json"
        unknown = "what its finished parts share is not known; restore it, or choose another --out"
        values = _read_json(path, unknown)
        try:
            datetime.date.fromisoformat(values["day"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: holds no day ({error}); {unknown}") from error
        return values

    # -- its parts -----------------------------------------------------------------------------

    def is_trained(self, part: Part) -> bool:
        """Whether its training is finished."""
        return (self.work / part.folder / "trained.json").is_file()

    def is_scored(self, part: Part) -> bool:
        """Whether its test rows are answered."""
        return (self.work / part.folder / "scored.json").is_file()

    def finished(self) -> list[Part]:
        """Every part that is trained and scored, in the order of methods and seeds."""
        return in_order(p for p in self._parts() if self.is_trained(p) and self.is_scored(p))

    def keep_training(self, part: Part, trained: Trained) -> None:
        """Write a finished training, whole or not at all."""
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {n: t.detach().cpu().clone().contiguous() for n, t in trained.tensors.items()}
        content = tensors_to_bytes(tensors)
        values = {
            "method": part.method,
            "seed": part.seed,
            "sha256": hashlib.sha256(content).hexdigest(),
            "versions": versions("peft"),
            "facts": finite({**trained.facts, "threads": torch.get_num_threads()}),
        }
        files = {
            "trained.safetensors": content,
            "trained.json": json.dumps(values, indent=1, ensure_ascii=False).encode(),
        }
        write_folder(self.work / part.folder, files)
        shutil.rmtree(self.unfinished / part.folder, ignore_errors=True)

    def training(self, part: Part) -> Trained:
        """Read a finished training. Raises `RunError` where it is damaged."""
        folder = self.work / part.folder
        values = _read_json(folder / "trained.json")
        try:
            content = (folder / "trained.safetensors").read_bytes()
            if hashlib.sha256(content).hexdigest() != values["sha256"]:
                raise ValueError("its digest is not the one that was written")
            lacking = sorted(FACTS - values["facts"].keys())
            if lacking:
                raise ValueError(f"it does not say {', '.join(lacking)}")
            return Trained(tensors_from_bytes(content), values["facts"])
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise RunError(
                f"{folder}: the training is damaged ({error}); delete the folder to train again"
            ) from error

    def keep_scores(
        self, part: Part, answers: list[ScoredAnswer], scores: Mapping[str, Any]
    ) -> None:
        """Write the answers to the test rows, then the scores."""
        folder = self.work / part.folder
        lines = "".join(f"{json.dumps(finite(asdict(a)), ensure_ascii=False)}\n" for a in answers)
        write_file(folder / "answers.jsonl", lines.encode())
        write_json(folder / "scored.json", scores)
        self._answered(part).unlink(missing_ok=True)

    def keep_answers(
        self, part: Part, answers: Answers, seconds: float, scorer: Mapping[str, Any]
    ) -> None:
        """Write the answers to the first test rows, what they took, and by what scorer."""
        values = {
            "training": self._digest(part),
            "scorer": scorer,
            "answered": [asdict(answer) for answer in answers.answered],
            "tokens": answers.tokens,
            "seconds": seconds,
        }
        self.unfinished.mkdir(exist_ok=True)
        # Not `finite`: a loss may be infinite, and shall be so again.
        write_file(self._answered(part), json.dumps(values, ensure_ascii=False).encode())

    def answers_so_far(self, part: Part) -> tuple[Answers, float, dict[str, Any] | None]:
        """What `keep_answers` wrote: answers, seconds, scorer (None: not known).

        Raises `RunError` where it is damaged.
        """
        path = self._answered(part)
        if not path.exists():
            return Answers([], []), 0.0, None
        try:
            values = _read_json(path)
            if values["training"] != self._digest(part):
                raise ValueError("of another training")
            answered = [answered_from(a) for a in values["answered"]]
            if len(answered) != len(values["tokens"]):
                raise ValueError("answers and tokens differ in number")
            answers = Answers(answered, values["tokens"])
            return answers, float(values["seconds"]), values.get("scorer")
        except (RunError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: cannot be used ({error})") from error

    def _answered(self, part: Part) -> Path:
        return self.unfinished / f"{part.folder}.json"

    def _digest(self, part: Part) -> str:
        return str(_read_json(self.work / part.folder / "trained.json").get("sha256"))

    def versions(self, part: Part) -> dict[str, str]:
        """What it was trained with; nothing where an older version of embedgrad did not say."""
        return dict(_read_json(self.work / part.folder / "trained.json").get("versions") or {})

    def scores(self, part: Part) -> dict[str, Any]:
        """What was written with the scores. Raises `RunError` where it is damaged."""
        path = self.work / part.folder / "scored.json"
        again = "delete it to score again"
        values = _read_json(path, again)
        judged, graded = values.get("correct"), values.get("scores")
        sound = isinstance(judged, str) and set(judged) <= {"0", "1"}
        sound &= graded is None or (isinstance(graded, list) and len(graded) == len(judged or ""))
        sound &= all(isinstance(values.get(name), int | float) for name in SCORES)
        interval = values.get("interval")
        sound &= isinstance(interval, list) and all(isinstance(x, int | float) for x in interval)
        sound &= {"log_loss", "macro_f1"} <= values.keys()  # either may be null
        if not sound:
            raise RunError(f"{path}: is damaged (it does not hold all scores); {again}")
        return values

    def answers(self, part: Part) -> list[dict[str, Any]]:
        """The answers to the test rows, as plain values of `ScoredAnswer`. Raises `RunError`."""
        path = self.work / part.folder / "answers.jsonl"
        try:
            # Not splitlines: texts may hold other line separators.
            return [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x]
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: is damaged ({error}); delete its folder to train and score again"
            ) from error

    def _foreign(self) -> list[str]:
        """What no comparison has before its first part; a dot begins what a kill left half done."""
        names = (path.name for path in self.path.iterdir())
        return [name for name in names if name not in _BEGUN and not name.startswith(".")]

    def _parts(self) -> Iterator[Part]:
        for path in sorted(self.work.glob("[!.]*/trained.json")):  # a dot: half written
            values = _read_json(path)
            part = Part(values.get("method", ""), values.get("seed"))
            if part.method in METHODS and part.folder == path.parent.name:
                yield part


def _read_json(path: Path, advice: str = "delete its folder") -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {advice}") from error
    return values
