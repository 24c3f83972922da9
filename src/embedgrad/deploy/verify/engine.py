"""What a check asks of an engine that has opened an export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


@dataclass(frozen=True)
class Asked:
    """A row of the check: its tokens in training, and the messages that a client would send."""

    sequence: TokenSequence
    messages: Sequence[Mapping[str, str]]


class Engine(AbstractContextManager["Engine"], ABC):
    """An export, opened in its destination's own engine.

    B rows, V ids of the base model's tokenizer. Log-probabilities are natural, fp32, on the CPU, of
    the first token after the whole prompt. `tolerance` is the largest difference to the training
    path that passes; None: reported only, as for quantized weights.
    """

    tolerance: float | None

    @abstractmethod
    def logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        """With the refined rows, asked as a client would ask."""

    @abstractmethod
    def start_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        """The same way, from an export of the start rows."""

    @abstractmethod
    def plain_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        """The same engine on plain token ids: prefix, the span's own ids, suffix."""

    @abstractmethod
    def greedy(self, rows: Sequence[Asked], max_new_tokens: int) -> list[Ids]:
        """Greedy answers to refined prompts, without the end token."""

    @abstractmethod
    def answer_logprobs(self, rows: Sequence[Asked]) -> list[tuple[float, ...]]:
        """Log-probability of every target of a row, refined."""

    def other_tokens(self, rows: Sequence[Asked]) -> list[str]:
        """Rows that the engine cuts into other tokens than training did, where it can tell."""
        return []

    @abstractmethod
    def added_mass(self, rows: Sequence[Asked]) -> float:
        """Largest probability that the new tokens have together; 0 where there are none."""
