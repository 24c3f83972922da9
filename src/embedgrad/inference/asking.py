"""Ask a prompt of a pool: its answers, checked, with their price."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.inference.answer import by_rows, model_inputs, write
from embedgrad.inference.policy import Attempt, PolicySettings, Price
from embedgrad.inference.validators import alike, check
from embedgrad.model.decoding import Generation
from embedgrad.parts.scorers import Scorer
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.open_run import Answering

Inputs = tuple[Tensor, TokenSequence]
"""A query as a prompt puts it: rows and sequence."""


@final
@dataclass(frozen=True)
class Asked:
    """A prompt of a pool with its model. `scorer` is None where answers are chosen."""

    run: Answering
    settings: PolicySettings
    refined: bool
    scorer: Scorer | None

    @property
    def passes(self) -> int:
        """Passes over a query: choices, or greedy answers, samples and their margin."""
        if self.scorer is None:
            return 1
        return 1 + (self.settings.samples > 1) + self._weighs

    @property
    def _weighs(self) -> bool:
        return "margin" in self.settings.validators

    def same(self, answer: str, other: str) -> bool:
        """Whether two answers count as one."""
        return alike(self.scorer, answer, other)

    def right(self, example: Example, answer: str) -> float:
        """How right an answer is."""
        if self.scorer is None:
            return float(answer == example.answer)
        return self.scorer.score(answer, example.answer)

    def inputs(self, example: Example) -> Inputs:
        """Raises `DataError` for a query that does not fit."""
        return model_inputs(self.run, self.run.sequencer(example), float(self.refined))

    def price(self, inputs: Inputs, written: Sequence[Generation] | None = None) -> Price:
        """What a round takes: with what was written, or at most."""
        rows_PD, sequence = inputs
        before, calls = len(sequence.prefix), 1
        tokens = self.passes * (sequence.length(len(rows_PD)) - before)
        if self.scorer is None:
            tokens += sum(map(len, sequence.targets))
        else:
            calls, most = self.settings.samples, self.run.evaluator.evaluation.max_new_tokens
            lengths = (
                [most] * calls if written is None else [len(g.ids) + len(g.end) for g in written]
            )
            tokens += sum(lengths) + self._weighs * lengths[0]
        if self.run.model.why_not_reusable is not None:
            return Price(calls, tokens + self.passes * before)
        return Price(calls, tokens, sequence.prefix, before)

    def ask(self, inputs: Sequence[Inputs]) -> list[Attempt]:
        """The answers to some queries, checked."""
        names, pattern = self.settings.validators, self.settings.pattern
        attempts = []
        if self.scorer is None:
            for one, scored in zip(inputs, self._choose(inputs), strict=True):
                second, first = sorted((scored.probabilities or {}).values())[-2:]
                answer, checks = check(names, [scored.predicted], None, margin=first - second)
                attempts.append(self._attempt(one, answer, checks))
            return attempts
        written = self._write(inputs)
        margins = self._likelihoods(inputs, written) if self._weighs else [1.0] * len(inputs)
        for one, answers, margin in zip(inputs, written, margins, strict=True):
            texts, cut = [answer.text for answer in answers], not answers[0].ended
            answer, checks = check(
                names, texts, self.scorer, margin=margin, cut=cut, pattern=pattern
            )
            attempts.append(self._attempt(one, answer, checks, answers))
        return attempts

    def _attempt(
        self,
        inputs: Inputs,
        answer: str,
        checks: dict[str, float],
        written: Sequence[Generation] | None = None,
    ) -> Attempt:
        price = self.price(inputs, written)
        return Attempt(answer, math.prod(checks.values()), price, self.price(inputs), checks)

    def _choose(self, inputs: Sequence[Inputs]) -> list[ScoredAnswer]:
        found: dict[int, ScoredAnswer] = {}
        for rows_PD, places in by_rows(inputs):
            scored = self.run.evaluator.score(rows_PD, [inputs[i][1] for i in places])
            found |= zip(places, scored, strict=True)
        return [found[i] for i in range(len(inputs))]

    def _write(self, inputs: Sequence[Inputs]) -> list[list[Generation]]:
        """The greedy answer to each query, and behind it the sampled ones."""
        decoding, more = self.run.evaluator.evaluation.decoding, self.settings.samples - 1
        # By source, so that a row's draws do not depend on the rows beside it.
        numbers = [zlib.crc32(sequence.example.source.encode()) for _, sequence in inputs]
        written = write(self.run, inputs, decoding, numbers)
        if more:
            warm = replace(decoding, samples=more, temperature=self.settings.temperature)
            drawn = write(self.run, inputs, warm, numbers)
            written = [first + others for first, others in zip(written, drawn, strict=True)]
        return written

    def _likelihoods(
        self, inputs: Sequence[Inputs], written: Sequence[Sequence[Generation]]
    ) -> list[float]:
        """How likely each greedy answer is: the geometric mean over its tokens."""
        found: dict[int, float] = {}
        for rows_PD, places in by_rows(inputs):
            told = []
            for i in places:
                target = (*written[i][0].ids, *written[i][0].end)
                told.append(replace(inputs[i][1], targets=(target,), gold=0))
            outcome = self.run.model.outcome(rows_PD, told, choices=False)
            means_B = outcome.answer_logprobs_B / outcome.answer_tokens_B
            found |= zip(places, means_B.exp().tolist(), strict=True)
        return [found[i] for i in range(len(inputs))]
