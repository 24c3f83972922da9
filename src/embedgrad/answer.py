"""Answer a user's queries with a run's prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from embedgrad.errors import DataError, nearest
from embedgrad.examples import Example, cell_text
from embedgrad.opened import OpenRun


def queries_from(
    query: str | None, lines: Iterable[str], columns: Sequence[str]
) -> Iterator[Example]:
    """Examples without an answer: one from `query`, or one per JSON line. Raises `DataError`.

    A query, or a line that is only a JSON string, is the text of the template's one column.
    """
    if query is not None:
        yield _single(query, columns, "the query")
        return
    for number, line in enumerate(lines, start=1):
        where = f"standard input:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where}: is not JSON ({error}); expected an object per line"
            ) from error
        if isinstance(row, str):
            yield _single(row, columns, where)
            continue
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object with {', '.join(columns)}")
        for name in columns:
            if cell_text(row.get(name)) is None:
                raise DataError(f"{where}: no text in column {name!r}; {nearest(name, row)}")
        texts = {name: text for name in row if (text := cell_text(row[name])) is not None}
        yield Example(texts, "", where)


def answer(run: OpenRun, queries: Iterable[Example], *, refined: bool) -> Iterator[dict[str, Any]]:
    """One plain JSON value per query, in order, batch by batch.

    `answer` is the text; with choices, `probabilities` says how likely each is among them.
    """
    choices = run.prompt.target.choices
    queries = iter(queries)
    while batch := list(islice(queries, run.evaluator.evaluation.batch_size)):
        sequences = run.sequencer.build(batch)
        if refined:
            answered = run.evaluator.refined(run.prompt.rows, sequences)
        else:
            answered = run.evaluator.text(run.prompt.start_rows, sequences)
        for example, reply in zip(batch, answered, strict=True):
            values: dict[str, Any] = {"answer": reply.predicted}
            if reply.probabilities is not None:
                values["probabilities"] = dict(zip(choices, reply.probabilities, strict=True))
            yield {**values, "columns": dict(example.columns)}


def _single(text: str, columns: Sequence[str], where: str) -> Example:
    if len(columns) != 1:
        raise DataError(
            f"{where}: the template has {len(columns)} columns ({', '.join(columns)}); "
            "give JSON lines with all of them on standard input"
        )
    return Example({columns[0]: text}, "", where)
