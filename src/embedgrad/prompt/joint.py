"""Several tasks as one: all their rows; each sequence has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import final

from embedgrad.errors import RecipeError
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.prompt.span import Span


@final
class JointSequencer:
    """The spans and targets of several tasks by name, for one training of all their rows.

    `targets` holds each task's choices, `target` those of all. Raises `RecipeError` where only some
    tasks have choices, or they are not compared alike.
    """

    def __init__(self, tasks: Mapping[str, Sequencer]):
        self.targets: dict[str | None, Target] = {
            name: sequencer.target for name, sequencer in tasks.items()
        }
        choices = dict.fromkeys(c for target in self.targets.values() for c in target.choices)
        kinds = {(bool(target.choices), target.normalize) for target in self.targets.values()}
        if len(kinds) > 1:
            why = "all of them have choices, compared alike (target.normalize), or none has"
            raise RecipeError("tasks", [f"the targets of {', '.join(tasks)} differ: {why}"])
        ((_, normalize),) = kinds
        self.target = Target(choices=tuple(choices), normalize=normalize)
        self.spans: tuple[Span, ...] = tuple(s for task in tasks.values() for s in task.spans)
        self.prompt_ids: Ids = tuple(i for task in tasks.values() for i in task.prompt_ids)
        edges = accumulate((len(task.prompt_ids) for task in tasks.values()), initial=0)
        ranges = (tuple(range(*edge)) for edge in pairwise(edges))
        self.rows = dict(zip(tasks, ranges, strict=True))  # which of all rows are a task's
        self.vocabulary = min(task.vocabulary for task in tasks.values())
        self.end_ids: Ids = tuple(dict.fromkeys(i for t in tasks.values() for i in t.end_ids))

    def join(self, sequences: Mapping[str, Sequence[TokenSequence]]) -> list[TokenSequence]:
        """The sequences of all tasks, each with the name and the rows of its own."""
        return [
            replace(s, rows=self.rows[name], example=replace(s.example, task=name))
            for name, own in sequences.items()
            for s in own
        ]
