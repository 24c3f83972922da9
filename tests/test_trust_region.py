"""The trust region in numbers that a pencil gives: what `make mutants` found untested."""

from __future__ import annotations

import pytest
import torch

from embedgrad.prompt.trust_region import (
    TrustRegion,
    cosine_P,
    distances,
    drift_P,
    near,
    store_compact,
)

START = torch.tensor([[3.0, 4.0], [0.0, 0.1]])  # norms 5 and 0.1


@pytest.mark.parametrize(
    ("share", "held"), [(0.0, True), (0.2999, True), (0.3001, False), (0.45, False), (1.2, False)]
)
def test_a_ball_holds_rows_up_to_its_radius(share: float, held: bool) -> None:
    for row in (0, 1):
        rows = START.clone()
        rows[row, 0] += share * START[row].norm()
        assert TrustRegion(0.3).holds(rows, START) is held
        assert TrustRegion(None).holds(rows, START)
        assert drift_P(rows, START)[row].item() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("cosine", "held"), [(1.0, True), (0.91, True), (0.89, False)])
def test_a_cone_holds_rows_down_to_its_cosine(cosine: float, held: bool) -> None:
    start = torch.tensor([[2.0, 0.0]])
    rows = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]])
    assert cosine_P(rows, start).item() == pytest.approx(cosine, abs=1e-6)
    assert TrustRegion(None, 0.9).holds(rows, start) is held


def test_a_row_of_zeros_has_no_direction_to_keep() -> None:
    start = torch.zeros(1, 2)
    assert TrustRegion(None, 0.9).holds(torch.tensor([[1.0, 1.0]]), start)
    assert not TrustRegion(0.3).holds(torch.tensor([[1.0, 1.0]]), start)


def test_a_row_that_points_away_keeps_a_little_of_its_own_norm() -> None:
    inside = TrustRegion(None, 0.9).project(-START, START)
    assert torch.allclose(inside, 0.9e-3 * START, rtol=1e-4)


@pytest.mark.parametrize("row", [[0.5, 2.0], [0.005, 0.02]])
def test_rows_are_projected_to_just_inside_the_cone(row: list[float]) -> None:
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    rows = torch.tensor([row], dtype=torch.float64)
    inside = TrustRegion(None, 0.9).project(rows, start)
    assert 0.9 < cosine_P(inside, start).item() < 0.9 + 1e-5


def test_rows_are_projected_to_just_inside_the_ball() -> None:
    start = START.double()
    inside = TrustRegion(0.3).project(3 * start, start)
    assert ((drift_P(inside, start) > 0.3 * (1 - 1e-5)) & (drift_P(inside, start) < 0.3)).all()


def test_distances_have_the_names_of_events() -> None:
    rows = START + torch.tensor([[0.5, 0.0], [0.0, 0.03]])
    expected = {"drift_mean": 0.2, "drift_max": 0.3}
    found = distances(rows, START)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["cosine_min"] == pytest.approx(cosine_P(rows, START)[0].item())
    assert found["cosine_min"] < 0.999


def test_start_rows_take_16_bits_where_those_are_enough() -> None:
    exact = torch.tensor([[1.5, -2.0]])
    assert store_compact(exact).dtype == torch.bfloat16
    assert torch.equal(store_compact(exact).float(), exact)
    close = torch.tensor([[1.0009, -2.0]])
    assert store_compact(close).dtype == torch.float16
    tiny = torch.tensor([[1e-9, -3e-9]])  # half precision has nothing below 6e-8
    assert torch.equal(store_compact(tiny), tiny)
    assert store_compact(tiny).dtype == torch.float32


def test_near_allows_a_share_of_the_numbers_and_of_their_size() -> None:
    rows = torch.tensor([[3.0, 0.0, 4.0, 0.0]])  # root mean square 2.5
    assert near(rows + torch.tensor([[0.0, 0.024, 0.0, 0.0]]), rows, 0.01)
    assert not near(rows + torch.tensor([[0.0, 0.026, 0.0, 0.0]]), rows, 0.01)
    assert near(rows + torch.tensor([[0.0, 0.0, 0.064, 0.0]]), rows, 0.01)
    assert not near(rows + torch.tensor([[0.0, 0.0, 0.066, 0.0]]), rows, 0.01)


def test_a_row_too_short_for_a_direction_is_inside_a_cone() -> None:
    region, start = TrustRegion(0.1, 0.99), torch.full((2, 4), 1e-20)
    assert region.holds(start, start)
    assert region.holds(region.project(start * 3, start), start)
