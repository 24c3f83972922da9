"""Plain values that become dataclasses, their types checked."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

_MADE: dict[type[Any], TypeAdapter[Any]] = {}


def adapter_of(cls: type[Any]) -> TypeAdapter[Any]:
    """What checks values against a class; made once, as that takes milliseconds."""
    if cls not in _MADE:
        _MADE[cls] = TypeAdapter(cls)
    return _MADE[cls]
