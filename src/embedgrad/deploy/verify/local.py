"""Engines that compute in this process, with a `transformers` model opened anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.verify.engine import Asked, Engine
from embedgrad.model.decoding import before_end
from embedgrad.model.loading.quiet import silenced
from embedgrad.prompt.boundaries import Ids

EXACT = 1e-4  # natural log-probability, in float32
BATCH = 8  # answers that are written side by side


class LocalEngine(Engine):
    """Log-probabilities are asked for one row at a time, so that nothing is padded.

    Texts may be written `batch` rows at a time.

    A subclass says what stands before an answer, and runs the model on it; one that has new tokens
    says how likely they are.
    """

    tolerance: float | None = EXACT
    model: Any

    def __init__(self, job: Job, exported: Exported):
        self.span_ids = exported.prompt.span.ids
        self.end_ids = job.model.ends_of(exported.sequencer)
        self.base_ids = min(len(job.model.tokenizer), job.model.info.vocabulary)
        self.device = job.model.device
        # Padding, which not every model leaves out of account, is for those known to.
        self.batch = 1 if job.model.forward.one_by_one else BATCH
        self._next: dict[tuple[Ids, Ids], Tensor] = {}

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._next.clear()
        del self.model

    @abstractmethod
    def logits(self, row: Asked, answer: Ids, *, start: bool) -> Tensor:
        """Logits [1, T, V] of the prompt and of an answer behind it, with the start rows or the
        refined ones."""

    @abstractmethod
    def plain_logits(self, ids: Ids) -> Tensor:
        """Logits [1, T, V] of plain token ids, without any rows."""

    @abstractmethod
    def generated(self, rows: Sequence[Asked], settings: GenerationConfig) -> list[Ids]:
        """The new tokens of `generate`; anything may stand behind an end token."""

    def logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        return torch.stack([self._after(row)[: self.base_ids] for row in rows])

    def start_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        parts = [self._logprobs(row, (0,), start=True)[0, : self.base_ids] for row in rows]
        return torch.stack(parts)

    @torch.no_grad()
    def plain_logprobs_BV(self, rows: Sequence[Asked]) -> Tensor:
        plain = [row.sequence.prefix + self.span_ids + row.sequence.suffix for row in rows]
        parts = [self.plain_logits(ids)[0, -1].float() for ids in plain]
        return torch.log_softmax(torch.stack(parts), dim=1)[:, : self.base_ids].cpu()

    def greedy(self, rows: Sequence[Asked], max_new_tokens: int) -> list[Ids]:
        config: Any = GenerationConfig  # without types
        settings = config(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=0,
        )
        with silenced(), torch.no_grad():
            answers = self.generated(rows, settings)
        return [before_end(answer, self.end_ids) for answer in answers]

    def answer_logprobs(self, rows: Sequence[Asked]) -> list[tuple[float, ...]]:
        return [
            tuple(self._answered(row, answer) for answer in row.sequence.targets) for row in rows
        ]

    def added_mass(self, rows: Sequence[Asked]) -> float:
        return 0.0

    def _answered(self, row: Asked, answer: Ids) -> float:
        if len(answer) == 1:
            return float(self._after(row)[answer[0]])
        logprobs_NV = self._logprobs(row, answer)
        return float(logprobs_NV[range(len(answer)), list(answer)].sum())

    def _after(self, row: Asked) -> Tensor:
        """Log-probabilities [V] of the next token, computed once."""
        key = (row.sequence.prefix, row.sequence.suffix)
        if key not in self._next:
            self._next[key] = self._logprobs(row, (0,))[0]
        return self._next[key]

    @torch.no_grad()
    def _logprobs(self, row: Asked, answer: Ids, *, start: bool = False) -> Tensor:
        """Log-probabilities [N, V] before each of N tokens of an answer."""
        logits_TV = self.logits(row, answer[:-1], start=start)[0]
        return torch.log_softmax(logits_TV[-len(answer) :].float(), dim=1).cpu()
