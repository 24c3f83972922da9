"""Where tokens of a batch go: trees of targets, and which rows share a pass."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedgrad.data.examples import Example
from embedgrad.model.packing import PASS_COST, PackedBatch, Packing, full_context, group_by_length
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

CPU = torch.device("cpu")


def sequence(suffix: Ids, later: tuple[int, ...] = (), prefix: Ids = ()) -> TokenSequence:
    return TokenSequence(prefix, suffix, (), 0, None, Example({}, "", "test"), later=later)


def batch(suffix: Ids, targets: list[Ids], prompt: int = 2, before: int = 7) -> PackedBatch:
    packing = Packing(prompt, len(targets))
    packing.add(before, sequence(suffix), targets)
    return packing.tensors([0], CPU)


def text_seen(made: PackedBatch, place: int) -> list[int]:
    """Ids that the token at a place sees, itself included, in the order of their positions."""
    seen = made.layout.see(made.layout, None)[0, place].nonzero().flatten().tolist()
    at = made.layout.positions[0]
    return [made.ids_BT[0, k].item() for k in sorted(seen, key=lambda k: at[k].item())]


def test_targets_that_begin_alike_share_their_beginning() -> None:
    targets: list[Ids] = [(5, 6, 7), (5, 6, 8), (5, 9), (4,), (5, 6, 7, 3)]
    made = batch((1, 2), targets)
    # 5; 6 behind it; 7 behind both for the longest. Last tokens are only read off.
    assert made.ids_BT.tolist() == [[0, 0, 1, 2, 5, 6, 7]]
    assert made.layout.positions.tolist() == [[7, 8, 9, 10, 11, 12, 13]]
    read = list(zip(made.places.tolist(), made.tokens.tolist(), made.cells.tolist(), strict=True))
    places = made.keep_BT[0].nonzero().flatten().tolist()
    for cell, target in enumerate(targets):
        mine = [(places[row], token) for row, token, c in read if c == cell]
        assert [token for _, token in mine] == list(target)
        for i, (place, _) in enumerate(mine):
            assert text_seen(made, place) == [0, 0, 1, 2, *target[:i]]


@settings(max_examples=60)
@given(
    targets=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple), min_size=1),
    pad=st.integers(0, 3),
)
def test_every_target_token_is_read_behind_its_own_beginning(targets: list[Ids], pad: int) -> None:
    packing = Packing(0, len(targets))
    packing.add(3, sequence((9,)), targets)
    packing.add(3, sequence((9,) * (30 + pad)), [(1,)])  # the first row is then padded on the left
    made = packing.tensors([0, 1], CPU)
    places = made.keep_BT.nonzero().tolist()
    begun: dict[int, list[int]] = {}
    for row, token, cell in zip(made.places, made.tokens, made.cells, strict=True):
        b, place = places[row]
        if b == 0:
            assert text_seen(made, place) == [9, *begun.get(cell.item(), [])]
            begun.setdefault(cell.item(), []).append(token.item())
    assert [tuple(begun[c]) for c in range(len(targets))] == targets


def test_padding_is_seen_by_nobody() -> None:
    packing = Packing(1, 1)
    packing.add(2, sequence((3,)), [(4, 5)])
    packing.add(2, sequence((3, 3, 3)), [(4, 5)])
    made = packing.tensors([0, 1], CPU)
    assert made.ids_BT.tolist() == [[0, 0, 0, 3, 4], [0, 3, 3, 3, 4]]
    assert not made.layout.see(made.layout, None)[0, :, :2].any()
    assert made.prompt_at.tolist() == [2, 5]


def test_an_answer_may_be_long() -> None:
    made = batch((1,), [tuple(range(1, 5000))])
    assert made.ids_BT.shape == (1, 2 + 1 + 4998)
    assert len(made.tokens) == 4999


def test_rows_of_later_spans_lie_inside_the_suffix() -> None:
    packing = Packing(5, 1)
    packing.add(2, sequence((7, 0, 8, 0, 0), later=(1, 3, 4)), [(4,)])
    packing.add(2, sequence((7, 0, 0, 9, 0, 9), later=(1, 2, 4)), [(4,)])
    made = packing.tensors([0, 1], CPU)
    assert made.ids_BT.tolist() == [[0, 0, 0, 7, 0, 8, 0, 0], [0, 0, 7, 0, 0, 9, 0, 9]]
    assert made.prompt_at.tolist() == [1, 2, 4, 6, 7, 8, 9, 11, 12, 14]
    whole = sequence((7, 0, 8, 0, 0), later=(1, 3, 4), prefix=(5, 6))
    assert full_context(whole, 5) == ((5, 6, 0, 0, 7, 0, 8, 0, 0), [2, 3, 5, 7, 8])
    assert full_context(sequence((7, 8), prefix=(5, 6)), 0) == ((5, 6, 7, 8), [])


def price(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(g) * max(lengths[i] for i in g) + PASS_COST for g in groups)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_no_other_split_is_cheaper(lengths: list[int]) -> None:
    groups = group_by_length(lengths)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    ordered = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cheapest = min(
        price([ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])], lengths)
        for n in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), n)
    )
    assert price(groups, lengths) == cheapest


@pytest.mark.parametrize("rows", [16, 32])
def test_little_is_padding(rows: int) -> None:
    chance = random.Random(0)
    for _ in range(20):
        lengths = [chance.randint(50, 450) for _ in range(rows)]
        computed = sum(len(g) * max(lengths[i] for i in g) for g in group_by_length(lengths))
        assert computed < 1.1 * sum(lengths)


def test_rows_of_one_length_share_a_pass() -> None:
    assert group_by_length([21] * 16) == [list(range(16))]
