"""Laws of the seams: what a part may do that no shipped part does yet, shown with test parts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import DataError, DivergenceError
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
from embedgrad.parts.augmentations import AUGMENTATIONS, Augmentation, BatchContext
from embedgrad.parts.objectives import CrossEntropy, Objective
from embedgrad.parts.optimizers import SGD, AdamW, Schedule
from embedgrad.parts.parameterizations import LowRank, ScaleShift
from embedgrad.parts.transforms import Clip, Context, Gradients, State
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.trust_region import TrustRegion, distances
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts, Refinement, Training
from kit import LONG_CHOICES, Kit, kit, noisy
from kit_loop import QUICK, small, train
from seam_parts import (
    Average,
    Costly,
    DeepToy,
    Noise,
    OrderedAverage,
    Protect,
    Throw,
    WorstGroup,
    no_setup,
)

FAST = AdamW(learning_rate=0.1, weight_decay=0.1)


def with_costs(made: Kit) -> Kit:
    """The same examples, the i-th with a cost of i."""
    sequences = [
        dataclasses.replace(s, example=dataclasses.replace(s.example, extra={"cost": i}))
        for i, s in enumerate(made.sequences)
    ]
    return dataclasses.replace(made, sequences=sequences)


# -- objectives that are not means -----------------------------------------------------------------


@pytest.mark.parametrize("objective", [CrossEntropy(), OrderedAverage(), Costly(), WorstGroup()])
@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulating_trains_the_same_for_any_objective(
    objective: Objective, accumulate: int
) -> None:
    made = with_costs(small(dtype=torch.float64))
    parts, training = Parts(objective=objective, optimizer=FAST), Training(steps=4, batch_size=5)
    losses: list[list[float]] = [[], []]

    def note(into: list[float]) -> Any:
        return lambda event: into.append(event["loss"]) if event["event"] == "step" else None

    whole = train(made, training, dev=(), parts=parts, report=note(losses[0]))
    split = train(
        made,
        dataclasses.replace(training, accumulate=accumulate),
        dev=(),
        parts=parts,
        report=note(losses[1]),
    )
    assert not torch.equal(whole.prompt.rows, made.start)
    assert (whole.prompt.rows - split.prompt.rows).abs().max().item() < 1e-10
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_means_of_parts_are_another_objective() -> None:
    """The law above is none for free: averaged over parts, an ordered average is another number."""
    made = kit(rows=6, tie=False)
    outcome = made.model.outcome(made.start, made.sequences)
    objective = OrderedAverage()
    losses = objective.losses(outcome)
    halves = [objective.reduce(half, outcome) for half in losses.split(3)]
    assert abs(objective.reduce(losses, outcome) - sum(halves) / 2) > 1e-3


@pytest.mark.parametrize(
    ("objective", "accumulate", "passes"),
    [(OrderedAverage(), 1, 1), (CrossEntropy(), 1, 1), (CrossEntropy(), 3, 3)],
)
def test_no_pass_is_made_twice_where_one_is_enough(
    objective: Objective, accumulate: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, calls = LanguageModel.outcome, 0

    def counted(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return outcome(self, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "outcome", counted)
    training = Training(steps=2, batch_size=3, accumulate=accumulate)
    train(small(), training, dev=(), parts=Parts(objective=objective))
    assert calls == 2 * passes


# -- what a batch carries --------------------------------------------------------------------------


def test_an_objective_reads_a_column_of_the_data() -> None:
    made = with_costs(kit(rows=6, tie=False))
    loss = Loss(made.model, Parts(objective=Costly()), made.sequencer.target, {"span": made.start})
    theta = {"span": torch.zeros_like(made.start, requires_grad=True)}
    found = loss.gradient(theta, made.sequences, 2)
    assert found.outcome.extra["cost"] == [0, 1, 2, 3, 4, 5]
    expected = (found.losses_B * torch.arange(6)).sum() / 15
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)


def test_batches_of_groups_are_whole_and_depend_on_the_seed_alone() -> None:
    groups = ["a", "b", "a", "c", "b", "a", "d"]
    training = Training(batch_size=2, batch_by="groups")
    units = training.units(groups)
    assert units == [[0, 2, 5], [1, 4], [3], [6]]
    assert training.steps_per_epoch(len(units)) == 2
    epochs = [training.epoch_batches(units, epoch) for epoch in range(6)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(7))
        for batch in batches:
            assert len({groups[i] for i in batch}) == 2
            inside = {groups[i] for i in batch}
            assert {i for i, group in enumerate(groups) if group in inside} == set(batch)
    assert len({str(batches) for batches in epochs}) > 1
    assert epochs[3] == training.epoch_batches(units, 3)
    with pytest.raises(DataError, match=r"training\.batch_by: 'groups'.*data\.group"):
        training.units(["a", None])


def test_a_training_by_groups_sees_whole_groups_also_after_a_resume() -> None:
    made, seen = small(dtype=torch.float64), []

    @dataclasses.dataclass(frozen=True)
    class Watching(WorstGroup):
        def reduce(self, losses_B: Tensor, outcome: Any) -> Tensor:
            if not losses_B.requires_grad or losses_B.is_leaf:
                seen.append(outcome.groups)
            return super().reduce(losses_B, outcome)

    sizes = {g: [s.example.group for s in made.sequences[:8]].count(g) for g in groups_of(made)}
    assert len(sizes) > 2
    assert max(sizes.values()) > 1
    training = Training(steps=6, batch_size=2, batch_by="groups", accumulate=2, evaluate_every=2)
    parts, kept = Parts(objective=Watching(), optimizer=FAST), list[Checkpoint]()
    whole = train(made, training, parts=parts, dev=(), keep=kept.append)
    for batch in seen:
        assert all(batch.count(group) == sizes[group] for group in batch)
    resumed = train(made, training, parts=parts, dev=(), checkpoint=kept[0])
    assert torch.equal(whole.prompt.rows, resumed.prompt.rows)


def groups_of(made: Kit) -> set[str]:
    return {s.example.group or "" for s in made.sequences[:8]}


# -- augmentations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama-dynamic", "mamba"])
@pytest.mark.parametrize("target", [Target(choices=LONG_CHOICES), Target()])
def test_the_model_reads_the_inputs_and_is_asked_for_the_labels(
    architecture: str, target: Target
) -> None:
    made = kit(architecture, rows=4, target=target, tie=False)
    if not target.choices:  # answers of several tokens
        examples = [dataclasses.replace(s.example, answer=LONG_CHOICES[1]) for s in made.sequences]
        made = dataclasses.replace(made, sequences=made.sequencer.build(examples))
    noisy_batch = Noise(share=0.5)(
        made.sequences, BatchContext(seed=0, step=0, total=1, vocabulary=9)
    )
    assert any(s.inputs != s.targets for s in noisy_batch)
    assert [s.targets for s in noisy_batch] == [s.targets for s in made.sequences]
    rows = noisy(made.start)
    table = made.loaded.model.get_input_embeddings()
    found = made.model.outcome(rows, noisy_batch).logprobs_BC
    for s, row in zip(noisy_batch, found, strict=True):
        for c, labels in enumerate(s.targets):
            assert s.inputs is not None
            read = table(torch.tensor([*s.suffix, *s.inputs[c][:-1]]))
            embeds = torch.cat([table(torch.tensor(s.prefix)), rows, read])[None]
            model: Any = copy.deepcopy(made.loaded.model)
            for module in model.modules():  # dynamic rotary scaling keeps its longest pass
                if hasattr(module, "max_seq_len_cached"):
                    module.max_seq_len_cached = 0
            with torch.no_grad():
                logits = model(inputs_embeds=embeds).logits[0]
            logprobs = torch.log_softmax(logits[-len(labels) :], dim=1)
            expected = logprobs[torch.arange(len(labels)), torch.tensor(labels)].sum()
            assert (row[c] - expected).abs().item() < 1e-9
    same = Noise(share=0.0)(made.sequences, BatchContext(seed=0, step=0, total=1, vocabulary=9))
    plain = made.model.outcome(rows, made.sequences).logprobs_BC
    assert torch.equal(made.model.outcome(rows, same).logprobs_BC, plain)


def test_the_same_seed_and_step_give_the_same_batch_also_after_a_resume() -> None:
    made = small(target=Target())
    examples = [dataclasses.replace(s.example, answer=LONG_CHOICES[1]) for s in made.sequences]
    made = dataclasses.replace(made, sequences=made.sequencer.build(examples))
    noise = Noise()
    first, again, later, other = (
        noise(made.sequences, BatchContext(seed=seed, step=step, total=9, vocabulary=9))
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first not in (later, other)

    def run(*augmentations: Augmentation, checkpoint: Checkpoint | None = None) -> Refinement:
        parts = Parts(augmentations=augmentations, optimizer=FAST)
        training = dataclasses.replace(QUICK, evaluate_every=2)
        return train(made, training, dev=(), parts=parts, checkpoint=checkpoint, keep=kept.append)

    kept: list[Checkpoint] = []
    plain, silent, whole = run(), run(Noise(share=0.0)), run(noise)
    assert torch.equal(plain.prompt.rows, silent.prompt.rows)
    assert not torch.equal(plain.prompt.rows, whole.prompt.rows)
    assert torch.equal(run(noise, checkpoint=kept[-3]).prompt.rows, whole.prompt.rows)
    assert not torch.equal(run(noise, noise).prompt.rows, plain.prompt.rows)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_an_augmentation_is_pure_and_leaves_the_labels(name: str) -> None:
    rows = [dataclasses.replace(s.example, answer=LONG_CHOICES[1]) for s in small().sequences]
    sequences = small(target=Target()).sequencer.build(rows)
    batch = [dataclasses.replace(s, reasoning=len(s.targets[0])) for s in sequences]
    kept, augmentation = copy.deepcopy(batch), AUGMENTATIONS[name]()
    first, again, later, other = (
        augmentation(batch, BatchContext(seed=seed, step=step, total=9, vocabulary=9))
        for seed, step in ((0, 7), (0, 7), (0, 8), (1, 7))
    )
    assert batch == kept
    assert first == again
    assert first not in (batch, later, other)
    assert [s.targets for s in first] == [s.targets for s in batch]
    assert augmentation.problem(batch) is None


def test_dev_is_never_augmented() -> None:
    made, seen = small(), []

    class Watching(Noise):
        def __call__(self, batch: Any, context: BatchContext) -> Any:
            seen.extend(s.example.source for s in batch)
            return super().__call__(batch, context)

    train(made, QUICK, parts=Parts(augmentations=(Watching(),)))
    assert set(seen) == {s.example.source for s in made.sequences[:8]}


# -- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_protected_direction_stays_untouched_under_adamw(dtype: torch.dtype) -> None:
    parts = Parts(
        transforms=(Clip(), Protect()), optimizer=FAST, trust_region=TrustRegion(None, None)
    )
    training = Training(steps=20, batch_size=3, evaluate_every=1)
    kept: list[Checkpoint] = []
    made = small(dtype=dtype)
    train(made, training, parts=parts, dev=(), keep=kept.append)
    direction = Protect().init({"span": made.start}, no_setup({"span": made.start}))["span"]
    moves = [checkpoint.theta["span"] for checkpoint in kept]
    assert abs((moves[-1] * direction).sum()) < 1e-6 * moves[-1].norm()
    if dtype is torch.float64:
        for old, new in itertools.pairwise(moves):
            assert abs(((new - old) * direction).sum()) < 1e-6 * (new - old).norm()
    # Without it a good part of the way lies along this direction.
    free = dataclasses.replace(parts, transforms=(Clip(),))
    bare = train(made, training, parts=free, dev=()).checkpoint.theta["span"]
    assert abs((bare * direction).sum()) > 1e-3 * bare.norm()


def test_a_transform_gets_the_step_its_batch_and_its_outcome() -> None:
    seen: list[Context] = []

    @dataclasses.dataclass(frozen=True)
    class Watching(Average):
        def before(
            self, gradients: Gradients, state: State, context: Context
        ) -> tuple[Gradients, State]:
            seen.append(context)
            return super().before(gradients, state, context)

    training = Training(steps=3, batch_size=4, accumulate=2)
    train(small(), training, parts=Parts(transforms=(Watching(),)), dev=())
    assert [(context.step, context.total) for context in seen] == [(0, 3), (1, 3), (2, 3)]
    for context in seen:
        assert len(context.batch) == len(context.losses_B) == len(context.outcome.gold_B) == 4
        expected = CrossEntropy().losses(context.outcome)
        assert torch.allclose(expected, context.losses_B)
        assert not context.losses_B.requires_grad
        assert not context.outcome.logprobs_BC.requires_grad


def test_the_trust_region_comes_after_every_transform() -> None:
    region = TrustRegion(0.05)
    parts = Parts(transforms=(Throw(),), optimizer=SGD(), trust_region=region)
    refined = train(small(), parts=parts, dev=())
    assert region.holds(refined.prompt.rows, refined.prompt.start_rows)
    assert refined.prompt.drift.min().item() > 0.04
    assert refined.checkpoint.transforms == [{"calls": torch.tensor(6.0)}]


# -- the loss is a pure function -------------------------------------------------------------------


def test_the_loss_is_differentiable_twice_also_in_weights_of_examples() -> None:
    """d/dw of <d sum_b w_b loss_b / d theta, v>: what a hypergradient is made of."""
    made = kit(rows=4, tie=False)
    loss = Loss(made.model, Parts(), made.sequencer.target, {"span": made.start})
    theta = {"span": torch.zeros_like(made.start, requires_grad=True)}
    weights = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights.requires_grad_(True)
    direction = noisy(made.start) - made.start
    total = (loss(theta, made.sequences) * weights).sum()
    (gradient,) = torch.autograd.grad(total, list(theta.values()), create_graph=True)
    mixed, curvature = torch.autograd.grad((gradient * direction).sum(), [weights, theta["span"]])
    step = 1e-4
    there, back = (
        loss({"span": theta["span"].detach() + sign * step * direction}, made.sequences)
        for sign in (1, -1)
    )
    assert torch.allclose((there - back) / (2 * step), mixed, rtol=1e-5, atol=1e-9)
    assert curvature.norm().item() > 0
    again = loss(theta, made.sequences)
    assert torch.equal(again, loss(theta, made.sequences))


# -- named prompts, and another kind of model ------------------------------------------------------


@pytest.mark.parametrize("parts", [Parts(), Parts(parameterization=LowRank())])
@pytest.mark.parametrize("region", [TrustRegion(0.3), TrustRegion(0.2, 0.99)])
def test_a_model_with_rows_of_its_own_in_every_layer_is_trained(
    parts: Parts, region: TrustRegion
) -> None:
    made = small(rows=24)
    toy = DeepToy(made.loaded.model.config.vocab_size)
    start = toy.start(rows=4)
    assert start["layers"].shape == (3, 4, 8)
    parts = dataclasses.replace(
        parts,
        trust_region=region,
        optimizer=AdamW(learning_rate=0.1),
        objective=OrderedAverage(),
        schedule=Schedule(shape="constant"),
    )
    made = dataclasses.replace(made, model=toy)
    training = Training(steps=40, batch_size=8, metric="log_loss", accumulate=2)
    refined = train(made, training, dev=made.sequences[:8], parts=parts, start=start)
    first, *_, last = refined.checkpoint.history
    assert last["log_loss"] < 0.9 * first["log_loss"]
    layers = refined.best.prompt["layers"]
    assert layers.shape == refined.prompt.rows.shape == (3, 4, 8)
    assert region.holds(layers.flatten(0, 1), start["layers"].flatten(0, 1))
    # Every layer's rows moved, each by itself.
    moves = (layers - start["layers"]).norm(dim=-1)
    assert moves.min().item() > 1e-3
    resumed = train(
        made,
        training,
        dev=made.sequences[:8],
        parts=parts,
        start=start,
        checkpoint=halfway(made, training, parts, start),
    )
    assert torch.equal(resumed.best.prompt["layers"], layers)


def halfway(made: Kit, training: Training, parts: Parts, start: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint of a run that was asked to stop after a few steps."""
    asked = iter(range(100))
    stopped = train(
        made,
        training,
        dev=made.sequences[:8],
        parts=parts,
        start=start,
        should_stop=lambda: next(asked) == 6,
    )
    assert (stopped.ended, stopped.steps) == ("stopped", 7)
    return stopped.checkpoint


def test_trained_numbers_may_be_fewer_than_the_rows() -> None:
    made = small()
    refined = train(made, parts=Parts(parameterization=ScaleShift(), optimizer=FAST), dev=())
    trained = sum(value.numel() for value in refined.checkpoint.theta.values())
    assert trained == 2 * made.start.shape[1] < refined.prompt.rows.numel()


# -- asked to stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_stopped_run_resumes_to_the_same_bits(step: int) -> None:
    training = dataclasses.replace(QUICK, evaluate_every=2)
    whole, asked, kept = train(small(), training), iter(range(1, 100)), list[Checkpoint]()
    stopped = train(small(), training, keep=kept.append, should_stop=lambda: next(asked) == step)
    assert (stopped.ended, stopped.steps, kept[-1].step) == ("stopped", step, step)
    assert stopped.checkpoint is kept[-1]
    best = {score["step"] for score in whole.checkpoint.history if score["step"] <= step}
    assert {score["step"] for score in stopped.checkpoint.history} == best
    resumed = train(small(), training, checkpoint=stopped.checkpoint)
    assert (resumed.ended, resumed.steps) == ("finished", 6)
    assert resumed.checkpoint.history == whole.checkpoint.history
    assert torch.equal(resumed.prompt.rows, whole.prompt.rows)
    assert torch.equal(resumed.checkpoint.theta["span"], whole.checkpoint.theta["span"])


def test_a_run_that_is_asked_at_its_last_step_has_finished() -> None:
    refined: Refinement = train(small(), Training(steps=1), should_stop=lambda: True)
    assert (refined.ended, refined.steps) == ("finished", 1)


class Changed(Objective):
    """Cross-entropy times a factor, reduced by what the model says of the batch."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def needs_choices(self, *, available: bool) -> bool:
        return available

    def losses(self, outcome: Outcome) -> Tensor:
        return CrossEntropy().losses(outcome) * self.factor

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return (losses_B * torch.softmax(outcome.answer_logprobs_B, dim=0)).sum()


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_a_reduction_that_reads_the_outcome_has_one_gradient(accumulate: int) -> None:
    made = kit(rows=6)
    start = {"span": made.start}
    loss = Loss(made.model, Parts(objective=Changed()), made.sequencer.target, start)
    theta = {"span": torch.zeros_like(made.start).requires_grad_(True)}
    whole, parts = (loss.gradient(theta, made.sequences, n) for n in (1, accumulate))
    assert whole.loss == pytest.approx(parts.loss, abs=1e-10)
    assert whole.gradients["span"].norm().item() > 1e-3
    assert torch.allclose(whole.gradients["span"], parts.gradients["span"], atol=1e-10)


def test_a_resumed_run_that_diverges_at_once_keeps_what_it_had_learned() -> None:
    made, kept = small(), list[Checkpoint]()
    train(made, dev=(), keep=kept.append)
    longer = dataclasses.replace(QUICK, steps=9)
    broken = Parts(objective=Changed(float("nan")), optimizer=AdamW(learning_rate=0.1))
    with pytest.raises(DivergenceError) as raised:
        train(made, longer, dev=(), checkpoint=kept[-1], parts=broken)
    assert raised.value.refinement is not None
    rescued = raised.value.refinement.prompt
    assert distances(rescued.rows, rescued.start_rows)["drift_max"] > 0.01
