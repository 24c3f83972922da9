"""What seldom happens to files that are read and kept: the branches that no other test takes."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from bad_kit import reseal
from embedgrad.atomic_files import (
    LOCK,
    check_seal,
    lock_folder,
    publish_folder,
    remove_file,
    scratch_folder,
    seal,
)
from embedgrad.data import arrow, images, readers
from embedgrad.data.bounded_reads import open_regular, read_part
from embedgrad.data.examples import Example
from embedgrad.data.problems import Problems
from embedgrad.data.readers import read_table
from embedgrad.data.splits import read_splits
from embedgrad.errors import ArtifactError, DataError, RunError
from embedgrad.prompt import artifact
from embedgrad.training.checkpoint import Checkpoint
from old_files import ASSETS
from refusals import refused

# -- storage ---------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_removed_is_told(tmp_path: Path) -> None:
    with refused(f"{tmp_path}: cannot be removed (", error=RunError):
        remove_file(tmp_path)  # a folder


def test_a_folder_with_a_lock_names_its_holder(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with (
            refused(f"process {os.getpid()} is at work in it", error=RunError),
            lock_folder(tmp_path),
        ):
            pass
        (tmp_path / LOCK).write_text("nobody")
        with refused(": another process is at work in it", error=RunError), lock_folder(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).mkdir()
    with refused(f"{tmp_path / LOCK}: cannot be written (", error=RunError), lock_folder(tmp_path):
        pass


def test_scratch_folders_of_the_dead_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scratch_folder(tmp_path, "work[1]") as own:
        running = own.name
        dead = tmp_path / running.replace(f"-{os.getpid()}-", "-999999999-")
        other = tmp_path / f"{running}x"
        for folder in (dead, other):
            folder.mkdir()
        with scratch_folder(tmp_path, "work[1]"):
            assert {path.name for path in tmp_path.iterdir()} >= {running, other.name}
            assert not dead.exists()
    assert not own.exists()


def test_a_folder_with_links_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "aside"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("text")
    (folder / "link").symlink_to("inner/file")
    (folder / "dangling").symlink_to("nowhere")
    publish_folder(folder, tmp_path / "place")
    assert (tmp_path / "place" / "link").read_text() == "text"


def test_a_checkpoint_keeps_numbers_beside_tensors_and_must_be_whole(tmp_path: Path) -> None:
    rows = torch.ones(2, 3)
    optimizer = {
        "state": {0: {"count": 5, "mean": rows}},
        "param_groups": [{"params": [0], "lr": 1}],
    }
    kept = Checkpoint(3, {"change": rows}, optimizer, {"span": rows})
    kept.keep(tmp_path)
    found = Checkpoint.find(tmp_path)
    assert found is not None
    assert found.optimizer["state"][0]["count"] == 5
    step, said = tmp_path / "step-000003", list[str]()
    path = step / "checkpoint.json"
    values, content = json.loads(path.read_text()), (step / "checkpoint.safetensors").read_bytes()
    check_seal(values, content)
    path.write_text(json.dumps(seal({**values, "history": [{"step": 1}]}, content)))
    assert Checkpoint.find(tmp_path, lambda event: said.append(str(event["text"]))) is None
    assert "history, best_step, optimizer_groups or transforms are not whole" in said[0]
    path.write_text(json.dumps(seal({**values, "format": 1}, content)))
    with refused("checkpoint format 1", error=RunError):
        Checkpoint.find(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{}")
    with refused("a checkpoint as earlier versions wrote them", error=RunError):
        Checkpoint.find(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.update(version=1), "written by an older embedgrad (format version 1"),
        (lambda v: v.update(version=9), "not written by this embedgrad (format version 9"),
        (lambda v: v.update(spans=2 * v["spans"]), "2 spans, but 1 in template"),
        (lambda v: v["spans"][0]["tokens"].pop(), "tokens"),
    ],
)
def test_a_prompt_that_is_not_whole_is_told(
    tmp_path: Path, change: Callable[[dict[str, object]], object], told: str
) -> None:
    folder = saved(tmp_path)
    path = folder / artifact.JSON_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    reseal(folder)
    with refused(told, error=ArtifactError):
        artifact.load(folder)


def test_a_prompt_without_a_digest_of_itself_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / artifact.JSON_FILE
    values = json.loads(path.read_text())
    del values["sha256"]  # earlier versions wrote none
    path.write_text(json.dumps(values))
    assert torch.equal(artifact.load(folder).rows, old_rows())


def saved(tmp_path: Path) -> Path:
    """A prompt's folder."""
    with zipfile.ZipFile(next(ASSETS.glob("*.zip"))) as packed:
        names = [name for name in packed.namelist() if name.startswith("run/prompt/")]
        packed.extractall(tmp_path, names)
    return tmp_path / "run" / "prompt"


def old_rows() -> torch.Tensor:
    return torch.tensor(json.loads(next(ASSETS.glob("*.json")).read_text()))


# -- readers ---------------------------------------------------------------------------------------


def test_a_name_with_nul_is_no_file() -> None:
    with pytest.raises(OSError, match="is no name of a file"):
        open_regular("a\0b")


def test_a_part_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    with open(path, "rb") as file:
        assert len(list(read_part(file))) == 3
    monkeypatch.setattr("embedgrad.data.bounded_reads.LARGEST_FILE", 30)
    with refused("rows.jsonl: cannot be read (its first rows are larger than 30 bytes)"):
        read_table(path, most=3)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_short_file_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text("text\na\nb\n" if suffix == "csv" else '{"text": "a"}\n{"text": "b"}\n')
    table = read_table(path, most=100)
    assert [row["text"] for row in table.rows] == ["a", "b"]
    assert table.notes == ()


def test_more_after_an_object_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"} x\n')
    with refused("rows.jsonl:1: broken JSON at character 14 (Extra data)"):
        read_table(path)


def test_parquet_that_claims_or_unpacks_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": pa.nulls(1_000_000, pa.string())}), path)
    with refused("is not a readable Parquet file (1,000,000 rows in "):
        read_table(path)
    parquet.write_table(pa.table({"text": ["long " * 1000] * 300}), path)
    monkeypatch.setattr(arrow, "most_unpacked", lambda length: 20_000)
    with refused("column 'text' holds what cannot be read (ValueError: it holds more than 20 kB"):
        read_table(path, used=["text"])
    monkeypatch.setattr(arrow, "most_unpacked", lambda length: 100)
    with refused("is not a readable Parquet file (", "packed into"):
        read_table(path)


def test_a_column_whose_cells_are_fine_one_by_one_names_the_file() -> None:
    error = arrow._unreadable(lambda column: [], "text", "rows.parquet", ValueError("of all"))
    assert (
        str(error) == "rows.parquet: column 'text' holds what cannot be read (ValueError: of all)"
    )


def test_a_folder_that_cannot_be_listed_hides_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listdir(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers.os, "listdir", listdir)
    with refused("no such file; data files there: none"):
        read_table(tmp_path / "rows.csv")


def test_problems_of_rows_that_are_not_chosen_are_left(tmp_path: Path) -> None:
    path, problems = tmp_path / "rows.jsonl", Problems()
    rows = [
        {"text": ("" if i == 4 else f"t{i}"), "label": "ab"[i % 2], "use": i % 3} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[4], "use": 5}]))
    splits = read_splits(
        path, columns=["text"], answer="label", where={"use": "1"}, problems=problems
    )
    assert len(problems.lines) == 1
    assert "rows.jsonl:5" in problems.lines[0]
    assert len(splits.train) + len(splits.dev) + len(splits.test) == 9


@pytest.mark.parametrize(("cell", "held"), [(None, "no value"), ([1], "a list"), (" ", "no value")])
def test_a_row_without_a_group_is_told(cell: object, held: str) -> None:
    with refused(f"rows.csv:2: column 'place' holds {held}"):
        Example({}, "", "rows.csv:2", extra={"place": cell}).group_in("place")


def test_pixels_are_little_endian_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = images.to_pixels([1.0, 2.0])
    monkeypatch.setattr(sys, "byteorder", "big")
    assert images.to_pixels([1.0, 2.0]) != expected  # swapped, from this machine's order
    with refused("expected the columns of an image by name", error=DataError):
        images.image_query("text", "row 1", lambda table: table)
