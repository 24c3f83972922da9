"""Augmentations of a training batch; register them here."""

from embedgrad.parts.augmentations.base import Augmentation, BatchContext
from embedgrad.parts.augmentations.masked_thought import MaskedThought

AUGMENTATIONS: dict[str, type[Augmentation]] = {"masked_thought": MaskedThought}

__all__ = ["AUGMENTATIONS", "Augmentation", "BatchContext", "MaskedThought"]
