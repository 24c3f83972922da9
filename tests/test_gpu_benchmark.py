"""The benchmark for one GPU, with tiny weights on the CPU: its rows, its time, its refusals."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]  # as `python -m` has it

from benchmarks import gpu  # noqa: E402
from benchmarks.speed import peers, scoring, steps, workloads  # noqa: E402
from benchmarks.speed.bench import Bench  # noqa: E402

pytestmark = pytest.mark.harness

SHAPES = {
    letter: replace(
        shape, query=9, prompt=min(shape.prompt, 6), answer=min(shape.answer, 4), batch=3
    )
    for letter, shape in workloads.SHAPES.items()
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (steps, scoring):
        monkeypatch.setattr(module, "SHAPES", SHAPES)
    monkeypatch.setattr(steps, "matmul_rate", lambda like: 1e9)
    monkeypatch.setattr(scoring, "NEW_TOKENS", 5)
    monkeypatch.setattr(Bench, "pairs", lambda self, count: 1)


def measure(out: Path, seconds: float = 6000.0) -> list[dict[str, Any]]:
    gpu.measure("tiny", gpu.TINY["tiny"], out, seconds, rehearse=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    return rows


def test_every_workload_has_a_row_beside_every_peer_and_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    rows = measure(out)
    trained = {(letter, kind.name) for letter in "ABC" for kind in peers.TRAINING}
    assert {(row["workload"], row["peer"]) for row in rows} == trained | {
        ("G", "transformers-generate")
    }
    for row in rows:
        assert row["model"] == "tiny"
        assert (row["pairs"], row["ratio"] > 0) == (1, True)
        if row["workload"] != "G":
            assert row["same_gradient"]
            assert 0 < row["gradient_difference"] < 0.1  # of two bf16 computations
    with monkeypatch.context() as patch:  # where it is interrupted it goes on
        patch.setattr(steps, "against", None)
        assert measure(out) == rows
    values = json.loads(out.read_text())
    values["rows"] = [row for row in rows if row["workload"] != "B"]
    out.write_text(json.dumps(values))
    assert {row["workload"] for row in measure(out)} == {"A", "B", "C", "G"}
    assert "reached" not in json.loads(out.read_text())  # those targets are of another model


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_workload_ends_with_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "synthetic_rows", lambda *_: time.sleep(60))
    began = time.monotonic()
    rows = measure(tmp_path / "gpu.json", 8)
    assert time.monotonic() - began < 40
    assert {row["workload"] for row in rows} <= {"G"}
    assert "tiny, A: out of time" in capsys.readouterr().out


def test_sizes_are_those_of_qwen() -> None:
    billions = {}
    for size, shape in gpu.SIZES.items():
        with torch.device("meta"):
            made = Qwen2ForCausalLM(gpu.configuration(size, shape))
        billions[size] = round(sum(p.numel() for p in made.parameters()) / 1e9, 2)
    assert billions == {"0.5B": 0.49, "1.5B": 1.54, "7B": 7.62, "14B": 14.77}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["3B"], "unknown: 3B; known: 0.5B, 1.5B, 7B, 14B"),
        (["--rehearse"], "a rehearsal is no result"),
        (["0.5B"], "no GPU; --rehearse runs tiny weights on the CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert told in capsys.readouterr().err
