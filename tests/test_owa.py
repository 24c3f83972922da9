"""OWA of group losses: the projection, its weights, balanced batches, and runs that resume."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, EmbedgradError, RecipeError
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import OWA, CrossEntropy
from embedgrad.parts.objectives.owa import project
from embedgrad.parts.optimizers import SGD, AdamW, Extrapolated, Optimizer
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.settings import Parts, Training
from kit import Kit, kit
from kit_loop import small, train
from small_recipe import read

FAST = AdamW(learning_rate=0.1)


def weights_of(rng: np.random.Generator, groups: int) -> list[float]:
    raw = np.sort(rng.random(groups))[::-1]
    return list(raw / raw.sum())


def smooth(losses: list[float], weights: list[float], beta: float) -> float:
    """max_p p . L - beta / 2 |p|^2 at the projection."""
    shares = project(losses, weights, beta)
    return sum(p * (loss - beta / 2 * p) for p, loss in zip(shares, losses, strict=True))


# -- the projection --------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [1e-6, 0.05, 1.0, 30.0])
def test_the_projection_is_that_of_isotonic_regression(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    for case in range(100):
        groups = int(rng.integers(1, 9))
        losses = 2 * rng.random(groups) if case % 3 else rng.integers(0, 3, groups).astype(float)
        weights = np.array(weights_of(rng, groups))
        order = np.argsort(-losses, kind="stable")
        ranked = losses[order] / smoothing
        expected = np.empty(groups)
        expected[order] = ranked - isotonic_regression(ranked - weights, increasing=False)
        found = project(list(losses), list(weights), smoothing)
        assert np.allclose(found, expected, atol=1e-9)
        assert sum(found) == pytest.approx(1, abs=1e-12)


def test_the_shares_are_the_gradient_of_the_smoothed_loss() -> None:
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(30):
        losses, weights = list(rng.random(5)), weights_of(rng, 5)
        for i, share in enumerate(project(losses, weights, 0.2)):
            up, down = ([*losses] for _ in range(2))
            up[i] += step
            down[i] -= step
            slope = (smooth(up, weights, 0.2) - smooth(down, weights, 0.2)) / (2 * step)
            assert slope == pytest.approx(share, abs=1e-7)


def test_the_smoothed_loss_is_below_the_sharp_one_by_at_most_the_bound() -> None:
    rng = np.random.default_rng(2)
    for beta in (0.01, 0.3, 5.0):
        losses, weights = list(rng.random(6)), weights_of(rng, 6)
        sharp = float(np.dot(sorted(losses, reverse=True), weights))
        gap = sharp - smooth(losses, weights, beta)
        assert beta / 12 - 1e-12 <= gap <= beta / 2 * float(np.dot(weights, weights)) + 1e-12


def test_the_limits_are_the_ranked_weights_and_the_mean() -> None:
    losses, weights = [0.3, 2.0, 1.0], [0.6, 0.3, 0.1]
    for smoothing in (0.0, 1e-12, 0.01):
        assert project(losses, weights, smoothing) == pytest.approx([0.1, 0.6, 0.3], abs=1e-9)
    assert project(losses, weights, 1e9) == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_ties_share_their_weights_whatever_the_order_of_the_groups(smoothing: float) -> None:
    found = project([0.7, 0.1, 0.7, 0.7], [0.7, 0.1, 0.1, 0.1], smoothing)
    assert found == pytest.approx([0.3, 0.1, 0.3, 0.3], abs=1e-12)
    losses, weights = [0.31, 0.3, 1.2, 0.02], [0.4, 0.3, 0.2, 0.1]
    plain = project(losses, weights, smoothing)
    for order in ([3, 1, 0, 2], [2, 0, 3, 1]):
        assert project([losses[i] for i in order], weights, smoothing) == pytest.approx(
            [plain[i] for i in order], abs=1e-12
        )


# -- the objective ---------------------------------------------------------------------------------


def batch(groups: str) -> Outcome:
    """An outcome of examples of these groups, a letter each."""
    ones = torch.ones(len(groups), 1, dtype=torch.float64)
    gold = torch.zeros(len(groups), dtype=torch.long)
    return Outcome(-ones, ones.long(), gold, (None,) * len(groups), extra={"g": list(groups)})


def loss_and_shares(
    objective: OWA, losses: list[float], groups: str, state: dict[str, Tensor] | None = None
) -> tuple[float, list[float]]:
    losses_B = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    loss = objective.reduce_with(state or {}, losses_B, batch(groups))
    (shares_B,) = torch.autograd.grad(loss, losses_B)
    return loss.item(), shares_B.tolist()


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"weights": "mean"}, [1 / 4] * 4),
        ({"weights": "worst"}, [0, 1, 0, 0]),
        ({"weights": "gini"}, [1 / 16, 7 / 16, 5 / 16, 3 / 16]),
        ({"weights": "cvar", "share": 0.5}, [0, 1 / 2, 1 / 2, 0]),
        ({"weights": "cvar", "share": 0.375}, [0, 2 / 3, 1 / 3, 0]),
        ({"weights": "cvar", "share": 1.0}, [1 / 4] * 4),
        ({"weights": (0.5, 0.25, 0.25, 0.0)}, [0, 1 / 2, 1 / 4, 1 / 4]),
    ],
)
def test_weights_by_name_and_by_number(options: dict[str, Any], shares: list[float]) -> None:
    objective = OWA("g", smoothing=0.0, **options)
    losses = [1.0, 8.0, 6.0, 2.0]
    loss, found = loss_and_shares(objective, losses, "abcd")
    assert found == pytest.approx(shares, abs=1e-12)
    assert loss == pytest.approx(sum(p * x for p, x in zip(shares, losses, strict=True)))


def test_equal_weights_of_equal_groups_are_the_plain_mean() -> None:
    losses = list(np.random.default_rng(0).random(6))
    objective = OWA("g", weights="mean", smoothing=0.0)
    loss, shares = loss_and_shares(objective, losses, "aabbcc")
    assert loss == pytest.approx(np.mean(losses), abs=1e-12)
    assert shares == pytest.approx([1 / 6] * 6, abs=1e-12)
    mean = CrossEntropy().reduce(torch.tensor(losses, dtype=torch.float64), batch("aabbcc"))
    assert loss == pytest.approx(mean.item(), abs=1e-9)


def test_a_small_group_counts_as_much_as_a_large_one() -> None:
    _, shares = loss_and_shares(OWA("g", weights="mean"), [1.0, 1.0, 1.0, 5.0], "aaab")
    assert shares == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_a_group_that_is_missing_keeps_its_estimate() -> None:
    objective = OWA("g", weights="worst", smoothing=0.0, memory=0.5)
    state = {name: torch.tensor([math.nan, 0.0], dtype=torch.float64) for name in "abc"}
    # The group c was never seen: it is taken to be as the others are, and not the worst.
    loss, shares = loss_and_shares(objective, [1.0, 3.0], "ab", state)
    assert (loss, shares) == (3.0, [0.0, 1.0])
    losses = torch.tensor([1.0, 3.0], dtype=torch.float64)
    state = objective.update(state, losses, batch("ab"))
    assert [state[name][0].item() for name in "ab"] == [1.0, 3.0]
    assert math.isnan(state["c"][0])
    # Half of b's estimate is kept, so a is not the worst although this batch says so.
    _, shares = loss_and_shares(objective, [2.5, 1.0], "ab", state)
    assert shares == [0.0, 1.0]
    # b is missing and the worst: nothing to learn from a.
    loss, shares = loss_and_shares(objective, [2.5], "a", state)
    assert (loss, shares) == (3.0, [0.0])
    state = objective.update(state, torch.tensor([2.5], dtype=torch.float64), batch("a"))
    assert [state[name][0].item() for name in "ab"] == [1.75, 3.0]


def test_excess_losses_favor_the_group_that_got_worse_not_the_hardest() -> None:
    state = {
        "a": torch.tensor([math.nan, 4.0], dtype=torch.float64),
        "b": torch.tensor([math.nan, 0.5], dtype=torch.float64),
    }
    options: dict[str, Any] = {"weights": "worst", "smoothing": 0.0}
    assert loss_and_shares(OWA("g", **options), [3.0, 1.0], "ab")[1] == [1.0, 0.0]
    loss, shares = loss_and_shares(OWA("g", excess=True, **options), [3.0, 1.0], "ab", state)
    assert (loss, shares) == (0.5, [0.0, 1.0])


def test_two_groups_that_want_different_things_end_equally_well_off() -> None:
    """90 examples pull to 1, 10 to -1; the worse group's loss is lowest with OWA."""
    wanted = torch.cat([torch.ones(90), -torch.ones(10)]).double()
    worst = {}
    means: list[tuple[str, OWA | None]] = [("examples", None), ("owa", OWA("g", weights="worst"))]
    means.append(("groups", OWA("g", weights="mean")))
    for name, objective in means:
        place = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            losses_B = (place - wanted) ** 2 * torch.where(wanted > 0, 1.0, 3.0)
            outcome = batch("a" * 90 + "b" * 10)
            loss = losses_B.mean() if objective is None else objective.reduce(losses_B, outcome)
            (slope,) = torch.autograd.grad(loss, place)
            with torch.no_grad():
                place -= 0.01 * slope
        worst[name] = max(losses_B[:90].mean().item(), losses_B[90:].mean().item())
    assert worst["owa"] < worst["groups"] - 0.1 < worst["examples"] - 0.2


# -- the dual form ---------------------------------------------------------------------------------


def play(part: Optimizer, steps: int, start: list[float]) -> list[float]:
    """How far theta and p of a game are from its saddle point, step by step.

    The losses of three groups are linear in theta and sum to a constant, so that their weighted
    sum does not depend on theta where the weights are equal, nor on the weights where theta is
    `saddle`.
    """
    saddle = torch.tensor([0.3, -0.2], dtype=torch.float64)
    slopes = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    objective = OWA("g", weights="worst", smoothing=0.0, dual_rate=0.3)
    theta = (saddle + torch.tensor(start, dtype=torch.float64))[None].requires_grad_(True)
    optimizer, outcome, far = part.build([theta]), batch("abc"), list[float]()
    state: dict[str, Tensor] = {}
    losses_B = torch.zeros(3)

    def closure() -> float:
        nonlocal losses_B
        with torch.enable_grad():
            losses_B = 1 + slopes @ (theta[0] - saddle)
            loss = objective.reduce_with(state, losses_B, outcome)
            (theta.grad,) = torch.autograd.grad(loss, theta)
        return loss.item()

    for _ in range(steps):
        optimizer.step(closure)
        state = objective.update(state, losses_B.detach(), outcome)
        shares = torch.stack([held[2] for held in state.values()])
        assert shares.sum().item() == pytest.approx(1)
        assert shares.min() >= 0
        moved = torch.cat([theta.detach()[0] - saddle, shares - 1 / 3])
        far.append(moved.norm().item())
    return far


@pytest.mark.parametrize("direction", ["past", "fresh"])
def test_extrapolation_ends_where_plain_steps_circle(direction: Any) -> None:
    start, rate = [0.1, 0.05], 0.3
    plain = {"name": "sgd", "momentum": 0.0}
    circle = play(SGD(rate, momentum=0.0), 1000, start)
    assert min(circle[-100:]) > 0.5 * circle[0]
    ahead = Extrapolated(rate, base=plain, direction=direction, scale=1.0)
    assert play(ahead, 1000, start)[-1] < 1e-6 * circle[0]


def test_a_dual_rate_of_one_over_the_smoothing_is_the_best_answer_at_once() -> None:
    rng = np.random.default_rng(3)
    best = OWA("g", smoothing=0.25, memory=0.5)
    dual = dataclasses.replace(best, dual_rate=4.0)
    slow = dataclasses.replace(best, dual_rate=0.1)
    states: list[dict[str, Tensor]] = [{}, {}, {}]
    for groups in ("aabc", "ab", "abcc"):
        losses = list(rng.random(len(groups)))
        first, second, third = (
            loss_and_shares(objective, losses, groups, state)
            for objective, state in zip((best, dual, slow), states, strict=True)
        )
        assert second[0] == pytest.approx(first[0], abs=1e-12)
        assert second[1] == pytest.approx(first[1], abs=1e-12)
        assert third[1] != pytest.approx(first[1], abs=1e-3)
        states = [
            objective.update(state, torch.tensor(losses, dtype=torch.float64), batch(groups))
            for objective, state in zip((best, dual, slow), states, strict=True)
        ]


def test_the_weights_of_the_dual_form_take_one_step_and_begin_equal() -> None:
    objective = OWA("g", weights="worst", smoothing=0.0, dual_rate=0.1)
    state: dict[str, Tensor] = {}
    for expected in ([0.4, 0.6], [0.3, 0.7]):
        _, shares = loss_and_shares(objective, [1.0, 3.0], "ab", state)
        assert shares == pytest.approx(expected)
        state = objective.update(state, torch.tensor([1.0, 3.0], dtype=torch.float64), batch("ab"))
        assert [state[g][2].item() for g in "ab"] == pytest.approx(expected)
    # The last batch alone has the say, but for a group that is missing from it.
    _, shares = loss_and_shares(objective, [2.0], "a", state)
    assert shares == pytest.approx([0.25])
    # Weights that leave no choice are those of the mean.
    mean = dataclasses.replace(objective, weights="mean")
    assert loss_and_shares(mean, [1.0, 3.0], "ab")[1] == pytest.approx([0.5, 0.5])


# -- balanced batches ------------------------------------------------------------------------------


def examples_of(groups: str) -> list[Example]:
    return [Example({"g": g}, "yes", f"rows.csv:{i}") for i, g in enumerate(groups)]


def sequences_of(groups: str) -> list[TokenSequence]:
    return [TokenSequence((), (), (), 0, None, example) for example in examples_of(groups)]


def test_batches_are_balanced_and_depend_on_the_seed_alone() -> None:
    groups = "a" * 20 + "b" * 7 + "c" * 3
    training = Training(batch_size=6)
    units = training.units([None] * len(groups))
    strata = training.strata(units, sequences_of(groups), "g")
    epochs = [training.epoch_batches(units, epoch, strata) for epoch in range(4)]
    assert [len(batch) for batch in epochs[0]] == [6] * 5
    taken: Counter[int] = Counter()
    for batch_ in epochs[0] + epochs[1] + epochs[2] + epochs[3]:
        assert Counter(groups[i] for i in batch_) == {"a": 2, "b": 2, "c": 2}
        taken.update(batch_)
    # 40 of each group: every row of it equally often, but for the round that is under way.
    for name, often in (("a", {2}), ("b", {5, 6}), ("c", {13, 14})):
        assert {taken[i] for i, g in enumerate(groups) if g == name} == often
    assert epochs[2] == training.epoch_batches(units, 2, strata)
    assert epochs[0] != dataclasses.replace(training, seed=1).epoch_batches(units, 0, strata)
    odd = dataclasses.replace(training, batch_size=4).epoch_batches(units, 0, strata)
    assert all(max(Counter(groups[i] for i in b).values()) <= 2 for b in odd)


def test_without_a_column_batches_are_as_ever() -> None:
    training = Training(batch_size=3)
    units = training.units([None] * 8)
    strata = training.strata(units, sequences_of("aaaabbbb"), None)
    assert training.epoch_batches(units, 1, strata) == training.epoch_batches(units, 1)
    # A batch that holds everything is as balanced as it can be.
    assert len(Training(batch_size=8).strata(units, sequences_of("aaaabbbb"), "g")) == 1


# -- runs ------------------------------------------------------------------------------------------


def in_groups(made: Kit) -> Kit:
    """The same rows, of three groups; the third is rare."""
    groups = "aabaabcaabcb"
    sequences = [
        dataclasses.replace(s, example=s.example.with_extra(g=groups[i]))
        for i, s in enumerate(made.sequences)
    ]
    return dataclasses.replace(made, sequences=sequences)


@pytest.mark.parametrize(
    "options", [{}, {"excess": True}, {"balanced": False}, {"dual_rate": 0.5, "excess": True}]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_resumes_in_the_middle_gives_the_same_rows(
    options: dict[str, Any], accumulate: int, tmp_path: Path
) -> None:
    made, kept = in_groups(small()), list[Checkpoint]()
    training = Training(steps=6, batch_size=2, evaluate_every=2, accumulate=accumulate)
    optimizer = Extrapolated(FAST.learning_rate, scale=1.0) if "dual_rate" in options else FAST
    parts = Parts(objective=OWA("g", **options), optimizer=optimizer)
    whole = train(made, training, dev=(), parts=parts, keep=kept.append)
    kept[0].save(tmp_path / "checkpoint")
    loaded = Checkpoint.load(tmp_path / "checkpoint")
    assert set(loaded.objective) == {"a", "b", "c"}
    resumed = train(made, training, dev=(), parts=parts, checkpoint=loaded)
    assert torch.equal(whole.prompt.rows, resumed.prompt.rows)
    # The estimates matter: without them the rows are others.
    assert (loaded.objective["a"][1].item() != 0) is bool(options.get("excess"))
    forgot = dataclasses.replace(loaded, objective={})
    assert not torch.equal(
        whole.prompt.rows, train(made, training, dev=(), parts=parts, checkpoint=forgot).prompt.rows
    )


@pytest.mark.parametrize("balanced", [True, False])
def test_accumulating_trains_the_same(balanced: bool) -> None:
    made = in_groups(small(dtype=torch.float64))
    parts = Parts(objective=OWA("g", balanced=balanced), optimizer=FAST)
    training = Training(steps=4, batch_size=5)
    whole, split = (
        train(made, dataclasses.replace(training, accumulate=n), dev=(), parts=parts)
        for n in (1, 3)
    )
    assert not torch.equal(whole.prompt.rows, made.start)
    assert (whole.prompt.rows - split.prompt.rows).abs().max().item() < 1e-10


def test_equal_weights_train_as_the_plain_mean_does() -> None:
    made = small(dtype=torch.float64)
    sequences = [
        dataclasses.replace(s, example=s.example.with_extra(g="ab"[i % 2]))
        for i, s in enumerate(made.sequences)
    ]
    made = dataclasses.replace(made, sequences=sequences)
    training = Training(steps=4, batch_size=8)  # all rows, four of each group
    neutral = OWA("g", weights="mean", smoothing=0.0)
    rows = [
        train(made, training, dev=(), parts=Parts(objective=o, optimizer=FAST)).prompt.rows
        for o in (CrossEntropy(), neutral)
    ]
    assert (rows[0] - made.start).abs().max().item() > 1e-3
    assert (rows[0] - rows[1]).abs().max().item() < 1e-9


def test_an_example_without_a_group_is_refused() -> None:
    made = kit(rows=2)
    objective = OWA("g")
    outcome = made.model.outcome(made.start, made.sequences)
    with pytest.raises(DataError, match=r"objective\.group: no group in Example\.extra\['g'\]"):
        objective.reduce(objective.losses(outcome), outcome)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"objective\.group: Field required"),
        ({"weights": [0.5, 0.4]}, r"objective\.weights: \[0\.5, 0\.4\]; they sum to 0\.9; "),
        ({"weights": [1.5, -0.5]}, r"objective\.weights: .*expected numbers of at least 0"),
        ({"weights": []}, r"objective\.weights: \[\]; expected numbers of at least 0"),
        ({"weights": [0.4, 0.6]}, r"objective\.weights: .*they rise.*list the largest first"),
        ({"weights": "cvar"}, r"objective\.share: is for weights = 'cvar', which needs it"),
        ({"share": 0.5}, r"objective\.share: is for weights = 'cvar'"),
        ({"dual_rate": -1.0}, r"objective\.dual_rate: .*greater than or equal to 0"),
        ({"memory": 1.0}, r"objective\.memory: .*less than 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    group = {"group": "domain"} if options else {}
    with pytest.raises(RecipeError, match=message) as raised:
        read(tmp_path, objective={"name": "owa", **group, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("objective", "groups", "dev", "message"),
    [
        (OWA("g"), "aaa", "a", r"objective\.group: all 3 training rows have 'a' in column 'g'; "),
        (OWA("g", weights=(1.0, 0.0)), "abc", "a", r"2 numbers, but column 'g' has 3 groups"),
        (OWA("g", weights=(1.0, 0.0, 0.0)), "abb", "a", r"3 numbers, but column 'g' has 2 groups"),
        (OWA("g"), "aabb", "ac", r"rows\.csv:1: group 'c' in column 'g' is in no training row; "),
        (OWA("h"), "aabb", "a", r"rows\.csv:0: column 'h' holds no value; expected the name of a"),
    ],
)
def test_rows_that_cannot_be_compared(objective: OWA, groups: str, dev: str, message: str) -> None:
    with pytest.raises(EmbedgradError, match=message):
        objective.check(examples_of(groups), examples_of(dev))
