"""Rows of a table -> checked examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from decimal import Decimal
from typing import Any, final

from embedgrad.data.labels import (
    advise_mapping,
    closest,
    compare_twins,
    difference,
    escape,
    find_twin,
)
from embedgrad.data.markup import Piece, fill, parse
from embedgrad.data.table import Row, Table, data_error, quote
from embedgrad.errors import DataError


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready for a template.

    `columns` holds the text of every column that has one; `answer` is "" when none is asked for;
    `source` says where the row came from, "reviews.csv:18". A `solution` is what the model is
    trained to write, where that is more than the answer it is scored by. `extra` holds the cells,
    as the file has them, of the columns that an objective names in its options.
    """

    columns: Mapping[str, str]
    answer: str
    source: str
    group: str | None = None
    task: str | None = None
    solution: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> str:
        """What the model is to write: the solution, or the answer where there is none."""
        return self.answer if self.solution is None else self.solution

    def group_in(self, column: str) -> str:
        """The text of a column's cell, by which examples are compared. Raises `DataError`."""
        cell = self.extra.get(column, self.columns.get(column))
        text = cell_text(cell)
        if text is None or not text.strip():
            held = "no value" if cell is None or text is not None else f"a {type(cell).__name__}"
            problem = f"column {column!r} holds {held}; expected the name of a group"
            raise data_error(self.source, problem)
        return text

    def with_extra(self, **values: Any) -> Example:
        """The same with further entries of `extra`, for an objective that reads them."""
        return replace(self, extra={**self.extra, **values})


def cell_text(value: object) -> str | None:
    """Text of a scalar: 3 and 3.0 are "3", True is "true"; None if empty (None, NaN) or no scalar.

    White space of text is kept as it is.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        # beyond 2**53 a float's digits are not the number that was written
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, (int, Decimal, date, time)):
        return str(value)
    return None


def solution_pieces(solution: str) -> tuple[Piece, ...]:
    """The setting `data.solution`, parsed: a column's name, or a text with `{columns}`.

    Raises `DataError` for a text with a span, `TemplateError` for a lone brace.
    """
    if "{" not in solution:
        return (Piece("column", solution),)
    pieces = parse(solution, "data.solution")
    if any(piece.kind == "span" for piece in pieces):
        raise DataError(
            f"data.solution: {quote(solution)} holds [[ ]], which mark the words to refine; "
            "expected a column, or a text with {columns} alone"
        )
    return pieces


def examples_from(
    table: Table,
    *,
    columns: Sequence[str],
    answer: str | None = None,
    choices: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    solution: str | None = None,
    group: str | None = None,
    task: str | None = None,
    extra: Sequence[str] = (),
    compared: str | None = None,
    teacher: Sequence[str] = (),
    where: Mapping[str, str] | None = None,
) -> list[Example]:
    """Check every row of a table and turn it into an example.

    `columns` are those that the template uses. `labels` maps raw answers, as text, to the text of
    a choice; without `choices` the mapped texts are the choices. `solution` is the column with
    what the model is trained to write, if that is more than the answer, or a text with `{columns}`.
    `extra` names columns whose cells, of any kind, go to the objective, `compared` the one by which
    scores are reported, `teacher` those of a teacher's template. `where` keeps the rows
    whose columns have these texts. Raises DataError for a column that is missing, a needed cell
    that is empty or (but for `extra`) no scalar, an answer that is not among the choices, and a
    `where` that keeps nothing.
    """
    needed = [("template", name) for name in columns]
    needed += [("the teacher's template", name) for name in teacher]
    written = solution_pieces(solution) if solution is not None else ()
    needed += [("solution", piece.text) for piece in written if piece.kind == "column"]
    single = {"answer": answer, "group": group, "task": task, "evaluation.group": compared}
    needed += [(role, name) for role, name in single.items() if name is not None]
    unchecked = [("where", name) for name in where or ()]
    unchecked += [("the objective", name) for name in extra]
    for role, name in needed + unchecked:
        if name not in table.columns:
            problem = f"no column {name!r}, which {role} names"
            raise data_error(table.name, f"{problem}; {closest(name, table.columns)}")
    # TOML keys are text, but a mapping written in Python may well say {0: "negative"}
    names = {cell_text(raw): text for raw, text in (labels or {}).items()}
    allowed = tuple(choices) if choices is not None else tuple(dict.fromkeys(names.values()))

    examples: list[Example] = []
    unknown: list[tuple[str, str]] = []  # where, and the raw answer
    for row, source in _matching_rows(table, where or {}):
        texts = {name: text for name, cell in row.items() if (text := cell_text(cell)) is not None}
        for _, name in needed:
            if not texts.get(name, "").strip():
                raise data_error(source, _unusable(name, row))
        for name in extra:
            if (cell := row.get(name)) in (None, "") or cell != cell:  # NaN differs from itself
                problem = "is empty; the objective needs a value in every row"
                raise data_error(source, f"column {name!r} {problem}")
        target = ""
        if answer is not None:
            raw = texts[answer]
            target = names.get(raw, raw)
            if allowed and target not in allowed:
                unknown.append((source, raw))
        examples.append(
            Example(
                texts,
                target,
                source,
                group=texts[group] if group is not None else None,
                task=texts[task] if task is not None else None,
                solution=fill(written, texts) if written else None,
                extra={name: row[name] for name in extra},
            )
        )
    if unknown:
        assert answer is not None
        source, raw = unknown[0]
        others = ", ".join(f"{quote(text)} ({where})" for where, text in unknown[1:3])
        more = f" (of {len(unknown)} such rows the next: {others})" if others else ""
        target = names.get(raw, raw)
        mapped = f" (mapped to {quote(target)})" if target != raw else ""
        known = ", ".join(quote(choice, 30) for choice in allowed)
        raise data_error(
            source,
            f"label {quote(raw)}{mapped} in column {answer!r} is not among the choices {known}; "
            f"{_advise(target, unknown, allowed, table.class_labels(answer))}{more}",
            "choices",
        )
    return examples


def _matching_rows(table: Table, where: Mapping[str, str]) -> list[tuple[Row, str]]:
    pairs = list(zip(table.rows, table.sources, strict=True))
    kept = [
        (row, source)
        for row, source in pairs
        if all(cell_text(row.get(name)) == text for name, text in where.items())
    ]
    if not kept:
        condition = " and ".join(f"{name} = {quote(text)}" for name, text in where.items())
        held = "; ".join(
            f"{name} holds {_some_values(table, name, text)}" for name, text in where.items()
        )
        raise data_error(table.name, f"none of {len(pairs)} rows has {condition}; {held}")
    return kept


def _advise(
    label: str,
    unknown: Sequence[tuple[str, str]],
    choices: Sequence[str],
    named: Mapping[str, str],
) -> str:
    """What to do about labels that are no choices."""
    labels = dict.fromkeys(raw for _, raw in unknown)
    if any(raw in named for raw in labels):
        return f"the data set names its classes: set {advise_mapping(named)}"
    twins = {raw: twin for raw in labels if (twin := find_twin(raw, choices)) is not None}
    twin = find_twin(label, choices)
    if twin is None or not twins:
        return "add it to the choices or map it in labels"
    return (
        f"{compare_twins(label, twin)}: write them alike in the file, or set "
        f"{advise_mapping(twins)}"
    )


def _some_values(table: Table, name: str, asked: str, most: int = 8) -> str:
    counts = Counter(text for row in table.rows if (text := cell_text(row.get(name))) is not None)
    values = ", ".join(quote(text, 30) for text, _ in counts.most_common(most))
    if asked not in counts and (twin := find_twin(asked, counts)) is not None:
        return (
            f"{escape(twin)}, which differs from {escape(asked)} only in {difference(asked, twin)}"
        )
    more = f" and {len(counts) - most} more" if len(counts) > most else ""
    return f"{values or 'nothing'}{more}"


def _unusable(name: str, row: Row) -> str:
    value = row.get(name)
    if cell_text(value) is None and value is not None and not isinstance(value, float):
        return f"column {name!r} holds a {type(value).__name__}; expected text or a number"
    return f"column {name!r} is empty; expected text (fill the cell or remove the row)"
