"""2,000 changed files a parser (`make fuzz`: 100,000); what once went wrong is in fuzz/found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.parsers import PARSERS, clean_up
from fuzz.run import FOUND, Tally, fuzz, limits, try_case

CASES = 2_000


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    yield
    clean_up()


@pytest.mark.parametrize("name", PARSERS)
def test_every_case_ends_in_a_value_or_an_error_of_ours(name: str) -> None:
    tally = fuzz(name, CASES)
    assert list(tally.wrong) == []
    assert tally.cases > CASES
    assert tally.values > CASES / 50
    # A page leaves out what is damaged, and says so.
    assert sum(tally.errors.values()) > CASES / 50 or name == "run"


@pytest.mark.parametrize("case", sorted(FOUND.glob("*/*")), ids=lambda path: path.name)
def test_what_once_went_wrong_ends_well(case: Path, tmp_path: Path) -> None:
    files = {p.relative_to(case).as_posix(): p.read_bytes() for p in case.rglob("*") if p.is_file()}
    with limits():
        assert try_case(PARSERS[case.parent.name], files, tmp_path, Tally()) is None
