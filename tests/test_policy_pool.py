"""Policies over prompts of a tiny model, from the command line and from Python."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import embedgrad as eg
from embedgrad.errors import RunError
from embedgrad.inference.policy import Decision
from embedgrad.inference.pool import Pool
from embedgrad.model.generation import next_logits
from embedgrad.prompt.artifact import save
from embedgrad.recipe.open_run import load_prompt
from kit import noisy
from run_kit import Command, values

pytest_plugins = ["tiny_runs"]

Write = Callable[..., Path]
CHOOSING = [{"run": "finished"}, {"run": "noisy"}, {"run": "finished", "text_prompt": True}]


def with_noise(run: Path, folder: Path) -> Path:
    """A copy of a run with other rows."""
    shutil.copytree(run, folder)
    prompt = load_prompt(folder)
    save(prompt.with_rows(noisy(prompt.rows, 0.3)), folder / "prompt")
    return folder


@pytest.fixture(scope="session")
def runs(
    finished: tuple[Path, Any], generated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with runs that choose, and others that write."""
    folder = tmp_path_factory.mktemp("pool")
    shutil.copytree(finished[0], folder / "finished")
    with_noise(finished[0], folder / "noisy")
    shutil.copytree(generated, folder / "generated")
    with_noise(generated, folder / "generated-noisy")
    return folder


@pytest.fixture
def policy(runs: Path, tmp_path: Path) -> Write:
    """`policy(precision=0.8)` writes a policy's file beside its runs and returns its path."""

    def write(prompts: Any = CHOOSING, **options: Any) -> Path:
        path = tmp_path / "policy.toml"
        named = [{**p, "run": str(runs / p["run"])} for p in prompts]
        path.write_text(tomli_w.dumps({"prompts": named, **options}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pool(policy: Write) -> Pool:
    made: Pool = eg.load_policy(policy(precision=0.6), report=eg.quiet)
    made.calibrate(eg.quiet)
    return made


def test_an_evaluation_sets_thresholds_and_says_what_the_policy_costs(
    policy: Write, embedgrad: Command, finished: tuple[Path, dict[str, Any]]
) -> None:
    path = policy(precision=0.8)
    found = embedgrad("evaluate", "--policy", path, "--json").json
    assert (found["split"], found["rows"]) == ("test", 12)
    assert {one["prompt"].rpartition("/")[2] for one in found["prompts"]} == {
        "finished",
        "noisy",
        "finished (text)",
    }
    kept = json.loads(path.with_suffix(".calibrated.json").read_text())
    assert (kept["dev_rows"], kept["dev_answers"]) == (8, 24)
    shares = [one["right"] for one in found["prompts"]]
    assert shares == sorted(shares, reverse=True)
    assert found["policy"]["calls"] <= found["vote"]["calls"] == 3
    assert found["policy"]["tokens"] <= found["vote"]["tokens"]
    assert found["first"]["calls"] == 1
    scores = {"finished": "refined", "finished (text)": "text"}
    name = found["prompts"][0]["prompt"].rpartition("/")[2]
    if name in scores:
        assert found["first"]["accuracy"] == finished[1][scores[name]]["accuracy"]
    shown = embedgrad("evaluate", "--policy", path, "--quiet")
    assert "majority vote" in shown.out
    assert "against the majority vote" in shown.out
    assert "accepts right" in shown.out
    none = embedgrad("evaluate", "--policy", policy(precision=1.0), "--quiet").out
    assert "warning: on dev rows no score reaches the precision; lower it" in none


def test_answers_are_those_of_the_evaluation(pool: Pool) -> None:
    rows = pool._runs[0].read_data().test
    table: Any = {}
    pool.ask(table, rows, range(len(rows)), list(pool.thresholds))
    replayed, right = pool.replay(table, pool.settings, pool.thresholds)
    answered = pool.generate([dict(row.columns) for row in rows], eg.quiet)
    assert {len(decision.trace) for decision in answered} != {3}
    assert any(decision.accepted is not None for decision in answered)
    for decision, other, row, score in zip(replayed, answered, rows, right, strict=True):
        assert other.columns["review"] == row.columns["review"]
        assert (decision.answer, decision.accepted) == (other.answer, other.accepted)
        assert (decision.calls, decision.tokens) == (other.calls, other.tokens)
        assert score == (decision.answer == row.answer)
    (alone,) = pool.generate([rows[0].columns["review"]], eg.quiet)
    assert alone.answer == pool.generate(rows[0].columns["review"], eg.quiet).answer
    assert alone.answer == answered[0].answer


def test_what_is_accepted_on_dev_rows_has_the_precision(policy: Write) -> None:
    accepted = 0
    for precision in (0.6, 0.9, 1.0):
        pool = eg.load_policy(policy(precision=precision), report=eg.quiet)
        table = pool.calibrate(eg.quiet)
        decisions, right = pool.replay(table, pool.settings, pool.thresholds)
        passed = [r for d, r in zip(decisions, right, strict=True) if d.accepted is not None]
        accepted += len(passed)
        assert not passed or sum(passed) / len(passed) >= precision
    assert accepted


def test_the_prompts_of_a_pool_share_one_prefix_a_query(pool: Pool) -> None:
    cache, rows = pool._runs[0].model.prefix_cache, pool._runs[0].read_data().test[:5]
    cache.clear()
    misses = cache.misses
    pool.thresholds = dict.fromkeys(pool.thresholds, math.inf)  # ask all
    decisions: list[Decision] = list(pool.answer(rows))
    assert cache.misses - misses == len(rows)
    for decision, row in zip(decisions, rows, strict=True):
        _, sequence = pool.prompts[0].inputs(row)
        first, *others = (entry["tokens"] for entry in decision.trace)
        answers = sum(map(len, sequence.targets))
        own = len(pool._runs[0].prompt.rows) + len(sequence.suffix) + answers
        assert first == own + len(sequence.prefix)
        assert others == [own, own]


def test_the_trace_of_an_answer_names_prompts_and_thresholds(
    policy: Write, embedgrad: Command
) -> None:
    path = policy(precision=0.6, rounds=2)
    query = "The film was  great / warm."
    refused = embedgrad("generate", "--policy", path, query, "--quiet")
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert f"`embedgrad evaluate --policy {path}` sets them on dev rows" in refused.err
    assert embedgrad("evaluate", "--policy", path, "--quiet").code == 0
    found = embedgrad("generate", "--policy", path, query, "--json").json
    assert found["columns"] == {"review": query}
    kept = json.loads(path.with_suffix(".calibrated.json").read_text())
    named = dict(zip(kept["prompts"], (t for _, t in kept["thresholds"]), strict=True))
    assert 1 <= len(found["trace"]) <= 2
    for entry in found["trace"]:
        limit = named[entry["prompt"]]
        assert entry["threshold"] == limit
        assert entry["accepted"] == (limit is not None and entry["score"] >= limit)
        assert entry["checks"] == {"margin": entry["score"]}
    assert found["accepted"] == next(
        (entry["prompt"] for entry in found["trace"] if entry["accepted"]), None
    )
    assert found["tokens"] == sum(entry["tokens"] for entry in found["trace"])
    shown = embedgrad("generate", "--policy", path, query).out
    assert shown.startswith(found["answer"])
    assert f"{found['tokens']} tokens)" in shown
    lines = embedgrad("generate", "--policy", path, stdin='"One."\n{"review": "Two."}\n').out
    assert [json.loads(line)["columns"] for line in lines.splitlines()] == [
        {"review": "One."},
        {"review": "Two."},
    ]
    # Thresholds of other settings do not count.
    policy(precision=0.9, rounds=2)
    assert embedgrad("generate", "--policy", path, query).code == 2


def test_thresholds_do_not_outlive_the_dev_rows_they_were_set_on(policy: Write) -> None:
    path = policy(precision=0.6)
    said: list[str] = []

    def evaluate(*overrides: str) -> str:
        said.clear()
        pool = eg.load_policy(path, overrides, eg.quiet)
        pool.evaluate("test", lambda event: said.append(str(event.get("text"))))
        return path.with_suffix(".calibrated.json").read_text()

    whole = evaluate()
    assert evaluate() == whole
    assert not any("anew" in text for text in said)
    assert json.loads(evaluate("data.limit={dev=4}"))["dev_rows"] == 4
    assert sum("the dev rows have changed; thresholds are set anew" in t for t in said) == 1


def test_a_larger_pool_is_halved_on_dev_rows(policy: Write) -> None:
    pool = eg.load_policy(policy(rounds=1), report=eg.quiet)
    table = pool.calibrate(eg.quiet)
    (best,) = pool.thresholds
    assert len(table) == 3 * 2 + 2 * 2 + 4 < 3 * 8
    assert sum(prompt == best for prompt, _ in table) == 8


def test_a_budget_too_small_for_any_round_gives_no_answer(
    policy: Write, embedgrad: Command
) -> None:
    path = policy(max_tokens=1)
    found = embedgrad("evaluate", "--policy", path, "--json").json
    assert (found["policy"]["unanswered"], found["policy"]["accuracy"]) == (12, 0)
    assert found["vote"]["calls"] == 3  # which has no budget
    done = embedgrad("generate", "--policy", path, "Fine.")
    assert "no round fits the budget; 0 calls, 0 tokens" in done.out
    assert embedgrad("generate", "--policy", path, "Fine.", "--json").json["answer"] is None
    assert "leaves 12 rows without an answer" in embedgrad("evaluate", "--policy", path).out
    one = policy(max_calls=1)
    assert embedgrad("evaluate", "--policy", one).code == 0
    assert "; 1 call, " in embedgrad("generate", "--policy", one, "Fine.").out


FREE = [{"run": "generated"}, {"run": "generated-noisy"}, {"run": "generated", "text_prompt": True}]
ALL = ["format", "arithmetic", "agreement", "margin"]


def test_written_answers_are_sampled_checked_and_paid(policy: Write) -> None:
    path = policy(FREE, validators=ALL, samples=3, max_calls=7, precision=0.5)
    pool = eg.load_policy(path, report=eg.quiet)
    pool.calibrate(eg.quiet)
    pool.thresholds = dict.fromkeys(pool.thresholds, math.inf)
    query = "What is 3 plus 1?"
    decision = pool.generate(query, eg.quiet)
    assert len(decision.trace) == 2
    assert decision.calls == 6
    again = pool.generate(query, eg.quiet)
    assert again.trace == decision.trace
    for entry in decision.trace:
        assert list(entry["checks"]) == ALL
        assert entry["score"] == pytest.approx(math.prod(entry["checks"].values()))
        assert entry["checks"]["agreement"] in (1 / 3, 2 / 3, 1.0)
        asked = pool.prompts[entry["prompt"]]
        example = replace(pool._runs[0].read_data().dev[0], columns={"question": query})
        most = asked.price(asked.inputs(example))
        assert entry["tokens"] <= most.tokens + most.prefix_tokens


def test_the_margin_of_a_written_answer_is_its_mean_likelihood(policy: Write) -> None:
    pool = eg.load_policy(policy(FREE[:1], validators=["margin"]), report=eg.quiet)
    asked, dev = pool.prompts[0], pool._runs[0].read_data().dev
    inputs = [asked.inputs(example) for example in dev]
    for (rows_PD, sequence), attempt in zip(inputs, asked.ask(inputs), strict=True):
        likely, count = 0.0, attempt.price.tokens
        count -= 2 * (sequence.length(len(rows_PD)) - len(sequence.prefix))
        ids: list[int] = []
        assert count % 2 == 0  # written, then read again
        for _ in range(count // 2):
            longer = replace(sequence, suffix=(*sequence.suffix, *ids))
            shares = torch.softmax(next_logits(asked.run.model, rows_PD, [longer])[0].double(), 0)
            likely += math.log(shares.max())
            ids.append(int(shares.argmax()))
        assert attempt.score == pytest.approx(math.exp(likely / len(ids)), rel=1e-4)


def test_budgets_hold_for_written_answers(policy: Write) -> None:
    whole = eg.load_policy(policy(FREE, validators=["format"]), report=eg.quiet)
    dev = whole._runs[0].read_data().dev
    most = whole.prompts[0].price(whole.prompts[0].inputs(dev[0]))
    budget = most.tokens + most.prefix_tokens + 20
    path = policy(FREE, validators=["format"], max_tokens=budget)
    pool = eg.load_policy(path, report=eg.quiet)
    pool.calibrate(eg.quiet)
    pool.thresholds = dict.fromkeys(pool.thresholds, math.inf)
    decisions = list(pool.answer(dev))
    assert all(decision.tokens <= budget for decision in decisions)
    assert {len(decision.trace) for decision in decisions} <= {1, 2}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precison": 0.9}, "precison: unknown option; did you mean 'precision'?"),
        ({"precision": 1.5}, "precision: Input should be less than or equal to 1"),
        ({"validators": ["margins"]}, "validators.0: Input should be 'format', 'arithmetic'"),
        ({"validators": []}, "validators: []; expected one or more"),
        ({"prompts": []}, "prompts: []; expected one or more"),
        ({"prompts": [{"run": "finished", "text": True}]}, "prompts.0.text: unknown option"),
        ({"validators": ["agreement"]}, "samples: 1; 'agreement' compares two or more"),
        ({"samples": 3, "max_calls": 2}, "max_calls: 2; a round takes 3, as samples says"),
        ({"pattern": "("}, "pattern: '(' is no regular expression"),
        ({"validators": ["format"]}, "validators: 'format': these answers are chosen"),
        ({"samples": 2}, "samples: these answers are chosen and not written; leave it"),
    ],
)
def test_mistakes_in_the_file_are_told_in_a_line(
    options: dict[str, Any], told: str, policy: Write, embedgrad: Command
) -> None:
    done = embedgrad("evaluate", "--policy", policy(**options), "--quiet")
    assert done.code == 2
    assert told in done.err


def test_a_pool_is_of_one_model_and_one_kind_of_query(
    policy: Write, runs: Path, embedgrad: Command, other_models: dict[str, Path], data: Path
) -> None:
    if not (runs / "other-model").exists():
        recipe = values(other_models["seed"], data, training={"epochs": 1})
        eg.run(eg.Recipe.from_dict(recipe), runs / "other-model", eg.quiet)
    done = embedgrad(
        "evaluate", "--policy", policy([*CHOOSING[:1], {"run": "other-model"}]), "--quiet"
    )
    assert (done.code, len(done.lines)) == (2, 1)
    assert "policy.toml: prompts.1: this prompt was made for" in done.err
    done = embedgrad(
        "evaluate", "--policy", policy([*CHOOSING[:1], {"run": "generated"}]), "--quiet"
    )
    assert done.code == 2
    assert "has the columns question, the first review; prompts of a pool answer" in done.err
    assert "has the choices" in done.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate"], "generate: no RUN; give a run's folder, or --policy FILE"),
        (["evaluate"], "evaluate: give a RUN, or --policy FILE, and not both"),
        (["evaluate", "RUN", "--policy", "FILE"], "give a RUN, or --policy FILE, and not both"),
        (["generate", "RUN", "Query", "--policy", "FILE"], "--policy: its file names the runs"),
        (["generate", "--policy", "FILE", "Query", "--stream"], "--stream: the policy says how"),
        (["generate", "--policy", "FILE", "Query", "--top-p", "1"], "--top-p: the policy says"),
        (["evaluate", "--policy", "nowhere.toml"], "nowhere.toml: no such file; a policy begins"),
    ],
)
def test_the_command_line_takes_a_run_or_a_policy(
    arguments: list[str], told: str, policy: Write, runs: Path, embedgrad: Command
) -> None:
    given = {"RUN": runs / "finished", "FILE": policy()}
    done = embedgrad(*(given.get(argument, argument) for argument in arguments), "--quiet")
    assert (done.code, len(done.lines)) == (2, 1)
    assert told in done.err


@pytest.mark.parametrize(
    "damage",
    [
        {"thresholds": [[7, 0.5]]},
        {"thresholds": [[0, "0.5"]]},
        {"thresholds": [[0, 0.0]]},
        {"rounds": []},
        {"rounds": 3},
    ],
)
def test_damaged_thresholds_are_not_used_and_set_again(
    damage: dict[str, Any], policy: Write, pool: Pool
) -> None:
    whole = json.loads(pool._kept.read_text())
    pool._kept.write_text(json.dumps(whole | damage))
    again = eg.load_policy(policy(precision=0.6), report=eg.quiet)
    with pytest.raises(RunError, match="has no thresholds for these prompts and settings"):
        again.generate("Fine.", eg.quiet)
    again.calibrate(eg.quiet)
    assert json.loads(pool._kept.read_text()) == whole


def test_rows_that_are_missing_are_told(policy: Write, embedgrad: Command, runs: Path) -> None:
    path = policy()
    assert embedgrad("evaluate", "--policy", path, "--quiet").code == 0
    none = embedgrad(
        "evaluate", "--policy", path, "--quiet", "--set", "data.test=", "--set", "data.test_share=0"
    )
    assert "--split test: the recipe leaves it no rows" in none.err
    path.with_suffix(".calibrated.json").write_text("{")  # damaged: set again
    done = embedgrad(
        "evaluate", "--policy", path, "--quiet", "--set", "data.dev=", "--set", "data.dev_share=0"
    )
    assert "has no dev rows to set thresholds on" in done.err
    alone = runs / "alone"
    if not alone.exists():
        shutil.copytree(runs / "finished" / "prompt", alone)
    done = embedgrad("evaluate", "--policy", policy([{"run": "alone"}]), "--quiet")
    assert "is a prompt without its run" in done.err
