"""The model's own solutions, by rejection sampling.

    question -> text prompt -> k samples -> those that end, with the right answer -> training

After STaR (Zelikman et al. 2022, arXiv:2203.14465), without its hints, and the rejection sampling
of RFT (Yuan et al. 2023, arXiv:2308.01825): the frozen model's text is what it can write itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.examples import Example
from embedgrad.errors import DataError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.events import Report, nowhere, say, stage
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import Reply, replies
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.gguf_conversion import cache_folder
from embedgrad.model.loading.info import weights_digest
from embedgrad.parts.scorers import name_of
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Sequencer
from embedgrad.training.self_training.settings import Solutions, source_of
from embedgrad.training.self_training.store import Solved, Store

_SAMPLE = 200  # characters of a reply to show
_LIMIT_MATTERS = 0.25  # share of replies cut from which a longer limit is worth trying


def training_examples(
    model: LanguageModel,
    sequencer: Sequencer,
    examples: Sequence[Example],
    solutions: Solutions = Solutions(),
    *,
    evaluation: Evaluation = Evaluation(),
    report: Report = nowhere,
    keep_at: Path | None = None,
) -> tuple[list[Example], dict[str, Any]]:
    """The examples with what the model shall write, and what is to be said of it (plain JSON).

    Questions without a verified solution are left out, and a question may stand there with several.
    What was sampled before, by these settings, is read from its file; `keep_at` gets a copy. Raises
    `DataError` where no solution is verified, the file does not fit, or the settings make no sense.
    """
    source = source_of(solutions, examples, sequencer.target, evaluation.scorer)
    if source == "self-written":
        writing = _Writing(model, sequencer, examples, solutions, evaluation, report)
        return writing.examples(keep_at)
    made = list(examples)
    if source == "answer":
        check_answers(examples, sequencer.target, evaluation.scorer)
        made = [replace(example, solution=None) for example in examples]
    return made, {"source": source, "questions": len(made), "kept": len(made)}


class _Writing:
    """The names that the steps of one writing share."""

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
        # A copy: rows that it truncates are counted once, when they are built for training.
        self.model, self.sequencer = model, copy.copy(sequencer)
        self.solutions, self.evaluation, self.report = solutions, evaluation, report
        self.end_ids = Evaluator(model, sequencer, evaluation).end_ids
        self.rows = list(examples)
        self.digests = [self._digest(example) for example in examples]
        bare = [replace(example, solution=None) for example in examples]
        # Equal questions are asked once. The order is that of no data split or seed.
        built = zip(self.digests, self.sequencer.build(bare), strict=True)
        self.questions = dict(sorted(dict(built).items(), key=lambda pair: pair[0]))
        self.decoding = Decoding(
            max_new_tokens=solutions.max_new_tokens or evaluation.max_new_tokens,
            temperature=solutions.temperature,
            top_p=solutions.top_p,
            samples=solutions.samples,
            stop=evaluation.stop,
            seed=solutions.seed,
        )

    def examples(self, keep_at: Path | None) -> tuple[list[Example], dict[str, Any]]:
        """Sample what no file holds yet, and choose what to train on."""
        made_by = self._made_by()
        path = Path(self.solutions.file or _cached(made_by))
        store = Store.open(path, made_by)
        sampled = self._sample(store)
        if keep_at is not None:
            write_file(keep_at, store.content())
        solved = {question: store.solved[question] for question in self.questions}
        counts = {
            name: sum(getattr(entry, name) for entry in solved.values())
            for name in ("tried", "right", "verified", "cut")
        }
        if not counts["verified"]:
            raise DataError(self._nothing(solved, counts))
        examples, tokens, too_long = self._chosen(solved)
        if not examples:
            raise DataError(
                f"none of {too_long} verified solutions fits into the model's "
                f"{self.sequencer.context} tokens with its question; shorten the template, or set "
                "solutions.source = 'answer'"
            )
        told = {
            "source": "self-written",
            "questions": len(self.rows),
            "solved": sum(bool(solved[digest].solutions) for digest in self.digests),
            "kept": len(examples),
            "too_long": too_long,
            "mean_tokens": tokens / len(examples),
            **counts,
            "sampled_questions": sampled,
            "file": str(path),
            "sha256": hashlib.sha256(store.content()).hexdigest(),
        }
        self._say(_summary(told))
        return examples, told

    # -- sampling ------------------------------------------------------------------------------

    def _sample(self, store: Store) -> int:
        """Let the model write what is missing; returns of how many questions."""
        each, total = self.decoding.samples, len(self.questions)
        missing = [question for question in self.questions if question not in store.solved]
        if not missing:
            self._say(f"solutions of all {total} questions are taken from {store.path}")
            return 0
        stage(self.report, "writing solutions with the text prompt")
        known = f"; {store.path} holds those of the others" * (len(missing) < total)
        self._say(f"{each} solutions for each of {len(missing)} questions{known}")
        start_PD = self.model.embed(self.sequencer.prompt_ids)
        size = max(1, self.evaluation.batch_size // each)
        try:
            for first in range(0, len(missing), size):
                batch = missing[first : first + size]
                made = self._replies(start_PD, batch)
                store.add(self._solved(question, made[question]) for question in batch)
                done = total - len(missing) + first + len(batch)
                which = "self-written solutions"
                self.report({"event": "scoring", "which": which, "done": done, "total": total})
        except KeyboardInterrupt:
            held = f"{len(store.solved)} of {total} questions"
            self._say(f"{store.path} keeps the solutions of {held} for the next run")
            raise
        return len(missing)

    def _replies(self, start_PD: Tensor, batch: Sequence[str]) -> dict[str, tuple[Reply, ...]]:
        """The text prompt's samples: by plain tokens where a row's text merges with the prompt."""
        made: dict[str, tuple[Reply, ...]] = {}
        sequences = [self.questions[question] for question in batch]
        pairs = list(zip(batch, sequences, strict=True))
        same = {question: s for question, s in pairs if s.plain is None}
        merged = {question: s.uncut() for question, s in pairs if s.plain is not None}
        for part, rows in ((same, start_PD), (merged, start_PD[:0])):
            if not part:
                continue
            new = replies(
                self.model,
                rows,
                list(part.values()),
                self.decoding,
                end_ids=self.end_ids,
                batch_size=self.evaluation.batch_size,
                # What is drawn depends on the question and not on those beside it.
                numbers=[int(question, 16) for question in part],
            )
            made |= zip(part, new, strict=True)
        return made

    def _solved(self, question: str, made: Sequence[Reply]) -> Solved:
        """What of the replies to a question can be trained on."""
        example = self.questions[question].example
        scorer = self.evaluation.scorer
        right = [reply for reply in made if scorer.score(reply.text, example.answer) >= 1]
        ended = [self._target(reply.text) for reply in right if not reply.cut]
        verified = [text for text in ended if text]
        return Solved(
            question=question,
            source=example.source,
            answer=example.answer,
            solutions=tuple(dict.fromkeys(verified)),
            tried=len(made),
            right=len(right),
            cut=sum(reply.cut for reply in made),
            verified=len(verified),
            sample=made[0].text[:_SAMPLE],
        )

    def _target(self, text: str) -> str:
        """The reply as a target: without what the sequencer puts before every answer."""
        return (
            text.strip().removeprefix((self.sequencer.target.answer_prefix or "").strip()).strip()
        )

    # -- what comes out ------------------------------------------------------------------------

    def _chosen(self, solved: Mapping[str, Solved]) -> tuple[list[Example], int, int]:
        """Examples with solutions, the tokens of these, and how many did not fit."""
        examples, tokens, too_long = [], 0, 0
        for example, digest in zip(self.rows, self.digests, strict=True):
            kept = solved[digest].solutions[: self.solutions.keep]
            for made in (replace(example, solution=text) for text in kept):
                try:
                    sequence = self.sequencer(made)
                except DataError:  # too long: all else was checked with the answer alone
                    too_long += 1
                    continue
                examples.append(made)
                tokens += len(sequence.targets[sequence.gold])
        return examples, tokens, too_long

    def _nothing(self, solved: Mapping[str, Solved], counts: Mapping[str, int]) -> str:
        tried, cut, limit = counts["tried"], counts["cut"], self.decoding.max_new_tokens
        name = "solutions" if self.solutions.max_new_tokens else "evaluation"
        longer = f"a larger {name}.max_new_tokens, " * (cut >= _LIMIT_MATTERS * tried)
        scorer, sample = name_of(self.evaluation.scorer), next(iter(solved.values())).sample
        return (
            f"no self-written solution was verified: of {tried} replies to {len(solved)} questions "
            f"{counts['right']} have the right answer by evaluation.scorer = {scorer!r}, "
            f"{cut} were cut at {limit} tokens, none is right and ended (one begins {sample!r}); "
            f"try {longer}more solutions.samples, a higher solutions.temperature, another scorer, "
            "or solutions.source = 'answer'"
        )

    def _say(self, text: str) -> None:
        say(self.report, [text])

    # -- what decides the solutions ------------------------------------------------------------

    def _digest(self, example: Example) -> str:
        columns = self.sequencer.renderer.template.columns
        texts = [example.columns.get(name, "") for name in sorted(columns)]
        return hashlib.sha256(json.dumps([*texts, example.answer]).encode()).hexdigest()[:32]

    def _made_by(self) -> dict[str, Any]:
        """Everything that decides what is written and kept, as plain JSON values."""
        info, sequencer, scorer = self.model.info, self.sequencer, self.evaluation.scorer
        names = ("name", "revision", "architecture", "dtype", "embedding_digest", "gguf_sha256")
        questions = hashlib.sha256("".join(self.questions).encode()).hexdigest()
        return {
            "model": {
                **{name: getattr(info, name) for name in names},
                "weights": weights_digest(self.model.model),
            },
            "prompt": {
                "text": [span.text for span in sequencer.spans],
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


def _cached(made_by: Mapping[str, Any]) -> Path:
    """A file in the cache folder; a fine-tuned model of the same name gets one of its own."""
    weights = made_by["model"]["weights"]
    model = {name: value for name, value in made_by["model"].items() if name != "weights"}
    named = {**made_by, "model": model}
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "solutions" / f"{key}.jsonl"
    if Store.weights_of(path) in (None, weights):
        return path
    return path.with_stem(f"{key}-{weights.removeprefix('sha256:')[:8]}")


def _summary(told: Mapping[str, Any]) -> str:
    left = told["questions"] - told["solved"]
    too_long = f"; {told['too_long']} solutions do not fit the context" * bool(told["too_long"])
    return (
        f"{told['solved']} of {told['questions']} training questions are solved "
        f"({told['verified']} of {told['tried']} replies are right and ended, {told['cut']} were "
        f"cut); trained on {told['kept']} solutions of {told['mean_tokens']:.0f} tokens on average"
        f"{too_long}; {left} questions are left out"
    )
