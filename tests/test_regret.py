"""The objective regret: what it predicts and learns, runs with it, bad input in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from embedgrad import Recipe
from embedgrad.data.examples import Example
from embedgrad.errors import DataError, EmbedgradError, RecipeError
from embedgrad.evaluation.regret import mean_regret
from embedgrad.experiments.compare.compare import compare
from embedgrad.experiments.plan import Budget, plan
from embedgrad.experiments.run import run
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import CrossEntropy, Objective, Regret
from embedgrad.parts.objectives.base import State
from embedgrad.prompt import artifact
from embedgrad.report.page.page import comparison_page, run_page
from embedgrad.report.page.run_files import read_comparison, read_run
from embedgrad.report.terminal.methods_table import methods_table
from embedgrad.report.terminal.tables import comparison_table, describe_regret, show
from embedgrad.training.selection import Best, score_of
from embedgrad.training.settings import Training
from refusals import refused
from run_kit import Command, values, write_jsonl
from small_recipe import read

pytest_plugins = ["tiny_runs"]

ROWS = {"train": 24, "dev": 8, "test": 12}
COMPLAINTS = Regret((-5.0, 1.0), k=1)
TRIAGE = {"name": "regret", "costs": [-5.0, 1.0], "k": 1}


def batch(logprobs: list[list[float]], gold: list[int], groups: str, **extra: Any) -> Outcome:
    """An outcome of rows of these groups, a letter each."""
    logprobs_BC = torch.tensor(logprobs, dtype=torch.float64)
    ones = torch.ones_like(logprobs_BC).long()
    return Outcome(logprobs_BC, ones, torch.tensor(gold), tuple(groups), extra=extra)


def loss_of(objective: Regret, outcome: Outcome, state: State | None = None) -> float:
    losses = objective.losses(outcome)
    return objective.reduce_with(state or {}, losses, outcome).item()


# -- what it predicts, and the loss by hand --------------------------------------------------------


def test_log_odds_and_expected_costs() -> None:
    shares = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64)
    odds = COMPLAINTS.predict(shares.log()).squeeze(1)
    assert odds.tolist() == pytest.approx([-np.log(4), 0.0])
    expected = dataclasses.replace(COMPLAINTS, score="probabilities").predict(shares.log())
    assert expected.squeeze(1).tolist() == pytest.approx([-3.8, -2.0])
    matrix = Regret(((0.0, 9.0), (1.0, 0.0)), "cost_matrix")
    assert matrix.predict(shares.log()).tolist() == [
        pytest.approx([0.2, 7.2]),
        pytest.approx([0.5, 4.5]),
    ]


def test_the_loss_by_hand() -> None:
    """Two rows, choose one: a complaint that the model takes for praise, and praise."""
    outcome = batch([[-2.0, 0.0], [-1.0, 0.0]], [0, 1], "aa")
    entropy = CrossEntropy(over="choices").losses(outcome).mean().item()
    # p = (2, 1), c = (-5, 1), so 2 p - c = (9, 1) chooses the second: 6 more, and 2 (2 - 1)
    assert loss_of(COMPLAINTS, outcome) == pytest.approx((6 + 2) / 2 + 0.1 * entropy)
    blunt = dataclasses.replace(COMPLAINTS, kind="pessimistic", mix=0.0)
    # d(p) is the second, and d(8 p - c) too: the regret is 6, and nothing pulls
    assert loss_of(blunt, outcome) == pytest.approx(6 / 2)
    assert loss_of(dataclasses.replace(blunt, kind="cross_entropy"), outcome) == pytest.approx(
        entropy
    )
    # Costs are in their mean size, 3, after `init`
    state = {n: torch.tensor(v) for n, v in {"size": 3.0, "step": 0.0, "warm": 0.0}.items()}
    assert loss_of(blunt, outcome, state) == pytest.approx(2 / 2)


def test_pessimistic_regret_starts_with_spo_plus() -> None:
    objective = Regret((-5.0, 1.0), k=1, kind="pessimistic", warm_share=0.5, mix=0.0)
    outcome = batch([[-2.0, 0.0], [-1.0, 0.0]], [0, 1], "aa")
    sequences: Any = [type("S", (), {"gold": g, "example": None})() for g in (0, 1)]
    state = dict(objective.init(sequences, lambda batch: torch.zeros(0), 4))
    assert state["size"].item() == 3.0
    found = []
    for _ in range(4):
        found.append(loss_of(objective, outcome, state))
        state = objective.update(state, torch.zeros(2), outcome)
    spo = loss_of(dataclasses.replace(objective, kind="spo+"), outcome, state)
    assert found == pytest.approx([spo, spo, 1.0, 1.0])
    assert spo == pytest.approx((2 + 2) / 2)


def test_a_cost_matrix_decides_each_row_by_itself() -> None:
    objective = Regret(((0.0, 9.0), (1.0, 0.0)), "cost_matrix", mix=0.0)
    outcome = batch([[np.log(0.05), np.log(0.95)]], [0], "a")
    # expected (0.95, 0.45), true (0, 9): 2 p - c = (1.9, -8.1); chosen 1; c gap 9, p gap -0.5
    assert loss_of(objective, outcome) == pytest.approx(9 + 2 * 0.5)
    (decided,) = objective.judge([Example({}, "no", "")], [{"no": 0.05, "yes": 0.95}])
    assert (decided.regret, decided.best) == (9.0, 0.0)


def test_rows_take_their_places_whatever_the_order_of_the_file() -> None:
    path = Regret("toll", "grid_path", width=2, place="cell", weights=(1.0, 0.0))
    tolls = {"0": 1.0, "1": 5.0, "2": 1.0, "3": 1.0}
    for order in ("0123", "3120"):
        examples = [
            Example({}, "no", "", group="a").with_extra(cell=int(cell), toll=tolls[cell])
            for cell in order
        ]
        # The model takes cell 2 for the dear one.
        shares = [{"no": p, "yes": 1 - p} for p in (0.9 if c == "2" else 0.1 for c in order)]
        (decided,) = path.judge(examples, shares)
        assert (decided.best, decided.regret) == (3.0, 4.0)


def test_ties_count_as_the_worst_decision() -> None:
    examples = [Example({}, answer, "", group="a") for answer in ("no", "yes")]
    shares = [{"no": 0.5, "yes": 0.5}] * 2
    (decided,) = COMPLAINTS.judge(examples, shares)
    assert (decided.regret, decided.pessimistic, decided.best) == (0.0, 6.0, -5.0)


# -- a toy where the likelier answer is the worse decision -----------------------------------------


def fitted(objective: Regret) -> tuple[float, float]:
    """Log-loss and regret after training one number, the same for both kinds of row."""
    # One of each kind a decision: A complaints in 4 of 5, worth 1; B in 1 of 2, worth 10.
    kinds = np.tile([1.0, -1.0], 20)
    gold = [int(not right) for i in range(20) for right in (i % 5 != 0, i % 2 == 0)]
    value = [-(1.0 if kind > 0 else 10.0) * (g == 0) for kind, g in zip(kinds, gold, strict=True)]
    groups = tuple(str(i // 2) for i in range(40))
    number = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(40, 2).long()

    def outcome() -> Outcome:
        odds = number[0] * torch.tensor(kinds) + number[1]
        scores = torch.stack([odds, torch.zeros_like(odds)], dim=1)
        return Outcome(scores, ones, torch.tensor(gold), groups, extra={"value": value})

    size = float(np.abs(value).mean())
    warm = 210.0 if objective.kind == "pessimistic" else 0.0
    state = {n: torch.tensor(v) for n, v in {"size": size, "step": 0.0, "warm": warm}.items()}
    optimizer = torch.optim.Adam([number], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        now = outcome()
        objective.reduce_with(state, objective.losses(now), now).backward()
        optimizer.step()
        state = objective.update(state, torch.zeros(0), now)
    with torch.no_grad():
        now = outcome()
        shares = torch.softmax(now.scores_BC, dim=1)
        log_loss = CrossEntropy(over="choices").losses(now).mean().item()
    examples = [
        Example({}, ("no", "yes")[g], "", group=group).with_extra(value=v)
        for g, group, v in zip(gold, groups, value, strict=True)
    ]
    rows = [dict(zip(("no", "yes"), row, strict=True)) for row in shares.tolist()]
    decided = objective.judge(examples, rows)
    return log_loss, sum(one.pessimistic for one in decided) / len(decided)


def test_cross_entropy_predicts_better_and_decides_worse() -> None:
    plain = Regret("value", k=1, weights=(-1.0, 1.0), kind="cross_entropy")
    log_loss, regret = fitted(plain)
    for kind in ("spo+", "pessimistic"):
        other: Any = dataclasses.replace(plain, kind=kind, mix=0.0)
        own_log_loss, own_regret = fitted(other)
        assert own_log_loss > log_loss + 0.02
        assert own_regret < regret - 1.0


# -- what is kept ----------------------------------------------------------------------------------


def test_the_lower_regret_is_kept() -> None:
    best = Best("regret", {"span": torch.zeros(1, 1)}, rows=4)
    for step, (accuracy, regret) in enumerate([(0.5, 2.0), (0.9, 2.5), (0.6, 1.0), (0.9, 1.0)]):
        best.add(score_of(step, accuracy, 1.0, None, regret=regret), {"span": torch.ones(1, 1)})
    assert (best.step, best.score["regret"]) == (2, 1.0)
    assert best.event()["regret"] == 1.0
    assert Training().metric_for(COMPLAINTS, choices=True) == "regret"
    assert mean_regret(CrossEntropy(), [], []) is None


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews in desks of four rows, each with what it costs to answer."""
    folder = tmp_path_factory.mktemp("desk")
    texts = {example.columns["review"]: dict(example.columns) for example in tiny.reviews(120)}
    rows = [
        {**row, "desk": f"{i // 4}", "cost": (-1) ** (i % 4 > 0) * (1 + i % 3)}
        for i, row in enumerate(texts.values())
    ]
    at = 0
    for split, count in ROWS.items():
        write_jsonl(folder / f"{split}.jsonl", rows[at : at + count])
        at += count
    return folder


def recipe(model: Path, data: Path, **sections: Any) -> Recipe:
    options: dict[str, Any] = {
        "objective": TRIAGE,
        "training": {"epochs": 1, "batch_size": 2, "batch_by": "groups"},
        "data": {"group": "desk"},
    }
    return Recipe.from_dict(values(model, data, **{**options, **sections}))


def printed(renderable: Any) -> str:
    file = io.StringIO()
    show(renderable, file)
    return file.getvalue()


def test_a_run_says_what_decisions_cost(
    model_folder: Path, desk: Path, tmp_path: Path, embedgrad: Command
) -> None:
    out = tmp_path / "run"
    result = run(recipe(model_folder, desk), out)
    found = result["regret"]
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for name in ("text", "refined"):
        regrets, sizes = [], []
        for number in {row["columns"]["desk"] for row in rows}:
            own = [r for r in rows if r["columns"]["desk"] == number]
            costs = [-5.0 if r["answer"] == "negative" else 1.0 for r in own]
            odds = [r[name]["probabilities"]["negative"] for r in own]
            regrets.append(costs[int(np.argmax(odds))] - min(costs))
            sizes.append(abs(min(costs)))
        assert found["decisions"] == len(regrets) == 3
        assert found[name]["pessimistic"] == pytest.approx(np.mean(regrets))  # type: ignore[literal-required]
        assert found[name]["normalized"] == pytest.approx(sum(regrets) / sum(sizes))  # type: ignore[literal-required]
    change = found["refined"]["pessimistic"] - found["text"]["pessimistic"]
    assert found["difference"]["regret"] == pytest.approx(change)
    assert found["difference"]["verdict"] == "no reliable gain"  # of three decisions
    events = [json.loads(e) for e in (out / "events.jsonl").read_text().splitlines()]
    scored = [e for e in events if e["event"] == "evaluation"]
    assert {e["metric"] for e in scored} == {"regret"}
    assert all(e["regret"] >= 0 for e in scored)
    first, second = describe_regret(found)
    assert first.startswith(f"mean regret of 3 decisions: {found['text']['pessimistic']:.4g} with")
    assert second.startswith("regret no reliable gain: ")
    assert first in printed(comparison_table(result))
    html = run_page(read_run(out), "run")
    assert f"M{first[1:]}" in html
    assert "dev regret, best" in html
    assert embedgrad("evaluate", out, "--json").json["regret"] == found
    assert first in embedgrad("evaluate", out).out
    prompt = json.loads((out / "prompt" / "prompt.json").read_text(encoding="utf-8"))
    assert prompt["scores"]["regret"] == found


def test_a_comparison_says_what_each_methods_decisions_cost(
    model_folder: Path, desk: Path, tmp_path: Path
) -> None:
    methods = ["text", "batch-calibration", "linear-probe", "embedgrad"]
    own = recipe(model_folder, desk, compare={"methods": methods, "seeds": [0, 1]})
    result = compare(own, tmp_path / "compare")
    found = {entry["method"]: entry["regret"] for entry in result["methods"]}
    assert list(found) == methods
    alone = run(recipe(model_folder, desk), tmp_path / "run")["regret"]
    assert found["text"]["mean"] == pytest.approx(alone["text"]["pessimistic"])
    assert found["text"]["difference"] == 0.0
    first, second = (row["regrets"] for row in result["rows"] if row["method"] == "embedgrad")
    assert len(first) == found["embedgrad"]["decisions"] == alone["decisions"]
    assert np.mean(first) == pytest.approx(alone["refined"]["pessimistic"])
    assert found["embedgrad"]["mean"] == pytest.approx(np.mean([first, second]))
    change = found["embedgrad"]["mean"] - found["text"]["mean"]
    assert found["embedgrad"]["difference"] == pytest.approx(change)
    line = f"mean regret of 3 decisions: text {found['text']['mean']:.4g}; batch-calibration "
    assert line in printed(methods_table(result))
    assert line in (tmp_path / "compare" / "table.md").read_text(encoding="utf-8")
    assert f"M{line[1:]}" in comparison_page(read_comparison(tmp_path / "compare") or {}, "desks")


def test_a_plan_takes_whole_decisions(model_folder: Path, desk: Path) -> None:
    own = recipe(model_folder, desk)
    found = plan(own, budget=Budget(seconds=0.0))
    assert found["course"] == {"steps": 3, "steps_per_epoch": 3, "evaluations": 2}
    settings = [knob["setting"] for knob in found["budget"]["knobs"]]
    assert "training.epochs" in settings
    assert not any(name.startswith("data.limit") for name in settings)


def test_other_objectives_have_no_regret(model_folder: Path, desk: Path, tmp_path: Path) -> None:
    plain = recipe(model_folder, desk, objective={"name": "cross_entropy"}, training={"steps": 1})
    result = run(plain, tmp_path / "plain")
    assert "regret" not in result
    assert "regret" not in printed(comparison_table(result))


@pytest.mark.parametrize(
    "objective",
    [
        {**TRIAGE, "kind": "pessimistic", "warm_share": 0.5},
        {"name": "regret", "costs": "cost", "k": 2, "weights": [-1.0, 1.0]},
        {"name": "regret", "decision": "cost_matrix", "costs": [[0.0, 9.0], [1.0, 0.0]]},
    ],
)
def test_a_run_resumes_to_the_same_bits(
    model_folder: Path, desk: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    training = {"epochs": 2, "batch_size": 2, "batch_by": "groups", "evaluate_every": 2}
    own = recipe(model_folder, desk, objective=objective, training=training)
    whole = run(own, tmp_path / "whole")
    asked = iter(range(100))
    stopped = run(own, tmp_path / "cut", should_stop=lambda: next(asked) == 3)
    assert (stopped["interrupted"], stopped["train"]["steps"]) == (True, 4)
    resumed = run(own, tmp_path / "cut", resume=True)
    assert resumed["tokens"] == whole["tokens"]
    assert resumed["regret"] == whole["regret"]
    first, second = (artifact.load(tmp_path / n / "prompt") for n in ("whole", "cut"))
    assert torch.equal(first.rows, second.rows)


def test_a_recipe_with_decisions_is_read_back(tmp_path: Path) -> None:
    objective = {
        "name": "regret",
        "decision": "linear_program",
        "constraints": [[1, 1, 1.5], [1, -1, 0]],
        "place": "at",
        "costs": "cost",
        "weights": [-1, 1],
    }
    sections: dict[str, Any] = {
        "objective": objective,
        "target": {"choices": ["no", "yes"]},
        "data": {"group": "desk"},
        "training": {"batch_by": "groups"},
    }
    own = read(tmp_path, **sections)
    assert own.parts.objective == Regret(
        "cost",
        "linear_program",
        constraints=((1.0, 1.0, 1.5), (1.0, -1.0, 0.0)),
        place="at",
        weights=(-1.0, 1.0),
    )
    assert Recipe.from_dict(own.as_dict()) == own
    matrix = {"name": "regret", "decision": "cost_matrix", "costs": [[0, 2], [1, 0]]}
    own = read(tmp_path, **{**sections, "objective": matrix, "training": {}, "data": {}})
    assert Recipe.from_dict(own.as_dict()).parts.objective == own.parts.objective


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "objective.costs: Field required"),
        ({"costs": [-1, 1]}, "objective.k: decision = 'top_k' needs it; set it"),
        ({"costs": [-1, 1], "k": 0}, "objective.k: Input should be greater than 0"),
        ({**TRIAGE, "width": 2}, "objective.width: decision = 'top_k' has no use for it; take"),
        ({**TRIAGE, "decision": "route"}, "objective.decision: Input should be 'top_k'"),
        ({"costs": [-1, 1, 1], "k": 1}, "objective.costs: 3 for 2 choices; expected one for each"),
        ({"costs": "c", "k": 1, "weights": [1, 0, 2]}, "objective.weights: 3 for 2 choices"),
        ({"costs": "c", "k": 1}, "objective.weights: are for costs from a column, which need"),
        ({**TRIAGE, "weights": [-1, 1]}, "objective.weights: are for costs from a column"),
        ({"costs": "c", "k": 1, "weights": []}, "objective.weights: are all equal, which tells"),
        ({"costs": [[2, 1], [2, 1]], "decision": "cost_matrix"}, "objective.costs: are all equal"),
        ({"costs": [1, 1], "k": 1}, "objective.costs: are all equal, which tells no row from"),
        ({"costs": [[1, 0], [0, 1]], "k": 1}, "objective.costs: decision = 'cost_matrix' takes a"),
        ({"costs": [1, 0], "decision": "cost_matrix"}, "objective.costs: decision = 'cost_matrix'"),
        ({"costs": [[1], [0]], "decision": "cost_matrix"}, "takes a list of two actions' costs"),
        (
            {"costs": [0, 1], "decision": "finite_set", "place": "p", "decisions": [[1, 0], [1]]},
            "objective.decisions: expected lists of numbers, all equally long",
        ),
        (
            {"costs": [0, 1], "decision": "grid_path", "place": "p", "width": 1},
            "objective.width: 1 leaves one path; expected 2 or more",
        ),
        (
            {"costs": [0, 1], "decision": "finite_set", "place": "p", "decisions": [[1, 0]] * 2},
            "objective.decisions: leave no choice; expected two or more",
        ),
        ({**TRIAGE, "penalty": 1}, "objective.penalty: Input should be greater than 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    sections: dict[str, Any] = {
        "objective": {"name": "regret", **options},
        "target": {"choices": ["no", "yes"]},
        "data": {"group": "desk"},
        "training": {"batch_by": "groups"},
    }
    with refused(message, error=RecipeError):
        read(tmp_path, **sections)


def test_settings_that_do_not_go_with_decisions(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"target": {"choices": ["no", "yes"]}, "objective": TRIAGE}
    whole = "objective: 'regret' decides over all rows of a group; set data.group to the column"
    with refused(whole, error=RecipeError):
        read(tmp_path, **sections)
    with refused(whole, error=RecipeError):
        read(tmp_path, **sections, data={"group": "desk"})
    with refused("objective: needs choices, but target.choices lists none", error=RecipeError):
        read(tmp_path, objective=TRIAGE, data={"group": "d"}, training={"batch_by": "groups"})
    apart: dict[str, Any] = {"data": {"group": "d"}, "training": {"batch_by": "groups"}}
    with refused("data.limit: cuts decisions apart", error=RecipeError):
        read(tmp_path, **sections, **{**apart, "data": {"group": "d", "limit": {"dev": 3}}})
    apart["training"]["replay"] = 0.5
    with refused("training.replay: adds single rows to whole decisions", error=RecipeError):
        read(tmp_path, **sections, **apart)
    with refused("training.metric: 'regret' is for objective.name = 'regret'", error=RecipeError):
        read(tmp_path, training={"metric": "regret"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": {**TRIAGE, "k": 4}},
            "objective.decision: 'top_k' over the 4 rows of group",
        ),
        (
            {
                "objective": {
                    "name": "regret",
                    "decision": "linear_program",
                    "constraints": [[1, 1, 1, 1, 1], [-1, -1, -1, -1, -2]],
                    "place": "at",
                    "costs": [-5, 1],
                }
            },
            "cannot be made; no decision meets all of objective.constraints; relax one",
        ),
        (
            {
                "objective": {
                    "name": "regret",
                    "decision": "finite_set",
                    "decisions": [[1, 0, 0], [0, 1, 0]],
                    "place": "at",
                    "costs": [-5, 1],
                }
            },
            "cannot be made; expected 3, as objective.decisions lists",
        ),
        (
            {
                "objective": {
                    "name": "regret",
                    "decision": "assignment",
                    "width": 2,
                    "place": "cost",
                    "costs": [-5, 1],
                }
            },
            "objective.place: column 'cost' of group '",
        ),
    ],
)
def test_decisions_that_cannot_be_made_are_refused_before_the_model_is_loaded(
    desk: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(desk, data)
    for split in ROWS:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_jsonl(data / f"{split}.jsonl", [{**r, "at": i % 4} for i, r in enumerate(rows)])
    with refused(message):
        run(recipe(tmp_path / "no model", data, **change), tmp_path / "out")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_decision_of_one_row_and_a_cost_that_is_no_number_are_named(
    desk: Path, tmp_path: Path, split: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(desk, data)
    rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    write_jsonl(data / f"{split}.jsonl", [*rows[:-1], {**rows[-1], "desk": "lone"}])
    with refused("over the 1 row of group 'lone' cannot be made; expected more than objective.k"):
        run(recipe(tmp_path / "no model", data), tmp_path / "out")
    costly = {"name": "regret", "costs": "cost", "k": 1, "weights": [-1, 1]}
    for cell in ("five", "nan", [1], 10**400):
        write_jsonl(data / f"{split}.jsonl", [*rows[:-1], {**rows[-1], "cost": cell}])
        number = len(rows)
        with refused(f"{split}.jsonl:{number}", f"column 'cost' holds {cell!r}; objective.costs"):
            run(recipe(tmp_path / "no model", data, objective=costly), tmp_path / "out")


def test_without_a_recipe_the_rows_of_a_batch_are_checked() -> None:
    plain = batch([[0.0, -1.0]] * 2, [0, 1], "aa")
    checks: list[tuple[Objective, Outcome, str]] = [
        (COMPLAINTS, dataclasses.replace(plain, groups=(None, None)), "set data.group to the"),
        (COMPLAINTS, dataclasses.replace(plain, groups=("a", "b")), "over the 1 row of group 'a'"),
        (Regret("cost", k=1, weights=(-1.0, 1.0)), plain, "no value in Example.extra['cost']"),
    ]
    for objective, outcome, message in checks:
        with refused(message, error=DataError):
            objective.reduce(objective.losses(outcome), outcome)
    free = batch([[0.0], [-1.0]], [0, 0], "aa")
    with pytest.raises(EmbedgradError, match="needs choices"):
        COMPLAINTS.losses(free)
