"""Plain values that become dataclasses, their types checked."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

T = TypeVar("T")

_MADE: dict[type[Any], TypeAdapter[Any]] = {}


def adapter_of(cls: type[T]) -> TypeAdapter[T]:
    """What checks values against a class; made once, as that takes milliseconds."""
    if cls not in _MADE:
        _MADE[cls] = TypeAdapter(cls)
    return cast(TypeAdapter[T], _MADE[cls])
