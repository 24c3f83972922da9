"""Augmentations of a training batch; register them here."""

from embedgrad.parts.augmentations.base import Augmentation

AUGMENTATIONS: dict[str, type[Augmentation]] = {}

__all__ = ["AUGMENTATIONS", "Augmentation"]
