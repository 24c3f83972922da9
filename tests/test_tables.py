"""Reading data: every format comes back whole; a damaged file is refused where it is damaged."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from embedgrad.data.readers import Table, data_error, quote, read_table
from refusals import refused

ROWS: list[dict[str, object]] = [
    {"text": "Good, really", "label": 1},
    {"text": 'Bad\nand "long"', "label": 0},
    {"text": "Crème\u2028brûlée \N{SLIGHTLY SMILING FACE}", "label": 1},
]
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def separated(header: list[str], rows: list[list[str]], delimiter: str = ",") -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return stream.getvalue()


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json-lines", "JSONL"])
def test_json_lines_come_back_with_their_types_and_lines(tmp_path: Path, suffix: str) -> None:
    content = "\n" + jsonl(ROWS)  # a blank line is skipped and counted
    table = read_table(put(tmp_path, f"reviews.{suffix}", content))
    name = f"reviews.{suffix}"
    assert table == Table(
        name=name,
        columns=("text", "label"),
        rows=ROWS,
        sources=[f"{name}:2", f"{name}:3", f"{name}:4"],
        digest=hashlib.sha256(content.encode()).hexdigest(),
    )


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_separated_values_come_back_as_text(tmp_path: Path, suffix: str, delimiter: str) -> None:
    cells = [[str(row["text"]), str(row["label"])] for row in ROWS]
    content = separated(["text", "label"], cells, delimiter)
    table = read_table(put(tmp_path, f"reviews.{suffix}", content))
    assert table.columns == ("text", "label")
    assert table.rows == [{"text": text, "label": label} for text, label in cells]
    assert table.digest == hashlib.sha256(content.encode()).hexdigest()


def test_parquet_comes_back_with_its_types_and_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "reviews.parquet"
    rows = [*ROWS, {"text": None, "label": 2}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert table.rows == rows
    assert table.sources == [f"reviews.parquet:{i}" for i in (1, 2, 3, 4)]
    assert table.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_any_text_survives_csv_and_json(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"a": a, "b": b} for a, b in cells]
    assert read_table(put(folder, "any.jsonl", jsonl(rows))).rows == rows
    text = separated(["a", "b"], [list(pair) for pair in cells])
    assert read_table(put(folder, "any.csv", text)).rows == rows


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text,label\nfine,1\n"), ("a.jsonl", '{"text": "fine"}\n')]
)
def test_byte_order_mark_is_no_part_of_the_first_column(
    tmp_path: Path, name: str, content: str
) -> None:
    table = read_table(put(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))
    assert table.columns[0] == "text"
    assert table.rows[0]["text"] == "fine"


def test_csv_rows_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    content = 'text,label\r\n"one\r\ntwo\r\nthree",0\r\n\r\nfour,1\r\n"five\nsix",0\r\nseven,1\r\n'
    table = read_table(put(tmp_path, "a.csv", content))
    assert table.sources == ["a.csv:2", "a.csv:6", "a.csv:7", "a.csv:9"]
    assert table.rows[0]["text"] == "one\r\ntwo\r\nthree"


def test_csv_cells_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    cell = "long " * limit
    table = read_table(put(tmp_path, "a.csv", f"text,label\n{cell},1\n"))
    assert table.rows[0]["text"] == cell
    assert csv.field_size_limit() == limit


def test_columns_are_those_of_any_json_row_in_order(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, "a.jsonl", '{"b": 1}\n{"a": NaN, "b": 2}\n'))
    assert table.columns == ("b", "a")
    assert "a" not in table.rows[0]
    assert math.isnan(table.rows[1]["a"])  # type: ignore[arg-type]


def test_an_existing_path_wins_over_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub:owner").mkdir()
    put(tmp_path, "hub:owner/name.csv", "text\nmine\n")
    assert read_table("hub:owner/name.csv").rows == [{"text": "mine"}]


# ------------------------------------------------------------------------- files refused


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"", ["the file is empty", "at least one row"]),
        ("a.csv", b"text,label\n", ["no rows", "expected at least one"]),
        ("a.csv", b"\xef\xbb\xbf", ["no rows"]),
        ("a.jsonl", b"\n \r\n", ["no rows"]),
        ("a.txt", b"text", ["'.txt'", ".jsonl, .ndjson, .json-lines, .csv, .tsv, .parquet"]),
        ("a.csv", b"text,label\nok,1\nna\xefve,0\n", ["a.csv:3: byte 0xef is not UTF-8"]),
        ("a.csv", b"\xef\xbb\xbftext\nok\nna\xefve\n", ["a.csv:3: byte 0xef is not UTF-8"]),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', ["a.jsonl:3: byte 0xff", "saved as UTF-8"]),
        ("a.csv", "text\nfine\n".encode("utf-16"), ["a.csv:1: byte 0xff is not UTF-8"]),
        ("a.csv", b"text\nfine\na\0b\n", ["a.csv:3: holds a NUL byte"]),
        ("a.jsonl", b'{"a": "\0"}\n', ["a.jsonl:1: holds a NUL byte"]),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", ["a.csv:4: found 3 cells, expected 2", "','"]),
        ("a.csv", b'a,b\n"x\ny",2\n1\n', ["a.csv:4: found 1 cells, expected 2"]),
        ("a.tsv", b"a\tb\n1\t2\n1,2\n", ["a.tsv:3: found 1 cells, expected 2", r"'\t'"]),
        ("a.csv", b'a,b\n1,2\n"x\ny,2\n3,4\n', ["a.csv:3: broken quoting", "written"]),
        ("a.csv", b'a,b\n"x"y,2\n', ["a.csv:2: broken quoting"]),
        ("a.csv", b"a,b,a\n1,2,3\n", ["a.csv:1: column 'a' occurs twice", "unique"]),
        ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', ["a.jsonl:2: broken JSON at character", "a line"]),
        ("a.jsonl", b'{\n"a": 1}\n', ["a.jsonl:1: broken JSON"]),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', ["a.jsonl:2: holds a list", "JSON object a line"]),
        ("a.jsonl", b"null\n", ["a.jsonl:1: holds a NoneType"]),
        ("a.jsonl", b'{"a": 1, "b": 2, "b": 3}\n', ["a.jsonl:1: key 'b' occurs twice"]),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", ["a.jsonl:1: ", "plain JSON object"]),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", ["a.jsonl:1: ", "plain JSON object"]),
        ("a.jsonl", b'{"a": "\\uD83D"}\n', ["a.jsonl:1: holds half of a surrogate pair"]),
        ("a.parquet", b"PAR1 not really", ["a.parquet: is not a readable Parquet file"]),
    ],
)
def test_damaged_file_is_refused_at_its_line(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    with refused(name, *parts):
        read_table(put(tmp_path, name, content))


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, "a.jsonl", '{"a": "\\ud83d\\ude42"}\n'))
    assert table.rows == [{"a": "\N{SLIGHTLY SMILING FACE}"}]


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"]), path)
    with refused("a.parquet: column 'x' occurs twice"):
        read_table(path)


def test_missing_file_names_its_neighbors_and_the_way_to_the_hub(tmp_path: Path) -> None:
    put(tmp_path, "reviews.csv", "a\n1\n")
    put(tmp_path, "notes.txt", "")
    path = tmp_path / "reviws.csv"
    with refused(f"{path}: no such file", "did you mean 'reviews.csv'?", "hub:OWNER/NAME"):
        read_table(path)
    with refused("no such file; data files there: reviews.csv (", "hub:OWNER/NAME"):
        read_table(tmp_path / "zzz.parquet")
    with refused("no such file, and no folder", "nowhere"):
        read_table(tmp_path / "nowhere" / "a.csv")
    with refused("owner/name: no such file", "hub:OWNER/NAME[@CONFIG][:SPLIT]"):
        read_table("owner/name")


def test_folder_is_refused_with_its_data_files(tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path, f"{i}.jsonl", "{}")
    with refused(f"{tmp_path}: is a folder", "0.jsonl, 1.jsonl", "7.jsonl and 2 more"):
        read_table(tmp_path)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "a.csv", "text\nfine\n")

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)  # tests may run as root, whom no mode stops
    with refused(f"{path}: cannot be read (Permission denied)"):
        read_table(path)


def test_file_has_no_splits(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", "text\nfine\n")
    for asked in ({"split": "train"}, {"revision": "main"}):
        with refused("a.csv: a split or a revision needs a Hub data set", "hub:OWNER/NAME"):
            read_table(path, **asked)


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("datasets", "hub:o/n", "hub")],
)
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with refused(f"{source}: needs the package {module}", f"pip install 'embedgrad[{extra}]'"):
        read_table(source)


def test_messages_stay_on_one_line_whatever_they_quote() -> None:
    message = str(data_error("a\nb.csv:1", f"\x1b[31m {quote('x' * 100)} caf\u00e9\u2028"))
    assert message == f"a\\nb.csv:1: \\x1b[31m '{'x' * 57}...' caf\u00e9\\u2028"


# ------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the Hub: one data set with two splits; returns the calls it got."""
    calls: list[tuple[Any, ...]] = []
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    stored = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS, features=features),
            "test": datasets.Dataset.from_list(ROWS, features=features).select([2, 0]),
            "none": datasets.Dataset.from_list(ROWS, features=features).select([]),
        }
    )

    def load_dataset(
        path: str, name: str | None = None, *, split: str | None, revision: str | None
    ) -> Any:
        calls.append((path, name, split, revision))
        if path == "o/one":
            return datasets.DatasetDict(train=stored["train"])
        return stored if split is None else stored[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_set_comes_back_with_rows_names_and_fingerprint(
    hub: list[tuple[Any, ...]],
) -> None:
    table = read_table("hub:owner/some-name@plain:train", revision="abc123")
    assert hub == [("owner/some-name", "plain", "train", "abc123")]
    assert table.name == "hub:owner/some-name@plain:train"
    assert table.columns == ("text", "label")
    assert table.rows == ROWS
    assert table.sources == [f"hub:owner/some-name@plain:train:{i}" for i in (1, 2, 3)]
    other = read_table("hub:owner/some-name", split="test")
    assert other.rows == [ROWS[2], ROWS[0]]  # as selected, not the whole table behind
    assert table.digest.endswith(":train")
    assert other.digest.endswith(":test")
    assert table.digest.partition(":")[0] != other.digest.partition(":")[0]


def test_hub_split_may_be_left_out_only_if_there_is_one(hub: list[tuple[Any, ...]]) -> None:
    assert read_table("hub:o/one").name == "hub:o/one:train"
    with refused("hub:o/n: name one of its splits", "train, test", ":SPLIT"):
        read_table("hub:o/n")
    assert hub == [("o/one", None, None, None), ("o/n", None, None, None)]


@pytest.mark.parametrize(
    ("source", "split", "parts"),
    [
        ("hub:name", None, ["hub:name: is not a Hub data set", "hub:OWNER/NAME"]),
        ("hub:", None, ["expected hub:OWNER/NAME"]),
        ("hub:o/n:train", "test", ["names another split than 'test'"]),
        ("hub:o/n:none", None, ["hub:o/n:none: holds no rows"]),
        ("hub:o/n:dev", None, ["hub:o/n:dev: cannot be loaded (KeyError: 'dev')"]),
    ],
)
def test_hub_source_that_cannot_be_read_is_refused(
    hub: list[tuple[Any, ...]], source: str, split: str | None, parts: list[str]
) -> None:
    with refused(*parts):
        read_table(source, split=split)
    assert len(hub) <= 1


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with refused("hub:o/n:train: cannot be loaded (", "OfflineModeIsEnabled", "network"):
        read_table("hub:o/n:train")


def test_long_errors_of_the_hub_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ValueError("Unknown split.\n" + "many configs " * 100)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with refused("(ValueError: Unknown split. many configs", "...);"):
        read_table("hub:o/n:train")


@pytest.mark.parametrize("other", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_told_apart(tmp_path: Path, other: str) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text(f"text{other}label\nA fine film{other}good\n")
    with refused("reviews.csv:1", "one column", repr(other), "separate cells by ','"):
        read_table(path)
