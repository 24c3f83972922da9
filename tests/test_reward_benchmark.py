"""Reward training on word problems: a start, and LoRA by the same reward from there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m` has it

from benchmarks import reward
from run_kit import save_model, write_jsonl

pytestmark = pytest.mark.harness


def test_lora_is_trained_by_the_reward_from_the_start_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "svamp").mkdir()
    for split, rows in (("train", 20), ("dev", 4), ("test", 5)):
        lines = [
            {
                "question": f"What is {split} {i} + {i}?",
                "answer": str(2 * i),
                "equation": f"{i}+{i}",
            }
            for i in range(rows)
        ]
        write_jsonl(tmp_path / "svamp" / f"{split}.jsonl", lines)
    monkeypatch.setattr(reward, "MODEL", str(save_model(tmp_path / "tiny")))
    monkeypatch.setattr(reward, "RESULT", tmp_path / "reward.json")
    monkeypatch.setattr(reward, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reward, "svamp_equations", lambda data: data)

    def measure(*options: str) -> dict[str, Any]:
        stages = ["--stages", "start,lora", "--seeds", "0", "--steps", "1"]
        arguments = ["reward", "--data", str(tmp_path), *stages, *options]
        monkeypatch.setattr(sys, "argv", arguments)
        reward.main()
        found: dict[str, Any] = json.loads((tmp_path / "reward.json").read_text())
        return found

    row = measure()["rows"]["lora 0.0003, seed 0"]
    assert row["settings"]["learns"] == "its own answers, by the recipe's objective"
    assert row["steps"] == 1
    assert [score["step"] for score in row["dev_history"]] == [0, 1]
    measure("--lora-rate", "0.001")
    found = measure("--test")
    assert list(found["rows"]) == ["start, seed 0", "lora 0.0003, seed 0", "lora 0.001, seed 0"]
    assert list(found["test"]) == ["text", "start, seed 0", "lora 0.0003, seed 0"]
    assert all(len(scored["correct"]) == 5 for scored in found["test"].values())
    assert "p_value" in found["test"]["lora 0.0003, seed 0"]
