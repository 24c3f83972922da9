"""A short measurement of every kind of work, and its memory.

    build prefixes -> steps on the longest batch, then on typical ones -> score -> answer freely

Steps and scores run on made-up prefixes of the right size, as what stands in a prefix changes
neither time nor memory; only what is to be read (free answers) gets real ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.experiments.plan.batches import Rows, scoring_batches, training_batches
from embedgrad.experiments.plan.estimate import Rates
from embedgrad.experiments.plan.flops import (
    Reuse,
    activation_bytes,
    answer_passes,
    decoding_passes,
    prefix_passes,
    total,
    work,
)
from embedgrad.experiments.plan.meter import Meter
from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.experiments.plan.workload import Replies, step_bytes, step_passes
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.model.prefixes import FEW, PASS_TOKENS
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.loop import optimize

SECONDS = 20.0  # that a probe may take, if a single step is short
TYPICAL = 4  # batches
READ = 8  # rows that are answered to the end
DECODED = (2, 12)  # tokens; the difference is what further tokens take
FILL = 0.01  # of made-up keys and values


def probe(
    model: LanguageModel,
    recipe: Recipe,
    sequencer: Sequencer,
    rows: Rows,
    shape: Shape,
    reuse: Reuse,
    meter: Meter,
    *,
    seconds: float = SECONDS,
) -> Rates:
    """Measure the recipe's own batches, until `seconds` are over."""
    model = model.with_prefix_cache(PrefixCache(sys.maxsize))
    return _Probe(model, recipe, sequencer, rows, shape, reuse, meter, seconds).run()


class _Probe:
    """The names that the parts of one measurement share."""

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe,
        sequencer: Sequencer,
        rows: Rows,
        shape: Shape,
        reuse: Reuse,
        meter: Meter,
        seconds: float,
    ):
        self.model, self.recipe, self.sequencer = model, recipe, sequencer
        self.rows, self.shape, self.reuse, self.meter = rows, shape, reuse, meter
        self.base = meter.now()
        self.seconds = seconds
        self.began = time.perf_counter()
        self.start_PD = model.embed(sequencer.span.ids)

    def run(self) -> Rates:
        """Everything, in the order of a run."""
        found: dict[str, Any] = {}
        batches = list(training_batches(self.recipe, self.rows, sys.maxsize))
        if self.reuse.on:
            found |= self._prefixes(batches)
        found |= self._steps(batches)
        # Never test rows: what the model answers to them is nobody's before the run's end.
        scored = self.rows.dev or self.rows.train
        if scored:
            found |= self._scoring(scored)
        if scored and not self.recipe.target.choices:
            found |= self._decoding(scored, found["scoring"])
        return Rates(**found, probe_seconds=time.perf_counter() - self.began)

    def left(self, share: float) -> bool:
        """Whether less than this share of the time is over."""
        return time.perf_counter() - self.began < share * self.seconds

    # -- prefixes ---------------------------------------------------------------------------------

    def _prefixes(self, batches: Sequence[Sequence[TokenSequence]]) -> dict[str, Any]:
        """Build prefixes as `prepare` does: a few to warm up, then as many as one pass takes."""
        waiting = list({s.prefix: s for batch in batches for s in batch if s.prefix}.values())
        few, tokens = 0, 0
        while few < len(waiting) and tokens < PASS_TOKENS // 8:
            tokens += len(waiting[few].prefix) - waiting[few].shared
            few += 1
        if not few:
            return {}
        self.model.prefixes_of([s.prefix for s in waiting[:few]], [s.shared for s in waiting[:few]])
        rest = waiting[few:] or waiting[:few]
        if not waiting[few:]:
            self.model.prefix_cache.clear()
        before = {s.prefix for s in waiting if s.prefix in self.model.prefix_cache}
        held = self.meter.now()
        with self.meter.reading() as reading:
            self.model.prepare(rest)
        new = [s for s in rest if s.prefix in self.model.prefix_cache and s.prefix not in before]
        made = prefix_passes(((len(s.prefix), s.shared) for s in new), PASS_TOKENS, FEW)
        effort = work(self.shape, made).effort
        if not effort:
            return {}
        held += sum(len(s.prefix) for s in new) * self.shape.token_bytes()
        expected = activation_bytes(self.shape, made, backward=False)
        return {
            "prefixes": reading.seconds / effort,
            "held_bytes": max(reading.peak - held, 0) / expected,
        }

    def _make_up(self, batch: Iterable[TokenSequence]) -> None:
        """Store prefixes of the right size, whatever they hold."""
        if not self.reuse.on:
            return
        wanted = {s.prefix for s in batch if s.prefix}
        self.model.prefix_cache.clear()
        if not wanted:
            return
        shortest = min(wanted, key=len)
        (sample,) = self.model.prefixes_of([shortest])
        for ids in wanted - {shortest}:
            self.model.prefix_cache.put(ids, _made_up(sample, ids))

    # -- steps ---------------------------------------------------------------------------------

    def _steps(self, batches: Sequence[Sequence[TokenSequence]]) -> dict[str, Any]:
        """The batch that holds most, then typical ones; all but the very first step are warm."""

        def laid_out(batch: Sequence[TokenSequence]) -> Any:
            return step_passes(self.recipe, batch, self.rows.prompt, self.reuse)

        sizes = [step_bytes(self.shape, laid_out(batch)) for batch in batches]
        largest = max(range(len(batches)), key=lambda i: sizes[i])
        stride = max(1, len(batches) // TYPICAL)
        typical = [i for i in range(stride // 2, len(batches), stride) if i != largest][:TYPICAL]
        rates, found = [], {}
        for n, i in enumerate([largest, *typical]):
            if n > 1 and not self.left(0.6):
                break
            self._make_up(batches[i])
            stored = self.model.prefix_cache.nbytes
            effort = total(work(self.shape, p, backward=True) for p in laid_out(batches[i])).effort
            with self.meter.reading() as reading:
                seconds = self._timed(batches[i], 3 if n == 0 else 2)
            if n == 0:
                held = max(reading.peak - self.base - stored, 0)
                found["step_bytes"] = held / sizes[i]
                found["first"] = max(seconds[0] - min(seconds[1:]), 0.0)
                seconds = seconds[1:]
            rates += [s / effort for s in seconds]
        return {**found, "steps": statistics.median(rates)}

    def _timed(self, batch: Sequence[TokenSequence], steps: int) -> list[float]:
        """Seconds of so many steps on one batch."""
        seconds: list[float] = []

        def collect(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                seconds.append(event["seconds"])

        training = dataclasses.replace(
            self.recipe.training, steps=steps, batch_size=len(batch), evaluate_every=None
        )
        refinement = optimize(
            self.model,
            self.sequencer,
            batch,
            training=training,
            parts=self.recipe.parts,
            report=collect,
        )
        if refinement.ended == "interrupted":
            raise KeyboardInterrupt
        return seconds

    # -- scores --------------------------------------------------------------------------------

    @torch.no_grad()
    def _scoring(self, part: Sequence[TokenSequence]) -> dict[str, Any]:
        """The longest batch twice, then the middle one."""
        batches, choices = scoring_batches(self.recipe, part), bool(self.recipe.target.choices)
        rates, beyond = [], 0.0
        for n, batch in enumerate((batches[-1], batches[len(batches) // 2], batches[0])):
            if n and not self.left(0.8):
                break
            self._make_up(batch)
            made = answer_passes(batch, self.rows.prompt, self.reuse, choices=choices)
            stored, effort = self.model.prefix_cache.nbytes, work(self.shape, made).effort
            for _ in range(2):
                with self.meter.reading() as reading:
                    self.model.outcome(self.start_PD, batch, choices=choices)
                rates.append(reading.seconds / effort)
            if n == 0:
                held = reading.peak - self.base - stored
                computed = activation_bytes(self.shape, made, backward=False)
                beyond = max(held - computed, 0.0)
        return {"scoring": statistics.median(rates), "scoring_bytes": beyond}

    @torch.no_grad()
    def _decoding(self, part: Sequence[TokenSequence], scoring: float) -> dict[str, Any]:
        """What a further token takes in a full batch; then a few rows' answers, read to the end."""
        batches = scoring_batches(self.recipe, part)
        batch = batches[len(batches) // 2]
        self._make_up(batch)
        seconds, efforts = [], []
        for tokens in (DECODED[0], *DECODED):  # the first is to warm up
            with self.meter.reading() as reading:
                self._answered(self.start_PD, batch, tokens)
            made = decoding_passes(batch, self.rows.prompt, self.reuse, tokens)
            seconds.append(reading.seconds)
            efforts.append(work(self.shape, made).effort)
        rate = (seconds[2] - seconds[1]) / (efforts[2] - efforts[1])
        rate = rate if rate > 0 else scoring
        return {"decoding": rate, **self._replies(batch, rate)}

    def _replies(self, batch: Sequence[TokenSequence], rate: float) -> dict[str, Any]:
        """How long answers get: read with the text prompt, then as long as what is trained on."""
        few = batch[:: max(1, len(batch) // READ)][:READ]
        most = self.recipe.evaluation.max_new_tokens
        one = decoding_passes(few, self.rows.prompt, self.reuse, 2)[-1]
        per_token = rate * work(self.shape, [one._replace(times=1)]).effort
        affordable = max(self.seconds - (time.perf_counter() - self.began), self.seconds / 4)
        upto = max(min(most, int(affordable / per_token)), min(most, 16))
        self.model.prefix_cache.clear()
        lengths, cut = [], 0
        for answer in self._answered(self.start_PD, few, upto):
            ids = self.model.tokenizer(answer.predicted, add_special_tokens=False)["input_ids"]
            lengths.append(upto if answer.cut else min(len(ids) + 1, upto))
            cut += answer.cut
        text = most if cut else max(lengths)
        learned = max(len(s.targets[s.gold]) for s in self.rows.everything)
        refined = min(text, most, learned)
        return {
            "replies": Replies(text, refined),
            "read": len(few),
            "cut": cut,
            "upto": upto,
            "mean_reply": sum(lengths) / len(lengths),
        }

    def _answered(self, rows_PD: Tensor, batch: Sequence[TokenSequence], tokens: int) -> list[Any]:
        evaluation = dataclasses.replace(self.recipe.evaluation, max_new_tokens=tokens)
        answered: list[Any] = Evaluator(self.model, self.sequencer, evaluation).score(
            rows_PD, batch
        )
        return answered


def _made_up(sample: CachedPrefix, ids: Ids) -> CachedPrefix:
    def part(like: Tensor) -> Tensor:
        return like.new_full((*like.shape[:2], len(ids), like.shape[3]), FILL)

    return CachedPrefix(part(sample.keys), part(sample.values))
