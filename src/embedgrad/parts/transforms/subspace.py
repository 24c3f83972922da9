"""Subspace memory: a step leaves alone what earlier tasks depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Le
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.bounded_reads import LARGEST_FILE, read_bytes
from embedgrad.errors import RecipeError
from embedgrad.parts.parameterizations import Theta
from embedgrad.parts.transforms.base import Context, Setup, State, Transform

FILE = "memory.safetensors"


@final
@dataclass(frozen=True)
class SubspaceMemory(Transform):
    """Take the directions that earlier tasks depend on out of every step.

    theta <- theta_old + d - V^T V d,   d = theta_new - theta_old

    V [r, N] has orthonormal rows, N numbers each, as theta. The step is projected and not the
    gradient, as AdamW rescales gradients number by number. The trust region still comes last.
    `embedgrad continue` makes the memory of a run, and the other options say how:
    gradient takes the gradients of the score margins of rows, a margin being the right choice's
    score minus the best other's, or a free answer's log-probability; update the right singular
    vectors of how the task moved the rows; svd those of the rows themselves.
    Source: orthogonal steps as in Sculpting Subspaces, https://arxiv.org/abs/2504.07097, whose form
    is svd; gradient follows OGD, https://arxiv.org/abs/1910.07104, and GPM,
    https://arxiv.org/abs/2103.09762; update O-LoRA, https://arxiv.org/abs/2310.14152.
    """

    memory: str | None = None
    """A run whose memory is kept out of steps; unset: nothing is. `embedgrad continue` sets it."""
    source: Literal["gradient", "update", "svd"] = "gradient"
    """What a new task's directions are taken from."""
    energy: Annotated[float, Ge(0), Le(1)] = 0.99
    """Share of the squared length that the directions keep; 0: nothing."""
    rank_share: Annotated[float, Ge(0), Le(1)] = 0.8
    """Most directions of all tasks, as a share of the trained numbers."""
    samples: Annotated[int, Gt(0)] = 256
    """Most training rows of a task whose gradients are taken."""

    @property
    def keeps_start(self) -> bool:
        return self.memory is not None  # the text's rows know nothing of earlier tasks

    def init(self, theta: Theta, setup: Setup | None = None) -> State:
        if self.memory is None:
            return {}
        directions_RN = read_memory(Path(self.memory))
        numbers = sum(value.numel() for value in theta.values())
        if directions_RN.shape[1] != numbers:
            raise RecipeError(
                "transforms",
                [
                    f"memory: {self.memory} remembers a prompt of {directions_RN.shape[1]} trained "
                    f"numbers, and this one has {numbers}; give a run of the same words, model and "
                    "parameterization"
                ],
            )
        return {"directions": directions_RN.to(next(iter(theta.values())))}

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        if not state:
            return new, state
        directions_RN = state["directions"]
        step_N = torch.cat([(new[name] - old[name]).flatten() for name in new])
        taken_N = (directions_RN @ step_N) @ directions_RN
        taken = torch.split(taken_N, [value.numel() for value in new.values()])
        theta = {
            name: value - part.view_as(value)
            for (name, value), part in zip(new.items(), taken, strict=True)
        }
        return theta, state

    def absorb(self, memory_RN: Tensor, found_MN: Tensor, energy: float | None = None) -> Tensor:
        """The memory, and as many directions of `found` as it takes to keep the energy.

        What the memory has already counts (GPM, algorithm 1). `energy` replaces the option.
        """
        memory, found = memory_RN.double(), found_MN.double()
        rest = found - (found @ memory.T) @ memory
        rest -= (rest @ memory.T) @ memory  # once more, for rounding
        whole = found.pow(2).sum()
        lengths, directions = torch.linalg.svd(rest, full_matrices=False)[1:]
        squares = lengths.pow(2)
        before = whole - squares.sum() + squares.cumsum(0) - squares
        share = self.energy if energy is None else energy
        needed = (before < share * whole) & (squares > 1e-12 * whole)
        room = max(0, int(self.rank_share * memory.shape[1]) - len(memory))
        return torch.cat([memory, directions[needed][:room]]).float()


def top_directions(matrix_PD: Tensor, energy: float) -> Tensor:
    """The right singular vectors that keep a share of the squared length, shape [r, D]."""
    empty = matrix_PD.new_zeros(0, matrix_PD.shape[1])
    return SubspaceMemory(energy=energy, rank_share=1.0).absorb(empty, matrix_PD)


def save_memory(memory_RN: Tensor, folder: Path) -> None:
    """Write RUN/memory.safetensors. Raises `RunError`."""
    write_file(folder / FILE, tensors_to_bytes({"V": memory_RN.float().contiguous()}))


def read_memory(folder: Path) -> Tensor:
    """A run's memory, [r, N] with orthonormal rows. Raises `RecipeError`."""
    path = folder / FILE
    try:
        memory = load_tensors(read_bytes(path, LARGEST_FILE))["V"]
        products = memory @ memory.T if memory.dim() == 2 else memory
        if memory.dim() != 2 or not torch.allclose(products, torch.eye(len(memory)), atol=1e-4):
            raise ValueError("its directions are not orthonormal")
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise RecipeError(
            "transforms",
            [
                f"memory: {path} cannot be read ({error}); give a run that has one, or delete it: "
                "`embedgrad continue` makes it again"
            ],
        ) from error
    return memory
