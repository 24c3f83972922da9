"""Laws of objectives: one loss per example, changed by no neighbour; only rows get a gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import pytest
import torch
from torch import Tensor

from embedgrad.errors import EmbedgradError
from embedgrad.model.outcome import Outcome
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.parts.objectives import OBJECTIVES, OWA, CrossEntropy, Distill, Objective, Regret
from embedgrad.parts.parameterizations import Free
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts
from kit import LONG_CHOICES, Kit, full_logprobs, kit, noisy
from kit_teacher import teacher_of
from seam_parts import SEAM_OBJECTIVES

LONG = Target(choices=LONG_CHOICES)
TARGETS = {
    "choices": LONG,
    "normalized": Target(choices=LONG_CHOICES, normalize=True),
    "free": Target(),
}


ALL = {
    **OBJECTIVES,
    **SEAM_OBJECTIVES,
    "distill-reverse": functools.partial(Distill, direction="reverse"),
    "owa": functools.partial(OWA, "third"),
    "regret": functools.partial(Regret, (-3.0, 1.0, 0.5), k=1),
    "regret-column": functools.partial(
        Regret, "gain", k=1, weights=(1.0, -1.0, 0.0), kind="pessimistic", warm_share=0.0
    ),
    "regret-matrix": functools.partial(Regret, ((0.0, 3.0), (1.0, 0.0), (1.0, 1.0)), "cost_matrix"),
    "owa-dual": functools.partial(OWA, "third", dual_rate=0.1),
    "owa-worst": functools.partial(OWA, "third", weights="worst", smoothing=0.0),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every objective with every target, but free answers where it needs choices."""
    names = [name for name in ("objective", "made") if name in metafunc.fixturenames]
    pairs = [
        (objective, target)
        for objective in sorted(ALL)
        for target in sorted(TARGETS)
        if target != "free" or not ALL[objective]().needs_choices(available=False)
    ]
    if names:
        places = [("objective", "made").index(name) for name in names]
        chosen = dict.fromkeys(tuple(pair[i] for i in places) for pair in pairs)
        metafunc.parametrize(names, list(chosen), indirect=True)


@pytest.fixture
def objective(request: pytest.FixtureRequest) -> Objective:
    return ALL[request.param]()


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Kit:
    return taught(request.param).with_cache(PrefixCache(2**30))


@functools.lru_cache
def taught(target: str) -> Kit:
    return in_thirds(with_teacher(kit(target=TARGETS[target], rows=6, tie=False)))


def in_thirds(made: Kit) -> Kit:
    """The kit with groups of two rows and their costs, for the objectives that compare them."""
    sequences = [
        dataclasses.replace(
            s,
            example=dataclasses.replace(
                s.example.with_extra(third=str(i % 3), gain=str(i - 2.5)), group=str(i % 3)
            ),
        )
        for i, s in enumerate(made.sequences)
    ]
    return dataclasses.replace(made, sequences=sequences)


def with_teacher(made: Kit) -> Kit:
    """The kit with what a teacher says of its rows, for the objectives that ask for it."""
    taught = teacher_of(made, Distill(top=5)).teach(made.sequences)
    return dataclasses.replace(made, sequences=taught)


def outcome_of(
    objective: Objective, made: Kit, rows_PD: Tensor, sequences: list[TokenSequence]
) -> Outcome:
    target = made.sequencer.target
    choices = objective.needs_choices(available=bool(target.choices))
    read = [ids for s in sequences if (ids := objective.tokens_to_read(s)) is not None]
    return made.model.outcome(
        rows_PD, sequences, choices=choices, normalize=target.normalize, read=read or None
    )


def losses_of(
    objective: Objective, made: Kit, rows_PD: Tensor, sequences: list[TokenSequence]
) -> Tensor:
    return objective.losses(outcome_of(objective, made, rows_PD, sequences))


def test_there_is_one_finite_loss_per_example(objective: Objective, made: Kit) -> None:
    outcome = outcome_of(objective, made, made.start, made.sequences)
    losses = objective.losses(outcome)
    assert losses.shape[0] == 6  # or several numbers for each
    assert torch.isfinite(losses).all()
    assert len(losses.unique(dim=0)) == 6
    number = objective.reduce(losses, outcome)
    assert number.shape == ()
    assert torch.isfinite(number)


def test_neighbours_change_no_loss(objective: Objective, made: Kit) -> None:
    rows = noisy(made.start)
    whole = losses_of(objective, made, rows, made.sequences)
    for i, sequence in enumerate(made.sequences):
        alone = losses_of(objective, made, rows, [sequence])
        assert (alone[0] - whole[i]).abs().max().item() < 1e-10
    first = made.sequences[0]
    long = dataclasses.replace(first, prefix=first.prefix * 3, suffix=first.suffix * 4)
    padded = losses_of(objective, made, rows, [*made.sequences, long])
    assert (padded[:6] - whole).abs().max().item() < 1e-10


def test_parts_of_a_batch_add_up(objective: Objective, made: Kit) -> None:
    """A law of the loss: in however many parts, the same number and the same gradient."""
    loss = Loss(made.model, Parts(objective=objective), made.sequencer.target, {"span": made.start})
    theta = {"span": torch.full_like(made.start, 0.05, requires_grad=True)}
    whole = loss.gradient(theta, made.sequences)
    assert whole.gradients["span"].norm().item() > 1e-6
    for parts in (2, 3, 6):
        split = loss.gradient(theta, made.sequences, parts)
        assert abs(whole.loss - split.loss) < 1e-10
        assert (whole.gradients["span"] - split.gradients["span"]).abs().max().item() < 1e-10
        assert (whole.losses_B - split.losses_B).abs().max().item() < 1e-10


def test_the_mean_alone_needs_no_first_pass(objective: Objective, made: Kit) -> None:
    outcome = outcome_of(objective, made, made.start, made.sequences)
    losses = objective.losses(outcome).detach().requires_grad_(True)
    (weights,) = torch.autograd.grad(objective.reduce(losses, outcome), losses)
    equal = torch.full_like(weights, 1 / len(made.sequences))
    assert objective.is_mean <= torch.allclose(weights, equal, rtol=0, atol=1e-12)


def test_the_gradient_goes_to_the_rows_and_nowhere_else(objective: Objective, made: Kit) -> None:
    rows = noisy(made.start).requires_grad_(True)
    outcome = outcome_of(objective, made, rows, made.sequences)
    objective.reduce(objective.losses(outcome), outcome).backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.norm(dim=1).min().item() > 1e-9
    weights = list(made.loaded.model.parameters())
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)


def test_a_smaller_loss_is_a_likelier_answer(objective: Objective, made: Kit) -> None:
    rows = noisy(made.start).requires_grad_(True)
    outcome = outcome_of(objective, made, rows, made.sequences)
    loss = objective.reduce(objective.losses(outcome), outcome)
    (gradient,) = torch.autograd.grad(loss, rows)
    step = rows.detach() - 1e-4 * gradient / gradient.norm()
    after = outcome_of(objective, made, step, made.sequences)
    assert objective.reduce(objective.losses(after), after).item() < loss.item()


def test_rows_with_fewer_choices_stay_finite(objective: Objective) -> None:
    made = kit(target=LONG, rows=2, tie=False)
    fewer = dataclasses.replace(made.sequences[0], targets=made.sequences[0].targets[:2])
    both = dataclasses.replace(made, sequences=[fewer, made.sequences[1]])
    made = in_thirds(with_teacher(both))
    rows = noisy(made.start).requires_grad_(True)
    losses = losses_of(objective, made, rows, made.sequences)
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------------------------- cross-entropy


def test_cross_entropy_over_the_answer(made: Kit) -> None:
    rows = noisy(made.start)
    found = losses_of(CrossEntropy(over="answer"), made, rows, made.sequences)
    for b, logprobs in enumerate(full_logprobs(made.loaded, rows, made.sequences)):
        gold = made.sequences[b].gold
        expected = -logprobs[gold] / len(made.sequences[b].targets[gold])
        assert (found[b] - expected).abs().item() < 1e-10


@pytest.mark.parametrize("over", ["choices", "both", "auto"])
@pytest.mark.parametrize("name", ["choices", "normalized"])
def test_cross_entropy_over_the_choices(
    name: str, over: Literal["choices", "both", "auto"]
) -> None:
    made = kit(target=TARGETS[name], rows=4, tie=False)
    rows = noisy(made.start)
    found = losses_of(CrossEntropy(over=over), made, rows, made.sequences)
    for b, logprobs in enumerate(full_logprobs(made.loaded, rows, made.sequences)):
        lengths = torch.tensor([len(ids) for ids in made.sequences[b].targets])
        gold = made.sequences[b].gold
        scores = logprobs / lengths if name == "normalized" else logprobs
        expected = -torch.log_softmax(scores, dim=0)[gold]
        if over != "choices":  # the kit's outcome has no end of the turn
            expected = expected - logprobs[gold] / lengths[gold]
        assert (found[b] - expected).abs().item() < 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_cross_entropy_over_both_teaches_to_end_the_turn(normalize: bool, parts: int) -> None:
    """Choices are compared without the end of the turn; the answer has it as its last token."""
    made = kit(target=Target(choices=LONG_CHOICES, normalize=normalize), rows=6, tie=False)
    end = made.sequencer.end_ids
    assert end
    assert all(s.end == end for s in made.sequences)
    theta = {"span": (0.1 * torch.randn_like(made.start)).requires_grad_(True)}
    parts_of = Parts(objective=CrossEntropy(over="both"))
    loss = Loss(made.model, parts_of, made.sequencer.target, {"span": made.start})
    found = loss(theta, made.sequences)
    rows = Free().prompt(theta, {"span": made.start})["span"].detach()
    ended = [dataclasses.replace(s, targets=(s.targets[s.gold] + end,)) for s in made.sequences]
    lines = full_logprobs(made.loaded, rows, made.sequences)
    for b, (logprobs, whole) in enumerate(
        zip(lines, full_logprobs(made.loaded, rows, ended), strict=True)
    ):
        sequence = made.sequences[b]
        lengths = torch.tensor([len(ids) for ids in sequence.targets])
        scores = logprobs / lengths if normalize else logprobs
        expected = -torch.log_softmax(scores, dim=0)[sequence.gold]
        expected = expected - whole[0] / (lengths[sequence.gold] + 1)
        assert (found[b] - expected).abs().item() < 1e-10
    assert loss.gradient(theta, made.sequences, parts).loss == pytest.approx(found.mean().item())


@pytest.mark.parametrize("over", ["choices", "both"])
def test_cross_entropy_over_choices_that_are_not_there_is_refused(
    over: Literal["choices", "both"],
) -> None:
    made = kit(target=TARGETS["free"], rows=2)
    with pytest.raises(EmbedgradError, match=f"over.*{over}.*choices"):
        losses_of(CrossEntropy(over=over), made, made.start, made.sequences)
