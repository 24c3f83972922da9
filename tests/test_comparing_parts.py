"""Parts of a comparison that may not share a table, that fail, or that are scored again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedgrad import Recipe, RecipeError, RunError, load_model
from embedgrad.experiments.baselines import METHODS
from embedgrad.experiments.compare.compare import compare
from embedgrad.parts.scorers import Number
from embedgrad.prompt.sandbox import end_workers
from refusals import refused
from run_kit import ROWS, values, write_jsonl

pytest_plugins = ["tiny_runs"]

ONCE = {"training": {"steps": 1, "batch_size": 8}}
Free = Callable[..., Recipe]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Questions with worked solutions."""
    folder, first = tmp_path / "sums", 0
    folder.mkdir()
    for split, count in ROWS.items():
        numbers = range(first, first + count)
        rows = [{"question": f"{n} + 1?", "label": str(n + 1), "way": "so"} for n in numbers]
        write_jsonl(folder / f"{split}.jsonl", rows)
        first += count
    return folder


@pytest.fixture
def free(model_folder: Path, sums: Path) -> Free:
    """A recipe of free answers; `methods` and sections by name."""

    def made(*methods: str, model: Path = model_folder, **sections: Any) -> Recipe:
        recipe = values(
            model,
            sums,
            **{
                **ONCE,
                "template": {"user": "{question}\n\n[[Think first:]]"},
                "compare": {"methods": list(methods), "seeds": [0], "shots": 2},
                "evaluation": {"scorer": {"name": "number"}, "max_new_tokens": 3},
                **sections,
            },
        )
        recipe["data"] |= {"answer": "label", "solution": "way"}
        del recipe["target"]
        return Recipe.from_dict(recipe)

    return made


def notes_of(recipe: Recipe, out: Path) -> tuple[dict[str, Any], list[str]]:
    """The results, and what was said."""
    events: list[dict[str, Any]] = []
    results = compare(recipe, out, events.append)
    return results, [str(event.get("text")) for event in events]


# -- what may not be mixed -------------------------------------------------------------------------


def test_solutions_that_changed_under_the_same_name_are_refused(
    free: Free, sums: Path, tmp_path: Path
) -> None:
    compare(free("text"), tmp_path / "run")
    path = sums / "train.jsonl"
    path.write_text(path.read_text().replace('"so"', '"thus"'))
    with refused("another set of solutions", "--out", error=RunError):
        compare(free("text", "embedgrad"), tmp_path / "run")


def test_a_fine_tuned_model_with_the_same_embeddings_is_refused(
    free: Free, model_folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(model_folder, tmp_path / "model"))
    compare(free("text", model=own), tmp_path / "run")
    weights = load_file(own / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file({**weights, name: weights[name] * 1.5}, own / "model.safetensors", {"format": "pt"})
    with refused("another set of weights", "--out", error=RunError):
        compare(free("text", "embedgrad", model=own), tmp_path / "run")


def test_another_precision_is_refused(model_folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, **ONCE, compare={"methods": ["text"]}))
    load = {dtype: load_model(str(model_folder), dtype=dtype) for dtype in ("float32", "bfloat16")}
    compare(recipe, tmp_path / "run", model=load["float32"])
    with refused("another precision", "float32", "bfloat16", error=RunError):
        compare(recipe, tmp_path / "run", model=load["bfloat16"])


def test_a_file_of_solutions_in_the_new_folder_is_refused(free: Free, tmp_path: Path) -> None:
    inside = {"source": "self-written", "file": str(tmp_path / "run" / "mine.jsonl")}
    with refused("solutions.file", "mine.jsonl", "name a file elsewhere", error=RunError):
        compare(free("text", solutions=inside), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- what fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "make training.batch_size"),
        (ValueError("no modules\nfound"), "ValueError: no modules found"),
    ],
)
def test_a_seed_that_fails_keeps_no_other_from_its_row(
    error: Exception,
    told: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = METHODS["embedgrad-no-region"]

    def train(task: Any, seed: int) -> Any:
        if seed == 1:
            raise error
        return type(method).train(method, task, seed)

    monkeypatch.setattr(method, "train", train, raising=False)
    methods = ["text", "embedgrad", "embedgrad-no-region"]
    own = {**ONCE, "compare": {"methods": methods, "seeds": [1, 0, 2]}}
    results, _ = notes_of(Recipe.from_dict(values(model_folder, data, **own)), tmp_path / "run")
    seeds = {name: [r["seed"] for r in results["rows"] if r["method"] == name] for name in methods}
    assert seeds == {"text": [None], "embedgrad": [0, 1, 2], "embedgrad-no-region": [0, 2]}
    assert told in results["failed"]["embedgrad-no-region"]
    assert results["failed"]["embedgrad-no-region"].endswith("(seed 1)")
    assert (results["trained"], results["scored"]) == (6, 6)


def test_few_shot_leaves_room_to_answer(free: Free, tmp_path: Path) -> None:
    evaluation = {"scorer": {"name": "number"}, "max_new_tokens": 440}
    results, told = notes_of(
        free(
            "few-shot",
            evaluation=evaluation,
            **{"compare": {"methods": ["few-shot"], "seeds": [0], "shots": 3}},
        ),
        tmp_path / "run",
    )
    assert (
        "440 of them for its answer (evaluation.max_new_tokens), but"
        in results["failed"]["few-shot"]
    )
    assert not any("leaves fewer for an answer" in text for text in told)


def test_few_shot_cuts_a_row_where_the_data_may_be_cut(
    free: Free, sums: Path, tmp_path: Path
) -> None:
    path = sums / "test.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    long = json.loads(first) | {"question": "one more and " * 150}
    path.write_text("".join([json.dumps(long) + "\n", *others]))
    recipe = free(
        "few-shot",
        evaluation={"max_new_tokens": 40, "batch_size": 1},
        data={**{split: str(sums / f"{split}.jsonl") for split in ROWS}, "truncate": "question"},
    )
    results, told = notes_of(recipe, tmp_path / "run")
    assert [row["method"] for row in results["rows"]] == ["text", "few-shot"]
    assert sum("column 'question' is cut in rows" in text for text in told) == 1


def test_a_text_prompt_that_leaves_little_room_is_told(free: Free, tmp_path: Path) -> None:
    evaluation = {"scorer": {"name": "number"}, "max_new_tokens": 505}
    _, told = notes_of(free("text", evaluation=evaluation), tmp_path / "run")
    (note,) = (text for text in told if "leaves fewer for an answer" in text)
    assert note.startswith(f"in {ROWS['dev'] + ROWS['test']} of {ROWS['dev'] + ROWS['test']} rows")


# -- a scorer that changes -------------------------------------------------------------------------


def test_answers_are_judged_again_by_a_function_that_changed(
    free: Free, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"evaluation": {"scorer": {"name": "callable", "function": "mine_judged:score"}}}
    own["evaluation"]["max_new_tokens"] = 3  # type: ignore[assignment]
    module = tmp_path / "mine_judged.py"
    module.write_text("def score(reply, answer):\n    return 1\n")
    before, _ = notes_of(free("text", "few-shot", **own), tmp_path / "run")
    assert [row["accuracy"] for row in before["rows"]] == [1, 1]
    answers = (tmp_path / "run" / "work" / "text" / "answers.jsonl").read_text()
    _, told = notes_of(free("text", "few-shot", **own), tmp_path / "run")
    assert not any("scored again" in text for text in told)
    module.write_text("def score(reply, answer):\n    return 0.25\n")
    end_workers()
    asked: list[int] = []
    monkeypatch.setattr(METHODS["text"], "answer", lambda *given: asked.append(1), raising=False)
    after, told = notes_of(free("text", "few-shot", **own), tmp_path / "run")
    assert sum("has changed, and its answers are scored again" in text for text in told) == 2
    assert [row["accuracy"] for row in after["rows"]] == [0.25, 0.25]
    assert not asked
    for row, old in zip(after["rows"], before["rows"], strict=True):
        assert row["log_loss"] == pytest.approx(old["log_loss"])
        assert (row["extra_tokens"], row["cut"]) == (old["extra_tokens"], old["cut"])
    again = (tmp_path / "run" / "work" / "text" / "answers.jsonl").read_text()
    said = [[json.loads(x)["predicted"] for x in text.splitlines()] for text in (answers, again)]
    assert said[0] == said[1]


def test_answers_by_a_scorer_that_an_older_version_did_not_note_are_judged_again(
    free: Free, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    before, _ = notes_of(free("text", "few-shot"), out)
    path = out / "work" / "text" / "scored.json"
    scores = json.loads(path.read_text())
    del scores["sha256"]
    assert scores.pop("scorer") == {
        **{"name": "number", "relative_tolerance": 0.0, "absolute_tolerance": 0.0},
        "rules": Number.rules,
    }
    path.write_text(json.dumps({**scores, "accuracy": 1.0, "correct": "1" * ROWS["test"]}))
    after, told = notes_of(free("text", "few-shot"), out)
    assert [row["correct"] for row in after["rows"]] == [row["correct"] for row in before["rows"]]
    assert sum("are scored again" in text for text in told) == 1
    assert "scorer" in json.loads(path.read_text())
    answers = path.with_name("answers.jsonl")
    whole = answers.read_text().splitlines(keepends=True)
    for damaged in ("".join(whole[1:]), "".join(whole[1:]) + "{}\n", "".join(whole[1:]) + "[]\n"):
        answers.write_text(damaged)
        path.write_text(json.dumps(scores))
        again, told = notes_of(free("text", "few-shot"), out)
        (line,) = (text for text in told if text.endswith("text is scored again"))
        assert "answers.jsonl: is damaged" in line
        assert [row["correct"] for row in again["rows"]] == [r["correct"] for r in before["rows"]]


def test_a_scorer_that_fails_when_scoring_again_changes_nothing(
    free: Free, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    end_workers()
    scorer = {"name": "callable", "function": "mine_failing:score"}
    own = {"evaluation": {"scorer": scorer, "max_new_tokens": 3}}
    module = tmp_path / "mine_failing.py"
    module.write_text("def score(reply, answer):\n    return 1\n")
    compare(free("text", "few-shot", **own), tmp_path / "run")
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("scored.json")}
    count = "import pathlib\n\ndef score(reply, answer):\n    p = pathlib.Path('n')\n"
    count += "    n = int(p.read_text()) if p.exists() else 0\n    p.write_text(str(n + 1))\n"
    module.write_text(f"{count}    return 1 / (n < {2 * ROWS['test'] - 1})\n")
    end_workers()
    with refused("mine_failing:score raised ZeroDivisionError", error=RecipeError):
        compare(free("text", "few-shot", **own), tmp_path / "run")
    assert {p: p.read_bytes() for p in kept} == kept


def test_free_answers_are_kept_some_batches_at_a_time(
    free: Free, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"scorer": {"name": "number"}, "max_new_tokens": 3, "batch_size": 1}
    method, blocks = METHODS["text"], []

    def answer(task: Any, trained: Any, rows: Any) -> Any:
        if rows is not task.dev:
            blocks.append(len(rows))
            if len(blocks) == 3:
                raise KeyboardInterrupt
        return type(method).answer(method, task, trained, rows)

    monkeypatch.setattr(method, "answer", answer, raising=False)
    assert compare(free("text", evaluation=evaluation), tmp_path / "run")["interrupted"] is True
    results = compare(free("text", evaluation=evaluation), tmp_path / "run")
    assert len(results["rows"]) == 1
    assert sum(blocks) == ROWS["test"] + 4  # the batch that was interrupted


def test_two_spans_are_compared_by_the_methods_that_can_train_them(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    template = {"user": "[[Read this review.]]\n\n{review}\n\n[[Good or bad?]]"}
    shots = {"seeds": [0], "shots": 2, "prompts": ["Cold or warm?"]}
    recipe = values(model_folder, data, template=template, compare=shots, **ONCE)
    results = compare(Recipe.from_dict(recipe), tmp_path / "out")
    assert results["text"] == "Read this review. Good or bad?"
    assert results["failed"] == {}
    reason = "it needs a single [[span]], and the template has 2"
    assert "the objective is another" in results["skipped"].pop("random-reward")
    assert results["skipped"] == dict.fromkeys(
        (
            *("best-of-n", "random-init", "peft-prompt-tuning-text"),
            *("peft-prompt-tuning-random", "peft-cpt"),
        ),
        reason,
    )
    rows = {row["method"]: row for row in results["rows"]}
    assert rows.keys() == {
        *("text", "no-template", "few-shot", "batch-calibration", "threshold", "linear-probe"),
        *("knn", "embedgrad", "embedgrad-no-region", "peft-lora"),
    }
    assert rows["embedgrad"]["extra_tokens"] == 0
    assert rows["few-shot"]["extra_tokens"] > 0
