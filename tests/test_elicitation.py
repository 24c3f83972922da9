"""Before training: AUC, the meter on dev rows, its sentence, and where it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from embedgrad import Recipe
from embedgrad.errors import DataError
from embedgrad.evaluation.auc import macro_auc
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.experiments.baselines import METHODS, Task
from embedgrad.experiments.plan import elicitation
from embedgrad.experiments.plan.elicitation import elicit
from embedgrad.experiments.run import run
from embedgrad.prompt.artifact import load
from embedgrad.prompt.sequence import Target
from embedgrad.report.expectation import describe, expect
from embedgrad.report.page.page import run_page
from embedgrad.report.page.run_files import read_run
from kit import LONG_CHOICES, kit
from run_kit import Command, values, write_jsonl
from test_methods import small, task_of

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]


def quiet(event: dict[str, Any]) -> None:
    pass


# -- AUC -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_the_auc_is_mann_whitneys(ties: bool) -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(2, size=60)
    scores = generator.normal(size=60) + gold
    if ties:
        scores = scores.round()
    found = macro_auc([[-s, s] for s in scores.tolist()], gold.tolist())
    assert found is not None
    u = mannwhitneyu(scores[gold == 1], scores[gold == 0]).statistic
    assert found[0] == pytest.approx(u / (gold.sum() * (60 - gold.sum())))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Normal scores one deviation apart: AUC = Phi(1 / sqrt 2).
    truth, held = 0.7602499, 0
    generator = np.random.default_rng(1)
    for _ in range(150):
        gold = np.arange(60) % 2
        scores = generator.normal(size=60) + gold
        found = macro_auc([[-s, s] for s in scores.tolist()], gold.tolist())
        assert found is not None
        held += found[1][0] <= truth <= found[1][1]
    assert 0.87 <= held / 150 <= 0.99


def test_several_choices_are_averaged() -> None:
    gold = [0, 0, 1, 1, 2, 2]
    scores = [[0.9, 0.0, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1], [0, 0.2, 0.8],
              [0.1, 0.1, 0.8]]  # fmt: skip
    found = macro_auc(scores, gold)
    assert found is not None
    # Choice 1: (.1, .7) against (0, .1, .2, .1): 1.5 + 4 + ... of 8 pairs; choice 2 alike.
    first = 1.0
    second = (2 * 0.5 + 1 + 4) / 8
    third = (2 * 0.5 + 2 * 3 + 0) / 8
    assert found[0] == pytest.approx((first + second + third) / 3)
    assert found[1][0] <= found[0] <= found[1][1]
    assert macro_auc([[0.5, 0.5]] * 4, [1] * 4) is None
    same = macro_auc([[0.5, 0.5]] * 8, [0, 1] * 4)
    assert same == (0.5, (0.5, 0.5))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        macro_auc([[float("nan"), 0.0]] * 2, [0, 1])


# -- the sentence ----------------------------------------------------------------------------------


def scored(auc: float | None, low: float, high: float, accuracy: float = 0.6) -> dict[str, Any]:
    interval = None if auc is None else [low, high]
    text = {"accuracy": accuracy, "interval": [0, 1], "auc": auc, "auc_interval": interval}
    return {"rows": 100, "split": "dev", "text": text, "sampled": None}


def drawn(one: float, some: float, form: float = 0.0, accuracy: float = 0.1) -> dict[str, Any]:
    sampled = {"samples": 8, "pass_at": {"1": one, "4": some, "8": some}, "pass_interval": [0, 1]}
    text = {"accuracy": accuracy, "interval": [0, 1], "form": form}
    return {"rows": 48, "split": "dev", "text": text, "sampled": sampled}


@pytest.mark.parametrize(
    ("measured", "kind", "words"),
    [
        (scored(0.476, 0.36, 0.6), "no signal", "carry no signal: AUC 0.48 (0.36 to 0.60)"),
        (scored(0.73, 0.69, 0.77), "signal", "carry signal: AUC 0.73 (0.69 to 0.77), while"),
        (scored(0.2, 0.1, 0.3), "signal", "the wrong way round"),
        (scored(0.6, 0.4, 0.8), "unclear", "too few to tell: AUC 0.60"),
        (scored(0.6, 0.5, 0.74), "no signal", "no signal"),
        (scored(0.99, 0.9, 1.0, accuracy=0.95), "saturated", "right on 95.0 %"),
        (scored(None, 0, 0), "unclear", "the same answer"),
        (scored(0.9, 0.8, 1.0) | {"rows": 9}, "unclear", "9 rows are too few"),
        (drawn(0.05, 0.3), "signal", "pass@8 30.0 % against pass@1 5.0 %"),
        (drawn(0.05, 0.09), "no signal", "no more often"),
        (drawn(0.3, 0.5, form=0.25), "form", "25.0 % of the answers are cut or hold no answer"),
        (drawn(0.3, 0.5, form=0.24), "signal", "pass@8"),
        (drawn(0.3, 0.49, form=0.5), "signal", "pass@8"),
        (drawn(0.9, 1.0, accuracy=0.96), "saturated", "little is left"),
    ],
)
def test_the_sentence_follows_its_rules(measured: dict[str, Any], kind: str, words: str) -> None:
    found, sentence = expect(measured)
    assert (found, words in sentence) == (kind, True), sentence


# -- the meter -------------------------------------------------------------------------------------


def test_choices_are_measured_on_dev_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(rows=30)
    task = replace(
        task_of(made, compare={"shots": 2}), train=made.sequences[:10], dev=made.sequences[10:]
    )
    seen: set[str] = set()
    plain = Evaluator.score

    def spy(self: Evaluator, prompt: Any, sequences: Any, *more: Any) -> Any:
        seen.update(s.example.source for s in sequences)
        return plain(self, prompt, sequences, *more)

    monkeypatch.setattr(Evaluator, "score", spy)
    events: list[dict[str, Any]] = []
    found = elicit(task, events.append)
    dev = {s.example.source for s in task.dev}
    # Demonstrations are tried on one training row to see whether they fit, and never scored.
    assert seen == dev
    assert (found["rows"], found["split"], found["sampled"]) == (20, "dev", None)
    text = METHODS["text"].answer(task, METHODS["text"].train(task, 0), task.dev).answered
    assert found["text"]["accuracy"] == sum(a.correct for a in text) / 20
    shares = [list((a.probabilities or {}).values()) for a in text]
    auc = macro_auc(shares, [s.gold for s in task.dev])
    assert auc is not None
    assert found["text"]["auc"] == pytest.approx(auc[0], abs=1e-6)
    assert found["text"]["form"] is not None
    assert found["few_shot"]["shots"] == 2
    assert found["no_template"]["auc"] != found["text"]["auc"]
    assert (found["expect"], found["sentence"]) == expect(found)
    assert json.loads(json.dumps(found)) == found
    which = {event["which"] for event in events if event["event"] == "scoring"}
    assert which == {"text prompt", "no template", "demonstrations"}


def test_rows_are_bounded_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elicitation, "ROWS", 12)
    made = small(rows=30)
    task = replace(task_of(made), train=made.sequences[:8], dev=made.sequences[8:])
    first, second = (elicit(task, quiet) for _ in range(2))
    assert first["rows"] == 12
    assert first == second


def test_without_dev_rows_demonstrations_are_rows_that_are_not_measured_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = small(rows=20)
    task = replace(task_of(made, compare={"shots": 3}), train=made.sequences, dev=())
    found = elicit(task, quiet)
    assert (found["split"], found["rows"]) == ("train", 20)
    assert "no training rows besides" in found["few_shot"]["failed"]
    monkeypatch.setattr(elicitation, "ROWS", 16)
    given: list[Task] = []
    few = METHODS["few-shot"]
    plain = type(few).train
    monkeypatch.setattr(
        few, "train", lambda own, seed: given.append(own) or plain(few, own, seed), raising=False
    )
    assert elicit(task, quiet)["few_shot"]["shots"] == 3
    assert len(given[0].train) == 4


def test_demonstrations_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(task: Task, seed: int) -> None:
        raise DataError("few-shot: too long")

    monkeypatch.setattr(METHODS["few-shot"], "train", refuse, raising=False)
    found = elicit(task_of(small()), quiet)
    assert found["few_shot"] == {"failed": "few-shot: too long"}
    assert "demonstrations: not measured (few-shot: too long)" in [*describe(found)]


def test_free_answers_are_sampled() -> None:
    made = kit(target=Target(), rows=24, dtype=torch.float32)
    task = task_of(
        replace(made, sequences=made.sequences),
        target={"choices": []},
        evaluation={"max_new_tokens": 3, "scorer": "contains"},
        compare={"shots": 1},
    )
    found = elicit(task, quiet)
    assert found["sampled"] is not None
    assert found["sampled"]["samples"] == 8
    assert found["temperature"] == 1.0
    assert found["text"]["form"] is not None
    assert "auc" not in found["text"]
    lines = [*describe(found)]
    assert lines[0] == found["sentence"]
    assert any(line.startswith("8 samples a row: pass@1 ") for line in lines)
    assert any("of answers are cut or hold no answer" in line for line in lines)


def test_several_choices_are_measured() -> None:
    made = small(target=Target(choices=LONG_CHOICES), rows=30)
    task = replace(task_of(made), train=made.sequences[:9], dev=made.sequences[9:])
    found = elicit(task, quiet)
    auc = found["text"]["auc"]
    assert auc is not None
    assert 0 < auc < 1


# -- where it is shown -----------------------------------------------------------------------------


def test_a_plan_says_it_where_asked(recipe: Write, embedgrad: Command) -> None:
    path = recipe()
    done = embedgrad("plan", path, "--elicit", "--json", "--quiet")
    assert done.code == 0
    told = done.json["elicitation"]
    assert told["split"] == "dev"
    assert told["text"]["accuracy"] >= 0
    done = embedgrad("plan", path, "--elicit", "--quiet")
    first, *lines = done.out.splitlines()
    assert first == "what there is to elicit"
    assert " ".join(line.strip() for line in lines).startswith(told["sentence"])
    assert "elicitation" not in embedgrad("plan", path, "--json", "--quiet").json
    done = embedgrad("plan", path, "--elicit", "--no-probe")
    assert done.code == 2
    assert "--no-probe: --elicit needs the weights" in done.lines[-1]


def test_a_plan_measures_nothing_on_rows_without_answers(
    recipe: Write, data: Path, tmp_path: Path, embedgrad: Command
) -> None:
    splits = {}
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        bare = [{"review": row["review"]} for row in rows]
        splits[split] = str(write_jsonl(tmp_path / f"{split}.jsonl", bare))
    teacher = {"template": {"user": "Judge this review, and judge it well: {review}"}}
    path = recipe(data=splits, objective={"name": "distill"}, teacher=teacher)
    done = embedgrad("plan", path, "--elicit", "--json", "--quiet")
    assert done.code == 0
    assert "elicitation" not in done.json
    assert any(note.startswith("--elicit: not measured") for note in done.json["notes"])


def test_a_run_keeps_it_and_its_page_begins_with_it(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    made = values(model_folder, data, training={"steps": 2})
    run(Recipe.from_dict(made), tmp_path / "plain")
    run(Recipe.from_dict({**made, "report": {"elicit": True}}), tmp_path / "out")
    rows = [load(tmp_path / name / "prompt").rows for name in ("plain", "out")]
    assert torch.equal(*rows)  # the training is the same
    kept = json.loads((tmp_path / "out" / "elicitation.json").read_text())
    page = run_page(read_run(tmp_path / "out"), "run")
    sentence = kept["sentence"][1:].replace("'", "&#39;")
    assert f"{sentence}." in page
    assert page.index('id="elicitation"') < page.index('id="scores"')
    assert 'id="elicitation"' not in run_page(read_run(tmp_path / "plain"), "run")
    (tmp_path / "out" / "elicitation.json").write_text('{"sentence": 3}')
    assert "Left out: elicitation" in run_page(read_run(tmp_path / "out"), "run")
