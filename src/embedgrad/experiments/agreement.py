"""Compare a refined prompt with its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TypedDict, cast, final

from torch import Tensor

from embedgrad.evaluation.evaluator import Comparison, summarize
from embedgrad.evaluation.noninferiority import non_inferiority
from embedgrad.evaluation.plain_scores import Scores
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.teacher import Teacher


@final
class Agreement(TypedDict):
    """How a refined prompt and its text compare with the teacher on the test rows.

    `tokens` are the means per query before the answer, of the teacher's prompt, the refined one,
    and what is saved. `agreement` is the share of rows with the teacher's answer, `divergence` the
    mean KL(teacher || prompt) on these. `scores` are the teacher's own.
    """

    tokens: dict[str, float]
    agreement: dict[str, float]
    divergence: dict[str, float]
    scores: Scores
    non_inferiority: dict[str, float | str | bool]


def agree(
    teacher: Teacher,
    prompt: PromptEmbedding,
    test: Sequence[TokenSequence],
    comparison: Comparison,
) -> Agreement:
    """Let the teacher answer the test rows, and compare."""
    answers = teacher.score([sequence.example for sequence in test])
    both = {"text": comparison.text_answers, "refined": comparison.refined_answers}
    said = [answer.predicted.strip() for answer in answers]
    agreement = {
        name: sum(a.predicted.strip() == b for a, b in zip(own, said, strict=True)) / len(said)
        for name, own in both.items()
    }
    own = [
        teacher.student(replace(sequence.example, answer=answer.predicted, solution=None))
        for sequence, answer in zip(test, answers, strict=True)
    ]
    taught = teacher.teach(own)
    rows: dict[str, Tensor] = {"text": prompt.start_rows, "refined": prompt.rows}
    long = sum(teacher.context(s).length(len(teacher.rows_PD)) for s in test) / len(test)
    short = sum(s.length(len(prompt.rows)) for s in test) / len(test)
    pairs = zip(comparison.refined_answers, answers, strict=True)
    judged = non_inferiority([a.correct - b.correct for a, b in pairs], teacher.teaching.margin)
    return {
        "tokens": {"teacher": long, "refined": short, "saved": long - short},
        "agreement": agreement,
        "divergence": {
            name: teacher.divergence(rows_PD.to(teacher.rows_PD), taught)
            for name, rows_PD in rows.items()
        },
        "scores": cast(Scores, asdict(summarize(answers, teacher.student.target.choices))),
        "non_inferiority": asdict(judged),
    }
