"""A recipe's data read to the end, whatever is wrong with it.

`read_splits` refuses at the first problem, as a run must not go on. A plan goes on without the rows
or the check that failed, and remembers what a run would say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from embedgrad.data.duplicates import text_key
from embedgrad.data.examples import Example, cell_text, examples_from
from embedgrad.data.readers import Table, read_table
from embedgrad.data.splits import NAMES, Splits, make_splits
from embedgrad.errors import DataError
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.recipe.recipe import Recipe

SHOWN = 5  # problems of one kind; further ones are counted


@dataclass
class Problems:
    """What would keep a run from starting, one line each."""

    lines: list[str] = field(default_factory=list)

    def add(self, lines: Sequence[str]) -> None:
        """Take lines in, the first few of them and how many more there are."""
        new = [line for line in dict.fromkeys(lines) if line not in self.lines]
        self.lines += new[:SHOWN]
        if len(new) > SHOWN:
            self.lines.append(f"... and {len(new) - SHOWN} more problems like the last one")

    def tried(self, way: Callable[[], Any]) -> Any:
        """What `way` gives; None where it fails, with the problem noted."""
        try:
            return way()
        except DataError as error:
            self.add([str(error)])
            return None


def read_all(recipe: Recipe, problems: Problems) -> Splits | None:
    """The recipe's rows as far as they can be used; None where nothing can be."""
    data = recipe.data
    sources = {"train": data.train, "dev": data.dev, "test": data.test}
    parts = {name: _examples(recipe, source, problems) for name, source in sources.items()}
    if not parts["train"]:
        return None
    options: dict[str, Any] = {
        "choices": recipe.target.choices or None,
        "allow_duplicates": data.allow_duplicates,
        "drop_duplicates": data.drop_duplicates,
    }
    splits: Splits | None = problems.tried(partial(_split, recipe, parts, options))
    # What refused is left out, one after the other, so that the next check can speak.
    for left_out in ("groups", "duplicates", "choices"):
        if splits is not None:
            break
        if left_out == "groups":
            parts = {name: _ungrouped(rows) for name, rows in parts.items()}
        elif left_out == "duplicates":
            options |= {"allow_duplicates": True, "drop_duplicates": False}
        else:
            options["choices"] = None
        splits = problems.tried(partial(_split, recipe, parts, options))
    return splits


def _split(
    recipe: Recipe, parts: dict[str, list[Example] | None], options: dict[str, Any]
) -> Splits:
    data = recipe.data
    train = parts["train"]
    assert train is not None
    return make_splits(
        train,
        parts["dev"],
        parts["test"],
        columns=recipe.template.columns,
        # A split that is given and cannot be read is empty: a run would not carve it either.
        fractions=(0.0 if data.dev else data.dev_share, 0.0 if data.test else data.test_share),
        seed=data.seed,
        limit=data.limit,
        **options,
    )


def answers_without_score(recipe: Recipe, examples: Sequence[Example], problems: Problems) -> None:
    """Note the free answers that no reply could match."""
    lines = []
    for example in examples:
        try:
            check_answers([example], recipe.target, recipe.evaluation.scorer)
        except DataError as error:
            lines.append(str(error))
    problems.add(lines)


def _examples(recipe: Recipe, source: str | None, problems: Problems) -> list[Example] | None:
    """The rows of one source that can be used; None where it is not given or not there."""
    if source is None:
        return None
    table = problems.tried(lambda: read_table(source))
    if table is None:
        return None
    data = recipe.data
    options: dict[str, Any] = {
        "columns": recipe.template.columns,
        "answer": data.answer,
        "choices": recipe.target.choices or None,
        "labels": data.labels or None,
        "solution": data.solution if recipe.solutions.source in ("auto", "column") else None,
        "group": data.group,
    }
    try:
        return examples_from(table, **options, where=data.where or None)
    except DataError as error:
        found, lines = _row_by_row(table, options, recipe)
        problems.add(lines or [str(error)])
        return found


def _row_by_row(
    table: Table, options: dict[str, Any], recipe: Recipe
) -> tuple[list[Example], list[str]]:
    """The good rows of a table that has bad ones, and what is wrong with these."""
    found: list[Example] = []
    lines: list[str] = []
    wanted = dict(recipe.data.where).items()
    for row, place in zip(table.rows, table.sources, strict=True):
        if any(cell_text(row.get(name)) != text for name, text in wanted):
            continue
        try:
            found += examples_from(
                dataclasses.replace(table, rows=[row], sources=[place]), **options
            )
        except DataError as error:
            lines.append(str(error))
    return found, lines


def _ungrouped(rows: list[Example] | None) -> list[Example] | None:
    return None if rows is None else [dataclasses.replace(row, group=None) for row in rows]


def repeated_texts(splits: Splits, columns: Sequence[str]) -> dict[str, Any]:
    """Rows whose text stands in an earlier split too, and rows that repeat one of their own."""
    first: dict[tuple[str, ...], tuple[str, Example]] = {}
    between, within, pair = 0, 0, None
    for name in NAMES:
        for example in getattr(splits, name):
            home, other = first.setdefault(text_key(example, columns), (name, example))
            if other is example:
                continue
            within += home == name
            if home != name:
                between += 1
                pair = pair or [f"{home} {other.source}", f"{name} {example.source}"]
    return {"between_splits": between, "within_a_split": within, "first": pair}
