"""`embedgrad continue`: one prompt for a growing set of tasks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedgrad import Recipe, RecipeError, RunError, compare, plan, run
from embedgrad.errors import ArtifactError
from embedgrad.experiments.continual import continue_run, measures
from embedgrad.model.generation import Reply
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.transforms.subspace import read_memory
from embedgrad.recipe.open_run import open_run
from embedgrad.recipe.replay import Replay
from embedgrad.recipe.settings import CompareSettings
from embedgrad.report.figures.run import continual_figure
from embedgrad.report.page.page import run_page
from embedgrad.report.page.run_files import read_run
from embedgrad.report.terminal.progress import describe_score
from embedgrad.training import memory
from embedgrad.training.loss import Loss
from refusals import refused
from run_kit import PROMPT, ROWS, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tasks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data with its answers swapped: what contradicts the first task."""
    folder = tmp_path_factory.mktemp("swapped")
    other = {"positive": "negative", "negative": "positive"}
    for split in ROWS:
        lines = (data / f"{split}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{"review": f"So: {r['review']}", "label": other[r["label"]]} for r in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


def task(model: Path, folder: Path, **sections: Any) -> Recipe:
    training = {"epochs": 1, "evaluate_every": 1, **sections.pop("training", {})}
    return Recipe.from_dict(values(model, folder, training=training, **sections))


@pytest.fixture(scope="module")
def first(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first task's run, without a memory."""
    out = tmp_path_factory.mktemp("first") / "first"
    run(task(model_folder, data), out)
    return out


@pytest.fixture
def earlier(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "first"))


def rows_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "prompt" / "prompt.safetensors")["rows"]


def events_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_averages_and_backward_transfer_by_hand() -> None:
    """Acceptance check (e)."""
    average, backward = measures([[0.9], [0.7, 0.8], [0.6, 0.9, 0.5]])
    assert average == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert backward == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert measures([[0.9]]) == (0.9, 0.0)


def test_a_chain_of_three_tasks(
    model_folder: Path, data: Path, tasks: Path, earlier: Path, tmp_path: Path, embedgrad: Command
) -> None:
    recipe = tmp_path / "second.toml"
    values = task(model_folder, tasks).as_dict()
    values["model"]["name"] = "nobody/nothing"  # --model names the one that is there
    recipe.write_text(Recipe.from_dict(values).as_toml(tmp_path), encoding="utf-8")
    out = tmp_path / "second"
    command = ("continue", earlier, "--on", recipe, "--model", model_folder, "--out", out)
    done = embedgrad(*command, "--json")
    assert done.code == 0, done.err
    found = done.json["continual"]
    assert found["tasks"] == ["first", "second"]
    kept = json.loads((out / "result.json").read_text("utf-8"))
    assert kept["continual"] == found
    assert kept["artifact"] == "prompt"
    one = json.loads((earlier / "result.json").read_text("utf-8"))
    own = json.loads((out / "separate" / "result.json").read_text("utf-8"))
    assert found["matrix"][0] == [one["refined"]["accuracy"]]
    assert found["matrix"][1][1] == kept["refined"]["accuracy"]
    assert found["separate"] == [one["refined"]["accuracy"], own["refined"]["accuracy"]]
    assert found["text"] == [one["text"]["accuracy"], kept["text"]["accuracy"]]
    # The first task is scored with the new rows.
    shutil.copytree(earlier, tmp_path / "mixed")
    shutil.copytree(out / "prompt", tmp_path / "mixed" / "prompt", dirs_exist_ok=True)
    again = embedgrad("evaluate", tmp_path / "mixed", "--json").json
    assert again["refined"]["accuracy"] == found["matrix"][1][0]
    # Its memory holds the first's, which the way from its rows leaves alone.
    before, after = read_memory(earlier), read_memory(out)
    assert torch.equal(after[: len(before)], before)
    assert len(after) > len(before) > 1
    assert (found["directions"], found["trained_numbers"]) == after.shape
    start = open_run(out).prompt.start_rows
    size = start.pow(2).mean(-1, keepdim=True).sqrt()
    moved = ((rows_of(out) - rows_of(earlier)) / size).flatten()
    assert moved.norm() > 0.01
    assert (before @ moved).abs().max() < 1e-4 * moved.norm()  # rows are kept in 32 bits
    # A further task goes on from there, and the prompt stays as large.
    third = tmp_path / "third"
    result = continue_run(
        out, task(model_folder, data, training={"seed": 7}), third, separate=False
    )
    last = result["continual"]
    assert last["tasks"] == ["first", "second", "third"]
    assert last["matrix"][:2] == found["matrix"]
    assert len(last["matrix"][2]) == 3
    assert last["separate"][2] is None
    assert rows_of(third).shape == rows_of(earlier).shape  # acceptance check (d)
    assert last["trained_numbers"] == found["trained_numbers"] == rows_of(earlier).numel()
    command = ("continue", out, "--on", recipe, "--model", model_folder, "--out", third)
    shown = embedgrad(*command, "--no-separate")
    assert (shown.code, len(shown.lines)) == (2, 1)
    assert "a resumed run keeps its recipe" in shown.err


def test_what_was_interrupted_goes_on_to_the_same_bits(
    model_folder: Path, tasks: Path, earlier: Path, tmp_path: Path
) -> None:
    recipe = task(model_folder, tasks)
    whole = continue_run(earlier, recipe, tmp_path / "whole", separate=False)
    asked = iter(range(1, 100))
    stopped = continue_run(
        earlier, recipe, tmp_path / "cut", separate=False, should_stop=lambda: next(asked) == 2
    )
    assert stopped["interrupted"]
    assert "continual" not in stopped
    with refused("is not finished", error=RunError):
        continue_run(tmp_path / "cut", recipe, tmp_path / "next")
    run(Recipe.read_run(tmp_path / "cut"), tmp_path / "cut", resume=True)
    with refused("is not finished", error=RunError):  # trained, but without its memory
        continue_run(tmp_path / "cut", recipe, tmp_path / "next")
    result = continue_run(earlier, recipe, tmp_path / "cut", separate=False)
    assert torch.equal(rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut"))
    assert result["continual"]["matrix"] == whole["continual"]["matrix"]
    memories = [read_memory(tmp_path / name) for name in ("whole", "cut")]
    assert torch.equal(*memories)
    finished = continue_run(earlier, recipe, tmp_path / "cut", separate=False)
    assert finished["continual"] == result["continual"]


def test_rows_of_earlier_tasks_are_replayed(
    model_folder: Path,
    tasks: Path,
    earlier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def again(share: float, name: str, **options: Any) -> torch.Tensor:
        recipe = task(model_folder, tasks, training={"replay": share})
        continue_run(earlier, recipe, tmp_path / name, separate=False, **options)
        return rows_of(tmp_path / name)

    whole = again(0.25, "whole")
    assert not torch.equal(whole, again(0.0, "without"))
    asked = iter(range(1, 100))
    again(0.25, "cut", should_stop=lambda: next(asked) == 2)
    assert torch.equal(again(0.25, "cut"), whole)
    sizes = [e["examples"] for e in events_of(tmp_path / "whole") if e["event"] == "step"]
    assert set(sizes) == {8 + 3}  # 3 of 11 are a quarter, as nearly as can be
    # A comparison and a plan do as the run does.
    same = Recipe.read_run(tmp_path / "whole")
    compared = compare(
        dataclasses.replace(same, compare=CompareSettings(methods=("embedgrad",), seeds=(0,))),
        tmp_path / "compared",
    )
    assert compared["rows"][1]["accuracy"] is not None
    trained = load_file(tmp_path / "compared/work/embedgrad-seed-0/trained.safetensors")
    assert torch.equal(trained["rows"], whole)
    sizes = []
    gradient = Loss.gradient
    with monkeypatch.context() as patch:

        def noted(self: Loss, theta: Any, batch: Any, *arguments: Any) -> Any:
            sizes.append(len(batch))
            return gradient(self, theta, batch, *arguments)

        patch.setattr(Loss, "gradient", noted)
        assert not plan(same)["problems"]
    assert set(sizes) == {8 + 3}
    other = values(model_folder, tasks, training={"replay": 0.25})
    other["template"] = {"user": f"{{review}}\n\n[[{PROMPT}]]"}
    with refused("whose rows cannot be replayed here", error=RunError):
        continue_run(earlier, Recipe.from_dict(other), tmp_path / "other")
    rewarded = {"training": {"replay": 0.25}, "objective": {"name": "reward"}}
    with refused("training.replay: adds rows with their answers, but", error=RecipeError):
        task(model_folder, tasks, **rewarded)
    alone = task(model_folder, tasks, training={"replay": 0.25})
    with refused("needs a run that the training continues", error=RecipeError):
        run(alone, tmp_path / "alone")
    rows = {"replay": 0.25, "warm_start": str(earlier / "prompt")}
    with refused("prompt holds no run with rows to replay", "leave replay at 0", error=RunError):
        run(task(model_folder, tasks, training=rows), tmp_path / "rows")


def test_replayed_rows_have_the_columns_that_the_new_objective_reads(
    model_folder: Path, data: Path, earlier: Path, tmp_path: Path
) -> None:
    owa = {"name": "owa", "group": "label", "weights": "worst", "balanced": False}
    recipe = task(model_folder, data, training={"replay": 0.25}, objective=owa)
    result = continue_run(earlier, recipe, tmp_path / "out", separate=False)
    assert result["train"]["ended"] == "finished"


def test_rows_of_earlier_tasks_keep_the_solutions_that_the_model_wrote(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In replay, and in what the earlier task depends on."""
    monkeypatch.setenv("EMBEDGRAD_CACHE", str(tmp_path / "cache"))

    def solved(question: str) -> tuple[Reply, ...]:
        first = int(question.split()[2])
        return (Reply(f"{first} and 1 make {first + 1}", cut=False),)

    def write(_: Any, rows: Any, sequences: Any, *others: Any, **options: Any) -> Any:
        return [solved(sequence.example.columns["question"]) for sequence in sequences]

    monkeypatch.setattr(LanguageModel, "generate", write)
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(30)]
    write_jsonl(tmp_path / "sums.jsonl", rows)

    def sums(**training: Any) -> Recipe:
        recipe = values(
            model_folder,
            tmp_path,
            data={"train": str(tmp_path / "sums.jsonl"), "answer": "answer"},
            template={"user": "{question}\n\n[[Give the answer:]]"},
            target={"choices": []},
            solutions={"samples": 1, "temperature": 0.0},
            evaluation={"scorer": "number", "max_new_tokens": 4},
            training={"steps": 1, **training},
        )
        del recipe["data"]["dev"], recipe["data"]["test"]
        return Recipe.from_dict(recipe)

    run(sums(), tmp_path / "sums")
    replayed, remembered = list[str](), list[str]()
    call, gradients = Replay.__call__, memory.margin_gradients

    def noted(self: Replay, batch: Any, context: Any) -> Any:
        replayed.extend(s.example.written for s in self.earlier)
        return call(self, batch, context)

    def seen(*arguments: Any) -> Any:
        remembered.extend(s.example.written for s in arguments[-1])
        return gradients(*arguments)

    monkeypatch.setattr(Replay, "__call__", noted)
    monkeypatch.setattr(memory, "margin_gradients", seen)
    continue_run(tmp_path / "sums", sums(replay=0.25), tmp_path / "out", separate=False)
    assert all(" and 1 make " in text for text in (*replayed, *remembered))
    assert replayed
    assert remembered


def test_a_distilled_prompt_is_not_continued(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    taught = values(
        model_folder,
        data,
        objective={"name": "distill"},
        teacher={"template": {"system": "You are a critic.", "user": "{review}"}},
        training={"steps": 1},
    )
    run(Recipe.from_dict(taught), tmp_path / "taught")
    with refused("was distilled from a [teacher]", error=RunError):
        continue_run(tmp_path / "taught", task(model_folder, data), tmp_path / "out")


def test_the_text_is_no_way_back(
    model_folder: Path, tasks: Path, earlier: Path, tmp_path: Path
) -> None:
    """The text's rows may be best for the new task, but know nothing of the first."""
    still = {"optimizer": {"learning_rate": 1e-12}}
    continue_run(earlier, task(model_folder, tasks, **still), tmp_path / "out", separate=False)
    assert (rows_of(tmp_path / "out") - rows_of(earlier)).abs().max() < 1e-6
    scores = [e for e in events_of(tmp_path / "out") if e["event"] == "evaluation"]
    assert len(scores) > 1
    lines = [describe_score(score) for score in scores]
    assert lines[0].endswith(" with its warm start")
    assert all(", best " in line and "text prompt" not in line for line in lines[1:])


def test_the_matrix_is_shown(
    model_folder: Path, tasks: Path, earlier: Path, tmp_path: Path, embedgrad: Command
) -> None:
    recipe = tmp_path / "second.toml"
    recipe.write_text(task(model_folder, tasks).as_toml(tmp_path), encoding="utf-8")
    out = tmp_path / "second"
    done = embedgrad("continue", earlier, "--on", recipe, "--out", out, "--no-separate")
    assert done.code == 0, done.err
    found = json.loads((out / "result.json").read_text("utf-8"))["continual"]
    lines = done.out.splitlines()
    for name, scores in (("after first", found["matrix"][0]), ("after second", found["matrix"][1])):
        (line,) = [line for line in lines if line.startswith(name)]
        assert all(f"{100 * score:.1f} %" in line for score in scores)
    assert f"backward transfer {100 * found['backward_transfer']:+.1f} points" in done.out
    page = run_page(read_run(out), "second")
    assert "after second" in page
    texts = [text.get_text() for text in continual_figure(found).axes[0].texts]
    flat = [f"{100 * score:.1f}" for row in found["matrix"] for score in row]
    assert texts == flat


def test_mistakes_are_one_line(
    model_folder: Path,
    other_models: dict[str, Path],
    data: Path,
    tasks: Path,
    earlier: Path,
    tmp_path: Path,
) -> None:
    out, recipe = tmp_path / "out", task(model_folder, tasks)

    def going_on(recipe: Recipe, folder: Path = earlier) -> None:
        continue_run(folder, recipe, out)

    with refused("holds no run to continue", error=RunError):
        going_on(recipe, tmp_path / "nowhere")
    with refused("holds no run to continue", error=RunError):
        going_on(recipe, earlier / "prompt")
    words = task(model_folder, tasks, template={"user": "{review}\n\n[[Is it any good?]]"})
    with refused("tasks that share a prompt have the same words", error=RunError):
        going_on(words)
    with refused("was made for", error=ArtifactError):
        going_on(task(other_models["seed"], tasks))
    with refused("only 'free' can begin at the rows", error=RecipeError):
        going_on(task(model_folder, tasks, parameterization={"name": "low_rank"}))
    with refused("expected a recipe with test rows", error=RecipeError):
        untested = values(model_folder, tasks)
        del untested["data"]["test"]
        going_on(Recipe.from_dict({**untested, "data": {**untested["data"], "test_share": 0.0}}))
    memory = earlier / "memory.safetensors"
    for content, message in (
        ({"V": torch.eye(2, 5)}, "5 trained numbers"),
        ({"V": torch.ones(2, 5)}, "not orthonormal"),
        ({"W": torch.eye(2)}, "cannot be read"),
    ):
        save_file(content, memory)
        with refused(message, error=RecipeError):
            going_on(recipe)
    memory.write_bytes(b"no tensors")
    with refused("cannot be read", error=RecipeError):
        going_on(recipe)
    (earlier / "result.json").unlink()
    with refused("is not finished, or scored no test rows", error=RunError):
        going_on(recipe)
    assert not out.exists()
