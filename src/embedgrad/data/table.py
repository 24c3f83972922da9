"""Table: the rows of one source, and the errors that name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from embedgrad.errors import DataError

Row = dict[str, object]

MOST_ROWS = 2**22  # of a source; with their texts they take some gigabytes


@final
class Part(NamedTuple):
    """The first `most` rows of a source; of one to be `carved` only where all are too many."""

    most: int | None = None
    carved: bool = False

    def rows_of(self, whole: int) -> int:
        """How many of all rows are read."""
        all_fit = self.carved and whole <= MOST_ROWS
        return whole if self.most is None or all_fit else min(whole, self.most)


@final
@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reader makes of a source: `numbers` are lines (of other than text files, rows)."""

    columns: tuple[str, ...]
    rows: list[Row]
    numbers: Sequence[int]
    notes: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one source.

    `sources[i]` is where `rows[i]` begins, "reviews.csv:18" (line of a text file, row of any
    other, both 1-based). `notes` are sentences on how it was read. `class_names` holds the names of
    a column's numbers 0, 1, ... where the data brings them (the `ClassLabel` of Hub data sets).
    """

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    sources: list[str]
    notes: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, parsed: Parsed) -> Table:
        """A source's table; raises DataError where it has no rows."""
        if not parsed.rows:
            raise data_error(name, "holds no rows; expected at least one")
        sources = [f"{name}:{number}" for number in parsed.numbers]
        notes = tuple(f"{name}: {note}." for note in parsed.notes)
        return cls(name, parsed.columns, parsed.rows, sources, notes, parsed.class_names)

    def class_labels(self, column: str) -> dict[str, str]:
        """The names of a column's numbers as a mapping for `data.labels`; empty without names."""
        return {str(number): name for number, name in enumerate(self.class_names.get(column, ()))}


def data_error(where: str, problem: str, about: str = "") -> DataError:
    """Build a DataError of one line; what does not print becomes an escape."""
    line = f"{where}: {problem}"
    return DataError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), about)


def refuse_many(count: int, name: str, what: str = "rows", *, stops: bool = True) -> None:
    """Raise DataError for more rows, or lines, than may be held at once."""
    if count > MOST_ROWS:
        advice = "with data.limit for every split that comes from it, only its first rows are read"
        problem = f"holds {count:,} {what}, and {MOST_ROWS:,} may be held at once"
        raise data_error(name, f"{problem}; {advice if stops else 'cut it into smaller files'}")


def only_first(rows: int) -> str:
    """The note on a source that is not read to its end."""
    return f"only its first {rows:,} rows are read, of which data.limit draws"


def quote(value: object, width: int = 60) -> str:
    """Quote a value for a message, cut to `width` characters."""
    text = str(value)
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def first_repeat(names: Sequence[str]) -> str:
    """Return the first name that occurs more than once."""
    return next(name for name, count in Counter(names).items() if count > 1)


def decode(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark; refuse NUL, which no text holds."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object may lack the byte order mark, which holds no line break: lines still agree
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    else:
        nul = data.find(b"\0")
        if nul < 0:
            return text
        line = data.count(b"\n", 0, nul) + 1
        problem = "holds a NUL byte"
    raise data_error(f"{name}:{line}", f"{problem}; expected a text file saved as UTF-8")
