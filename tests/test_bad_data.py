"""Data that cannot be used: one line that says where and what, and nothing is left behind."""

from __future__ import annotations

import pytest

from bad_kit import Case, Place, check
from run_kit import ROWS, Command, write_jsonl

pytest_plugins = ["tiny_runs"]

HEADER = b"review,label\n"


def repeat(place: Place, split: str, row: int) -> list[object]:
    """The row of another split stands in train too, in other letters."""
    review = place.rows(split)[row]["review"].upper() + " "
    return place.train(lambda i, r: {**r, "review": review} if i == 4 else r).optimize()


def grouped(place: Place) -> list[object]:
    for split in ROWS:
        rows = [{**row, "g": f"{split} {i}"} for i, row in enumerate(place.rows(split))]
        rows[2]["g"] = "the same"
        write_jsonl(place.folder / "data" / f"{split}.jsonl", rows)
    return place.optimize("data.group=g")


DATA: dict[str, Case] = {
    "missing file": (
        lambda p: p.optimize(f"data.train={p.folder}/data/trian.jsonl"),
        ("trian.jsonl: no such file", "did you mean 'train.jsonl'"),
    ),
    "missing folder": (lambda p: p.optimize("data.dev=no/dev.csv"), ("no folder 'no'",)),
    "folder": (lambda p: p.optimize(f"data.test={p.folder}/data"), ("is a folder", "train.jsonl")),
    "empty file": (lambda p: p.optimize(p.data("a.csv", b"")), ("a.csv: the file is empty",)),
    "header only": (lambda p: p.optimize(p.data("a.csv", HEADER)), ("a.csv: holds no rows",)),
    "unknown kind": (lambda p: p.optimize(p.data("a.xls", b"x")), ("'.xls'", ".jsonl, .ndjson")),
    "broken JSON": (
        lambda p: p.optimize(p.data("a.jsonl", b'{"review": "a"}\n\n{"review": "b"\n')),
        ("a.jsonl:3: broken JSON at character",),
    ),
    "no object": (lambda p: p.optimize(p.data("a.jsonl", b"[1]\n")), ("a.jsonl:1: holds a list",)),
    "not UTF-8": (lambda p: p.optimize(p.data("a.csv", HEADER + b"\xff,a\n")), ("a.csv:2: byte",)),
    "broken quotes": (
        lambda p: p.optimize(p.data("a.csv", HEADER + b'"a"b,c\n')),
        ("a.csv:2: broken quoting",),
    ),
    "too many cells": (
        lambda p: p.optimize(p.data("a.csv", HEADER + b"a,b,c\n")),
        ("a.csv:2: found 3 cells, expected 2",),
    ),
    "missing column": (
        lambda p: p.optimize(template={"user": "{reveiw} [[Good?]]"}),
        ("train.jsonl: no column 'reveiw', which template names; did you mean 'review'?",),
    ),
    "missing answer column": (
        lambda p: p.optimize("data.answer=lable"),
        ("train.jsonl: no column 'lable', which answer names; did you mean 'label'?",),
    ),
    "missing group column": (
        lambda p: p.optimize("data.group=author"),
        ("no column 'author', which group names",),
    ),
    "empty cell": (
        lambda p: p.train(lambda i, r: {**r, "review": " "} if i == 5 else r).optimize(),
        ("train.jsonl:6: column 'review' is empty",),
    ),
    "unknown label": (
        lambda p: p.train(lambda i, r: {**r, "label": "meh"} if i == 3 else r).optimize(),
        ("train.jsonl:4: label 'meh'", "not among the choices 'negative', 'positive'"),
    ),
    "single class": (
        lambda p: p.train(lambda i, r: {**r, "label": "negative"}).optimize(),
        ("data.train: all 24 rows have the answer 'negative'", "at least two of the choices"),
    ),
    "nothing kept": (
        lambda p: p.optimize('data.where={label="neutral"}'),
        ("none of 24 rows has label = 'neutral'", "label holds"),
    ),
    "too long": (
        lambda p: p.train(lambda i, r: {**r, "review": "word " * 900} if i == 7 else r).optimize(),
        ("train.jsonl:8: ", " tokens, but the model takes 512", "data.truncate"),
    ),
    "too long without it": (
        lambda p: p.optimize(
            "data.truncate=review", template={"user": "{review} " + "word " * 900 + "[[Good?]]"}
        ),
        ("does not fit into the model's 512 tokens even without column 'review'",),
    ),
    "duplicates": (
        lambda p: repeat(p, "test", 1),
        ("data: 1 row repeats the text", "train.jsonl:5", "test.jsonl:2", "allow_duplicates"),
    ),
    "group in two splits": (grouped, ("group 'the same' is in train", "train.jsonl:3")),
    "nothing to carve": (
        lambda p: p.optimize(
            "data.dev=", p.data("a.csv", HEADER + b"a,negative\nb,positive\n"), "data.dev_share=0.1"
        ),
        ("data.dev: would be empty", "give more rows or a larger share"),
    ),
    "Hub name": (
        lambda p: p.optimize("data.train=hub:nameless"),
        ("hub:nameless: is not a Hub data set; expected hub:OWNER/NAME[@CONFIG][:SPLIT]",),
    ),
}


@pytest.mark.parametrize("case", DATA.values(), ids=DATA)
def test_bad_data(case: Case, place: Place, embedgrad: Command) -> None:
    check(embedgrad, place, case)
