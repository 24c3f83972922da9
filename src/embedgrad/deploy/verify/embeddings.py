"""Exports whose prompt is sent as embeddings, made by the exported program itself.

safetensors      the program's own model answers
vLLM, SGLang     the client's request bodies are decoded, and the base model answers; the server
                 itself, which is seldom installed where prompts are refined, is not asked
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from embedgrad.deploy.destinations.client_code import open_example, read_base
from embedgrad.deploy.destinations.embedding_client import Bodies
from embedgrad.deploy.destinations.registry import find_destination
from embedgrad.deploy.destinations.safetensors import PROGRAM
from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Query
from embedgrad.deploy.verify.local import EXACT, LocalEngine
from embedgrad.prompt.boundaries import Ids


class EmbeddingEngine(LocalEngine):
    """A program with `rows`, and a model for the embeddings that the program makes."""

    def __init__(self, job: Job, exported: ExportedPrompt, program: Any, model: Any):
        super().__init__(job, exported)
        self.program, self.model = program, model
        self.refined_PD = program.rows
        self.start_PD = exported.prompt.start_rows.to(self.refined_PD)

    @abstractmethod
    def embeddings(self, columns: Mapping[str, str]) -> Tensor:
        """The whole prompt [T, D] by the program, with its present rows."""

    @abstractmethod
    def lookup(self, ids: Ids) -> Tensor:
        """Embeddings [T, D] of plain tokens."""

    def logits(self, query: Query, answer: Ids, *, start: bool) -> Tensor:
        embeds_TD = self._prompt(query, start=start)
        if answer:
            embeds_TD = torch.cat([embeds_TD, self.lookup(answer)])
        return self._logits(embeds_TD)

    def plain_logits(self, ids: Ids) -> Tensor:
        return self._logits(self.lookup(ids))

    def generate(self, queries: Sequence[Query], settings: GenerationConfig) -> list[Ids]:
        """In batches, padded on the left: one by one they would take most of a check's time."""
        answers: list[Ids] = []
        for first in range(0, len(queries), self.batch):
            prompts = [self._prompt(q, start=False) for q in queries[first : first + self.batch]]
            masks = [torch.ones(len(embeds_TD), dtype=torch.long) for embeds_TD in prompts]
            embeds, mask = (
                pad_sequence(part, batch_first=True, padding_side="left")
                for part in (prompts, masks)
            )
            answers_BT = self.model.generate(
                inputs_embeds=embeds.to(self.model.device, self.model.dtype),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
            )
            answers += map(tuple, answers_BT.tolist())
        return answers

    def _prompt(self, query: Query, *, start: bool) -> Tensor:
        self.program.rows = self.start_PD if start else self.refined_PD
        return self.embeddings(dict(query.sequence.example.columns))

    def _logits(self, embeds_TD: Tensor) -> Tensor:
        embeds = embeds_TD[None].to(self.model.device, self.model.dtype)
        logits: Tensor = self.model(inputs_embeds=embeds, use_cache=False).logits
        return logits


@final
class SnippetEngine(EmbeddingEngine):
    """`example.py`: its own model, its own tokens, the rows that it read.

    Raises `EngineError` for a program that is not the one that embedgrad writes.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        program = open_example(PROGRAM, folder, job, exported, written)
        super().__init__(job, exported, program, program.model)

    def embeddings(self, columns: Mapping[str, str]) -> Tensor:
        embeds_TD: Tensor = self.program.embeddings(columns)
        return embeds_TD

    def lookup(self, ids: Ids) -> Tensor:
        embeds_TD: Tensor = self.model.get_input_embeddings()(torch.tensor(ids))
        return embeds_TD


@final
class BodyEngine(EmbeddingEngine):
    """`client.py`: the prompt in its request bodies, decoded as the server decodes it.

    All embeddings are rounded to the server's precision. Raises `EngineError` for a client that is
    not the one that embedgrad writes, and for bodies that hold different prompts.
    """

    def __init__(
        self, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
    ):
        writer = find_destination(written["destination"])
        assert isinstance(writer, Bodies)
        read_base(written, job)
        client = writer.client(folder, job, exported, written)
        super().__init__(job, exported, client, job.model.model)
        self.tolerance = EXACT if written["dtype"] == "float32" else None
        self._writer, self._exported = writer, exported

    def embeddings(self, columns: Mapping[str, str]) -> Tensor:
        return self._writer.decode(self.program, columns, self._exported)

    def lookup(self, ids: Ids) -> Tensor:
        embeds_TD: Tensor = self.program.embed(torch.tensor(ids, dtype=torch.long))
        return embeds_TD
