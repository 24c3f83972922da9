"""Prompts on the Hub, against a stand-in: pushed with a card, loaded and checked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

import embedgrad as eg
from embedgrad.deploy.base_model import Base
from embedgrad.deploy.hub import prompt_card
from embedgrad.prompt import artifact
from embedgrad.recipe import hub as hub_room
from embedgrad.recipe.open_run import open_run
from fake_hub import TOKEN, FakeHub
from run_kit import Command, Done

pytest_plugins = ["tiny_runs"]

NAME = "someone/review-prompt"


@pytest.fixture
def run_folder(finished: tuple[Path, dict[str, Any]]) -> Path:
    return finished[0]


def refused(done: Done) -> str:
    """The one line of a mistake."""
    (line,) = done.lines
    assert done.code == 2
    return line


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub().served() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        url = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def test_a_prompt_comes_back_from_the_hub(
    run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = eg.push(run_folder, NAME, private=True, base_model="owner/tiny")
    files = hub.repositories[NAME]
    assert set(files) == {"prompt.json", "prompt.safetensors", "README.md"}
    assert hub.private[NAME]
    assert result["url"].startswith(f"{hub.url}/{NAME}/commit/")
    loaded, own = eg.load(f"hub:{NAME}"), eg.load(run_folder)
    assert torch.equal(loaded.rows, own.rows)
    assert loaded.provenance["scores"] == own.provenance["scores"]
    assert str(run_folder.parent) not in files["prompt.json"].decode()
    assert loaded.provenance["model"]["name"] == "owner/tiny"
    hub.asked.clear()
    eg.load(f"hub:{NAME}")
    assert not [request for request in hub.asked if NAME in request]  # the cache is enough
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(eg.load(f"hub:{NAME}").rows, own.rows)
    with pytest.raises(eg.ArtifactError, match=r"^hub:a/b: .*HF_HUB_OFFLINE is set$"):
        eg.load("hub:a/b")


def test_the_card_has_the_hubs_metadata(run_folder: Path, hub: FakeHub) -> None:
    eg.push(run_folder, NAME, base_model="owner/tiny")
    text = hub.repositories[NAME]["README.md"].decode()
    values = yaml.safe_load(text.split("---\n")[1])
    scores = eg.load(run_folder).provenance["scores"]
    assert (values["base_model"], values["library_name"]) == ("owner/tiny", "embedgrad")
    (model,) = values["model-index"]
    metrics = {m["type"]: m["value"] for r in model["results"] for m in r["metrics"]}
    refined = scores["refined"]
    assert metrics == {"accuracy": refined["accuracy"], "f1": refined["macro_f1"]}
    assert ModelCard(text).data.eval_results[0].task_type == "text-classification"
    assert f'eg.load("hub:{NAME}")' in text


def test_a_run_on_the_hub_stands_wherever_a_run_does(
    run_folder: Path, hub: FakeHub, embedgrad: Command
) -> None:
    eg.push(run_folder, NAME)
    model = eg.Recipe.read_run(run_folder).model.name
    done = embedgrad("generate", f"hub:{NAME}", "good", "--set", f"model.name={json.dumps(model)}")
    assert done.code == 0, done.err
    assert done.out.split()[0] in ("negative", "positive")
    assert open_run(f"hub:{NAME}", [f"model.name={json.dumps(model)}"]).alone


@pytest.mark.parametrize("damage", ["flipped", "missing", "huge"])
def test_a_strangers_repository_is_checked(
    damage: str, run_folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    eg.push(run_folder, NAME)
    files = hub.repositories[NAME]
    if damage == "flipped":
        content = bytearray(files["prompt.safetensors"])
        content[-1] ^= 1
        files["prompt.safetensors"] = bytes(content)
    elif damage == "missing":
        del files["prompt.json"]
    else:
        monkeypatch.setattr(hub_room, "LARGEST_FILE", 100)
    why = {
        "flipped": "digest differs",
        "missing": "holds no prompt of embedgrad",
        "huge": "a file of .*; a prompt's has at most",
    }
    with pytest.raises(eg.ArtifactError, match=why[damage]):
        eg.load(f"hub:{NAME}")
    fetched = [request for request in hub.asked if "/resolve/" in request]
    assert bool(fetched) == (damage == "flipped")


def test_what_is_wrong_is_one_line(
    run_folder: Path, hub: FakeHub, embedgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(embedgrad("push", run_folder, "no-owner"))
    assert "'no-owner' cannot be a name on the Hub; expected OWNER/NAME" in said
    hub.refused["other/name"] = 403
    said = refused(embedgrad("push", run_folder, "other/name"))
    assert "the Hub refused other/name" in said
    assert "choose a name of your own" in said
    with pytest.raises(eg.ArtifactError, match="no repository of that name"):
        eg.load("hub:no/body")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in refused(embedgrad("push", run_folder, NAME))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    said = refused(embedgrad("push", run_folder, NAME))
    assert said.endswith("push: no login to the Hub; run `hf auth login`, or set HF_TOKEN")
    assert not hub.repositories


def test_the_card_escapes_what_files_say(run_folder: Path) -> None:
    evil = "x\n---\n<script>alert(1)</script> ``` [a](javascript:b)"
    hostile = artifact.load(run_folder).with_provenance(
        model={"name": evil}, data={"test": {"rows": 1, "source": evil}}, licenses={"model": evil}
    )
    text = prompt_card(hostile, Base(evil, None, public=True), NAME)
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["base_model"] == evil
    assert "\n<script>" not in text.split("\n---\n", 1)[1]
