"""Guess a table's columns for `embedgrad new` and `refine`."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from embedgrad.data.examples import cell_text
from embedgrad.data.labels import advise_mapping, closest, map_twins, note_twins
from embedgrad.data.table import Table, data_error, quote

ANSWER_NAMES = ("label_text", "label", "answer", "target", "class", "sentiment", "completion")
TEXT_NAMES = ("text", "question", "review", "sentence", "input", "prompt")
GROUP_NAMES = ("group", "group_id")
MOST_CHOICES = 20
LONGEST_CHOICE = 40  # characters
_KINDS = {dict: "an object", list: "a list", bytes: "bytes", float: "NaN"}


@final
@dataclass(frozen=True, slots=True)
class Guess:
    """What the columns of a table seem to be for; `notes` says it in sentences for a person.

    `choices` is None when the answers are too many or too long to choose from (generation).
    `labels` maps answers to choices: numbers to the names of their classes where the data brings
    them, and spellings that differ only in blanks, case or Unicode form to one of them.
    """

    text: str
    answer: str | None
    choices: tuple[str, ...] | None
    group: str | None
    notes: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


def guess_columns(
    table: Table,
    *,
    text: str | None = None,
    answer: str | None = None,
    words: Mapping[str, str] | None = None,
) -> Guess:
    """Guess the text, answer and group columns from names, lengths and numbers of values.

    Those that are given are not guessed; `words` say what answers mean. Raises DataError for one
    that is not there, when no column holds text, and when all rows have one answer.
    """
    for given in (text, answer):
        if given is not None and given not in table.columns:
            raise data_error(table.name, f"no column {given!r}; {closest(given, table.columns)}")
    values = {name: texts for name in table.columns if (texts := _column_texts(table, name))}
    group = next((name for name in values if name.lower() in GROUP_NAMES), None)
    choices = {name: c for name, texts in values.items() if (c := _choices(texts)) is not None}
    rest = [name for name in values if name not in (group, text)]
    answer = answer or _guess_answer(rest, choices)
    text = text or _guess_text(table, {n: t for n, t in values.items() if n not in (answer, group)})
    if text == answer:
        raise data_error(table.name, f"column {text!r} is both text and answer; name two columns")
    only = set(values.get(answer or "", ()))
    if len(only) == 1 and len(table.rows) > 1:
        problem = f"column {answer!r} holds {quote(only.pop())} in every row"
        raise data_error(table.name, f"{problem}; expected at least two answers")
    answers = choices.get(answer) if answer is not None else None
    labels: dict[str, str] = {}
    more: list[str] = []
    if answer is not None and answers is not None:
        labels, more = _guess_labels(table, answer, answers, values[answer])
        for label in words or ():
            if label not in answers:
                problem = f"no row has the answer {label!r} in column {answer!r}"
                raise data_error(table.name, f"{problem}; {closest(label, answers)}")
        labels = {**labels, **(words or {})}
        answers = tuple(dict.fromkeys(labels.get(choice, choice) for choice in answers))
        if len(answers) < 2:
            problem = f"every answer in column {answer!r} means {quote(answers[0])}"
            raise data_error(table.name, f"{problem}; expected at least two answers")
    elif words:
        problem = f"the values of column {answer!r} are no labels, as they are too many or too long"
        raise data_error(table.name, f"{problem}; leave out what labels mean, or name the column")
    notes = [*_notes(text, answer, answers, group), *more]
    return Guess(text, answer, answers, group, tuple(notes), labels)


def list_columns(table: Table) -> str:
    """The columns for a message; of one that is no text, the first cell that is none."""
    return ", ".join(map(functools.partial(_describe, table), table.columns))


def _describe(table: Table, name: str) -> str:
    for row, source in zip(table.rows, table.sources, strict=True):
        cell = row.get(name)
        if cell is not None and cell_text(cell) is None:
            kind = _KINDS.get(type(cell), f"a {type(cell).__name__}")
            return f"{name} (in {source} {kind}; expected plain text)"
    return name


def _guess_labels(
    table: Table, answer: str, answers: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """What the answers mean, and notes on it."""
    names = table.class_labels(answer)
    if names and all(choice in names for choice in answers):
        return names, [f"Took the names of its numbers from the data set: {advise_mapping(names)}."]
    counts = Counter(texts)
    labels = map_twins(counts)
    blank = {name: name.strip() for name in answers if name != name.strip() and name not in labels}
    notes = note_twins(counts, mapped=True)
    if blank:
        notes.append("Answers have blanks around them; the recipe maps them to names without.")
        labels = {one: blank.get(other, other) for one, other in labels.items()} | blank
    return labels, notes


def _column_texts(table: Table, name: str) -> list[str]:
    """Text of a column's cells that have one; none if any cell holds something else."""
    cells = [cell for row in table.rows if (cell := row.get(name)) is not None and cell != ""]
    texts = [text for cell in cells if (text := cell_text(cell)) is not None]
    return texts if len(texts) == len(cells) else []


def _choices(texts: Sequence[str]) -> tuple[str, ...] | None:
    """Distinct values, if they are few, short and mostly repeated."""
    distinct = sorted(set(texts))
    few = 2 <= len(distinct) <= min(MOST_CHOICES, max(2, len(texts) // 2))
    return tuple(distinct) if few and max(map(len, distinct)) <= LONGEST_CHOICE else None


def _guess_answer(names: Sequence[str], choices: Mapping[str, tuple[str, ...]]) -> str | None:
    """A known name with few values, else a known name, else the column with the fewest values."""
    known = _sort_known(names, ANSWER_NAMES)
    few = [name for name in names if name in choices and name.lower() not in TEXT_NAMES]
    by_count = sorted(few, key=lambda name: len(choices[name]))
    ranked = [name for name in known if name in choices] + known + by_count
    return ranked[0] if ranked else None


def _guess_text(table: Table, values: Mapping[str, Sequence[str]]) -> str:
    """A known name, else the column with the longest text on average."""
    strings = [n for n in values if all(isinstance(row.get(n), str | None) for row in table.rows)]
    if not strings:
        columns = list_columns(table)
        raise data_error(table.name, f"no column holds text to read; its columns are {columns}")
    known = _sort_known(strings, TEXT_NAMES)
    return known[0] if known else max(strings, key=lambda n: sum(map(len, values[n])))


def _sort_known(names: Sequence[str], order: Sequence[str]) -> list[str]:
    return sorted((n for n in names if n.lower() in order), key=lambda n: order.index(n.lower()))


def _notes(
    text: str, answer: str | None, choices: tuple[str, ...] | None, group: str | None
) -> list[str]:
    notes = [f"Guessed that the text to read is in column {text!r}."]
    if answer is None:
        notes.append("Found no column that looks like an answer; name it if there is one.")
    elif choices is None:
        notes.append(
            f"Guessed that column {answer!r} is the answer to generate: "
            "its values are too many or too long to choose from."
        )
    else:
        values = ", ".join(map(repr, choices))
        notes.append(f"Guessed that column {answer!r} is the answer, one of {values}.")
        if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", choice) for choice in choices):
            notes.append(
                "These answers are numbers; if they stand for words, say which by data.labels "
                f"(refine: --label {choices[0]}=WORD)."
            )
        if answer in choices:
            notes.append(f"Column {answer!r} has the name of an answer: is there no header?")
    if group is not None:
        notes.append(f"Guessed that rows with one {group!r} belong together in one split.")
    return notes
