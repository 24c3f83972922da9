"""Verdict on each method: improved, worse, or no reliable gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from embedgrad.evaluation.significance import holm, paired_test

LEVEL = 0.05  # the Holm-adjusted p-value below which a difference counts
Words = Literal["improved", "worse", "no reliable gain"]


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """The mean difference to the text prompt, how likely chance makes it, and the word for it."""

    difference: float
    p_value: float
    p_holm: float
    words: Words


def verdicts(
    text: Sequence[float], methods: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Verdict]:
    """Judge every method of a table.

    `text[i]` is 1 where the text prompt is right about row i, else 0; `methods[name][s][i]` is the
    same for a method's run with its seed s; graded scores lie between. The rows'
    mean differences are tested by `paired_test`: those of one run by McNemar's exact test, of
    several by flipping signs. Holm corrects over all methods given.
    """
    tested = {}
    for name, runs in methods.items():
        differences = row_differences(text, runs)
        tested[name] = sum(differences) / len(differences), paired_test(differences)[1]
    adjusted = holm([p_value for _, p_value in tested.values()])
    return {
        name: Verdict(difference, p_value, p_holm, word(difference, p_holm))
        for (name, (difference, p_value)), p_holm in zip(tested.items(), adjusted, strict=True)
    }


def row_differences(text: Sequence[float], runs: Sequence[Sequence[float]]) -> list[float]:
    """A method's mean score over its runs minus the text prompt's, row by row."""
    return [sum(scores) / len(runs) - before for before, *scores in zip(text, *runs, strict=True)]


def word(difference: float, p_holm: float) -> Words:
    """The verdict on a difference with an adjusted p-value."""
    if p_holm >= LEVEL:
        return "no reliable gain"
    return "improved" if difference > 0 else "worse"
