"""When prefixes are built, and how often.

Once where there is room for them, else whenever they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedgrad.experiments.plan.batches import Rows, parts_of, scoring_batches, training_batches
from embedgrad.experiments.plan.flops import Work, activation_bytes, prefix_passes, total, work
from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.model.prefixes import FEW, PASS_TOKENS
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe

AHEAD = 16  # batches whose prefixes are built together


@dataclass(frozen=True, slots=True)
class Building:
    """Work of building prefixes before the test and for it, and bytes of prefixes.

    `all_bytes` would hold every prefix, `training_bytes` and `test_bytes` are stored in the end of
    either part, `loose_bytes` are a batch's prefixes that are not stored as they are used, and
    `held_bytes` is what building holds for a while.
    """

    training: Work = Work()
    test: Work = Work()
    all_bytes: int = 0
    training_bytes: int = 0
    test_bytes: int = 0
    loose_bytes: int = 0
    held_bytes: float = 0.0


class Builder:
    """Follows a run through its requests for prefixes.

    `steps` and `evaluations` are the run's, `lookups` how often a row's prefix is asked for when
    the row is scored.
    """

    def __init__(
        self,
        recipe: Recipe,
        rows: Rows,
        shape: Shape,
        room: int,
        *,
        steps: int,
        evaluations: int,
        lookups: int,
    ):
        self.recipe, self.rows, self.shape, self.room = recipe, rows, shape, room
        self.steps, self.evaluations, self.lookups = steps, evaluations, lookups
        self.token_bytes = shape.token_bytes(recipe.prefix_cache.precision)
        self.shared = {s.prefix: s.shared for s in rows.everything}
        self.batches = list(training_batches(recipe, rows, steps))
        self.openings: set[Ids] = set()  # that are built already
        self.held = 0.0

    def follow(self) -> Building:
        """Everything that the run builds."""
        rows, lookups = self.rows, self.lookups
        trained = [s for batch in self.batches for s in batch]  # all of them from one epoch on
        epochs = self.steps / self.recipe.training.steps_per_epoch(len(rows.train))
        uses: dict[Ids, float] = {}
        for part, times in ((rows.dev, self.evaluations * lookups), (trained, epochs)):
            for s in part:
                uses[s.prefix] = uses.get(s.prefix, 0.0) + times
        kept = self._kept(uses)
        parts = []
        if self.evaluations:
            parts.append(self._scored(rows.dev, set(), kept))
            parts.append(self._scored(rows.dev, kept, kept).times(self.evaluations - 1))
        parts.append(self._of_training(kept))
        tested = self._kept({s.prefix: 2.0 * lookups for s in rows.test})
        text = self._scored(rows.test, kept & tested, tested)
        refined = self._scored(rows.test, tested, tested)
        every = self._bytes(s.prefix for s in (*trained, *rows.dev, *rows.test))
        halved = self.recipe.prefix_cache.precision == "half"
        loose = [
            sum(len(prefix) for prefix in {s.prefix for s in batch} if halved or prefix not in kept)
            for batch in self.batches
        ]
        return Building(
            training=total(parts),
            test=total([text, refined]),
            all_bytes=every,
            training_bytes=self._bytes(kept),
            test_bytes=min(self.room, every),
            loose_bytes=max(loose) * self.shape.token_bytes(),
            held_bytes=self.held,
        )

    def _bytes(self, prefixes: Iterable[Ids]) -> int:
        return sum(map(len, set(prefixes))) * self.token_bytes

    def _kept(self, uses: dict[Ids, float]) -> set[Ids]:
        """The prefixes that will be stored: those asked for most often, as far as there is room."""
        kept, left = set(), self.room
        for ids in sorted(uses, key=lambda ids: -uses[ids]):
            size = len(ids) * self.token_bytes
            if size <= left:
                kept.add(ids)
                left -= size
        return kept

    def _built(self, prefixes: Iterable[Ids]) -> Work:
        lengths = []
        for prefix in prefixes:
            opening = prefix[: self.shared[prefix]]
            if opening and opening not in self.openings:
                self.openings.add(opening)
                lengths.append((len(opening), 0))
            lengths.append((len(prefix), len(opening)))
        made = prefix_passes(lengths, PASS_TOKENS, FEW)
        self.held = max(self.held, activation_bytes(self.shape, made, backward=False))
        return work(self.shape, made)

    def _scored(self, part: Sequence[TokenSequence], there: set[Ids], kept: set[Ids]) -> Work:
        """Prefixes built while rows are scored once: those that are not there yet."""
        done, there = [], set(there)
        for batch in scoring_batches(self.recipe, part):
            missing = dict.fromkeys(s.prefix for s in batch if s.prefix not in there)
            done.append(self._built(missing))
            there |= kept & missing.keys()
            loose = self._built(prefix for prefix in missing if prefix not in kept)
            done.append(loose.times(self.lookups - 1))
        return total(done)

    def _of_training(self, kept: set[Ids]) -> Work:
        """Prefixes built for steps: kept ones once and ahead of need, the others in every step."""
        there = kept & {s.prefix for s in self.rows.dev} if self.evaluations else set()
        first, again = [], []
        for i, batch in enumerate(self.batches):
            if i:  # the first step does not wait for others' prefixes
                first.append(self._built(self._ahead(i, kept, there)))
            for part in parts_of(self.recipe, batch):
                missing = dict.fromkeys(s.prefix for s in part if s.prefix not in there)
                first.append(self._built(missing))
                there |= kept & missing.keys()
                loose = dict.fromkeys(s.prefix for s in part if s.prefix not in kept)
                again.append(self._built(loose))
        later = (self.steps - len(self.batches)) / len(self.batches)
        return total([*first, total(again).times(later)])

    def _ahead(self, step: int, kept: set[Ids], there: set[Ids]) -> list[Ids]:
        """What `ReusingModel.prepare` builds before a step."""
        found: list[Ids] = []
        tokens = 0
        for s in (s for batch in self.batches[step : step + AHEAD] for s in batch):
            if tokens > PASS_TOKENS:
                break
            if s.prefix in kept and s.prefix not in there:
                found.append(s.prefix)
                there.add(s.prefix)
                tokens += len(s.prefix) - s.shared
        return found
