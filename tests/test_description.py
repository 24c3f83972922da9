"""`prompt.json` is checked before it is used: damage and other versions are refused in one line."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import refusals
from embedgrad.errors import ArtifactError
from embedgrad.prompt.artifact import load, save
from embedgrad.prompt.embedding import PromptEmbedding
from kit import DAY, Kit, kit, noisy

refused = functools.partial(refusals.refused, error=ArtifactError)
JSON = "prompt.json"
HUGE = "1" + "0" * 400


@pytest.fixture(scope="module")
def made() -> Kit:
    return kit(dtype=torch.float32, template="plain-start")


@pytest.fixture
def folder(made: Kit, tmp_path: Path) -> Path:
    prompt = PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=made.sequencer.target,
        spans=made.sequencer.spans,
        date=DAY,
        start_rows=made.start,
        rows=noisy(made.start),
        provenance={"model": {"name": "m"}, "licence": "MIT"},
    )
    return save(prompt, tmp_path / "prompt")


def values_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / JSON).read_text())
    return values


def test_truncated_at_any_length_it_is_refused(folder: Path) -> None:
    content = (folder / JSON).read_bytes()
    for length in range(0, len(content) - 1, 7):
        (folder / JSON).write_bytes(content[:length])
        with refused(JSON):
            load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"null",
        b"[]",
        b"7",
        b'"embedgrad-prompt"',
        b"{",
        b'{"format": "embedgrad-prompt"',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": ' + HUGE.encode() * 12 + b"}",
        b"\x80\x04\x95pickle",
    ],
    ids=range(13),
)
def test_what_is_no_description_is_refused(folder: Path, content: bytes) -> None:
    (folder / JSON).write_bytes(content)
    with refused(JSON):
        load(folder)


@pytest.mark.parametrize("name", ["rows", "format", "spans", "template"])
def test_a_key_that_is_given_twice_is_refused(folder: Path, name: str) -> None:
    text = (folder / JSON).read_text()
    again = json.dumps(values_of(folder)[name])
    (folder / JSON).write_text(text.rstrip().removesuffix("}") + f', "{name}": {again}}}')
    with refused(JSON, "twice", name):
        load(folder)


@pytest.mark.parametrize("version", [0, 1, 3, "1", None, 2.5])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    (folder / JSON).write_text(json.dumps({**values_of(folder), "version": version}))
    parts = ["not written by this embedgrad", "install the version that wrote it"]
    if version in (0, 1):
        parts = ["written by an older embedgrad", "refine the prompt again"]
    with refused(JSON, f"version {version!r}", "reads 2", *parts):
        load(folder)


@pytest.mark.parametrize("kind", ["peft", "", None, 1, ["embedgrad-prompt"]])
def test_another_format_is_refused(folder: Path, kind: object) -> None:
    (folder / JSON).write_text(json.dumps({**values_of(folder), "format": kind}))
    with refused(JSON, "not a saved prompt"):
        load(folder)


NEEDED = ("spans", "template", "date", "target", "rows", "trust_region")
OF_SPANS = ("text", "token_ids", "tokens", "drawn_in", "drift", "cosine")


def place_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Where an entry of this name is."""
    found: dict[str, Any] = values["spans"][0] if name in OF_SPANS else values
    return found


@pytest.mark.parametrize("name", [*NEEDED, *OF_SPANS])
def test_what_is_missing_is_named(folder: Path, name: str) -> None:
    values = values_of(folder)
    del place_of(values, name)[name]
    (folder / JSON).write_text(json.dumps(values))
    with refused(JSON, name):
        load(folder)


@pytest.mark.parametrize(
    "value", ["null", "7", '"x"', "[]", "{}", "[null]", '[["x"]]', "NaN", "-1e999", "true"]
)
@pytest.mark.parametrize("name", [*NEEDED, *OF_SPANS])
def test_what_is_of_the_wrong_kind_is_refused(folder: Path, name: str, value: str) -> None:
    values = values_of(folder)
    place_of(values, name)[name] = "HERE"
    (folder / JSON).write_text(json.dumps(values).replace('"HERE"', value))
    with refused("prompt."):
        load(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("rows", "width", "Infinity"),
        ("rows", "width", '"thirty-two"'),
        ("rows", "sha256", "7"),
        ("trust_region", "radius", '"far"'),
        ("trust_region", "radius", "NaN"),
        ("trust_region", "radius", "-1"),
        ("trust_region", "speed", "1"),
        ("target", "choices", '"ab"'),
        ("target", "choices", "[1, 2]"),
        ("target", "choices", '["a", "a"]'),
        ("target", "answer_prefix", "7"),
        ("target", "normalize", '"yes"'),
        ("target", "more", "1"),
        ("template", "text", '"no span"'),
        ("template", "text", "7"),
        ("template", "text", '"[[Is it other words?]] {review}"'),
    ],
)
def test_an_entry_of_the_wrong_kind_is_refused(
    folder: Path, name: str, key: str, value: str
) -> None:
    values = values_of(folder)
    values[name][key] = "HERE"
    (folder / JSON).write_text(json.dumps(values).replace('"HERE"', value))
    with refused("prompt."):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", "[Infinity, 1, 2, 3, 4, 5]"),
        ("token_ids", f"[{HUGE}, 1, 2, 3, 4, 5]"),
        ("token_ids", "[-1, 1, 2, 3, 4, 5]"),
        ("token_ids", '["1", "1", "1", "1", "1", "1"]'),
        ("token_ids", "[1.5, 1, 1, 1, 1, 1]"),
        ("tokens", '["a"]'),
        ("tokens", "[1, 2, 3, 4, 5, 6]"),
        ("drawn_in", '["", 7]'),
        ("drawn_in", '["", "other"]'),
        ("cosine", "[1.0]"),
        ("date", '"12 March"'),
        ("text", '"other words"'),
    ],
)
def test_a_span_that_cannot_be_is_refused(folder: Path, name: str, value: str) -> None:
    values = values_of(folder)
    assert len(values["spans"][0]["token_ids"]) == 6
    place_of(values, name)[name] = "HERE"
    (folder / JSON).write_text(json.dumps(values).replace('"HERE"', value))
    with refused(JSON):
        load(folder)


def test_another_number_of_spans_is_refused(folder: Path) -> None:
    values = values_of(folder)
    for spans in ([], values["spans"] * 2):
        (folder / JSON).write_text(json.dumps({**values, "spans": spans}))
        with refused(JSON, f"{len(spans)} spans, but 1 in template"):
            load(folder)
