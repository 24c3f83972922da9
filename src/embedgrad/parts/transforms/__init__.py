"""Transforms of the gradient and of the step; register them here."""

from embedgrad.parts.transforms.base import Context, Gradients, State, Transform
from embedgrad.parts.transforms.clip import Clip

TRANSFORMS: dict[str, type[Transform]] = {
    "clip": Clip,
}

__all__ = ["TRANSFORMS", "Clip", "Context", "Gradients", "State", "Transform"]
