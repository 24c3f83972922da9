"""How trained numbers become rows. Zero change is the text prompt, exactly."""

from embedgrad.parts.parameterizations.base import Parameterization, Theta
from embedgrad.parts.parameterizations.free import Free

PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    "free": Free,
}

__all__ = ["PARAMETERIZATIONS", "Free", "Parameterization", "Theta"]
