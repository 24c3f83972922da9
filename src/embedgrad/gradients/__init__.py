"""What happens to a gradient before the step."""

from embedgrad.gradients.base import Gradients, GradientTransform
from embedgrad.gradients.clip import Clip

GRADIENTS: dict[str, type[GradientTransform]] = {
    "clip": Clip,
}

__all__ = ["GRADIENTS", "Clip", "GradientTransform", "Gradients"]
