"""A whole run: what it leaves, that its numbers are right, and that they come back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import embedgrad as package
from embedgrad import Recipe, RecipeError, RunError, load, run
from embedgrad.parts.scorers import Number
from refusals import refused
from run_kit import CHOICES, PROMPT, ROWS, Command, values

pytest_plugins = ["tiny_runs"]

Finished = tuple[Path, dict[str, Any]]
Write = Callable[..., Path]

SCORES = ("text", "refined", "difference", "test_rows")
PROMISED = (
    "text.accuracy",
    "text.interval",
    "refined.accuracy",
    "refined.interval",
    "difference.accuracy",
    "difference.interval",
    "difference.p_value",
    "test_rows",
    "drift.mean",
    "drift.max",
    "cosine.mean",
    "cosine.min",
    "nearest_tokens_unchanged",
    "train.steps",
    "train.seconds",
    "peak_memory_bytes",
    "threads",
    "prefix_cache.hits",
)


def stored(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def predictions(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "prompt" / "prompt.safetensors")["rows"]


@pytest.fixture(scope="module")
def elsewhere(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same recipe as `finished`, run by the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(values(model_folder, data)), "utf-8")
    command = ["-m", "embedgrad", "optimize", str(recipe), "--out", str(folder / "run"), "--json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return folder / "run", json.loads(done.stdout)


# -- what a run leaves -----------------------------------------------------------------------------


def test_the_folder_holds_what_is_promised_and_nothing_else(elsewhere: Finished) -> None:
    folder, _ = elsewhere
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "recipe.toml",
        "events.jsonl",
        "predictions.jsonl",
        "result.json",
        "prompt/prompt.json",
        "prompt/prompt.safetensors",
        "check_rows.jsonl",
        *(f"checkpoint/step-00000{step}/checkpoint.json" for step in (3, 6)),
        *(f"checkpoint/step-00000{step}/checkpoint.safetensors" for step in (3, 6)),
    }


def test_the_result_holds_every_promised_number(finished: Finished) -> None:
    folder, result = finished
    assert result["artifact"] == str(folder / "prompt")
    found = stored(folder / "result.json")
    assert found == json.loads(json.dumps({**result, "artifact": "prompt"}))
    for path in PROMISED:
        value: Any = result
        for name in path.split("."):
            value = value[name]
        numbers = value if isinstance(value, list | tuple) else [value]
        assert all(isinstance(number, int | float) for number in numbers), path
    assert result["test_rows"] == ROWS["test"]
    assert result["train"]["steps"] == 6
    assert result["train"]["seconds"] > 0
    assert result["prefix_cache"]["hits"] > 0
    assert result["peak_memory_bytes"] > 2**24
    assert result["interrupted"] is False
    assert 0 < result["drift"]["mean"] <= result["drift"]["max"] <= 0.3 + 1e-5
    assert 1 - 0.3**2 / 2 - 0.01 < result["cosine"]["min"] <= result["cosine"]["mean"] < 1
    assert 0 <= result["nearest_tokens_unchanged"] <= 1


def test_the_saved_recipe_is_the_one_that_was_run(
    finished: Finished, model_folder: Path, data: Path
) -> None:
    assert Recipe.read(finished[0] / "recipe.toml") == Recipe.from_dict(values(model_folder, data))


def test_the_predictions_add_up_to_the_scores(finished: Finished, data: Path) -> None:
    folder, result = finished
    rows = predictions(folder)
    lines = (data / "test.jsonl").read_text("utf-8").splitlines()
    assert sorted(row["source"] for row in rows) == sorted(
        f"test.jsonl:{n}" for n in range(1, ROWS["test"] + 1)
    )
    for row in rows:
        raw = json.loads(lines[int(row["source"].rpartition(":")[2]) - 1])
        assert (row["columns"], row["answer"]) == (raw, raw["label"])
        right = {name: row[name]["predicted"] == row["answer"] for name in ("text", "refined")}
        changes = {(False, True): "fixed", (True, False): "broken"}
        assert row["change"] == changes.get((right["text"], right["refined"]), "same")
        for name in ("text", "refined"):
            assert row[name]["correct"] == right[name]
            shares = row[name]["probabilities"]
            assert list(shares) == CHOICES
            assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
            assert row[name]["predicted"] == max(shares, key=shares.__getitem__)
    for name in ("text", "refined"):
        mean = sum(row[name]["correct"] for row in rows) / len(rows)
        assert result[name]["accuracy"] == mean
        loss = sum(row[name]["loss"] for row in rows) / len(rows)
        assert result[name]["log_loss"] == pytest.approx(loss)
    gain = result["refined"]["accuracy"] - result["text"]["accuracy"]
    assert result["difference"]["accuracy"] == pytest.approx(gain)
    for change in ("fixed", "broken"):
        assert result["difference"][change] == sum(row["change"] == change for row in rows)


def test_the_artifact_says_where_it_comes_from(
    finished: Finished, model_folder: Path, data: Path
) -> None:
    folder, result = finished
    prompt = stored(folder / "prompt" / "prompt.json")
    assert (prompt["format"], prompt["version"]) == ("embedgrad-prompt", 2)
    (span,) = prompt["spans"]
    assert span["text"] == PROMPT
    assert len(span["token_ids"]) == len(span["tokens"]) == prompt["rows"]["count"]
    assert prompt["template"]["messages"][0]["content"].endswith(f"[[{PROMPT}]]")
    assert prompt["rows"]["space"] == "inputs_embeds"
    model = prompt["model"]
    assert model["name"] == str(model_folder)
    assert {"revision", "kind", "license", "gguf_sha256", "fits_revisions"} <= model.keys()
    assert (model["dtype"], model["embedding_scale"], model["width"]) == ("float32", 1.0, 32)
    assert model["embedding_digest"].startswith("sha256:")
    assert prompt["recipe"] == Recipe.read(folder / "recipe.toml").as_dict()
    for split, count in ROWS.items():
        entry = prompt["data"][split]
        assert (entry["rows"], entry["source"]) == (count, f"{split}.jsonl")
        assert len(entry["sha256"]) == 64
    assert prompt["licenses"].keys() == {"model", "data"}
    assert prompt["decoding"] == {"do_sample": False, "max_new_tokens": 256, "stop": []}
    assert prompt["versions"].keys() == {
        "python",
        "embedgrad",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
    }
    assert prompt["scores"] == {name: stored(folder / "result.json")[name] for name in SCORES}
    assert prompt["training"]["best_step"] == result["train"]["best_step"]
    assert [entry["step"] for entry in prompt["training"]["dev_history"]] == [0, 3, 6]
    assert "path" not in model


def test_the_events_tell_the_run(elsewhere: Finished) -> None:
    lines = (elsewhere[0] / "events.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["event"] == "evaluation"] == [0, 3, 6]
    assert {e["which"] for e in events if e["event"] == "scoring"} == {
        "text prompt",
        "refined prompt",
    }
    assert any("24 train rows" in e["text"] for e in events if e["event"] == "note")


# -- the numbers are right, and come back ----------------------------------------------------------


@torch.no_grad()
def test_the_text_prompt_scores_as_in_plain_transformers(
    finished: Finished, model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    folder, result = finished
    right = 0
    for row in predictions(folder):
        user = f"Review: {row['columns']['review']}\n\n{PROMPT}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = []
        for choice in CHOICES:
            ids = tokenizer(text + choice, add_special_tokens=False)["input_ids"]
            assert ids[: len(context)] == context
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(context) - 1 : -1]
            chosen = torch.tensor(ids[len(context) :])
            scores.append(torch.log_softmax(logits, 1)[torch.arange(len(chosen)), chosen].sum())
        shares = torch.softmax(torch.stack(scores), 0)
        named = dict(zip(CHOICES, shares.tolist(), strict=True))
        assert row["text"]["probabilities"] == pytest.approx(named, abs=1e-5)
        right += CHOICES[int(shares.argmax())] == row["answer"]
    assert result["text"]["accuracy"] == right / ROWS["test"]


def test_evaluating_in_another_process_gives_the_same_scores_exactly(
    elsewhere: Finished, embedgrad: Command
) -> None:
    folder, result = elsewhere
    again = embedgrad("evaluate", folder, "--json").json
    assert {name: again[name] for name in SCORES} == {name: result[name] for name in SCORES}
    assert again["split"] == "test"


def test_the_same_seed_gives_the_same_rows_in_two_processes(
    finished: Finished, elsewhere: Finished
) -> None:
    assert torch.equal(rows_of(finished[0]), rows_of(elsewhere[0]))
    for name in SCORES:
        assert json.loads(json.dumps(finished[1][name])) == elsewhere[1][name]


def test_another_seed_gives_other_rows(
    finished: Finished, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run(Recipe.from_dict(values(model_folder, data, training={"seed": 1})), tmp_path / "run")
    assert not torch.equal(rows_of(finished[0]), rows_of(tmp_path / "run"))


def test_a_run_may_be_moved_and_its_data_too(
    finished: Finished, data: Path, embedgrad: Command, tmp_path: Path
) -> None:
    folder, result = finished
    moved, rows = tmp_path / "moved", tmp_path / "rows"
    shutil.copytree(folder, moved)
    shutil.copytree(data, rows)
    settings = [f"data.{split}={rows}/{split}.jsonl" for split in ROWS]
    sets = [part for setting in settings for part in ("--set", setting)]
    again = embedgrad("evaluate", moved, "--json", *sets).json
    assert {name: again[name] for name in SCORES} == json.loads(
        json.dumps({name: result[name] for name in SCORES})
    )
    inspected = embedgrad("inspect", moved, "--json", *sets)
    assert inspected.json["measured_on_rows"] == ROWS["dev"]
    for path in moved.rglob("*.*"):
        if path.name != "result.json" and path.suffix != ".safetensors":
            assert str(folder) not in path.read_text("utf-8"), path.name


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_split_can_be_evaluated(split: str, finished: Finished, embedgrad: Command) -> None:
    found = embedgrad("evaluate", finished[0], "--split", split, "--json").json
    assert (found["test_rows"], found["split"]) == (ROWS[split], split)


def test_dev_scores_are_those_of_training(finished: Finished, embedgrad: Command) -> None:
    folder, result = finished
    history = stored(folder / "prompt" / "prompt.json")["training"]["dev_history"]
    best = next(e for e in history if e["step"] == result["train"]["best_step"])
    found = embedgrad("evaluate", folder, "--split", "dev", "--json").json
    for name, expected in (("text", history[0]), ("refined", best)):
        assert found[name]["accuracy"] == expected["accuracy"]
        assert found[name]["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-5)


def test_python_does_the_same_in_a_few_lines(
    finished: Finished, model_folder: Path, data: Path
) -> None:
    """The building blocks by hand give the rows of the recipe."""
    recipe = Recipe.read(finished[0] / "recipe.toml")
    splits = package.read_splits(
        *(str(data / f"{split}.jsonl") for split in ROWS),
        columns=recipe.template.columns,
        answer="label",
        choices=CHOICES,
    )
    model = package.load_model(str(model_folder), device="cpu")
    sequencer = model.sequencer(recipe.template, recipe.target, splits.train)
    refinement = package.optimize(
        model,
        sequencer,
        sequencer.build(splits.train),
        sequencer.build(splits.dev),
        training=package.Training(epochs=2, batch_size=8),
        parts=recipe.parts,
    )
    assert torch.equal(refinement.prompt.rows, rows_of(finished[0]))
    loaded = package.load(finished[0])
    assert torch.equal(loaded.rows, refinement.prompt.rows)


# -- other kinds of runs ---------------------------------------------------------------------------


def test_free_answers_are_scored_by_their_numbers(generated: Path, embedgrad: Command) -> None:
    result, rows = stored(generated / "result.json"), predictions(generated)
    assert result["test_rows"] == len(rows) == 6
    assert result["text"]["macro_f1"] is None
    scorer = Number()
    for name in ("text", "refined"):
        right = [scorer.score(row[name]["predicted"], row["answer"]) for row in rows]
        assert [row[name]["correct"] for row in rows] == right
        assert result[name]["accuracy"] == sum(right) / len(rows)
        assert all(row[name]["probabilities"] is None for row in rows)
        assert result[name]["log_loss"] > 0
    again = embedgrad("evaluate", generated, "--json").json
    assert {name: again[name] for name in SCORES} == {name: result[name] for name in SCORES}
    assert stored(generated / "prompt" / "prompt.json")["decoding"]["max_new_tokens"] == 4


def test_rows_that_may_have_been_trained_on_are_told(generated: Path, embedgrad: Command) -> None:
    told = "it may have been trained on rows that are scored here"
    for setting, other in (("data.seed=3", True), ("data.limit.test=3", False)):
        done = embedgrad("evaluate", generated, "--set", setting)
        assert (done.code, told in done.err) == (0, other)


def test_training_metric_of_free_answers_is_their_log_loss(generated: Path) -> None:
    training = stored(generated / "prompt" / "prompt.json")["training"]
    losses = {entry["step"]: entry["log_loss"] for entry in training["dev_history"]}
    assert training["best_step"] == min(losses, key=losses.__getitem__)


def test_a_run_without_dev_and_test_rows_keeps_the_last_rows(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(data={"dev_share": 0, "test_share": 0})
    sets = ["--set", "data.dev=", "--set", "data.test="]
    done = embedgrad("optimize", path, "--out", tmp_path / "run", *sets)
    assert done.code == 0, done.err
    assert "no test rows were scored" in done.out
    result = stored(tmp_path / "run" / "result.json")
    assert result["train"]["best_step"] == result["train"]["steps"] == 6
    assert not set(SCORES) & result.keys()
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    refused = embedgrad("evaluate", tmp_path / "run", "--quiet")
    assert (
        refused.err == "error: --split test: the recipe leaves it no rows; choose another split\n"
    )
    assert embedgrad("evaluate", tmp_path / "run", "--split", "train").code == 0


def test_no_budget_for_prefixes_changes_nothing_but_the_hits(
    finished: Finished, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, prefix_cache={"budget": 0}))
    result = run(recipe, tmp_path / "run")
    assert result["prefix_cache"]["hits"] == 0
    torch.testing.assert_close(
        rows_of(tmp_path / "run"), rows_of(finished[0]), rtol=1e-4, atol=1e-5
    )


def test_a_scorer_that_fails_at_the_end_loses_nothing(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RecipeError("recipe", ["evaluation.scorer: checks:right took longer than 5 s"])

    monkeypatch.setattr("embedgrad.experiments.finish.evaluate", fails)
    out = tmp_path / "run"
    with refused(
        "took longer than 5 s", f"{out / 'prompt'} holds the refined prompt", error=RunError
    ):
        run(Recipe.from_dict(values(model_folder, data, training={"steps": 1})), out)
    assert load(out / "prompt").rows.isfinite().all()
