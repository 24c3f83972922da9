"""Tokens that a run computes, counted from its own token sequences.

dev -> [steps -> dev]* -> test with the text prompt -> test with the refined prompt
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from embedgrad.model.packing import PASS_COST
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

Examples = Sequence[TokenSequence]


@typing.final
@dataclass(frozen=True)
class TokenizedSplits:
    """A recipe's examples as tokens, and how the model computes them.

    `prompt` counts the refined tokens. `reuse` says whether prefixes are reused, `longest_reuse` up
    to which length of a sequence (None: any).
    """

    train: Examples
    dev: Examples
    test: Examples
    prompt: int
    reuse: bool = True
    longest_reuse: int | None = None

    @functools.cached_property
    def all(self) -> list[TokenSequence]:
        """The examples of all splits."""
        return [*self.train, *self.dev, *self.test]

    @functools.cached_property
    def shared_prompt(self) -> int:
        """Prompt tokens that a pass computes once for all its examples: their prefixes are one."""
        alike = len({s.prefix for s in self.all}) == 1
        return self.prompt if alike and all(s.suffix and self.reuses(s) for s in self.all) else 0

    def limit(self, limits: Mapping[str, int]) -> Self:
        """The splits with at most so many examples each."""
        return replace(self, **{name: getattr(self, name)[:most] for name, most in limits.items()})

    def with_solutions_of(self, tokens: int) -> Self:
        """The splits with training targets of so many tokens, whatever these are."""
        return replace(
            self, train=[replace(s, targets=((0,) * tokens,), gold=0) for s in self.train]
        )

    def length(self, sequence: TokenSequence, *, targets: bool = True) -> int:
        """Tokens of an example, with its longest target or without any."""
        longest = max(map(len, sequence.targets), default=0) if targets else 0
        return len(sequence.prefix) + self.prompt + len(sequence.suffix) + longest

    def reuses(self, sequence: TokenSequence) -> bool:
        """Whether an example is computed on top of its stored prefix."""
        limit = self.longest_reuse
        return self.reuse and (limit is None or self.length(sequence) <= limit)

    def tokens_in_full(self, sequence: TokenSequence, *, choices: bool) -> int:
        """Tokens computed without prefix reuse: every target takes a sequence of its own."""
        before = self.length(sequence, targets=False)
        return sum(before + len(ids) - 1 for ids in targets_of(sequence, choices=choices))

    def tokens(self, sequence: TokenSequence, *, choices: bool) -> int:
        """Tokens that a pass computes for an example whose prefix is stored, with its own prompt."""
        if not self.reuses(sequence):
            return self.tokens_in_full(sequence, choices=choices)
        targets = targets_of(sequence, choices=choices)
        return self.prompt - self.shared_prompt + len(sequence.suffix) + _branches(targets)


class Work(NamedTuple):
    """Tokens that are computed, and in how many passes."""

    tokens: float
    passes: float = 0

    @property
    def effort(self) -> float:
        """What time is proportional to: tokens, and a price in tokens for every pass."""
        return self.tokens + PASS_COST * self.passes


@typing.final
@dataclass(frozen=True, slots=True)
class Workload:
    """What a run does: `work` by what it is for and its kind, ("dev", "scoring") for example.

    `train_prefixes` are tokens of different prefixes before the test, `all_prefixes` with it.
    """

    steps: int
    steps_per_epoch: int
    evaluations: int
    train_prefixes: int
    all_prefixes: int
    work: dict[tuple[str, str], Work]


def count(
    recipe: Recipe,
    splits: TokenizedSplits,
    room: float,
    replies: tuple[int, int],
    *,
    writes: bool = False,
) -> Workload:
    """All work of a run that can store `room` tokens of prefixes.

    `replies` are the tokens of a batch's longest free answer to the text prompt and to the refined
    one; `writes` says that the model writes its own solutions first.
    """
    training, rows, free = recipe.training, len(splits.train), not recipe.target.choices
    steps, every = training.steps_in_all(rows), training.steps_between_evaluations(rows)
    epoch = first_epoch(recipe, splits)
    epochs = steps / len(epoch)
    repeats = {"dev": 1 + math.ceil(steps / every) if splits.dev else 0, "test": 2}
    readings = 2 if free else 1  # of an example: a free answer is decoded, then scored

    def score(part: Examples, size: int, times: float, *, choices: bool, texts: int = 0) -> Work:
        """Passes over targets, `texts` of them with plain tokens where text merges with the span."""
        passes = times * math.ceil(len(part) / size)
        tokens = times * sum(splits.tokens(s, choices=choices) for s in part)
        tokens += texts * sum(len(s.prefix) for s in part if s.plain is not None)
        return Work(tokens + splits.shared_prompt * passes, passes)

    def decode(part: Examples, length: int, samples: int = 1) -> Work:
        """Free answers after their first token: those of a batch go on until the longest ends."""
        batch = recipe.evaluation.batch_size
        together = splits.reuse and splits.longest_reuse is None
        answers = len(part) * samples
        return Work(
            answers * length, length * (math.ceil(answers / batch) if together else answers)
        )

    size = math.ceil(training.batch_size / training.accumulate)
    trained = [s for batch in epoch for s in batch]
    work = {("steps", "steps"): score(trained, size, epochs, choices=objective_choices(recipe))}
    uses = _uses(splits, (trained, epochs), (splits.dev, repeats["dev"] * readings))
    tested = _uses(splits, (splits.test, 2 * readings))
    work["prefixes", "prefixes"] = _build(splits, uses, room)
    new = {ids: times for ids, times in tested.items() if ids not in uses}
    work["test", "prefixes"] = _build(splits, new, room)
    batch = recipe.evaluation.batch_size
    for name, times in repeats.items():
        part, scored = getattr(splits, name), times * readings
        work[name, "scoring"] = score(part, batch, scored, choices=not free, texts=readings)
        if free:
            length = replies[0] - 1 + max(times - 1, 0) * (replies[1] - 1)
            work[name, "answers"] = decode(part, length)
    if writes:
        longest = min(replies[0], recipe.solutions.max_new_tokens or replies[0])
        work["solutions", "answers"] = decode(splits.train, longest - 1, recipe.solutions.samples)
        work["solutions", "scoring"] = score(splits.train, batch, 1, choices=False, texts=1)
    return Workload(
        steps=steps,
        steps_per_epoch=training.steps_per_epoch(rows),
        evaluations=repeats["dev"],
        train_prefixes=sum(map(len, uses)),
        all_prefixes=sum(map(len, {**uses, **tested})),
        work=work,
    )


def first_epoch(recipe: Recipe, splits: TokenizedSplits) -> list[Examples]:
    """The batches of the first epoch, as far as the run has steps."""
    rows, size = len(splits.train), recipe.training.batch_size
    order = recipe.training.epoch_order(rows, 0)[: recipe.training.steps_in_all(rows) * size]
    return [[splits.train[i] for i in order[n : n + size]] for n in range(0, len(order), size)]


def objective_choices(recipe: Recipe) -> bool:
    """Whether a training step computes all choices."""
    return recipe.parts.objective.needs_choices(available=bool(recipe.target.choices))


def targets_of(sequence: TokenSequence, *, choices: bool) -> tuple[Ids, ...]:
    """The targets of an example that a pass computes: all choices, or the right one alone."""
    return sequence.targets if choices else (sequence.targets[sequence.gold],)


@functools.lru_cache(maxsize=4096)
def _branches(targets: tuple[Ids, ...]) -> int:
    """Tokens that targets add to a pass: shared beginnings once, last tokens never."""
    return len({ids[:depth] for ids in targets for depth in range(1, len(ids))})


def _uses(splits: TokenizedSplits, *parts: tuple[Examples, float]) -> dict[Ids, float]:
    """How often each prefix is needed, where the examples of a part are computed so often."""
    uses: dict[Ids, float] = {}
    for s, times in ((s, times) for part, times in parts for s in part if splits.reuses(s)):
        uses[s.prefix] = uses.get(s.prefix, 0.0) + times
    return uses


def _build(splits: TokenizedSplits, uses: Mapping[Ids, float], room: float) -> Work:
    """Prefixes built: once where there is room for them, else whenever they are needed."""
    stored = min(1.0, room / max(sum(map(len, uses)), 1))
    shared = {s.prefix: s.shared for s in splits.all}
    each = ((len(ids) - shared[ids]) * (stored + (1 - stored) * n) for ids, n in uses.items())
    return Work(sum(each) + sum(map(len, {ids[: shared[ids]] for ids in uses})))
