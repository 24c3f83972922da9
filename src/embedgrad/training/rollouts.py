"""Rollouts: the model's own answers to a batch of questions, to train on.

    rows + questions -> answers -> rewards -> advantages -> sequences whose targets are the answers

What is drawn depends on the rows, the seed, the step and the question, and on nothing else, so that
a resumed run draws the same answers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

import torch

from embedgrad.errors import DataError, ModelError
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.events import Report, quiet, say
from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.model.decoding import Decoding, Generation
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import Sampling
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.engine import LARGE, Engine, SamplingEngine, mismatch

PATIENCE = 3  # steps in a row that may find no question to learn from
_SHOWN = 80  # characters of an answer in a message


@final
@dataclass(frozen=True)
class Group:
    """All answers to one question, and what of them may be trained on, with its rewards."""

    question: TokenSequence
    answers: Sequence[Generation]
    kept: Sequence[Generation]
    rewards: Sequence[float]

    @property
    def is_alive(self) -> bool:
        """Whether some answers are better than others."""
        return len(self.rewards) > 1 and max(self.rewards) > min(self.rewards)

    def sequences(self) -> list[TokenSequence]:
        """The answers as targets, to the last token drawn."""
        return [
            replace(
                self.question,
                targets=((*answer.ids, *answer.end),),
                gold=0,
                inputs=None,
                reasoning=0,
                end=(),
            )
            for answer in self.kept
        ]


@final
class Rollouts:
    """Draws answers to the questions of each batch.

    Within `reference` the model is the one that `start` is a prompt of: the same, where training
    moves nothing but the prompt.
    """

    def __init__(
        self,
        model: Backbone,
        evaluator: Evaluator,
        train: Sequence[TokenSequence],
        sampling: Sampling,
        by: SamplingEngine = SamplingEngine(),
        *,
        seed: int,
        start: Prompt,
        reference: Callable[[], AbstractContextManager[Any]] = nullcontext,
        report: Report = quiet,
    ):
        if not isinstance(model, LanguageModel):
            raise ModelError("objective: sampled answers need a causal language model")
        self.model, self.evaluator, self.sampling = model, evaluator, sampling
        self.train, self.seed, self.start, self.reference = train, seed, start, reference
        self.engine = Engine(by) if by.engine else None
        self.report, self.warned = report, False
        self.numbers = {id(s.example): i for i, s in enumerate(train)}
        evaluation, limit = evaluator.evaluation, sampling.max_new_tokens
        if limit is None and evaluator.target.choices:
            limit = 1 + max(len(ids) for s in train for ids in s.targets)
        self.decoding = Decoding(
            max_new_tokens=limit or evaluation.max_new_tokens,
            temperature=sampling.temperature,
            samples=sampling.samples,
            stop=evaluation.stop,
            seed=seed,
        )
        self.dead = dict[str, Any]()  # counts since the last step with a group alive, plain JSON

    @torch.no_grad()
    def draw(
        self, prompt: Prompt, batch: Sequence[TokenSequence], step: int
    ) -> tuple[list[TokenSequence], dict[str, float]]:
        """Answers to train on, as sequences, and figures for people.

        `batch` are the questions; the answers' advantages are in `Example.extra`. There are none
        where no question has answers that differ in their reward. Raises `DataError` where that is
        so for the last of several steps, and what the scorer raises.
        """
        began = time.perf_counter()
        further, groups = self._further(batch, step), list[Group]()
        asked, most = list(batch), len(batch) * self.sampling.tries
        alive = list[Group]()
        while asked:
            new = self._answer(prompt, asked, step)
            groups += new
            alive += [group for group in new if group.is_alive or not self.sampling.scored]
            missing = min(len(batch) - len(alive), most - len(groups))
            asked = list(islice(further, missing))
        if not alive:
            self._note_dead(groups, step)
        else:
            self.dead = {}
        figures = self._figures(groups, time.perf_counter() - began)
        sequences, differs = self._sequences(prompt, alive)
        self._warn(differs, step)
        return sequences, figures | differs

    @torch.no_grad()
    def try_engine(self) -> str:
        """Let the engine write to one question, and say how far it is from us.

        Raises `EngineError` where it cannot.
        """
        assert self.engine
        question, decoding = self.train[0], replace(self.decoding, samples=1)
        ((answer,),) = self.engine.sample(
            *(self.model, self.start, [question], decoding),
            end_ids=self.evaluator.end_ids,
            numbers=[0],
        )
        ours = self._token_logprobs(self.start, Group(question, [answer], [answer], []).sequences())
        _, differs = mismatch(ours, [answer.logprobs], self.engine.settings.most_weight)
        return (
            f"{self.engine.url} samples the answers; its log-probabilities differ from ours by "
            f"{differs['mismatch']:.3f} nats a token with the words' own rows"
        )

    def _sequences(
        self, prompt: Prompt, groups: Sequence[Group]
    ) -> tuple[list[TokenSequence], dict[str, float]]:
        """The groups' answers, with what the objective wants to know of each; and `mismatch`."""
        sampling = self.sampling
        sequences = [s for group in groups for s in group.sequences()]
        rewards = [reward for group in groups for reward in group.rewards]
        extras = list[dict[str, Any]]({} for _ in sequences)
        differs = dict[str, float]()
        if sampling.kl or sampling.updates > 1 or self.engine:
            old = self._token_logprobs(prompt, sequences)
            extras = [{"old_logprobs": line} for line in old]
            if sampling.kl:
                with self.reference():
                    start = self._token_logprobs(self.start, sequences)
                for i, (now, then) in enumerate(zip(old, start, strict=True)):
                    rewards[i] -= sampling.kl * (sum(now) - sum(then))
            if self.engine and old:
                theirs = [answer.logprobs for group in groups for answer in group.kept]
                weights, differs = mismatch(old, theirs, self.engine.settings.most_weight)
                extras = [{**e, "weights": w} for e, w in zip(extras, weights, strict=True)]
        if sampling.scored:
            left = iter(rewards)
            advantages = [
                advantage
                for group in groups
                for advantage in leave_one_out(list(islice(left, len(group.kept))))
            ]
            extras = [{**e, "advantage": a} for e, a in zip(extras, advantages, strict=True)]
        return [
            replace(sequence, example=sequence.example.with_extra(**extra))
            for sequence, extra in zip(sequences, extras, strict=True)
        ], differs

    def _token_logprobs(
        self, prompt: Prompt, sequences: Sequence[TokenSequence]
    ) -> list[list[float]]:
        """Log-probability of every token of the sequences' targets."""
        lines, size = list[list[float]](), self.evaluator.evaluation.batch_size
        for first in range(0, len(sequences), size):
            some = sequences[first : first + size]
            read = [[(token,) for token in s.targets[0]] for s in some]
            outcome = self.model.outcome(prompt, some, choices=False, read=read)
            assert outcome.token_logprobs_BTK is not None
            found = outcome.token_logprobs_BTK[:, :, 0].tolist()
            lines += [line[: len(ids)] for line, ids in zip(found, read, strict=True)]
        return lines

    def _further(self, batch: Sequence[TokenSequence], step: int) -> Iterator[TokenSequence]:
        """Other questions, in an order of the step's own."""
        order = list(range(len(self.train)))
        random.Random(f"{self.seed}:{step}:more").shuffle(order)
        taken = {id(s.example) for s in batch}
        return (self.train[i] for i in order if id(self.train[i].example) not in taken)

    def _answer(self, prompt: Prompt, questions: Sequence[TokenSequence], step: int) -> list[Group]:
        asked: Any = (prompt, questions, self.decoding)
        options: dict[str, Any] = {
            "end_ids": self.evaluator.end_ids,
            "numbers": [step * len(self.train) + self.numbers[id(s.example)] for s in questions],
        }
        if self.engine:
            drawn = self.engine.sample(self.model, *asked, **options)
        else:
            size = self.evaluator.evaluation.batch_size
            drawn = self.model.sample(*asked, **options, batch_size=size)
        groups = []
        for question, answers in zip(questions, drawn, strict=True):
            kept = [a for a in answers if a.ended or not self.sampling.drop_cut]
            rewards = [self._reward(question, answer) for answer in kept]
            if self.sampling.random:
                number = self.numbers[id(question.example)]
                coin = random.Random(f"{self.seed}:{step}:{number}:coin")
                rewards = [float(coin.random() < 0.5) for _ in kept]
            groups.append(Group(question, answers, kept, rewards))
        return groups

    def _reward(self, question: TokenSequence, answer: Generation) -> float:
        if not (self.sampling.scored and answer.ended):
            return 0.0
        right = question.example.answer
        target = self.evaluator.target
        if target.choices:
            return float(target.without_prefix(answer.text) == right.strip())
        return self.evaluator.evaluation.scorer.score(answer.text, right)

    def _warn(self, differs: dict[str, float], step: int) -> None:
        """Tell once that the engine is far from us."""
        if not self.warned and differs.get("mismatch", 0.0) > LARGE:
            self.warned = True
            say(
                self.report,
                [
                    f"step {step + 1}: the engine's log-probabilities differ from ours by "
                    f"{differs['mismatch']:.2f} nats a token: it must have the same weights in "
                    "nearly the same precision, and report log-probabilities before temperature "
                    "(vLLM's --logprobs-mode raw_logprobs)"
                ],
            )

    def _note_dead(self, groups: Sequence[Group], step: int) -> None:
        """Count a step without a group alive; raise `DataError` for the last of several."""
        answers = [answer for group in groups for answer in group.answers]
        counts = {
            "steps": 1,
            "questions": len(groups),
            "answers": len(answers),
            "right": sum(reward > 0 for group in groups for reward in group.rewards),
            "cut": sum(not answer.ended for answer in answers),
        }
        counts = {name: count + self.dead.get(name, 0) for name, count in counts.items()}
        self.dead = {"begins": answers[0].text[:_SHOWN], **self.dead, **counts}
        if self.dead["steps"] < PATIENCE:
            return
        advice = (
            "the questions are too easy: take harder ones, or a stricter evaluation.scorer"
            if counts["right"] > counts["answers"] / 2
            else "try more objective.samples, a higher objective.temperature or objective.tries, a "
            "larger objective.max_new_tokens if answers are cut, an easier evaluation.scorer, or "
            "start from rows that were trained on solutions"
        )
        raise DataError(
            f"step {step + 1}: none of {counts['questions']} questions in {PATIENCE} steps has "
            f"answers that differ in their reward ({counts['right']} of {counts['answers']} are "
            f"right, {counts['cut']} were cut at {self.decoding.max_new_tokens} tokens, one begins "
            f"{self.dead['begins']!r}), so there is nothing to learn from; {advice}"
        )

    def _figures(self, groups: Sequence[Group], seconds: float) -> dict[str, float]:
        """What people watch, over all answers that were drawn for a step."""
        answers = [answer for group in groups for answer in group.answers]
        rewards = [reward for group in groups for reward in group.rewards]
        figures = {
            "answers": len(answers),
            "answers_cut": sum(not answer.ended for answer in answers) / len(answers),
            "answer_tokens": sum(len(a.ids) + len(a.end) for a in answers) / len(answers),
            "answers_per_second": len(answers) / max(seconds, 1e-9),
        }
        if self.sampling.scored:
            figures["reward"] = sum(rewards) / max(len(rewards), 1)
            figures["groups_alive"] = sum(group.is_alive for group in groups) / len(groups)
        return figures


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the others (RLOO)."""
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]
