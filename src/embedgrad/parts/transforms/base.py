"""Base class of transforms of the gradient and of the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from embedgrad.model.backbone import Prompt
from embedgrad.model.outcome import Outcome
from embedgrad.parts.parameterizations import Theta
from embedgrad.prompt.sequence import TokenSequence

Gradients = dict[str, Tensor]
State = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Setup:
    """What a transform may look at before the first step.

    The prompt that theta starts from, the training rows, and the model's embeddings: `embed` gives
    rows [T, D] of token ids, of which there are `vocabulary`.
    """

    start: Prompt
    train: Sequence[TokenSequence]
    vocabulary: int
    embed: Callable[[Sequence[int]], Tensor]


@final
@dataclass(frozen=True)
class Context:
    """What a transform may look at: the step (from 0) of `total`, its batch and the results.

    `outcome` and `losses_B` are those of the whole batch, without a graph; `learning_rate` is that
    of the step.
    """

    step: int
    total: int
    batch: Sequence[TokenSequence]
    outcome: Outcome
    losses_B: Tensor
    learning_rate: float = 0.0


class Transform(ABC):
    """Changes gradients and steps; a recipe's transforms are applied in order.

    As in Optax, what a transform remembers is an explicit state, which it takes and gives back: the
    loop saves it in the checkpoint. It leaves its arguments as they are. The trust region is
    applied after all transforms.
    """

    @abstractmethod
    def init(self, theta: Theta, setup: Setup) -> State:
        """The state before the first step; {} where nothing is remembered. Raises `RecipeError`."""

    @property
    def keeps_start(self) -> bool:
        """Whether a warm start's rows are where selection begins, and the text's are no choice."""
        return False

    def before(
        self, gradients: Gradients, state: State, context: Context
    ) -> tuple[Gradients, State]:
        """Gradients of the same names and shapes, for the optimizer.

        Called by the optimizer's closure, so more than once a step by some optimizers.
        """
        return gradients, state

    def after(self, old: Theta, new: Theta, state: State, context: Context) -> tuple[Theta, State]:
        """Theta to use instead of `new`, which the optimizer's step made of `old`.

        What must hold of the step belongs here: optimizers such as AdamW rescale gradients number
        by number, and decay weights.
        """
        return new, state
