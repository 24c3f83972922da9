"""Room for the prefixes of a batch, the effect of half precision, files on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import Recipe, run
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, evaluate
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Target
from embedgrad.recipe.prefix_cache_effect import lack_of_room, precision_effect
from embedgrad.training.settings import Training
from kit import LABELS, Kit, noisy
from kit_loop import small, train
from kit_loss import mixed
from run_kit import Command, values

pytest_plugins = ["tiny_runs"]


# --------------------------------------------------------------------------------- room for a batch


def test_a_budget_below_one_batch_is_told_with_both_numbers() -> None:
    made = small()
    sizes = sorted(
        prefix.nbytes for prefix in made.model.prefixes_of([s.prefix for s in made.sequences])
    )
    need = sum(sizes[-3:])
    made = made.with_cache(PrefixCache(need - 1))
    note = lack_of_room(made.model, made.sequences, 3)
    assert note == (
        f"prefix_cache.budget: the prefixes of a batch of 3 rows need {round(need / 1000)} kB, and "
        f"there is room for {round((need - 1) / 1000)} kB; the others are computed again in every "
        "step, with the same results; raise the budget or name a folder in prefix_cache.spill"
    )
    for budget in (need, 0):
        model = made.model.with_prefix_cache(PrefixCache(budget))
        assert lack_of_room(model, made.sequences, 3) is None
    made = made.with_cache(PrefixCache(need // 2 + 1, precision="half"))
    assert lack_of_room(made.model, made.sequences, 3) is None


def test_one_prefix_for_all_rows_needs_room_once() -> None:
    made = small(template="system")
    (prefix,) = made.model.prefixes_of([made.sequences[0].prefix])
    made = made.with_cache(PrefixCache(prefix.nbytes))
    assert lack_of_room(made.model, made.sequences, 12) is None


def test_rows_without_prefixes_need_no_room() -> None:
    made = small(template="plain-start").with_cache(PrefixCache(1))
    assert lack_of_room(made.model, made.sequences, 12) is None


# -------------------------------------------------------------------------- what is kept for whom


def with_room_for_three(made: Kit) -> Kit:
    sizes = sorted(
        prefix.nbytes for prefix in made.model.prefixes_of([s.prefix for s in made.sequences])
    )
    return made.with_cache(PrefixCache(sum(sizes[-3:])))


def test_train_rows_take_the_room_of_dev_rows_that_are_scored_less_often() -> None:
    made = with_room_for_three(small())
    train(made, Training(steps=6, batch_size=8, evaluate_every=6))
    # Three rows and more for five steps; the dev rows, which came first, would give one hit each.
    assert made.model.prefix_cache.hits >= 3 * 5
    assert made.model.prefix_cache.most_bytes <= made.model.prefix_cache.budget


def test_test_rows_take_the_room_of_a_training_that_is_over() -> None:
    made = with_room_for_three(small(rows=20))
    refined = train(made, dev=made.sequences[8:12])
    before = made.model.prefix_cache.hits
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=4))
    evaluate(evaluator, refined.prompt, made.sequences[12:])
    assert made.model.prefix_cache.hits - before >= 3


@pytest.mark.parametrize("target", [LABELS, Target()], ids=["choices", "free answers"])
def test_prefixes_are_asked_for_as_often_as_expected(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(target=target)
    prefixes, got = made.model.prefix_cache, Counter[Ids]()
    expected: dict[Ids, float] = {}
    get, expect = prefixes.get, prefixes.expect

    def counted(ids: Ids) -> CachedPrefix | None:
        got[ids] += 1
        return get(ids)

    def noted(*groups: tuple[list[Ids], float]) -> None:
        for group, uses in groups:
            for ids in group:
                expected[ids] = expected.get(ids, 0) + uses
        expect(*groups)

    monkeypatch.setattr(prefixes, "get", counted)
    monkeypatch.setattr(prefixes, "expect", noted)
    evaluation = Evaluation(batch_size=4, max_new_tokens=2)
    training = Training(epochs=3, batch_size=4, evaluate_every=3)
    refined = train(made, training, evaluation=evaluation)
    assert len({s.prefix for s in made.sequences}) == len(expected) == 12
    assert got == expected
    evaluate(Evaluator(made.model, made.sequencer, evaluation), refined.prompt, made.sequences)
    assert got == expected


# ------------------------------------------------------------------------- what half precision does


@pytest.mark.parametrize("choices", [True, False])
def test_the_effect_is_that_of_rounded_prefixes(choices: bool) -> None:
    made = mixed()
    rows, objective = noisy(made.start), CrossEntropy()
    stored = made.model.prefix_cache

    def losses(prefixes: PrefixCache) -> torch.Tensor:
        model = made.model.with_prefix_cache(prefixes)
        for _ in range(2):  # the second time from what is stored
            outcome = model.outcome(rows, made.sequences, choices=choices)
        return objective.losses(outcome)

    change = losses(PrefixCache(2**30, precision="half")) - losses(PrefixCache(2**30))
    effect = precision_effect(made.model, rows, made.sequences, objective, choices=choices)
    assert effect == pytest.approx(change.abs().mean().item(), rel=1e-6)
    assert 1e-7 < effect < 1e-2
    assert made.model.prefix_cache is stored
    assert (len(stored), stored.hits, stored.misses) == (0, 0, 0)


def test_a_model_in_half_precision_loses_nothing() -> None:
    made = small(dtype=torch.bfloat16)
    assert (
        precision_effect(made.model, made.start, made.sequences, CrossEntropy(), choices=True)
        == 0.0
    )


# --------------------------------------------------------------------------------------- whole runs


def prompt_and_predictions(folder: Path) -> tuple[bytes, list[Any]]:
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return (folder / "prompt" / "prompt.safetensors").read_bytes(), rows


def test_a_run_spills_and_leaves_no_file(
    model_folder: Path, data: Path, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    spill = tmp_path / "prefixes"
    cache = {"budget": "30 kB", "spill": str(spill)}
    events: list[dict[str, Any]] = []
    seen: list[int] = []

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        seen.append(len(list(spill.glob("*/*.prefix"))))

    recipe = Recipe.from_dict(values(model_folder, data, prefix_cache=cache))
    result = run(recipe, tmp_path / "run", report)
    assert prompt_and_predictions(tmp_path / "run") == prompt_and_predictions(finished[0])
    assert result["prefix_cache"]["hits"] == finished[1]["prefix_cache"]["hits"]
    assert 0 < result["prefix_cache"]["bytes"] <= 30_000 < result["prefix_cache"]["spilled_bytes"]
    assert (result["prefix_cache"]["damaged"], result["prefix_cache"]["precision_effect"]) == (
        0,
        None,
    )
    assert max(seen) > 8
    assert list(spill.iterdir()) == []
    steps = [event for event in events if event["event"] == "step"]
    assert all(event["prefix_cache_spilled_bytes"] > 0 for event in steps)


def test_a_run_that_fails_leaves_no_file(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("embedgrad.experiments.run.optimize", fail)
    cache = {"budget": 0, "spill": str(tmp_path / "prefixes")}
    recipe = Recipe.from_dict(values(model_folder, data, prefix_cache=cache))
    with pytest.raises(RuntimeError, match="a bug"):
        run(recipe, tmp_path / "run")
    assert list((tmp_path / "prefixes").iterdir()) == []


def test_the_effect_of_half_precision_is_told_and_kept(
    recipe: Any, embedgrad: Command, tmp_path: Path
) -> None:
    path = recipe(prefix_cache={"precision": "half"})
    done = embedgrad("optimize", path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text("utf-8"))
    effect = result["prefix_cache"]["precision_effect"]
    assert 1e-7 < effect < 1e-2
    told = f"half-precision prefixes change a row's loss by {effect:.1e} nats (mean of 8 rows)"
    assert told in done.lines


def test_a_budget_below_one_batch_is_told_by_a_run(
    recipe: Any, embedgrad: Command, tmp_path: Path, finished: tuple[Path, Any]
) -> None:
    path = recipe(prefix_cache={"budget": 5000})
    done = embedgrad("optimize", path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    (note,) = [line for line in done.lines if line.startswith("prefix_cache.budget: ")]
    assert "the prefixes of a batch of 8 rows need " in note
    assert ", and there is room for 5 kB; " in note
    assert prompt_and_predictions(tmp_path / "run") == prompt_and_predictions(finished[0])


def test_a_spill_folder_that_cannot_be_is_told_at_once(
    recipe: Any, embedgrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedgrad.recipe.build.load", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    path = recipe(prefix_cache={"spill": str(tmp_path / "file" / "prefixes")})
    done = embedgrad("optimize", path, "--out", tmp_path / "run", "--quiet")
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    folder = str(tmp_path / "file" / "prefixes")
    assert done.err.startswith(f"error: prefix_cache.spill: {folder!r}: no folder")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "file").read_text() == "mine"
