"""Self-training by rejection sampling (STaR, RFT).

    question -> text prompt -> k samples -> those that end, with the right answer -> training

After STaR (Zelikman et al. 2022, arXiv:2203.14465), without its hints, and the rejection sampling
of RFT (Yuan et al. 2023, arXiv:2308.01825). The frozen model's text is what it can write itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.examples import Example
from embedgrad.environment import cache_folder
from embedgrad.errors import DataError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.events import Report, quiet, say, scoring, stage
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import Reply
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.info import weights_digest
from embedgrad.model.workers import here
from embedgrad.parts.scorers import name_of
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Sequencer
from embedgrad.training.self_training.settings import Solutions, source_of
from embedgrad.training.self_training.store import FORMAT, SampledQuestion, Store

_WHAT = "self-written solutions"
_SAMPLE = 200  # characters of a reply to show
_LIMIT_MATTERS = 0.25  # share of replies cut from which a longer limit is worth trying
_COUNTS = ("tried", "right", "verified", "cut")


def training_examples(
    model: LanguageModel,
    sequencer: Sequencer,
    examples: Sequence[Example],
    solutions: Solutions = Solutions(),
    *,
    evaluation: Evaluation = Evaluation(),
    report: Report = quiet,
    keep_at: Path | None = None,
) -> tuple[list[Example], dict[str, Any]]:
    """Return the examples with their targets, and a summary of where these come from (plain JSON).

    Self-written solutions that an earlier run sampled with these settings are read from their file;
    `keep_at` gets a copy of it. Questions without a verified solution are left out; one with
    several may give several examples. Raises `DataError` where no solution is verified, the file
    does not fit, or the settings contradict each other.
    """
    source = source_of(solutions, examples, sequencer.target, evaluation.scorer)
    if source == "self-written":
        sampler = _Sampler(model, sequencer, examples, solutions, evaluation, report)
        return sampler.examples(keep_at)
    targets = list(examples)
    if source == "answer":
        check_answers(examples, sequencer.target, evaluation.scorer)
        targets = [replace(example, solution=None) for example in examples]
    return targets, {"source": source, "questions": len(targets), "kept": len(targets)}


@final
class _Sampler:
    """What the steps of rejection sampling share."""

    def __init__(
        self,
        model: LanguageModel,
        sequencer: Sequencer,
        examples: Sequence[Example],
        solutions: Solutions,
        evaluation: Evaluation,
        report: Report,
    ):
        check_answers(examples, sequencer.target, evaluation.scorer)
        # A copy: examples that it truncates are counted once, when training tokenizes them.
        self.model, self.sequencer = model, copy.copy(sequencer)
        self.solutions, self.evaluation, self.report = solutions, evaluation, report
        self.end_ids = Evaluator(model, sequencer, evaluation).end_ids
        self.given = list(examples)
        self.digests = [self._digest(example) for example in examples]
        bare = [replace(example, solution=None) for example in examples]
        # Equal questions are asked once, in an order that no data split or seed changes.
        sequences = dict(zip(self.digests, self.sequencer.build(bare), strict=True))
        self.questions = {digest: sequences[digest] for digest in sorted(sequences)}
        self.decoding = Decoding(
            max_new_tokens=solutions.max_new_tokens or evaluation.max_new_tokens,
            temperature=solutions.temperature,
            top_p=solutions.top_p,
            samples=solutions.samples,
            stop=evaluation.stop,
            seed=solutions.seed,
        )

    def examples(self, keep_at: Path | None) -> tuple[list[Example], dict[str, Any]]:
        """Sample the questions that no file holds yet, and choose what to train on."""
        store = store_at(self.solutions.file, self._conditions())
        missing = [digest for digest in self.questions if digest not in store.questions]
        if missing:
            stage(self.report, "sampling solutions with the text prompt")
        size = max(1, self.evaluation.batch_size // self.decoding.samples)
        each = f"{self.decoding.samples} solutions"
        ask_missing(store, list(self.questions), self._answer, size, each, _WHAT, self.report)
        if keep_at is not None:
            write_file(keep_at, store.content())
        questions = {digest: store.questions[digest] for digest in self.questions}
        counts = {
            name: sum(getattr(question, name) for question in questions.values())
            for name in _COUNTS
        }
        if not counts["verified"]:
            tried, cut, limit = counts["tried"], counts["cut"], self.decoding.max_new_tokens
            section = "solutions" if self.solutions.max_new_tokens else "evaluation"
            longer = f"a larger {section}.max_new_tokens, " * (cut >= _LIMIT_MATTERS * tried)
            scorer, sample = name_of(self.evaluation.scorer), next(iter(questions.values())).sample
            raise DataError(
                f"no self-written solution was verified: of {tried} replies to {len(questions)} "
                f"questions {counts['right']} have the right answer by evaluation.scorer = "
                f"{scorer!r}, {cut} were cut at {limit} tokens, none is right and ended (one "
                f"begins {sample!r}); try {longer}more solutions.samples, a higher "
                "solutions.temperature, another scorer, or solutions.source = 'answer'"
            )
        examples, tokens, too_long = self._choose(questions)
        if not examples:
            raise DataError(
                f"none of {too_long} verified solutions fits into the model's "
                f"{self.sequencer.context} tokens with its question; shorten the template, or set "
                "solutions.source = 'answer'"
            )
        summary = {
            "source": "self-written",
            "questions": len(self.given),
            "solved": sum(bool(questions[digest].solutions) for digest in self.digests),
            "kept": len(examples),
            "too_long": too_long,
            "mean_tokens": tokens / len(examples),
            **counts,
            "sampled_questions": len(missing),
            "file": str(store.path),
            "sha256": hashlib.sha256(store.content()).hexdigest(),
        }
        self._say(_describe(summary))
        return examples, summary

    def _answer(self, batch: Sequence[str]) -> Iterator[SampledQuestion]:
        start_PD = self.model.embed(self.sequencer.prompt_ids)
        sampled = self._reply(start_PD, batch)
        return (self._verify(digest, sampled[digest]) for digest in batch)

    def _reply(self, start_PD: Tensor, batch: Sequence[str]) -> dict[str, tuple[Reply, ...]]:
        """Sample the text prompt: by plain tokens where a question's text merges with the span."""
        sampled: dict[str, tuple[Reply, ...]] = {}
        sequences = {digest: self.questions[digest] for digest in batch}
        same = {digest: s for digest, s in sequences.items() if s.plain is None}
        merged = {digest: s.uncut() for digest, s in sequences.items() if s.plain is not None}
        for part, prompt_PD in ((same, start_PD), (merged, start_PD[:0])):
            if not part:
                continue
            answers = self.model.generate(
                prompt_PD,
                list(part.values()),
                self.decoding,
                end_ids=self.end_ids,
                batch_size=self.evaluation.batch_size,
                # What is drawn depends on the question alone, not on its neighbors.
                numbers=[int(digest, 16) for digest in part],
            )
            sampled |= zip(part, answers, strict=True)
        return sampled

    def _verify(self, digest: str, sampled: Sequence[Reply]) -> SampledQuestion:
        """Keep the replies to a question that end by themselves and are right."""
        example, scorer = self.questions[digest].example, self.evaluation.scorer
        right = [reply for reply in sampled if scorer.score(reply.text, example.answer) >= 1]
        # The sequencer puts the prefix before every answer again.
        bare = self.sequencer.target.without_prefix
        texts = [bare(reply.text) for reply in right if not reply.cut]
        verified = [text for text in texts if text]
        return SampledQuestion(
            question=digest,
            source=example.source,
            answer=example.answer,
            solutions=tuple(dict.fromkeys(verified)),
            tried=len(sampled),
            right=len(right),
            cut=sum(reply.cut for reply in sampled),
            verified=len(verified),
            sample=sampled[0].text[:_SAMPLE],
        )

    def _choose(self, questions: Mapping[str, SampledQuestion]) -> tuple[list[Example], int, int]:
        """Examples with solutions, the number of their tokens, and how many did not fit."""
        examples, tokens, too_long = [], 0, 0
        for example, digest in zip(self.given, self.digests, strict=True):
            for text in questions[digest].solutions[: self.solutions.keep]:
                solved = replace(example, solution=text)
                try:
                    sequence = self.sequencer(solved)
                except DataError:  # too long: all else was checked with the answer alone
                    too_long += 1
                    continue
                examples.append(solved)
                tokens += len(sequence.targets[sequence.gold])
        return examples, tokens, too_long

    def _say(self, text: str) -> None:
        say(self.report, [text])

    def _digest(self, example: Example) -> str:
        columns = self.sequencer.renderer.template.columns
        texts = [example.columns.get(name, "") for name in sorted(columns)]
        return hashlib.sha256(json.dumps([*texts, example.answer]).encode()).hexdigest()[:32]

    def _conditions(self) -> dict[str, Any]:
        """Everything that decides what is sampled and kept, as plain JSON values."""
        sequencer, scorer = self.sequencer, self.evaluation.scorer
        questions = hashlib.sha256("".join(self.questions).encode()).hexdigest()
        return {
            "model": model_conditions(self.model),
            "prompt": {
                "spans": [span.text for span in sequencer.spans],
                "template": sequencer.renderer.template.as_dict(),
                "answer_prefix": sequencer.target.answer_prefix,
            },
            "decoding": asdict(self.decoding),
            "scorer": {"name": name_of(scorer), **scorer.deciding()},
            "data": {
                "questions": len(self.questions),
                "sha256": questions,
                "truncate": sequencer.truncate,
            },
        }


def model_conditions(model: LanguageModel) -> dict[str, Any]:
    """What of a model decides its replies, as plain JSON values."""
    names = ("name", "revision", "architecture", "dtype", "embedding_digest", "gguf_sha256")
    known = {name: getattr(model.info, name) for name in names}
    return {**known, "weights": weights_digest(model.model)}


def store_at(file: str | None, conditions: Mapping[str, Any]) -> Store:
    """The store of replies made under these conditions; unless named, it is in the cache folder."""
    key = hashlib.sha256(json.dumps({**FORMAT, **conditions}, sort_keys=True).encode())
    name = f"{key.hexdigest()[:16]}.jsonl"
    path = cache_folder() / "solutions" / name if file is None else Path(file)
    return Store.open(path, conditions)


def ask_missing(
    store: Store,
    questions: Sequence[str],
    answer: Callable[[Sequence[str]], Iterable[SampledQuestion]],
    size: int,
    each: str,
    which: str,
    report: Report,
) -> None:
    """Ask the questions that a store lacks, `size` at a time; an interruption keeps the others.

    `each` is what every question gets, and `which` the name of it all, for the progress. Several
    workers share out what any of their stores lacks.
    """
    total, what = len(questions), which.split()[-1]
    own = [digest for digest in questions if digest not in store.questions]
    lacking = set[str]().union(*here().gather({here().rank: own}).values())
    missing = [digest for digest in questions if digest in lacking]
    if not missing:
        say(report, [f"{what} of all {total} questions are taken from {store.path}"])
        return
    known = f"; {store.path} holds those of the others" * (len(missing) < total)
    say(report, [f"{each} for each of {len(missing)} questions{known}"])
    try:
        size *= here().count
        for first in range(0, len(missing), size):
            batch = missing[first : first + size]
            store.add(answer(batch))
            report(scoring(which, total - len(missing) + first + len(batch), total))
    except KeyboardInterrupt:
        held = f"{len(store.questions)} of {total} questions"
        say(report, [f"{store.path} keeps the {what} of {held} for the next run"])
        raise


def _describe(summary: Mapping[str, Any]) -> str:
    left = summary["questions"] - summary["solved"]
    too_long = summary["too_long"]
    return (
        f"{summary['solved']} of {summary['questions']} training questions are solved "
        f"({summary['verified']} of {summary['tried']} replies are right and ended, "
        f"{summary['cut']} were cut); training uses {summary['kept']} solutions of "
        f"{summary['mean_tokens']:.0f} tokens on average"
        + f"; {too_long} solutions do not fit the context" * bool(too_long)
        + f"; {left} questions are left out"
    )
