"""Changes of a training batch, such as noise on the tokens that the model reads."""

from embedgrad.parts.augmentations.base import Augmentation

AUGMENTATIONS: dict[str, type[Augmentation]] = {}

__all__ = ["AUGMENTATIONS", "Augmentation"]
