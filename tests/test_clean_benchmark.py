"""The sums of `benchmarks.clean`: AUC, confident learning, and the differences over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.clean import auc, confident, recipe_of, summarize, write_rows
from embedgrad.recipe.build import read_data

pytestmark = pytest.mark.harness


def test_auc_counts_pairs() -> None:
    assert auc([1, 0, 0, 1], [3.0, 1.0, 2.0, 2.0]) == pytest.approx(3.5 / 4)


def test_confident_learning_corrects_for_a_class_that_is_never_sure() -> None:
    shares = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45], [0.85, 0.15]])
    scores = confident([0, 0, 1, 1, 1], shares)
    # The last row is the class 0 that others are; those of class 1 are never sure of it.
    assert scores.argmax() == 4
    assert scores[2] < 0 < scores[4]


def test_labels_are_flipped_in_train_alone(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"text": f"{split} text {i}", "label": i % 2} for i in range(60)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    write_rows(tmp_path, tmp_path / "out", 0, 40, 30)
    splits = read_data(recipe_of(tmp_path / "out"))
    true = ("negative", "positive")
    for name in ("train", "dev", "test"):
        for example in getattr(splits, name):
            right = true[int(example.columns["text"].split()[-1]) % 2]
            assert (example.answer != right) is (example.columns["flipped"] == "1")
    flips = sum(example.columns["flipped"] == "1" for example in splits.train)
    assert 4 <= flips <= 20
    assert len(splits.train) == 40


def test_differences_are_seed_by_seed() -> None:
    def row(method: str, seed: int, **scores: float) -> dict[str, Any]:
        return {"method": method, "seed": seed, **scores}

    found = summarize(
        {
            "a": row("none", 0, accuracy=0.5),
            "b": row("loss", 0, auc=0.7, accuracy=0.6),
            "c": row("hypergradient", 0, auc=0.8, accuracy=0.7),
            "d": row("hypergradient", 1, auc=0.6, accuracy=0.9),
        }
    )
    assert found["hypergradient"]["auc"] == pytest.approx(0.7)
    assert found["hypergradient"]["auc_over_loss"] == [pytest.approx(0.1)]
    assert found["hypergradient"]["accuracy_over_none"] == [pytest.approx(0.2)]
    assert "auc" not in found["none"]
