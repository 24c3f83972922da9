"""Answer a user's queries with a run's prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from embedgrad.errors import DataError, EmbedgradError, nearest
from embedgrad.examples import Example, cell_text
from embedgrad.opened import OpenRun
from embedgrad.report.words import visible
from embedgrad.sequence import TokenSequence


def queries_from(
    query: str | None, lines: Iterable[bytes], columns: Sequence[str]
) -> Iterator[Example]:
    """Examples without an answer: one from `query`, or one per JSON line. Raises `DataError`.

    A query, or a line that is only a JSON string, is the text of the template's one column.
    """
    if query is not None:
        yield _example(query, columns, "the query")
        return
    for number, line in enumerate(lines, start=1):
        where = f"standard input:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: is not JSON ({error}); expected an object per line"
            ) from error
        yield _example(row, columns, where)


def answer(run: OpenRun, queries: Iterable[Example], *, refined: bool) -> Iterator[dict[str, Any]]:
    """One plain JSON value per query, in order, batch by batch.

    `answer` is the text; with choices, `probabilities` says how likely each is among them. What
    stands before a query that is refused is answered first.
    """
    queries, failure = iter(queries), None
    size = run.evaluator.evaluation.batch_size
    while failure is None:
        batch: list[TokenSequence] = []
        try:
            for query in islice(queries, size):
                batch.append(run.sequencer(query))
        except EmbedgradError as error:
            failure = error
        if not batch and failure is None:
            return
        yield from _replies(run, batch, refined)
    raise failure


def as_text(reply: dict[str, Any]) -> str:
    """A reply for a terminal; what could drive it is shown as an escape."""
    text = "\n".join(visible(line) for line in str(reply["answer"]).split("\n"))
    chances = reply.get("probabilities")
    if not chances:
        return f"{text} [cut]" if reply.get("cut") else text
    listed = ", ".join(f"{visible(choice)} {chance:.3f}" for choice, chance in chances.items())
    return f"{text}  ({listed})"


def _replies(run: OpenRun, batch: list[TokenSequence], refined: bool) -> Iterator[dict[str, Any]]:
    if refined:
        answered = run.evaluator.refined(run.prompt.rows, batch)
    else:
        answered = run.evaluator.text(run.prompt.start_rows, batch)
    for sequence, reply in zip(batch, answered, strict=True):
        values: dict[str, Any] = {"answer": reply.predicted}
        if reply.probabilities is not None:
            choices = run.prompt.target.choices
            values["probabilities"] = dict(zip(choices, reply.probabilities, strict=True))
        else:
            values["cut"] = reply.cut
        yield {**values, "columns": dict(sequence.example.columns)}


def _example(row: object, columns: Sequence[str], where: str) -> Example:
    """A query as an example; every column of the template must have text."""
    if isinstance(row, str):
        if len(columns) != 1:
            raise DataError(
                f"{where}: the template has {len(columns)} columns ({', '.join(columns)}); "
                "give JSON lines with all of them on standard input"
            )
        row = {columns[0]: row}
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with {', '.join(columns)}")
    texts = {name: text for name in row if (text := cell_text(row[name])) is not None}
    for name in columns:
        if name not in row:
            raise DataError(f"{where}: no column {name!r}; {nearest(name, row)}")
        if not texts.get(name, "").strip():
            raise DataError(f"{where}: column {name!r} holds no text; expected some")
        try:
            texts[name].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: column {name!r} is not UTF-8 text") from error
    return Example(texts, "", where)
