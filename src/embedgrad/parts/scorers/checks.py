"""Check that the data's answers can be scored."""

from __future__ import annotations

from collections.abc import Sequence

from embedgrad.data.examples import Example
from embedgrad.errors import DataError
from embedgrad.parts.scorers import Scorer, name_of
from embedgrad.prompt.sequence import Target


def check_answers(examples: Sequence[Example], target: Target, scorer: Scorer) -> None:
    """Refuse free answers that no reply could match: `DataError` names the first three.

    A scorer that cannot work raises `RecipeError` here, before the training.
    """
    if target.choices:
        return
    bad = [example for example in examples if not scorer.usable(example.answer)]
    if bad:
        shown = [f"{e.answer[:60]!r} ({e.source})" for e in bad[1:3]]
        more = f" (of {len(bad)} such rows the next: {', '.join(shown)})" if shown else ""
        raise DataError(
            f"{bad[0].source}: the answer {bad[0].answer[:60]!r} is none that "
            f"evaluation.scorer = {name_of(scorer)!r} can find in a reply{more}; "
            "choose another scorer, or another column in data.answer"
        )
