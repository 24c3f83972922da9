"""Teachers: the frozen model with another prompt, for a student.

query -> teacher's prompt -> its answer, and what it finds likely in each place -> training
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedgrad.atomic_files import write_file
from embedgrad.data.examples import Example
from embedgrad.errors import DataError, TemplateError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, ScoredAnswer, score_answer
from embedgrad.events import Report, part_of, quiet, scoring, stage
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.decoding import Decoding
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.likeliest import likeliest_tokens
from embedgrad.parts.objectives.distill import TAUGHT, Distill, Taught
from embedgrad.parts.parameterizations import Free
from embedgrad.prompt.boundaries import CuttingTokenizer, alike
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Renderer, Template
from embedgrad.training.loss import Loss
from embedgrad.training.self_training.sampling import ask_missing, model_conditions, store_at
from embedgrad.training.self_training.store import SampledQuestion
from embedgrad.training.settings import Parts

NAME = "the teacher's answers"


@final
@dataclass(frozen=True)
class Teaching:
    """The same frozen model with another prompt, whose answers are learned."""

    template: Template | None = None
    """What the teacher reads: as [template], but without words to refine."""
    prompt: str | None = None
    """Instead of a template, a refined prompt: a run's folder or a saved prompt's."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature of its free answers to train on; 0: greedy."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Each token is drawn from the most likely ones that together have this probability."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the sampling."""
    max_new_tokens: Annotated[int, Gt(0)] | None = None
    """Longest answer, in tokens; unset: evaluation.max_new_tokens."""
    margin: Annotated[float, Gt(0), Lt(1)] = 0.05
    """How much worse than the teacher the refined prompt may be on test rows, as a share of them,
    to count as not inferior; fixed before the run."""


@final
class Teacher:
    """Answers a student's rows, and says what it finds likely in their places.

    `refined` is the prompt of `teaching.prompt`. Raises `TemplateError` for a template that the
    model's chat template refuses, and `DataError` for rows that do not fit the context.
    """

    def __init__(
        self,
        model: LanguageModel,
        student: Sequencer,
        teaching: Teaching,
        objective: Distill,
        *,
        refined: PromptEmbedding | None = None,
        evaluation: Evaluation = Evaluation(),
        report: Report = quiet,
    ):
        # A copy: examples that it truncates are counted once, when training tokenizes them.
        self.model, self.student, self.teaching = model, copy.copy(student), teaching
        self.evaluation, self.report = evaluation, report
        self.evaluator = Evaluator(model, student, evaluation)
        self._objective = objective
        if refined is None:
            assert teaching.template is not None
            self.template = teaching.template
            self.rows_PD = model.embed(())
            self._read = _reader(self.template, student)
        else:
            self.template = refined.template
            self.rows_PD = refined.rows.to(model.embed(()))
            self._read = model.sequencer(
                refined.template, student.target, spans=refined.spans, date=refined.date
            )

    def context(self, student: TokenSequence, room: int = 0) -> TokenSequence:
        """What the teacher reads instead of a student's row, with the same answers behind it.

        Raises `DataError` where these, or others of up to `room` tokens, do not fit the context.
        """
        example = student.example
        try:
            own = self._read(replace(example, solution=None))
        except TemplateError as error:
            raise TemplateError(f"teacher.template: {error}") from None
        own = replace(own, example=example, plain=None, reasoning=student.reasoning)
        own = replace(own, targets=student.targets, gold=student.gold, end=student.end)
        longest = max(room, *map(len, student.targets))
        length, context = own.length(len(self.rows_PD)) + longest, self.model.info.context
        if context and length > context:
            raise DataError(
                f"{example.source}: {length} tokens with the teacher's prompt, but the model takes "
                f"{context}; shorten the teacher's prompt or the row, or drop the row"
                + f", or set objective.max_new_tokens below {room}"
                * bool(room)
            )
        return own

    def answer_train(
        self, examples: Sequence[Example], keep_at: Path | None = None
    ) -> tuple[list[Example], dict[str, Any]]:
        """The training examples with the teacher's answers, and where these come from (JSON).

        Free answers are read from a file where an earlier run wrote them under the same conditions,
        and `keep_at` gets a copy. Answers that were cut are left out. Raises `DataError` where
        nothing is left. Where the student is to write the answers itself, there are none.
        """
        summary: dict[str, Any] = {"source": "teacher", "questions": len(examples)}
        if sampling := self._objective.sampling:
            bare = [replace(example, answer="", solution=None) for example in examples]
            room = sampling.max_new_tokens or self.evaluation.max_new_tokens
            for example in bare:
                self.context(self.student(example), room)
            return bare, {**summary, "source": "student"}
        if self.student.target.choices:
            answered = self.label(examples)
            return answered, {**summary, "kept": len(answered)}
        teaching = self.teaching
        decoding = replace(
            self._greedy,
            temperature=teaching.temperature,
            top_p=teaching.top_p,
            seed=teaching.seed,
        )
        path, written = self._write(examples, decoding, keep_at)
        kept = [
            replace(example, answer=entry.solutions[0], solution=None)
            for example, entry in zip(examples, written, strict=True)
            if not entry.cut and entry.solutions
        ]
        if not kept:
            raise DataError(
                f"the teacher ended none of its {len(examples)} answers within "
                f"{decoding.max_new_tokens} tokens (one begins {written[0].sample!r}); set a "
                "larger teacher.max_new_tokens, or ask for a short answer in its prompt"
            )
        cut = sum(entry.cut for entry in written)
        return kept, {**summary, "kept": len(kept), "cut": cut, "file": str(path)}

    def label(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with the teacher's greedy answers or likeliest choices as the right ones."""
        answers = self.score([replace(e, answer="", solution=None) for e in examples])
        return [
            replace(example, answer=answer.predicted, solution=None)
            for example, answer in zip(examples, answers, strict=True)
        ]

    def score(self, examples: Sequence[Example]) -> list[ScoredAnswer]:
        """The teacher's own answers, as an `Evaluator` scores them; of free ones without a loss."""
        if self.student.target.choices:
            contexts = [self.context(self.student(example)) for example in examples]
            report = part_of(self.report, NAME, 0, len(contexts))
            return self.evaluator.score(self.rows_PD, contexts, report)
        _, written = self._write(examples, self._greedy)
        return [
            score_answer(
                ScoredAnswer(e.source, e.answer, w.sample, 0, 0.0, None, bool(w.cut)),
                self.evaluation.scorer,
            )
            for e, w in zip(examples, written, strict=True)
        ]

    @torch.no_grad()
    def teach(
        self, students: Sequence[TokenSequence], prompt: Prompt | None = None
    ) -> list[TokenSequence]:
        """The rows with what the teacher finds likely in the places of their answers.

        Compares the teacher's likeliest tokens one by one; with `prompt`, the student's likeliest.
        """
        contexts = [self.context(student) for student in students]
        asked = (self.rows_PD, contexts) if prompt is None else (join_spans(prompt), students)
        likeliest = likeliest_tokens(self.model, *asked, self._objective.top)
        with_ids = [
            _with(context, Taught(ids, torch.empty(0)))
            for context, ids in zip(contexts, likeliest, strict=True)
        ]
        # Read as training reads the student, so that equal prompts are equally likely to the bit.
        loss, theta = _loss_at(self.model, self.student, self._objective, self.rows_PD)
        taught: list[Taught] = []
        size = self.evaluation.batch_size
        for first in range(0, len(with_ids), size):
            batch = with_ids[first : first + size]
            outcome = loss.outcome(theta, batch)
            assert outcome.token_logprobs_BTK is not None
            for b, context in enumerate(batch):
                ids = self._objective.tokens_to_read(context)
                shares_C = None
                if self.student.target.choices:
                    scores_C = outcome.scores_BC[b, : len(context.targets)]
                    shares_C = torch.log_softmax(scores_C, dim=0)
                ends = outcome.end_logprobs_B
                end = None if ends is None else ends[b].item()
                logprobs_TK = outcome.token_logprobs_BTK[b, : len(ids)]
                taught.append(Taught(tuple(ids), logprobs_TK, shares_C, end))
            if prompt is None:  # else it is a part of a step
                self.report(scoring("what the teacher finds likely", len(taught), len(students)))
        return [_with(student, said) for student, said in zip(students, taught, strict=True)]

    @torch.no_grad()
    def divergence(self, prompt_PD: Tensor, taught: Sequence[TokenSequence]) -> float:
        """The mean KL(teacher || student) of a prompt on rows that `teach` gave.

        In nats per token, and per choice.
        """
        forward = replace(self._objective, direction="forward")
        loss, theta = _loss_at(self.model, self.student, forward, prompt_PD)
        size, total = self.evaluation.batch_size, 0.0
        for first in range(0, len(taught), size):
            total += loss(theta, taught[first : first + size]).sum().item()
        return total / len(taught)

    @property
    def _greedy(self) -> Decoding:
        limit = self.teaching.max_new_tokens or self.evaluation.max_new_tokens
        return replace(self.evaluation.decoding, max_new_tokens=limit)

    def _write(
        self, examples: Sequence[Example], decoding: Decoding, keep_at: Path | None = None
    ) -> tuple[Path, list[SampledQuestion]]:
        """The teacher's free answers, from their file or written now."""
        bare = [replace(example, answer="", solution=None) for example in examples]
        digests = [self._digest(example) for example in bare]
        unique = dict(zip(digests, bare, strict=True))
        contexts = {digest: self.context(self.student(unique[digest])) for digest in sorted(unique)}
        conditions = {
            "model": model_conditions(self.model),
            "teacher": {
                "template": self.template.as_dict(),
                "rows": hashlib.sha256(self.rows_PD.cpu().numpy().tobytes()).hexdigest(),
            },
            "target": asdict(self.student.target),
            "decoding": asdict(decoding),
            "data": {"sha256": hashlib.sha256("".join(contexts).encode()).hexdigest()},
        }
        store = store_at(None, conditions)

        def write(batch: Sequence[str]) -> Iterator[SampledQuestion]:
            written = self.model.generate(
                self.rows_PD,
                [contexts[digest] for digest in batch],
                decoding,
                end_ids=self.evaluator.end_ids,
                batch_size=self.evaluation.batch_size,
                numbers=[int(digest, 16) for digest in batch],
            )
            for digest, (reply,) in zip(batch, written, strict=True):
                text = self.student.target.without_prefix(reply.text)
                yield SampledQuestion(
                    question=digest,
                    source=contexts[digest].example.source,
                    answer="",
                    solutions=(text,) if text else (),
                    tried=1,
                    right=0,
                    cut=int(reply.cut),
                    verified=0,
                    sample=text,
                )

        if any(digest not in store.questions for digest in contexts):
            stage(self.report, "asking the teacher")
        ask_missing(
            store, list(contexts), write, self.evaluation.batch_size, "1 answer", NAME, self.report
        )
        if keep_at is not None:
            write_file(keep_at, store.content())
        return store.path, [store.questions[digest] for digest in digests]

    def _digest(self, example: Example) -> str:
        texts = [example.columns.get(name, "") for name in sorted(self.template.columns)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def _reader(template: Template, student: Sequencer) -> Callable[[Example], TokenSequence]:
    """Reads an example with a template that has no rows of its own; what all share comes first."""
    renderer = Renderer(template, student.tokenizer, date=student.renderer.date)
    cutting = CuttingTokenizer(student.tokenizer, adds_bos=template.text is not None)
    fillings = [cutting.plain(renderer(dict.fromkeys(template.columns, x)).text) for x in "ab"]
    shared = alike(*fillings)

    def read(example: Example) -> TokenSequence:
        ids = cutting.plain(renderer(example.columns).text)
        first = min(alike(ids, fillings[0][:shared]), len(ids) - 1)
        return TokenSequence(ids[:first], ids[first:], (), 0, None, example)

    return read


def _loss_at(
    model: LanguageModel, student: Sequencer, objective: Distill, prompt_PD: Tensor
) -> tuple[Loss, dict[str, Tensor]]:
    """The objective of a prompt, and the theta at which it is this prompt."""
    start = {"prompt": prompt_PD}
    theta = Free().init(start, torch.Generator())
    return Loss(model, Parts(objective=objective), student.target, start), theta


def _with(sequence: TokenSequence, taught: Taught) -> TokenSequence:
    return replace(sequence, example=sequence.example.with_extra(**{TAUGHT: taught}))
