"""The registry of parts: kinds that have no parts, or no default."""

from __future__ import annotations

import pytest

from embedgrad.parts.registry import KINDS, build_part
from embedgrad.parts.scorers import Exact
from embedgrad.recipe.catalog import catalog, catalog_text


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ("mask", "augmentations.0.name: unknown demo 'mask'; known: none"),
        ({"share": 0.5}, "augmentations.0: name the part, as in { name = 'NAME' }"),
        (3, "augmentations.0: name the part, as in { name = 'NAME' }"),
    ],
)
def test_a_kind_may_have_no_parts(
    values: object, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "demo", {})
    problems: list[str] = []
    assert build_part("demo", values, "augmentations.0", problems) is None
    assert problems == [problem]
    assert catalog("demo") == {"demo": {"default": None, "parts": {}}}
    assert catalog_text(catalog("demo")) == "[demo]  one of\n  (none in this version)"


def test_a_kind_may_have_parts_and_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "demo", {"exact": Exact})
    problems: list[str] = []
    assert build_part("demo", "exact", "demo", problems) == Exact()
    assert build_part("demo", {"name": "exact", "casefold": False}, "demo", problems) == Exact(
        False
    )
    assert problems == []
    assert "(default)" not in catalog_text(catalog("demo"))
