"""Score the text prompt and the refined prompt on the same rows."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, cast, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, ModelError
from embedgrad.evaluation.answers import AnswerLog
from embedgrad.evaluation.answers import ScoredAnswer as ScoredAnswer
from embedgrad.evaluation.plain_scores import ComparisonScores, Scores
from embedgrad.evaluation.sampled import Sampled, summarize_samples
from embedgrad.evaluation.significance import bootstrap_mean, macro_f1, paired_test, score_interval
from embedgrad.events import Report, part_of, quiet, scoring
from embedgrad.model.backbone import Backbone, Prompt, join_spans
from embedgrad.model.decoding import NOT_FINITE, Decoding, check_stop
from embedgrad.model.generation import Reply
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives.distill import TAUGHT, Taught
from embedgrad.parts.scorers import Exact, Scorer
from embedgrad.prompt.embedding import HoldsPrompt, PromptEmbedding, unwrap
from embedgrad.prompt.images import ImageSequencer
from embedgrad.prompt.joint import JointSequencer
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.report.terminal.bars import show

REPLIES = 200  # at most this many rows with choices are asked for their greedy reply


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """Scores of one prompt; `interval` is 95 %, Wilson's or, of graded scores, a bootstrap's.

    `accuracy` is the mean of `ScoredAnswer.correct`, `log_loss` the mean loss in nats.
    `cut` counts the free answers that did not end by themselves, `unread` those in which the scorer
    finds no answer: failures of form, not of reasoning. `greedy_is_choice` is the share of replies
    to rows with choices that are one of the choices; None where the model was not asked. `sampled`
    sums up sampled answers, where `evaluation.samples` asks for them.
    """

    rows: int
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float | None
    log_loss: float
    cut: int
    unread: int = 0
    greedy_is_choice: float | None = None
    sampled: Sampled | None = None


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two prompts on the same rows.

    `difference` is refined minus text, with its bootstrap interval (95 %, rows resampled in pairs)
    and the `test` and p-value of `paired_test`, McNemar's where answers are right or wrong;
    `fixed` and `broken` are indices of rows whose score rose or fell.
    """

    text: Summary
    refined: Summary
    difference: float
    interval: tuple[float, float]
    test: str
    p_value: float
    fixed: tuple[int, ...]
    broken: tuple[int, ...]
    text_answers: tuple[ScoredAnswer, ...] = field(repr=False)
    refined_answers: tuple[ScoredAnswer, ...] = field(repr=False)

    def as_dict(self) -> ComparisonScores:
        """The part of `result.json` that holds scores."""
        return {
            "text": cast(Scores, asdict(self.text)),
            "refined": cast(Scores, asdict(self.refined)),
            "difference": {
                "accuracy": self.difference,
                "interval": list(self.interval),
                "test": self.test,
                "p_value": self.p_value,
                "fixed": len(self.fixed),
                "broken": len(self.broken),
            },
            "test_rows": self.text.rows,
        }


@final
@dataclass(frozen=True)
class Evaluation:
    """How answers are scored."""

    scorer: Scorer = Exact()
    """When a free answer is right; choices are compared by their log-probabilities."""
    max_new_tokens: Annotated[int, Gt(0)] = 256
    """Longest free answer, in tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a free answer, which is cut before the first of them."""
    batch_size: Annotated[int, Gt(0)] = 32
    """Rows per pass."""
    samples: Annotated[int, Ge(0)] = 0
    """Sampled answers to each test row, scored beside the greedy one (Avg@k); free text only."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Sampling temperature of these."""
    group: str | None = None
    """A column; scores are also given for each of its values. Unset: the objective's."""

    def __post_init__(self) -> None:
        check_stop(self.stop, "evaluation.stop")

    @property
    def decoding(self) -> Decoding:
        """How free answers are decoded: greedily."""
        return Decoding(max_new_tokens=self.max_new_tokens, stop=self.stop)


@final
class Evaluator:
    """Answers rows with a prompt and scores the answers."""

    def __init__(
        self,
        model: Backbone,
        sequencer: Sequencer | JointSequencer | ImageSequencer,
        evaluation: Evaluation = Evaluation(),
    ):
        self.model = model
        self.target: Target = sequencer.target
        self.targets = sequencer.targets if isinstance(sequencer, JointSequencer) else {}
        self.end_ids = (
            model.ends_of(sequencer) if isinstance(model, LanguageModel) else sequencer.end_ids
        )
        self.evaluation = evaluation
        self.lookups = 1 if self.target.choices else 2  # of a row's prefix: decoding, then its loss

    @property
    def greedy(self) -> Evaluator:
        """The same without sampled answers, as for dev rows."""
        other = copy.copy(self)
        other.evaluation = replace(self.evaluation, samples=0)
        return other

    def score_text_prompt(
        self,
        start: Prompt | Tensor,
        sequences: Sequence[TokenSequence],
        report: Report = quiet,
        log: AnswerLog | None = None,
    ) -> list[ScoredAnswer]:
        """The text prompt's answers: start rows, and plain tokens where text merges with them."""
        merged = [i for i, s in enumerate(sequences) if s.plain is not None]
        if not merged:
            return self.score(start, sequences, report, log, "text prompt")
        start_PD = join_spans(start)
        same = [i for i, s in enumerate(sequences) if s.plain is None]
        answers: dict[int, ScoredAnswer] = {}
        for part, rows in ((same, start_PD), (merged, start_PD[:0])):
            batch = [sequences[i].uncut() if part is merged else sequences[i] for i in part]
            part_report = part_of(report, "rows", len(answers), len(sequences))
            of = "merged text" if part is merged else "text prompt"
            answers |= zip(part, self.score(rows, batch, part_report, log, of), strict=True)
        return [answers[i] for i in range(len(sequences))]

    @torch.no_grad()
    def score(
        self,
        prompt: Prompt | Tensor,
        sequences: Sequence[TokenSequence],
        report: Report = quiet,
        log: AnswerLog | None = None,
        of: str = "refined prompt",
    ) -> list[ScoredAnswer]:
        """The answers with a prompt, in the order of `sequences`. Raises `ModelError` for NaN.

        A `log` keeps the answers as those `of` this prompt, and those that it has are not computed.
        """
        if not sequences:
            return []
        answers: dict[int, ScoredAnswer] = {}
        # Rows of like length together, so that little is padding.
        lengths = [len(sequence.prefix) + len(sequence.suffix) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lengths.__getitem__)
        for start in range(0, len(order), self.evaluation.batch_size):
            batch = order[start : start + self.evaluation.batch_size]
            found = log.get(of, start, len(batch)) if log else None
            if found is None:
                found = self._score_batch(prompt, [sequences[i] for i in batch])
                if log:
                    log.add(of, start, found)
            answers |= zip(batch, found, strict=True)
            report(scoring("rows", len(answers), len(sequences)))
        return [answers[i] for i in range(len(sequences))]

    def _score_batch(
        self, prompt: Prompt | Tensor, rows: Sequence[TokenSequence]
    ) -> list[ScoredAnswer]:
        choices = bool(self.target.choices)
        replies = [] if choices else self._write(prompt, rows)
        outcome = self.model.outcome(prompt, rows, choices=choices, normalize=self.target.normalize)
        if outcome.scores_BC.isnan().any():
            raise ModelError(NOT_FINITE)
        shares_BC = torch.softmax(outcome.scores_BC.float(), dim=1).cpu()
        losses = -(outcome.answer_logprobs_B / outcome.answer_tokens_B.clamp(min=1)).cpu()
        return [
            self.choose(row, shares_BC[b], losses[b].item())
            if choices
            else self._free(row.example, replies[b], losses[b].item())
            for b, row in enumerate(rows)
        ]

    def greedy_replies(
        self, prompt: Prompt | Tensor, sequences: Sequence[TokenSequence]
    ) -> list[str]:
        """What the model writes to rows with choices when nothing holds it to them.

        Decoding takes one token more than the longest choice, to see whether the reply ends there.
        """
        longest = max((len(ids) for s in sequences for ids in s.targets), default=0)
        replies = self.model.generate(
            prompt,
            sequences,
            Decoding(max_new_tokens=longest + 1),
            end_ids=self.end_ids,
            batch_size=self.evaluation.batch_size,
        )
        return [reply[0].text.strip() for reply in replies]

    def add_replies(
        self,
        answers: Sequence[ScoredAnswer],
        prompt: Prompt | Tensor,
        sequences: Sequence[TokenSequence],
        log: AnswerLog | None = None,
    ) -> list[ScoredAnswer]:
        """The answers, with the greedy replies to up to `REPLIES` rows spread over them."""
        some, full = reply_rows(len(sequences)), list(answers)
        for start in range(0, len(some), self.evaluation.batch_size):
            batch = some[start : start + self.evaluation.batch_size]
            found = log.get("replies", start, len(batch)) if log else None
            if found is None:
                replies = self.greedy_replies(prompt, [sequences[i] for i in batch])
                found = [replace(full[i], reply=r) for i, r in zip(batch, replies, strict=True)]
                if log:
                    log.add("replies", start, found)
            for i, answer in zip(batch, found, strict=True):
                full[i] = answer
        return full

    def choose(
        self, sequence: TokenSequence, shares_C: Tensor, answer_loss: float | None = None
    ) -> ScoredAnswer:
        """The answer of a row with choices by the choices' probabilities."""
        choices = self.targets.get(sequence.example.task, self.target).choices
        shares_C = shares_C[: len(choices)]  # behind them come those of tasks with more
        best = int(shares_C.argmax())
        taught = sequence.example.extra.get(TAUGHT)
        loss = -math.log(max(shares_C[sequence.gold].item(), 1e-12))
        if isinstance(taught, Taught) and taught.shares_C is not None:
            loss = -(taught.shares_C.exp().to(shares_C) @ shares_C.clamp(min=1e-12).log()).item()
        return ScoredAnswer(
            source=sequence.example.source,
            answer=sequence.example.answer,
            predicted=choices[best],
            correct=float(best == sequence.gold),
            loss=loss,
            probabilities=dict(zip(choices, shares_C.tolist(), strict=True)),
            answer_loss=answer_loss,
        )

    def _write(
        self, prompt: Prompt | Tensor, rows: Sequence[TokenSequence]
    ) -> list[tuple[Reply, ...]]:
        """The greedy answer to each row, and behind it the sampled ones."""
        decoding, samples = self.evaluation.decoding, self.evaluation.samples
        generate = partial(
            self.model.generate,
            prompt,
            rows,
            end_ids=self.end_ids,
            batch_size=self.evaluation.batch_size,
        )
        replies = generate(decoding)
        if not samples:
            return replies
        decoding = replace(decoding, samples=samples, temperature=self.evaluation.temperature)
        # By source, so that a row's draws do not depend on the rows beside it.
        numbers = [zlib.crc32(row.example.source.encode()) for row in rows]
        drawn = generate(decoding, numbers=numbers)
        return [first + more for first, more in zip(replies, drawn, strict=True)]

    def _free(self, example: Example, replies: Sequence[Reply], loss: float) -> ScoredAnswer:
        first, *more = replies
        texts = tuple(reply.text for reply in more)
        scored = ScoredAnswer(
            example.source, example.answer, first.text, 0, loss, None, first.cut, samples=texts
        )
        return score_answer(scored, self.evaluation.scorer)


def reply_rows(rows: int) -> range:
    """The rows with choices whose greedy reply is looked at as well: `REPLIES`, spread over all."""
    return range(0, rows, math.ceil(rows / REPLIES) or 1)


def score_answer(answered: ScoredAnswer, scorer: Scorer) -> ScoredAnswer:
    """A free answer with its score. Raises what the scorer raises."""
    correct = scorer.score(answered.predicted, answered.answer)
    unread = not correct and scorer.is_unread(answered.predicted)
    samples = tuple(scorer.score(text, answered.answer) for text in answered.samples)
    return replace(answered, correct=correct, unread=unread, sample_scores=samples)


def summarize(answered: Sequence[ScoredAnswer], choices: Sequence[str]) -> Summary:
    """Scores of one prompt's answers, with the interval of `score_interval`."""
    scores, predicted = [a.correct for a in answered], [a.predicted for a in answered]
    f1 = macro_f1([a.answer for a in answered], predicted, choices) if choices else None
    texts = {choice.strip() for choice in choices}
    written = [a.reply in texts for a in answered if a.reply is not None]
    return Summary(
        rows=len(answered),
        accuracy=sum(scores) / len(answered),
        interval=score_interval(scores),
        macro_f1=f1,
        log_loss=sum(a.loss for a in answered) / len(answered),
        cut=sum(a.cut for a in answered),
        unread=sum(a.unread for a in answered),
        greedy_is_choice=sum(written) / len(written) if written else None,
        sampled=summarize_samples([a.sample_scores for a in answered]),
    )


def compare_answers(
    text: Sequence[ScoredAnswer], refined: Sequence[ScoredAnswer], choices: Sequence[str]
) -> Comparison:
    """Two prompts' answers to the same rows."""
    differences = [b.correct - a.correct for a, b in zip(text, refined, strict=True)]
    fixed = tuple(i for i, difference in enumerate(differences) if difference > 0)
    broken = tuple(i for i, difference in enumerate(differences) if difference < 0)
    test, p_value = paired_test(differences)
    return Comparison(
        text=summarize(text, choices),
        refined=summarize(refined, choices),
        difference=sum(differences) / len(differences),
        interval=bootstrap_mean(differences),
        test=test,
        p_value=p_value,
        fixed=fixed,
        broken=broken,
        text_answers=tuple(text),
        refined_answers=tuple(refined),
    )


def evaluate(
    evaluator: Evaluator,
    prompt: PromptEmbedding | HoldsPrompt,
    sequences: Sequence[TokenSequence],
    report: Report = show,
    log: AnswerLog | None = None,
) -> Comparison:
    """Score a prompt's text and its refined rows on the same examples.

    `report` gets which prompt is being scored, rows done, and rows in all. A `log` holds the
    answers so far, which a resumed scoring does not repeat. Raises `DataError` where there are
    no rows.
    """
    if not sequences:
        raise DataError("no rows to score; give at least one example")
    prompt = unwrap(prompt)
    # Rows that dev left as they were need no second pass; merged text is other tokens.
    kept = torch.equal(prompt.rows, prompt.start_rows) and all(s.plain is None for s in sequences)
    prefixes = [sequence.prefix for sequence in sequences]
    if isinstance(evaluator.model, LanguageModel):
        again = [prefixes[i] for i in reply_rows(len(prefixes)) if evaluator.target.choices]
        evaluator.model.prefix_cache.expect(
            (prefixes, (1 if kept else 2) * evaluator.lookups), (again, 1)
        )
    text = refined = evaluator.score_text_prompt(
        prompt.start_rows, sequences, part_of(report, "text prompt", 0, len(sequences)), log
    )
    if not kept:
        own = part_of(report, "refined prompt", 0, len(sequences))
        refined = evaluator.score(prompt.rows, sequences, own, log)
    if evaluator.target.choices and isinstance(evaluator.model, LanguageModel):
        refined = evaluator.add_replies(refined, prompt.rows, sequences, log)
        text = refined if kept else text
    return compare_answers(text, refined, evaluator.target.choices)
