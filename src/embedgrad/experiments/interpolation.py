"""Interpolation: scores between text and refined prompt, and beyond."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, final

from embedgrad.data.examples import Example
from embedgrad.data.markup import literal
from embedgrad.errors import DataError, EmbedgradError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, summarize
from embedgrad.events import Report, part_of, quiet, stage
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.template import Message, Template
from embedgrad.recipe.open_run import OpenRun, open_run
from embedgrad.report.page.run_files import interpolation_inputs

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PROMPT = "<prompt>"  # the place of the rows in a question
QUESTIONS = (
    f'A note says: "{PROMPT}" In one sentence, what does the note ask for?',
    f'Repeat the words between the quotes, and nothing else: "{PROMPT}"',
)
LONGEST_REPLY = 60  # tokens


@final
class Point(TypedDict):
    """Scores at the place `t`."""

    t: float
    accuracy: float
    interval: list[float]
    log_loss: float


InterpolationResult = TypedDict(
    "InterpolationResult",
    {
        "from": dict[str, Any],
        "split": str,
        "rows": int,
        "points": list[Point],
        "replies": list[dict[str, Any]],
    },
)


def interpolate(
    folder: str | Path, rows: int, overrides: Sequence[str] = (), report: Report = quiet
) -> InterpolationResult:
    """Score a finished run's interpolation on `rows` dev rows, and ask the model about the prompt.

    Returns the content of `interpolation.json`. Without dev rows it uses test rows, or else
    training rows. Raises what `open_run` raises, and `DataError` if there are no rows.
    """
    folder = Path(folder)
    run = open_run(folder, overrides, report)
    splits = run.read_data()
    split = next((name for name in ("dev", "test", "train") if getattr(splits, name)), "dev")
    sequences = run.sequencer.build(getattr(splits, split)[:rows])
    stage(report, "interpolating")
    points = score_points(run, sequences, report)
    stage(report, "asking the model")
    return {
        "from": interpolation_inputs(folder, rows, overrides)["from"],
        "split": split,
        "rows": len(sequences),
        "points": points,
        "replies": ask_about_prompt(run),
    }


def score_points(
    run: OpenRun, sequences: Sequence[TokenSequence], report: Report = quiet
) -> list[Point]:
    """Scores at each of `PLACES`: 0 is the text prompt, 1 the refined one.

    Raises `DataError` if there are no rows.
    """
    if not sequences:
        raise DataError("the interpolation: no rows to score; give at least one example")
    evaluator, points = run.evaluator.greedy, []
    prefixes = [sequence.prefix for sequence in sequences]
    run.model.prefix_cache.expect((prefixes, len(PLACES) * evaluator.lookups))
    for i, place in enumerate(PLACES):
        before, total = i * len(sequences), len(PLACES) * len(sequences)
        own = part_of(report, "the interpolation", before, total)
        answers = evaluator.score(run.prompt.rows_at(place), sequences, own)
        summary = summarize(answers, evaluator.target.choices)
        interval, loss = list(summary.interval), summary.log_loss
        points.append(Point(t=place, accuracy=summary.accuracy, interval=interval, log_loss=loss))
    return points


def ask_about_prompt(run: OpenRun) -> list[dict[str, Any]]:
    """The model's replies to each of `QUESTIONS`, with the text rows and with the refined rows.

    A question that does not fit the model's chat template is left out.
    """
    answers = []
    for question in QUESTIONS:
        try:
            sequence, evaluator = _question(run, question)
            replies = {}
            for name, rows in (("text", run.prompt.start_rows), ("refined", run.prompt.rows)):
                reply = evaluator.score(rows, [sequence])[0]
                replies[name] = {"reply": reply.predicted.strip(), "cut": reply.cut}
        except EmbedgradError:
            continue
        answers.append({"question": question.replace(PROMPT, "..."), **replies})
    return answers


def _question(run: OpenRun, question: str) -> tuple[TokenSequence, Evaluator]:
    """The question in tokens around a place for rows, and an evaluator to decode the reply."""
    span, template = run.prompt.span, run.prompt.template
    before, after = (literal(part) for part in question.split(PROMPT))
    left, right = literal(span.drawn_left), literal(span.drawn_right)
    text = f"{before}{left}[[{literal(template.span)}]]{right}{after}"
    if template.text is None:
        asking = Template(messages=(Message("user", text),), options=template.options)
    else:
        asking = Template.plain(f"{text}\n\nAnswer:")
    sequencer = run.model.sequencer(asking, Target(), spans=(span,), date=run.prompt.date)
    evaluator = Evaluator(run.model, sequencer, Evaluation(max_new_tokens=LONGEST_REPLY))
    return sequencer(Example({}, "", "the question")), evaluator
