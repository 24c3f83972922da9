"""Checkpoints: save and load everything that resuming needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

from annotated_types import Ge
from pydantic import ConfigDict, StrictFloat, StrictInt
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import check_seal, seal, write_folder
from embedgrad.data.bounded_reads import LARGEST_FILE, read_bytes, read_json
from embedgrad.data.typed import adapter_of
from embedgrad.errors import RunError
from embedgrad.events import Report, quiet, say

FORMAT = 2
_NAME = re.compile(r"step-(\d{6,12})")
TENSORS, VALUES = "checkpoint.safetensors", "checkpoint.json"
KEPT = 2  # the newest checkpoint, and the one before it, should the newest be damaged
_PLAIN = ("step", "best_step", "history", "seconds", "made_from", "dead", "accumulate", "skipped")


@final
@dataclass
class Checkpoint:
    """Everything that the next step depends on.

    The order of examples is a function of seed and epoch, so `step` alone gives the next batch.
    `transforms` holds the state of each gradient transform, `best` the prompt that scored best on
    dev at `best_step`, `best_theta` its theta, `history` the dev scores in order, and `seconds` the
    training time so far.
    `made_from` holds plain JSON values that must be the same when a run resumes, such as digests;
    `dead` counts what was sampled in the last steps, if there was nothing to learn from it, and
    `objective` is what the objective remembers. `accumulate` is the number of parts of a batch, if
    memory asked for more than the recipe does, and `skipped` counts steps that were left out.
    """

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)

    step: Annotated[StrictInt, Ge(0)]
    theta: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: dict[str, Tensor]
    transforms: list[dict[str, Tensor]] = field(default_factory=list)
    best_step: Annotated[StrictInt, Ge(0)] = 0
    history: list[dict[str, StrictInt | StrictFloat]] = field(default_factory=list)
    seconds: Annotated[StrictFloat | StrictInt, Ge(0)] = 0.0
    made_from: dict[str, Any] = field(default_factory=dict)
    best_theta: dict[str, Tensor] = field(default_factory=dict)
    dead: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Tensor] = field(default_factory=dict)
    accumulate: Annotated[StrictInt, Ge(0)] = 0
    skipped: Annotated[StrictInt, Ge(0)] = 0

    def keep(self, folder: Path) -> None:
        """Save in a folder of all checkpoints, of which the last two stay. Raises `RunError`.

        The first one is read back, so that a disk that loses what it writes is noticed at once.
        No file says which is the newest: their names do, and a name appears with the whole folder.
        """
        own = folder / f"step-{self.step:06d}"
        self.save(own)
        names = _newest_first(folder)
        if len(names) == 1:
            self.load(own)
        kept = names[names.index(own) :][:KEPT]
        for path in names:  # newer ones are damaged: the training comes to their steps again
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def save(self, folder: Path) -> None:
        """Write the folder, aside first, so that it is always whole. Raises `RunError`."""
        tensors = {f"theta.{name}": value for name, value in self.theta.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"best_theta.{name}": value for name, value in self.best_theta.items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective.items()}
        for i, state in enumerate(self.transforms):
            tensors |= {f"transforms.{i}.{name}": value for name, value in state.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, entries in self.optimizer["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        values = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "transforms": len(self.transforms),
            "optimizer_numbers": numbers,
            "optimizer_groups": self.optimizer["param_groups"],
        }
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()
        }
        content = tensors_to_bytes(tensors)
        text = json.dumps(seal(values, content), indent=1)
        write_folder(folder, {TENSORS: content, VALUES: text.encode()})

    @classmethod
    def find(cls, folder: Path, report: Report = quiet) -> Checkpoint | None:
        """The newest whole checkpoint that `keep` left in a folder; None: there is none.

        `report` gets a line about each that is damaged. Raises `RunError` for one that is whole and
        of another version.
        """
        if (folder / VALUES).is_file():
            raise RunError(
                f"{folder}: a checkpoint as earlier versions wrote them; resume with the one that "
                "wrote it, or start a new run"
            )
        for path in _newest_first(folder):
            try:
                return cls.load(path)
            except RunError as error:
                if error.__cause__ is None:  # nothing is damaged
                    raise
                say(report, [f"{error}; it is passed over"])
        return None

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read what `save` wrote. Raises `RunError` where it is missing, damaged or too old."""
        try:
            values = read_json(folder / VALUES)
            content = read_bytes(folder / TENSORS, LARGEST_FILE)
            check_seal(values, content)
            if values["format"] != FORMAT:
                raise RunError(
                    f"{folder}: checkpoint format {values['format']}, but this version reads "
                    f"{FORMAT}; start the run again"
                )
            history, groups = values["history"], values.pop("optimizer_groups")
            if (
                any({"step", "accuracy", "log_loss"} - score.keys() for score in history)
                or (history and values["best_step"] not in [score["step"] for score in history])
                or any({"params", "lr"} - group.keys() for group in groups or [{}])
                or values["transforms"] > 2**10
            ):
                raise ValueError("history, best_step, optimizer_groups or transforms are not whole")
            tensors = load_tensors(content)
            optimizer = _by_index(tensors, "optimizer.")
            for index, entries in values.pop("optimizer_numbers").items():
                optimizer.setdefault(int(index), {}).update(entries)
            states = _by_index(tensors, "transforms.")
            values |= {
                "theta": _below(tensors, "theta."),
                "optimizer": {"state": optimizer, "param_groups": groups},
                "best": _below(tensors, "best."),
                "best_theta": _below(tensors, "best_theta."),
                "objective": _below(tensors, "objective."),
                "transforms": [states.get(i, {}) for i in range(values["transforms"])],
            }
            return adapter_of(cls).validate_python(values)
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
            SafetensorError,
        ) as error:
            why = " ".join(" ".join(str(error).splitlines()[:3]).split())  # pydantic's has more
            raise RunError(f"{folder}: the checkpoint cannot be read ({why})") from error


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder; one that is half written has another name."""
    steps = {int(m[1]): path for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _below(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a path, by the rest of their names."""
    return {n.removeprefix(path): t for n, t in tensors.items() if n.startswith(path)}


def _by_index(tensors: Mapping[str, Tensor], path: str) -> dict[int, dict[str, Any]]:
    """The tensors named path.INDEX.NAME, by index and name."""
    found: dict[int, dict[str, Any]] = {}
    for name, value in _below(tensors, path).items():
        index, _, rest = name.partition(".")
        found.setdefault(int(index), {})[rest] = value
    return found
