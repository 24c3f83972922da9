"""Extrapolation: the gradient of a point ahead, around any other optimizer."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

import torch
from annotated_types import Ge, Le
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers.base import Optimizer

_LAST, _DRAWN = "last_step", "drawn"


@final
@dataclass(frozen=True)
class Extrapolated(Optimizer):
    """Step from theta with the gradient of a point ahead, by another optimizer's rule.

    ahead = theta + scale d,   theta <- theta + step of the base optimizer with the gradient there
    d is the base optimizer's last step (past), the step that it would take from theta itself
    (fresh, which takes a second gradient), or noise that is as long in every row as its last step.
    The point ahead is moved into the trust region. With scale = 1 around plain SGD, fresh is the
    extragradient method and past is optimistic gradient descent. It is for large batches, and for
    objectives that are a game; on a smooth loss alone it is slower than its base.
    Source: Lin et al. 2020, https://arxiv.org/abs/2006.05720. There d is made of gradients; steps
    also serve optimizers that scale these, as Adam does.
    """

    learning_rate: Annotated[float, Ge(0), Le(1e30)] = 0.0
    """Step size of the base optimizer; 0: its default."""
    base: str | Mapping[str, str | float] = "adamw"
    """The optimizer inside: its name, or a table of its name and options."""
    direction: Literal["past", "fresh", "noise"] = "past"
    """Where the point ahead lies."""
    scale: Annotated[float, Ge(0)] = 0.5
    """How far ahead it lies, in steps; 0: nowhere, the base optimizer alone."""
    moments: Literal["keep", "update"] = "keep"
    """With fresh: whether looking ahead changes the base optimizer's running means (ExtraAdam)."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        base = self._base()
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", base.learning_rate)

    @property
    def gradients(self) -> int:
        return 2 if self.direction == "fresh" and self.scale else 1

    def _base(self) -> Optimizer:
        from embedgrad.parts.registry import build_part  # which reads the table that lists this

        given = {"name": self.base} if isinstance(self.base, str) else self.base
        problems: list[str] = []
        part: Optimizer | None = None
        if given.get("name") == "extrapolated":
            problems.append("'extrapolated' cannot be inside itself; name another optimizer")
        elif "learning_rate" in given:
            problems.append("learning_rate: give it beside base, as optimizer.learning_rate")
        else:
            rate = {"learning_rate": self.learning_rate} if self.learning_rate else {}
            part = build_part("optimizer", {**given, **rate}, "base", problems)
        if part is None:
            own = [problem.removeprefix("base").lstrip(".: ") for problem in problems]
            raise RecipeError("optimizer.base", own)
        return part

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        base = self._base().build(theta)
        return base if self.scale == 0 else _Ahead(base, self)


@final
class _Ahead(torch.optim.Optimizer):
    """Steps of a base optimizer, whose groups and state it shares."""

    def __init__(self, base: torch.optim.Optimizer, settings: Extrapolated):
        super().__init__(base.param_groups, {})
        self.base, self.settings = base, settings
        self.state = base.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is not None
        leaves = [leaf for group in self.param_groups for leaf in group["params"]]
        old = [leaf.clone() for leaf in leaves]

        def set_to(values: Sequence[Tensor]) -> None:
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)

        def evaluate_ahead() -> float:
            with torch.no_grad():
                set_to(ahead)
            try:
                return closure()
            finally:
                with torch.no_grad():
                    set_to(old)

        if self.settings.direction == "fresh":
            state = defaultdict(dict, {p: copy.deepcopy(held) for p, held in self.state.items()})
            self.base.step(closure)
            moves = [leaf - start for leaf, start in zip(leaves, old, strict=True)]
            set_to(old)
            if self.settings.moments == "keep":
                self.base.state = self.state = state
        else:
            moves = [self._move(leaf, at) for at, leaf in enumerate(leaves)]
        scale = self.settings.scale
        ahead = [start + scale * move for start, move in zip(old, moves, strict=True)]
        loss = self.base.step(evaluate_ahead)
        if self.settings.direction != "fresh":
            for leaf, start in zip(leaves, old, strict=True):
                self.state[leaf][_LAST] = leaf - start
        return loss

    def _move(self, leaf: Tensor, at: int) -> Tensor:
        """The last step of a leaf, or noise of its length; zeros before the first."""
        held = self.state.get(leaf, {})
        if _LAST not in held:
            return torch.zeros_like(leaf)
        last: Tensor = held[_LAST]
        if self.settings.direction == "past":
            return last
        held[_DRAWN] = held.get(_DRAWN, 0) + 1
        seed = random.Random(f"{self.settings.seed}:{at}:{held[_DRAWN]}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return noise * last.pow(2).mean(-1, keepdim=True).sqrt()
