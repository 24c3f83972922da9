"""Context transforms: projection, metric and pull, as defined."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import Free, LowRank
from embedgrad.parts.registry import build_parts
from embedgrad.parts.transforms import (
    Clip,
    ContextProjection,
    ContextPull,
    EmbeddingMetric,
    Setup,
    Transform,
)
from embedgrad.parts.transforms.context import RowMap, train_tokens
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Training
from kit import Kit
from kit_loop import small, train
from kit_vision import vision_kit
from refusals import refused
from seam_parts import no_context

OPEN = TrustRegion(None, None)
MAPS = [
    ContextProjection(),
    ContextProjection(rank=2, blend=1.0),
    EmbeddingMetric(),
    EmbeddingMetric(tokens="train", eps=0.0),
]


def setup_of(made: Kit) -> Setup:
    rows = made.sequences[:8]
    return Setup({"span": made.start}, rows, made.sequencer.vocabulary, made.model.embed)


def mapped(part: RowMap, made: Kit, rows: Tensor) -> Tensor:
    state = part.init({"span": torch.zeros_like(made.start)}, setup_of(made))
    return part.before({"span": rows}, state, no_context())[0]["span"]


def some_rows(made: Kit, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(made.start.shape, generator=generator, dtype=torch.float64)


def test_a_projection_of_full_rank_is_the_identity() -> None:
    made = small(dtype=torch.float64)
    rows = some_rows(made)
    whole = mapped(ContextProjection(rank=made.start.shape[1], blend=1.0), made, rows)
    assert (whole - rows).abs().max() < 1e-12
    assert (mapped(ContextProjection(rank=2, blend=1.0), made, rows) - rows).abs().max() > 0.1


def test_a_projection_takes_as_few_components_as_the_energy_needs() -> None:
    made = small(dtype=torch.float64)
    counts = train_tokens(setup_of(made))
    tokens = [token for token, n in counts.items() for _ in range(n)]
    features_TD = made.model.embed(tokens)
    lengths = torch.linalg.svdvals(features_TD - features_TD.mean(dim=0)).pow(2)
    shares = lengths.cumsum(0) / lengths.sum()
    for energy in (0.3, 0.95):
        theta = {"span": torch.zeros_like(made.start)}
        components = ContextProjection(energy=energy).init(theta, setup_of(made))["components"]
        rank = len(components)
        assert shares[rank - 1] >= energy > (shares[rank - 2] if rank > 1 else 0.0)
        assert torch.allclose(components @ components.T, torch.eye(rank).double(), atol=1e-10)


@pytest.mark.parametrize("part", MAPS)
def test_what_a_map_makes_of_a_gradient_is_still_a_descent(part: RowMap) -> None:
    made = small(dtype=torch.float64)
    for seed in range(20):
        rows = some_rows(made, seed)
        assert (rows * mapped(part, made, rows)).sum() >= 0
    every = torch.eye(made.start.shape[1], dtype=torch.float64)
    matrix = mapped(part, made, every)
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_the_metric_is_the_covariance_of_the_vocabulary_with_mean_eigenvalue_one() -> None:
    made = small(dtype=torch.float64)
    table_VD = made.model.embed(range(made.sequencer.vocabulary))
    covariance = torch.cov(table_VD.T, correction=0)
    expected = covariance / covariance.diagonal().mean() + 1e-3 * torch.eye(len(covariance))
    assert torch.allclose(
        mapped(EmbeddingMetric(), made, torch.eye(len(covariance)).double()), expected
    )


@pytest.mark.parametrize("strength", [0.2, 0.9, -0.2])  # -: the sign as printed
def test_the_pull_comes_closer_in_every_step_and_the_printed_sign_runs_away(
    strength: float,
) -> None:
    made = small(dtype=torch.float64)
    setup, rate = setup_of(made), len(made.start) / 2
    tokens = train_tokens(setup).elements()
    context_D = made.model.embed(list(tokens)).mean(dim=0)
    pull = ContextPull(strength=strength)
    theta = {"span": torch.zeros_like(made.start)}
    state, context = pull.init(theta, setup), dataclasses.replace(no_context(), learning_rate=rate)
    sizes = made.start.pow(2).mean(dim=1, keepdim=True).sqrt()
    distances = [(context_D - made.start.mean(dim=0)).norm()]
    for _ in range(4):
        theta, state = pull.after(theta, theta, state, context)
        distances.append((context_D - (made.start + sizes * theta["span"]).mean(dim=0)).norm())
    ratios = [float(b / a) for a, b in itertools.pairwise(distances)]
    assert ratios == pytest.approx([1 - strength] * 4)


def test_the_printed_sign_is_refused_in_one_line() -> None:
    problems: list[str] = []
    build_parts("transforms", [{"name": "context_pull", "sign": "paper"}], problems)
    (line,) = problems
    assert "transforms" in line
    assert "take sign = 'minus'" in line
    assert line.isprintable()


@pytest.mark.parametrize("part", [ContextProjection(), EmbeddingMetric(), ContextPull(strength=1)])
def test_a_context_transform_needs_rows(part: Transform) -> None:
    parts = Parts(parameterization=LowRank(rank=2), transforms=(part,))
    with refused("transforms", "take parameterization = 'free'", error=RecipeError):
        train(small(), parts=parts, dev=())


def test_training_rows_without_text_have_no_context() -> None:
    made = small()
    setup = dataclasses.replace(setup_of(made), train=[])
    with refused("have no text", error=RecipeError):
        ContextProjection().init({"span": made.start}, setup)


@pytest.mark.parametrize("part", [ContextProjection(blend=0.0), ContextPull()])
def test_a_part_that_does_nothing_changes_nothing_to_the_bit(part: Transform) -> None:
    plain, with_part = (
        train(small(), parts=Parts(transforms=transforms), dev=()).prompt.rows
        for transforms in ((Clip(),), (Clip(), part))
    )
    assert torch.equal(plain, with_part)


@pytest.mark.parametrize("of", ["gradient", "step"])
def test_steps_stay_in_the_span_if_steps_are_projected(of: str) -> None:
    made = small()
    part = ContextProjection(rank=3, blend=1.0, of=of)  # type: ignore[arg-type]
    parts = Parts(transforms=(Clip(), part), optimizer=AdamW(weight_decay=0.1), trust_region=OPEN)
    moved = train(made, Training(steps=20), parts=parts, dev=()).checkpoint.theta["span"]
    components = part.init({"span": made.start}, setup_of(made))["components"]
    outside = (moved - (moved @ components.T) @ components).norm() / moved.norm()
    assert outside < 1e-5 if of == "step" else outside > 0.1


@pytest.mark.parametrize(
    "part", [ContextProjection(), EmbeddingMetric(of="step"), ContextPull(strength=0.5)]
)
def test_a_context_transform_trains_another_prompt_and_resumes_to_the_bit(part: Transform) -> None:
    made, kept = small(), list[Checkpoint]()
    parts = Parts(transforms=(Clip(), part))
    training = Training(steps=6, batch_size=3, evaluate_every=2)
    whole = train(made, training, parts=parts, dev=(), keep=kept.append)
    again = train(made, training, parts=parts, dev=(), checkpoint=kept[1])
    assert torch.equal(whole.prompt.rows, again.prompt.rows)
    plain = train(made, training, parts=Parts(), dev=())
    assert not torch.equal(whole.prompt.rows, plain.prompt.rows)


@pytest.mark.parametrize("part", [*MAPS, ContextPull(strength=1.0)])
def test_rows_that_are_no_embeddings_of_words_are_refused(part: Transform) -> None:
    made = small()
    deep = Parts(transforms=(part,), parameterization=Free(deep=True))
    with refused("leave it or parameterization.deep out", error=RecipeError):
        train(made, parts=deep)
    images = vision_kit(6)
    with refused("and images have none; leave it out", error=RecipeError):
        optimize(
            *(images.model, images.sequencer, images.sequences),
            parts=Parts(transforms=(part,)),
            start=images.start,
        )
