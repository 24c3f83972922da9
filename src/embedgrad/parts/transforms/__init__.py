"""Transforms of the gradient and of the step; register them here."""

from embedgrad.parts.transforms.base import Context, Gradients, State, Transform
from embedgrad.parts.transforms.clip import Clip
from embedgrad.parts.transforms.subspace import SubspaceMemory

TRANSFORMS: dict[str, type[Transform]] = {
    "clip": Clip,
    "subspace": SubspaceMemory,
}

__all__ = ["TRANSFORMS", "Clip", "Context", "Gradients", "State", "SubspaceMemory", "Transform"]
