"""An adaptive policy: ask prompts in turn until an answer is accepted.

Inspired by Adaptive Prompting (Kamesh R 2024, https://arxiv.org/abs/2410.08130), which publishes no
algorithm: solve, validate, and try again where the validation fails. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, final

from annotated_types import Gt, Le

from embedgrad.atomic_files import finite


@final
@dataclass(frozen=True)
class PooledPrompt:
    """A prompt of the pool."""

    run: str
    """A run's folder, or a saved prompt's; relative to the policy's file."""
    text_prompt: bool = False
    """Take the unrefined prompt of it."""


@final
@dataclass(frozen=True)
class PolicySettings:
    """What a policy's TOML file holds."""

    prompts: tuple[PooledPrompt, ...]
    """The pool: prompts for one model, with the same columns and choices."""
    validators: tuple[Literal["format", "arithmetic", "agreement", "margin"], ...] = ("margin",)
    """What scores how far to trust an answer; with several the product counts."""
    precision: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of accepted answers that are right: thresholds are set on dev rows to reach it."""
    rounds: Annotated[int, Gt(0)] = 3
    """Most prompts asked per query, the best on dev rows first. From a larger pool successive
    halving on dev rows chooses them."""
    max_calls: Annotated[int, Gt(0)] | None = None
    """Most answers written or chosen per query."""
    max_tokens: Annotated[int, Gt(0)] | None = None
    """Most tokens read and written per query."""
    pattern: str | None = None
    """A regular expression that `format` looks for in the answer."""
    samples: Annotated[int, Gt(0)] = 1
    """Answers per round, the first of them greedy; `agreement` needs two or more."""
    temperature: Annotated[float, Gt(0)] = 0.7
    """Sampling temperature of the others."""


@final
class Price(NamedTuple):
    """What a round takes: answers, tokens, and those of a prefix that one query's rounds share."""

    calls: int
    tokens: int
    prefix: Hashable = None
    prefix_tokens: int = 0


@final
class Attempt(NamedTuple):
    """A round's answer, and how far it is to be trusted: from 0 to 1, and by validator.

    `price` is what it took, `most` what it could have taken. `right` is known of labelled rows.
    """

    answer: str
    score: float
    price: Price
    most: Price
    checks: Mapping[str, float] = {}
    right: float = 0.0


@final
@dataclass
class Decision:
    """The answer to a query, and how it was come by.

    `answer` is None where no round fits into the budget. `accepted` is the prompt whose answer
    passed, by its place in the pool. `calls` and `tokens` are what was spent, `trace` has one plain
    entry for each round, `columns` the query.
    """

    answer: str | None = None
    accepted: int | None = None
    calls: int = 0
    tokens: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)


def follow(
    settings: PolicySettings,
    thresholds: Mapping[int, float],
    queries: int,
    price: Callable[[int, int], Price],
    ask: Callable[[int, Sequence[int]], Sequence[Attempt]],
    same: Callable[[str, str], bool] = str.__eq__,
) -> list[Decision]:
    """Decide queries: ask the prompts of `thresholds` in order, until an answer reaches its.

    `ask` gives a prompt's answers to some of the queries, and `price` the most that its round on
    one can take: a round that might exceed the budget is left out, so that the budget holds. Where
    none is accepted, the answers vote, weighted by their scores; `same` says which are one.
    """
    decisions = [Decision() for _ in range(queries)]
    read: list[set[Hashable]] = [set() for _ in decisions]  # prefixes by query

    def cost(query: int, price: Price) -> int:
        return price.tokens + (0 if price.prefix in read[query] else price.prefix_tokens)

    def fits(query: int, price: Price) -> bool:
        calls = decisions[query].calls + price.calls
        tokens = decisions[query].tokens + cost(query, price)
        most = (settings.max_calls or math.inf, settings.max_tokens or math.inf)
        return calls <= most[0] and tokens <= most[1]

    for prompt, threshold in list(thresholds.items())[: settings.rounds]:
        asked = [
            i
            for i, decision in enumerate(decisions)
            if decision.accepted is None and fits(i, price(prompt, i))
        ]
        for i, attempt in zip(asked, ask(prompt, asked) if asked else (), strict=True):
            decision, passed = decisions[i], attempt.score >= threshold
            spent = {"calls": attempt.price.calls, "tokens": cost(i, attempt.price)}
            decision.calls += spent["calls"]
            decision.tokens += spent["tokens"]
            read[i].add(attempt.price.prefix)
            if passed:
                decision.answer, decision.accepted = attempt.answer, prompt
            said = {"answer": attempt.answer, "score": attempt.score, "checks": attempt.checks}
            limit = {"threshold": finite(threshold), "accepted": passed}
            decision.trace.append({"prompt": prompt, **said, **limit, **spent})
    for decision in decisions:
        if decision.accepted is None and decision.trace:
            decision.answer = vote([(e["answer"], e["score"]) for e in decision.trace], same)
    return decisions


def vote(
    answers: Sequence[tuple[str, float]], same: Callable[[str, str], bool] = str.__eq__
) -> str:
    """The answer with the most weight, then the most votes; of equal ones the earliest."""
    firsts: list[str] = []
    weights: list[float] = []
    votes: list[int] = []
    for answer, weight in answers:
        at = next((i for i, first in enumerate(firsts) if same(answer, first)), len(firsts))
        if at == len(firsts):
            firsts, weights, votes = [*firsts, answer], [*weights, 0.0], [*votes, 0]
        weights[at] += weight
        votes[at] += 1
    return max(zip(weights, votes, firsts, strict=True), key=lambda entry: entry[:2])[2]
