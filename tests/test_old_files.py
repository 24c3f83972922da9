"""What earlier versions wrote: it stays as it is, and it is read, with the same rows to the bit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import embedgrad as eg
from embedgrad.deploy.folder import OWN, check_files, read_export
from embedgrad.deploy.job import DESTINATIONS
from embedgrad.prompt import artifact
from embedgrad.recipe.recipe import Recipe
from old_files import ASSETS
from run_kit import Command

pytest_plugins = ["tiny_runs"]

VERSIONS = sorted(path.stem for path in ASSETS.glob("*.zip"))


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A version's folders, in another place than where they were written, and its rows."""
    with zipfile.ZipFile(ASSETS / f"{request.param}.zip") as packed:
        packed.extractall(tmp_path)
    rows = json.loads((ASSETS / f"{request.param}.json").read_text())
    return tmp_path, torch.tensor(rows)


def test_old_files_are_small() -> None:
    assert VERSIONS
    for version in VERSIONS:
        assert (ASSETS / f"{version}.zip").stat().st_size < 200_000


def test_an_old_run_is_read_with_the_same_rows(
    old: tuple[Path, torch.Tensor], embedgrad: Command
) -> None:
    folder, rows_PD = old
    assert torch.equal(eg.load(folder / "run").rows, rows_PD)
    assert torch.equal(artifact.load(folder / "run" / "prompt").rows, rows_PD)
    Recipe.read_run(folder / "run")
    before = json.loads((folder / "run" / "result.json").read_text())
    again = embedgrad("evaluate", folder / "run", "--json")
    assert again.code == 0, again.err
    for name in ("text", "refined"):
        assert again.json[name]["accuracy"] == before[name]["accuracy"]
    page = embedgrad("report", folder / "run", "--out", folder / "page.html")
    assert page.code == 0, page.err


@pytest.mark.parametrize("name", DESTINATIONS)
def test_an_old_export_is_read_with_the_same_rows(
    old: tuple[Path, torch.Tensor], name: str
) -> None:
    folder, rows_PD = old
    entries = read_export(folder / name)
    assert entries["destination"] == name
    check_files(folder / name, entries)
    (prompt,) = entries["prompts"]
    assert torch.equal(artifact.load(folder / name / OWN / prompt).rows, rows_PD)
    if name == "vocabulary":  # in the checkpoint itself, behind the model's own
        tables = load_file(folder / name / "model.safetensors")
        table_VD = tables["model.embed_tokens.weight"]
        assert torch.equal(table_VD[-len(rows_PD) :], rows_PD)
