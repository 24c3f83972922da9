"""CP parameterization: prompts of several tasks in one learned subspace."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import torch
from annotated_types import Ge, Le
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import LARGEST_FILE, read_bytes
from embedgrad.errors import OptionError, RecipeError
from embedgrad.model.backbone import Prompt
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size

FILE = "family.safetensors"
FACTORS = ("left", "right")


@final
@dataclass(frozen=True)
class CP(Parameterization):
    """Refine the prompts of several tasks with factors that they share, and R numbers for each.

    rows of task t = start_t + s A diag(c_t) B, with A [P, R] random and B [R, D] from zero shared
    by all tasks, c_t [1, R] from one the task's own, and s the root mean square of each start row.
    P is the longest span. A further task keeps A and B of a `family` and trains c_t alone.
    Source: the CP form of Aurora, https://arxiv.org/abs/2305.08381, over tasks.
    """

    rank: Annotated[int, Ge(1), Le(4096)] | None = None
    """The rank R: the numbers that each task has to itself; unset: 8, or the family's."""
    family: str | None = None
    """A run with [[tasks]] whose shared factors are taken as they are; unset: they are trained."""

    def __post_init__(self) -> None:
        if self.family is not None and self.rank is not None:
            raise OptionError(
                f"parameterization.rank: {self.rank}, but the family has its own; take it out"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.family is None else (Path(self.family) / FILE,)

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        some = next(iter(start.values()))
        longest = max(rows.shape[-2] for rows in start.values())
        theta: Theta = {}
        if self.family is None:
            rank = self.rank or 8
            left = torch.randn((longest, rank), generator=generator).to(some)
            theta["left"] = left / rank**0.5
            theta["right"] = some.new_zeros(rank, some.shape[-1])
        left, right = self._factors(theta, some)
        if (longest > len(left)) or (some.shape[-1] != right.shape[1]):
            raise RecipeError(
                "parameterization.family",
                [
                    f"{self.family} is of prompts of up to {len(left)} rows of {right.shape[1]} "
                    f"numbers, and this one has {longest} of {some.shape[-1]}; shorten the span, "
                    "or train the family again with this task among its [[tasks]]"
                ],
            )
        codes = {
            f"{name} codes": rows.new_ones(*rows.shape[:-2], 1, len(right))
            for name, rows in start.items()
        }
        return {**theta, **codes}

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        left, right = self._factors(theta, next(iter(start.values())))
        return {
            name: rows
            + row_size(rows) * ((left[: rows.shape[-2]] * theta[f"{name} codes"]) @ right)
            for name, rows in start.items()
        }

    def _factors(self, theta: Theta, like: Tensor) -> tuple[Tensor, Tensor]:
        """The shared factors A and B: trained, or those of the family."""
        if self.family is None:
            return theta["left"], theta["right"]
        (path,) = self.files
        try:
            left, right = _read(path, path.stat().st_mtime_ns)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RecipeError(
                "parameterization.family",
                [
                    f"{path} cannot be read ({error}); give a run of a recipe with [[tasks]] and "
                    'parameterization.name = "cp"'
                ],
            ) from error
        return left.to(like), right.to(like)


def save_family(theta: Theta, folder: Path) -> None:
    """Write the factors that tasks share, if theta has any. Raises `RunError`."""
    factors = {name: theta[name].detach().cpu().contiguous() for name in FACTORS if name in theta}
    if factors:
        write_file(folder / FILE, tensors_to_bytes(factors))


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int) -> tuple[Tensor, Tensor]:
    factors = load_tensors(read_bytes(path, LARGEST_FILE))
    left, right = (factors[name] for name in FACTORS)
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors of shape {list(left.shape)} and {list(right.shape)}")
    return left, right
