"""A saved prompt comes back bit for bit, or is refused in one line that says why."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import refusals
import tiny
from embedgrad.errors import ArtifactError
from embedgrad.model.compatibility import fit_to_model
from embedgrad.prompt.artifact import load, save
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Template
from embedgrad.prompt.trust_region import TrustRegion
from kit import DAY, LABELS, PLACEMENTS, Kit, kit, noisy, reseal

refused = functools.partial(refusals.refused, error=ArtifactError)
ROWS, JSON = "prompt.safetensors", "prompt.json"
OPTIONS = Template.chat(user="[[Is it\ngood?]] {review}", options={"enable_thinking": False})


def prompt_of(made: Kit, seed: int = 0, **changes: Any) -> PromptEmbedding:
    values: dict[str, Any] = {
        "template": made.sequencer.renderer.template,
        "target": made.sequencer.target,
        "spans": made.sequencer.spans,
        "date": DAY,
        "start_rows": made.start,
        "rows": noisy(made.start, 0.2, seed=seed),
        "provenance": {
            "model": {
                "name": made.loaded.info.name,
                "revision": None,
                "embedding_digest": made.loaded.info.embedding_digest,
            }
        },
    }
    return PromptEmbedding(**{**values, **changes})


@pytest.fixture(scope="module")
def made() -> Kit:
    return kit(dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(made: Kit) -> PromptEmbedding:
    return prompt_of(made)


@pytest.fixture
def folder(prompt: PromptEmbedding, tmp_path: Path) -> Path:
    return save(prompt, tmp_path / "prompt")


def assert_same(found: PromptEmbedding, expected: PromptEmbedding) -> None:
    assert torch.equal(found.rows, expected.rows)
    assert torch.allclose(found.start_rows, expected.start_rows, rtol=1e-3, atol=1e-4)
    for name in ("template", "target", "spans", "date", "trust_region", "provenance"):
        assert getattr(found, name) == getattr(expected, name)


def rewrite(folder: Path, content: bytes | dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Change the files so that their digests agree again; `changes` are dotted entries."""
    if isinstance(content, dict):
        content = safetensors.torch.save(content)
    if content is not None:
        (folder / ROWS).write_bytes(content)
    values = json.loads((folder / JSON).read_text())
    values["rows"]["sha256"] = hashlib.sha256((folder / ROWS).read_bytes()).hexdigest()
    for name, value in changes.items():
        place = values
        *path, last = name.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    (folder / JSON).write_text(json.dumps(values))
    reseal(folder)


# -------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("template", [*PLACEMENTS, OPTIONS])
@pytest.mark.parametrize(
    "target",
    [
        LABELS,
        Target(answer_prefix="\n", normalize=True, end=False),
        Target(choices=("a", "\u00e9")),
    ],
)
def test_a_prompt_comes_back(template: str | Template, target: Target, tmp_path: Path) -> None:
    chat = tiny.CHATML + ("{% if enable_thinking %}{% endif %}" if template is OPTIONS else "")
    made = kit(dtype=torch.float32, chat=chat, template=template, rows=2)
    prompt = prompt_of(made, target=target, trust_region=TrustRegion(None, 0.97))
    prompt = prompt.with_provenance(scores={"text": 0.5, "why": "\u201cso\u201d\n"}, data=[1, None])
    assert_same(load(save(prompt, tmp_path / "a" / "b")), prompt)
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {ROWS, JSON}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_again_replaces(folder: Path, made: Kit) -> None:
    other = prompt_of(made, seed=5)
    save(other, folder)
    assert_same(load(folder), other)
    assert [path.name for path in folder.parent.iterdir()] == ["prompt"]


def test_the_description_can_be_read_by_people_and_machines(
    folder: Path, prompt: PromptEmbedding
) -> None:
    values = json.loads((folder / JSON).read_text(encoding="utf-8"))
    (span,) = values["spans"]
    assert span["text"] == "Is it positive or negative?"
    assert span["token_ids"] == list(prompt.span.ids)
    assert (values["rows"]["count"], values["rows"]["width"]) == tuple(prompt.rows.shape)
    assert values["rows"]["space"] == "inputs_embeds"
    assert span["drift"] == pytest.approx([0.2] * len(prompt.rows), abs=1e-4)
    assert min(span["cosine"]) > 0.97
    assert values["date"] == "2024-03-12"


def test_a_run_folder_stands_for_its_prompt(folder: Path, prompt: PromptEmbedding) -> None:
    assert_same(load(folder.parent), prompt)
    assert_same(load(str(folder)), prompt)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["rows", "start_rows"])
def test_rows_that_are_not_finite_are_not_saved(
    prompt: PromptEmbedding, folder: Path, name: str, number: float
) -> None:
    bad = prompt.rows.clone()
    bad[1, 2] = number
    with refused(name, "not finite", "nothing was written"):
        save(PromptEmbedding(**{**_fields(prompt), name: bad}), folder)
    assert_same(load(folder), prompt)


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}])
def test_provenance_that_json_cannot_hold_is_refused(
    prompt: PromptEmbedding, folder: Path, value: object
) -> None:
    with refused("provenance"):
        save(prompt.with_provenance(score=value), folder)
    assert_same(load(folder), prompt)


def _fields(prompt: PromptEmbedding) -> dict[str, Any]:
    return {name: getattr(prompt, name) for name in PromptEmbedding.__dataclass_fields__}


# ----------------------------------------------------------------------------------- damaged rows


@pytest.mark.parametrize("name", [ROWS, JSON])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with refused(name, "cannot be read", "expected the folder of a saved prompt"):
        load(folder)


def test_what_is_no_folder_is_named(tmp_path: Path, folder: Path) -> None:
    with refused("nowhere", "cannot be read"):
        load(tmp_path / "nowhere")
    with refused(JSON, "cannot be read"):
        load(folder / JSON)
    (folder / ROWS).unlink()
    (folder / ROWS).mkdir()
    with refused(ROWS, "cannot be read"):
        load(folder)


@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
def test_truncated_rows_are_refused(folder: Path, signed: bool) -> None:
    content = (folder / ROWS).read_bytes()
    for length in [*range(0, 220), len(content) // 2, len(content) - 1]:
        if signed:
            rewrite(folder, content[:length])
        else:
            (folder / ROWS).write_bytes(content[:length])
        with refused(ROWS):
            load(folder)
    (folder / ROWS).write_bytes(content + b"\0")
    with refused(ROWS):
        load(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    content = (folder / ROWS).read_bytes()
    for place in [*range(0, 200, 3), len(content) - 1]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (folder / ROWS).write_bytes(bytes(flipped))
        with refused(ROWS):
            load(folder)


def test_a_flipped_header_that_was_signed_does_no_harm(
    folder: Path, prompt: PromptEmbedding
) -> None:
    content = (folder / ROWS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    refusals_seen = 0
    for place in range(8 + length):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        rewrite(folder, bytes(flipped))
        try:
            found = load(folder)
        except ArtifactError as error:
            refusals_seen += 1
            _one_line(error)
        else:
            assert found.rows.shape == prompt.rows.shape
            assert torch.isfinite(found.rows).all()
    assert refusals_seen > length // 2


def _one_line(error: ArtifactError) -> None:
    assert str(error).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"GGUF" + bytes(100),
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2**40) + b"{" + bytes(64),
        struct.pack("<Q", 4) + b"{nul" + bytes(64),
    ],
)
def test_what_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    rewrite(folder, content)
    with refused(ROWS):
        load(folder)


def test_rows_of_the_wrong_kind_are_refused(folder: Path, prompt: PromptEmbedding) -> None:
    rows, start = prompt.rows, prompt.start_rows
    infinite = rows.clone()
    infinite[2, 0] = torch.inf
    for tensors, parts in (
        ({"rows": rows * torch.nan, "start_rows": start}, ["rows hold", "not finite"]),
        ({"rows": infinite, "start_rows": start}, ["rows hold", "not finite", "[2]"]),
        ({"rows": rows, "start_rows": infinite}, ["start_rows hold", "[2]"]),
        ({"rows": rows.double(), "start_rows": start}, ["float64", "expected float32"]),
        ({"rows": rows.half(), "start_rows": start}, ["rows are", "float16"]),
        ({"rows": rows, "start_rows": start.double()}, ["float64", "float32 or bfloat16"]),
        ({"rows": rows.int(), "start_rows": start}, ["int32"]),
        ({"rows": rows, "start_rows": start, "more": start.clone()}, ["more", "expected rows"]),
        ({"rows": rows}, ["['rows']", "expected rows and start_rows"]),
        ({"rows": rows[:-1], "start_rows": start}, ["one row per token"]),
        ({"rows": rows[:, :-1], "start_rows": start[:, :-1]}, ["[6, 31]", "[6, 32]"]),
        ({"rows": rows.flatten(), "start_rows": start}, ["[192]"]),
        ({"rows": rows.T, "start_rows": start}, ["[32, 6]"]),
    ):
        rewrite(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
        with refused(ROWS, *parts):
            load(folder)


def test_files_of_two_prompts_are_not_mixed(folder: Path, made: Kit, tmp_path: Path) -> None:
    other = save(prompt_of(made, seed=9), tmp_path / "other")
    (folder / ROWS).write_bytes((other / ROWS).read_bytes())
    with refused(ROWS, JSON, "digest differs"):
        load(folder)


# ------------------------------------------------------------------------------------ another model


def test_start_rows_take_half_the_room_and_are_the_models_own_again(
    folder: Path, prompt: PromptEmbedding, made: Kit
) -> None:
    stored = safetensors.torch.load((folder / ROWS).read_bytes())
    assert stored["start_rows"].element_size() == 2
    found = load(folder)
    assert found.start_rows.dtype == torch.float32
    assert not torch.equal(found.start_rows, prompt.start_rows)  # random weights need more bits
    again = fit_to_model(found, made.loaded.info, made.model.embed)
    assert torch.equal(again.start_rows, prompt.start_rows)
    assert torch.equal(again.rows, prompt.rows)


def test_a_row_that_never_moved_is_its_start_row_to_the_bit(made: Kit, tmp_path: Path) -> None:
    rows = made.start.clone()
    rows[1] += 0.1
    found = load(save(prompt_of(made, rows=rows), tmp_path / "prompt"))
    moved = [not torch.equal(a, b) for a, b in zip(found.rows, found.start_rows, strict=True)]
    assert moved == [i == 1 for i in range(len(rows))]
    assert found.drift[0] == 0


def test_start_rows_of_the_users_own_stay_what_they_are(made: Kit, tmp_path: Path) -> None:
    elsewhere = noisy(made.start, 0.5, seed=4)
    found = load(save(prompt_of(made, start_rows=elsewhere), tmp_path / "own"))
    again = fit_to_model(found, made.loaded.info, made.model.embed)
    assert torch.equal(again.start_rows, found.start_rows)
    assert torch.allclose(again.start_rows, elsewhere, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda rows: rows.bfloat16().float(), torch.bfloat16),
        (lambda rows: rows * 1e6, torch.float32),
        (lambda rows: rows * 1e-7, torch.float32),
    ],
)
def test_start_rows_keep_the_bits_that_they_need(
    made: Kit, tmp_path: Path, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    start = change(made.start)
    folder = save(prompt_of(made, start_rows=start), tmp_path / "prompt")
    assert safetensors.torch.load((folder / ROWS).read_bytes())["start_rows"].dtype == dtype
    assert torch.equal(load(folder).start_rows, start)


def test_a_prompt_fits_its_own_model_only(prompt: PromptEmbedding, made: Kit) -> None:
    fit_to_model(prompt, made.loaded.info, made.model.embed)
    other = kit(dtype=torch.float32, seed=3)
    with refused("tiny-llama", "embedding tables differ", "words start from"):
        fit_to_model(prompt, other.loaded.info, other.model.embed)
    for architecture in ("gemma3", "qwen2"):
        scaled = kit(architecture, dtype=torch.float32, seed=1)
        with refused("made for tiny-llama", f"not for tiny-{architecture}"):
            fit_to_model(prompt, scaled.loaded.info, scaled.model.embed)


def test_a_prompt_of_another_width_is_refused(made: Kit) -> None:
    narrow = prompt_of(made, start_rows=made.start[:, :16], rows=made.start[:, :16])
    with refused("rows are 16 wide", "the model's 32"):
        fit_to_model(narrow, made.loaded.info, made.model.embed)


@pytest.mark.parametrize("model", [None, "gpt2", [], {}])
def test_a_prompt_of_an_unknown_model_is_refused(made: Kit, model: object) -> None:
    unknown = prompt_of(made, provenance={} if model == {} else {"model": model})
    with refused("unknown model"):
        fit_to_model(unknown, made.loaded.info, made.model.embed)


def test_rows_per_layer_are_no_artifact(prompt: PromptEmbedding, tmp_path: Path) -> None:
    deep = dataclasses.replace(
        prompt, rows=prompt.rows[None].repeat(3, 1, 1), start_rows=prompt.rows[None]
    )
    assert deep.drift.shape == (3, len(prompt.rows))
    with pytest.raises(ArtifactError, match=r"rows of shape \[3, .*none per layer"):
        save(deep, tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()


# ------------------------------------------------------------------------------- changed by a hand


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"positive"', '"positif"'),
        ('"Review: {review}', '"Revieu: {review}'),
        ('"date": "2024', '"date": "2023'),
        ('"radius": 0.3', '"radius": 0.9'),
    ],
)
def test_an_entry_that_changed_after_it_was_saved_is_refused(
    folder: Path, before: str, after: str
) -> None:
    """Each is a whole prompt, but another one."""
    text = (folder / JSON).read_text(encoding="utf-8")
    assert before in text
    (folder / JSON).write_text(text.replace(before, after), encoding="utf-8")
    with refused(JSON, "the digest differs"):
        load(folder)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_a_prompt_that_a_killed_process_left_aside_is_put_back(
    prompt: PromptEmbedding, tmp_path: Path, kind: str
) -> None:
    folder = save(prompt, tmp_path / "run" / "prompt")
    rows = load(folder).rows
    aside = folder.rename(folder.with_name(f".prompt.{kind}-0123abcd"))
    assert torch.equal(load(tmp_path / "run").rows, rows)
    assert folder.is_dir()
    assert not aside.exists()
