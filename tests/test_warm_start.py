"""A warm start: training goes on from an earlier run's rows, inside the same trust region."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from embedgrad import Recipe, RecipeError, RunError, run
from embedgrad.errors import ArtifactError
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import PARAMETERIZATIONS
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.settings import Parts, Training
from kit_loop import rows_at_evaluations, small, train
from refusals import refused
from run_kit import values

pytest_plugins = ["tiny_runs"]

STILL = Parts(optimizer=AdamW(learning_rate=1e-12))


def test_training_goes_on_from_the_rows() -> None:
    made = small()
    rows = train(made, dev=[], training=Training(steps=4)).best.prompt
    assert not torch.equal(rows["span"], made.start)
    events: list[dict[str, Any]] = []
    _, seen = rows_at_evaluations(
        made, warm_start=rows, parts=STILL, training=Training(steps=2), report=events.append
    )
    assert (seen[2] - rows["span"]).abs().max() < 1e-6
    text, warm = [e for e in events if e["event"] == "evaluation" and e["step"] == 0]
    assert (text["warm_start"], warm["warm_start"]) == (False, True)
    assert text["log_loss"] != warm["log_loss"]


def test_the_better_of_text_and_warm_rows_is_kept() -> None:
    made = small()
    good = train(made, dev=[], training=Training(steps=30)).best.prompt
    bad = {"span": made.start + 0.2 * made.start.norm(dim=1, keepdim=True)}
    options = {"parts": STILL, "training": Training(steps=1, metric="log_loss")}
    sequences = made.sequences[:8]  # the rows that the first training saw
    kept = train(made, dev=sequences, warm_start=good, **options)
    assert (kept.best.prompt["span"] - good["span"]).abs().max() < 1e-6
    assert kept.best.score["log_loss"] < kept.best.history[0]["log_loss"]
    text = kept.best.history[0]["log_loss"]
    worse = train(made, dev=sequences, warm_start=bad, **options)
    if worse.best.history[1]["log_loss"] > text:
        assert torch.equal(worse.best.prompt["span"], made.start)
        assert worse.best.score == worse.best.history[0]


def test_the_region_stays_around_the_words() -> None:
    made = small()
    far = {"span": made.start * 3}
    parts = Parts(trust_region=TrustRegion(radius=0.1), optimizer=STILL.optimizer)
    _, seen = rows_at_evaluations(made, warm_start=far, parts=parts, training=Training(steps=1))
    assert TrustRegion(radius=0.1).holds(seen[1], made.start)


@pytest.mark.parametrize("name", sorted(set(PARAMETERIZATIONS) - {"free"}))
def test_a_parameterization_that_cannot_is_refused(name: str) -> None:
    made = small()
    parts = Parts(parameterization=PARAMETERIZATIONS[name]())
    with refused("training.warm_start", error=RecipeError):
        train(made, warm_start={"span": made.start}, parts=parts)


# ------------------------------------------------------------------------------------- from a run


@pytest.fixture
def earlier(model_folder: Path, data: Path, tmp_path: Path) -> Path:
    run(Recipe.from_dict(values(model_folder, data)), tmp_path / "earlier")
    return tmp_path / "earlier"


def warm(model: Path, data: Path, earlier: Path, **training: Any) -> Recipe:
    settings = {"epochs": 2, "evaluate_every": 2, "warm_start": str(earlier), **training}
    return Recipe.from_dict(values(model, data, training=settings))


def test_a_run_resumes_to_the_bit(
    model_folder: Path, data: Path, earlier: Path, tmp_path: Path
) -> None:
    recipe = warm(model_folder, data, earlier)
    whole = run(recipe, tmp_path / "whole")
    asked = iter(range(1, 100))
    run(recipe, tmp_path / "run", should_stop=lambda: next(asked) == 3)
    result = run(recipe, tmp_path / "run", resume=True)
    assert result["refined"] == whole["refined"]
    one, other = (
        load_file(tmp_path / name / "prompt" / "prompt.safetensors")["rows"]
        for name in ("run", "whole")
    )
    assert torch.equal(one, other)
    assert "warm_start = " in (tmp_path / "run" / "recipe.toml").read_text("utf-8")


def test_a_run_whose_start_has_changed_is_not_resumed(
    model_folder: Path, data: Path, earlier: Path, tmp_path: Path
) -> None:
    recipe = warm(model_folder, data, earlier)
    asked = iter(range(1, 100))
    run(recipe, tmp_path / "run", should_stop=lambda: next(asked) == 3)
    shutil.rmtree(earlier)
    run(Recipe.from_dict(values(model_folder, data, training={"seed": 7, "epochs": 3})), earlier)
    with refused("cannot be resumed, as warm_start", error=RunError):
        run(recipe, tmp_path / "run", resume=True)


def test_other_words_and_another_model_are_refused(
    model_folder: Path, other_models: dict[str, Path], data: Path, earlier: Path, tmp_path: Path
) -> None:
    other = values(model_folder, data, training={"warm_start": str(earlier)})
    other["template"] = {"user": "{review}\n\n[[Is it any good?]]"}
    with refused("training.warm_start", "Is it any good?", error=RunError):
        run(Recipe.from_dict(other), tmp_path / "run")
    with refused("was made for", error=ArtifactError):
        run(warm(other_models["seed"], data, earlier), tmp_path / "run")
    with refused("nowhere", error=ArtifactError):
        run(warm(model_folder, data, tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
