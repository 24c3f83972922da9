"""Tokens that a run computes, counted from its own token sequences.

dev -> [steps -> dev]* -> test with the text prompt -> test with the refined prompt
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from embedgrad.data.splits import NAMES
from embedgrad.model.packing import PASS_COST
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

Examples = Sequence[TokenSequence]


@typing.final
@dataclass(frozen=True)
class TokenizedSplits:
    """A recipe's examples as tokens, and how the model computes them.

    `prompt` counts the refined tokens; sequences of up to `longest_reuse` reuse their prefix.
    """

    train: Examples
    dev: Examples
    test: Examples
    prompt: int
    longest_reuse: float = math.inf

    @functools.cached_property
    def all(self) -> list[TokenSequence]:
        """The examples of all splits."""
        return [*self.train, *self.dev, *self.test]

    def length(self, s: TokenSequence) -> int:
        """Tokens of an example with its longest target."""
        return len(s.prefix) + self.prompt + len(s.suffix) + max(map(len, s.targets), default=0)

    def reuses(self, s: TokenSequence) -> bool:
        """Whether an example is computed on top of its stored prefix."""
        return self.length(s) <= self.longest_reuse

    def tokens_in_full(self, s: TokenSequence, *, choices: bool) -> int:
        """Tokens computed without prefix reuse: every target takes a sequence of its own."""
        before = len(s.prefix) + self.prompt + len(s.suffix)
        return sum(before + len(ids) - 1 for ids in targets_of(s, choices=choices))

    def tokens(self, s: TokenSequence, *, choices: bool) -> int:
        """Tokens that a pass computes for an example with its prefix stored."""
        if not self.reuses(s):
            return self.tokens_in_full(s, choices=choices)
        targets = targets_of(s, choices=choices)  # shared beginnings are computed once
        tree = {ids[:depth] for ids in targets for depth in range(1, len(ids))}
        return self.prompt + len(s.suffix) + len(tree)


class Workload(NamedTuple):
    """What a run does, and its effort in tokens by what it is for and its kind.

    `train_prefixes` are tokens of different prefixes before the test, `all_prefixes` with it.
    """

    rows: dict[str, int]
    steps: int
    evaluations: int
    step_tokens: float
    train_prefixes: int
    all_prefixes: int
    effort: dict[tuple[str, str], float]


def count(
    recipe: Recipe, splits: TokenizedSplits, room: float, text: int, refined: int, *, writes: bool
) -> Workload:
    """All work of a run that can store `room` tokens of prefixes.

    `text` and `refined` are the tokens of a batch's longest free answer to either prompt; `writes`
    says that the model writes its own solutions first.
    """
    training, rows, free = recipe.training, len(splits.train), not recipe.target.choices
    steps, batch = training.steps_in_all(rows), recipe.evaluation.batch_size
    evaluations = 1 + math.ceil(steps / training.steps_between_evaluations(rows))
    repeats = {"dev": evaluations if splits.dev else 0, "test": 2}
    reads = 2 if free else 1  # passes over an example: a free answer is decoded, then scored

    def read(part: Examples, choices: bool) -> int:
        """Tokens of one pass over every example."""
        return sum(splits.tokens(s, choices=choices) for s in part)

    def write(part: Examples, length: int, samples: int = 1) -> float:
        """Tokens after the first of free answers, and a price for every pass over a batch."""
        answers = len(part) * samples
        passes = math.ceil(answers / batch) if splits.longest_reuse == math.inf else answers
        return max(length, 0) * (answers + PASS_COST * passes)

    order = training.epoch_order(rows, 0)[: steps * training.batch_size]
    trained = [splits.train[i] for i in order]
    epoch = training.steps_per_epoch(len(trained))
    step_tokens = read(trained, over_choices(recipe)) / epoch
    before = _uses(splits, (trained, steps / epoch), (splits.dev, repeats["dev"] * reads))
    tested = _uses(splits, (splits.test, 2 * reads))
    new = {ids: times for ids, times in tested.items() if ids not in before}
    effort = {
        ("prefixes", "prefixes"): _build(splits, before, room),
        ("steps", "steps"): step_tokens * steps,
        ("test", "prefixes"): _build(splits, new, room),
    }
    for name, times in repeats.items():
        part: Examples = getattr(splits, name)
        # The text prompt is scored by plain tokens where these differ.
        plain = sum(len(s.prefix) for s in part if s.plain is not None)
        effort[name, "scoring"] = reads * (times * read(part, not free) + plain)
        if free:
            effort[name, "answers"] = write(part, text - 1 + (times - 1) * (refined - 1))
    if writes:
        limit = min(text, recipe.solutions.max_new_tokens or text)
        effort["solutions", "answers"] = write(splits.train, limit - 1, recipe.solutions.samples)
        effort["solutions", "scoring"] = read(splits.train, choices=False)
    return Workload(
        rows={name: len(getattr(splits, name)) for name in NAMES},
        steps=steps,
        evaluations=repeats["dev"],
        step_tokens=step_tokens,
        train_prefixes=sum(map(len, before)),
        all_prefixes=sum(map(len, {**before, **tested})),
        effort=effort,
    )


def batches_of(examples: Examples, size: int) -> list[Examples]:
    """Examples in their order, so many at a time."""
    return [examples[n : n + size] for n in range(0, len(examples), size)]


def over_choices(recipe: Recipe) -> bool:
    """Whether a training step computes all choices."""
    return recipe.parts.objective.needs_choices(available=bool(recipe.target.choices))


def targets_of(s: TokenSequence, *, choices: bool) -> tuple[Ids, ...]:
    """The targets of an example that a pass computes: all choices, or the right one alone."""
    return s.targets if choices else (s.targets[s.gold],)


def _uses(splits: TokenizedSplits, *parts: tuple[Examples, float]) -> dict[Ids, float]:
    """How often each prefix is needed, where the examples of a part are computed so often."""
    uses: dict[Ids, float] = {}
    for s, times in ((s, times) for part, times in parts for s in part if splits.reuses(s)):
        uses[s.prefix] = uses.get(s.prefix, 0.0) + times
    return uses


def _build(splits: TokenizedSplits, uses: dict[Ids, float], room: float) -> float:
    """Tokens of prefixes built: once where there is room, else whenever they are needed."""
    stored = min(1.0, room / max(sum(map(len, uses)), 1))
    shared = {s.prefix: s.shared for s in splits.all}
    each = ((len(ids) - shared[ids]) * (stored + (1 - stored) * n) for ids, n in uses.items())
    return sum(each) + sum(map(len, {ids[: shared[ids]] for ids in uses}))
