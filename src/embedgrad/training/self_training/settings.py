"""Settings: solutions, answers or own samples as targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, final

from annotated_types import Ge, Gt, Le

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, RunError
from embedgrad.parts.scorers import Scorer
from embedgrad.prompt.sequence import Target

# Ends of a worked solution; a scorer that finds an answer there accepts worked solutions.
_ENDINGS = ("So the answer is {}.", r"So it is \boxed{{{}}}", "It follows.\n#### {}")
_TRIED = 8  # answers


@final
@dataclass(frozen=True)
class Solutions:
    """What the model is trained to write for free answers."""

    source: Literal["auto", "column", "answer", "self-written"] = "auto"
    """Column: the worked solutions in data.solution; answer: the answer alone; self-written: what
    the frozen model writes with the text prompt, if its answer is right; auto: column if
    data.solution is set, answer where the scorer accepts nothing else, or else self-written."""
    samples: Annotated[int, Gt(0)] = 4
    """Solutions that the model writes per training question."""
    keep: Annotated[int, Gt(0)] = 1
    """How many different right solutions of one question to train on at most."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """Sampling temperature; 0: greedy, which needs solutions.samples = 1."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    """Each token is drawn from the most likely ones that together have this probability."""
    max_new_tokens: Annotated[int, Gt(0)] | None = None
    """Longest solution, in tokens; unset: evaluation.max_new_tokens."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the samples."""
    file: str | None = None
    """A .jsonl file of self-written solutions: used if it fits, written if it is missing. Unset: a
    file in the cache folder, shared by all recipes with the same questions and settings."""


def refuse_inside(solutions: Solutions, out: Path) -> None:
    """Refuse a file in a new output folder, which is removed if the run fails: `RunError`."""
    if solutions.file is not None and out.resolve() in Path(solutions.file).resolve().parents:
        raise RunError(
            f"solutions.file: {solutions.file} lies in the new folder {out}, which is removed "
            "again if the run ends early; name a file elsewhere"
        )


def source_problems(solutions: Solutions, target: Target, *, column: bool) -> list[str]:
    """List settings that contradict each other; `column` says whether data.solution is set."""
    problems = []
    source, choices = solutions.source, bool(target.choices)
    if choices and source in ("column", "self-written"):
        problems.append(
            f"solutions.source: {source!r}, but with target.choices the model learns nothing but "
            "the choices; take target.choices or solutions.source out"
        )
    elif source == "column" and not column:
        problems.append(
            "solutions.source: 'column', but data.solution names none; name the column that holds "
            "the worked solutions"
        )
    greedy = source == "self-written" and not solutions.temperature
    if greedy and solutions.samples > 1:
        problems.append(
            f"solutions.temperature: 0, so that all {solutions.samples} samples would be the same; "
            "set solutions.samples = 1, or a temperature above 0"
        )
    if solutions.file is not None and not solutions.file.strip():
        problems.append("solutions.file: ''; expected a file, or leave the option out")
    return problems


def source_of(
    solutions: Solutions, examples: Sequence[Example], target: Target, scorer: Scorer
) -> str:
    """The source that these settings mean: "column", "answer" or "self-written".

    Raises `DataError` for settings that contradict each other.
    """
    column = bool(examples) and all(example.solution is not None for example in examples)
    if solutions.source == "auto":
        source: Literal["column", "answer", "self-written"] = "answer"
        if not target.choices:
            answers = [example.answer for example in examples[:_TRIED]]
            if column:
                source = "column"
            elif any(scorer.score(e.format(a), a) for a in answers for e in _ENDINGS):
                source = "self-written"
        solutions = replace(solutions, source=source)
    problems = source_problems(solutions, target, column=column)
    if problems:
        raise DataError("; ".join(problems))
    return solutions.source
