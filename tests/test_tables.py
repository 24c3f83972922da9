"""Reading data: every format comes back whole; a damaged file is refused where it is damaged."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import parquet

from embedgrad.data.readers import read_table
from embedgrad.data.table import Table, data_error, quote
from embedgrad.recipe.settings import DataSettings
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
    )


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_separated_values_come_back_as_text(tmp_path: Path, suffix: str, delimiter: str) -> None:
    cells = [[str(row["text"]), str(row["label"])] for row in ROWS]
    content = separated(["text", "label"], cells, delimiter)
    table = read_table(put(tmp_path, f"reviews.{suffix}", content))
    assert table.columns == ("text", "label")
    assert table.rows == [{"text": text, "label": label} for text, label in cells]


def test_parquet_comes_back_with_its_types_and_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "reviews.parquet"
    rows = [*ROWS, {"text": None, "label": 2}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert table.rows == rows
    assert table.sources == [f"reviews.parquet:{i}" for i in (1, 2, 3, 4)]


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_any_text_survives_csv_and_json(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"a": a, "b": b} for a, b in cells]
    assert read_table(put(folder, "any.jsonl", jsonl(rows))).rows == rows
    assume(not any("," in cell and set(cell) & {"\n", "\r"} for pair in cells for cell in pair))
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
        ("a.txt", b"text", ["'.txt'", ".jsonl, .ndjson, .json-lines, .json, .csv, .tsv, .parquet"]),
        ("a.csv", b"text,label\nok,1\nna\xefve,0\n", ["a.csv:3: byte 0xef is not UTF-8"]),
        ("a.csv", b"\xef\xbb\xbftext\nok\nna\xefve\n", ["a.csv:3: byte 0xef is not UTF-8"]),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', ["a.jsonl:3: byte 0xff", "saved as UTF-8"]),
        ("a.csv", "text\nfine\n".encode("utf-16"), ["a.csv:1: byte 0xff is not UTF-8"]),
        ("a.csv", b"text\nfine\na\0b\n", ["a.csv:3: holds a NUL byte"]),
        ("a.jsonl", b'{"a": "\0"}\n', ["a.jsonl:1: holds a NUL byte"]),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", ["a.csv:4: found 3 cells, expected 2", "','"]),
        ("a.csv", b'a,b\n"x\ny",2\n1\n', ["a.csv:4: found 1 cell, expected 2"]),
        ("a.tsv", b"a\tb\n1\t2\n1,2\n", ["a.tsv:3: found 1 cell, expected 2", r"'\t'"]),
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
    (tmp_path / "link.csv").symlink_to("gone.csv")
    with refused("link.csv: is a link to 'gone.csv', which leads nowhere"):
        read_table(tmp_path / "link.csv")
    with refused("data: the name of the file is empty; name a data file"):
        read_table("")
    with refused("https://x.org/a.csv: is an address, which is not read; download the file"):
        read_table("https://x.org/a.csv")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put(tmp_path, "a.csv", "text,label\nfine,yes\n")
    assert read_table("~/a.csv").rows == read_table(path).rows
    assert DataSettings(train="~/a.csv").train == str(path)


def test_folder_is_refused_with_its_data_files(tmp_path: Path) -> None:
    for i in range(10):
        put(tmp_path, f"{i}.jsonl", "{}")
    with refused(f"{tmp_path}: is a folder", "0.jsonl, 1.jsonl", "7.jsonl and 2 more"):
        read_table(tmp_path)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "a.csv", "text\nfine\n")

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # tests may run as root, whom no mode stops
    with refused(f"{path}: cannot be read (Permission denied)"):
        read_table(path)


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

    def load_dataset(path: str, name: str | None = None, *, split: str | None) -> Any:
        calls.append((path, name, split))
        if path == "o/one":
            return datasets.DatasetDict(train=stored["train"])
        return stored if split is None else stored[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_set_comes_back_with_rows_and_names(
    hub: list[tuple[Any, ...]],
) -> None:
    table = read_table("hub:owner/some-name@plain:train")
    assert hub == [("owner/some-name", "plain", "train")]
    assert table.name == "hub:owner/some-name@plain:train"
    assert table.columns == ("text", "label")
    assert table.rows == ROWS
    assert table.sources == [f"hub:owner/some-name@plain:train:{i}" for i in (1, 2, 3)]
    other = read_table("hub:owner/some-name:test")
    assert other.rows == [ROWS[2], ROWS[0]]  # as selected, not the whole table behind


def test_hub_split_may_be_left_out_only_if_there_is_one(hub: list[tuple[Any, ...]]) -> None:
    assert read_table("hub:o/one").name == "hub:o/one:train"
    with refused("hub:o/n: name one of its splits", "train, test", ":SPLIT"):
        read_table("hub:o/n")
    assert hub == [("o/one", None, None), ("o/n", None, None)]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:name", ["hub:name: is not a Hub data set", "hub:OWNER/NAME"]),
        ("hub:", ["expected hub:OWNER/NAME"]),
        ("hub:o/n:none", ["hub:o/n:none: holds no rows"]),
        ("hub:o/n:dev", ["hub:o/n:dev: cannot be loaded (KeyError: 'dev')"]),
    ],
)
def test_hub_source_that_cannot_be_read_is_refused(
    hub: list[tuple[Any, ...]], source: str, parts: list[str]
) -> None:
    with refused(*parts):
        read_table(source)
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
    path.write_text(f'text{other}label\n"A fine film"{other}good\n')
    with refused("reviews.csv:1", "one column", repr(other), "separate cells by ','"):
        read_table(path)


# -------------------------------------------------------- quotes that swallow rows, in silence


@pytest.mark.parametrize(
    ("name", "rows", "where"),
    [
        ("a.tsv", ['"Great\tgood', "Dull\tbad", "Cold\tbad", '"\tgood', "Warm\tgood"], "2 to 5"),
        ("a.tsv", ["Dull\tbad", '"Great\tgood', 'Cold"\tbad'], "3 to 4"),
        ("a.csv", ['good,"Great', "bad,Dull", "bad,Cold", 'good,so so"', "bad,Bad"], "2 to 5"),
        ("a.csv", ["bad,Dull", "good,Warm", 'good,"Great', 'bad,so so"'], "4 to 5"),
        ("a.csv", ["bad,Dull", 'good,"Great', "", "bad,Cold", 'good,so so"'], "3 to 6"),
        ("a.csv", ["sep=,", "label,text", 'good,"Great', "bad,Dull", 'bad,so so"'], "3 to 5"),
        ("a.csv", ['"good,Great', "bad,Dull", 'bad",so so', "bad,Cold"], "2 to 4"),
        ("a.csv", ['a,"2+2', "b,3", 'c,4"'], "2 to 4"),
        ("a.csv", ["bad,Dull", 'bad,"Great', "bad,Long, dull", 'bad,so so"', "bad,Bad"], "3 to 5"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quote_that_swallows_rows_is_refused_at_its_line(
    tmp_path: Path, name: str, rows: list[str], where: str, end: str
) -> None:
    header = [] if rows[0].startswith("sep") else ["text\tlabel" if "tsv" in name else "label,text"]
    content = end.join([*header, *rows, ""])
    with refused(f"{name}:{where.split()[0]}: a quote joins lines {where} into one row", "close"):
        read_table(put(tmp_path, name, content))


@pytest.mark.parametrize(
    "cells",
    [
        ["one\ntwo, well\nthree", "Dear sir,\n\nit was, in short, bad.\nYours"],
        ["Great, really\nfine", "Bad\nand, well, so"],
        ["a,b\nc,d\ne,f", "so\nso"],
        ["one\ntwo, well\nthree, too", "one, well\ntwo, too\nthree", "one\ntwo, well"],
    ],
)
@pytest.mark.parametrize("label_first", [True, False])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_texts_of_several_lines_are_read_where_their_lines_are_no_rows(
    tmp_path: Path, cells: list[str], label_first: bool, delimiter: str
) -> None:
    rows = [[cell, "good"] for cell in cells]
    rows += [[f"film {i}", ("good", "bad")[i % 2]] for i in range(8)]
    header = ["text", "label"]
    if label_first:
        header, rows = header[::-1], [row[::-1] for row in rows]
    name = "a.csv" if delimiter == "," else "a.tsv"
    table = read_table(put(tmp_path, name, separated(header, rows, delimiter)))
    assert [list(row.values()) for row in table.rows] == rows
    assert table.notes == ()


def test_two_lines_of_which_nothing_says_that_they_are_one_row_are_noted(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, "a.csv", 'q,a\n"What is 2, plus\n3",5\nWhat,6\n'))
    assert table.rows[0] == {"q": "What is 2, plus\n3", "a": "5"}
    (note,) = table.notes
    assert note.startswith("a.csv: in 1 row a quote joins lines that might")
    assert "line 2" in note


@pytest.mark.parametrize(
    ("header", "swallowed"),
    [
        ("id,text,label", ['1,"Great,good', '2,so, so",bad']),
        ("label,id,text", ['good,1,"so, so', 'bad,2,Dull"']),
        ("id,text,label", ['1,"well', "x,so,bad", 'it is",bad']),
    ],
)
def test_rows_that_a_quote_may_have_swallowed_with_others_are_noted(
    tmp_path: Path, header: str, swallowed: list[str]
) -> None:
    """The others have too many cells, or too few, to be rows by themselves."""
    plain = [{"id": f"{i}", "text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    lines = [",".join(row[name] for name in header.split(",")) for row in plain]
    table = read_table(put(tmp_path, "a.csv", "\n".join([header, *lines, *swallowed, ""])))
    (note,) = table.notes
    assert "might be rows by themselves (first: line 10)" in note


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "sep=|"])
def test_a_first_line_that_names_the_separator_is_read_as_excel_means_it(
    tmp_path: Path, first: str
) -> None:
    mark = first.strip('"')[-1]
    content = f"{first}\r\ntext{mark}label\r\nGood, really{mark}good\r\n"
    table = read_table(put(tmp_path, "a.csv", content))
    assert table.rows == [{"text": "Good, really", "label": "good"}]
    assert table.sources == ["a.csv:3"]


def test_blanks_around_column_names_are_left_out_with_a_note(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, "a.csv", "text, label \nfilm, x\n"))
    assert table.rows == [{"text": "film", "label": " x"}]
    assert table.notes == ("a.csv: left out the blanks around the column names ' label '.",)
    with refused("a.csv:1: column 'a' occurs twice"):
        read_table(put(tmp_path, "a.csv", "a, a\n1,2\n"))


def test_columns_without_a_name_are_counted(tmp_path: Path) -> None:
    table = read_table(put(tmp_path, "a.csv", " ,text,label\n0,a,x\n1,b,y\n"))
    assert table.columns == ("", "text", "label")
    assert table.notes == ("a.csv: column 1 has no name.",)
    with refused("b.csv:1: columns 2, 4 and 5 have no name", "one for each column"):
        read_table(put(tmp_path, "b.csv", "text,,label,,\na,b,c,d,e\n"))


# ------------------------------------------------------------------ columns that nobody asked for

ODD = {
    "far date": pa.array([0, 10**8], pa.int32()).cast(pa.date32()),
    "odd zone": pa.array([0, 1], pa.timestamp("us", tz="Mars/Olympus")),
    "no UTF-8": pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_value_that_python_cannot_hold_stops_only_who_asks_for_it(
    tmp_path: Path, odd: str
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"text": pa.array(["a", "b"]), "when": ODD[odd], "raw": pa.array([b"1", b"2"])}
    parquet.write_table(pa.table(columns), path)
    assert read_table(path, used=["text"]).rows == [{"text": "a"}, {"text": "b"}]
    unknown = read_table(path)
    assert unknown.columns == ("text", "raw")
    assert unknown.notes == ("a.parquet: column 'when' is left out, as it cannot be read.",)
    with refused("a.parquet:", "column 'when' holds what cannot be read ("):
        read_table(path, used=["text", "when"])


# --------------------------------------------------------------------- JSON arrays, chats, Python


def test_a_json_array_is_read_with_its_lines(tmp_path: Path) -> None:
    content = '\n[{"text": "a",\n  "label": 1},\n\n {"text": "b\\n]", "label": 0}]\n'
    table = read_table(put(tmp_path, "a.json", content))
    assert table.rows == [{"text": "a", "label": 1}, {"text": "b\n]", "label": 0}]
    assert table.sources == ["a.json:2", "a.json:5"]
    assert read_table(put(tmp_path, "b.json", jsonl(ROWS))).rows == ROWS
    assert read_table(put(tmp_path, "c.json", json.dumps(ROWS, indent=1))).rows == ROWS


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[]", ["holds no rows"]),
        ('[{"a": 1}, 2]', ["a.json:1: holds a int; expected an array of plain JSON objects"]),
        ('[{"a": 1}\n {"a": 2}]', ["a.json:1: the object is followed by no comma"]),
        ('[{"a": 1},\n {"a": }]', ["a.json:2: broken JSON at character 8"]),
        ('[{"a": 1},\n]', ["a.json:2: broken JSON"]),
        ('[{"a": 1}', ["followed by no comma or ]"]),
        ('[{"a": 1}] {}', ["a.json:1: the array ends, but not the file"]),
        ('{"data": [\n1]}', ["a.json:1: broken JSON", "an array of plain JSON objects"]),
        ('[{"a": 1, "a": 2}]', ["key 'a' occurs twice"]),
    ],
)
def test_a_broken_json_array_is_refused(tmp_path: Path, content: str, parts: list[str]) -> None:
    with refused(*parts):
        read_table(put(tmp_path, "a.json", content))


def chat(*turns: tuple[str, object]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_chat_messages_become_columns(tmp_path: Path) -> None:
    rows = [
        chat(("system", "Be brief."), ("user", "Good film?"), ("assistant", "yes")),
        chat(
            ("developer", "Be kind."),
            ("user", "Hi"),
            ("assistant", "Hello."),
            ("user", [{"type": "text", "text": "Good "}, {"type": "text", "text": "meal?"}]),
            ("assistant", "no"),
        ),
    ]
    table = read_table(put(tmp_path, "a.jsonl", jsonl(rows)))
    assert table.columns == ("text", "answer", "system", "history", "messages")
    found = [{k: v for k, v in row.items() if k != "messages"} for row in table.rows]
    assert found == [
        {"text": "Good film?", "answer": "yes", "system": "Be brief."},
        {
            "text": "Good meal?",
            "answer": "no",
            "system": "Be kind.",
            "history": "user: Hi\n\nassistant: Hello.",
        },
    ]
    assert "1 of 2 chats have earlier turns" in table.notes[0]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([rows[0]]), path)
    assert read_table(path, used=["text", "answer"]).rows[0]["text"] == "Good film?"
    assert read_table(path, used=["other"]).columns == ("messages",)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (chat(("user", "a")), "at the end, the assistant's answer"),
        (chat(("assistant", "a")), "expected one of the user"),
        (chat(("user", "a"), ("assistant", None)), "of role 'assistant' holds other than text"),
        (chat(("user", [{"type": "image_url"}]), ("assistant", "a")), "of role 'user'"),
        (
            {"messages": [*chat(("user", "a"))["messages"], CALL]},
            "of role 'assistant' holds other than text (a call of a tool",
        ),
        ({"messages": "a"}, "expected a list of messages"),
    ],
)
def test_a_chat_without_an_answer_is_refused(
    tmp_path: Path, row: dict[str, Any], part: str
) -> None:
    good = chat(("user", "a"), ("assistant", "b"))
    path = put(tmp_path, "a.jsonl", jsonl([good, row]))
    with refused("a.jsonl:2: messages", part):
        read_table(path, used=["text", "answer"])
    assert len(read_table(path, used=["messages"]).rows) == 2  # who asks for no chat gets none


def test_a_pandas_data_frame_is_read() -> None:
    frame = pandas.DataFrame(
        {
            "text": ["a", None],
            "label": pandas.Categorical(["x", "y"]),
            "stars": [5, 3],
            "score": [1.5, float("nan")],
            "when": pandas.to_datetime(["2024-01-02", None]),
            "odd": [{("a", 1): 2}, None],  # no column of text
        },
        index=[7, 7],
    )
    table = read_table(frame)
    assert table.sources == ["DataFrame:1", "DataFrame:2"]
    assert table.rows[1] == {"text": None, "label": "y", "stars": 3, "score": None, "when": None,
                             "odd": None}  # fmt: skip
    assert [type(cell) for cell in table.rows[0].values()][:4] == [str, str, int, float]
    with refused("pandas.Series: cannot be read", "DataFrame"):
        read_table(frame["text"])


def test_chats_in_a_data_frame_are_read(tmp_path: Path) -> None:
    rows = [chat(("user", "Good film?"), ("assistant", "yes"))]
    frame = pandas.DataFrame(rows)
    assert read_table(frame).rows[0]["answer"] == "yes"
    frame.to_parquet(tmp_path / "a.parquet")
    arrays = pandas.read_parquet(tmp_path / "a.parquet")  # lists come back as arrays
    assert read_table(arrays).rows[0]["answer"] == "yes"


def test_a_dataset_in_python_is_read_with_the_names_of_its_classes() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_list(ROWS, features=features)
    table = read_table(data.select([2, 0]))
    assert table.rows == [ROWS[2], ROWS[0]]
    assert table.class_names == {"label": ("no", "yes")}
    with refused("name one of its splits"):
        read_table(datasets.DatasetDict(train=data))


def test_a_parquet_file_of_the_hub_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").class_names == {"label": ("no", "yes")}
