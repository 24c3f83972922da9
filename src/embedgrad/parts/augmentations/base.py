"""Base class of augmentations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from embedgrad.prompt.sequence import TokenSequence


@final
@dataclass(frozen=True)
class BatchContext:
    """What a batch is drawn for: the run's seed, and the step (from 0) of `total`.

    Token ids are below `vocabulary`.
    """

    seed: int
    step: int
    total: int
    vocabulary: int


class Augmentation(ABC):
    """Changes the batches of training, never those of evaluation; a recipe's are applied in order.

    Its options are the fields of a frozen dataclass. It is a pure function: the same batch, seed
    and step give the same result, also after a run is resumed. `TokenSequence.inputs` changes what
    the model reads, and leaves the labels in `targets` as they are.
    """

    def problem(self, train: Sequence[TokenSequence]) -> str | None:
        """Why it can do nothing with these rows, and what to change; asked before training."""
        return None

    @abstractmethod
    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        """The batch for the step of the context."""
