"""How trained parameters map to a prompt's rows; register here."""

from embedgrad.parts.parameterizations.base import Parameterization, Theta, all_rows
from embedgrad.parts.parameterizations.cp import CP
from embedgrad.parts.parameterizations.free import Free, is_deep, text_rows
from embedgrad.parts.parameterizations.gated import Gated
from embedgrad.parts.parameterizations.low_rank import LowRank
from embedgrad.parts.parameterizations.scale_shift import ScaleShift
from embedgrad.parts.parameterizations.subspace import Subspace

PARAMETERIZATIONS: dict[str, type[Parameterization]] = {
    "free": Free,
    "low_rank": LowRank,
    "scale_shift": ScaleShift,
    "gated": Gated,
    "subspace": Subspace,
    "cp": CP,
}

__all__ = [
    "CP",
    "PARAMETERIZATIONS",
    "Free",
    "Gated",
    "LowRank",
    "Parameterization",
    "ScaleShift",
    "Subspace",
    "Theta",
    "all_rows",
    "is_deep",
    "text_rows",
]
