"""Checkpoints and prompts survive death at any file operation, power loss and damage."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disk import Death, Disk, after_power_loss, write_tree
from embedgrad.errors import ArtifactError, RunError
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.training.checkpoint import KEPT, Checkpoint
from embedgrad.training.settings import Training
from kit_loop import small, train
from laws.test_interruption import same

STEPS = (2, 4, 6, 8)
LONG = Training(steps=8, batch_size=3, evaluate_every=2)


@pytest.fixture(scope="module")
def kept() -> dict[int, Checkpoint]:
    """The checkpoints of a training, by step."""
    found: dict[int, Checkpoint] = {}
    train(small(), LONG, keep=lambda state: found.update({state.step: state}))
    assert tuple(found) == STEPS
    return found


@pytest.fixture(scope="module")
def prompts(kept: dict[int, Checkpoint]) -> tuple[PromptEmbedding, PromptEmbedding]:
    """A prompt, and a better one that takes its place."""
    refined = train(small(), LONG).prompt
    return refined.with_rows(refined.start_rows), refined


def keep_all(kept: dict[int, Checkpoint], folder: Path, done: list[int]) -> None:
    for step in STEPS:
        kept[step].keep(folder)
        done.append(step)


def operations(tmp_path: Path, write: Callable[[Path], None]) -> list[tuple[str, Path, Any]]:
    """What a whole save does to the disk."""
    root = tmp_path / "dry"
    root.mkdir(parents=True)
    with Disk().mounted() as disk:
        write(root)
    shutil.rmtree(root)
    return disk.log


# -- death at any operation ------------------------------------------------------------------------


def test_a_training_that_dies_at_any_operation_goes_on_to_the_same_rows(
    kept: dict[int, Checkpoint], tmp_path: Path
) -> None:
    """Before it, after it, and with the file torn at a byte, half way and at the last byte but one.

    What is found is a checkpoint of the training to the bit, at least as late as the last save that
    returned; from each of them a resumed training comes to the same rows.
    """
    log = operations(tmp_path, lambda root: keep_all(kept, root / "checkpoint", []))
    points = [(k, after, None) for k in range(len(log)) for after in (False, True)]
    torn = (0.001, 0.5, 0.999)
    points += [(k, False, t) for k in range(len(log)) for t in torn if log[k][0] == "write"]
    assert len(points) >= 40
    found_steps = set()
    for number, (at, after, share) in enumerate(points):
        folder, done = tmp_path / str(number) / "checkpoint", list[int]()
        folder.parent.mkdir()
        with Disk(at, after, share).mounted(), pytest.raises(Death):
            keep_all(kept, folder, done)
        found = Checkpoint.find(folder)
        if found is None:
            assert not done
            continue
        assert found.step >= max(done, default=0)
        assert same(found, kept[found.step])
        found_steps.add(found.step)
        found.keep(folder)  # goes on in what the dead process left
        assert Checkpoint.find(folder) is not None
    assert found_steps == set(STEPS)
    for step in STEPS:
        resumed = train(small(), LONG, checkpoint=kept[step])
        assert same(resumed.checkpoint, kept[STEPS[-1]])


def test_a_prompt_that_is_replaced_at_death_is_the_old_one_or_the_new(
    prompts: tuple[PromptEmbedding, PromptEmbedding], tmp_path: Path
) -> None:
    old, new = prompts

    def replace(root: Path) -> None:
        artifact.save(new, root / "prompt")

    artifact.save(old, tmp_path / "dry" / "prompt")
    with Disk().mounted() as disk:
        replace(tmp_path / "dry")
    for at in range(len(disk.log)):
        for after in (False, True):
            root = tmp_path / f"{at}-{after}"
            artifact.save(old, root / "prompt")
            with Disk(at, after).mounted(), pytest.raises(Death):
                replace(root)
            rows = artifact.load(root).rows
            assert torch.equal(rows, old.rows) or torch.equal(rows, new.rows)


# -- power loss ------------------------------------------------------------------------------------


def test_after_a_power_loss_the_newest_whole_checkpoint_is_found(
    kept: dict[int, Checkpoint], tmp_path: Path
) -> None:
    """A thousand states of the disk: no damaged checkpoint is believed, no finished one lost."""
    root, ends = tmp_path / "dry", list[int]()  # operations until each save has returned
    with Disk().mounted() as disk:
        for step in STEPS:
            kept[step].keep(root / "checkpoint")
            ends.append(len(disk.log))
    log, draw, states, steps = disk.log, random.Random(0), 0, set[int]()
    while states < 1000:
        point = 1 + states * len(log) // 1000
        done = [step for step, end in zip(STEPS, ends, strict=True) if point >= end]
        tree = after_power_loss(log[:point], root, draw)
        write_tree(tree, tmp_path / "state")
        found = Checkpoint.find(tmp_path / "state" / "checkpoint")
        if done:
            assert found is not None, (point, sorted(tree))
            assert found.step >= done[-1]
        if found is not None:
            assert same(found, kept[found.step])
            steps.add(found.step)
        states += 1
    assert steps == set(STEPS)


def test_after_a_power_loss_a_replaced_prompt_is_the_old_one_or_the_new(
    prompts: tuple[PromptEmbedding, PromptEmbedding], tmp_path: Path
) -> None:
    root, (old, new) = tmp_path / "dry", prompts
    with Disk().mounted() as disk:
        artifact.save(old, root / "prompt")
        first = len(disk.log)
        artifact.save(new, root / "prompt")
    draw, seen = random.Random(1), set[bool]()
    for state in range(200):
        point = first + state % (len(disk.log) - first + 1)
        write_tree(after_power_loss(disk.log[:point], root, draw), tmp_path / "state")
        rows = artifact.load(tmp_path / "state").rows
        assert torch.equal(rows, old.rows) or torch.equal(rows, new.rows)
        seen.add(torch.equal(rows, new.rows))
    assert seen == {False, True}


def test_the_simulator_forgets_what_is_not_synced(tmp_path: Path) -> None:
    """A save that does not sync is lost in some states, or the tests above prove nothing."""
    a, aside = tmp_path / "a", tmp_path / ".a.new"
    log = [("open", aside, None), ("write", aside, b"12345678"), ("rename", aside, a)]
    states = [after_power_loss(log, tmp_path, random.Random(seed)) for seed in range(50)]
    assert {} in states
    assert any(state.get("a") not in (None, b"12345678") for state in states)
    synced = [*log[:2], ("fsync", aside, None), log[2], ("flush", tmp_path, None)]
    for seed in range(50):
        assert after_power_loss(synced, tmp_path, random.Random(seed)) == {"a": b"12345678"}


# -- damage ----------------------------------------------------------------------------------------


def test_every_damage_of_the_newest_checkpoint_is_detected_and_told(
    kept: dict[int, Checkpoint], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    keep_all(kept, folder, [])
    assert sorted(p.name for p in folder.iterdir()) == ["step-000006", "step-000008"]
    assert KEPT == 2
    newest, draw = folder / "step-000008", random.Random(0)
    other = tmp_path / "other"
    train(small(seed=1), LONG, keep=lambda state: state.keep(other))
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        damages: list[bytes | None] = [whole[: len(whole) * n // 64] for n in range(64)]
        for _ in range(64):
            flipped = bytearray(whole)
            bit = draw.randrange(8 * len(whole))
            flipped[bit // 8] ^= 1 << bit % 8
            damages.append(bytes(flipped))
        damages += [None, (folder / "step-000006" / file.name).read_bytes()]
        damages += [(other / "step-000008" / file.name).read_bytes()]
        for damage in damages:
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            told: list[Any] = []
            found = Checkpoint.find(folder, told.append)
            assert found is not None
            assert found.step == 6
            (line,) = told
            assert "step-000008: the checkpoint cannot be read" in line["text"]
            assert "\n" not in line["text"]
        file.write_bytes(whole)
    assert same(Checkpoint.find(folder) or kept[2], kept[8])
    shutil.rmtree(folder / "step-000006")
    (newest / "checkpoint.json").write_bytes(b"")
    assert Checkpoint.find(folder) is None


def test_a_flipped_bit_of_a_prompt_is_refused(
    prompts: tuple[PromptEmbedding, PromptEmbedding], tmp_path: Path
) -> None:
    """All that may change is white space between entries, and the digest's own name."""
    folder, draw = artifact.save(prompts[1], tmp_path / "prompt"), random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(200):
            flipped = bytearray(whole)
            bit = draw.randrange(8 * len(whole))
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            if whole[bit // 8 : bit // 8 + 1].isspace() or b'\n "sha256": ' not in flipped:
                continue
            with pytest.raises(ArtifactError):
                artifact.load(folder)
        file.write_bytes(whole)


def test_a_first_checkpoint_that_is_not_there_when_it_is_read_back_is_told(
    kept: dict[int, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Checkpoint.save

    def lose(state: Checkpoint, folder: Path) -> None:
        plain(state, folder)
        (folder / "checkpoint.safetensors").write_bytes(b"")

    monkeypatch.setattr(Checkpoint, "save", lose)
    with pytest.raises(RunError, match="step-000002: the checkpoint cannot be read"):
        kept[2].keep(tmp_path / "checkpoint")
