"""Answers that an engine samples: how far it is from us, what it may say, where it is gone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import Recipe, run
from embedgrad.errors import EngineError, OptionError, RecipeError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.experiments.compare.compare import compare
from embedgrad.experiments.compare.recipe_diff import recipe_differences
from embedgrad.experiments.plan import plan
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import Distill, Objective, Reward
from embedgrad.parts.optimizers import AdamW
from embedgrad.prompt.sequence import Target
from embedgrad.recipe.paths import anonymize
from embedgrad.report.page.facts import describe_learning
from embedgrad.report.page.run_files import read_run
from embedgrad.report.terminal.progress import describe_engine
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.engine import KEY, Engine, SamplingEngine, mismatch, summarize
from embedgrad.training.loss import Loss
from embedgrad.training.optimize import optimize
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.settings import Parts, Training
from fake_sampler import NAME, FakeSampler, perturbed
from kit import Kit, kit, noisy
from refusals import refused
from run_kit import values
from test_rollouts import short

pytest_plugins = ["tiny_runs"]
Event = dict[str, Any]
FREE = Target()
SMALL = Training(steps=4, batch_size=2, evaluate_every=4, seed=3)
NAMES = ("mismatch", "mismatch_ratio", "mismatch_cut")


@pytest.fixture(autouse=True)
def some_tokens_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = tuple(range(0, 200, 4))
    monkeypatch.setattr(LanguageModel, "ends_of", lambda *_: ends)
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture(scope="module")
def made() -> Kit:
    return kit("llama", target=FREE, rows=10, tie=False, dtype=torch.float32)


@pytest.fixture
def engine(made: Kit) -> Iterator[FakeSampler]:
    with FakeSampler(made.model) as server:
        yield server  # type: ignore[misc]


def at(address: str, **options: Any) -> SamplingEngine:
    return SamplingEngine(engine=address, **options)


def train(made: Kit, by: SamplingEngine, objective: Reward | None = None, **options: Any) -> Any:
    parts = {"objective": objective or Reward(samples=4), "sampling": by}
    arguments: dict[str, Any] = {
        "training": SMALL,
        "parts": Parts(**parts, optimizer=AdamW(learning_rate=0.1)),
        "evaluation": Evaluation(scorer=short, max_new_tokens=5, batch_size=6),
        "report": lambda event: None,
        **options,
    }
    return optimize(made.model, made.sequencer, made.sequences[:8], made.sequences[8:], **arguments)


def drawing(made: Kit, by: SamplingEngine, objective: Objective, **options: Any) -> Rollouts:
    evaluation = Evaluation(scorer=short, max_new_tokens=5, batch_size=6, **options)
    evaluator = Evaluator(made.model, made.sequencer, evaluation)
    assert objective.sampling
    start = {"span": made.start}
    return Rollouts(
        made.model, evaluator, made.sequences, objective.sampling, by, seed=0, start=start
    )


def test_the_engine_has_our_log_probabilities(made: Kit, engine: FakeSampler) -> None:
    events = list[Event]()
    result = train(made, at(engine.address), report=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 4
    for event in steps:
        assert event["mismatch"] < 1e-5
        assert event["mismatch_ratio"] == pytest.approx(1, abs=1e-5)
        assert event["mismatch_cut"] == 0
        assert event["answers"] >= 8
    assert not any(event["event"] == "note" for event in events)
    assert not torch.equal(result.prompt.rows, result.checkpoint.theta["span"])
    # The rows of the step are in the request, and each has a seed and a salt of its own.
    assert len({body["prompt_embeds"] for body in engine.asked}) == len(engine.asked)
    assert len({body["seed"] for body in engine.asked}) == len(engine.asked)
    assert len({body["cache_salt"] for body in engine.asked}) == len(engine.asked)
    assert {body["n"] for body in engine.asked} == {4}
    assert {body["max_tokens"] for body in engine.asked} == {5}


def test_other_weights_are_noticed(made: Kit) -> None:
    events = list[Event]()
    with FakeSampler(perturbed(made.model, 0.5)) as server:
        train(made, at(server.url + "/v1/"), report=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert min(event["mismatch"] for event in steps) > 0.1
    assert any(event["mismatch_cut"] > 0 for event in steps)
    (warning,) = (event["text"] for event in events if event["event"] == "note")
    assert warning.startswith("step 1: the engine's log-probabilities differ from ours by ")
    whole = summarize([*events, None, {"event": "step", "mismatch": None}])
    assert whole["steps"] == 4
    assert whole["mismatch"] == pytest.approx(sum(e["mismatch"] for e in steps) / 4)
    assert whole["mismatch_max"] == max(e["mismatch"] for e in steps)
    assert summarize([]) == {}


def test_the_gradient_is_that_of_the_same_answers_sampled_here(
    made: Kit, engine: FakeSampler
) -> None:
    objective = Reward(samples=4)
    drawn = drawing(made, at(engine.address), objective)
    rows = noisy(made.start)
    batch, _ = drawn.draw({"span": rows}, made.sequences[:4], 0)
    loss = Loss(made.model, Parts(objective=objective), FREE, {"span": rows})
    here = [
        dataclasses.replace(
            s,
            example=dataclasses.replace(
                s.example, extra={"advantage": s.example.extra["advantage"]}
            ),
        )
        for s in batch
    ]

    def gradient(sequences: Any) -> torch.Tensor:
        theta = {"span": torch.zeros_like(rows, requires_grad=True)}
        return loss.gradient(theta, sequences).gradients["span"]

    assert batch
    assert gradient(here).norm() > 1e-3
    torch.testing.assert_close(gradient(batch), gradient(here), rtol=1e-3, atol=1e-6)
    # Each token's share of it has its weight.
    twice = [
        dataclasses.replace(s, example=s.example.with_extra(weights=[2.0] * len(s.targets[0])))
        for s in batch
    ]
    torch.testing.assert_close(gradient(twice), 2 * gradient(here), rtol=1e-3, atol=1e-6)


def test_answers_to_learn_a_teacher_from_are_measured_too(made: Kit, engine: FakeSampler) -> None:
    objective = Distill(direction="reverse", samples=2, top=6, max_new_tokens=5)
    batch, figures = drawing(made, at(engine.address), objective).draw(
        {"span": made.start}, made.sequences[:2], 0
    )
    assert len(batch) == figures["answers"] == 4
    assert figures["mismatch"] < 1e-5
    assert "reward" not in figures


def test_weights_are_ratios_up_to_a_limit() -> None:
    ours, theirs = [[-1.0, -2.0], [-1.0]], [[-2.0, -2.0], [-1.0 + math.log(2)]]
    weights, figures = mismatch(ours, theirs, 2.0)
    assert weights == [[2.0, 1.0], [pytest.approx(0.5)]]
    assert figures["mismatch"] == pytest.approx((1 + math.log(2)) / 3)
    assert figures["mismatch_ratio"] == pytest.approx((math.e + 1 + 0.5) / 3)
    assert figures["mismatch_cut"] == pytest.approx(1 / 3)
    assert mismatch([[0.0]], [[-9999.0]], 2.0)[0] == [[2.0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_it_draws_as_we_do(made: Kit, engine: FakeSampler, temperature: float) -> None:
    """First tokens by engine and by ourselves: the same shares, at any temperature."""
    objective = Reward(samples=400, temperature=temperature, max_new_tokens=1)
    shares = []
    for by in (at(engine.address), SamplingEngine()):
        drawn = drawing(made, by, objective)
        (group,) = drawn._answer({"span": made.start}, made.sequences[:1], 0)
        found = [(*answer.ids, *answer.end)[0] for answer in group.answers]
        shares.append(torch.bincount(torch.tensor(found), minlength=400)[:400] / 400)
    distance = (shares[0] - shares[1]).abs().sum() / 2
    assert distance < 0.5
    assert {body["temperature"] for body in engine.asked} == {temperature}


def test_answers_end_where_ours_would(made: Kit, engine: FakeSampler) -> None:
    objective = Reward(samples=40)
    text = made.model.tokenizer.decode([33])
    drawn = drawing(made, at(engine.address), objective, stop=(text,))
    groups = drawn._answer({"span": made.start}, made.sequences[:2], 0)
    answers = [answer for group in groups for answer in group.answers]
    assert engine.asked[0]["stop"] == [text]
    assert any(a.ended and a.end for a in answers)
    assert any(not a.ended and len(a.ids) == 5 for a in answers)
    for answer in answers:
        assert len(answer.logprobs) == len(answer.ids) + len(answer.end)
        assert text not in answer.text


def test_an_engine_that_dies_costs_no_step(made: Kit) -> None:
    whole = list[Checkpoint]()
    with FakeSampler(made.model) as server:
        train(made, at(server.address), keep=whole.append)
    requests, most = itertools.count(1), len(server.asked) - 1

    def dies(answer: Any) -> Any:
        if next(requests) > most:
            raise ConnectionAbortedError
        return answer

    kept = list[Checkpoint]()
    with (
        FakeSampler(made.model, dies) as server,
        refused("went away", "start it again and resume", error=EngineError),
    ):
        train(made, at(server.address), keep=kept.append)
    (checkpoint,) = kept
    assert 0 < checkpoint.step < 4
    assert checkpoint.history == whole[-1].history[:1]
    with FakeSampler(made.model) as server:
        train(made, at(server.address), checkpoint=checkpoint, keep=kept.append)
    assert torch.equal(kept[-1].theta["span"], whole[-1].theta["span"])
    with refused("no server answers at", "--enable-prompt-embeds", error=EngineError):
        train(made, at(server.address))


def change_choices(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda answer: {**answer, "choices": change(answer["choices"])}


def first_token(name: Any) -> Callable[[Any], Any]:
    def change(choices: Any) -> Any:
        choices[0]["logprobs"]["tokens"][0] = name
        return choices

    return change_choices(change)


def first_logprob(value: Any) -> Callable[[Any], Any]:
    def change(choices: Any) -> Any:
        choices[0]["logprobs"]["token_logprobs"][0] = value
        return choices

    return change_choices(change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_choices(lambda choices: choices[:-1]), "it gave 3 answers of 4 asked for"),
        (change_choices(lambda choices: None), "it gave 0 answers of 4"),
        (change_choices(lambda c: [{**one, "logprobs": None} for one in c]), "lacks the ids"),
        (change_choices(lambda c: ["a"] * 4), "lacks the ids"),
        (first_token("great"), "lacks the ids"),
        (first_token(7), "lacks the ids"),
        (first_token("token_id:999999"), "it wrote token 999999, and the recipe's model has"),
        (first_logprob(None), "lacks the ids"),
        (first_logprob(1e999), "lacks the ids"),
        (
            change_choices(
                lambda c: [
                    {
                        **one,
                        "finish_reason": "stop",
                        "logprobs": {"tokens": [], "token_logprobs": []},
                    }
                    for one in c
                ]
            ),
            "an answer of 0 tokens ended (stop) with none that ends one",
        ),
        (lambda answer: "hello\nthere", "it says 'hello there'"),
    ],
)
def test_answers_that_cannot_be_used(made: Kit, change: Callable[[Any], Any], told: str) -> None:
    with (
        FakeSampler(made.model, change) as server,
        refused("sampling.engine: http://127.0.0.1:", told, "vLLM", error=EngineError),
    ):
        train(made, at(server.address))


def test_servers_that_are_none_of_ours(made: Kit, engine: FakeSampler) -> None:
    engine.takes_embeds = False
    with refused("refused a request (400: You must set", "--enable-prompt", error=EngineError):
        train(made, at(engine.address))
    engine.takes_embeds = True
    engine.width = 48  # of another model
    with refused("(400: `prompt_embeds` is not a dense tensor", error=EngineError):
        train(made, at(engine.address))
    with refused("(404: no route /models)", error=EngineError):
        train(made, at(engine.url))
    with refused("serves tiny, and not 'big' was named", error=EngineError):
        train(made, at(engine.address, model="big"))
    engine.names = ["one", "two"]
    with refused("serves one, two, and no model was named", error=EngineError):
        train(made, at(engine.address))
    engine.names = ["one", NAME]
    assert Engine(at(engine.address, model=NAME)).model == NAME
    with refused("no server answers at https://", error=EngineError):
        train(made, at(engine.address.replace("http:", "https:")))
    engine.routes["/v1/models"] = lambda body: {"data": 5}
    with refused("serves nothing, and no model was named", error=EngineError):
        train(made, at(engine.address))


def test_a_slow_server(made: Kit) -> None:
    with (
        FakeSampler(made.model, lambda answer: time.sleep(0.5)) as server,
        refused("did not answer within 0.1 seconds", "sampling.timeout", error=EngineError),
    ):
        train(made, at(server.address, timeout=0.1))


def test_a_key(made: Kit, engine: FakeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.key = "sesame"
    with refused("wants a key (Unauthorized); set VLLM_API_KEY", error=EngineError):
        train(made, at(engine.address))
    monkeypatch.setenv(KEY, "sesame")
    train(made, at(engine.address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000",
        "ftp://a/v1",
        "http://",
        "http://a:b/v1",
        "http://me:it@a/v1",
        "http://a?k=1",
    ],
)
def test_an_address_that_is_none(address: str) -> None:
    with refused(f"sampling.engine: {address!r}; expected the address", error=OptionError):
        SamplingEngine(engine=address)


def test_a_name_without_an_engine(model_folder: Path, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"sampling\.model: 'big' is a name with an engine; set"):
        Recipe.from_dict(values(model_folder, data, objective=REWARD, sampling={"model": "big"}))


# Whole runs.

REWARD = {"name": "reward", "random": True, "samples": 3, "max_new_tokens": 3}


def recipe_of(model_folder: Path, data: Path, engine: str, **sections: Any) -> Recipe:
    whole = {"objective": REWARD, "sampling": {"engine": engine}, **sections}
    settings = {"batch_size": 4, "epochs": 1, "evaluate_every": 3}
    return Recipe.from_dict(values(model_folder, data, training=settings, **whole))


@pytest.fixture
def served(model_folder: Path, data: Path) -> Iterator[FakeSampler]:
    from embedgrad.model.loading import load

    loaded = load(str(model_folder), device="cpu")
    with FakeSampler(LanguageModel(loaded, prefix_cache_budget=0)) as server:
        yield server  # type: ignore[misc]


def test_a_run_says_how_far_the_engine_was(
    model_folder: Path, data: Path, tmp_path: Path, served: FakeSampler
) -> None:
    events = list[Event]()
    recipe = recipe_of(model_folder, data, served.address)
    result = run(recipe, tmp_path / "run", events.append)
    notes = [event["text"] for event in events if event["event"] == "note"]
    (told,) = (note for note in notes if "samples the answers" in note)
    assert told.startswith(f"{served.address} samples the answers; its log-probabilities differ")
    assert "by 0.000 nats a token" in told
    assert result["sampling"]["steps"] == 6
    assert set(result["sampling"]) == {"steps", *NAMES, "mismatch_max"}
    assert result["sampling"]["mismatch"] < 1e-4
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert kept["sampling"] == result["sampling"]
    (line,) = describe_engine({"sampling": {**kept["sampling"], "mismatch": 0.25}})
    assert "differ from ours by 0.250 nats a token" in line
    assert describe_engine({}) == []
    shown = [str(note) for note in describe_learning(read_run(tmp_path / "run"))["notes"]]
    assert line.replace("0.250", "0.000") in shown
    # An address is nobody else's business.
    assert "engine" not in anonymize(recipe.as_dict(), "model")["sampling"]


def test_a_run_goes_on_with_the_engine_elsewhere(
    model_folder: Path, data: Path, tmp_path: Path, served: FakeSampler
) -> None:
    whole = run(recipe_of(model_folder, data, served.address), tmp_path / "whole", lambda e: None)
    requests = itertools.count(1)

    def dies(answer: Any) -> Any:
        if next(requests) > 7:
            raise ConnectionAbortedError
        return answer

    out = tmp_path / "run"
    with (
        FakeSampler(served.model, dies) as other,
        refused("went away", f"; the last good rows are in {out / 'prompt'}", error=EngineError),
    ):
        run(recipe_of(model_folder, data, other.address), out, lambda event: None)
    assert (out / "prompt").is_dir()
    assert Checkpoint.find(out / "checkpoint").step > 0
    with refused("no server answers", error=EngineError):
        run(recipe_of(model_folder, data, other.address), out, lambda event: None, resume=True)
    recipe = recipe_of(
        model_folder,
        data,
        served.address,
    )
    result = run(recipe, out, lambda event: None, resume=True)
    assert result["tokens"] == whole["tokens"]
    assert result["sampling"]["steps"] == 6


def test_a_comparison_whose_trainings_are_finished_asks_no_engine(
    model_folder: Path, data: Path, tmp_path: Path, served: FakeSampler
) -> None:
    options: dict[str, Any] = {"compare": {"methods": ["embedgrad"], "seeds": [0]}}
    recipe = recipe_of(model_folder, data, served.address, **options)
    first = compare(recipe, tmp_path / "out", lambda event: None)
    asked = len(served.asked)
    assert asked > 0
    (tmp_path / "out" / "work" / "embedgrad-seed-0" / "scored.json").unlink()
    gone = recipe_of(model_folder, data, "http://127.0.0.1:9/v1", **options)
    again = compare(gone, tmp_path / "out", lambda event: None)
    assert [row["correct"] for row in again["rows"]] == [row["correct"] for row in first["rows"]]
    assert len(served.asked) == asked
    options["compare"]["seeds"] = [0, 1]
    with refused("no server answers", error=EngineError):
        compare(
            recipe_of(model_folder, data, "http://127.0.0.1:9/v1", **options),
            tmp_path / "out",
            lambda event: None,
        )


def test_an_engine_may_move_but_not_come_or_go(model_folder: Path, data: Path) -> None:
    one, other = (recipe_of(model_folder, data, f"http://{host}/v1") for host in "ab")
    none = Recipe.from_dict({**one.as_dict(), "sampling": {}})
    assert recipe_differences(one.as_dict(), other) == []
    assert recipe_differences(one.as_dict(), none) == [
        'sampling.engine is "http://a/v1" there and unset here'
    ]


def test_what_a_recipe_refuses(model_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sampling\.engine: 'here'; expected the address"):
        recipe_of(model_folder, data, "here")
    with pytest.raises(RecipeError, match=r"sampling\.engine: is for answers that the objective"):
        recipe_of(model_folder, data, "http://a/v1", objective={"name": "cross_entropy"})
    out = tmp_path / "new" / "run"
    with refused("sampling.engine: no server answers at http://127.0.0.1:9/v1", error=EngineError):
        run(recipe_of(model_folder, data, "http://127.0.0.1:9/v1"), out, lambda event: None)
    assert not out.parent.exists()


def test_a_plan_counts_what_is_done_elsewhere(model_folder: Path, data: Path) -> None:
    here, there = (
        plan(
            Recipe.from_dict(
                {**recipe_of(model_folder, data, "http://127.0.0.1:9/v1").as_dict(), **more}
            )
        )
        for more in ({"sampling": {}}, {})
    )
    assert there["course"]["answers"] == here["course"]["answers"]
    assert any("http://127.0.0.1:9/v1 writes them" in note for note in there["notes"])
    assert not any("writes them" in note for note in here["notes"])
