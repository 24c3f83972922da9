"""A standard harness on a vocabulary export: it finds the accuracy that we report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import export_kit
import tiny
from embedgrad import Recipe
from embedgrad import run as embedgrad_run
from embedgrad.deploy.export import export
from embedgrad.deploy.query import query_of
from embedgrad.deploy.verify import parity as checks
from embedgrad.prompt import artifact
from embedgrad.recipe.build import read_data
from embedgrad.recipe.open_run import open_run
from kit import noisy
from run_kit import ROWS, values, write_jsonl

pytestmark = pytest.mark.slow

# One plain question per line; the export's chat template holds the prompt.
TASK = """
task: plain_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: {choices}
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_lm_eval_finds_our_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "GREEDY_TOKENS", 4)
    model = export_kit.save_base(tmp_path / "model")
    rows = [dict(e.columns) for e in {e.columns["review"]: e for e in tiny.reviews(160)}.values()]
    # A random model has one favorite among two words: many labels of one letter give it a choice.
    letters = "abcdefgh"
    rows = [{**row, "label": letters[i % len(letters)]} for i, row in enumerate(rows)]
    for split, count in {**ROWS, "test": 40}.items():
        write_jsonl(tmp_path / f"{split}.jsonl", rows[:count])
        rows = rows[count:]
    recipe = values(model, tmp_path, target={"choices": list(letters)}, training={"steps": 1})
    embedgrad_run(Recipe.from_dict(recipe), tmp_path / "run")
    prompt = artifact.load(tmp_path / "run")
    moved = prompt.with_rows(noisy(prompt.start_rows, 0.25, seed=1))
    artifact.save(moved, tmp_path / "run" / "prompt")

    run = open_run(tmp_path / "run")
    examples = read_data(run.recipe).test
    sequences = run.sequencer.build(examples)
    ours = run.evaluator.score(run.prompt.rows, sequences)
    # The gold answers are then those that we predict, but for every fourth row.
    golds = [letters.index(answered.predicted) for answered in ours]
    golds = [(g + 1) % len(letters) if i % 4 == 0 else g for i, g in enumerate(golds)]
    questions = [query_of(run.prompt.template, example.columns) for example in examples]
    asked = [{"query": q, "gold": g} for q, g in zip(questions, golds, strict=True)]
    data = write_jsonl(tmp_path / "asked.jsonl", asked)
    export(tmp_path / "run", "vocabulary", tmp_path / "out")

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = TASK.format(data=json.dumps(str(data)), choices=json.dumps(list(letters)))
    (tasks / "plain_questions.yaml").write_text(task, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'out'},dtype=float32"]
    command += ["--tasks", "plain_questions", "--include_path", str(tasks)]
    command += ["--apply_chat_template", "--output_path", str(tmp_path / "results")]
    here = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **here})
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"]["plain_questions"]
    assert found["acc,none"] == pytest.approx(1 - len(golds[::4]) / len(golds))
