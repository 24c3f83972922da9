"""The learning curves of causal judgement: held-out stories, and the rows that are scored."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from embedgrad import LanguageModel
from embedgrad.data.examples import Example

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m` has it

from benchmarks import causal

pytestmark = pytest.mark.harness

EXAMPLES = [
    Example({"question": f"Did number {i} do it?"}, ("No", "Yes")[i % 2], f"a:{i}", str(i // 2))
    for i in range(12)
]


def test_a_story_is_held_out_whole_and_once() -> None:
    parts = causal.folds(EXAMPLES)
    assert sorted(i for part in parts for i in part) == list(range(len(EXAMPLES)))
    stories = [{EXAMPLES[i].group for i in part} for part in parts]
    assert len(stories) == causal.FOLDS
    assert sum(map(len, stories)) == len(set.union(*stories))


def test_rows_are_averaged_over_steps_and_over_seeds() -> None:
    paths = [[torch.full((1, 2), float(n)) for n in numbers] for numbers in ((1, 3), (5, 11))]
    found = {place: rows[0, 0].item() for place, rows in causal.candidates(paths, 2).items()}
    assert found == {
        (1, "last"): 1, (1, "average"): 1, (1, "soup"): 3,
        (2, "last"): 3, (2, "average"): 2, (2, "soup"): 5,
    }  # fmt: skip


@pytest.mark.parametrize("radius", [0.1, 0.3])
def test_a_variant_gives_a_curve_that_stays_in_its_region(
    radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    candidates = causal.candidates

    def watched(
        paths: list[list[torch.Tensor]], epochs: int
    ) -> dict[tuple[int, str], torch.Tensor]:
        seen.extend(paths)
        return candidates(paths, epochs)

    monkeypatch.setattr(causal, "candidates", watched)
    model = LanguageModel(tiny.loaded())
    variant = replace(causal.VARIANTS["recipe"], radius=radius, epochs=2, seeds=(0, 1))
    found = causal.measure("recipe", variant, model, EXAMPLES)
    points = [(point["epoch"], point["rows"]) for point in found["curves"]]
    assert points == [(e, kind) for e in (1, 2) for kind in ("last", "average", "soup")]
    rows = found["rows"]
    for point in found["curves"]:
        gain = rows * (point["accuracy"] - found["text"]["accuracy"])
        assert point["fixed"] - point["broken"] == pytest.approx(gain)
    assert len(seen) == causal.FOLDS * 2
    assert all(len(path) == 2 for path in seen)  # steps: the rest of the rows fits into a batch
    ids = model.sequencer(
        causal.eg.Template.chat(user=f"{{question}}\n\n[[{causal.SHORT}]]"),
        causal.eg.Target(choices=("No", "Yes")),
        EXAMPLES,
    ).span.ids
    start = model.embed(ids)
    far = (seen[0][-1] - start).norm(dim=1) / start.norm(dim=1)
    assert 0 < far.max() <= radius * (1 + 1e-5)
