"""Parse cache budgets: bytes, "2 GiB" or a share of free memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import psutil
import torch

from embedgrad.errors import RecipeError

_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 10**3), ("ib", 2**10))
}


def free_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that are free, on a CUDA device those of the device."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def budget_bytes(
    budget: str | float, name: str = "prefix_cache.budget", free: Callable[[], int] = free_memory
) -> int:
    """Bytes of a budget: a number of bytes, "2 GiB", or a fraction (below 1) of what is free.

    Raises `RecipeError` with the option's `name` for anything else.
    """
    problem = f"{budget!r}; expected bytes, a size such as '2 GiB', or a fraction below 1"
    refusal = RecipeError(name, [problem])
    unit, point = "", isinstance(budget, float)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", budget)
        if match is None or match[2].lower() not in _UNITS:
            raise refusal
        unit, point = match[2].lower(), "." in match[1]
        budget = float(match[1]) * _UNITS[unit]
    elif isinstance(budget, bool) or not isinstance(budget, int | float):
        raise refusal
    if isinstance(budget, float) and not math.isfinite(budget):
        raise RecipeError(name, ["expected a finite number of bytes"])
    if budget < 0:
        raise RecipeError(name, [f"{budget}; expected 0 or more"])
    if point and not unit and budget == 1:  # all that is free, or one byte?
        raise refusal
    return int(free() * budget) if not unit and 0 < budget < 1 else int(budget)
