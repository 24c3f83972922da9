"""Engines that compute in this process, with a `transformers` model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Engine, Query
from embedgrad.model.decoding import before_end
from embedgrad.model.loading.quiet import silence_libraries
from embedgrad.prompt.boundaries import Ids

EXACT = 1e-4  # natural log-probability, in float32
BATCH = 8  # answers that are generated side by side


class LocalEngine(Engine):
    """Computes log-probabilities one query at a time, so that nothing is padded.

    A subclass knows what comes before an answer, and runs the model on it.
    """

    tolerance: float | None = EXACT
    model: Any

    def __init__(self, job: Job, exported: ExportedPrompt):
        self.exported = exported
        self.end_ids = job.model.ends_of(exported.sequencer)
        self.base_ids = min(len(job.model.tokenizer), job.model.info.vocabulary)
        self.device = job.model.device
        # Not every model ignores padding; pad only for those known to.
        self.batch = 1 if job.model.forward.one_by_one else BATCH
        self._next: dict[tuple[Ids, Ids], Tensor] = {}

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._next.clear()
        del self.model

    @abstractmethod
    def logits(self, query: Query, answer: Ids, *, start: bool) -> Tensor:
        """Logits [1, T, V] of the prompt and an answer after it, with the start rows or the
        refined ones."""

    @abstractmethod
    def plain_logits(self, ids: Ids) -> Tensor:
        """Logits [1, T, V] of plain token ids, without any rows."""

    @abstractmethod
    def generate(self, queries: Sequence[Query], settings: GenerationConfig) -> list[Ids]:
        """The new tokens of `model.generate`; anything may follow an end token."""

    def logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        return torch.stack([self._after(query)[: self.base_ids] for query in queries])

    def start_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        return torch.stack(
            [self._logprobs(query, (0,), start=True)[0, : self.base_ids] for query in queries]
        )

    @torch.no_grad()
    def plain_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        plain = [q.sequence.context(self.exported.prompt.prompt_ids) for q in queries]
        logits = torch.stack([self.plain_logits(ids)[0, -1].float() for ids in plain])
        return torch.log_softmax(logits, dim=1)[:, : self.base_ids].cpu()

    def greedy(self, queries: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        config: Any = GenerationConfig  # it has no types
        settings = config(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=0,
        )
        with silence_libraries(), torch.no_grad():
            answers = self.generate(queries, settings)
        return [before_end(answer, self.end_ids) for answer in answers]

    def answer_logprob(self, query: Query, answer: Ids) -> float:
        if len(answer) == 1:
            return float(self._after(query)[answer[0]])
        logprobs_NV = self._logprobs(query, answer)
        return float(logprobs_NV[range(len(answer)), list(answer)].sum())

    def _after(self, query: Query) -> Tensor:
        """Log-probabilities [V] of the next token, computed once."""
        key = (query.sequence.prefix, query.sequence.suffix)
        if key not in self._next:
            self._next[key] = self._logprobs(query, (0,))[0]
        return self._next[key]

    @torch.no_grad()
    def _logprobs(self, query: Query, answer: Ids, *, start: bool = False) -> Tensor:
        """Log-probabilities [N, V] before each of N tokens of an answer."""
        logits_TV = self.logits(query, answer[:-1], start=start)[0]
        return torch.log_softmax(logits_TV[-len(answer) :].float(), dim=1).cpu()
