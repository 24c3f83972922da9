"""A setting that `embedgrad tune` tries, and the values that it may have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, final

from embedgrad.data.bounded_reads import parse_toml
from embedgrad.errors import RecipeError
from embedgrad.recipe.overrides import as_toml


@final
@dataclass(frozen=True)
class Setting:
    """A setting, and what it may be: a range of numbers, or one of several values as TOML."""

    name: str
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read NAME=LOW..HIGH, NAME=LOW..HIGH log, or NAME=[VALUE, ...]. Raises `RecipeError`."""
        name, _, given = (part.strip() for part in text.partition("="))
        try:
            if given.startswith("["):
                values = tuple(as_toml(value) for value in parse_toml(f"v = {given}")["v"])
                if len(set(values)) < 2:
                    raise ValueError("expected two values or more")
                return cls(name, values=values)
            bounds, _, scale = given.partition(" ")
            low, high = (parse_toml(f"v = {part}")["v"] for part in bounds.split(".."))
            log = scale.strip() == "log"
            numbers = {type(low), type(high)} <= {int, float}
            scaled = scale.strip() in ("", "log") and not (log and low <= 0)
            if not (numbers and scaled and low < high):
                raise ValueError("expected LOW < HIGH, and with log 0 < LOW")
            whole = isinstance(low, int) and isinstance(high, int)
            return cls(name, low, high, log=log, whole=whole)
        except (ValueError, TypeError) as error:
            why = f"{text!r}: {error}; write NAME=LOW..HIGH, NAME=LOW..HIGH log or NAME=[A, B]"
            raise RecipeError("--over", [why]) from error

    @property
    def ends(self) -> tuple[str, ...]:
        """Values to try whether the recipe takes them."""
        return self.values or (json.dumps(self.low), json.dumps(self.high))

    def suggest(self, trial: Any) -> str:
        """A value for a trial, as TOML."""
        if self.values:
            return str(trial.suggest_categorical(self.name, self.values))
        draw = trial.suggest_int if self.whole else trial.suggest_float
        return json.dumps(draw(self.name, self.low, self.high, log=self.log))
