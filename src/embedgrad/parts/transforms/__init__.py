"""What happens to a gradient before the step."""

from embedgrad.parts.transforms.base import Gradients, Transform
from embedgrad.parts.transforms.clip import Clip

TRANSFORMS: dict[str, type[Transform]] = {
    "clip": Clip,
}

__all__ = ["TRANSFORMS", "Clip", "Gradients", "Transform"]
