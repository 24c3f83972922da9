"""How trained numbers become a prompt; at the start it is the text prompt, to the bit."""

from embedgrad.parts.parameterizations.base import Parameterization, Theta, all_rows
from embedgrad.parts.parameterizations.free import Free

PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    "free": Free,
}

__all__ = ["PARAMETERIZATIONS", "Free", "Parameterization", "Theta", "all_rows"]
