"""Comparisons of methods end to end: what they write, how they resume, what they refuse."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from embedgrad import Recipe, RunError
from embedgrad.atomic_files import check_seal, seal
from embedgrad.data.bounded_reads import MOST_VALUES
from embedgrad.evaluation.answers import ScoredAnswer
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.evaluation.significance import (
    bootstrap_mean,
    mcnemar_exact,
    score_interval,
    sign_flip_test,
    wilson_interval,
)
from embedgrad.evaluation.verdict import row_differences, verdicts
from embedgrad.experiments.baselines import METHODS, Answers
from embedgrad.experiments.baselines.base import Method
from embedgrad.experiments.compare.compare import compare
from embedgrad.experiments.compare.folder import Folder, Part
from embedgrad.experiments.compare.recipe_diff import recipe_differences, shared_settings
from embedgrad.experiments.compare.results import wrong_answers
from embedgrad.recipe.settings import COMPARED as ALL
from embedgrad.report.page.page import comparison_page
from embedgrad.report.page.run_files import compared_rows
from embedgrad.report.terminal.methods_table import methods_markdown, methods_table, reliable_gain
from embedgrad.report.terminal.tables import OF_FILES, show
from embedgrad.training.checkpoint import Checkpoint
from refusals import refused
from run_kit import ROWS, Command, save_model, values

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
OWN = {"prompts": ["Cold or warm?", "Is it great or terrible?"], "shots": 2}
SEEDS = (0, 1)
COMPARED = tuple(name for name in ALL if name != "random-reward")  # that needs rewards
FITTED = {"batch-calibration", "threshold", "linear-probe", "knn"}  # without steps
UNSEEDED = {"text", "no-template", "best-of-n", *FITTED}
SMALL = {"training": {"epochs": 1, "batch_size": 8}, "compare": {**OWN, "seeds": list(SEEDS)}}
PARTS = len(UNSEEDED) + len(SEEDS) * (len(COMPARED) - len(UNSEEDED))


@pytest.fixture(scope="module")
def whole(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """All methods with two seeds, that tests must not change: the folder and the results."""
    folder = tmp_path_factory.mktemp("comparisons") / "whole"
    return folder, compare(Recipe.from_dict(values(model_folder, data, **SMALL)), folder)


def told_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries by method."""
    return {entry["method"]: entry for entry in results["methods"]}


def digits(text: str) -> list[float]:
    return [float(digit) for digit in text]


def count(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, str, int | None]]:
    """What these methods are asked to do from now on: ("train", name, seed), ("answer", ...)."""
    calls: list[tuple[str, str, int | None]] = []
    for name in names or COMPARED:
        method = METHODS[name]

        def train(task: Any, seed: int, method: Method = method) -> Any:
            calls.append(("train", method.name, seed))
            return type(method).train(method, task, seed)

        def answer(*arguments: Any, method: Method = method) -> Any:
            calls.append(("answer", method.name, None))
            return type(method).answer(method, *arguments)

        monkeypatch.setattr(method, "train", train, raising=False)
        monkeypatch.setattr(method, "answer", answer, raising=False)
    return calls


# -- what comes out --------------------------------------------------------------------------------


def test_every_method_has_its_rows(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert json.loads((folder / "results.json").read_text()) == results
    expected = [(name, None) for name in COMPARED if name in UNSEEDED]
    seeded = [(name, seed) for name in COMPARED if name not in UNSEEDED for seed in SEEDS]
    found = [(row["method"], row["seed"]) for row in results["rows"]]
    assert sorted(found, key=str) == sorted(expected + seeded, key=str)
    assert list(told_of(results)) == list(COMPARED)
    assert list(results["skipped"]) == ["random-reward"]
    assert results["failed"] == {}
    assert (results["trained"], results["scored"], results["planned"]) == (PARTS, PARTS, PARTS)
    assert results["interrupted"] is False
    assert results["test_rows"] == ROWS["test"]
    assert results["seeds"] == list(SEEDS)
    assert results["data"]["test"]["rows"] == ROWS["test"]
    assert set(results["versions"]) >= {"python", "torch", "transformers", "peft", "embedgrad"}
    assert results["machine"]["cores"] > 0
    assert "path" not in results["model"]


def test_rows_can_be_computed_again(whole: tuple[Path, dict[str, Any]]) -> None:
    results = whole[1]
    (text,) = (row for row in results["rows"] if row["method"] == "text")
    first = digits(text["correct"])
    for row in results["rows"]:
        second = digits(row["correct"])
        assert len(second) == ROWS["test"]
        assert row["accuracy"] == sum(second) / len(second)
        assert tuple(row["interval"]) == wilson_interval(int(sum(second)), len(second))
        differences = [b - a for a, b in zip(first, second, strict=True)]
        assert tuple(row["difference_interval"]) == bootstrap_mean(differences)
        better = sum(b > a for a, b in zip(first, second, strict=True))
        worse = sum(b < a for a, b in zip(first, second, strict=True))
        assert row["difference"] == pytest.approx((better - worse) / len(first))
        assert row["p_value"] == mcnemar_exact(worse, better)
    others = {
        name: [digits(row["correct"]) for row in results["rows"] if row["method"] == name]
        for name in COMPARED[1:]
    }
    judged = verdicts(first, others)
    for name, told in told_of(results).items():
        if name == "text":
            assert told["verdict"] is told["difference"] is told["p_holm"] is None
            continue
        assert told["verdict"] == judged[name].words
        assert told["p_holm"] == judged[name].p_holm
        assert told["difference"] == judged[name].difference
        interval = bootstrap_mean(row_differences(first, others[name]))
        assert tuple(told["difference_interval"]) == interval
    for name, told in told_of(results).items():
        runs = others.get(name, [first])
        means = [sum(scores) / len(scores) for scores in zip(*runs, strict=True)]
        assert tuple(told["interval"]) == score_interval(means)


def test_costs_are_those_of_the_methods(whole: tuple[Path, dict[str, Any]]) -> None:
    rows = {(row["method"], row["seed"]): row for row in whole[1]["rows"]}
    width, span = 32, rows["embedgrad", 0]["trained_numbers"] // 32
    assert span > 4
    prompts = {"embedgrad", "embedgrad-no-region", "random-init"} | {
        name for name in COMPARED if name.startswith("peft-") and name != "peft-lora"
    }
    for (name, _), row in rows.items():
        trained = name in prompts or name == "peft-lora" or name in FITTED
        assert row["examples_seen"] == (ROWS["train"] if trained else 0), name
        other = ("few-shot", "best-of-n", "no-template")
        assert row["extra_tokens"] == pytest.approx(0, abs=1) or name in other
        if name in prompts:
            assert row["trained_numbers"] == width * span
            assert row["stored_bytes"] == 4 * width * span
        assert (row["train_seconds"] > 0) == (name not in ("text", "no-template"))
        assert row["threads"] == torch.get_num_threads()
        assert row["scoring_seconds"] > 0
        assert row["dev"]["log_loss"] > 0
    # Rank 8 on the query and value projections of 3 layers: 32 to 32, and 32 to 2 prefixes of 8.
    assert rows["peft-lora", 0]["trained_numbers"] == 3 * 8 * (32 + 32 + 32 + 16)
    assert rows["few-shot", 0]["extra_tokens"] > 20
    assert rows["no-template", None]["extra_tokens"] < -20
    assert rows["linear-probe", None]["trained_numbers"] == (width + 1) * 2
    assert rows["threshold", None]["trained_numbers"] == 2
    assert rows["few-shot", 0]["settings"] != rows["few-shot", 1]["settings"]
    assert "first" in rows["peft-cpt", 0]["settings"]["order"]


def test_the_parts_are_kept(whole: tuple[Path, dict[str, Any]]) -> None:
    folder = whole[0]
    part = folder / "work" / "peft-lora-seed-1"
    assert {path.name for path in part.iterdir()} == {
        *("trained.safetensors", "trained.json", "scored.json", "answers.jsonl")
    }
    answers = [json.loads(line) for line in (part / "answers.jsonl").read_text().splitlines()]
    scored = json.loads((part / "scored.json").read_text())
    assert "".join(str(round(answer["correct"])) for answer in answers) == scored["correct"]
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    own = [next(a for a in row["answers"] if (a["method"], a["seed"]) == ("peft-lora", 1))
           for row in rows]  # fmt: skip
    assert [(a["predicted"], a["correct"]) for a in own] == [
        (answer["predicted"], answer["correct"]) for answer in answers
    ]
    assert [row["source"] for row in rows] == [answer["source"] for answer in answers]
    assert all(row["columns"] for row in rows)
    assert {len(row["answers"]) for row in rows} == {len(whole[1]["rows"])}
    page = comparison_page(whole[1], "whole", compared_rows(folder, []))
    assert '<section id="answers"' in page
    assert "Left out" not in page
    assert Recipe.read(folder / "recipe.toml").compare.shots == 2
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_tables_say_no_reliable_gain_in_so_many_words(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = whole
    table = (folder / "table.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == list(COMPARED)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert "PEFT can only put the prompt first" in table
    shown = io.StringIO()
    show(methods_table(results), shown)
    printed = shown.getvalue().splitlines()
    for line, (name, told) in zip(lines[2:], told_of(results).items(), strict=True):
        verdict = told["verdict"] or "-"
        assert verdict in line
        # Neither is cut nor wrapped in a terminal of 80 columns.
        assert any(row.split()[:1] == [name] and verdict in row for row in printed)
        assert any(row.split()[:1] == [name] and line[1] in row for row in printed)
        assert re.fullmatch(r"\d+\.\d % \(\d+\.\d to \d+\.\d\)", line[1])
    assert "no reliable gain" in table
    tables = printed[: next(i for i, row in enumerate(printed) if "test rows" in row)]
    assert max(map(len, tables)) <= OF_FILES


def test_the_figure_is_drawn(whole: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    drawn = (whole[0] / "figure.svg").read_text()
    assert "<svg" in drawn
    assert len(drawn) > 1000


# -- order -----------------------------------------------------------------------------------------


def test_no_test_row_is_answered_before_every_training_is_finished(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    plain = Evaluator.score

    def spy(self: Any, rows: Any, sequences: Any, *more: Any) -> Any:
        sources = {s.example.source.rpartition(":")[0].rpartition("/")[2] for s in sequences}
        happened.extend(sources)
        return plain(self, rows, sequences, *more)

    monkeypatch.setattr(Evaluator, "score", spy)
    calls = count(monkeypatch)
    compare(
        Recipe.from_dict(values(model_folder, data, **{**SMALL, "compare": OWN | {"seeds": [0]}})),
        tmp_path / "out",
        lambda event: happened.append("trained") if _is_trained(event) else None,
    )
    trainings = [i for i, what in enumerate(happened) if what == "trained"]
    tests = [i for i, what in enumerate(happened) if what == "test.jsonl"]
    assert len(trainings) == len(COMPARED)
    assert len(tests) >= len(COMPARED) - 2  # the probe and kNN ask for no scores
    assert max(trainings) < min(tests)
    assert "dev.jsonl" in happened[: trainings[0]]
    # Of the rows that they learn from, the calibrations alone ask for scores.
    assert happened.count("train.jsonl") == 2
    firsts = [what for what, *_ in calls]
    assert firsts[-len(COMPARED) :] == ["answer"] * len(COMPARED)


def _is_trained(event: dict[str, Any]) -> bool:
    return event["event"] == "note" and ": ready after" in event["text"]


# -- going on --------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[0], tmp_path / "copied"))


def test_nothing_finished_is_done_again(
    whole: tuple[Path, dict[str, Any]],
    copied: Path,
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count(monkeypatch)
    again = compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied)
    assert calls == []
    assert again["rows"] == whole[1]["rows"]
    assert again["methods"] == whole[1]["methods"]


def test_a_seed_and_a_method_may_be_added(
    whole: tuple[Path, dict[str, Any]],
    copied: Path,
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(copied / "work" / "random-init-seed-0")
    calls = count(monkeypatch)
    more = {"seeds": [0, 5], "methods": ["embedgrad", "random-init"]}
    recipe = Recipe.from_dict(values(model_folder, data, **{**SMALL, "compare": OWN | more}))
    results = compare(recipe, copied)
    trained = [call[1:] for call in calls if call[0] == "train"]
    assert trained == [("random-init", 0), ("embedgrad", 5), ("random-init", 5)]
    assert told_of(results)["embedgrad"]["seeds"] == [0, 1, 5]
    assert told_of(results)["peft-cpt"]["seeds"] == [0, 1]  # what was there stays in the table
    before = {(r["method"], r["seed"]): r["correct"] for r in whole[1]["rows"]}
    after = {(r["method"], r["seed"]): r["correct"] for r in results["rows"]}
    assert {key: after[key] for key in before} == before


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    recipe: Write,
    embedgrad: Command,
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, out = recipe(**SMALL), tmp_path / "run"
    arguments = ("compare", path, "--out", out, "--methods", "embedgrad,peft-lora", "--json")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(METHODS["peft-lora"], "train", interrupted, raising=False)
        done = embedgrad(*arguments)
    assert done.code == 130
    assert f"interrupted; {out} has 2 of 5 trainings and 0 of 5 scorings" in done.lines[-1]
    assert "the same command resumes" in done.lines[-1]
    assert done.json["rows"] == []
    assert not (out / "results.json").exists()

    with monkeypatch.context() as patch:  # now while test rows are answered
        patch.setattr(METHODS["peft-lora"], "answer", interrupted, raising=False)
        calls = count(patch, "text", "embedgrad")
        done = embedgrad(*arguments)
    assert done.code == 130
    assert "has 5 of 5 trainings and" in done.lines[-1]
    assert ("train", "text", 0) not in calls
    assert ("train", "embedgrad", 0) not in calls
    scored = {row["method"] for row in done.json["rows"]}
    assert scored >= {"text"}
    assert "peft-lora" not in scored

    with monkeypatch.context() as patch:
        calls = count(patch)
        done = embedgrad(*arguments)
    assert done.code == 0
    assert "text" not in {name for _, name, _ in calls}
    assert not [call for call in calls if call[0] == "train"]
    # As if it had never been interrupted.
    whole_rows = {(r["method"], r["seed"]): r["correct"] for r in whole[1]["rows"]}
    for row in done.json["rows"]:
        assert row["correct"] == whole_rows[row["method"], row["seed"]]


def test_a_scoring_goes_on_behind_its_last_block(
    copied: Path,
    whole: tuple[Path, dict[str, Any]],
    model_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, **SMALL))
    monkeypatch.setattr("embedgrad.experiments.compare.compare.BLOCK", 5)
    method, part, blocks = METHODS["peft-lora"], copied / "work" / "peft-lora-seed-0", []
    so_far = copied / "work" / "unfinished" / "peft-lora-seed-0.json"
    (part / "scored.json").unlink()

    def answer(task: Any, trained: Any, rows: Any, last: int = 9) -> Any:
        if len(blocks) == last:
            raise KeyboardInterrupt
        blocks.append(len(rows))
        return type(method).answer(method, task, trained, rows)

    with monkeypatch.context() as patch:
        patch.setattr(method, "answer", lambda *given: answer(*given, last=2), raising=False)
        assert compare(recipe, copied)["interrupted"] is True
    assert blocks == [5, 5]
    kept = json.loads(so_far.read_text())
    check_seal(kept)
    so_far.write_text(json.dumps(seal({**kept, "seconds": 1000})))
    monkeypatch.setattr(method, "answer", answer, raising=False)
    results = compare(recipe, copied)
    assert blocks == [5, 5, ROWS["test"] - 10]
    assert not so_far.exists()
    assert [r["correct"] for r in results["rows"]] == [r["correct"] for r in whole[1]["rows"]]
    assert json.loads((part / "scored.json").read_text())["scoring_seconds"] > 1000

    flipped = seal(kept) | {"tokens": [9, *kept["tokens"][1:]]}
    others = ({**kept, "training": "another"}, {"training": 0}, [])
    for damaged in ("{", json.dumps(flipped), *(json.dumps(seal(v) if v else v) for v in others)):
        (part / "scored.json").unlink()
        so_far.write_text(damaged)
        blocks.clear()
        events: list[dict[str, Any]] = []
        results = compare(recipe, copied, events.append)
        assert blocks == [5, 5, ROWS["test"] - 10]
        assert (
            sum("is scored again from the start" in str(event.get("text")) for event in events) == 1
        )
        assert [r["correct"] for r in results["rows"]] == [r["correct"] for r in whole[1]["rows"]]


def test_the_answers_to_many_rows_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, part = Folder(tmp_path), Part("text", None)
    monkeypatch.setattr(folder, "_digest", lambda part: "a training")
    folder.work.mkdir()
    answers = Answers([ScoredAnswer("test:1", "a", "b", 0, math.inf, {"a": 0.1})], [1])
    scorer = {"numbers": [0] * MOST_VALUES}  # as many values as probabilities of many rows
    folder.save_partial_answers(part, answers, 1.5, scorer)
    assert folder.partial_answers(part) == (answers, 1.5, scorer)


def test_a_training_goes_on_at_its_last_look_at_dev(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {**SMALL, "training": {"steps": 4, "batch_size": 8, "evaluate_every": 1}}
    path, out = recipe(**made), tmp_path / "run"
    arguments = ("compare", path, "--out", out, "--methods", "embedgrad", "--seeds", "0")
    plain, kept = Checkpoint.save, []

    def save(state: Checkpoint, folder: Path) -> None:
        plain(state, folder)
        kept.append(state.step)
        if kept == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save)
    assert embedgrad(*arguments).code == 130
    state = out / "work" / "unfinished" / "embedgrad-seed-0"
    assert state.is_dir()
    assert embedgrad(*arguments).code == 0
    assert kept == [1, 2, 2, 3, 4]  # however a training ends, its state is kept
    assert not state.exists()


def test_what_no_finished_part_vouches_for_is_not_gone_on_from(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    left = tmp_path / "run" / "work" / "unfinished" / "embedgrad-seed-0"
    left.mkdir(parents=True)
    (left / "state.json").write_text("of another recipe")
    arguments = ("compare", recipe(**SMALL), "--out", tmp_path / "run", "--seeds", "0")
    done = embedgrad(*arguments, "--methods", "embedgrad")
    assert (done.code, "anew" in done.err) == (0, False)
    assert not left.exists()


# -- what is refused -------------------------------------------------------------------------------


def test_a_comparison_goes_on_where_only_exports_or_reports_are_set_otherwise(
    copied: Path, model_folder: Path, data: Path
) -> None:
    other = {**SMALL, "export": {"gguf": "f32"}, "report": {"trackers": ["tensorboard"]}}
    other |= {"prefix_cache": {"budget": 0}}  # where prefixes are stored changes no result
    results = compare(Recipe.from_dict(values(model_folder, data, **other)), copied)
    assert results["trained"] == results["planned"] > 1


def test_a_setting_that_an_older_recipe_does_not_have_is_at_its_default() -> None:
    recipe = Recipe.from_dict(values(Path("model"), Path("data"), **SMALL))
    older = recipe.as_dict()
    for section, name in (("data", "drop_duplicates"), ("evaluation", "batch_size")):
        del older[section][name]
    del older["export"], older["transforms"][0]["max_norm"]
    assert recipe_differences(older, recipe) == []
    assert shared_settings(older) == shared_settings(recipe.as_dict())
    dropped = values(Path("model"), Path("data"), **SMALL, data={"drop_duplicates": True})
    told = recipe_differences(older, Recipe.from_dict(dropped))
    assert told == ["data.drop_duplicates is false there and true here"]
    older["data"]["gone"] = 1
    assert "data.gone is 1 there and unset here" in recipe_differences(older, recipe)


def test_a_folder_of_another_recipe_is_refused(
    copied: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    other = {**SMALL, "training": {"epochs": 1, "batch_size": 4}}
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with refused(
        "another recipe", "training.batch_size is 8 there and 4 here", "--out", error=RunError
    ):
        compare(Recipe.from_dict(values(model_folder, data, **other)), copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    elsewhere = tmp_path / "notes"
    elsewhere.mkdir()
    (elsewhere / "results.json").write_text("{}")
    with refused("notes", "no comparison", error=RunError):
        compare(Recipe.from_dict(values(model_folder, data, **SMALL)), elsewhere)


def test_data_that_changed_under_the_same_name_is_refused(
    copied: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "data"))
    settings = values(model_folder, own, **SMALL)
    (copied / "recipe.toml").write_text(Recipe.from_dict(settings).as_toml())
    lines = (own / "test.jsonl").read_text().splitlines(keepends=True)
    (own / "test.jsonl").write_text("".join(lines[:-1]))
    with refused("another test split", "--out", error=RunError):
        compare(Recipe.from_dict(settings), copied)


def test_a_folder_of_an_older_version_is_refused(
    copied: Path, model_folder: Path, data: Path
) -> None:
    path = copied / "recipe.toml"
    path.write_text(path.read_text().removeprefix("version = 2\n"))
    with refused("written by an older embedgrad (recipe version 1", error=RunError):
        compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied)


LONG = "1" * (ROWS["test"] + 1)
SEED = "embedgrad-seed-0"


def damage(copied: Path, name: str, change: Any) -> None:
    """Change the JSON of a part, or cut it, or flip a bit of its tensors or answers."""
    path = copied / "work" / name
    if change == "bit":
        content = bytearray(path.read_bytes())
        content[-10] ^= 1
        path.write_bytes(bytes(content))
        return
    held = json.loads(path.read_text())
    if "correct" in held and change != {"accuracy": 0.1}:
        del held["sha256"]  # or that would be all that is told
    path.unlink()
    if change is not None:
        path.write_text(change if change == "[" else json.dumps({**held, **change}))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("text/scored.json", {"correct": None}, "it lacks scores"),
        ("text/scored.json", "[", "cannot be read"),
        ("text/scored.json", {"correct": LONG}, f"{ROWS['test']} answers for {len(LONG)} scores"),
        ("text/scored.json", {"accuracy": None}, "it lacks scores"),
        ("text/scored.json", {"scores": [1.0]}, "it lacks scores"),
        ("text/scored.json", {"interval": None}, "it lacks scores"),
        ("text/scored.json", {"accuracy": 0.1}, "digest differs"),
        (f"{SEED}/answers.jsonl", "bit", "digest differs"),
        ("text/trained.json", {"facts": {}}, "it lacks dev, examples_seen"),
        ("text/trained.json", {"versions": {}}, "digest differs"),
        (f"{SEED}/trained.safetensors", "bit", "digest differs"),
        (f"{SEED}/trained.json", "[", "cannot be read"),
        (f"{SEED}/trained.json", {"seed": 1}, "it is of another part"),
    ],
)
def test_a_damaged_part_is_done_again_with_one_line(
    copied: Path,
    whole: tuple[Path, dict[str, Any]],
    model_folder: Path,
    data: Path,
    name: str,
    change: Any,
    told: str,
) -> None:
    damage(copied, name, change)
    trains = "trained" in name
    done_again = "is trained again" if trains else "is scored again"
    recipe = {**SMALL, "compare": {**OWN, "methods": ["random-init"], "seeds": [0]}}
    if SEED in name:  # in a call that does not ask for the part, it is left
        advice = "delete the folder|delete its folder" if trains else "delete it to score again"
        with pytest.raises(RunError, match=advice):
            compare(Recipe.from_dict(values(model_folder, data, **recipe)), copied)
    events: list[dict[str, Any]] = []
    results = compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied, events.append)
    texts = [str(event.get("text")) for event in events]
    (line,) = (text for text in texts if done_again in text)
    assert told in line
    assert "delete" not in line
    trained = [text for text in texts if ": training " in text]
    assert len(trained) == trains
    kept = copied / "work" / f".{Path(name).parent}.damaged"
    assert kept.is_dir() == trains
    assert [r["correct"] for r in results["rows"]] == [r["correct"] for r in whole[1]["rows"]]


def test_a_part_without_its_record_is_trained_again(
    copied: Path, model_folder: Path, data: Path
) -> None:
    (copied / "work" / "text" / "trained.json").unlink()
    events: list[dict[str, Any]] = []
    compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied, events.append)
    texts = [str(event.get("text")) for event in events]
    assert sum("text has lost its trained.json; text is trained again" in t for t in texts) == 1


def test_a_comparison_whose_parts_were_all_put_aside_stays_one(
    copied: Path, model_folder: Path, data: Path
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, **SMALL))
    for path in (copied / "work").glob("[!.]*/trained.json"):
        path.write_text("[")
    folder, parts = Folder(copied), list(Folder(copied)._parts())
    assert len(folder.open(recipe, parts)) == len(parts)
    assert folder.open(recipe, parts) == []  # a call that ended there is repeated


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("[", ("cannot be read", "restore it, or choose another --out")),
        (None, ("cannot be read", "restore it, or choose another --out")),
        ({"day": "nonsense"}, ("has no day", "choose another --out")),
    ],
)
def test_what_all_parts_share_is_told_and_left_where_it_is_damaged(
    copied: Path, model_folder: Path, data: Path, change: Any, parts: tuple[str, ...]
) -> None:
    damage(copied, "comparison.json", change)
    before = {path: path.read_bytes() for path in (copied / "work").rglob("*") if path.is_file()}
    with refused(str(copied), *parts, error=RunError):
        compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied)
    after = {path: path.read_bytes() for path in (copied / "work").rglob("*") if path.is_file()}
    assert after == before


def test_a_row_tells_what_it_was_trained_with(copied: Path, model_folder: Path, data: Path) -> None:
    part = copied / "work" / "embedgrad-seed-0" / "trained.json"
    trained = json.loads(part.read_text())
    assert trained["versions"]["torch"] == torch.__version__
    content = part.with_suffix(".safetensors").read_bytes()
    del trained["sha256"]
    part.write_text(json.dumps(seal({**trained, "versions": {"torch": "1.0"}}, content)))
    fewer = {**SMALL, "compare": {**OWN, "methods": ["text"], "seeds": [7]}}
    results = compare(Recipe.from_dict(values(model_folder, data, **fewer)), copied)
    by_row = {(row["method"], row["seed"]): row["versions"] for row in results["rows"]}
    assert by_row["embedgrad", 0] == {"torch": "1.0"}
    assert by_row["embedgrad", 1] == results["versions"]
    # The recipe names what is there, not what the last call asked for.
    assert results["recipe"]["compare"]["methods"] == list(COMPARED)
    assert results["recipe"]["compare"]["seeds"] == list(SEEDS)


def test_another_text_that_is_too_long_is_named(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(training={"steps": 1}, compare={"prompts": ["Is it warm? " * 200]})
    done = embedgrad(
        "compare", path, "--out", tmp_path / "run", "--methods", "best-of-n", "--quiet"
    )
    assert done.code == 2
    assert done.lines[0].startswith("error: best-of-n: with the prompt 'Is it warm? Is it warm? ")


def test_a_recipe_that_cannot_be_used_leaves_no_folder(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path, out = recipe(data={"answer": "nothing"}), tmp_path / "run"
    done = embedgrad("compare", path, "--out", out)
    assert done.code == 2
    assert "nothing" in done.lines[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--methods", "text,embedgard"), ("compare.methods", "did you mean 'embedgrad'")),
        (("--methods", "best-of-n"), ("best-of-n cannot run", "compare.prompts")),
        (("--seeds", "0,x"), ("compare.seeds",)),
        (("--seeds", "-1"), ("compare.seeds", "from 0 up")),
    ],
)
def test_what_the_command_line_names_wrongly_is_told(
    options: tuple[str, ...],
    parts: tuple[str, ...],
    recipe: Write,
    embedgrad: Command,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    done = embedgrad("compare", recipe(), "--out", out, *options)
    assert done.code == 2
    assert len(done.lines) == 1
    for part in parts:
        assert part in done.lines[0]
    assert not out.exists()


def test_without_peft_its_methods_are_left_out_or_refused_by_name(
    recipe: Write, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "peft" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    done = embedgrad("compare", recipe(), "--out", tmp_path / "a", "--methods", "peft-cpt")
    assert done.code == 2
    assert 'pip install "embedgrad[compare]"' in done.lines[0]
    path = recipe(training={"steps": 1}, compare={"seeds": [0]})
    done = embedgrad("compare", path, "--out", tmp_path / "b", "--json")
    assert done.code == 0
    kept = [n for n in COMPARED if not n.startswith("peft-") and n != "best-of-n"]
    assert list(told_of(done.json)) == kept
    assert set(done.json["skipped"]) == set(ALL) - set(kept)
    assert "peft-lora is left out: PEFT is not installed" in done.err


def test_a_context_too_short_for_few_shot_is_one_line_and_others_go_on(
    recipe: Write, embedgrad: Command, tmp_path: Path, data: Path
) -> None:
    many = {**SMALL, "compare": {"shots": 24, "seeds": [0]}}
    path, out = recipe(**many), tmp_path / "run"
    done = embedgrad("compare", path, "--out", out, "--methods", "few-shot,embedgrad", "--quiet")
    assert done.code == 2
    (line,) = done.lines
    assert line.startswith("error: few-shot: with 24 examples before it, a row needs ")
    assert "the model takes 512; make compare.shots smaller" in line
    results = json.loads((out / "results.json").read_text())
    assert set(told_of(results)) == {"text", "embedgrad"}
    assert "few-shot" in results["failed"]
    assert "few-shot failed: few-shot: with 24" in (out / "table.md").read_text()


# -- the exit status for CI ------------------------------------------------------------------------


def test_require_gain_is_exit_status_four_without_one(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(training={"steps": 1}, compare={"seeds": [0]})
    arguments = ("compare", path, "--out", tmp_path / "run", "--methods", "embedgrad")
    done = embedgrad(*arguments, "--quiet", "--require-gain")
    assert done.code == 4
    assert done.lines == ["embedgrad: no reliable gain over the text prompt"]
    assert "no reliable gain" in done.out
    assert embedgrad(*arguments, "--quiet").code == 0


@pytest.mark.parametrize("verb", ["optimize", "evaluate"])
def test_runs_can_require_a_gain_too(
    verb: str,
    recipe: Write,
    embedgrad: Command,
    tmp_path: Path,
    finished: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ("optimize", recipe(training={"steps": 1}), "--out", tmp_path / "run")
    arguments = run if verb == "optimize" else ("evaluate", finished[0])
    done = embedgrad(*arguments, "--quiet", "--require-gain")
    assert done.code == 4
    assert done.lines[-1].startswith("no reliable gain: ")
    monkeypatch.setattr(
        "embedgrad.report.terminal.tables.verdict", lambda difference: "improved: +9 points"
    )
    again = (*run[:3], tmp_path / "again") if verb == "optimize" else arguments
    assert embedgrad(*again, "--quiet", "--require-gain").code == 0


# -- free answers ----------------------------------------------------------------------------------


def test_free_answers_are_compared_too(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(30)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sections = values(
        model_folder,
        tmp_path,
        data={"train": str(path), "answer": "answer"},
        template={"user": "{question}\n\n[[Give the answer only:]]"},
        target={"choices": []},
        evaluation={"scorer": "number", "max_new_tokens": 3},
        training={"steps": 2, "batch_size": 8},
        solutions={"source": "answer"},
        compare={"prompts": ["How much?"], "shots": 2, "seeds": [0]},
    )
    del sections["data"]["dev"], sections["data"]["test"]
    results = compare(Recipe.from_dict(sections), tmp_path / "out")
    assert results["failed"] == {}
    assert list(told_of(results)) == [name for name in COMPARED if name not in FITTED]
    assert set(results["skipped"]) == FITTED | {"random-reward"}  # they need choices, or rewards
    for row in results["rows"]:
        assert row["macro_f1"] is None
        assert row["log_loss"] > 0
        wrong = row["wrong_in_form"] + row["wrong_in_content"]
        assert wrong == row["correct"].count("0")
        assert row["wrong_in_form"] >= row["unread"]
    assert "wrong answers that did not end or held no answer (form)" in methods_markdown(results)
    candidates = next(r for r in results["rows"] if r["method"] == "best-of-n")["settings"]
    best = min(candidates["candidates"], key=lambda candidate: candidate["log_loss"])
    assert candidates["prompt"] == best["prompt"]


def test_wrong_answers_are_of_form_or_of_content() -> None:
    kinds = [(1, True, False), (0, True, False), (0, False, True), (0, False, False), (0.5, 0, 0)]
    answers = [{"correct": c, "cut": cut, "unread": unread} for c, cut, unread in kinds]
    assert wrong_answers(answers) == {"wrong_in_form": 2, "wrong_in_content": 2}


def test_a_model_in_half_precision_is_compared(data: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    sections = values(folder, data, model={"dtype": "bfloat16"}, training={"steps": 1})
    methods = ["peft-cpt", "peft-lora", "random-init"]
    sections["compare"] = {"methods": methods, "seeds": [0]}
    results = compare(Recipe.from_dict(sections), tmp_path / "out")
    assert set(told_of(results)) == {"text", *methods}
    assert results["failed"] == {}
    assert all(row["dev"]["log_loss"] > 0 for row in results["rows"])
    assert torch.get_default_dtype() == torch.float32


# -- what was begun, and what went wrong -----------------------------------------------------------


def test_what_was_begun_without_a_finished_part_begins_again(
    recipe: Write, embedgrad: Command, tmp_path: Path
) -> None:
    """A kill while the model is loaded leaves a log, a later one half a part."""
    out = tmp_path / "run"
    half = out / "work" / ".text.new-0a1b"
    half.mkdir(parents=True)
    (half / "trained.json").write_text('{"method": "te')
    (out / "events.jsonl").write_text("")
    arguments = ("compare", recipe(training={"steps": 1}), "--out", out, "--methods", "text")
    assert embedgrad(*arguments, "--set", "data.answer=nothing").code == 2
    assert embedgrad(*arguments).code == 0
    other = embedgrad(*arguments, "--set", "training.steps=2")
    assert other.code == 2
    assert "another recipe: training.steps is 1 there and 2 here" in other.err


def test_a_run_is_no_comparison(finished: tuple[Path, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    with refused("run", "no comparison", "--out", error=RunError):
        compare(Recipe.read(run / "recipe.toml"), run)
    assert not (run / "work").exists()


SCORERS = """
def fails(reply, answer):
    if reply != answer:
        raise ValueError("boom")
    return 1

def reads(reply, answer):
    return 1 if reply == str(int(answer)) else 0  # answers of the data are numbers, replies not

def graded(reply, answer):
    return 1 if reply == answer else len(reply) % 5 / 10
"""


@pytest.fixture
def sums(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`sums("fails")` writes a recipe of a generation task that is scored by this function."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{tmp_path.name.translate(str.maketrans('-[]', '___'))}"
    (tmp_path / f"{name}.py").write_text(SCORERS)
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(40)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def write(function: str, **scorer: Any) -> Path:
        own = {"name": "callable", "function": f"{name}:{function}", **scorer}
        sections = values(
            model_folder,
            tmp_path,
            data={"train": str(data), "answer": "answer"},
            template={"user": "{question}\n\n[[Give the answer only:]]"},
            target={"choices": []},
            evaluation={"scorer": own, "max_new_tokens": 3},
            training={"steps": 1, "batch_size": 8},
            solutions={"source": "answer"},
            compare={"seeds": [0]},
        )
        del sections["data"]["dev"], sections["data"]["test"]
        path = tmp_path / "sums.toml"
        path.write_text(tomli_w.dumps(sections))
        return path

    return write


def test_without_the_text_prompt_there_is_nothing_to_compare(
    sums: Write, embedgrad: Command, tmp_path: Path
) -> None:
    done = embedgrad("compare", sums("fails"), "--out", tmp_path / "run", "--quiet")
    assert done.code == 2
    assert done.out == ""
    (line,) = done.lines
    assert "raised ValueError: boom" in line


def test_a_function_gets_no_reply_as_an_answer(
    sums: Write, embedgrad: Command, tmp_path: Path
) -> None:
    arguments = ("compare", sums("reads"), "--out", tmp_path / "run", "--methods", "text")
    done = embedgrad(*arguments, "--json")
    assert done.code == 0
    assert done.json["rows"][0]["unread"] == 0


def test_parts_of_an_older_version_are_read(copied: Path, model_folder: Path, data: Path) -> None:
    part = copied / "work" / "text" / "scored.json"
    scores = json.loads(part.read_text())
    del scores["unread"], scores["scores"], scores["sha256"]
    part.write_text(json.dumps(scores))
    results = compare(Recipe.from_dict(values(model_folder, data, **SMALL)), copied)
    assert results["rows"][0]["unread"] is None


def test_scores_between_right_and_wrong_are_compared_as_they_are(
    sums: Write, embedgrad: Command, tmp_path: Path
) -> None:
    path, out = sums("graded"), tmp_path / "run"
    done = embedgrad("compare", path, "--out", out, "--methods", "random-init", "--json")
    assert done.code == 0
    text, random = done.json["rows"]
    differences = row_differences(text["scores"], [random["scores"]])
    assert set(differences) - {0}
    assert random["difference"] == pytest.approx(random["accuracy"] - text["accuracy"])
    assert random["difference_interval"] == list(bootstrap_mean(differences))
    told = told_of(done.json)["random-init"]
    assert told["p_value"] == random["p_value"] == sign_flip_test(differences)
    assert "; p by flipped signs\n" in (out / "table.md").read_text()
    longer = embedgrad("compare", sums("graded", timeout=9.0), "--out", out, "--json")
    assert longer.code == 0  # what was scored in time stays what it is
    assert longer.json["rows"][0] == text


def test_a_seed_of_embedgrad_that_failed_is_no_gain(whole: tuple[Path, dict[str, Any]]) -> None:
    judged = [entry | {"verdict": "improved"} for entry in whole[1]["methods"]]
    results = {**whole[1], "methods": judged}
    assert reliable_gain(results) == (True, "embedgrad: improved over the text prompt")
    gained, told = reliable_gain({**results, "failed": {"embedgrad": "no memory"}})
    assert not gained
    assert told == "embedgrad failed: no memory"


def test_trainings_on_other_solutions_are_not_mixed(
    copied: Path, whole: tuple[Path, dict[str, Any]], model_folder: Path, data: Path
) -> None:
    recipe = Recipe.from_dict(values(model_folder, data, **SMALL))
    folder = Folder(copied)
    folder.agree(recipe, {"set of solutions": "sha256:1"})
    with refused("another set of solutions", "--out", error=RunError):
        folder.agree(recipe, {"set of solutions": "sha256:2"})
