"""Split examples into train, dev and test, without leaks."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from embedgrad.data.duplicates import note_conflicts, shared_texts, text_key, without_shared
from embedgrad.data.examples import Example, cell_text, examples_from, solution_pieces
from embedgrad.data.labels import advise_mapping, note_twins
from embedgrad.data.problems import Problems
from embedgrad.data.readers import Source, read_table
from embedgrad.data.table import MOST_ROWS, Table, data_error, quote
from embedgrad.errors import DataError, nearest
from embedgrad.formatting import pluralize

NAMES = ("train", "dev", "test")
DRAWN_FROM = 2**17  # rows: of a longer source, a limit draws of its first ones

Refuse = Callable[[DataError], None]


@final
@dataclass(frozen=True, slots=True)
class Splits:
    """Shuffled examples of each split.

    `notes` are sentences on what was carved, limited or allowed. `digests[name]` is a SHA-256 of
    that split's texts and answers in order: equal digests mean that the same rows were used.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]
    digests: Mapping[str, str]


def read_splits(
    train: Source,
    dev: Source | None = None,
    test: Source | None = None,
    *,
    columns: Sequence[str],
    answer: str,
    choices: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    solution: str | None = None,
    group: str | None = None,
    task: str | None = None,
    extra: Sequence[str] = (),
    compared: str | None = None,
    teacher: Sequence[str] = (),
    labelled: bool = True,
    where: Mapping[str, str] | None = None,
    dev_share: float = 0.2,
    test_share: float = 0.2,
    seed: int = 0,
    limit: Mapping[str, int] | None = None,
    allow_duplicates: bool = False,
    drop_duplicates: bool = False,
    convert: Callable[[Table], Table] | None = None,
    problems: Problems | None = None,
) -> Splits:
    """Read files, Hub data sets, data frames or `Dataset`s, and split their examples.

    The arguments are those of `read_table`, `examples_from` and `make_splits`. Without `labelled` a
    file may lack the column `answer`; the answers of its examples are then "". `convert` makes
    every table another, as of images, which then has the columns that are used.

    A source whose splits all have a limit is read up to `DRAWN_FROM` rows, or twice the limit of a
    single split, and no further. One that is carved is read so only if it is too large to be read
    without limits, as which rows become train, dev and test depends on all that are read.

    `problems` gets what would else be raised, where the rows or the check that failed can be left
    out; without it the first problem is raised.
    """

    written = solution_pieces(solution) if solution is not None else ()
    single = [name for name in (answer, group, task, compared) if name is not None]
    of_solution = [piece.text for piece in written if piece.kind == "column"]
    used = {*columns, *of_solution, *single, *extra, *teacher, *(where or ())}
    notes: dict[str, None] = {}

    carved = {"dev": 0.0 if dev is not None else dev_share}
    carved["test"] = 0.0 if test is not None else test_share

    def read(name: str, source: Source | None) -> list[Example] | None:
        if source is None:
            return None
        others = [n for n, share in carved.items() if share] if name == "train" else []
        most = None if where else _rows_to_read([(limit or {}).get(n) for n in (name, *others)])
        table: Table | None = None
        try:
            own = None if convert else used
            table = read_table(source, used=own, most=most, carved=bool(others))
            table = convert(table) if convert else table
            notes.update(dict.fromkeys(table.notes))
            if (named := table.class_labels(answer)) and not (labels or choices):
                advice = f"set {advise_mapping(named)} to answer by name"
                notes[f"{table.name}: column {answer!r} holds numbers of classes; {advice}."] = None
            return examples(table, where or None)
        except DataError as error:
            if problems is None:
                raise
            rows = () if table is None else _single_rows(table, where or {})
            alone = Problems()
            good = [example for (example,) in alone.each(lambda row: examples(row, None), rows)]
            if error.about == "choices" or not alone.lines:
                problems.add([str(error)])  # which counts its rows, or is of no row
            else:
                problems.lines += [line for line in alone.lines if line not in problems.lines]
            return good or None

    def examples(table: Table, where: Mapping[str, str] | None) -> list[Example]:
        return examples_from(
            table,
            columns=columns,
            answer=answer if labelled or answer in table.columns else None,
            choices=choices or None,
            labels=labels or None,
            solution=solution,
            group=group,
            task=task,
            extra=extra,
            compared=compared,
            teacher=teacher,
            where=where,
        )

    rows = read("train", train) or []
    balanced = labelled or any(example.answer for example in rows)
    splits = make_splits(
        rows,
        read("dev", dev),
        read("test", test),
        columns=columns,
        choices=(choices or None) if balanced else None,
        # A split that is named is never carved, not even if none of its rows can be read.
        fractions=(carved["dev"], carved["test"]),
        seed=seed,
        limit=limit,
        allow_duplicates=allow_duplicates,
        drop_duplicates=drop_duplicates,
        problems=problems,
    )
    return replace(splits, notes=(*notes, *splits.notes))


def _rows_to_read(limits: Sequence[int | None]) -> int | None:
    """How many rows of a source its splits, with these limits, are drawn from; None: of all."""
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return None
    return DRAWN_FROM if len(known) > 1 else min(max(DRAWN_FROM, 2 * known[0]), MOST_ROWS)


def _single_rows(table: Table, where: Mapping[str, str]) -> Iterator[Table]:
    for row, source in zip(table.rows, table.sources, strict=True):
        if all(cell_text(row.get(name)) == text for name, text in where.items()):
            yield replace(table, rows=[row], sources=[source])


def make_splits(
    train: Sequence[Example],
    dev: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
    *,
    columns: Sequence[str],
    choices: Sequence[str] | None = None,
    fractions: tuple[float, float] = (0.2, 0.2),
    seed: int = 0,
    limit: Mapping[str, int] | None = None,
    allow_duplicates: bool = False,
    drop_duplicates: bool = False,
    problems: Problems | None = None,
) -> Splits:
    """Shuffle, and carve a split that is not given out of `train`.

    `fractions` are the shares of `train` for dev and test (0: leave that split empty), used only
    for splits that are not given. Examples of one group, or with the same text in all template
    `columns`, stay in one split; without groups the carving is stratified by answer. `limit`
    counts rows per split, after shuffling. `choices` makes it a classification: then limits are
    stratified by answer, and `train` must hold at least two answers. `drop_duplicates` first leaves
    out rows of train whose text is in a given dev or test, and rows of dev whose text is in test.
    Raises DataError, also when a group or a text (unless `allow_duplicates`) is in two of the given
    splits; `problems` gets these instead.
    """

    def refuse(error: DataError) -> None:
        if problems is None:
            raise error
        problems.add([str(error)])

    given = {"train": train, "dev": dev, "test": test}
    explicit = {name: rows for name, rows in given.items() if rows is not None}
    for name, examples in explicit.items():
        if not examples:
            raise data_error(f"data.{name}", "holds no rows; expected at least one")
    limit = limit or {}
    for name in limit:
        if name not in NAMES:
            raise data_error("data.limit", f"unknown split {name!r}; {nearest(name, NAMES)}")
    notes: list[str] = []
    if drop_duplicates:
        explicit, notes = without_shared(explicit, columns)
        train = explicit["train"]
    _check_groups(explicit, refuse)
    repeats = shared_texts(explicit, columns)
    if repeats and not allow_duplicates:
        problem = (
            f"{repeats}; leave them out with data.drop_duplicates = true, or allow them with "
            "data.allow_duplicates = true"
        )
        refuse(data_error("data", problem))
    elif repeats:
        notes.append(f"Allowed by data.allow_duplicates: {repeats}.")

    asked = dict(zip(("dev", "test"), fractions, strict=True))
    shares = {name: share for name, share in asked.items() if name not in explicit and share}
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise data_error(
            "data.dev_share, data.test_share",
            f"are {fractions[0]} for dev and {fractions[1]} for test; "
            "expected numbers from 0 to 1 that leave something for train",
        )
    parts: dict[str, Sequence[Example]] = dict(explicit)
    if shares:
        parts |= _carve(train, {"train": 1 - sum(shares.values()), **shares}, columns, seed, notes)
    every = [example for part in explicit.values() for example in part]
    notes += note_conflicts(every, columns)
    answers = Counter(example.answer for example in every)
    if choices is not None or 2 * len(answers) <= len(every):  # labels, not texts of their own
        notes += note_twins({**dict.fromkeys(choices or (), 0), **answers})
    rows: dict[str, tuple[Example, ...]] = {}
    for name in NAMES:
        shuffled = list(parts.get(name, ()))
        random.Random(f"{seed}/{name}").shuffle(shuffled)  # own stream: no split moves another
        stratified = choices is not None
        rows[name] = _limit(name, shuffled, limit.get(name), notes, stratified=stratified)
    if choices is not None:
        _check_choices(rows, choices, notes, refuse)
    digests = {name: _digest(part, columns) for name, part in rows.items()}
    return Splits(rows["train"], rows["dev"], rows["test"], tuple(notes), digests)


def label_balance(examples: Iterable[Example]) -> dict[str, int]:
    """Count the answers, in alphabetical order."""
    return dict(sorted(Counter(example.answer for example in examples).items()))


def _check_groups(explicit: Mapping[str, Sequence[Example]], refuse: Refuse) -> None:
    first: dict[str, tuple[str, Example]] = {}
    for name, rows in explicit.items():
        for example in rows:
            if example.group is None:
                continue
            home, other = first.setdefault(example.group, (name, example))
            if home != name:
                problem = (
                    f"group {example.group!r} is in {home} ({other.source}) and in {name} "
                    f"({example.source}); move its rows to one split, or give one file and let it "
                    "be split by group"
                )
                return refuse(data_error("data", problem))


def _carve(
    examples: Sequence[Example],
    shares: Mapping[str, float],
    columns: Sequence[str],
    seed: int,
    notes: list[str],
) -> dict[str, list[Example]]:
    """Deal out whole units, each to the split that is furthest behind its share, and note it.

    No split ends more than 4/3 of the largest unit away from its share: it is never given a unit
    when ahead, so it gets ahead by 2/3 of one at most, and is behind by what the others are ahead.
    """
    units = _units(examples, columns)
    random.Random(f"{seed}/carve").shuffle(units)
    grouped = any(example.group is not None for example in examples)
    if not grouped:
        strata: dict[str, list[list[Example]]] = {}  # in shuffled order, so that it is never fixed
        for unit in units:
            strata.setdefault(unit[0].answer, []).append(unit)
        units = [unit for stratum in strata.values() for unit in stratum]
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    dealt = 0
    for unit in units:
        dealt += len(unit)
        behind = max(shares, key=lambda name: shares[name] * dealt - len(parts[name]))
        parts[behind] += unit
    whole = pluralize(len(examples), "row")
    if len(units) < len(examples):
        together = "rows of one group or with one text stay together"
        whole = f"{whole}, which are {pluralize(len(units), 'part')} ({together})"
    for name, part in parts.items():
        if not part:
            raise data_error(
                f"data.{name}",
                f"would be empty: a share of {shares[name]:.3g} of {whole}; give more rows or a "
                "larger share in data.dev_share and data.test_share",
            )
        if name != "train":
            manner = "by group" if grouped else "stratified by answer"
            notes.append(
                f"Set aside {len(part)} of {len(examples)} rows for {name} ({manner}, seed {seed})."
            )
    repeats = len(examples) - len({text_key(example, columns) for example in examples})
    if repeats:
        repeated = "1 row that repeats" if repeats == 1 else f"{repeats} rows that repeat"
        notes.append(f"Kept together in one split: {repeated} another row's text.")
    return parts


def _units(examples: Sequence[Example], columns: Sequence[str]) -> list[list[Example]]:
    """Sets of examples linked by a group or a text, which no split may part (union-find)."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, ...] | str, int] = {}
    for i, example in enumerate(examples):
        for key in (text_key(example, columns), example.group):
            if key is not None:
                parent[root(i)] = root(first.setdefault(key, i))
    units: dict[int, list[Example]] = {}
    for i, example in enumerate(examples):
        units.setdefault(root(i), []).append(example)
    return list(units.values())


def _limit(
    name: str, rows: Sequence[Example], limit: int | None, notes: list[str], *, stratified: bool
) -> tuple[Example, ...]:
    """The first rows up to the limit; `stratified`: every answer keeps its share.

    A row's turn is its place among those of its answer, as in Webster's apportionment, so a larger
    limit adds rows and takes none away. In train the first row of every answer comes before all
    others, so that no answer is lost while there is room; dev and test stay like the whole.
    """
    if limit is None:
        return tuple(rows)
    if limit < 1:
        raise data_error(f"data.limit.{name}", f"is {limit}; expected at least 1")
    if limit > len(rows):
        notes.append(
            f"Limit {limit} for {name}: it has only {pluralize(len(rows), 'row')}, all used."
        )
    if not stratified or limit >= len(rows):
        return tuple(rows[:limit])
    sizes, before = Counter(row.answer for row in rows), Counter[str]()
    turns: list[tuple[bool, float]] = []
    for row in rows:
        earlier = before[row.answer]
        turns.append((name != "train" or earlier > 0, (earlier + 0.5) / sizes[row.answer]))
        before[row.answer] += 1
    chosen = sorted(range(len(rows)), key=turns.__getitem__)[:limit]
    return tuple(rows[i] for i in sorted(chosen))


def _check_choices(
    rows: Mapping[str, Sequence[Example]], choices: Sequence[str], notes: list[str], refuse: Refuse
) -> None:
    train = rows["train"]
    if len(label_balance(train)) < 2:
        every = "its 1 row has" if len(train) == 1 else f"all {len(train)} rows have"
        problem = (
            f"{every} the answer {quote(train[0].answer)} "
            f"(first: {train[0].source}); expected at least two of the choices"
        )
        refuse(data_error("data.train", problem))
    for name, part in rows.items():
        balance = label_balance(part)
        absent = [quote(choice) for choice in choices if part and choice not in balance]
        if absent:
            notes.append(f"No row of {name} has the answer {' or '.join(absent)}.")


def _digest(rows: Iterable[Example], columns: Sequence[str]) -> str:
    hashed = hashlib.sha256()
    for example in rows:
        texts = [example.columns.get(name, "") for name in sorted(columns)]
        hashed.update(json.dumps([*texts, example.answer]).encode() + b"\n")
    return hashed.hexdigest()
