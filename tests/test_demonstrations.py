"""`[demonstrations]`: runs whose span is filled with worked examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from embedgrad import Recipe, run
from embedgrad.errors import DataError, RecipeError, RunError
from embedgrad.events import quiet
from embedgrad.experiments.baselines import METHODS, Task, calibration, frozen_features, lora
from embedgrad.experiments.baselines.prompting import answer_as_text
from embedgrad.experiments.compare.compare import plan_parts
from embedgrad.experiments.plan import plan
from embedgrad.prompt import artifact
from embedgrad.prompt.worked_examples import with_examples
from embedgrad.recipe.build import prepare
from embedgrad.recipe.open_run import open_run
from embedgrad.training.demonstrations import (
    Demonstrations,
    LeaveOut,
    check_length,
    demonstrate,
    draw,
)
from kit import LABELS, PLACEMENTS, kit
from run_kit import Command, values

pytest_plugins = ["tiny_runs"]


@pytest.fixture
def shown(model_folder: Path, data: Path) -> Callable[..., Recipe]:
    def made(**sections: Any) -> Recipe:
        sections = {"demonstrations": {"k": 2, "drop": 0.1}, **sections}
        return Recipe.from_dict(values(model_folder, data, **sections))

    return made


def test_a_run_refines_its_demonstrations_and_compares_with_few_shot(
    shown: Callable[..., Recipe], tmp_path: Path, embedgrad: Command
) -> None:
    recipe, folder = shown(), tmp_path / "run"
    result = run(recipe, folder, quiet)
    ready = prepare(recipe, None, quiet)
    examples = list(ready.splits.train)
    drawn = [examples[i] for i in draw(examples, 2, seed=0)]
    assert {example.answer for example in drawn} == {"negative", "positive"}
    assert result["demonstrations"]["sources"] == [example.source for example in drawn]
    prompt = artifact.load(folder)
    (out,) = ready.parts.augmentations
    assert isinstance(out, LeaveOut)
    assert sorted(source for source, _ in out.own) == sorted(e.source for e in drawn)
    # A user's message and the answer for each, then the instruction.
    assert len(prompt.spans) == len(result["spans"]) == 5
    for number, example in enumerate(drawn):
        assert example.columns["review"] in prompt.spans[2 * number].text
        assert prompt.spans[2 * number + 1].text == example.answer
    assert (prompt.drift > 0).any() or not result["train"]["best_step"]
    # The text prompt that it is compared with is few-shot prompting's, to the token.
    few = with_examples(recipe.template, recipe.target, [(e.columns, e.answer) for e in drawn])
    plain = ready.model.sequencer(few, recipe.target, examples)
    for one, other in zip(ready.test, plain.build(ready.splits.test), strict=True):
        assert one.context(prompt.prompt_ids) == other.context(plain.prompt_ids)
    opened = open_run(folder)
    assert opened.recipe.template == prompt.template
    told = embedgrad("evaluate", folder)
    assert told.code == 0
    line = "2 rows of train are demonstrations in the prompt: these are scored with their own"
    assert line not in told.err
    assert line in embedgrad("evaluate", folder, "--split", "train").err
    assert embedgrad("resume", folder).out.count("the few-shot prompt with the same") == 1
    assert embedgrad("report", folder, "--no-model").code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "the few-shot prompt with the same" in page


def test_an_interrupted_run_resumes_to_the_same_rows(
    shown: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = shown(demonstrations={"k": 2, "drop": 0.3}, training={"steps": 4, "evaluate_every": 1})
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, metric="log_loss")
    )
    run(recipe, tmp_path / "whole", quiet)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    assert run(recipe, tmp_path / "cut", quiet, should_stop=should_stop)["interrupted"]
    run(recipe, tmp_path / "cut", quiet, resume=True)
    undropped = dataclasses.replace(recipe, demonstrations=Demonstrations(k=2, drop=0.0))
    run(undropped, tmp_path / "undropped", quiet)
    folders = [tmp_path / name for name in ("whole", "cut", "undropped")]
    whole, cut, other = map(artifact.load, folders)
    assert torch.equal(whole.rows, cut.rows)
    assert not torch.equal(whole.rows, other.rows)
    assert torch.equal(whole.start_rows, other.start_rows)
    assert not torch.equal(whole.rows, whole.start_rows)
    with pytest.raises(RunError, match="template of the recipe is not the one"):
        open_run(tmp_path / "cut", ['template.user="{review} [[Good?]]"', "template.messages="])


def test_what_cannot_be_shown_is_one_line(shown: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"demonstrations\.k: 99, but train has 24 different"):
        run(shown(demonstrations={"k": 99}), tmp_path / "run", quiet)
    with pytest.raises(RecipeError, match=r"demonstrations\.drop"):
        shown(demonstrations={"k": 2, "drop": 1.0})
    sampled = {"objective": {"name": "reward"}, "target": {"choices": []}}
    with pytest.raises(RecipeError, match=r"demonstrations\.k: the objective samples answers"):
        shown(**sampled)
    free = {"target": {"choices": []}, "solutions": {"source": "self-written"}}
    with pytest.raises(DataError, match=r"demonstrations\.k: .* answers in view"):
        run(shown(**free), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
    unlabelled = [dataclasses.replace(example, answer="") for example in tiny.reviews(6)]
    with pytest.raises(DataError, match=r"demonstrations\.k: 2, but .* has no answer to show"):
        demonstrate(PLACEMENTS["user-after"], LABELS, unlabelled, Demonstrations(k=2))


def test_demonstrations_longer_than_the_context_say_so() -> None:
    examples = tiny.reviews(6)
    made = demonstrate(PLACEMENTS["user-after"], LABELS, examples, Demonstrations(k=2))
    sequencer = kit(template=made.template, rows=examples).sequencer
    length = len(sequencer.prompt_ids) - len(sequencer.spans[-1].ids)
    sequencer.context = length + 1
    check_length(made, sequencer)
    sequencer.context = length
    message = rf"demonstrations\.k: 2 demonstrations take {length} tokens, \d+ of them reviews"
    with pytest.raises(DataError, match=message):
        check_length(made, sequencer)


def test_a_plan_counts_the_demonstrations(shown: Callable[..., Recipe]) -> None:
    found = plan(shown(), measure=False, report=quiet)
    assert found["problems"] == []
    assert len(found["spans"]) == 5
    alone = plan(shown(demonstrations={"k": 0}), measure=False, report=quiet)
    assert found["tokens"]["prompt"] > 2 * alone["tokens"]["prompt"]


def test_a_comparison_leaves_out_what_has_no_meaning_then(shown: Callable[..., Recipe]) -> None:
    parts, skipped = plan_parts(shown())
    assert skipped["few-shot"] == "the text prompt shows 2 demonstrations already"
    assert "demonstrations are spans too" in skipped["random-init"]
    assert {"text", "embedgrad", "peft-lora"} <= {part.method for part in parts}


def test_no_method_learns_from_a_row_with_its_own_answer_in_view(
    shown: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(shown(), None, quiet)
    (out,) = ready.parts.augmentations
    assert isinstance(out, LeaveOut)
    parts, training = ready.parts, dataclasses.replace(ready.training, steps=1, batch_size=24)
    recipe = dataclasses.replace(shown(), training=training, parts=parts)
    rows = (ready.sequencer, ready.train, ())
    task = Task(recipe, ready.model, *rows, quiet)
    assert len(task.learned) == len(task.train) == 24
    own = [i for i, row in enumerate(task.learned) if row.rows is not None]
    answers = {e.columns["review"]: e.answer for e in ready.demonstrations}
    assert [task.train[i].example.columns["review"] for i in own] == [
        s.example.columns["review"] for s in task.train if s.example.columns["review"] in answers
    ]
    read: dict[str, list[Any]] = {}
    plain = frozen_features.question_ids

    def ids(task: Task, sequence: Any) -> Any:
        found = plain(task, sequence)
        read.setdefault(sequence.example.source, []).append(found)
        return found

    for module in (frozen_features, lora):
        monkeypatch.setattr(module, "question_ids", ids)
    for name in ("threshold", "batch-calibration", "linear-probe", "knn", "peft-lora"):
        METHODS[name].train(task, 0)
    assert {len(lines) for lines in read.values()} == {3}  # the probe, knn and LoRA
    text = ready.model.tokenizer.decode
    for i in own:
        example = task.train[i].example
        review = example.columns["review"]
        assert text(ready.sequencer(example).context(ready.sequencer.prompt_ids)).count(review) == 2
        assert {text(line).count(review) for line in read[example.source]} == {1}
    # The scores that calibrate are those of the text prompt without the row's own demonstration.
    scored = answer_as_text(task, task.sequencer, task.learned).answered
    seen = answer_as_text(task, task.sequencer, task.train).answered
    pairs = list(zip(scored, seen, strict=True))
    assert [i for i, (a, b) in enumerate(pairs) if abs(a.loss - b.loss) > 1e-5] == own
    given: list[Any] = []
    monkeypatch.setattr(
        calibration,
        "answer_as_text",
        lambda t, s, rows: given.append(rows) or answer_as_text(t, s, rows),
    )
    METHODS["threshold"].train(task, 0)
    assert list(given[0]) == list(task.learned)
