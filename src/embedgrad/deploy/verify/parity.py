"""Compare an export with training, row by row.

step zero      the unrefined rows give what the plain tokens give in that engine
log-probs      the refined rows give training's log-probabilities of the next token
added mass     new tokens are never likely
agreement      greedy texts, or choices, are training's; replies that a server limits to the choices
               are only compared: they are chosen token by token, not by their whole probability
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast, final

import torch
from torch import Tensor

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.runs import ROWS
from embedgrad.deploy.verify.engine import (
    CHECK_ENGINES,
    Engine,
    Query,
    open_engine,
)
from embedgrad.deploy.verify.reference import Reference, compute_reference, next_logprobs
from embedgrad.environment import versions
from embedgrad.errors import EmbedgradError
from embedgrad.events import Report, part_of, scoring, stage
from embedgrad.model.decoding import before_end
from embedgrad.prompt.sequence import TokenSequence

GREEDY_TOKENS = 64
STEP_ZERO = 1e-5  # beyond the added mass
ADDED_MASS = 1e-4
AGREEING = 0.75  # least share of rows where weights are exact; a near tie may go either way
# Where weights are not exact, the limits are multiples of the engine's own rounding on plain text,
# by the largest and by the mean difference, plus a little. The mean varies less by chance.
TIMES_LARGEST, LEAST_LARGEST = 2.0, 1e-2
TIMES_MEAN, LEAST_MEAN = 1.5, 1e-3
IMPOSSIBLE = -80.0  # log-probabilities below this count as equal
_LARGEST_IS_WORST = (
    *("step_zero_difference", "added_mass", "max_logprob_difference"),
    *("mean_logprob_difference", "tolerance", "rounding"),
)
_LEAST_IS_WORST = ("greedy_agreement", "choice_agreement", "limited_agreement", "rows")


@final
class CheckResult(TypedDict):
    """The content of `verify.json`; each figure is that of the worst prompt."""

    destination: str
    engine: str
    passed: bool
    problems: list[str]
    rows: int
    step_zero_difference: float
    added_mass: float
    max_logprob_difference: float
    mean_logprob_difference: float
    tolerance: float | None
    rounding: float | None
    greedy_agreement: float | None
    choice_agreement: float | None
    limited_agreement: float | None
    prompts: dict[str, dict[str, Any]]
    versions: dict[str, str]


def check(destination: str, folder: Path, job: Job, written: Mapping[str, Any]) -> CheckResult:
    """Compare every prompt of an export with the training path; returns what `verify.json` holds.

    Figures for the whole export are those of its worst prompt. Raises `EngineError`.
    """
    prompts = {e.name: _check_prompt(destination, folder, job, e, written) for e in job.prompts}
    engine = CHECK_ENGINES[destination].description
    report: dict[str, Any] = {"destination": destination, "engine": engine}
    for name in (*_LARGEST_IS_WORST, *_LEAST_IS_WORST):
        values = [p[name] for p in prompts.values() if p[name] is not None]
        worst = max if name in _LARGEST_IS_WORST else min
        report[name] = worst(values, default=None)
    report["passed"] = not any(p["problems"] for p in prompts.values())
    report["problems"] = [
        f"{name}: {problem}" if len(prompts) > 1 else problem
        for name, p in prompts.items()
        for problem in p["problems"]
    ]
    report["prompts"] = prompts
    report["versions"] = versions(*filter(None, [CHECK_ENGINES[destination].package]))
    return cast(CheckResult, report)


@final
class _Watched(list[Query]):
    """The queries; `report` gets how far an engine is whenever it goes through them."""

    def __init__(self, queries: Iterable[Query], report: Report, which: str):
        super().__init__(queries)
        self._report, self._which = report, which

    def __iter__(self) -> Iterator[Query]:
        for done, query in enumerate(super().__iter__(), 1):
            yield query
            self._report(scoring(self._which, done, len(self)))


def _check_prompt(
    destination: str, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
) -> dict[str, Any]:
    rows = exported.sequences
    default = exported is job.prompts[0]
    queries = [Query(row, _messages(exported, row, default)) for row in rows]
    stage(job.report, f"checking {exported.name}: what training computes")
    training = part_of(job.report, f"{exported.name} in training", 0, len(rows))
    reference = compute_reference(job.model, exported, rows, GREEDY_TOKENS, training)
    stage(job.report, f"checking {exported.name}: what the export computes")
    with open_engine(destination, folder, job, exported, written) as engine:
        figures, problems = _measure(engine, job, exported, queries, reference)
        if problems and (causes := engine.token_differences(queries)[:3]):
            problems = [f"{causes[0]}; so {problems[0]}", *problems[1:], *causes[1:]]
    fewer = f"there were {len(rows)}" if len(rows) < ROWS else None
    return {"rows": len(rows), "fewer_rows": fewer, **figures, "problems": problems}


def _measure(
    engine: Engine,
    job: Job,
    exported: ExportedPrompt,
    queries: Sequence[Query],
    reference: Reference,
) -> tuple[dict[str, float | None], list[str]]:
    """Figures for the report, and one sentence for each failure."""

    def watch(what: str) -> _Watched:
        return _Watched(queries, job.report, f"{exported.name}: {what}")

    rows = [query.sequence for query in queries]
    problems = []
    mass = engine.added_mass(watch("new tokens"))
    slack = -math.log1p(-min(max(mass, 0.0), 0.5))  # what other tokens lose to new ones
    plain_BV = engine.plain_logprobs_BV(watch("plain text"))
    start_BV = engine.start_logprobs_BV(watch("unrefined rows"))
    step_zero = absolute_differences(start_BV, plain_BV).max().item()
    refined_BV = engine.logprobs_BV(watch("refined rows"))
    differences_BV = absolute_differences(refined_BV, reference.logprobs_BV)
    largest_B = differences_BV.max(dim=1).values
    difference, mean = largest_B.max().item(), differences_BV.mean().item()

    exact = job.model.dtype in (torch.float32, torch.float64)
    tolerance, rounding, mean_tolerance = engine.tolerance if exact else None, None, math.inf
    step_zero_tolerance = STEP_ZERO
    if tolerance is None:
        text_BV = next_logprobs(job.model, exported.prompt.start_rows, rows)
        rounding_BV = absolute_differences(plain_BV, text_BV)
        rounding = rounding_BV.max().item()
        tolerance = TIMES_LARGEST * rounding + LEAST_LARGEST
        mean_tolerance = TIMES_MEAN * rounding_BV.mean().item() + LEAST_MEAN
        if rounding and job.model.info.embedding_scale != 1:
            # Rows divided by the model's scale and rounded need not come back exactly.
            step_zero_tolerance = tolerance
    if not step_zero <= step_zero_tolerance + slack:
        problems.append(
            f"the unrefined rows and the plain text give different log-probabilities there, by "
            f"{step_zero:.1e} (at most {step_zero_tolerance + slack:.1e})"
        )
    if not mass < ADDED_MASS:
        problems.append(
            f"the new tokens have a probability of {mass:.1e} together (below {ADDED_MASS:.0e})"
        )
    if not difference <= tolerance + slack:
        problems.append(
            f"next-token log-probabilities are not those of training: they differ by "
            f"{difference:.1e} (at most {tolerance + slack:.1e}), most in "
            f"{rows[int(largest_B.argmax())].example.source}"
        )
    if not mean <= mean_tolerance:
        problems.append(
            f"next-token log-probabilities are not those of training: they differ by {mean:.1e} "
            f"on average (at most {mean_tolerance:.1e}, judging by plain text)"
        )

    greedy = choice = limited = None
    if reference.texts is not None:
        ended = [before_end(i, reference.end_ids) for i in engine.greedy(queries, GREEDY_TOKENS)]
        decode = job.model.tokenizer.decode
        texts = [decode(list(ids), skip_special_tokens=True) for ids in ended]
        greedy = _share(texts, reference.texts)
    if reference.choices is not None:
        normalize = exported.sequencer.target.normalize
        answers = zip(rows, engine.answer_logprobs(watch("choices")), strict=True)
        choices = [_likeliest(row, logprobs, normalize) for row, logprobs in answers]
        choice = _share(choices, reference.choices)
        limited = _share([engine.choose(query) for query in watch("replies")], reference.choices)
    if rounding is None:
        for what, share in (("greedy texts", greedy), ("choices", choice)):
            if share is not None and share < AGREEING:
                problems.append(f"{what} agree with training in only {share:.0%} of the rows")
    figures = {
        "step_zero_difference": step_zero,
        "added_mass": mass,
        "max_logprob_difference": difference,
        "mean_logprob_difference": mean,
        "tolerance": tolerance,
        "rounding": rounding,
        "greedy_agreement": greedy,
        "choice_agreement": choice,
        "limited_agreement": limited,
    }
    return figures, problems


def absolute_differences(logprobs_BV: Tensor, reference_BV: Tensor) -> Tensor:
    """Absolute differences of log-probabilities, infinite for NaN."""
    assert logprobs_BV.shape == reference_BV.shape, (logprobs_BV.shape, reference_BV.shape)
    both = logprobs_BV, reference_BV
    # Among the tokenizer's ids: padding, which new tokens replace, had a probability too.
    # A model may rule tokens out, and engines report such probabilities in different ways.
    one, other = (table.double().log_softmax(dim=1).clamp(min=IMPOSSIBLE) for table in both)
    return (one - other).abs().nan_to_num(nan=math.inf)


def _messages(exported: ExportedPrompt, row: TokenSequence, default: bool) -> list[dict[str, str]]:
    """What a client sends; nothing if the template has no query that is a message by itself."""
    try:
        messages = plain_messages(exported.prompt.template, row.example.columns)
    except EmbedgradError:  # such prompts go to destinations of tokens or embeddings
        return []
    marker = [{"role": "system", "content": f"<<prompt:{exported.name}>>"}]
    return [*([] if default else marker), *messages]


def _likeliest(row: TokenSequence, logprobs: Sequence[float], normalize: bool) -> int:
    lengths = [len(ids) if normalize else 1 for ids in row.targets]
    scores = [p / max(n, 1) for p, n in zip(logprobs, lengths, strict=True)]
    return scores.index(max(scores))


def _share(answers: Sequence[object], reference: Sequence[object]) -> float:
    return sum(a == b for a, b in zip(answers, reference, strict=True)) / len(reference)
