"""The loop's whole state as one object that can be saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_folder
from embedgrad.errors import RunError

FORMAT = 1


@dataclass
class Checkpoint:
    """Everything that the next step depends on.

    The order of examples is a function of seed and epoch, so `step` alone says which batch is next.
    `best_rows` are the rows that scored best on dev so far, `history` the dev scores in order, and
    `seconds` what a comparison's training took until here.
    """

    step: int
    theta: dict[str, Tensor]
    optimizer: dict[str, Any]
    best_rows: Tensor
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Write the folder anew, aside, then put it in place. Raises `RunError`."""
        tensors = {f"theta.{name}": value for name, value in self.theta.items()}
        tensors["best_rows"] = self.best_rows
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
            "optimizer_numbers": numbers,
            "optimizer_groups": self.optimizer["param_groups"],
        }
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {
            name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()
        }
        write_folder(
            folder,
            {
                "state.safetensors": tensors_to_bytes(tensors),
                "state.json": json.dumps(values, indent=1).encode(),
            },
        )

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read what `save` wrote. Raises `RunError` where it is missing or damaged."""
        try:
            tensors = load_tensors((folder / "state.safetensors").read_bytes())
            values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise RunError(f"{folder}: state format {values['format']}; expected {FORMAT}")
            optimizer: dict[int, dict[str, Any]] = {
                int(index): dict(entries) for index, entries in values["optimizer_numbers"].items()
            }
            for name, value in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "optimizer":
                    index, _, entry = rest.partition(".")
                    optimizer.setdefault(int(index), {})[entry] = value
            return cls(
                step=values["step"],
                theta={k[6:]: v for k, v in tensors.items() if k.startswith("theta.")},
                optimizer={"state": optimizer, "param_groups": values["optimizer_groups"]},
                best_rows=tensors["best_rows"],
                best_step=values["best_step"],
                history=values["history"],
                seconds=values.get("seconds", 0.0),
            )
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
            SafetensorError,
        ) as error:
            raise RunError(f"{folder}: the saved state cannot be read ({error})") from error
