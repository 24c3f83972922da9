"""Hypergradients of a tiny prompt by finite differences, and the tuner."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.errors import ModelError, RecipeError
from embedgrad.model.backbone import join_spans
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import OWA, CrossEntropy, Objective
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.span import rows_by_span
from embedgrad.training.hypergradient import Hyper, conjugate_gradients, hypergradient
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts
from embedgrad.training.tuner import State, Tuning, minimize, tune
from embedgrad.training.weighted import WeightedTraining
from kit import Kit, kit


def problem(
    dtype: torch.dtype = torch.float64,
    objective: Objective | None = None,
    anchor: float = 8.0,
    made: Kit | None = None,
    **options: Any,
) -> WeightedTraining:
    """Five rows to weigh, and five to judge them by; short rows keep this quick."""
    made = made or kit(template="plain-start", rows=10, dtype=dtype)
    start = rows_by_span(made.start, made.sequencer.spans)
    parts = Parts() if objective is None else Parts(objective=objective)
    loss = Loss(made.model, parts, made.sequencer.target, start)
    origin = parts.parameterization.init(start, torch.Generator())
    train, dev = made.sequences[:5], made.sequences[5:]
    return WeightedTraining(loss, origin, train, dev, anchor=anchor, **options)


SOURCES = ["a", "b", "a", "b", "a"]


def solved(training: WeightedTraining, hyper: Hyper, x: Tensor, share: float) -> Tensor:
    """The minimum: by L-BFGS, which fp32 losses end early, and then by Newton steps."""
    first = training.inner(training.start_x, training.hyper())[1].norm().item()
    state = State(x, hyper, 1.0, 0.1, 0, {}, [])
    x = minimize(training, state, passes=400, target=max(share, 0.01) * first)[0].x
    for _ in range(6):
        gradient = training.inner(x, hyper)[1]
        if gradient.norm() <= share * first:
            return x

        def product(v: Tensor, x: Tensor = x) -> Tensor:
            return training.product(x, hyper, v)

        x = x - conjugate_gradients(product, gradient, steps=20, tolerance=1e-3).q
    raise AssertionError("the inner problem is not solved")


@pytest.mark.parametrize(
    ("dtype", "share", "step"), [(torch.float64, 1e-6, 0.1), (torch.float32, 1e-5, 0.3)]
)
def test_hypergradients_are_within_5_percent_of_finite_differences(
    dtype: torch.dtype, share: float, step: float
) -> None:
    training = problem(dtype, anchor=30.0, sources=SOURCES)
    hyper = training.hyper("examples", "sources", "anchor")
    x = solved(training, hyper, training.start_x, share)
    found = hypergradient(training, x, hyper, inner_norm=0.0, steps=60, tolerance=1e-4)
    assert found.solved.damping == 0
    places: list[tuple[str, tuple[int, ...]]] = [
        ("examples", (0,)),
        ("sources", (0,)),
        ("anchor", ()),
    ]
    for name, place in places:
        ends = []
        for sign in (1, -1):
            moved = {key: value.clone() for key, value in hyper.items()}
            moved[name][place] += sign * step
            ends.append(training.outer(solved(training, moved, x, share))[0])
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert found.gradient[name][place].item() == pytest.approx(numeric, rel=0.05), name


def test_excess_losses_are_those_over_the_text_prompt() -> None:
    """Both groups have none at the start, and so the same share."""
    training, _ = toy(dataclasses.replace(FAIR, excess=True))
    value, shares = training.reduce(training.text_N, {}), [0.5, 0.5]
    assert value.item() == pytest.approx(-FAIR.smoothing / 2 * sum(p * p for p in shares))


@pytest.mark.parametrize("name", ["mix", "smoothing"])
def test_what_an_objective_lacks_cannot_be_tuned(name: str) -> None:
    with pytest.raises(RecipeError, match=f"objective: '{name}' is for"):
        toy(CrossEntropy("choices"))[0].hyper(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_passes_give_every_rows_product_with_a_direction(dtype: torch.dtype) -> None:
    training = problem(dtype)
    generator = torch.Generator().manual_seed(0)
    x, q = (torch.randn(training.start_x.shape, generator=generator).to(dtype) for _ in "12")
    x = 0.1 * x
    hyper = training.hyper("examples")
    found = training.mixed_product(x, hyper, q)["examples"]
    leaf = x.clone().requires_grad_(True)
    losses = training.loss(training.theta(leaf), training.train)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
    expected = torch.stack([gradient @ q for gradient in gradients]) / 2 / len(losses)
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if dtype == torch.float32 else 1e-4, atol=1e-4
    )


def test_stored_prefixes_change_no_product() -> None:
    """Prefix reuse and hypergradients: what precedes the rows is not computed again."""
    found = []
    for budget in (0, "1 GiB"):
        training = problem(made=kit(template="system", rows=10, budget=budget))
        v = torch.linspace(-1, 1, len(training.start_x), dtype=torch.float64)
        found.append(training.product(0.01 * v, training.hyper("examples"), v))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_products_are_those_of_the_gradient() -> None:
    training = problem(sources=SOURCES, curvature_rows=None)
    hyper = {
        name: value + 0.3 for name, value in training.hyper("examples", "sources", "anchor").items()
    }
    v = torch.linspace(-1, 1, len(training.start_x), dtype=torch.float64)
    x, t = 0.02 * v.flip(0), 1e-5
    numeric = (training.inner(x + t * v, hyper)[1] - training.inner(x - t * v, hyper)[1]) / (2 * t)
    torch.testing.assert_close(training.product(x, hyper, v), numeric, rtol=1e-5, atol=1e-7)


def test_products_may_take_some_of_the_rows() -> None:
    few = problem(curvature_rows=2)
    assert few.curved == [0, 2]
    alone = problem()
    alone.train = [alone.train[0], alone.train[2]]
    alone.curved = [0, 1]
    v = torch.ones_like(few.start_x)
    expected = alone.product(few.start_x, alone.hyper("examples"), v)
    torch.testing.assert_close(few.product(few.start_x, few.hyper("examples"), v), expected)


def test_the_judge_may_be_a_fair_objective() -> None:
    """Weights of examples with an outer objective that is an average over ordered groups."""
    made = kit(template="plain-start", rows=10)
    sequences = []
    for i, sequence in enumerate(made.sequences):
        example = sequence.example.with_extra(domain="ab"[i % 2])
        sequences.append(dataclasses.replace(sequence, example=example))
    made = dataclasses.replace(made, sequences=sequences)
    training = problem(made=made, objective=OWA("domain", weights="worst", smoothing=0.0))
    losses = training.loss(training.theta(training.start_x), training.dev)
    worst = max(losses[0::2].mean().item(), losses[1::2].mean().item())
    value, gradient = training.outer(training.start_x)
    assert value == pytest.approx(worst)
    v, t = torch.ones_like(gradient), 1e-6
    x = training.start_x
    slope = (training.outer(x + t * v)[0] - training.outer(x - t * v)[0]) / (2 * t)
    assert (gradient @ v).item() == pytest.approx(slope, rel=1e-4)


def test_a_model_that_differentiates_once_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    training = problem()
    grad = torch.autograd.grad

    def once(*given: Any, **options: Any) -> Any:
        if options.get("create_graph"):
            raise RuntimeError("derivative for aten::_flash is not implemented")
        return grad(*given, **options)

    monkeypatch.setattr(torch.autograd, "grad", once)
    with pytest.raises(ModelError, match=r"only once; set model\.attention = 'eager'"):
        training.product(training.start_x, {}, training.start_x)


def test_a_training_that_does_not_converge_says_what_is_left_and_is_used() -> None:
    training, told = problem(anchor=0.1), list[dict[str, Any]]()
    tuned = tune(training, training.hyper("examples"), Tuning(passes=2), report=told.append)
    (entry,) = tuned.state.history
    assert not entry["converged"]
    assert 2 <= entry["passes"] <= 4
    (note,) = [event["text"] for event in told if event["event"] == "note"]
    assert note.startswith(
        f"the training did not converge in {entry['passes']} passes: its gradient is "
    )
    assert f"{entry['residual']:.2g} of what it began with" in note
    assert tuned.suggested["examples"].abs().max() > 0


def test_where_no_curvature_was_looked_for_there_is_no_bound() -> None:
    training = problem()
    settings = Tuning(passes=2, products=2, mode="neumann")
    tuned = tune(training, training.hyper("examples"), settings)
    (entry,) = tuned.state.history
    assert (entry["bound"], entry["certified"]) == (torch.inf, False)


def test_a_step_that_helps_nobody_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    training, told = problem(), list[dict[str, Any]]()
    dev = training.outer
    calls = iter(range(1000))
    monkeypatch.setattr(training, "outer", lambda x: (dev(x)[0] + next(calls), dev(x)[1]))
    tuned = tune(training, training.hyper("examples"), Tuning(rounds=3), report=told.append)
    assert len(tuned.state.history) == 1
    assert told[-1]["text"].startswith("no step lowers the loss on dev after round 1")


def test_a_tuning_resumes_to_the_bit() -> None:
    settings = Tuning(rounds=2, passes=20, tolerance=0.001)
    states = list[State]()
    training = problem(anchor=1.0)
    whole = tune(training, training.hyper("examples"), settings, keep=states.append)
    assert len(states) >= 3
    for state in (states[0], states[-1]):
        again = tune(training, training.hyper("examples"), settings, state=state)
        assert torch.equal(again.suggested["examples"], whole.suggested["examples"])
        assert again.state.history == whole.state.history


class Bilinear:
    """A model whose prompt decides by a bilinear form of its rows and the query's words."""

    def __init__(self, words: Tensor):
        self.words = words

    def outcome(self, prompt: Any, batch: Any, **_: Any) -> Outcome:
        query_BD = torch.stack([self.words[list(s.prefix)].mean(0) for s in batch])
        margin_B = query_BD @ join_spans(prompt).mean(0) * 30
        neither_B = join_spans(prompt)[0, 0].expand(len(margin_B))
        logits_B3 = torch.stack([margin_B, -margin_B, neither_B], 1)
        scores_BC = torch.log_softmax(logits_B3, 1)[:, :2]
        gold_B = torch.tensor([s.gold for s in batch])
        ones_BC = torch.ones_like(gold_B)[:, None].repeat(1, 2)
        extra = {"group": [s.example.group_in("group") for s in batch]}
        return Outcome(scores_BC, ones_BC, gold_B, (None,) * len(batch), extra=extra)


def toy(
    objective: Objective = CrossEntropy(), anchor: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[WeightedTraining, list[bool]]:
    """A task that can be learned: words have a side, queries are 6 words, 30 % are flipped."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(40, 16, generator=generator).to(dtype)
    side = torch.randn(16, generator=generator).to(dtype)

    def row(flip: bool) -> TokenSequence:
        ids = tuple(torch.randint(40, (6,), generator=generator).tolist())
        gold = int(words[list(ids)].mean(0) @ side < 0) ^ flip
        example = Example({}, str(gold), "toy").with_extra(group="ab"[ids[0] % 2])
        return TokenSequence(ids, (), ((0,), (1,)), gold, None, example)

    flips = (torch.rand(120, generator=generator) < 0.3).tolist()
    train, dev = [row(flip) for flip in flips], [row(False) for _ in range(60)]
    start = {"span": torch.randn(2, 16, generator=generator).to(dtype)}
    model: Any = Bilinear(words)
    loss = Loss(model, Parts(objective=objective), Target(choices=("a", "b")), start)
    origin = Parts().parameterization.init(start, generator)
    return WeightedTraining(loss, origin, train, dev, anchor=anchor), flips


FAIR = OWA("group", smoothing=0.05)


@pytest.mark.parametrize(
    ("objective", "name"),
    [(CrossEntropy("both"), "mix"), (FAIR, "smoothing")],
)
def test_what_an_objective_is_made_of_can_be_tuned(objective: Objective, name: str) -> None:
    training, _ = toy(objective, anchor=2.0, dtype=torch.float64)
    x, ends = training.start_x, list[float]()

    def solve(hyper: Hyper) -> Tensor:
        state = State(x, hyper, 1.0, 0.1, 0, {}, [])
        found, norm = minimize(training, state, passes=200, target=1e-5)
        assert norm <= 1e-5
        return found.x

    hyper = training.hyper(name)
    found = hypergradient(training, solve(hyper), hyper, inner_norm=0.0, steps=40, tolerance=1e-6)
    assert found.solved.damping == 0
    for sign in (1, -1):
        ends.append(training.outer(solve({name: hyper[name] + sign * 0.1}))[0])
    numeric = (ends[0] - ends[1]) / 0.2
    assert found.gradient[name].item() == pytest.approx(numeric, rel=0.01)
    assert abs(numeric) > 1e-6


def test_flipped_labels_rank_high_and_dev_gains_from_weights() -> None:
    (training, flips), told = toy(), list[dict[str, Any]]()
    settings = Tuning(rounds=4, products=20)
    tuned = tune(training, training.hyper("examples"), settings, report=told.append)
    for ranking in (-tuned.suggested["examples"], tuned.found.gradient["examples"]):
        pairs = torch.tensor(flips), ranking
        above = (pairs[1][pairs[0]][:, None] > pairs[1][~pairs[0]][None]).double().mean().item()
        assert above > 0.55
    losses = [entry["dev_loss"] for entry in tuned.state.history]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    rounds = [event for event in told if event["event"] == "tuning"]
    assert [event["dev_loss"] for event in rounds] == losses
    assert all(event["bound"] > 0 for event in rounds)


def test_a_source_of_wrong_labels_loses_weight() -> None:
    training, flips = toy()
    names = ["careless" if flip else "careful" for flip in flips]
    made = WeightedTraining(
        training.loss, training.origin, training.train, training.dev, anchor=0.1, sources=names
    )
    tuned = tune(made, made.hyper("examples", "sources"), Tuning(passes=60, products=20))
    weights = made.weights({"sources": tuned.suggested["sources"]})
    assert made.sources == list(dict.fromkeys(names))
    by_name = dict(zip(names, weights.tolist(), strict=True))
    assert by_name["careless"] < 0.8 < 1.2 < by_name["careful"]
    for value in tuned.suggested.values():  # neither kind of number drowns the other
        assert value.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
