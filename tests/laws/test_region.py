"""Laws of the rows: start at the text, stay in the region; and of the parts that move them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.optimizers import OPTIMIZERS, Schedule
from embedgrad.parts.parameterizations import (
    PARAMETERIZATIONS,
    Parameterization,
    Theta,
    all_rows,
)
from embedgrad.parts.registry import build
from embedgrad.parts.transforms import TRANSFORMS, Clip, ContextPull, Transform
from embedgrad.prompt.trust_region import TrustRegion, cosine_P, drift_P, shrink_into
from kit import noisy
from seam_parts import no_context, no_setup

RADII = st.floats(0.0, 3.0) | st.floats(-7.0, -1.0).map(lambda power: 10.0**power)
COSINES = st.floats(0.0, 1.0)
SIZES = st.floats(0.0, 20.0)
SEEDS = st.integers(0, 2**20)
SCALES = st.sampled_from([1e-4, 0.02, 1.0, 300.0])


def random_rows(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows [4, 8] whose norms differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    return (rows * torch.tensor([[0.1], [1.0], [3.0], [7.0]]) * scale).to(dtype)


def moved(start: Tensor, seed: int, size: float) -> Tensor:
    """Rows in random directions, each at its own share of `size` norms away."""
    shares = torch.tensor([[0.0], [0.3], [1.0], [1.0]], dtype=start.dtype)
    return start + (noisy(start, 1.0, seed=seed) - start) * size * shares


# ----------------------------------------------------------------------------------- trust region


@given(RADII, COSINES, SEEDS, SIZES, SCALES)
def test_projected_rows_are_inside(
    radius: float, floor: float, seed: int, size: float, scale: float
) -> None:
    start = random_rows(seed, scale)
    rows = moved(start, seed + 1, size)
    for region in (
        TrustRegion(radius, None),
        TrustRegion(None, floor),
        TrustRegion(radius, floor),
    ):
        inside = region.project(rows, start)
        assert torch.isfinite(inside).all()
        assert region.holds(inside, start)
        if region.radius is not None:
            assert drift_P(inside, start).max().item() <= radius * (1 + 1e-5) + 1e-6
        if region.min_cosine is not None:
            assert cosine_P(inside, start).min().item() >= floor - 1e-5


@given(RADII, COSINES, SEEDS, SIZES)
def test_rows_inside_are_left_as_they_are(
    radius: float, floor: float, seed: int, size: float
) -> None:
    start = random_rows(seed)
    rows = moved(start, seed + 1, size)
    region = TrustRegion(radius, floor)
    drift, cosine = drift_P(rows, start), cosine_P(rows, start)
    clearly = (drift < radius * (1 - 1e-4)) & (cosine > floor + 1e-4)
    assert torch.equal(region.project(rows, start)[clearly], rows[clearly])
    outside = (drift > radius * (1 + 1e-4) + 1e-6) | (cosine < floor - 1e-4)
    moved_P = (region.project(rows, start) != rows).any(dim=1)
    assert moved_P[outside].all()


@given(RADII, COSINES, SEEDS, SIZES, st.booleans())
def test_projecting_twice_is_projecting_once(
    radius: float, floor: float, seed: int, size: float, cone: bool
) -> None:
    start = random_rows(seed)
    region = TrustRegion(radius, floor if cone else None)
    once = region.project(moved(start, seed + 1, size), start)
    twice = region.project(once, start)
    error = (twice - once).norm(dim=1) / start.norm(dim=1)
    assert error.max().item() < 1e-5


@given(RADII, SEEDS, SIZES)
def test_the_ball_keeps_the_direction(radius: float, seed: int, size: float) -> None:
    start = random_rows(seed, dtype=torch.float64)
    rows = moved(start, seed + 1, size)
    inside = TrustRegion(radius).project(rows, start)
    expected = torch.minimum(drift_P(rows, start), torch.tensor(radius, dtype=torch.float64))
    assert torch.allclose(drift_P(inside, start), expected, atol=1e-5)
    if radius > 1e-3:
        far = drift_P(rows, start) > 1e-3
        aligned = cosine_P(inside - start, rows - start)[far]
        assert torch.allclose(aligned, torch.ones_like(aligned), atol=1e-9)


@given(COSINES, SEEDS, SIZES)
def test_the_cone_gives_the_nearest_rows(floor: float, seed: int, size: float) -> None:
    start = random_rows(seed, dtype=torch.float64)
    rows = moved(start, seed + 1, size)
    inside = TrustRegion(None, floor).project(rows, start)
    distance = (rows - inside).norm(dim=1)
    # No row of the cone near the found one is nearer.
    for other in range(20):
        candidate = noisy(inside, 0.01, seed=other)
        legal = cosine_P(candidate, start) >= floor + 1e-6
        nearer = (rows - candidate).norm(dim=1) < distance - 1e-5 * rows.norm(dim=1)
        assert not bool((legal & nearer).any())


@given(RADII, COSINES, SEEDS, SIZES, SCALES, st.floats(0.5, 2.0))
def test_a_map_is_shrunk_by_one_number_until_its_rows_are_inside(
    radius: float, floor: float, seed: int, size: float, scale: float, power: float
) -> None:
    start = random_rows(seed, scale, torch.float64)
    rows = moved(start, seed + 1, size)

    def rows_at(t: float) -> Tensor:
        return start + t**power * (rows - start)

    for region in (TrustRegion(radius, None), TrustRegion(None, floor), TrustRegion(radius, floor)):
        t = shrink_into(region, start, rows_at)
        assert region.holds(rows_at(t), start)
        if t < 1:
            farther = rows_at(t + 2**-23)
            far = region.radius is not None and drift_P(farther, start).max() > radius
            turned = region.min_cosine is not None and cosine_P(farther, start).min() < floor
            assert far or turned


@given(RADII, COSINES, SEEDS, SIZES, SCALES)
def test_a_way_that_turns_ends_inside_too(
    radius: float, floor: float, seed: int, size: float, scale: float
) -> None:
    start = random_rows(seed, scale)
    start[2] = 0.0  # which has no direction, and in a ball no way to go
    one, other = (moved(start, seed + n, size) - start for n in (1, 2))
    region = TrustRegion(radius, floor)

    def rows_at(t: float) -> Tensor:
        return start + math.sin(7 * t) * one + t * t * other

    assert region.holds(rows_at(shrink_into(region, start, rows_at)), start)


def test_the_largest_step_inside_is_found() -> None:
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    step = torch.tensor([[0.0, 1.0], [0.0, 0.0]])

    def rows_at(t: float) -> Tensor:
        return start + t * step

    assert shrink_into(TrustRegion(0.25), start, rows_at) == pytest.approx(0.25, abs=1e-6)
    cone = TrustRegion(None, math.cos(math.atan(0.5)))
    assert shrink_into(cone, start, rows_at) == pytest.approx(0.5, abs=1e-4)
    both = TrustRegion(0.25, math.cos(math.atan(0.5)))
    assert shrink_into(both, start, rows_at) == pytest.approx(0.25, abs=1e-6)
    assert shrink_into(TrustRegion(1.0), start, rows_at) == 1.0
    assert shrink_into(TrustRegion(None), start, rows_at) == 1.0
    assert shrink_into(TrustRegion(0.25), torch.zeros(2, 2), lambda t: t * step) == 0.0


@given(SEEDS, SIZES)
def test_the_default_radius_keeps_cosines_above_0_95(seed: int, size: float) -> None:
    start = random_rows(seed)
    region = TrustRegion()
    assert region.radius is not None
    assert region.radius <= 0.3
    inside = region.project(moved(start, seed + 1, size), start)
    assert cosine_P(inside, start).min().item() > 0.95


def test_no_region_moves_nothing() -> None:
    start = random_rows(0)
    rows = moved(start, 1, 50.0)
    assert torch.equal(TrustRegion(None, None).project(rows, start), rows)
    assert TrustRegion(None, None).holds(rows, start)
    assert not TrustRegion(0.5).holds(rows, start)
    assert not TrustRegion(None, 0.999).holds(rows, start)


def test_a_row_of_zeros_stays() -> None:
    start = random_rows(0)
    start[1] = 0
    region = TrustRegion(0.3, 0.9)
    inside = region.project(moved(start, 1, 1.0), start)
    assert torch.isfinite(inside).all()
    assert region.holds(region.project(start, start), start)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        (TrustRegion, "radius", -0.1),
        (TrustRegion, "radius", math.nan),
        (TrustRegion, "min_cosine", 1.5),
        (TrustRegion, "min_cosine", -0.5),
        (Evaluation, "batch_size", 0),
        (Evaluation, "max_new_tokens", 0),
    ],
)
def test_a_recipe_cannot_ask_for_what_cannot_be(section: type, option: str, value: float) -> None:
    problems: list[str] = []
    assert build(section, {option: value}, "section", problems) is None
    assert len(problems) == 1
    assert problems[0].startswith(f"section.{option}: ")


def test_rows_that_are_not_finite_are_not_inside() -> None:
    start = random_rows(0)
    rows = start.clone()
    rows[0, 0] = math.nan
    assert not TrustRegion(0.3).holds(rows, start)
    assert not TrustRegion(None, 0.5).holds(rows, start)


# ------------------------------------------------------------------------------ parameterizations


@pytest.fixture(params=sorted(PARAMETERIZATIONS))
def parameterization(request: pytest.FixtureRequest) -> Parameterization:
    return PARAMETERIZATIONS[request.param]()


def prompt_of(scale: float = 1.0) -> dict[str, Tensor]:
    """One span, another, and one with rows of its own in each of two layers."""
    deep = torch.stack([random_rows(2, scale), random_rows(3, scale)])
    return {"span 1": random_rows(0, scale), "span 2": random_rows(1, scale)[:2], "deep": deep}


def noisy_numbers(value: Tensor, size: float) -> Tensor:
    """Numbers with a share `size` of their root mean square as noise, of any shape."""
    return noisy(value.reshape(1, -1), size).view_as(value)


def assert_same(theta: Theta, other: Theta) -> None:
    assert theta.keys() == other.keys()
    assert all(torch.equal(theta[name], other[name]) for name in theta)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_it_starts_at_the_start_rows(parameterization: Parameterization, scale: float) -> None:
    start = prompt_of(scale)
    theta = parameterization.init(start, torch.Generator().manual_seed(0))
    prompt = parameterization.prompt(theta, start)
    assert prompt.keys() == start.keys()
    assert all(torch.equal(prompt[name], start[name]) for name in start)
    assert all(value.dtype == torch.float32 for value in theta.values())
    again = parameterization.init(start, torch.Generator().manual_seed(0))
    assert all(torch.equal(theta[name], again[name]) for name in theta)


def test_every_row_can_be_moved(parameterization: Parameterization) -> None:
    start = prompt_of()
    theta = parameterization.init(start, torch.Generator().manual_seed(0))
    for value in theta.values():
        value.requires_grad_(True)
    rows_ND = all_rows(start)
    for n in range(len(rows_ND)):
        wish = noisy(rows_ND, 1.0, seed=n)[n]
        loss = ((all_rows(parameterization.prompt(theta, start))[n] - wish) ** 2).sum()
        gradients = torch.autograd.grad(loss, list(theta.values()))
        assert sum(g.norm().item() for g in gradients) > 1e-3


@pytest.mark.parametrize(
    "region", [TrustRegion(0.3, 0.96), TrustRegion(0.3), TrustRegion(None, 0.9)]
)
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_a_fitted_theta_is_inside(
    parameterization: Parameterization, scale: float, region: TrustRegion
) -> None:
    start = prompt_of(scale)
    origin = parameterization.init(start, torch.Generator().manual_seed(0))
    assert_same(parameterization.fit(origin, origin, start, region), origin)
    theta = {name: noisy_numbers(value + 1.0, 2.0) for name, value in origin.items()}
    assert not region.holds(all_rows(parameterization.prompt(theta, start)), all_rows(start))
    kept = {name: value.clone() for name, value in theta.items()}
    fitted = parameterization.fit(theta, origin, start, region)
    assert_same(theta, kept)
    assert region.holds(all_rows(parameterization.prompt(fitted, start)), all_rows(start))
    assert {name: value.shape for name, value in fitted.items()} == {
        name: value.shape for name, value in theta.items()
    }
    # The region, and nothing else, holds the rows back.
    moved = drift_P(all_rows(parameterization.prompt(fitted, start)), all_rows(start))
    assert moved.max().item() > 0.2 * (region.radius or 0.3)


# ------------------------------------------------------------------------ transforms and optimizers


@pytest.mark.parametrize(
    "transform",
    [*(TRANSFORMS[name]() for name in sorted(TRANSFORMS)), ContextPull(strength=0.5)],
    ids=repr,
)
@given(seed=SEEDS, scale=SCALES)
def test_a_transform_gives_new_tensors(transform: Transform, seed: int, scale: float) -> None:
    gradients = {"a": random_rows(seed, scale), "b": random_rows(seed + 1, scale)[:1]}
    theta = {"a": random_rows(seed + 2, scale), "b": random_rows(seed + 3, scale)[:1]}
    kept = copy.deepcopy((gradients, theta))
    state = transform.init(theta, no_setup(theta))
    changed, state = transform.before(gradients, state, no_context())
    new, state = transform.after(theta, gradients, state, no_context())
    assert_same(gradients, kept[0])
    assert_same(theta, kept[1])
    for found in (changed, new):
        assert {key: value.shape for key, value in found.items()} == {
            key: value.shape for key, value in theta.items()
        }
        assert all(torch.isfinite(value).all() for value in found.values())
    zero = {key: torch.zeros_like(value) for key, value in theta.items()}
    fresh = transform.init(theta, no_setup(theta))
    assert_same(transform.before(zero, fresh, no_context())[0], zero)


@given(SEEDS, SCALES, st.floats(0.01, 10.0))
def test_clipping_shortens_the_whole_gradient(seed: int, scale: float, most: float) -> None:
    gradients = {"a": random_rows(seed, scale), "b": random_rows(seed + 1, scale)}
    length = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    clipped, _ = Clip(max_norm=most).before(gradients, {}, no_context())
    after = torch.cat([g.flatten() for g in clipped.values()]).norm().item()
    assert after == pytest.approx(min(length, most), rel=1e-4)
    if length < most * 0.999:
        assert_same(clipped, gradients)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_halves_the_way_and_calls_its_closure(name: str) -> None:
    theta = torch.zeros(4, 8, requires_grad=True)
    target = random_rows(0) / random_rows(0).norm() * 2
    optimizer = OPTIMIZERS[name]().build([theta])
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        theta.grad = theta.detach() - target
        return 0.5 * (theta.detach() - target).pow(2).sum().item()

    for step in range(50):
        assert isinstance(optimizer.step(closure), float)
        assert calls == (step + 1) * OPTIMIZERS[name]().gradients
    assert (theta - target).norm().item() < 0.5 * target.norm().item()


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@given(total=st.integers(1, 400), warmup=st.floats(0, 1))
def test_a_schedule_rises_then_falls(shape: str, total: int, warmup: float) -> None:
    schedule = Schedule(warmup=warmup, shape=shape)
    factors = [schedule.factor(step, total) for step in range(total)]
    top = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == pytest.approx(1.0)


def test_schedule_values() -> None:
    cosine = Schedule(warmup=0.2, shape="cosine")
    assert [cosine.factor(step, 10) for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1, 1, 0.5])
    linear = Schedule(warmup=0.0, shape="linear")
    assert [linear.factor(step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert Schedule(warmup=0.0, shape="constant").factor(9, 10) == 1.0
