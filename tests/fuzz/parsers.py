"""Everything that reads files of strangers, each with files that it can read."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import made_runs
import tiny
from embedgrad import DataError, EmbedgradError, Recipe, compare, export, load_model, quiet, run
from embedgrad.atomic_files import SEAL, seal
from embedgrad.data.bounded_reads import parse_json
from embedgrad.data.guess_columns import guess_columns
from embedgrad.data.readers import read_table
from embedgrad.deploy.folder import check_files, read_export
from embedgrad.deploy.formats.gguf_file import read_contents
from embedgrad.deploy.serve.describe import describe
from embedgrad.experiments.compare.folder import Folder
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.loading.gguf_header import read_header
from embedgrad.prompt import artifact
from embedgrad.prompt.template import Renderer, Template
from embedgrad.report.page.page import comparison_page, run_page
from embedgrad.report.page.run_files import compared_rows, read_comparison, read_run
from embedgrad.training import checkpoint
from fuzz.mutations import Files
from kit import DAY
from run_kit import ROWS, save_model, values, write_jsonl
from tiny_gguf import write_gguf

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Parser:
    """`read` gets a folder with the files; `sign` mends the digests in changed ones."""

    seeds: Callable[[], list[Files]]
    read: Callable[[Path], object]
    sign: Callable[[Files], Files] = dict


def files_of(folder: Path, *patterns: str) -> Files:
    paths = sorted(p for pattern in patterns or ("**/*",) for p in folder.glob(pattern))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if p.is_file()}


@functools.cache
def _home() -> Path:
    """A folder with a tiny model, data and a run and its checkpoint."""
    home = Path(tempfile.mkdtemp(prefix="embedgrad-fuzz-"))
    texts = {example.columns["review"]: dict(example.columns) for example in tiny.reviews(120)}
    rows = list(texts.values())
    for split, count in ROWS.items():
        write_jsonl(home / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    recipe = Recipe.from_dict(values(save_model(home / "model"), home))
    run(recipe, home / "run", quiet)

    def keep(event: dict[str, Any]) -> None:
        if (home / "other" / "checkpoint").is_dir() and not (home / "checkpoint").exists():
            shutil.copytree(home / "other" / "checkpoint", home / "checkpoint")

    run(recipe, home / "other", keep)
    return home


def clean_up() -> None:
    if _home.cache_info().currsize:
        shutil.rmtree(_home(), ignore_errors=True)
        _home.cache_clear()


# ------------------------------------------------------------------------------------ artifact


@functools.cache
def _model() -> Any:
    return load_model(str(_home() / "model"), device="cpu")


def read_artifact(folder: Path) -> None:
    model = _model()
    fit_to_model(artifact.load(folder), model.info, model.embed)


def sign_artifact(files: Files) -> Files:
    try:
        described = json.loads(files["prompt.json"])
        rows = files["prompt.safetensors"]
        described["rows"]["sha256"] = hashlib.sha256(rows).hexdigest()
        described.pop(SEAL, None)
        sealed = json.dumps(seal(described, rows))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return files
    return {**files, "prompt.json": sealed.encode()}


# ------------------------------------------------------------------------------------ template

CHATS = (tiny.CHATML, tiny.TRIMMING, tiny.PLAIN, tiny.DATED)


def template_seeds() -> list[Files]:
    templates = (
        Template.chat(system="Be kind. [[Is it good?]] Be brief.", user="{a} and {b}"),
        Template.chat(user="A: {a} B: {b}", assistant="So: [[Is it good?]] It is"),
        Template.plain("Text: {a}\n[[Is it good?]] {b}"),
    )
    columns = json.dumps({"a": "one", "b": "two\n"}).encode()
    return [
        {
            "template.json": json.dumps(template.as_dict()).encode(),
            "columns.json": columns,
            "chat": chat.encode(),
        }
        for template in templates
        for chat in CHATS
    ]


@functools.cache
def _tokenizer() -> Any:
    return tiny.tokenizer("metaspace")


def read_template(folder: Path) -> None:
    """The chat template is a stranger's; the prompt's is checked with the rest of an artifact."""
    try:
        columns = parse_json((folder / "columns.json").read_bytes())
        template = Template.from_dict(parse_json((folder / "template.json").read_bytes()))
        chat = (folder / "chat").read_bytes().decode()
        texts = {name: value for name, value in columns.items() if isinstance(value, str)}
    except (EmbedgradError, OSError, ValueError, TypeError, LookupError, AttributeError):
        return
    Renderer(template, tiny.with_template(_tokenizer(), chat), date=DAY)(texts)


# ---------------------------------------------------------------------------------------- data


def table_seeds() -> list[Files]:
    rows = [dict(example.columns) | {"n": i} for i, example in enumerate(tiny.reviews(6))]
    rows[1]["review"] = 'He said "no, thanks",\nand left'
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    table = pyarrow.Table.from_pylist(rows)
    packed = [io.BytesIO() for _ in range(3)]
    for buffer, form in zip(packed, ("none", "snappy", "zstd"), strict=True):
        pyarrow.parquet.write_table(table, buffer, compression=form, row_group_size=4)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    chat = {"messages": messages}
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    separated = text.getvalue().encode()
    return [
        *({"rows.csv": content} for content in (separated, b"sep=;\r\na;b\r\n1;2\r\n")),
        {"rows.tsv": separated.replace(b",", b"\t")},
        {"rows.jsonl": lines.encode()},
        {"rows.json": json.dumps(rows).encode()},
        {"chat.jsonl": json.dumps(chat).encode()},
        *({"rows.parquet": buffer.getvalue()} for buffer in packed),
    ]


def read_rows(folder: Path) -> None:
    for path in folder.iterdir():
        table = read_table(path)
        with suppress(DataError):  # of which no columns can be guessed
            guess_columns(table)


# ------------------------------------------------------------------------- runs and comparisons


def run_seeds() -> list[Files]:
    folder = Path(tempfile.mkdtemp())
    try:
        made_runs.made_run(folder / "made", made_runs.answered_rows(6))
        free = made_runs.answered_rows(4, free=True, texts=list(made_runs.HOSTILE.values()))
        made_runs.made_run(folder / "free", free)
        kept = ("*.json*", "recipe.toml", "prompt/prompt.json")
        return [
            *(files_of(folder / name, *kept) for name in ("made", "free")),
            files_of(_home() / "run", *kept),
        ]
    finally:
        shutil.rmtree(folder)


def read_page(folder: Path) -> None:
    files = read_run(folder)
    if _draws(folder):
        run_page(files, "run", [], {})


def _draws(folder: Path) -> bool:
    """One case in 200, as a page with its figures takes a tenth of a second."""
    content = b"".join(files_of(folder).values())
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") % 200 == 0


def comparison_seeds() -> list[Files]:
    folder = Path(tempfile.mkdtemp())
    try:
        return [files_of(made_runs.made_comparison(folder))]
    finally:
        shutil.rmtree(folder)


def read_results(folder: Path) -> None:
    results = read_comparison(folder)
    if results is not None:
        rows = compared_rows(folder, [])
        if _draws(folder):
            comparison_page(results, "results", rows, [])


def read_parts(folder: Path) -> None:
    parts = Folder(folder)
    for part in parts.finished_parts():
        parts.training(part)
        parts.scores(part)
        parts.scored_answers(part, len(parts.answers(part)))
        parts.partial_answers(part)
    _ = parts.shared


# --------------------------------------------------------------------------------------- export


def read_exported(folder: Path) -> None:
    entries = read_export(folder)
    check_files(folder, entries)
    describe(folder, entries, limits=True)


# ------------------------------------------------------------------------------------------ GGUF


def gguf_seeds() -> list[Files]:
    folder = Path(tempfile.mkdtemp())
    try:
        write_gguf(folder / "tiny.gguf")
        return [files_of(folder)]
    finally:
        shutil.rmtree(folder)


def read_gguf(folder: Path) -> None:
    for path in folder.iterdir():
        read_header(path)
        read_contents(path)


def recipe_seeds() -> list[Files]:
    texts = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.toml"))]
    texts.append((_home() / "run" / "recipe.toml").read_bytes())
    settings = b'training.epochs=2\nevaluation.max_new_tokens=9\nmodel={name="x"}\n'
    return [{"recipe.toml": text, "settings": settings} for text in texts]


def read_recipe(folder: Path) -> None:
    path = folder / "settings"
    settings = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    Recipe.read(folder / "recipe.toml", settings.splitlines()).as_toml()


def part_seeds() -> list[Files]:
    out = _home() / "comparison"
    recipe = Recipe.from_dict(
        values(_home() / "model", _home(), compare={"methods": ["text", "no-template"]})
    )
    compare(recipe, out, report=quiet)
    return [files_of(out, "recipe.toml", "work/**/*")]


def export_seeds() -> list[Files]:
    out = _home() / "export"
    export([_home() / "run"], "safetensors", out, report=quiet)
    return [files_of(out)]


def checkpoint_seeds() -> list[Files]:
    return [files_of(max((_home() / "checkpoint").glob("step-*")))]


def sign_checkpoint(files: Files) -> Files:
    try:
        described = json.loads(files[checkpoint.VALUES])
        described.pop(SEAL, None)
        sealed = json.dumps(seal(described, files[checkpoint.TENSORS]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return files
    return {**files, checkpoint.VALUES: sealed.encode()}


PARSERS = {
    "artifact": Parser(
        lambda: [files_of(_home() / "run" / "prompt")], read_artifact, sign_artifact
    ),
    "checkpoint": Parser(checkpoint_seeds, checkpoint.Checkpoint.load, sign_checkpoint),
    "recipe": Parser(recipe_seeds, read_recipe),
    "template": Parser(template_seeds, read_template),
    "table": Parser(table_seeds, read_rows),
    "run": Parser(run_seeds, read_page),
    "results": Parser(comparison_seeds, read_results),
    "parts": Parser(part_seeds, read_parts),
    "export": Parser(export_seeds, read_exported),
    "gguf": Parser(gguf_seeds, read_gguf),
}
