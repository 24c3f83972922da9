"""A vision recipe: images in tables, through a run, to an artifact that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

import embedgrad as eg
from embedgrad.data.images import with_images
from embedgrad.data.splits import read_splits
from embedgrad.deploy.base_model import Base
from embedgrad.deploy.hub import prompt_card
from embedgrad.errors import DataError, ModelError, RecipeError, RunError
from embedgrad.experiments.tune import tune
from embedgrad.inference.play import play
from embedgrad.model.loading.vision import load_vision
from embedgrad.recipe.open_run import open_run
from kit_vision import CLASSES, pictures, tiny_vit

IMAGES = {"columns": ["image"], "mean": 0.0, "std": 1.0, "queries": 2, "hidden": 6, "mixing": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vision transformer and images in three kinds of files."""
    folder = tmp_path_factory.mktemp("vision")
    tiny_vit().float().save_pretrained(folder / "vit")
    images, labels = pictures(48)
    np.savez(folder / "shades.npz", image=images.numpy(), label=np.array(labels))
    flat = images.flatten(1).tolist()
    names = [f"pixel_{i:02}" for i in range(36)]
    header = ",".join([*names, "label"])
    lines = [",".join([*map(repr, row), label]) for row, label in zip(flat, labels, strict=True)]
    (folder / "shades.csv").write_text("\n".join([header, *lines]) + "\n")
    rows = [{"image": i.tolist(), "label": b} for i, b in zip(images, labels, strict=True)]
    (folder / "shades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values(place: Path, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(place / "vit"), "device": "cpu"},
        "data": {"train": str(place / "shades.npz")},
        "images": IMAGES,
        "target": {"choices": list(CLASSES)},
        "training": {"steps": 12, "batch_size": 8, "evaluate_every": 6},
        **sections,
    }


def test_a_run_of_images_scores_saves_and_answers(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "shades.toml"
    recipe.write_text(tomli_w.dumps(values(place)))
    out = tmp_path / "run"
    result = eg.run(eg.Recipe.read(recipe), out, eg.quiet)
    assert result["refined"]["log_loss"] < result["text"]["log_loss"]
    assert result["refined"]["greedy_is_choice"] is None
    assert [t["token"] for t in result["tokens"]][:3] == [f"queries: layer {i}" for i in (1, 2, 3)]
    assert [t["token"] for t in result["tokens"]][-3:] == [f"classes: {c}" for c in CLASSES]
    assert len(result["tokens"]) == 3 + 3 + 1 + 3
    assert result["prefix_cache"]["misses"] == 48
    saved = json.loads((out / "prompt" / "prompt.json").read_text())
    assert saved["recipe"]["images"]["queries"] == 2
    assert "template" not in saved["recipe"]
    again = open_run(out)
    test = again.read_data().test
    scored = again.evaluator.score(again.prompt.rows, again.sequencer.build(test))
    kept = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [a.predicted for a in scored] == [row["refined"]["predicted"] for row in kept]
    assert len(kept[0]["columns"]["image"]) == 64  # a digest and no pixels
    # The artifact alone answers too.
    prompt = eg.load(out / "prompt")
    images, _ = pictures(48)
    asked = [{"image": image.tolist()} for image in images[:6]]
    answers = prompt.generate(asked, report=eg.quiet)
    assert prompt.generate(asked[0], report=eg.quiet) == answers[0]
    assert sum(a == b for a, b in zip(answers, pictures(6)[1], strict=True)) >= 5


def test_a_stopped_run_resumes_to_the_bit(place: Path, tmp_path: Path) -> None:
    recipe = eg.Recipe.from_dict(values(place))
    eg.run(recipe, tmp_path / "whole", eg.quiet)
    steps: list[int] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["step"])

    eg.run(recipe, tmp_path / "cut", note, should_stop=lambda: len(steps) == 7)
    assert steps[-1] == 7
    eg.run(recipe, tmp_path / "cut", eg.quiet, resume=True)
    rows = [eg.load(tmp_path / name).rows for name in ("whole", "cut")]
    assert torch.equal(*rows)


def test_arrays_columns_and_lists_are_the_same_images(place: Path) -> None:
    found = []
    for file, columns in (
        ("shades.npz", ("image",)),
        ("shades.csv", ("pixel_*",)),
        ("shades.jsonl", ("image",)),
    ):
        splits = read_splits(
            place / file,
            columns=["image"],
            answer="label",
            extra=("pixels",),
            choices=CLASSES,
            convert=lambda table, columns=columns: with_images(table, columns, 0.0, 1.0),  # type: ignore[misc]
        )
        found.append([(e.columns["image"], e.answer, e.extra["pixels"]) for e in splits.train])
    assert found[0] == found[1] == found[2]
    pixels = torch.frombuffer(bytearray(found[0][0][2]), dtype=torch.float32)
    assert any(torch.equal(pixels, image.flatten()) for image in pictures(48)[0])


def test_the_same_image_never_crosses_a_split(place: Path, tmp_path: Path) -> None:
    images, labels = pictures(12)
    np.savez(tmp_path / "a.npz", image=images.numpy(), label=np.array(labels))
    np.savez(tmp_path / "b.npz", image=images[3:6].numpy(), label=np.array(labels[3:6]))
    data = {"train": str(tmp_path / "a.npz"), "test": str(tmp_path / "b.npz")}
    with pytest.raises(DataError, match=r"3 rows repeat the text.*a\.npz:4 and test b\.npz:1"):
        eg.run(eg.Recipe.from_dict(values(place, data=data)), tmp_path / "run", eg.quiet)
    assert not (tmp_path / "run").exists()


# -- bad input ---------------------------------------------------------------------


def refused(place: Path, out: Path, match: str, **sections: Any) -> None:
    with pytest.raises((DataError, ModelError), match=match) as caught:
        eg.run(eg.Recipe.from_dict(values(place, **sections)), out, eg.quiet)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_text_columns_are_one_clear_line(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("image,label\nA warm film.,light\nA dull film.,dark\n")
    message = r"^reviews\.csv:2: column 'image' holds 'A warm film\.'; expected the number"
    refused(place, tmp_path / "run", message, data={"train": str(file)})


@pytest.mark.parametrize(
    ("data", "images", "match"),
    [
        ({}, {"columns": ["pixel*"]}, r"no column 'pixel\*', which images\.columns names"),
        (
            {"train": "shades.csv"},
            {"columns": ["pixel_0*"]},
            r"csv:\d+: an image of 10 num.* 36",
        ),
        ({"train": "objects.npz"}, {}, r"objects\.npz: is not a \.npz file of plain arrays"),
        ({"train": "broken.npz"}, {}, r"broken\.npz: is not a \.npz file of plain arrays"),
        ({"train": "large.npz"}, {}, r"large\.npz: is not .* packed into 2\d\d kB\)"),
        ({"train": "flat.npz"}, {}, r"flat\.npz: is not .* \(image of shape \[1000000000, 0\] in"),
        ({"train": "uneven.npz"}, {}, r"uneven\.npz: holds 3 image, 2 label; expected"),
        ({"train": "empty.csv"}, {}, r"empty\.csv:3: column 'image' holds nothing"),
    ],
)
def test_images_that_cannot_be_read(
    place: Path, tmp_path: Path, data: dict[str, str], images: dict[str, Any], match: str
) -> None:
    ragged = np.array([{"a": 1}, None], dtype=object)
    np.savez(place / "objects.npz", image=ragged, label=np.array(["dark", "light"]))
    np.savez_compressed(place / "large.npz", image=np.zeros((2**28,), np.uint8))
    np.savez(place / "flat.npz", image=np.zeros((10**9, 0)))
    (place / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(place / "uneven.npz", image=np.zeros((3, 6, 6)), label=np.array(["dark", "light"]))
    (place / "empty.csv").write_text("image,label\n1,dark\n,light\n")
    file = str(place / data.get("train", "shades.npz"))
    refused(place, tmp_path / "run", match, data={"train": file}, images={**IMAGES, **images})


def test_a_model_that_reads_no_images(place: Path, tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path / "empty")
    refused(place, tmp_path / "a", "no weights", model={"name": str(tmp_path / "empty")})
    other = tmp_path / "text"
    other.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (other / name).write_bytes((place / "vit" / "model.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused(place, tmp_path / "b", r"gpt2 is not a vision transformer", model={"name": str(other)})


def test_a_vision_transformer_whose_config_lies_is_refused(place: Path, tmp_path: Path) -> None:
    whole = json.loads((place / "vit" / "config.json").read_text())
    weights = load_file(place / "vit" / "model.safetensors")
    head = {"classifier.weight": torch.ones(2)}  # of what published ones were trained for
    for i, (layers, match) in enumerate(
        [(1, r"weights in the file are no part of the ViTModel"), (10**7, r"is 10,000,000, not")]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**whole, "num_hidden_layers": layers}))
        refused(place, tmp_path / f"run {i}", match, model={"name": str(folder)})
        (folder / "config.json").write_text(json.dumps(whole))
        load_vision(str(folder))


def test_what_is_for_text_is_refused_by_name(place: Path) -> None:
    sections = {
        "template": {"text": "[[Good?]] {review}"},
        "demonstrations": {"k": 2},
        "report": {"elicit": True},
        "prefix_cache": {"spill": "prefixes", "precision": "half"},
        "objective": {"name": "reward"},
        "parameterization": {"name": "free", "deep": True},
        "target": {},
    }
    with pytest.raises(RecipeError) as caught:
        eg.Recipe.from_dict(values(place, **sections))
    problems = str(caught.value)
    for part in (
        "template: is for text, which a recipe with [images] has not",
        "demonstrations.k: is for text",
        "report.elicit: is for text",
        "prefix_cache.spill: is for text",
        "prefix_cache.precision: is for text",
        "target.choices: lists none; a vision transformer chooses",
        "objective: is for text",
        "parameterization.deep: [images] has queries in every layer anyway",
    ):
        assert part in problems
    recipe = eg.Recipe.from_dict(values(place))
    for call in (eg.plan, lambda r: eg.compare(r, "out"), lambda r: eg.clean(r, "out")):
        with pytest.raises(RecipeError, match=r"images: .* does not work with images"):
            call(recipe)
    assert eg.Recipe.from_dict(recipe.as_dict()) == recipe


def test_an_export_a_policy_and_a_page_are_refused(place: Path, tmp_path: Path) -> None:
    eg.run(eg.Recipe.from_dict(values(place)), tmp_path / "run", eg.quiet)
    with pytest.raises((RecipeError, RunError), match="an export does not work with images"):
        eg.export(tmp_path / "run", "vocabulary", tmp_path / "out", report=eg.quiet)
    assert not (tmp_path / "out").exists()
    (tmp_path / "policy.toml").write_text('prompts = [{ run = "run" }]')
    with pytest.raises(RecipeError, match="a policy does not work with images"):
        eg.load_policy(tmp_path / "policy.toml", report=eg.quiet)
    with pytest.raises(RecipeError, match="`embedgrad play` does not work with images"):
        play([tmp_path / "run"])
    card = prompt_card(eg.load(tmp_path / "run").prompt, Base("o/vit", None, public=True), "a/b")
    assert "embedgrad export" not in card


def test_trials_begin_where_a_run_begins(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    recipe = tmp_path / "shades.toml"
    recipe.write_text(tomli_w.dumps(values(place, training={"steps": 2, "batch_size": 8})))
    over = ["optimizer.learning_rate=0.01..0.02"]
    found = tune(recipe, tmp_path / "study", over, eg.quiet, trials=1)
    evaluations: list[dict[str, Any]] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            evaluations.append(event["best"])

    eg.run(eg.Recipe.read(found["recipe"]), tmp_path / "run", note)
    assert found["trials"][0]["dev"]["log_loss"] == evaluations[-1]["log_loss"]
