"""A short measurement of a recipe's own batches: seconds and bytes of every kind of work.

build prefixes -> steps on the largest batch, then on others -> score -> answer freely
"""

from __future__ import annotations

import statistics
import sys
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from embedgrad.environment import peak_memory
from embedgrad.evaluation.evaluator import Evaluator, ScoredAnswer
from embedgrad.experiments.plan.workload import (
    Examples,
    TokenizedSplits,
    Work,
    first_epoch,
    objective_choices,
)
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.prompt.sequence import Sequencer
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.loop import optimize

SECONDS = 20.0  # that a probe may take, if a single step is short
BATCHES = 4  # beside the largest
READ = 8  # examples that are answered to the end
SHORT, LONG = 2, 12  # tokens of answers; the difference is what further tokens take


@typing.final
class Meter:
    """Clock and memory of a device: a GPU's own memory, else that of this process."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> int:
        """Bytes in use."""
        if self.on_gpu:
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def most(self) -> int:
        """The most bytes in use since the last reset."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else peak_memory()

    def reset(self) -> None:
        """Forget the peak; of a process only Linux can, elsewhere it bounds what comes later."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def seconds(self, action: Callable[..., object], *arguments: object) -> float:
        """How long a call takes."""
        began = time.perf_counter()
        action(*arguments)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


@typing.final
@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per unit of `Work.effort` by kind of work, and bytes beside model and prefixes.

    `bytes` are per example of a pass, but of building prefixes in all; `first` are seconds that the
    first step takes beyond any other. `replies` are the tokens of the longest free answers to
    expect, from the text prompt and from the refined one; `read` answers were read, of `mean`
    tokens, and `cut` of these did not end in `upto` tokens.
    """

    seconds: dict[str, float]
    bytes: dict[str, float]
    replies: tuple[int, int] = (0, 0)
    first: float = 0.0
    read: int = 0
    cut: int = 0
    upto: int = 0
    mean: float = 0.0
    probe: float = 0.0


def probe(
    model: LanguageModel,
    recipe: Recipe,
    sequencer: Sequencer,
    splits: TokenizedSplits,
    meter: Meter,
) -> Rates:
    """Measure the recipe's own batches for about `SECONDS`; no test example is answered."""
    stored, model.prefix_cache = model.prefix_cache, PrefixCache(sys.maxsize)
    try:
        return _Probe(model, recipe, sequencer, splits, meter).run()
    finally:
        model.prefix_cache = stored


@typing.final
class _Probe:
    """The names that the parts of one measurement share."""

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe,
        sequencer: Sequencer,
        splits: TokenizedSplits,
        meter: Meter,
    ):
        self.model, self.recipe, self.sequencer = model, recipe, sequencer
        self.splits, self.meter = splits, meter
        self.start_PD = model.embed(sequencer.span.ids)
        self.sample: CachedPrefix | None = None
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, float] = {}
        self.base, self.began = meter.now(), time.perf_counter()

    def run(self) -> Rates:
        """Everything, in the order of a run."""
        recipe, splits = self.recipe, self.splits
        self._build_prefixes()
        parts, choices = recipe.training.accumulate, objective_choices(recipe)
        first = self._measure(
            "steps", first_epoch(recipe, splits), parts, choices, self._train, 0.6
        )
        examples = sorted(splits.dev or splits.train, key=splits.length)
        size = recipe.evaluation.batch_size
        batches = [examples[n : n + size] for n in range(0, len(examples), size)]
        free = not recipe.target.choices
        self._measure("scoring", batches, 1, not free, self._score, 0.8)
        answers = self._answers(batches[len(batches) // 2]) if free else {}
        took = time.perf_counter() - self.began
        return Rates(self.seconds, self.bytes, first=first, probe=took, **answers)

    def _build_prefixes(self) -> None:
        """Build the first prefixes together, as a run does ahead of its steps."""
        cache, splits = self.model.prefix_cache, self.splits
        waiting = {s.prefix: s for s in (*splits.train, *splits.dev) if splits.reuses(s)}
        if not any(waiting):
            return
        longest = waiting[max(waiting, key=len)]
        (self.sample,) = self.model.prefixes_of([longest.prefix], [longest.shared])
        cache.clear()
        before = self.meter.now()
        self.meter.reset()
        seconds = self.meter.seconds(self.model.prepare, list(waiting.values()))
        tokens = sum(len(ids) - s.shared for ids, s in waiting.items() if ids in cache)
        self.seconds["prefixes"] = seconds / max(tokens, 1)
        self.bytes["prefixes"] = max(self.meter.most() - before - cache.nbytes, 0)

    def _measure(
        self,
        kind: str,
        batches: Sequence[Examples],
        parts: int,
        choices: bool,
        action: Callable[[Examples], object],
        share: float,
    ) -> float:
        """Repeat an action on the largest batch, then on others until a share of the time is over.

        Each batch is computed in `parts`. Returns the seconds of the first call beyond a later one.
        """
        lengths = [sum(map(self.splits.length, batch)) for batch in batches]
        largest = batches[max(range(len(batches)), key=lengths.__getitem__)]
        others = batches[:: max(1, len(batches) // BATCHES)][:BATCHES]
        rates, first = [], 0.0
        for n, batch in enumerate((largest, *others)):
            if n > 1 and time.perf_counter() - self.began > share * SECONDS:
                break
            self._store(batch)
            self.meter.reset()
            seconds = [self.meter.seconds(action, batch) for _ in range(2 if n else 3)]
            if n == 0:
                held = self.meter.most() - self.base - self.model.prefix_cache.nbytes
                self.bytes[kind] = max(held, 0) / -(-len(batch) // parts)
                first = max(seconds.pop(0) - min(seconds), 0.0)
            tokens = sum(self.splits.tokens(s, choices=choices) for s in batch)
            work = Work(tokens + parts * self.splits.shared_prompt, parts)
            rates += [s / work.effort for s in seconds]
        self.seconds[kind] = statistics.median(rates)
        return first

    def _store(self, batch: Examples) -> None:
        """Store prefixes of the batch's lengths; what they hold changes neither time nor memory."""
        cache, sample = self.model.prefix_cache, self.sample
        cache.clear()
        for ids in {s.prefix for s in batch if self.splits.reuses(s)} if sample else ():
            keys, values = (part[:, :, : len(ids)].clone() for part in (sample.keys, sample.values))
            cache.put(ids, CachedPrefix(keys, values))

    def _train(self, batch: Examples) -> None:
        training = replace(
            self.recipe.training, steps=1, batch_size=len(batch), evaluate_every=None
        )
        parts = self.recipe.parts
        refinement = optimize(self.model, self.sequencer, batch, training=training, parts=parts)
        if refinement.ended == "interrupted":
            raise KeyboardInterrupt

    @torch.no_grad()
    def _score(self, batch: Examples) -> None:
        self.model.outcome(self.start_PD, batch, choices=bool(self.recipe.target.choices))

    def _answers(self, batch: Examples) -> dict[str, Any]:
        """What a further token of a full batch takes; then a few answers, as far as time allows."""
        self._store(batch)
        _, short, long = (
            self.meter.seconds(self._answer, batch, n)
            for n in (SHORT, SHORT, LONG)  # the first is to warm up
        )
        held = self.meter.most() - self.base - self.model.prefix_cache.nbytes
        self.bytes["scoring"] = max(self.bytes["scoring"], held / len(batch))
        together = not self.model.one_by_one

        def effort(answers: int) -> float:
            return Work(answers, 1 if together else answers).effort

        rate = max(long - short, 1e-9) / (LONG - SHORT) / effort(len(batch))
        self.seconds["answers"] = rate
        few = batch[:: max(1, len(batch) // READ)][:READ]
        most = self.recipe.evaluation.max_new_tokens
        left = max(SECONDS - (time.perf_counter() - self.began), SECONDS / 4)
        upto = max(min(most, int(left / (rate * effort(len(few))))), min(most, 16))
        self.model.prefix_cache.clear()  # these are read, so their prefixes must be real
        answers = self._answer(few, upto)
        texts = [a.predicted for a in answers]
        ids = self.model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = [
            upto if a.cut else min(len(own) + 1, upto) for a, own in zip(answers, ids, strict=True)
        ]
        cut = sum(a.cut for a in answers)
        text = most if cut else max(lengths)
        # The refined prompt learns to answer as it is trained to.
        refined = min(text, max(len(s.targets[s.gold]) for s in self.splits.all))
        mean = sum(lengths) / len(lengths)
        return {
            "replies": (text, refined),
            "read": len(few),
            "cut": cut,
            "upto": upto,
            "mean": mean,
        }

    def _answer(self, batch: Examples, tokens: int) -> list[ScoredAnswer]:
        evaluation = replace(self.recipe.evaluation, max_new_tokens=tokens)
        evaluator = Evaluator(self.model, self.sequencer, evaluation)
        return evaluator.score(self.start_PD, batch)
