"""`embedgrad generate`: answers to queries, by both prompts, with probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from run_kit import CHOICES, Command, values

pytest_plugins = ["tiny_runs"]

Finished = tuple[Path, dict[str, Any]]


def replies(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def predictions(run: Path) -> list[dict[str, Any]]:
    return replies((run / "predictions.jsonl").read_text("utf-8"))


def test_a_query_is_answered_with_the_chances_of_every_choice(
    embedgrad: Command, finished: Finished
) -> None:
    query = "The film was great."
    found = embedgrad("generate", finished[0], query, "--json").json
    assert found["columns"] == {"review": query}
    assert list(found["probabilities"]) == CHOICES
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert found["answer"] == max(CHOICES, key=found["probabilities"].__getitem__)
    text = embedgrad("generate", finished[0], query).out
    listed = ", ".join(f"{name} {p:.3f}" for name, p in found["probabilities"].items())
    assert text == f"{found['answer']}  ({listed})\n"


@pytest.mark.parametrize(("prompt", "flags"), [("refined", []), ("text", ["--text-prompt"])])
def test_the_chances_are_those_of_the_evaluation(
    prompt: str, flags: list[str], embedgrad: Command, finished: Finished
) -> None:
    rows = predictions(finished[0])
    queries = "".join(f"{json.dumps({'review': row['columns']['review']})}\n" for row in rows)
    done = embedgrad("generate", finished[0], *flags, stdin=queries)
    assert done.code == 0
    found = replies(done.out)
    assert [reply["columns"]["review"] for reply in found] == [
        row["columns"]["review"] for row in rows
    ]
    for row, reply in zip(rows, found, strict=True):
        assert reply["answer"] == row[prompt]["predicted"]
        assert reply["probabilities"] == pytest.approx(row[prompt]["probabilities"], abs=1e-6)


def test_both_prompts_answer_differently(embedgrad: Command, finished: Finished) -> None:
    refined = embedgrad("generate", finished[0], "Great.", "--json").json
    text = embedgrad("generate", finished[0], "Great.", "--json", "--text-prompt").json
    assert refined["probabilities"] != text["probabilities"]


def test_lines_may_be_objects_or_texts_and_keep_their_other_columns(
    embedgrad: Command, finished: Finished
) -> None:
    stdin = '\ufeff{"review": "One.", "id": 7}\n\n"Two."\r\n{"review": "Three \\u2028."}'
    found = replies(embedgrad("generate", finished[0], stdin=stdin).out)
    assert [reply["columns"] for reply in found] == [
        {"review": "One.", "id": "7"},
        {"review": "Two."},
        {"review": "Three \u2028."},
    ]


def test_no_lines_are_no_answers(embedgrad: Command, finished: Finished) -> None:
    done = embedgrad("generate", finished[0], "--quiet", stdin="\n")
    assert (done.code, done.out, done.err) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "standard input:3: is not JSON"),
        (b"\xff", "standard input:3: is not JSON"),
        (b"[" * 100_000, "standard input:3: is not JSON"),
        (b"[1]", "standard input:3: expected a JSON object with review"),
        (b"3", "standard input:3: expected a JSON object with review"),
        (b'{"reveiw": "x"}', "standard input:3: no column 'review'; did you mean 'reveiw'?"),
        (b'{"review": null}', "standard input:3: column 'review' holds no text"),
        (b'{"review": " "}', "standard input:3: column 'review' holds no text"),
        (b'{"review": ["x"]}', "standard input:3: column 'review' holds no text"),
        (b'""', "standard input:3: column 'review' holds no text"),
        (b'{"review": "\\ud800"}', "standard input:3: column 'review' is not UTF-8 text"),
        (b'"' + b"word " * 2000 + b'"', "standard input:3: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_line_is_told_after_the_answers_before_it(
    line: bytes, told: str, embedgrad: Command, finished: Finished
) -> None:
    stdin = b'"One."\n"Two."\n' + line + b'\n"Four."\n'
    done = embedgrad("generate", finished[0], "--quiet", stdin=stdin)
    assert done.code == 2
    assert [reply["columns"]["review"] for reply in replies(done.out)] == ["One.", "Two."]
    assert len(done.lines) == 1
    assert done.err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("", "error: the query: column 'review' holds no text; expected some"),
        ("\udcff", "error: the query: column 'review' is not UTF-8 text"),
    ],
)
def test_a_bad_query_is_told(query: str, told: str, embedgrad: Command, finished: Finished) -> None:
    done = embedgrad("generate", finished[0], query, "--quiet")
    assert (done.code, done.out, done.err) == (2, "", f"{told}\n")


def test_a_terminal_without_a_query_is_told(embedgrad: Command, finished: Finished) -> None:
    done = embedgrad("generate", finished[0], "--quiet", stdin=None)
    assert done.code == 2
    assert done.lines == [
        "error: generate: no query; give one as an argument, or JSON lines on standard input"
    ]


def test_a_template_with_several_columns_takes_lines_only(
    embedgrad: Command, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    from embedgrad import Recipe, run

    template = {"user": "{label}: {review} [[Good or bad?]]"}
    recipe = Recipe.from_dict(values(model_folder, data, template=template, training={"steps": 1}))
    run(recipe, tmp_path / "run")
    done = embedgrad("generate", tmp_path / "run", "A query.", "--quiet")
    assert done.code == 2
    assert "the template has 2 columns (label, review); give JSON lines" in done.err
    line = '{"label": "a", "review": "b"}'
    assert embedgrad("generate", tmp_path / "run", stdin=line).code == 0


def test_free_answers_are_text_that_cannot_drive_a_terminal(
    embedgrad: Command, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = embedgrad("generate", generated, "What is 1 plus 1?", "--json").json
    assert found.keys() == {"answer", "columns", "cut"}
    for cut, mark in ((False, ""), (True, " [cut]")):
        reply = SimpleNamespace(text="one\x1b[2J\ntwo\r", ended=not cut)
        monkeypatch.setattr("embedgrad.inference.answer.generate", lambda *a, r=reply, **k: [[r]])
        done = embedgrad("generate", generated, "What is 1 plus 1?")
        assert done.out == f"one\\x1b[2J\ntwo\\r{mark}\n"


def test_a_query_that_was_cut_is_told(embedgrad: Command, finished: Finished) -> None:
    long = " ".join(["word"] * 2000)
    done = embedgrad(
        "generate", finished[0], long, "--quiet", "--set", "data.truncate=review", "--json"
    )
    assert done.code == 0
    assert done.json["columns"]["review"] == long
    assert done.lines == ["column 'review' was cut in 1 row that did not fit"]
