"""Optimizers and the step-size schedule; register them here."""

from embedgrad.parts.optimizers.adamw import AdamW
from embedgrad.parts.optimizers.base import Optimizer
from embedgrad.parts.optimizers.extrapolated import Extrapolated
from embedgrad.parts.optimizers.lars import LARS
from embedgrad.parts.optimizers.muon import Muon
from embedgrad.parts.optimizers.schedule import Schedule
from embedgrad.parts.optimizers.sgd import SGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "extrapolated": Extrapolated,
    "lars": LARS,
    "muon": Muon,
    "sgd": SGD,
}

__all__ = ["LARS", "OPTIMIZERS", "SGD", "AdamW", "Extrapolated", "Muon", "Optimizer", "Schedule"]
