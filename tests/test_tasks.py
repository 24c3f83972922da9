"""Recipes with [[tasks]]: one training, a run folder for each task, and a family for more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from embedgrad import DataError, Recipe, RecipeError, RunError, run
from embedgrad.experiments.tasks import run_tasks
from embedgrad.parts.parameterizations import CP as CPParameterization
from embedgrad.prompt.joint import JointSequencer
from embedgrad.recipe.tasks import read_tasks
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize_tasks
from embedgrad.training.settings import Parts, Training
from kit_loop import QUICK, small
from refusals import refused
from run_kit import CHOICES, PROMPT, Command, values, write_jsonl

pytest_plugins = ["tiny_runs"]

OTHER = "Would they buy it again, yes or no?"
CP = {"name": "cp", "rank": 3}


@pytest.fixture
def recipe_file(model_folder: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe of two tasks on the same rows, of other words and other choices."""

    def write(**sections: Any) -> Path:
        base = values(model_folder, data, training={"epochs": 2, "evaluate_every": 2})
        base = {**base, "parameterization": CP, **sections}
        labels = dict(zip(CHOICES, ("no", "yes"), strict=True))
        second = {
            "name": "again",
            "data": {"labels": labels, "limit": {"train": 16}},
            "template": {"user": f"Review: {{review}}\n\n[[{OTHER}]]"},
            "target": {"choices": ["no", "yes", "maybe"]},
        }
        path = tmp_path / "tasks.toml"
        tasks = base.pop("tasks", [{"name": "good"}, second])
        path.write_text(tomli_w.dumps({**base, "tasks": tasks}), encoding="utf-8")
        return path

    return write


def recipes_of(path: Path, *overrides: str) -> dict[str, Recipe]:
    recipes = read_tasks(path, overrides)
    assert recipes is not None
    return recipes


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "prompt" / "prompt.safetensors")


def test_a_task_is_a_run_like_any_other(
    recipe_file: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "out"
    done = embedgrad("optimize", recipe_file(), "--out", out, "--json")
    assert done.code == 0
    assert list(done.json["tasks"]) == ["good", "again"]
    kept = json.loads((out / "result.json").read_text("utf-8"))
    assert kept["tasks"]["again"]["artifact"] == "again/prompt"
    assert kept["train"]["steps"] == 2 * (24 + 16) // 8
    mean = sum(task["refined"]["accuracy"] for task in kept["tasks"].values()) / 2
    assert kept["mean"]["refined"] == pytest.approx(mean)
    low, high = kept["mean"]["interval"]
    assert low <= kept["mean"]["difference"] <= high
    for name, words in (("good", PROMPT), ("again", OTHER)):
        own = json.loads((out / name / "result.json").read_text("utf-8"))
        again = embedgrad("evaluate", out / name, "--json")
        assert again.code == 0
        assert again.json["refined"]["accuracy"] == own["refined"]["accuracy"]
        shown = embedgrad("inspect", out / name, "--rows", "0", "--json").json
        assert words in shown["spans"][0]
    assert embedgrad("report", out, "--no-model").code == 0
    page = (out / "report.html").read_text("utf-8")
    for text in ('<section id="tasks"', '<th scope="row">again</th>', 'id="learning"'):
        assert text in page
    shown = embedgrad("optimize", recipe_file(), "--out", tmp_path / "table")
    assert [line.split()[0] for line in shown.out.splitlines()[2:5]] == ["good", "again", "mean"]


def test_tasks_share_factors(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    result = run_tasks(recipes_of(recipe_file()), tmp_path / "out")
    shared = load_file(tmp_path / "out" / "family.safetensors")
    checkpoint = Checkpoint.find(tmp_path / "out" / "checkpoint")
    assert torch.equal(shared["right"], checkpoint.best_theta["right"])
    assert shared["right"].abs().max() > 0
    assert result["trained_numbers"] == sum(v.numel() for v in shared.values()) + 2 * 3
    for number, name in enumerate(("good", "again"), 1):
        found = rows_of(tmp_path / "out" / name)
        start, rows = found["start_rows"].float(), found["rows"]
        size = start.pow(2).mean(-1, keepdim=True).sqrt()
        codes = checkpoint.best_theta[f"span {number} codes"]
        change = (shared["left"][: len(start)] * codes) @ shared["right"]
        moved = size * change
        assert moved.abs().max().item() > 0.02
        assert torch.allclose(rows, start + moved, atol=5e-4)  # the start is kept in float16


def test_a_further_task_trains_its_own_numbers_alone(
    recipe_file: Callable[..., Path], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run_tasks(recipes_of(recipe_file()), tmp_path / "out")
    before = (tmp_path / "out" / "family.safetensors").read_bytes()
    family = {"name": "cp", "family": str(tmp_path / "out")}
    settings = values(model_folder, data, parameterization=family)
    run(Recipe.from_dict(settings), tmp_path / "new")
    theta = Checkpoint.find(tmp_path / "new" / "checkpoint").theta
    assert {name: value.numel() for name, value in theta.items()} == {"span codes": 3}
    assert not torch.equal(theta["span codes"], torch.ones(1, 3))
    assert (tmp_path / "out" / "family.safetensors").read_bytes() == before


def test_a_resumed_run_comes_to_the_same_bits(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipes = recipes_of(recipe_file())
    run_tasks(recipes, tmp_path / "whole")
    asked = iter(range(1, 100))
    stopped = run_tasks(recipes, tmp_path / "cut", should_stop=lambda: next(asked) == 5)
    assert stopped["interrupted"]
    assert stopped["mean"] is None
    result = run_tasks(recipes, tmp_path / "cut", resume=True)
    assert not result["interrupted"]
    for name in recipes:
        whole, cut = (rows_of(tmp_path / run / name)["rows"] for run in ("whole", "cut"))
        assert torch.equal(whole, cut)
    families = [tmp_path / run / "family.safetensors" for run in ("whole", "cut")]
    assert families[0].read_bytes() == families[1].read_bytes()
    again = run_tasks(recipes_of(tmp_path / "cut" / "recipe.toml"), tmp_path / "cut", resume=True)
    assert again["tasks"]["good"]["refined"] == result["tasks"]["good"]["refined"]


def test_a_row_moves_its_own_task_alone() -> None:
    made, other = small(), small()
    tasks = {"a": made.sequencer, "b": other.sequencer}
    joint = JointSequencer(tasks)
    both = joint.join({"a": made.sequences, "b": ()})
    outcome_rows = torch.cat([made.start, other.start]).requires_grad_()
    outcome = made.model.outcome(outcome_rows, both)
    alone = made.model.outcome(made.start, made.sequences)
    assert torch.equal(outcome.logprobs_BC, alone.logprobs_BC)
    (gradient,) = torch.autograd.grad(outcome.logprobs_BC.sum(), outcome_rows)
    moved = gradient.abs().amax(dim=1) > 0
    assert moved.tolist() == [True] * len(made.start) + [False] * len(other.start)


def test_free_prompts_are_trained_together(tmp_path: Path) -> None:
    made = small()
    tasks = {"a": made.sequencer, "b": made.sequencer}
    rows = {"a": made.sequences[:8], "b": made.sequences[8:]}
    dev = {name: part[:4] for name, part in rows.items()}
    found, theta = optimize_tasks(made.model, tasks, rows, dev, training=QUICK)
    assert list(theta) == ["span 1", "span 2"]
    a, b = (found[name].prompt for name in tasks)
    assert torch.equal(a.start_rows, b.start_rows)
    assert not torch.equal(a.rows, b.rows)
    assert found["a"].best is found["b"].best


def in_domains(data: Path, folder: Path, **extra: Any) -> dict[str, Any]:
    """Data whose rows are of two domains, and the tasks that take one each."""
    paths = {}
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        rows = [{**row, **extra, "domain": "ab"[i % 2]} for i, row in enumerate(rows)]
        paths[split] = str(write_jsonl(folder / f"{split}.jsonl", rows))
    tasks = [{"name": name, "data": {"where": {"domain": name}}} for name in "ab"]
    return {"data": paths, "tasks": tasks}


def test_owa_compares_tasks(
    recipe_file: Callable[..., Path], data: Path, tmp_path: Path, embedgrad: Command
) -> None:
    objective = {"name": "owa", "group": "domain", "weights": "worst"}
    recipes = recipes_of(recipe_file(**in_domains(data, tmp_path), objective=objective))
    asked = iter(range(1, 100))
    run_tasks(recipes, tmp_path / "cut", should_stop=lambda: next(asked) == 3)
    for resume, folder in ((False, "whole"), (True, "cut")):
        result = run_tasks(recipes, tmp_path / folder, resume=resume)
    assert [group["group"] for group in result["tasks"]["a"]["groups"]["text"]] == ["a"]
    assert torch.equal(*(rows_of(tmp_path / run / "b")["rows"] for run in ("whole", "cut")))
    kept = Checkpoint.find(tmp_path / "cut" / "checkpoint").objective
    assert sorted(kept) == ["a", "b"]
    assert embedgrad("evaluate", tmp_path / "cut" / "a").code == 0


def test_rows_of_all_tasks_are_checked(
    recipe_file: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    own = in_domains(data, tmp_path, kind="same")
    objective = {"name": "owa", "group": "kind"}
    with refused("rows have 'same' in column 'kind'", error=DataError):
        run_tasks(recipes_of(recipe_file(**own, objective=objective)), tmp_path / "out")
    masked = [{"name": "masked_thought"}]
    with refused("no training row has one before", error=RecipeError):
        run_tasks(recipes_of(recipe_file(**own, augmentations=masked)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_are_chosen_by_one_score(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = iter(["accuracy", "log_loss"])  # as with solutions from two sources
    monkeypatch.setattr(Training, "metric_for", lambda *_, **__: next(metrics))
    with refused("'auto' would be accuracy or log_loss", error=RecipeError):
        run_tasks(recipes_of(recipe_file()), tmp_path / "out")


def test_an_interruption_returns_the_theta_of_its_prompts() -> None:
    made, cp = small(), CPParameterization(rank=3)
    tasks = {"a": made.sequencer, "b": made.sequencer}
    rows = {"a": made.sequences[:8], "b": made.sequences[8:]}
    bests = set()
    for step in range(1, 5):

        def interrupt(event: dict[str, Any], step: int = step) -> None:
            if event["event"] == "evaluation" and event["step"] == step:
                raise KeyboardInterrupt

        found, theta = optimize_tasks(
            *(made.model, tasks, rows, rows),
            training=replace(QUICK, evaluate_every=1, metric="log_loss"),
            parts=Parts(parameterization=cp),
            report=interrupt,
        )
        start = found["a"].prompt.start_rows
        prompts = cp.prompt(theta, {"span 1": start, "span 2": start})
        assert torch.equal(prompts["span 2"], found["b"].prompt.rows)
        bests.add(found["a"].best.step)
    assert len(bests) > 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": []}, "tasks: expected two or more"),
        ({"tasks": [{"name": "a"}]}, "tasks: expected two or more"),
        ({"tasks": "good"}, "tasks: expected a list of tables"),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "tasks.1.name: 'a'; expected a name"),
        ({"tasks": [{"name": "a"}, {"name": "../b"}]}, "tasks.1.name: '../b'; expected a name"),
        ({"tasks": [{"name": "a", "tasks": []}, {"name": "b"}]}, "tasks.0.tasks: a task has none"),
        ({"tasks": [{"name": "a"}, {}]}, "tasks.1.name: None; expected a name"),
        ({"tasks": [{"name": "a"}, {"name": "A"}]}, "tasks.1.name: 'A'; expected a name"),
        ({"tasks": [{"name": "checkpoint"}, {"name": "b"}]}, "other than 'checkpoint'"),
        (
            {"parameterization": {"name": "cp", "rank": 0}},
            "task good, again: parameterization.rank",
        ),
        (
            {"parameterization": {"name": "cp", "rank": 3, "family": "runs/x"}},
            "parameterization.rank: 3, but the family has its own",
        ),
        (
            {"tasks": [{"name": "a"}, {"name": "b", "training": {"epochs": 9}}]},
            "tasks a and b differ in training, which they must share",
        ),
        (
            {"tasks": [{"name": "a"}, {"name": "b", "target": {"choice": ["x"]}}]},
            "task b: target.choice: unknown option",
        ),
        (
            {"tasks": [{"name": "a"}, {"name": "b", "template": {"user": "no span"}}]},
            "task b: ",
        ),
        ({"demonstrations": {"k": 2}}, "demonstrations.k: not with [[tasks]]"),
        ({"training": {"warm_start": "x"}}, "training.warm_start: not with [[tasks]]"),
        ({"training": {"replay": 0.25}}, "training.replay: not with [[tasks]]"),
        ({"report": {"elicit": True}}, "report.elicit: not with [[tasks]]"),
        (
            {
                "objective": {
                    "name": "regret",
                    "decision": "cost_matrix",
                    "costs": [[0, 2], [1, 0]],
                },
                "tasks": [{"name": "a"}, {"name": "b"}],
            },
            "objective: 'regret' not with [[tasks]]",
        ),
        (
            {"objective": {"name": "reward"}},
            "objective: with [[tasks]] prompts are trained on answers",
        ),
    ],
)
def test_a_mistake_is_one_line(
    recipe_file: Callable[..., Path], sections: dict[str, Any], message: str
) -> None:
    with refused(message, error=RecipeError):
        recipes_of(recipe_file(**sections))


def test_targets_of_two_kinds_are_refused(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe_file(tasks=[{"name": "a"}, {"name": "b", "target": {"choices": []}}])
    with refused("tasks: the targets of a, b differ", error=RecipeError):
        run_tasks(recipes_of(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"pickle", "cannot be read")],
)
def test_a_family_that_is_none(
    model_folder: Path, data: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "family.safetensors").write_bytes(content)
    family = {"name": "cp", "family": str(tmp_path)}
    recipe = Recipe.from_dict(values(model_folder, data, parameterization=family))
    with refused("parameterization.family", message, error=RecipeError):
        run(recipe, tmp_path / "new")


def test_a_family_of_shorter_prompts_is_refused(
    recipe_file: Callable[..., Path], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run_tasks(recipes_of(recipe_file(), "training.steps=1"), tmp_path / "out")
    family = {"name": "cp", "family": str(tmp_path / "out")}
    template = {"user": f"{{review}}\n\n[[{' '.join([PROMPT] * 9)}]]"}
    recipe = values(model_folder, data, parameterization=family, template=template)
    with refused("is of prompts of up to", error=RecipeError):
        run(Recipe.from_dict(recipe), tmp_path / "new")


def test_other_commands_say_what_to_do(
    recipe_file: Callable[..., Path], tmp_path: Path, embedgrad: Command
) -> None:
    done = embedgrad("plan", recipe_file())
    assert done.code == 2
    assert "only `embedgrad optimize` takes a recipe of several [[tasks]]" in done.err
    with refused("exists already", error=RunError):
        run_tasks(recipes_of(recipe_file()), tmp_path)
