"""Measure a recipe's own batches briefly.

build prefixes -> steps on the largest batch, then on others -> score -> answer freely
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from embedgrad.environment import memory_in_use, peak_memory, reset_peak_memory
from embedgrad.evaluation.evaluator import Evaluator, ScoredAnswer
from embedgrad.events import quiet
from embedgrad.experiments.plan.workload import Examples, TokenizedSplits, as_trained, over_choices
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.packing import PASS_COST
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.parts.augmentations import BatchContext
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.prompt.sequence import Sequencer
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.replay import Replay
from embedgrad.training.optimize import optimize

Action = Callable[[Examples], object]

SECONDS = 10.0  # after which no further batch of a kind is measured
BATCHES = 4  # of a kind, beside the largest
UPTO = 128  # tokens of free answers that are read


@typing.final
@dataclass(slots=True)
class Rates:
    """Seconds per token by kind of work, and bytes beside model and prefixes per example of a pass.

    `text` and `refined` are the tokens of the longest free answers to expect from either prompt;
    `read` answers were read, of `mean` tokens, and `cut` of these did not end in `upto` tokens.
    """

    text: int = 0
    refined: int = 0
    read: int = 0
    cut: int = 0
    upto: int = 0
    mean: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)


@typing.final
class Probe:
    """Measures batches of a recipe; no test example is answered."""

    def __init__(
        self, model: LanguageModel, recipe: Recipe, sequencer: Sequencer, splits: TokenizedSplits
    ):
        self.model = model.with_prefix_cache(PrefixCache(sys.maxsize))
        self.recipe, self.sequencer, self.splits, self.rates = recipe, sequencer, splits, Rates()
        self.start_PD = model.embed(sequencer.prompt_ids)
        self.loaded = memory_in_use(model.device)

    def run(self) -> Rates:
        """Everything, in the order of a run."""
        recipe, splits, free = self.recipe, self.splits, not self.recipe.target.choices
        self._build_prefixes()
        train = as_trained(recipe, splits.train)
        self._measure("steps", train, over_choices(recipe), self._train)
        examples = sorted(splits.dev or splits.train, key=splits.length)
        self._measure("scoring", examples, not free, self._score)
        if free:
            size = recipe.evaluation.batch_size
            middle = max(len(examples) - size, 0) // 2
            self._read_answers(examples[middle : middle + size])
        return self.rates

    def _build_prefixes(self) -> None:
        """Build the first prefixes together, as a run does ahead of its steps."""
        cache, examples = self.model.prefix_cache, (*self.splits.train, *self.splits.dev)
        shared = {s.prefix: s.shared for s in examples if self.splits.reuses(s)}
        self.sample: CachedPrefix | None = None
        if any(shared):
            longest = max(shared, key=len)
            (self.sample,) = self.model.prefixes_of([longest], [shared[longest]])
            cache.clear()
            seconds = self._time(self.model.prepare, examples)
            tokens = sum(len(ids) - n for ids, n in shared.items() if ids in cache)
            self.rates.seconds["prefixes"] = seconds / max(tokens, 1)

    def _measure(self, kind: str, examples: Examples, choices: bool, action: Action) -> None:
        """Repeat an action on the largest batch, then on others while time is left."""
        training, size = self.recipe.training, self.recipe.evaluation.batch_size
        units, parts = [[i] for i in range(len(examples))], 1
        if kind == "steps":
            units, size = self.splits.units(training), training.batch_size
            parts = training.accumulate
        batches = [
            [examples[i] for unit in units[n : n + size] for i in unit]
            for n in range(0, len(units), size)
        ]
        largest = max(batches, key=lambda batch: sum(map(self.splits.length, batch)))
        others = batches[:: math.ceil(len(batches) / BATCHES)]
        rates, began = [], time.perf_counter()
        for n, batch in enumerate((largest, largest, *others)):
            if n < 2 or time.perf_counter() - began < SECONDS:
                self._store(self._with_replayed(batch) if kind == "steps" else batch)
                reset_peak_memory(self.model.device)
                seconds = (self._time(action, batch) + self._time(action, batch)) / 2
                tokens = sum(self.splits.tokens(s, choices=choices) for s in batch)
                rates += [seconds / tokens] if n else []  # the first is to warm up
                if n == 0:
                    self.rates.bytes[kind] = self._peak_bytes() / math.ceil(len(batch) / parts)
        self.rates.seconds[kind] = statistics.median(rates)

    def _time(self, action: Callable[..., object], *arguments: object) -> float:
        """Seconds that a call takes."""
        began = time.perf_counter()
        action(*arguments)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - began

    def _peak_bytes(self) -> int:
        """The most bytes in use beside model and prefixes since the last reset."""
        other = self.loaded + self.model.prefix_cache.nbytes
        return max(peak_memory(self.model.device) - other, 0)

    def _store(self, batch: Examples) -> None:
        """Store prefixes of the batch's lengths; what they hold changes neither time nor memory."""
        self.model.prefix_cache.clear()
        for ids in {s.prefix for s in batch if self.sample and self.splits.reuses(s)}:
            assert self.sample is not None
            pair = (self.sample.keys, self.sample.values)
            made_up = CachedPrefix(*(part[:, :, : len(ids)].clone() for part in pair))
            self.model.prefix_cache.put(ids, made_up)

    def _with_replayed(self, batch: Examples) -> Examples:
        """What a step takes: the batch, and the rows of earlier tasks that are added to it."""
        context = BatchContext(self.recipe.training.seed, 0, 1, self.sequencer.vocabulary)
        for augmentation in self.recipe.parts.augmentations:
            if isinstance(augmentation, Replay):
                batch = augmentation(batch, context)
        return batch

    def _train(self, batch: Examples) -> None:
        own = replace(self.recipe.training, steps=1, batch_size=len(batch), evaluate_every=None)
        parts = self.recipe.parts
        if parts.objective.sampling is not None:  # which is measured apart
            parts = replace(parts, objective=CrossEntropy(over="answer"))
        refinement = optimize(
            self.model, self.sequencer, batch, training=own, parts=parts, report=quiet
        )
        if refinement.ended == "interrupted":
            raise KeyboardInterrupt

    @torch.no_grad()
    def _score(self, batch: Examples) -> None:
        self.model.outcome(self.start_PD, batch, choices=bool(self.recipe.target.choices))

    def _read_answers(self, batch: Examples) -> None:
        """Answer a batch with the text prompt, and from that guess how long answers get."""
        rates, limit = self.rates, self.recipe.evaluation.max_new_tokens
        rates.read, rates.upto = len(batch), min(limit, UPTO)
        self.model.prefix_cache.clear()  # what is read needs prefixes that are real
        answers: list[ScoredAnswer] = []

        def answer(tokens: int) -> None:
            evaluation = replace(self.recipe.evaluation, max_new_tokens=tokens)
            evaluator = Evaluator(self.model, self.sequencer, evaluation).greedy
            answers[:] = evaluator.score(self.start_PD, batch)

        _, short, long = (self._time(answer, tokens) for tokens in (1, 1, rates.upto))
        rates.bytes["scoring"] = max(rates.bytes["scoring"], self._peak_bytes() / len(batch))
        texts = [answer.predicted for answer in answers]
        ids = self.model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ended = [len(own) + 1 for own, a in zip(ids, answers, strict=True) if not a.cut]
        rates.cut = len(batch) - len(ended)
        lengths = [min(n, rates.upto) for n in (*ended, *[rates.upto] * rates.cut)]
        rates.mean, rates.text = statistics.mean(lengths), limit if rates.cut else max(lengths)
        # The refined prompt learns to answer as it is trained to.
        rates.refined = min(rates.text, max(len(s.targets[s.gold]) for s in self.splits.all))
        passes = len(batch) if self.model.forward.one_by_one else 1
        effort = (max(lengths) - 1) * (len(batch) + PASS_COST * passes)
        rates.seconds["answers"] = max(long - short, 0.0) / max(effort, 1)
