"""The check of an export: its own engine against the training path, row by row.

step zero      an export of the unrefined rows equals the plain tokens in that engine
log-probs      with the refined rows the next token's log-probabilities are those of training
added mass     new tokens are never likely
agreement      greedy texts and choices are the same
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.query import plain_messages
from embedgrad.deploy.runs import ROWS
from embedgrad.deploy.verify.engine import Asked, Engine
from embedgrad.deploy.verify.reference import Expected, expected, next_logprobs
from embedgrad.deploy.verify.registry import engine_versions, open_engine
from embedgrad.environment import versions
from embedgrad.errors import EmbedgradError
from embedgrad.events import stage
from embedgrad.model.decoding import before_end
from embedgrad.prompt.sequence import TokenSequence

GREEDY_TOKENS = 64
STEP_ZERO = 1e-5  # beyond the added mass
ADDED_MASS = 1e-4
AGREEING = 0.75  # share of rows, where weights are exact; a near tie may go either way
# Where weights are not exact: of the engine's own rounding on plain text, the largest and the mean,
# and a little more, for models where even that is next to nothing. The mean varies less by chance.
TIMES_LARGEST, LEAST_LARGEST = 2.0, 1e-2
TIMES_MEAN, LEAST_MEAN = 1.5, 1e-3
IMPOSSIBLE = -80.0  # log-probabilities below are one
_WORST = {
    "step_zero_difference": max,
    "added_mass": max,
    "max_logprob_difference": max,
    "mean_logprob_difference": max,
    "tolerance": max,
    "rounding": max,
    "greedy_agreement": min,
    "choice_agreement": min,
    "rows": min,
}


@dataclass(frozen=True)
class _Measured:
    """What an engine said of one prompt's rows, beside what was expected."""

    step_zero: float
    step_zero_tolerance: float
    mass: float
    difference: float
    worst: str
    tolerance: float
    rounding: float | None
    mean: float
    mean_rounding: float
    greedy: float
    choice: float | None

    def problems(self) -> list[str]:
        """What fails, a sentence each."""
        slack = -math.log1p(-min(max(self.mass, 0.0), 0.5))  # what other tokens lose to new ones
        found = []
        if not self.step_zero <= self.step_zero_tolerance + slack:
            found.append(
                f"the unrefined rows give other log-probabilities than the plain text there, by "
                f"{self.step_zero:.1e} (at most {self.step_zero_tolerance + slack:.1e})"
            )
        if not self.mass < ADDED_MASS:
            found.append(
                f"the new tokens have a probability of {self.mass:.1e} together (below "
                f"{ADDED_MASS:.0e})"
            )
        if not self.difference <= self.tolerance + slack:
            found.append(
                "next-token log-probabilities are not those of training, but differ by "
                f"{self.difference:.1e} (at most {self.tolerance + slack:.1e}), most in "
                f"{self.worst}"
            )
        allowed = TIMES_MEAN * self.mean_rounding + LEAST_MEAN
        if self.rounding is not None and not self.mean <= allowed:
            found.append(
                "next-token log-probabilities are not those of training, but differ by "
                f"{self.mean:.1e} in the mean (at most {allowed:.1e}, by that of plain text)"
            )
        if self.rounding is None:
            for what, share in (("greedy texts", self.greedy), ("choices", self.choice)):
                if share is not None and share < AGREEING:
                    found.append(f"{what} agree with training in {share:.0%} of the rows only")
        return found


def check(destination: str, folder: Path, job: Job, written: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every prompt of an export with the training path; the content of `verify.json`.

    What is said of the whole is the worst of its prompts. Raises `EngineError`.
    """
    prompts = {e.name: _check_prompt(destination, folder, job, e, written) for e in job.prompts}
    found: dict[str, Any] = {"destination": destination}
    for name, worst in _WORST.items():
        values = [p[name] for p in prompts.values() if p[name] is not None]
        found[name] = worst(values) if values else None
    found["passed"] = not any(p["problems"] for p in prompts.values())
    found["problems"] = [
        f"{name}: {problem}" if len(prompts) > 1 else problem
        for name, p in prompts.items()
        for problem in p["problems"]
    ]
    found["prompts"] = prompts
    found["versions"] = {**versions(), **engine_versions(destination)}
    return found


def _check_prompt(
    destination: str, folder: Path, job: Job, exported: Exported, written: Mapping[str, Any]
) -> dict[str, Any]:
    rows = exported.sequences
    default = exported is job.prompts[0]
    asked = [Asked(row, _messages(exported, row, default)) for row in rows]
    stage(job.report, f"checking {exported.name}: what training computes")
    want = expected(job.model, exported, rows, GREEDY_TOKENS)
    stage(job.report, f"checking {exported.name}: what the export computes")
    with open_engine(destination, folder, job, exported, written) as engine:
        measured = _measure(engine, job, exported, asked, want)
        problems = measured.problems()
        if problems:
            problems += engine.other_tokens(asked)[:3]
    return {
        "rows": len(rows),
        "fewer_rows": f"the data have {len(rows)} rows" if len(rows) < ROWS else None,
        "step_zero_difference": measured.step_zero,
        "added_mass": measured.mass,
        "max_logprob_difference": measured.difference,
        "mean_logprob_difference": measured.mean,
        "tolerance": measured.tolerance,
        "rounding": measured.rounding,
        "greedy_agreement": measured.greedy,
        "choice_agreement": measured.choice,
        "problems": problems,
    }


def _measure(
    engine: Engine, job: Job, exported: Exported, asked: Sequence[Asked], want: Expected
) -> _Measured:
    rows = [row.sequence for row in asked]
    plain = engine.plain_logprobs_BV(asked)
    step_zero = absolute_differences(engine.start_logprobs_BV(asked), plain).max().item()
    refined = engine.logprobs_BV(asked)
    differences_BV = absolute_differences(refined, want.logprobs_BV)
    largest = differences_BV.max(dim=1).values
    scaled = job.model.info.embedding_scale != 1
    exact = job.model.dtype in (torch.float32, torch.float64)
    tolerance, rounding, mean_rounding = engine.tolerance if exact else None, None, 0.0
    if tolerance is None:
        text = next_logprobs(job.model, exported.prompt.start_rows, rows)
        rounding_BV = absolute_differences(plain, text)
        rounding, mean_rounding = rounding_BV.max().item(), rounding_BV.mean().item()
        tolerance = TIMES_LARGEST * rounding + LEAST_LARGEST
    texts = [
        job.model.tokenizer.decode(list(before_end(ids, want.end_ids)), skip_special_tokens=True)
        for ids in engine.greedy(asked, GREEDY_TOKENS)
    ]
    choice = None
    if want.chosen is not None:
        normalize = exported.sequencer.target.normalize
        found = [
            _likeliest(row, logprobs, normalize)
            for row, logprobs in zip(rows, engine.answer_logprobs(asked), strict=True)
        ]
        choice = _share(found, want.chosen)
    return _Measured(
        step_zero=step_zero,
        # Rows divided by the model's scale and rounded need not come back to the bit.
        step_zero_tolerance=tolerance if rounding and scaled else STEP_ZERO,
        mass=engine.added_mass(asked),
        difference=largest.max().item(),
        worst=rows[int(largest.argmax())].example.source,
        tolerance=tolerance,
        rounding=rounding,
        mean=differences_BV.mean().item(),
        mean_rounding=mean_rounding,
        greedy=_share(texts, want.texts),
        choice=choice,
    )


def absolute_differences(found_BV: Tensor, wanted_BV: Tensor) -> Tensor:
    """How far log-probabilities lie apart; infinite where there is something else than a number."""
    assert found_BV.shape == wanted_BV.shape, (found_BV.shape, wanted_BV.shape)
    # Shares of the tokenizer's ids: padding had a share too, where new tokens stand now.
    found_BV, wanted_BV = (table.double().log_softmax(dim=1) for table in (found_BV, wanted_BV))
    # A model may rule tokens out, and engines write down such chances in their own ways.
    found_BV, wanted_BV = (table.clamp(min=IMPOSSIBLE) for table in (found_BV, wanted_BV))
    return (found_BV - wanted_BV).abs().nan_to_num(nan=math.inf)


def _messages(exported: Exported, row: TokenSequence, default: bool) -> list[dict[str, str]]:
    """What a client sends; nothing where the template holds no query that stands alone."""
    try:
        messages = plain_messages(exported.prompt.template, row.example.columns)
    except EmbedgradError:  # such destinations take tokens or embeddings of the whole prompt
        return []
    marker = [{"role": "system", "content": f"<<prompt:{exported.name}>>"}]
    return [*([] if default else marker), *messages]


def _likeliest(row: TokenSequence, logprobs: Sequence[float], normalize: bool) -> int:
    lengths = [len(ids) if normalize else 1 for ids in row.targets]
    scores = [p / max(n, 1) for p, n in zip(logprobs, lengths, strict=True)]
    return scores.index(max(scores))


def _share(found: Sequence[object], wanted: Sequence[object]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
