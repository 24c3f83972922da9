"""Numbers change by decision: short trainings give what `golden/curves.json` holds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from golden.curves import CASES, FILE, this_platform, train

GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
SAME_PLATFORM = GOLDEN["platform"] == this_platform()


def test_every_case_is_recorded() -> None:
    assert set(GOLDEN["curves"]) == set(CASES)
    digests = [curve["rows_sha256"] for curve in GOLDEN["curves"].values()]
    assert len(set(digests)) >= len(digests) - 3, "the settings of the cases make no difference"


@pytest.mark.parametrize("name", CASES)
def test_a_curve_is_the_golden_one(name: str) -> None:
    found, golden = train(**CASES[name]), GOLDEN["curves"][name]
    if SAME_PLATFORM:
        assert found == golden
    else:
        compare(found, golden, name)


def compare(found: Any, golden: Any, place: str) -> None:
    """Equal up to the rounding of another processor; digests are of bits, and not compared."""
    if isinstance(golden, dict):
        assert set(found) == set(golden), place
        for key in set(golden) - {"rows_sha256"}:
            compare(found[key], golden[key], f"{place}, {key}")
    elif isinstance(golden, list):
        assert len(found) == len(golden), place
        for i, (one, other) in enumerate(zip(found, golden, strict=True)):
            compare(one, other, f"{place}, {i}")
    else:
        assert found == pytest.approx(golden, rel=1e-9, abs=1e-9), place


def test_another_number_is_found() -> None:
    golden = GOLDEN["curves"]["architecture llama"]
    wrong = {**golden, "losses": [*golden["losses"][:-1], golden["losses"][-1] + 1e-8]}
    with pytest.raises(AssertionError, match="losses, 5"):
        compare(wrong, golden, "llama")
