"""Find texts that occur in two splits."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from embedgrad.data.examples import Example
from embedgrad.data.table import data_error, quote

Given = Mapping[str, Sequence[Example]]


def text_key(example: Example, columns: Sequence[str]) -> tuple[str, ...]:
    """What makes two texts duplicates: equal but for case, white space and Unicode form."""
    texts = (unicodedata.normalize("NFC", example.columns.get(name, "")) for name in columns)
    return tuple(" ".join(text.split()).casefold() for text in texts)


def shared_texts(given: Given, columns: Sequence[str]) -> str:
    """Say how many rows repeat a text of an earlier split, and where the first pair is."""
    if len(given) == 1:
        return ""
    first: dict[tuple[str, ...], tuple[str, Example]] = {}
    count, pair = 0, ""
    for name, rows in given.items():
        for example in rows:
            home, other = first.setdefault(text_key(example, columns), (name, example))
            if home != name:
                count += 1
                pair = pair or f"{home} {other.source} and {name} {example.source}"
    what = "1 row repeats" if count == 1 else f"{count} rows repeat"
    return f"{what} the text of a row in another split (first: {pair})" if count else ""


def note_conflicts(examples: Iterable[Example], columns: Sequence[str]) -> list[str]:
    """A note on texts that have several answers, with the first two rows of one."""
    first: dict[tuple[str, ...], Example] = {}
    differing: dict[tuple[str, ...], tuple[Example, Example]] = {}
    for example in examples:
        key = text_key(example, columns)
        other = first.setdefault(key, example)
        if other.answer != example.answer:
            differing.setdefault(key, (other, example))
    if not differing:
        return []
    one, other = next(iter(differing.values()))
    what = "One text has" if len(differing) == 1 else f"{len(differing)} texts have"
    return [
        f"{what} different answers in different rows (first: {quote(one.answer)} in {one.source}, "
        f"{quote(other.answer)} in {other.source}); correct them or remove the rows."
    ]


def without_shared(
    given: Given, columns: Sequence[str]
) -> tuple[dict[str, Sequence[Example]], list[str]]:
    """The splits, in order, without the rows whose text a later one has, and a note for each.

    Raises DataError where that leaves nothing of a split.
    """
    kept: dict[str, Sequence[Example]] = {}
    notes: list[str] = []
    later: set[tuple[str, ...]] = set()
    names: list[str] = []
    for name in reversed(list(given)):
        rows, where = given[name], " or ".join(names)
        keys = [text_key(example, columns) for example in rows]
        left = [row for row, key in zip(rows, keys, strict=True) if key not in later]
        if not left:
            raise data_error(
                f"data.{name}",
                f"every row has a text of {where}, and data.drop_duplicates leaves "
                "such rows out; give other rows",
            )
        count = len(rows) - len(left)
        if count:
            what = "1 row" if count == 1 else f"{count} rows"
            notes.insert(0, f"Left out by data.drop_duplicates: {what} of {name} also in {where}.")
        kept[name] = left if count else rows
        later.update(keys)
        names.insert(0, name)
    return {name: kept[name] for name in given}, notes
