"""The interface of engines, which run an export for its checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

from torch import Tensor

from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence


@final
@dataclass(frozen=True)
class Query:
    """An example of the check: its tokens in training, and the messages that a client sends."""

    sequence: TokenSequence
    messages: Sequence[Mapping[str, str]]


class Engine(AbstractContextManager["Engine"], ABC):
    """An export, opened in its destination's own engine.

    B queries, V ids of the base model's tokenizer. Log-probabilities are natural, fp32, on the CPU,
    of the first token after the whole prompt. `tolerance` is the largest difference to the training
    path that passes; None, as for quantized weights: allow what rounding explains.
    """

    tolerance: float | None

    @abstractmethod
    def logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """With the refined rows, asked as a client asks."""

    @abstractmethod
    def start_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """The same from an export of the start rows."""

    @abstractmethod
    def plain_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        """With the plain token ids of the text prompt."""

    @abstractmethod
    def greedy(self, queries: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        """Greedy answers to refined prompts, without the end token."""

    @abstractmethod
    def choose(self, query: Query) -> int | None:
        """The choice that a client gets by the request that the card gives; None for another
        reply."""

    @abstractmethod
    def answer_logprob(self, query: Query, answer: Ids) -> float:
        """Log-probability of an answer to a refined prompt."""

    def answer_logprobs(self, queries: Sequence[Query]) -> list[tuple[float, ...]]:
        """Log-probability of every target of an example, refined."""
        return [
            tuple(self.answer_logprob(query, answer) for answer in query.sequence.targets)
            for query in queries
        ]

    def token_differences(self, queries: Sequence[Query]) -> list[str]:
        """A line for each query that the engine tokenizes unlike training, if it can tell."""
        return []

    def added_mass(self, queries: Sequence[Query]) -> float:
        """Largest probability that the new tokens have together."""
        return 0.0  # an export that adds tokens says more
