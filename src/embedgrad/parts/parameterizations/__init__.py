"""How trained parameters map to a prompt's rows; register here."""

from embedgrad.parts.parameterizations.base import Parameterization, Theta, all_rows
from embedgrad.parts.parameterizations.free import Free

PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    "free": Free,
}

__all__ = ["PARAMETERIZATIONS", "Free", "Parameterization", "Theta", "all_rows"]
