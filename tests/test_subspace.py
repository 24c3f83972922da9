"""A subspace memory: what a step leaves alone, how it is made, and what it is good for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import Free, LowRank, Parameterization
from embedgrad.parts.transforms import Clip, SubspaceMemory
from embedgrad.parts.transforms.subspace import read_memory, save_memory
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.template import Template
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.memory import margin_gradients, margins, remember
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Refinement, Training
from kit import Kit
from kit_loop import small, train
from refusals import refused

OPEN = TrustRegion(None, None)
FAST = AdamW(learning_rate=0.05, weight_decay=0.1)
TOY = AdamW(learning_rate=0.1, weight_decay=0.0)
LONG = Template.chat(
    user="Review: {review}\n\n[[Is the review positive or negative? Answer with one word. You are "
    "a helpful assistant. Is it good or bad?]]"
)


def memory_of(made: Kit, rows: Tensor, sequences: list[TokenSequence], **options: object) -> Tensor:
    subspace = dataclasses.replace(SubspaceMemory(), **options)  # type: ignore[arg-type]
    start = {"span": made.start}
    empty = torch.zeros(0, made.start.numel())
    target = made.sequencer.target
    return remember(
        subspace,
        empty,
        made.model,
        target,
        sequences,
        rows={"span": rows},
        before=start,
        start=start,
    )


def parts_with(folder: Path | None, **options: object) -> Parts:
    memory = None if folder is None else str(folder)
    parts = Parts(transforms=(Clip(), SubspaceMemory(memory)), optimizer=FAST, trust_region=OPEN)
    return dataclasses.replace(parts, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("parameterization", [Free(), LowRank(rank=2)])
def test_a_hundred_steps_leave_the_memory_alone(
    parameterization: Parameterization, tmp_path: Path
) -> None:
    """Acceptance check (a): max |V delta| < 1e-6 |delta| after 100 steps of AdamW."""
    made = small()
    start = {"span": made.start}
    theta = parameterization.init(start, torch.Generator().manual_seed(0))
    if isinstance(parameterization, LowRank):
        theta["span right"] = torch.randn_like(theta["span right"]) * 0.1
    target = made.sequencer.target
    found = margin_gradients(made.model, parameterization, target, theta, start, made.sequences[8:])
    save_memory(SubspaceMemory().absorb(torch.zeros(0, found.shape[1]), found), tmp_path)
    directions = read_memory(tmp_path)
    assert len(directions) > 1
    moved = {}
    for folder in (tmp_path, None):
        parts = parts_with(folder, parameterization=parameterization)
        training = Training(steps=100, batch_size=4)
        trained = train(made, training, parts=parts, dev=()).checkpoint.theta
        origin = parameterization.init(start, torch.Generator().manual_seed(training.seed))
        moved[folder] = torch.cat([(trained[n] - origin[n]).flatten() for n in origin])
    along, free = ((directions @ delta).abs().max() / delta.norm() for delta in moved.values())
    assert along < 1e-6
    assert free > 1e-3


def test_what_a_step_does_to_an_earlier_task_is_of_second_order() -> None:
    """Acceptance check (b): |f(E + eps delta) - f(E)| = O(eps^2)."""
    made = small(dtype=torch.float64)
    memory = memory_of(made, made.start, made.sequences[8:], energy=1.0).double()
    generator = torch.Generator().manual_seed(1)
    free = torch.randn(made.start.shape, generator=generator, dtype=torch.float64)
    kept = free - ((memory @ free.flatten()) @ memory).view_as(free)

    @torch.no_grad()
    def changes(direction: Tensor, size: float) -> float:
        there, here = (
            margins(
                *(made.model, made.sequencer.target),
                Free().prompt({"span": moved}, {"span": made.start}),
                made.sequences[8:],
            )
            for moved in (size * direction, 0 * direction)
        )
        return (there - here).abs().max().item()

    small_step, large_step = 1e-4, 1e-3
    ratio = changes(kept, large_step) / changes(kept, small_step)
    assert 50 < ratio < 200  # (1e-3 / 1e-4)^2 = 100
    assert changes(free, large_step) / changes(free, small_step) < 20


@pytest.mark.parametrize("energy", [None, 0.0])
def test_no_memory_changes_nothing_to_the_bit(energy: float | None, tmp_path: Path) -> None:
    made, folder = small(), None
    if energy is not None:
        save_memory(memory_of(made, made.start, made.sequences[8:], energy=energy), tmp_path)
        assert read_memory(tmp_path).shape == (0, made.start.numel())
        folder = tmp_path
    plain = train(made, parts=parts_with(None, transforms=(Clip(),)), dev=())
    with_part = train(made, parts=parts_with(folder), dev=())
    assert torch.equal(plain.prompt.rows, with_part.prompt.rows)


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    made, kept = small(), list[Checkpoint]()
    save_memory(memory_of(made, made.start, made.sequences[8:]), tmp_path)
    training, parts = Training(steps=6, batch_size=3, evaluate_every=2), parts_with(tmp_path)
    whole = train(made, training, parts=parts, dev=(), keep=kept.append)
    kept[0].save(tmp_path / "checkpoint")
    middle = Checkpoint.load(tmp_path / "checkpoint")
    resumed = train(made, training, parts=parts, dev=(), checkpoint=middle)
    assert torch.equal(whole.prompt.rows, resumed.prompt.rows)
    bare = train(made, training, parts=parts_with(None), dev=())
    assert not torch.equal(whole.prompt.rows, bare.prompt.rows)


def test_the_region_comes_last(tmp_path: Path) -> None:
    made = small()
    save_memory(memory_of(made, made.start, made.sequences[8:]), tmp_path)
    region = TrustRegion(0.02)
    rows = train(made, parts=parts_with(tmp_path, trust_region=region), dev=()).prompt.rows
    assert region.holds(rows, made.start)


# -------------------------------------------------------------------------------------- the memory


def test_a_memory_keeps_the_energy_and_no_more_than_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    found *= torch.tensor([8.0, 4, 2, 1, 0.5, 0.25], dtype=torch.float64)[:, None]
    empty = torch.zeros(0, 10)
    for energy in (0.3, 0.9, 0.99, 1.0):
        memory = SubspaceMemory(energy=energy).absorb(empty, found).double()
        assert torch.allclose(memory @ memory.T, torch.eye(len(memory)).double(), atol=1e-6)
        share = ((found @ memory.T).norm() / found.norm()) ** 2
        assert share > energy - 1e-6
        fewer = memory[:-1]
        assert ((found @ fewer.T).norm() / found.norm()) ** 2 < energy
    assert len(SubspaceMemory(energy=1.0).absorb(empty, found)) == 6
    assert len(SubspaceMemory(energy=1.0, rank_share=0.3).absorb(empty, found)) == 3
    first = SubspaceMemory(energy=1.0).absorb(empty, found[:4])
    both = SubspaceMemory(energy=1.0).absorb(first, found)
    assert torch.equal(both[:4], first)
    assert len(both) == 6
    assert torch.equal(SubspaceMemory().absorb(first, found[:4]), first)  # nothing new
    full = SubspaceMemory(rank_share=0.1).absorb(first, found)
    assert torch.equal(full, first)  # what is remembered is never forgotten


@pytest.mark.parametrize("source", ["update", "svd"])
def test_other_sources_are_directions_of_every_row(source: str, tmp_path: Path) -> None:
    made = small()
    direction = torch.nn.functional.normalize(torch.arange(32.0), dim=0)
    moved = made.start + made.start.norm(dim=1, keepdim=True) * direction
    memory = memory_of(made, moved, made.sequences, source=source)
    rows = len(made.start)
    if source == "update":  # of rank one
        expected = torch.kron(torch.eye(rows), direction[None])
        assert len(memory) == rows
    else:
        v = torch.linalg.svd(moved, full_matrices=False)[2][:1]
        expected = torch.kron(torch.eye(rows), v)
        assert len(memory) > rows
    assert torch.allclose(expected @ memory.T @ memory, expected, atol=1e-4)
    save_memory(memory, tmp_path)
    assert torch.equal(read_memory(tmp_path), memory)


def test_a_memory_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_memory(torch.eye(2, 5), tmp_path)
    with refused("remembers a prompt of 5 trained numbers", error=RecipeError):
        train(small(), parts=parts_with(tmp_path))


def test_gradients_are_those_of_margins() -> None:
    made = small(dtype=torch.float64)
    target, start = made.sequencer.target, {"span": made.start}
    theta = {"span": torch.zeros_like(made.start)}
    found = margin_gradients(made.model, Free(), target, theta, start, made.sequences[:2])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(made.start.shape, generator=generator, dtype=torch.float64)
    there, back = (
        margins(
            made.model, target, Free().prompt({"span": s * direction}, start), made.sequences[:2]
        )
        for s in (1e-4, -1e-4)
    )
    assert torch.allclose(found @ direction.flatten(), (there - back) / 2e-4, rtol=1e-5)


# ----------------------------------------------------------------------------------- what it is for


def test_an_earlier_task_is_remembered(tmp_path: Path) -> None:
    """Acceptance check (c): two tasks of other inputs, compared at equal accuracy on the second."""
    made = small("qwen2", rows=24, tie=False, template=LONG)
    kept: dict[Path | None, list[float]] = {None: [], tmp_path: []}
    for seed in (0, 1, 2):
        labels = random.Random(seed)
        rows = [dataclasses.replace(s, gold=labels.randrange(2)) for s in made.sequences]
        first, second = rows[:12], rows[12:]
        training = Training(steps=30, batch_size=12, seed=seed)
        learned = refine(made, first, training, parts_with(None, optimizer=TOY)).prompt.rows
        assert accuracy(made, learned, first) > 0.9
        save_memory(memory_of(made, learned, first), tmp_path)
        for folder, found in kept.items():
            trace: list[tuple[float, float]] = []

            def note(state: Checkpoint, trace: Any = trace, parts: Any = (first, second)) -> None:
                (now,) = Free().prompt(state.theta, {"span": made.start}).values()
                trace.append((accuracy(made, now, parts[0]), accuracy(made, now, parts[1])))

            longer = dataclasses.replace(training, steps=20, evaluate_every=4)
            parts = parts_with(folder, optimizer=TOY)
            refine(made, second, longer, parts, warm_start={"span": learned}, keep=note)
            found.append(next(old for old, new in trace if new > 0.9))
    assert fmean(kept[tmp_path]) > fmean(kept[None]) + 0.08


def refine(
    made: Kit, rows: Sequence[TokenSequence], training: Training, parts: Parts, **options: Any
) -> Refinement:
    return optimize(made.model, made.sequencer, rows, training=training, parts=parts, **options)


@torch.no_grad()
def accuracy(made: Kit, rows: Tensor, sequences: Sequence[TokenSequence]) -> float:
    found = margins(made.model, made.sequencer.target, {"span": rows}, sequences)
    return (found > 0).double().mean().item()
