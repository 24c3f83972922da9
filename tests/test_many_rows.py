"""More rows than are read: where reading stops, and what it takes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from embedgrad.data.readers import read_table
from embedgrad.data.splits import Splits, read_splits
from refusals import refused

LIMIT = {"train": 20, "dev": 5, "test": 5}
FIRST = 1000
KINDS = ["jsonl", "csv", "parquet"]


@pytest.fixture(autouse=True)
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits draw of the first 1,000 rows."""
    monkeypatch.setattr("embedgrad.data.splits.DRAWN_FROM", FIRST)


@pytest.fixture
def few_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 rows are all that may be held at once."""
    for module in ("table", "readers", "splits"):
        monkeypatch.setattr(f"embedgrad.data.{module}.MOST_ROWS", 2000)


def row(i: int) -> dict[str, str]:
    return {"text": f"film\n{i}", "label": ("good", "bad")[i % 2]}


def write(path: Path, count: int) -> Path:
    rows = map(row, range(count))
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=300)
    elif path.suffix == ".csv":
        lines = (f'"{one["text"]}",{one["label"]}\n' for one in rows)
        path.write_text("".join(["text,label\n", *lines]))
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def read(source: Any, limit: dict[str, int] = LIMIT, **options: Any) -> Splits:
    return read_splits(source, columns=["text"], answer="label", limit=limit, **options)


def beyond(path: Path) -> None:
    """Make what lies behind the first rows unreadable, and in lines too large to be read."""
    if path.suffix == ".parquet":
        content = bytearray(path.read_bytes())
        group = parquet.ParquetFile(path).metadata.row_group(4)  # of the first 1,200 rows
        start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
        footer = int.from_bytes(content[-8:-4], "little") + 8
        content[start:-footer] = bytes(len(content) - footer - start)
        path.write_bytes(content)
    else:
        with open(path, "ab") as file:
            file.truncate(3 << 30)  # a hole, which takes no room on the disk


@pytest.mark.usefixtures("few_fit")
@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_stops_reading(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"many.{kind}", 3000)
    whole = read(path)
    beyond(path)
    stopped = read(path)
    assert stopped == whole
    assert [len(part) for part in (stopped.train, stopped.dev, stopped.test)] == [20, 5, 5]
    (note,) = (note for note in stopped.notes if "only its first" in note)
    rows = int(note.split("first ")[1].split(" rows")[0].replace(",", ""))
    assert rows == FIRST  # though every row of a .csv has two lines
    assert note.endswith("rows are read, of which data.limit draws.")


@pytest.mark.usefixtures("few_fit")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_what_a_limit_leaves(tmp_path: Path, kind: str) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.{kind}", count)
        tracemalloc.start()
        try:
            read(path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(3000)  # what is imported at first
    few, many = peak(3000), peak(40_000)
    assert many < 1.2 * few


def test_rows_of_a_data_set_behind_the_first_are_left() -> None:
    table = read_table(Dataset.from_list([row(i) for i in range(50)]), most=7)
    assert [r["text"] for r in table.rows] == [row(i)["text"] for i in range(7)]
    assert table.notes == ("Dataset: only its first 7 rows are read, of which data.limit draws.",)


@pytest.mark.parametrize(
    "options",
    [
        {"limit": {"train": 20}},
        {"limit": {"train": 20, "dev": 5}},
        {"where": {"label": "good"}},
    ],
)
def test_all_is_read_where_a_split_has_no_limit_or_rows_are_chosen(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "many.jsonl", 3000)
    assert not any("only its first" in note for note in read(path, **options).notes)
    beyond(path)
    with refused("many.jsonl: cannot be read (is larger than", "data.limit reads its first rows"):
        read(path, **options)


def test_splits_of_their_own_stop_by_their_own_limits(tmp_path: Path) -> None:
    train, dev = write(tmp_path / "train.jsonl", 3000), tmp_path / "dev.jsonl"
    dev.write_text('{"text": "another", "label": "good"}\n')
    beyond(train)
    splits = read(train, {"train": 20}, dev=dev, test_share=0.0)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (20, 1, 0)


def test_a_large_limit_reads_twice_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", 3000)
    splits = read(path, {"train": 700}, dev_share=0.0, test_share=0.0)
    assert any("first 1,400 rows" in note for note in splits.notes)


def test_no_limit_moves_a_row_to_another_split(tmp_path: Path) -> None:
    """Test rows of a run with limits are none that a run without them trains on."""
    path = write(tmp_path / "many.jsonl", 3000)
    whole, limited = read(path, {}), read(path, {"train": 600, "dev": 5, "test": 300})
    for name in ("train", "dev", "test"):
        sources = {example.source for example in getattr(whole, name)}
        assert {example.source for example in getattr(limited, name)} <= sources


@pytest.mark.usefixtures("few_fit")
@pytest.mark.parametrize("make", [lambda path: path, lambda path: Dataset.from_json(str(path))])
def test_more_rows_than_can_be_held_are_refused_before_they_are_read(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    source = make(write(tmp_path / "many.jsonl", 3000))
    with refused("holds 3,000 ", "and 2,000 may be held at once; with data.limit"):
        read(source, {})
    assert len(read(source).train) == 20


@pytest.mark.usefixtures("few_fit")
def test_lines_of_an_array_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    path.write_text(json.dumps([row(i) for i in range(900)], indent=1))
    assert path.read_text().count("\n") > 2000
    assert len(read_table(path).rows) == 900
    path.write_text(json.dumps([row(i) for i in range(2001)]))
    with refused("many.json: holds 2,001 rows", "cut it into smaller files"):
        read_table(path)


@pytest.mark.parametrize(
    "text",
    [
        "".join(["sep=;\n", "label;text\n", *(f'good;"film\n{i}"\n' for i in range(50))]),
        "\n" * 40 + "text,label\n" + "".join(f"film {i},good\n\n\n" for i in range(50)),
        "text,label\r" + "".join(f"film {i},good\r\n" for i in range(50)),
        "text,label\n" + "".join(f"film {i},good" + "\n\r"[i == 3] for i in range(50)),
        "\ufefftext,label\r\n" + "".join(f'"film ""{i}""",good\r\n' for i in range(50)),
    ],
    ids=["separator", "blank lines", "old header", "one old line", "mark"],
)
@pytest.mark.parametrize("most", [1, 20, 49])
def test_the_first_rows_are_those_of_the_whole(tmp_path: Path, text: str, most: int) -> None:
    path = tmp_path / "many.csv"
    path.write_bytes(text.encode())
    whole, first = read_table(path), read_table(path, most=most)
    count = len(first.rows)
    assert count in (most, most + 1)  # a line that ends the old way brings the next one along
    assert (first.columns, first.rows) == (whole.columns, whole.rows[:count])
    assert first.sources == whole.sources[:count]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f"\n\n{json.dumps(row(i))}\n" for i in range(50)))
    first = read_table(path, most=20)
    assert (len(first.rows), first.sources[-1]) == (20, "many.jsonl:60")


def test_a_row_that_is_cut_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedgrad.data.bounded_reads.LONGEST_LINE", 100)
    path = tmp_path / "many.csv"
    path.write_bytes(b"text,label\r" + b"".join(b"film %d,good\r" % i for i in range(50)))
    first = read_table(path, most=3)
    assert first.rows == read_table(path).rows[: len(first.rows)]
    assert 3 <= len(first.rows) < 10
