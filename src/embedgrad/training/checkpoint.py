"""Checkpoints: save and load everything that resuming needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_folder
from embedgrad.errors import RunError

FORMAT = 2
TENSORS, VALUES = "checkpoint.safetensors", "checkpoint.json"


@final
@dataclass
class Checkpoint:
    """Everything that the next step depends on.

    The order of examples is a function of seed and epoch, so `step` alone gives the next batch.
    `transforms` holds the state of each gradient transform, `best` the prompt that scored best on
    dev at `best_step`, `history` the dev scores in order, and `seconds` the training time so far.
    `made_from` holds plain JSON values that must be the same when a run resumes, such as digests.
    """

    step: int
    theta: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: dict[str, Tensor]
    transforms: list[dict[str, Tensor]] = field(default_factory=list)
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    made_from: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the folder, aside first, so that it is always whole. Raises `RunError`."""
        tensors = {f"theta.{name}": value for name, value in self.theta.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
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
            "step": self.step,
            "best_step": self.best_step,
            "history": self.history,
            "seconds": self.seconds,
            "made_from": self.made_from,
            "transforms": len(self.transforms),
            "optimizer_numbers": numbers,
            "optimizer_groups": self.optimizer["param_groups"],
        }
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()
        }
        content = {
            TENSORS: tensors_to_bytes(tensors),
            VALUES: json.dumps(values, indent=1).encode(),
        }
        write_folder(folder, content)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read what `save` wrote. Raises `RunError` where it is missing, damaged or too old."""
        try:
            values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise RunError(
                    f"{folder}: checkpoint format {values['format']}, but this version reads "
                    f"{FORMAT}; start the run again"
                )
            tensors = load_tensors((folder / TENSORS).read_bytes())
            optimizer = _by_index(tensors, "optimizer.")
            for index, entries in values["optimizer_numbers"].items():
                optimizer.setdefault(int(index), {}).update(entries)
            states = _by_index(tensors, "transforms.")
            return cls(
                step=values["step"],
                theta=_below(tensors, "theta."),
                optimizer={"state": optimizer, "param_groups": values["optimizer_groups"]},
                best=_below(tensors, "best."),
                transforms=[states.get(i, {}) for i in range(values["transforms"])],
                best_step=values["best_step"],
                history=values["history"],
                seconds=values["seconds"],
                made_from=values["made_from"],
            )
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
            SafetensorError,
        ) as error:
            raise RunError(f"{folder}: the checkpoint cannot be read ({error})") from error


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
