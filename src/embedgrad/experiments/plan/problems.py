"""Every problem of a recipe's data, where a run refuses at the first one.

A plan goes on without the rows or the check that failed, and remembers what a run would say.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from embedgrad.data.examples import Example, cell_text, examples_from
from embedgrad.data.readers import read_table
from embedgrad.data.splits import Splits, make_splits
from embedgrad.errors import DataError
from embedgrad.recipe.recipe import Recipe

SHOWN = 5  # problems of one kind; further ones are counted


@typing.final
class Problems:
    """What would keep a run from starting, one line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, lines: Sequence[str]) -> None:
        """Take the first few lines, and how many more there are."""
        new = [line for line in dict.fromkeys(lines) if line not in self.lines]
        self.lines += new[:SHOWN]
        if len(new) > SHOWN:
            self.lines.append(f"... and {len(new) - SHOWN} more problems like the last one")

    def each(self, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """What `action` returns for every item; those that it refuses are problems."""
        results, lines = [], []
        for item in items:
            try:
                results.append(action(item))
            except DataError as error:
                lines.append(str(error))
        self.add(lines)
        return results


def read_all(recipe: Recipe, problems: Problems) -> Splits | None:
    """The recipe's rows as far as they can be used; None where nothing can be."""
    data = recipe.data
    rows = [_read(recipe, source, problems) for source in (data.train, data.dev, data.test)]
    if not rows[0]:
        return None
    options: dict[str, Any] = {
        "columns": recipe.template.columns,
        # A split that is named and cannot be read is empty: a run would not carve it either.
        "fractions": (0.0 if data.dev else data.dev_share, 0.0 if data.test else data.test_share),
        "seed": data.seed,
        "limit": data.limit,
        "choices": recipe.target.choices or None,
        "allow_duplicates": data.allow_duplicates,
        "drop_duplicates": data.drop_duplicates,
    }

    def split() -> list[Splits]:
        return problems.each(lambda parts: make_splits(*parts, **options), [rows])

    splits = split()
    # What is refused is left out, one check after the other, so that the next can speak.
    for left_out in ({}, {"allow_duplicates": True, "drop_duplicates": False}, {"choices": None}):
        if splits:
            break
        rows = [part and [replace(row, group=None) for row in part] for part in rows]
        options |= left_out
        splits = split()
    return splits[0] if splits else None


def _read(recipe: Recipe, source: str | None, problems: Problems) -> list[Example] | None:
    """The rows of one source that can be used; None where it is not named or not there."""
    tables = problems.each(read_table, [] if source is None else [source])
    if not tables:
        return None
    data, table = recipe.data, tables[0]
    read = partial(
        examples_from,
        columns=recipe.template.columns,
        answer=data.answer,
        choices=recipe.target.choices or None,
        labels=data.labels or None,
        solution=data.solution if recipe.solutions.source in ("auto", "column") else None,
        group=data.group,
    )
    try:
        return read(table, where=data.where or None)
    except DataError as error:
        known = len(problems.lines)
        alone = [
            replace(table, rows=[row], sources=[place])
            for row, place in zip(table.rows, table.sources, strict=True)
            if all(cell_text(row.get(name)) == text for name, text in data.where.items())
        ]
        examples = [example for (example,) in problems.each(read, alone)]
        if len(problems.lines) == known:
            problems.add([str(error)])
        return examples
