"""Count what a run computes, from its token sequences.

dev -> [steps -> dev]* -> test with the text prompt -> test with the refined prompt
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from embedgrad.evaluation.evaluator import reply_rows
from embedgrad.model.packing import PASS_COST
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.loss import reads_end
from embedgrad.training.settings import Training

Examples = Sequence[TokenSequence]


@typing.final
@dataclass(frozen=True)
class TokenizedSplits:
    """A recipe's examples as tokens, and how the model computes them.

    `prompt` counts the refined tokens of all spans; sequences of up to `longest_reuse` tokens reuse
    their prefix. `writes` says that the model writes its own solutions first.
    """

    train: Examples
    dev: Examples
    test: Examples
    prompt: int
    longest_reuse: float
    writes: bool

    @functools.cached_property
    def all(self) -> list[TokenSequence]:
        """The examples of all splits."""
        return [*self.train, *self.dev, *self.test]

    def units(self, training: Training) -> list[list[int]]:
        """Indices of the training examples that stay together in a batch."""
        return training.units([s.example.group for s in self.train])

    def own(self, s: TokenSequence) -> int:
        """Tokens of an example between prefix and target."""
        return self.prompt + len(s.suffix) - len(s.later)

    def tokens_before(self, s: TokenSequence) -> int:
        """Tokens that a pass computes before an example's answer."""
        return self.own(s) if self.reuses(s) else s.length(self.prompt)

    def length(self, s: TokenSequence) -> int:
        """Tokens of an example with its longest target."""
        return s.length(self.prompt) + max(map(len, s.targets), default=0)

    def reuses(self, s: TokenSequence) -> bool:
        """Whether an example is computed on top of its stored prefix."""
        return self.length(s) <= self.longest_reuse

    @staticmethod
    def targets(s: TokenSequence, *, choices: bool) -> tuple[Ids, ...]:
        """The targets of an example that a pass computes: all choices, or the right one alone."""
        return s.targets if choices else (s.targets[s.gold],)

    def tokens_in_full(self, s: TokenSequence, *, choices: bool) -> int:
        """Tokens computed without prefix reuse: a sequence for every target.

        One that begins another needs none, but where rotary scaling depends on the length.
        """
        before, targets = s.length(self.prompt), self.targets(s, choices=choices)
        if self.longest_reuse in (0, math.inf):
            begun = {ids[:n] for ids in targets for n in range(len(ids))}
            targets = tuple(ids for ids in targets if ids not in begun)
        return sum(before + len(ids) - 1 for ids in targets)

    def tokens(self, s: TokenSequence, *, choices: bool) -> int:
        """Tokens that a pass computes for an example with its prefix stored."""
        if not self.reuses(s):
            return self.tokens_in_full(s, choices=choices)
        targets = self.targets(s, choices=choices)  # shared beginnings are computed once
        tree = {ids[:depth] for ids in targets for depth in range(1, len(ids))}
        return self.own(s) + len(tree)

    def prefixes(self, *parts: Examples) -> dict[Ids, int]:
        """The different prefixes of some examples, and the tokens of each that others lack."""
        reused = (s for part in parts for s in part if self.reuses(s))
        return {s.prefix: len(s.prefix) - s.shared for s in reused}


@typing.final
@dataclass(frozen=True, slots=True)
class Workload:
    """What a run does, and its effort in tokens by what it is for and its kind.

    `trained_on` are the examples that a step takes, in the order of the first epoch.
    """

    steps: int
    steps_per_epoch: int
    evaluations: int
    trained_on: Examples
    step_tokens: float
    effort: dict[tuple[str, str], float]


def count(
    recipe: Recipe, splits: TokenizedSplits, stored: float, text: int, refined: int
) -> Workload:
    """All work of a run that has room for a share `stored` of its prefixes.

    `text` and `refined` are the tokens of a batch's longest free answer to either prompt.
    """
    training, free = recipe.training, not recipe.target.choices
    units = splits.units(training)
    rows = len(units)
    steps, size = training.steps_in_all(rows), recipe.evaluation.batch_size
    begun = 1 if training.warm_start is None else 2  # the text's rows, and those of a warm start
    evaluations = begun + math.ceil(steps / training.steps_between_evaluations(rows))
    reads = 2 if free else 1  # passes over an example: a free answer is decoded, then scored

    def read(part: Examples, choices: bool) -> int:
        """Tokens of one pass over every example."""
        return sum(splits.tokens(s, choices=choices) for s in part)

    def write(part: Examples, length: int, samples: int = 1) -> float:
        """Tokens after the first of free answers, and a price for every pass over a batch."""
        answers = len(part) * samples
        passes = math.ceil(answers / size) if splits.longest_reuse == math.inf else answers
        return max(length, 0) * (answers + PASS_COST * passes)

    def build(part: Examples, times: float) -> float:
        """Tokens of prefixes: once where there is room for them, else whenever they are needed."""
        return sum(splits.prefixes(part).values()) * (stored + (1 - stored) * times)

    order = training.epoch_order(rows, 0)[: steps * training.batch_size]
    train = as_trained(recipe, splits.train)
    trained = [train[i] for unit in order for i in units[unit]]
    epoch = training.steps_per_epoch(len(order))
    step_tokens = read(trained, over_choices(recipe)) / epoch
    sampling, effort = recipe.parts.objective.sampling, dict[tuple[str, str], float]()
    if sampling is not None:  # every question is a step's once for each answer
        step_tokens *= sampling.samples
        length = max((len(s.targets[0]) for s in trained), default=1)
        answers = write(trained, length - 1, sampling.samples)
        scored = read(trained, choices=False)
        if recipe.parts.sampling.engine:  # which writes them; here they are read once more
            answers, scored = 0, scored * sampling.samples
        effort["sampling", "answers"] = answers * steps / epoch
        effort["sampling", "scoring"] = scored * steps / epoch
    updates = 1 if sampling is None else sampling.updates
    gradients = updates * recipe.parts.optimizer.gradients
    effort["steps", "steps"] = step_tokens * steps * gradients
    effort["prefixes", "prefixes"] = build(trained, steps / epoch)
    effort["prefixes", "prefixes"] += build(splits.dev, evaluations * reads)
    effort["test", "prefixes"] = build(splits.test, 2 * reads)
    for name, part, times in (("dev", splits.dev, evaluations), ("test", splits.test, 2)):
        # The text prompt is scored by plain tokens where these differ.
        plain = sum(len(s.prefix) for s in part if s.plain is not None)
        effort[name, "scoring"] = reads * (times * read(part, not free) + plain)
        if name == "test" and not free:  # how often the greedy reply is a choice
            some = [part[i] for i in reply_rows(len(part))]
            longest = max((len(ids) for s in part for ids in s.targets), default=0)
            effort[name, "scoring"] += sum(splits.tokens_before(s) + longest for s in some)
        if free:
            effort[name, "answers"] = write(part, text - 1 + (times - 1) * (refined - 1))
            if name == "test" and (samples := recipe.evaluation.samples):
                effort[name, "answers"] += write(part, text + refined - 2, samples)
    if splits.writes:
        limit = min(text, recipe.solutions.max_new_tokens or text)
        effort["solutions", "answers"] = write(splits.train, limit - 1, recipe.solutions.samples)
        effort["solutions", "scoring"] = read(splits.train, choices=False)
    per_epoch, evaluations = training.steps_per_epoch(rows), evaluations if splits.dev else 0
    return Workload(steps, per_epoch, evaluations, trained, step_tokens, effort)


def as_trained(recipe: Recipe, train: Examples) -> Examples:
    """The training examples as the loss reads them."""
    ended = reads_end(recipe.parts.objective, recipe.target, train)
    return [s.with_end() for s in train] if ended else train


def over_choices(recipe: Recipe) -> bool:
    """Whether a training step computes all choices."""
    return recipe.parts.objective.needs_choices(available=bool(recipe.target.choices))
