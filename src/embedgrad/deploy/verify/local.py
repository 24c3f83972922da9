"""Engines of a check that run `transformers` in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from embedgrad.deploy.choices import Choices
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Engine, Query
from embedgrad.errors import ExportError
from embedgrad.model.decoding import before_end
from embedgrad.model.generation import neutral_generation
from embedgrad.model.loading.quiet import model_errors
from embedgrad.prompt.boundaries import Ids

EXACT = 1e-4  # natural log-probability, in float32
CANNOT_ANSWER = "transformers cannot answer with the exported prompt"
BATCH = 8  # answers that are generated side by side


class LocalEngine(Engine):
    """Computes log-probabilities one query at a time, so that nothing is padded.

    A subclass knows what comes before an answer.
    """

    tolerance: float | None = EXACT
    suppressed: Sequence[int] | None = None  # ids that are never generated
    limits_by_text = False  # even where every choice is one token
    model: Any

    def __init__(self, job: Job, exported: ExportedPrompt):
        self.exported = exported
        self.end_ids = job.model.ends_of(exported.sequencer)
        self.base_ids = min(len(job.model.tokenizer), job.model.info.vocabulary)
        # Not every model ignores padding; pad only for those known to.
        self.batch = 1 if job.model.forward.one_by_one else BATCH
        self.choices = Choices.of(exported)
        self._next: dict[tuple[Ids, Ids], Tensor] = {}

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._next.clear()
        del self.model

    @abstractmethod
    def prompt(self, query: Query) -> Tensor:
        """What the model reads before an answer: token ids [T], or embeddings [T, D]."""

    @abstractmethod
    def start_rows(self) -> AbstractContextManager[None]:
        """Use the start rows instead of the refined ones."""

    def lookup(self, ids: Ids) -> Tensor:
        """Plain tokens as the model reads them."""
        return torch.tensor(ids, dtype=torch.long)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits [T, V] of token ids [T] or embeddings [T, D]."""
        logits: Tensor = self.model(**self._arguments(inputs[None]), use_cache=False).logits
        return logits[0]

    def plain_logits(self, ids: Ids) -> Tensor:
        """Logits [T, V] of plain token ids, without any rows."""
        return self.logits(self.lookup(ids))

    def logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        return torch.stack([self._after(query)[: self.base_ids] for query in queries])

    def start_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        with self.start_rows():
            logprobs = [self._logprobs(query, (0,))[0, : self.base_ids] for query in queries]
        return torch.stack(logprobs)

    @torch.no_grad()
    def plain_logprobs_BV(self, queries: Sequence[Query]) -> Tensor:
        plain = [q.sequence.context(self.exported.prompt.prompt_ids) for q in queries]
        logits = torch.stack([self.plain_logits(ids)[-1].float() for ids in plain])
        return torch.log_softmax(logits, dim=1)[:, : self.base_ids].cpu()

    def greedy(self, queries: Sequence[Query], max_new_tokens: int) -> list[Ids]:
        """In batches, padded on the left: one by one they would take most of a check's time."""
        answers: list[Ids] = []
        with (
            model_errors(CANNOT_ANSWER, ExportError),
            torch.no_grad(),
            neutral_generation(self.model),
        ):
            for first in range(0, len(queries), self.batch):
                prompts = [self.prompt(query) for query in queries[first : first + self.batch]]
                masks = [torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]
                inputs, mask = (
                    pad_sequence(part, batch_first=True, padding_side="left")
                    for part in (prompts, masks)
                )
                output_BT = self.model.generate(
                    **self._arguments(inputs),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(self.end_ids) or None,
                    pad_token_id=0,
                    suppress_tokens=self.suppressed,
                )
                # After token ids, `generate` repeats the prompt.
                start = inputs.shape[1] if inputs.ndim == 2 else 0
                answers += map(tuple, output_BT[:, start:].tolist())
        return [before_end(answer, self.end_ids) for answer in answers]

    def choose(self, query: Query) -> int | None:
        """As a server's structured output does: the likeliest token that keeps to a choice."""
        assert self.choices is not None
        if self.choices.single and not self.limits_by_text:
            logprobs_V = self._after(query)
            return int(logprobs_V[[ids[0] for ids in self.choices.tokens]].argmax())
        written, ids = "", list[int]()
        while True:
            left = [text for text in self.choices.texts if text.startswith(written)]
            if left == [written]:
                return self.choices.texts.index(written)
            allowed = {i: "" for i in self.end_ids if written in left}
            allowed |= {
                i: piece
                for i, piece in self._pieces
                if any(text.startswith(written + piece) for text in left)
            }
            if not allowed:
                return None
            logprobs_V = self._logprobs(query, (*ids, 0))[-1]
            best = max(allowed, key=lambda i: float(logprobs_V[i]))
            if not allowed[best]:
                return self.choices.texts.index(written)
            written, ids = written + allowed[best], [*ids, best]

    @cached_property
    def _pieces(self) -> list[tuple[int, str]]:
        """Tokens that are part of a choice, and their texts."""
        assert self.choices is not None
        tokenizer, pieces = self.exported.sequencer.tokenizer, []
        for i in sorted({*range(self.base_ids)}.difference(tokenizer.all_special_ids)):
            piece = tokenizer.decode([i], clean_up_tokenization_spaces=False)
            # SentencePiece's decoder drops a space at the beginning.
            if str(tokenizer.convert_ids_to_tokens(i)).startswith("\u2581"):
                piece = f" {piece.lstrip(' ')}"
            if piece and any(piece in text for text in self.choices.texts):
                pieces.append((i, piece))
        return pieces

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
    def _logprobs(self, query: Query, answer: Ids) -> Tensor:
        """Log-probabilities [N, V] before each of N tokens of an answer."""
        logits_TV = self.logits(torch.cat([self.prompt(query), self.lookup(answer[:-1])]))
        return torch.log_softmax(logits_TV[-len(answer) :].float(), dim=1).cpu()

    def _arguments(self, inputs: Tensor) -> dict[str, Tensor]:
        """A batch as arguments of the model."""
        if inputs.is_floating_point():
            return {"inputs_embeds": inputs.to(self.model.device, self.model.dtype)}
        return {"input_ids": inputs.to(self.model.device)}
